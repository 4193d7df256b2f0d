"""Making the report of an evaluation, and its files."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from detrellis.arguments import Metric
from detrellis.data.annotations import Annotations
from detrellis.data.files import read_object
from detrellis.data.layout import DataSource
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import BEST, BEST_FOLDER, metadata_of
from detrellis.engine.coco_eval import CocoEvaluator
from detrellis.engine.console import duration
from detrellis.engine.eval_result import EvalResult
from detrellis.engine.evaluate import EvalOptions
from detrellis.engine.log import read_records
from detrellis.errors import UserError, command
from detrellis.outputs import Outputs
from detrellis.predictions.model import Model
from detrellis.predictions.tiles import Tiling
from detrellis.report.diagnose import diagnose
from detrellis.report.gallery import galleries
from detrellis.report.page import page
from detrellis.report.record import Epoch, Report

logger = logging.getLogger(__name__)

LOG = "metrics.jsonl"
KEPT_IN = (BEST_FOLDER, "epochs")  # folders of a run that hold weights and nothing else
SMALL, LARGE = 32**2, 96**2  # areas between which COCO calls an object medium


def report_names(split: str) -> tuple[str, str]:
    """The files of a split's report: the page, and its numbers."""
    stem = "report" if split == "val" else f"report-{split}"
    return f"{stem}.html", f"{stem}.json"


def write_report(
    outputs: Outputs,
    evaluator: CocoEvaluator,
    result: EvalResult,
    card: Card,
    again: str,
    split: str,
) -> EvalResult:
    """Write the page and the numbers of an evaluation into a folder;
    the result, which names the page.

    Where there can be none, for LVIS and without hotcoco, that is said. Raises `UserError` where a
    file is in the way.
    """
    try:
        diagnosed = diagnose(evaluator, result.of)
    except UserError as error:
        logger.warning("no report is written: %s", error)
        return result
    history = _history(outputs.folder / LOG)
    shown = Report(
        title=f"{card.recipe.name} on {split}: {outputs.folder.name}",
        command=again,
        result=result,
        diagnosis=diagnosed.diagnosis,
        epoch=card.epoch,
        step=card.step,
        facts={
            "Data": _data(evaluator.annotations),
            "Run": _run(card, outputs.folder),
            "Costs": _costs(history),
        },
        recipe=card.recipe.model_dump_json(indent=1),
        history=history,
        galleries=galleries(diagnosed, evaluator.annotations),
    )
    html, numbers = report_names(split)
    outputs.write(numbers, json.dumps(shown.to_dict(), indent=1))
    return replace(result, report=str(outputs.write(html, page(shown))))


def evaluation_command(
    run: str | Path,
    options: EvalOptions,
    metric: Metric,
    nms: float | None = None,
    tta: bool | str = False,
    tiling: Tiling | None = None,
    half: bool = False,
) -> str:
    """The command line that repeats an evaluation; what is as by default is left out."""
    data = options.data.folder if isinstance(options.data, DataSource) else options.data
    given = {"--data": data, "--val": options.val, "--val-images": options.val_images, "--nms": nms}
    given |= {"--metric": None if metric == "coco" else metric}
    given |= {"--split": None if options.split == "val" else options.split}
    given |= {"--tta-views": tta if isinstance(tta, str) else None}
    given |= {} if tiling is None else {"--tiles": tiling.size, "--overlap": tiling.overlap}
    flags = {
        "--tta": tta is True,
        "--tiles-only": tiling is not None and not tiling.full,
        "--skip-bad": options.skip_bad,
        "--keep-partial": options.skip_bad == "boxes",
        "--half": half,
    }
    words = [word for pair in given.items() if pair[1] is not None for word in pair]
    return command("eval", run, *words, *(flag for flag, on in flags.items() if on))


def _history(log: Path) -> tuple[Epoch, ...]:
    """The epochs of a run's log; none where there is no log."""
    if not log.is_file():
        return ()
    return tuple(
        Epoch(
            number=record["epoch"],
            loss=record.get("loss"),
            ap=(record.get("eval") or {}).get("AP"),
            seconds=(record.get("seconds") or {}).get("total"),
        )
        for record in read_records(log)
        if record.get("kind") == "epoch"
    )


