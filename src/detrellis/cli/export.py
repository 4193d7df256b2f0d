"""`detrellis convert` and `detrellis export`: a trained detector for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from detrellis.cli.options import AsJson, Trained, console, print_json
from detrellis.errors import command

Format = Annotated[
    Literal["onnx", "openvino", "torch"],
    typer.Option("--format", help="Of the file: .onnx, .xml or .pt2."),
]
Size = Annotated[
    str | None,
    typer.Option(metavar="HEIGHTxWIDTH", help="Of all pictures (default: any; takes minutes)."),
]
Detections = Annotated[
    bool, typer.Option("--detections", help="Ranked scores, labels and corners, too.")
]
TensorRt = Annotated[
    bool,
    typer.Option(
        "--tensorrt", help="ONNX without GridSample, which TensorRT 10.14 to 11.1 computes wrongly."
    ),
]
Int8 = Annotated[
    bool,
    typer.Option(
        "--int8", help="Backbone to encoder in 8 bits (openvino); not written if that costs 1 AP."
    ),
]
Calibrate = Annotated[
    Path | None,
    typer.Option(help="Data set to calibrate --int8 and measure it on (default: the run's)."),
]
Verify = Annotated[
    Path | None,
    typer.Option(help="Pictures on which both have to detect the same; exit code 1 if not."),
]


def convert(
    source: Trained,
    out: Annotated[Path, typer.Argument(help="New folder to write.")],
    to: Annotated[
        Literal["detrellis", "hf"] | None, typer.Option(help="Format (default: the other one).")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="COCO JSON that names the classes of a .pth file.")
    ] = None,
    dilation: Annotated[
        bool, typer.Option("--dilation", help="The .pth file is of a DC5 model.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Checkpoints of transformers and of the reference repositories to ours,
    and ours to what transformers loads.

    Example: detrellis convert hf:facebook/detr-resnet-50 detr && detrellis convert detr
    for_transformers
    """
    from detrellis import api

    done = api.convert(source, out, to=to, classes=classes, dilation=dilation)
    if as_json:
        print_json(done.to_dict())
        return
    console.print(f"{done.recipe}: {done.parameters:,} numbers, {done.classes} classes, to {out}")
    if done.skipped:
        console.print(f"Left out, a detector has no use for it: {', '.join(done.skipped)}")
    for difference in done.differences:
        console.print(f"Different there: {difference}.")
    if done.format == "hf":
        console.say(f"Next, in Python: AutoModelForObjectDetection.from_pretrained({str(out)!r})")
    else:
        console.say("Next: ", command("predict", out, "PICTURES"))
        console.say("  or: ", command("train", "--weights", out, "--data", "my_data"))


def export(
    run: Trained,
    *,
    format_: Format = "onnx",
    out: Annotated[
        Path | None, typer.Option(help="File to write (default: model.onnx, ... in the run).")
    ] = None,
    size: Size = None,
    detections: Detections = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Half precision.")] = False,
    tensorrt: TensorRt = False,
    int8: Int8 = False,
    calibrate: Calibrate = None,
    verify: Verify = None,
    as_json: AsJson = False,
) -> None:
    """The network of a run for ONNX Runtime, OpenVINO or torch.
    `predict` and `eval` take the .onnx and .xml files.

    Example: detrellis export RUN --verify my_data/images/val && detrellis predict RUN/model.onnx
    photo.jpg

    For CPUs: detrellis export RUN --format openvino --int8 && detrellis eval RUN/model-int8.xml
    """
    from detrellis import api

    fixed = None if size is None else api.parse_size(size)
    done = api.export(
        run,
        out,
        format=format_,
        size=fixed,
        detections=detections,
        fp16=fp16,
        tensorrt=tensorrt,
        int8=int8,
        calibrate=calibrate,
        verify=verify,
    )
    if as_json:
        print_json(done.to_dict())
    else:
        _print_export(done)
    if done.verification is not None and not done.verification.passed:
        raise typer.Exit(1)


def _print_export(done: Any) -> None:
    written, verification = done.exported, done.verification
    size = "of any size"
    if written.size != (None, None):
        height, width = (side or "any" for side in written.size)
        size = f"of {height}x{width} pixels (height, width)"
    console.print(
        f"{written.out}: {written.bytes / 2**20:.1f} MiB, pictures {size}, any number at a time"
    )
    console.print(f"Outputs: {', '.join(written.outputs)}")
    if written.int8 is not None:
        console.print(written.int8.table())
    if verification is not None:
        console.print(verification.table())
        console.print("The same." if verification.passed else "Not the same.")
    elif written.format != "torch":
        console.say("Next: ", command("predict", written.out, "PICTURES", "--out", "pictures"))
