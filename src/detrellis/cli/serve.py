"""`detrellis serve` and `detrellis push`: a trained detector where others reach it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from detrellis.arguments import BatchSize, Iou, Port, limits
from detrellis.cli.options import AsJson, Device, Half, ScoreOrAuto, Trained, console, print_json
from detrellis.errors import command

MEBI = 2**20


def serve(
    run: Trained,
    host: Annotated[
        str,
        typer.Option(
            help="Address to answer at (default: this machine alone; there is no password)."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(**limits(Port), help="Port; 0: one that is free.")] = 8000,
    threshold: ScoreOrAuto = 0.3,
    nms: Annotated[
        float | None,
        typer.Option(**limits(Iou), help="Apply NMS at this IoU: where objects are found twice."),
    ] = None,
    batch: Annotated[
        int,
        typer.Option(
            "--batch", "--batch-size", **limits(BatchSize), help="Pictures at a time, at most."
        ),
    ] = 8,
    max_mib: Annotated[int, typer.Option(min=1, help="Largest request, in MiB.")] = 32,
    max_megapixels: Annotated[
        int, typer.Option(min=1, help="Largest picture, in millions of pixels.")
    ] = 50,
    device: Device = None,
    half: Half = False,
) -> None:
    """Serve a detector over HTTP:
    POST a picture to /predict, or drop it on the page at /. Ctrl-C stops it.

    Example: detrellis serve runs/first --port 8000, then: curl --data-binary @photo.jpg
    http://127.0.0.1:8000/predict
    """
    from detrellis import api

    def started(address: str) -> None:
        console.say("Serving at ", (address, "bold"), ". Ctrl-C stops it.")

    api.serve(
        run,
        host=host,
        port=port,
        threshold=threshold,
        nms=nms,
        batch_size=batch,
        max_bytes=max_mib * MEBI,
        max_pixels=max_megapixels * 10**6,
        device=device,
        half=half,
        started=started,
    )


def push(
    run: Annotated[Path, typer.Argument(help="A run, or a weights file from one.")],
    repository: Annotated[
        str, typer.Argument(help="Repository on the Hugging Face Hub: org/name.")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="A new repository is public (default: private).")
    ] = False,
    licence: Annotated[
        str | None, typer.Option(help="Of the weights, as the hub names it: apache-2.0.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    as_json: AsJson = False,
) -> None:
    """Send a run's weights to the Hugging Face Hub,
    with a model card, but no picture, no annotation and no path.

    Log in first: hf auth login, or HF_TOKEN. Afterwards hf:org/name is a detector wherever one is
    taken.

    Example: detrellis push runs/first my-org/blood-cells --licence apache-2.0
    """
    from detrellis import api

    done = api.push(run, repository, public=public, licence=licence, message=message)
    if as_json:
        print_json(done.to_dict())
        return
    console.say(f"{', '.join(done.files)}: ", (done.url, "bold"))
    console.say("Next: ", command("predict", f"hf:{done.repository}", "PICTURES"))