def _data(a: Annotations) -> Mapping[str, str]:
    """The data set card of what was evaluated."""
    areas = a.areas[~a.crowd]
    small, large = int((areas < SMALL).sum()), int((areas >= LARGE).sum())
    sizes = np.unique(a.sizes, axis=0) if len(a) else a.sizes
    per_class = np.bincount(a.labels[~a.crowd], minlength=len(a.classes))
    return {
        "Annotations": str(a.source or a.root),
        "Images": f"{len(a):,}, of {'one size' if len(sizes) == 1 else f'{len(sizes):,} sizes'}",
        "Boxes": (
            f"{len(areas):,}: {small:,} small, {len(areas) - small - large:,} medium, {large:,} "
            "large"
        ),
        "Crowd regions": str(int(a.crowd.sum())),
        "Images without a box": str(int((np.diff(a.starts) == 0).sum())),
        "Classes": ", ".join(
            f"{name} ({n:,})" for name, n in zip(a.classes.names, per_class.tolist(), strict=True)
        ),
    }


def _run(card: Card, folder: Path) -> Mapping[str, str]:
    values: dict[str, Any] = {
        "Folder": folder.absolute(),
        "Recipe": card.recipe.name,
        "Epoch": f"{card.epoch} of {card.recipe.schedule.epochs}, step {card.step:,}",
        "Seed": card.seed,
        "Started from": card.weights or card.backbone or "random weights",
        "Version": card.version,
    }
    return {name: str(value) for name, value in values.items()}


def _costs(history: tuple[Epoch, ...]) -> Mapping[str, str]:
    seconds = [epoch.seconds for epoch in history if epoch.seconds is not None]
    if not seconds:
        return {"Training": "no log stands beside the weights"}
    total = duration(sum(seconds))
    return {
        "Training": f"{len(seconds)} epochs in {total}",
        "An epoch": duration(sum(seconds) / len(seconds)),
    }


def report_outputs(weights: Path | None, asked: str | Path | None, split: str) -> Outputs | None:
    """Where an evaluation's report goes:
    into the folder that was asked for, else beside the `weights` of a run.

    Checked before any work: raises `UserError` where a file is in the way in a folder that was
    asked for. Beside the weights it is said, and nothing is written, since nobody asked.
    """
    if asked is None and not is_ours(weights):
        return None
    outputs = Outputs(asked or Path(weights or "").parent, "--report")
    try:
        outputs.ready(report_names(split))
    except UserError as error:
        if asked is not None:
            raise
        logger.warning("no report is written: %s", error.message)
        return None
    return outputs


def card_of(weights: Path | None, model: Model) -> Card:
    """The card of weights of ours; of others what is known."""
    if weights is None or weights.suffix != ".safetensors":
        return Card(model.recipe, model.classes, {})
    return Card.from_metadata(metadata_of(weights), weights)


def is_ours(weights: Path | None) -> bool:
    """Whether it is a file in a run's folder:
    no export, not somebody else's, and none of the epochs that were kept.
    """
    return (
        weights is not None
        and weights.suffix == ".safetensors"
        and weights.parent.name not in KEPT_IN
    )


def stored_report(weights: Path, card: Card) -> dict[str, Any]:
    """What `report.json` beside a run's weights holds;
    empty where there is none, or it is of other weights.
    """
    try:
        report = read_object(weights.parent / report_names("val")[1])
    except UserError:
        return {}
    return report if (report.get("epoch"), report.get("step")) == (card.epoch, card.step) else {}


def is_missing(run: Path, validation: Annotations | None) -> bool:
    """Whether a finished run has no report of its best weights,
    though its validation split allows one.
    """
    best = metadata_of(run / BEST)
    if best is None or validation is None or validation.federation is not None:
        return False
    return not stored_report(run / BEST, Card.from_metadata(best, run / BEST))


def report_of_run(
    folder: Path, say: Callable[[str], None], evaluator: CocoEvaluator, card: Card
) -> None:
    """The report at the end of training, of its best weights;
    what prevents it is said, and stops nothing.
    """
    try:
        result = evaluator.compute(resample=True, of=evaluator.kind)
        outputs = Outputs(folder)
        outputs.ready(report_names("val"))
        again = evaluation_command(
            folder, EvalOptions(), "masks" if result.of == "mask" else "coco"
        )
        done = write_report(outputs, evaluator, result, card, again, "val")
        if done.report is not None:
            say(f"What goes wrong, and where: {done.report}")
    except Exception as error:  # whatever it is: the run is trained and saved
        logger.debug("no report", exc_info=True)
        say(not_written(error, folder))


def not_written(error: Exception, folder: Path) -> str:
    """Why the run in `folder` has no report;
    and what writes it, where the disk was in the way.
    """
    if isinstance(error, OSError):
        why = f"{error.strerror or error}: {error.filename or folder}"
        return f"No report is written: {why}\n  Later: {command('train', '--resume', folder)}"
    why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return f"No report is written: {why}"
