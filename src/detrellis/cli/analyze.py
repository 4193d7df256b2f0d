"""`detrellis analyze`: measurements of the papers, on any number of runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from detrellis.arguments import Cells, Images, Index, Iou, limits
from detrellis.cli.options import (
    IS_MAIN_PROCESS,
    AsJson,
    Device,
    EvalData,
    console,
    grouped,
    print_json,
)
from detrellis.errors import UserError

if TYPE_CHECKING:
    from detrellis.engine.evaluate import EvalOptions

analyze = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help=(
        "Measurements of the papers, as figure, table and JSON, over one run or several. See "
        "docs/analysis.md."
    ),
)

Number = TypeVar("Number", int, float)
Runs = Annotated[
    list[Path], typer.Argument(help="Runs to compare; also weights files and others' checkpoints.")
]
Out = Annotated[Path, typer.Option(help="Folder for the figure and the numbers.")]
Names = Annotated[
    str | None,
    typer.Option(help="What to call the runs, with commas between (default: their folders)."),
]


@dataclass(frozen=True)
class Shown:
    """How runs are measured and shown."""

    names: Names = None
    device: Device = None
    as_json: AsJson = False

    def measure(
        self, name: str, places: list[Path], out: Path, on: EvalOptions, **dials: Any
    ) -> None:
        """Analyze the runs, write figure and values, and print either the table or the values."""
        from detrellis.analysis.measurements import measurement, ready, save
        from detrellis.analysis.runs import ComparedRuns

        ready(out, name, [dials["image"]] if dials.get("image") else [])
        names = None if self.names is None else [part.strip() for part in self.names.split(",")]
        runs = ComparedRuns(places, names=names, device=self.device, progress=True, **vars(on))
        result = measurement(name).analyze(runs, **dials)
        if not IS_MAIN_PROCESS:
            return
        files = save(result, out)
        if self.as_json:
            print_json(result.to_dict())
            return
        console.print(result.table())
        console.say(f"Figure: {files.figure}")
        console.say(f"Numbers: {files.values}")


@analyze.command()
@grouped
def misalignment(
    runs: Runs,
    out: Out = Path("analysis/misalignment"),
    threshold: Annotated[
        float, typer.Option(**limits(Iou), help="IoU that a high-confidence query needs.")
    ] = 0.5,
    top: Annotated[
        str, typer.Option(help="For BR-recall: the m highest scores, several with commas.")
    ] = "10,50,100",
    *,
    on: EvalData,
    shown: Shown,
) -> None:
    """Does the query that localises an object best also score highest? Align-DETR, Fig. 1 (left).

    Example: detrellis analyze misalignment runs/baseline runs/align --names baseline,Align
    """
    wanted = _numbers("--top", top, int, "whole numbers", "10,100")
    shown.measure("misalignment", runs, out, on.on(), threshold=threshold, top=wanted)


@analyze.command()
@grouped
def groups(
    runs: Runs,
    out: Out = Path("analysis/groups"),
    grid: Annotated[
        int, typer.Option(**limits(Cells), help="Cells on each side of a histogram of positions.")
    ] = 8,
    *,
    on: EvalData,
    shown: Shown,
) -> None:
    """Where are the groups' queries, how far apart,
    and does each group do as well? Group DETR, Fig. 3 and 4.

    Also how unstable the matching is from decoder layer to decoder layer (DN-DETR's IS). For runs
    trained with scheme group; those trained with -o schemes.group.distances=true show the distances
    along training too.

    Example: detrellis analyze groups runs/group --names "3 groups"
    """
    shown.measure("groups", runs, out, on.on(), grid=grid)


@analyze.command(name="one-to-many")
@grouped
def one_to_many(
    runs: Runs,
    out: Out = Path("analysis/one_to_many"),
    nms: Annotated[
        str, typer.Option(help="IoU thresholds of NMS, several with commas.")
    ] = "0.5,0.6,0.7,0.8",
    *,
    on: EvalData,
    shown: Shown,
) -> None:
    """AP over the number of training queries:
    one-to-one, one-to-many, group-wise. Group DETR, Fig. 1.

    Runs trained with -o loss.one_to_many=K leave duplicates, and are evaluated without NMS and with
    it.

    Example: detrellis analyze one-to-many runs/one runs/many3 runs/group3
    """
    wanted = _numbers("--nms", nms, float, "numbers", "0.5,0.7")
    shown.measure("one_to_many", runs, out, on.on(), nms=wanted)


@analyze.command()
@grouped
def discriminability(
    runs: Runs,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the figure and the numbers (default: analysis/discriminability-OF)."
        ),
    ] = None,
    of: Annotated[
        Literal["encoder", "attention"],
        typer.Option(help="Maps of the encoder's features, or of what queries attend to."),
    ] = "encoder",
    images: Annotated[
        int, typer.Option(**limits(Images), help="Images that are drawn with their maps.")
    ] = 4,
    *,
    on: EvalData,
    shown: Shown,
) -> None:
    """Do the encoder's features, or the decoder's attention,
    tell objects from background? Co-DETR, Fig. 2 and 3.

    The curves of IoF over IoB of all runs, the area under each, and some images with each run's
    map.

    Example: detrellis analyze discriminability runs/baseline runs/co --of attention
    """
    place = out or Path(f"analysis/discriminability-{of}")
    shown.measure("discriminability", runs, place, on.on(), of=of, images=images)


@analyze.command()
@grouped
def instability(
    runs: Runs, out: Out = Path("analysis/instability"), *, on: EvalData, shown: Shown
) -> None:
    """How many queries are matched to another object than in the epoch before? Co-DETR, Fig.
    5, after DN-DETR.

    For runs that kept the weights of their epochs: trained with -o schedule.keep_every=1.

    Example: detrellis analyze instability runs/baseline runs/co
    """
    shown.measure("instability", runs, out, on.on())


@analyze.command()
@grouped
def branches(
    runs: Runs, out: Out = Path("analysis/branches"), *, on: EvalData, shown: Shown
) -> None:
    """How well does each auxiliary head detect by itself, beside the decoder? Co-DETR, Table 11.

    For runs trained with scheme co. Branches' detections are after NMS.

    Example: detrellis analyze branches runs/co-atss runs/co-atss-rcnn
    """
    shown.measure("branches", runs, out, on.on())


@analyze.command()
@grouped
def conflicts(
    runs: Runs,
    out: Out = Path("analysis/conflicts"),
    cam: Annotated[
        Literal["gradcam", "hirescam"],
        typer.Option(
            help="Maps weighted by the mean gradient of a level, or by the gradient at each place."
        ),
    ] = "gradcam",
    eps: Annotated[
        float, typer.Option(help="Added to each pixel of a map whose maximum is 1.")
    ] = 1e-3,
    *,
    on: EvalData,
    shown: Shown,
) -> None:
    """Do the heads that share an encoder look at the same places? Co-DETR, Fig.
    6, 8 and 9 (Eq. 9 to 12).

    For runs trained with scheme co. KL divergences between the heads' class activation maps.

    Example: detrellis analyze conflicts runs/co-atss runs/co-atss-rcnn
    """
    shown.measure("conflicts", runs, out, on.on(), cam=cam, eps=eps)


@analyze.command(name="query-distance")
@grouped
def query_distance(
    runs: Runs, out: Out = Path("analysis/query_distance"), *, on: EvalData, shown: Shown
) -> None:
    """Do the branches' positive queries lie where the detector's own queries do? Co-DETR, Fig. 7.

    For runs trained with scheme co, of detectors whose queries have a place.

    Example: detrellis analyze query-distance runs/co
    """
    shown.measure("query_distance", runs, out, on.on())


@analyze.command()
@grouped
def attention(
    runs: Runs,
    image: Annotated[
        Path | None,
        typer.Option(help="The picture (default: the first of the first run's validation split)."),
    ] = None,
    query: Annotated[
        int | None,
        typer.Option(
            **limits(Index),
            help="Which query, from 0 (default: each run's with the highest score).",
        ),
    ] = None,
    out: Out = Path("analysis/attention"),
    *,
    shown: Shown,
) -> None:
    """Where does a query look, layer by layer and head by head? SAM-DETR++, Fig. 3 and 5.

    Its reference boxes, sampling points and cross-attention, of any of the detectors, in the same
    picture.

    Example: detrellis analyze attention runs/detr runs/sam --image picture.jpg
    """
    shown.measure("attention", runs, out, EvalData().on(), image=image, query=query)


def _numbers(
    option: str, text: str, kind: Callable[[str], Number], what: str, example: str
) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"{option} {text}: not {what}", f"For example: {option} {example}."
        ) from None
