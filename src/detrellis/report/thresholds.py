"""The thresholds of `predict --threshold auto`:
those of the report that stands beside the weights.
"""

from __future__ import annotations

from pathlib import Path

from detrellis.data.classes import ClassMap
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import metadata_of
from detrellis.errors import UserError, command
from detrellis.report.write import is_ours, report_names, stored_report


def class_thresholds(weights: str | Path, classes: ClassMap) -> tuple[float, ...]:
    """The score from which on a class is detected, by class index:
    where F1 is highest on the validation split.

    A class that the split does not hold takes that of all classes together. Raises `UserError`
    where there is no report of these weights.
    """
    file = Path(weights)
    if not is_ours(file):
        raise UserError(
            f"{weights}: --threshold auto wants weights of a run", "Give a number: --threshold 0.4."
        )
    numbers = file.parent / report_names("val")[1]
    card = Card.from_metadata(metadata_of(file), file)
    try:
        report = stored_report(file, card)
        best = {row["name"]: row["best"]["threshold"] for row in report["diagnosis"]["classes"]}
        of_all = report["diagnosis"]["best"]["threshold"]
        if not all(value is None or 0 <= value <= 1 for value in (of_all, *best.values())):
            raise ValueError("no scores")
    except (ValueError, KeyError, TypeError):
        message = f"{numbers}: no report with thresholds of these weights, of epoch {card.epoch}"
        raise UserError(message, f"Make one: {command('eval', file)}") from None
    if of_all is None:
        raise UserError(
            f"{numbers}: no threshold, since nothing was detected",
            "Give a number: --threshold 0.3.",
        )
    known = (best.get(name) for name in classes.names)
    return tuple(of_all if threshold is None else threshold for threshold in known)
