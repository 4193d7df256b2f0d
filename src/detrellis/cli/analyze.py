"""`detrellis analyze`: measurements of the papers, on any number of runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from detrellis.cli.options import (
    LEADS,
    AsJson,
    BatchSize,
    Data,
    Device,
    SkipBad,
    Split,
    ValFile,
    ValImages,
    Workers,
    console,
    print_json,
)
from detrellis.errors import UserError

if TYPE_CHECKING:
    from detrellis.analysis.figures import Result

analyze = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Measurements of the papers, as figure, table and JSON, over one run or several. See docs/analysis.md.",
)

Number = TypeVar("Number", int, float)
Runs = Annotated[list[Path], typer.Argument(help="Runs to compare; also weights files and others' checkpoints.")]
Names = Annotated[str | None, typer.Option(help="What to call the runs, with commas between (default: their folders).")]


@analyze.command()
def misalignment(
    runs: Runs,
    out: Annotated[Path, typer.Option(help="Folder for the figure and the numbers.")] = Path("analysis/misalignment"),
    threshold: Annotated[float, typer.Option(min=0, max=1, help="IoU that a high-confidence query needs.")] = 0.5,
    top: Annotated[str, typer.Option(help="For BR-recall: the m highest scores, several with commas.")] = "10,50,100",
    names: Names = None,
    data: Data = None,
    val: ValFile = None,
    val_images: ValImages = None,
    split: Split = "val",
    batch_size: BatchSize = 4,
    skip_bad: SkipBad = False,
    device: Device = None,
    workers: Workers = 2,
    as_json: AsJson = False,
) -> None:
    """Does the query that localises an object best also score highest? Align-DETR, Fig. 1 (left).

    Example: detrellis analyze misalignment runs/baseline runs/align --names baseline,Align
    """
    wanted = _numbers("--top", top, int, "whole numbers", "10,100")
    from detrellis.analysis.figures import ready
    from detrellis.analysis.misalignment import NAME
    from detrellis.analysis.misalignment import analyze as measure

    ready(out)
    found = measure(
        runs,
        threshold=threshold,
        top=wanted,
        names=_listed(names),
        data=data,
        val=val,
        val_images=val_images,
        split=split,
        batch_size=batch_size,
        skip_bad=skip_bad,
        device=device,
        workers=workers,
        progress=True,
    )
    _report(found, out, NAME, as_json)


@analyze.command()
def groups(
    runs: Runs,
    out: Annotated[Path, typer.Option(help="Folder for the figure and the numbers.")] = Path("analysis/groups"),
    grid: Annotated[int, typer.Option(min=1, help="Cells on each side of a histogram of positions.")] = 8,
    names: Names = None,
    data: Data = None,
    val: ValFile = None,
    val_images: ValImages = None,
    split: Split = "val",
    batch_size: BatchSize = 4,
    skip_bad: SkipBad = False,
    device: Device = None,
    workers: Workers = 2,
    as_json: AsJson = False,
) -> None:
    """Where are the groups' queries, how far apart, and does each group do as well? Group DETR, Fig. 3 and 4.

    Also how unstable the matching is from decoder layer to decoder layer (DN-DETR's IS). For runs trained with scheme
    group; those trained with -o schemes.group.distances=true show the distances along training too.

    Example: detrellis analyze groups runs/group --names "3 groups"
    """
    from detrellis.analysis.figures import ready
    from detrellis.analysis.groups import NAME
    from detrellis.analysis.groups import analyze as measure

    ready(out)
    found = measure(
        runs,
        grid=grid,
        names=_listed(names),
        data=data,
        val=val,
        val_images=val_images,
        split=split,
        batch_size=batch_size,
        skip_bad=skip_bad,
        device=device,
        workers=workers,
        progress=True,
    )
    _report(found, out, NAME, as_json)


@analyze.command(name="one-to-many")
def one_to_many(
    runs: Runs,
    out: Annotated[Path, typer.Option(help="Folder for the figure and the numbers.")] = Path("analysis/one_to_many"),
    nms: Annotated[str, typer.Option(help="IoU thresholds of NMS, several with commas.")] = "0.5,0.6,0.7,0.8",
    names: Names = None,
    data: Data = None,
    val: ValFile = None,
    val_images: ValImages = None,
    split: Split = "val",
    batch_size: BatchSize = 4,
    skip_bad: SkipBad = False,
    device: Device = None,
    workers: Workers = 2,
    as_json: AsJson = False,
) -> None:
    """AP over the number of training queries: one-to-one, one-to-many, group-wise. Group DETR, Fig. 1.

    Runs trained with -o loss.one_to_many=K leave duplicates, and are evaluated without NMS and with it.

    Example: detrellis analyze one-to-many runs/one runs/many3 runs/group3
    """
    wanted = _numbers("--nms", nms, float, "numbers", "0.5,0.7")
    from detrellis.analysis.figures import ready
    from detrellis.analysis.one_to_many import NAME
    from detrellis.analysis.one_to_many import analyze as measure

    ready(out)
    found = measure(
        runs,
        nms=wanted,
        names=_listed(names),
        data=data,
        val=val,
        val_images=val_images,
        split=split,
        batch_size=batch_size,
        skip_bad=skip_bad,
        device=device,
        workers=workers,
        progress=True,
    )
    _report(found, out, NAME, as_json)


def _report(found: Result, out: Path, name: str, as_json: bool) -> None:
    """Write figure and numbers, and print either the table or the numbers."""
    from detrellis.analysis.figures import save

    if not LEADS:
        return
    files = save(found, out, name)
    if as_json:
        print_json(found.to_dict())
        return
    console.print(found.table())
    console.print(f"Figure: {files.figure}\nNumbers: {files.numbers}", markup=False, highlight=False, soft_wrap=True)


def _listed(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",")]


def _numbers(option: str, text: str, kind: Callable[[str], Number], what: str, example: str) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: not {what}", f"For example: {option} {example}.") from None
