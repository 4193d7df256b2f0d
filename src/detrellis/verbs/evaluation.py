"""`evaluate`: how good a run is."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from detrellis.arguments import BatchSize, Iou, Metric, Split, Workers, checked
from detrellis.data.findings import SkipBad
from detrellis.data.layout import DataSource
from detrellis.data.masks import run_lengths
from detrellis.distributed import World, process_group
from detrellis.engine.checkpoint import find_weights
from detrellis.engine.coco_backend import Masks
from detrellis.engine.coco_eval import CocoEvaluator
from detrellis.engine.console import track
from detrellis.engine.eval_result import EvalResult
from detrellis.engine.evaluate import EvalOptions, collect, gives_masks
from detrellis.engine.views import collect_views, read_views
from detrellis.engine.voc_eval import VocResult, evaluate_voc
from detrellis.errors import UserError
from detrellis.interop.load import is_foreign
from detrellis.loading import OpenedSplit, open_split
from detrellis.outputs import Outputs
from detrellis.predictions.tiles import Tiling, collect_tiles, one_way
from detrellis.report import write as reporting


@checked
def evaluate(
    run: str | Path,
    *,
    metric: Metric = "coco",
    data: str | Path | DataSource | None = None,
    val: str | Path | None = None,
    val_images: str | Path | None = None,
    split: Split = "val",
    results: str | Path | None = None,
    report: str | Path | None = None,
    nms: Iou | None = None,
    tta: bool | str = False,
    tiles: int | None = None,
    overlap: float = 0.2,
    full: bool = True,
    batch_size: BatchSize = 4,
    skip_bad: SkipBad = False,
    workers: Workers = 2,
    device: str | None = None,
    half: bool = False,
    progress: bool = False,
) -> EvalResult | VocResult:
    """Box AP of a run on its own validation split, on another, or on other data with its classes.

    `data` is another data set, a folder in a known layout; `val` is a COCO file instead of it, with
    its images in `val_images`. `metric`: COCO's AP over the IoUs 0.5 to 0.95, the same of masks
    with that of boxes beside it (`masks`), or Pascal VOC's at 0.5 (`engine/voc_eval.py`). `results`
    names a file for the detections in COCO's results format. `report` is a folder for
    `report.html`, which says what goes wrong; default: the run's, where nothing differs from what
    training did. `nms` applies non-maximum suppression at that IoU first: how much AP that gains
    says how many duplicates the detector leaves. `tta`, `tiles` and `half` are as in `predict`.
    Raises `UserError` where the data set has errors, unless `skip_bad` drops the bad records and
    the images that lose an object by that (`"boxes"`: these stay).
    """
    outputs = None if results is None else Outputs(Path(results).parent, "--results")
    if outputs is not None:
        outputs.ready([Path(results or "").name], inputs=[run])
    weights = None if is_foreign(run) else find_weights(Path(run))
    tiling = None if tiles is None else Tiling(tiles, overlap, full)
    _refuse(metric, report is not None, tta, tiling)
    other = nms is not None or tta or tiles or half or metric == "voc"
    as_in_training = not other and data is None and val is None
    page = reporting.report_outputs(weights if as_in_training else None, report, split)
    options = EvalOptions(data, val, val_images, split, batch_size, skip_bad, workers)
    with process_group(device) as world, open_split(run, world, options, half=half) as opened:
        masked, shown = metric == "masks", progress and world.is_main_process
        truth = run_lengths(opened.annotations) if masked else None  # or says what lacks one
        evaluator = _evaluated(opened, options, world, (nms, tta, tiling), truth, shown)
        if outputs is not None and world.is_main_process:
            outputs.write_with(Path(results or "").name, evaluator.results_json)
        if metric == "voc":
            return evaluate_voc(opened.annotations, evaluator.arrays())
        result = evaluator.compute(resample=True)
        if masked:
            result = replace(evaluator.compute(resample=True, of="mask"), boxes=result)
        if page is None or not world.is_main_process:
            return result
        again = reporting.evaluation_command(run, options, metric, nms, tta, tiling, half)
        card = reporting.card_of(weights, opened.model)
        return reporting.write_report(page, evaluator, result, card, again, split)


def _refuse(metric: Metric, reports: bool, tta: bool | str, tiling: Tiling | None) -> None:
    """Raises `UserError` for arguments that cannot be combined."""
    if tiling is not None:
        one_way(tta)
    if tta and metric == "masks":
        raise UserError(
            "--tta merges boxes, and --metric masks compares masks", "Leave one of them out."
        )
    if reports and metric == "voc":
        raise UserError(
            "--report and --metric voc: a report is about COCO's metrics", "Leave one of them out."
        )


def _evaluated(
    opened: OpenedSplit,
    options: EvalOptions,
    world: World,
    ways: tuple[float | None, bool | str, Tiling | None],
    truth: Masks | None,
    shown: bool,
) -> CocoEvaluator:
    """What is detected in all images, looked at in one of the `ways`: NMS, views, tiles. With
    `truth`, the masks of the annotations, the detector has to give masks."""
    nms, tta, tiling = ways
    model, detector = opened.model, opened.model.detector
    if tiling is not None:
        detect = partial(model.in_tiles, tiling=tiling, nms=nms, batch_size=options.batch_size)
        return collect_tiles(detect, opened.annotations, world, truth, shown)
    views = read_views(tta, model.recipe.data, nms)
    if views is not None:
        return collect_views(
            detector, views, partial(opened.seen, options, world, shown), opened.annotations
        )
    check = None if truth is None else gives_masks
    batches = track(opened.loader, "evaluate", len(opened.loader), shown)
    return collect(detector, batches, opened.annotations, world.device, (nms,), check, truth)[0]
