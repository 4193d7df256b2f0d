"""`detrellis eval`: how good a detector is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from detrellis.cli.options import (
    AsJson,
    Device,
    EvalData,
    Metric,
    Trained,
    Ways,
    console,
    grouped,
    print_json,
)


@grouped
def evaluate(
    run: Trained,
    *,
    on: EvalData,
    metric: Metric = "coco",
    results: Annotated[
        Path | None, typer.Option(help="Also write the detections here, in COCO's format.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Folder for report.html: what goes wrong (default: the run, on its own data)."
        ),
    ] = None,
    ways: Ways,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """AP of a run, of its boxes as COCO or Pascal VOC counts it or of its masks,
    on its own validation split or on other data.

    Example: detrellis eval runs/tiny-20260101-120000 --split test --tta-views 256,320,flip
    """
    from detrellis import api

    options: dict[str, Any] = {
        "metric": metric,
        "results": results,
        "report": report,
        "device": device,
    }
    result = api.evaluate(run, **options, progress=True, **ways.chosen(), **vars(on.on()))
    if as_json:
        print_json(result.to_dict())
        return
    console.print(result.table())
    console.print(result.class_table())
    if (page := getattr(result, "report", None)) is not None:  # VOC's metric has none
        console.say("What goes wrong, and where: ", page)
