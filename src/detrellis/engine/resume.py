"""What a stopped run goes on with:
its own state and data, wherever the data are now, and a few settings that may change.

| of `train --resume RUN` | what happens |
| --- | --- |
| nothing else | it goes on bit for bit |
| `--data`, or `--train` and `--val` | the data are there now; classes and lists of images have to be the same |
| `--epochs N` | another length of the whole run, also of a finished one: see below |
| `-o` with a key of `FREE` | set from here on; no others |

With N epochs the learning rate is from here on what the recipe's schedule over N epochs has at this
place, which may be higher than it was. Each change is noted in the run's card, with the epoch and
the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detrellis.data.annotations import Annotations
from detrellis.data.classes import ClassMap
from detrellis.data.layout import DataSource
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import BEST, CARD, LAST, STATE, load_state, metadata_of, new_run
from detrellis.engine.optim import schedule_factor
from detrellis.engine.state import patience_left
from detrellis.errors import UserError, brief, command
from detrellis.recipes.config import Recipe

# In a state: how many images an epoch has, those that it has several times included
SEEN = "images_an_epoch"
LOG = "log"  # in a state: what the epoch has measured so far
IMAGES = "images"  # in a state: the file names of each split's images, (I, W) bytes
# What neither the network nor the state depends on; with a point at its end, all that is below.
FREE = (
    "optim.lr",
    "optim.clip",
    "optim.amp",
    "optim.compile",
    "optim.fully_shard",
    "schedule.",
)
# The first has an option; the optimizer depends on the second
FIXED = ("schedule.epochs", "schedule.unfreeze_after")
SHOWN = 3
KINDS: Mapping[str, Any] = {  # of what a state holds beside the parts that torch fills
    **dict.fromkeys(("epoch", "step", "since_best"), int),
    "seconds": int | float,
    "best": int | float | None,
    IMAGES: Mapping,
}


def packed_file_names(annotations: Annotations) -> Tensor:
    """The images' file names as a state holds them, (I, W) bytes, zeros at the end."""
    names = np.ascontiguousarray(annotations.file_names)
    return torch.from_numpy(names.view(np.uint8).reshape(len(names), -1).copy())


@dataclass(frozen=True)
class ResumedRun:
    """A run that is about to go on, and what it goes on with."""

    run: Path
    state: dict[str, Any]
    card: Card  # as it is from here on
    source: DataSource
    summary: str  # what that means, in words for the user

    def check(self, train: Annotations, val: Annotations | None, classes: ClassMap) -> None:
        """Raises `UserError` that says what differs where the data are not those that the run was
        trained on.
        """
        if classes != self.card.classes:
            raise UserError(
                f"{self.run}: {describe_class_changes(self.card.classes, classes)}",
                _other_data(self.run),
            )
        check_same_images(self.state, train, val, self.run)


def resumed_run(
    run: Path, source: DataSource | None, settings: Sequence[str], epochs: int | None
) -> ResumedRun:
    """Load a run to go on with; `source` is where its data are now, None where they were.
    See the top of the file.
    """
    state, old = load_run(run)
    card = with_settings(old, state, settings, epochs)
    if source is None:
        source = DataSource.from_dict(card.data)
        check_data_exists(run, source, ("train", "val"), ("train", "--resume", run))
    else:
        source = source.divided_as(DataSource.from_dict(card.data))
        card = with_data(card, state, source.to_dict())
    return ResumedRun(run, state, card, source, summarise(old, card, state, run))


def load_run(run: Path) -> tuple[dict[str, Any], Card]:
    """State and card of a run to go on with;
    `UserError` where it is none, or two runs' files are mixed up.
    """
    state = load_state(run)
    beside = metadata_of(run / LAST)
    if CARD not in state and beside is not None:
        state = _with_card(state, Card.from_metadata(beside, run / LAST))
    for key in (CARD, IMAGES, "epoch", "step"):
        if key not in state:
            raise UserError(
                f"{run / STATE}: {key!r} is missing: not the whole state of a run",
                f"Start a new run from its weights: {new_run(run)}",
            )
    for key, wanted in KINDS.items():
        if key in state and (not isinstance(state[key], wanted) or isinstance(state[key], bool)):
            raise UserError(
                f"{run / STATE}: {key!r} is {brief(state[key])}: not the state of a run",
                f"Start a new run from its weights: {new_run(run)}",
            )
    card = Card.from_metadata(state[CARD], run / STATE)
    for name in (LAST, BEST):
        beside = metadata_of(run / name)
        other = card if beside is None else Card.from_metadata(beside, run / name)
        if (other.recipe.detector, other.classes, other.seed) != (
            card.recipe.detector,
            card.classes,
            card.seed,
        ):
            raise UserError(
                f"{run}: {STATE} and {name} belong to different runs",
                f"Put this run's own {name} back, or move it away; or start a new run: "
                f"{new_run(run / name)}",
            )
    return state, card


def _with_card(state: dict[str, Any], card: Card) -> dict[str, Any]:
    """A state written by Detrellis when it held no card: that of the last weights is its own if
    both are of one epoch; it did not name the step. The names of the state's images are not
    known."""
    if card.epoch != state.get("epoch") or "step" not in state:
        return state
    return {IMAGES: {}, **state, CARD: replace(card, step=state["step"]).to_metadata()}


def with_settings(
    card: Card, state: Mapping[str, Any], settings: Sequence[str], epochs: int | None
) -> Card:
    """The card with other settings from here on, and a note of them;
    `UserError` for one that a state depends on.
    """
    for text in settings:
        name = text.partition("=")[0].strip()
        if not name.startswith(FREE) or name in FIXED:
            raise UserError(
                f"-o {text}: a run that goes on keeps its network, its losses, its data and its "
                "batches",
                f"Free are {', '.join(FREE)}* but unfreeze_after, and --epochs. "
                "For all else start a new run from its weights: --weights.",
            )
    if epochs is not None and epochs <= state["epoch"]:
        raise UserError(
            f"--epochs {epochs}: the run has done {state['epoch']} epochs",
            "Give the length of the whole run, as with a new one: --epochs "
            f"{state['epoch'] + max(1, epochs)}.",
        )
    chosen = [*settings, *([] if epochs is None else [f"schedule.epochs={epochs}"])]
    recipe: Recipe = card.recipe.override(chosen)
    if recipe == card.recipe:
        return card
    note = {"epoch": state["epoch"], "step": state["step"], "set": chosen}
    return replace(card, recipe=recipe, changes=(*card.changes, note))


def with_data(card: Card, state: Mapping[str, Any], data: Mapping[str, Any]) -> Card:
    """The card of a run whose data set is elsewhere now, and a note of where it was."""
    if dict(data) == dict(card.data):
        return card
    note = {"epoch": state["epoch"], "step": state["step"], "data_was": dict(card.data)}
    return replace(card, data=data, changes=(*card.changes, note))


def summarise(old: Card, card: Card, state: Mapping[str, Any], run: Path) -> str:
    """What going on means, in words:
    how much is left, and what the learning rate does if its schedule is another.
    """
    done, schedule = state["epoch"], card.recipe.schedule
    epochs = schedule.epochs
    if done < epochs and patience_left(schedule, state.get("since_best", 0)) == 0:
        return (
            f"{run} stopped early, after epoch {done} of {epochs}: the last "
            f"{state['since_best']} evaluations had no higher AP. Nothing is left to do.\n  On "
            "to its last epoch: "
            f"{command('train', '--resume', run, '-o', 'schedule.patience=0')}\n  A new run from "
            f"its weights: {new_run(run)}"
        )
    if done >= epochs:
        return (
            f"{run} has finished its {epochs} epochs: nothing is left to do.\n  More of them: "
            f"{command('train', '--resume', run, '--epochs', epochs + max(1, epochs // 2))}\n  A "
            f"new run from its weights: {new_run(run)}"
        )
    line = f"{run} goes on after epoch {done} of {epochs}, step {state['step']}."
    if old.recipe == card.recipe or not state["step"]:
        return line
    was, now = (_learning_rate(c.recipe, state) for c in (old, card))
    return (
        f"{line} The learning rate follows the schedule over {epochs} epochs: {now:.3g} here, "
        f"where it was {was:.3g}."
    )


def _learning_rate(recipe: Recipe, state: Mapping[str, Any]) -> float:
    """The rate at the step where the state is.
    States of before 0.1.0 name no images: their epochs say the steps.
    """
    done, step = state["epoch"], state["step"]
    images = state[IMAGES].get("train")
    each = (
        step / max(done, 1) if images is None else recipe.optim.steps(state.get(SEEN, len(images)))
    )
    steps = max(1, round(each * recipe.schedule.epochs))
    return recipe.optim.lr * schedule_factor(min(step, steps), steps, recipe.schedule)


def check_data_exists(
    run: Path, source: DataSource, splits: Sequence[str], words: Sequence[object]
) -> None:
    """Raises `UserError` where a run's data are not where they were;
    it names the command of `words`, with `--data`.
    """
    for split, files in source.splits.items():
        paths = [
            files.annotations,
            *files.images,
            *([] if files.listing is None else [files.listing]),
        ]
        if split in splits and (gone := [path for path in paths if not path.exists()]):
            raise UserError(
                f"{run}: its data set is not where it was: {gone[0]} is missing",
                f"Say where it is now: {command(*words, '--data', 'FOLDER')}",
            )


def describe_class_changes(was: ClassMap, now: ClassMap) -> str:
    """How the classes differ, in words."""
    before, after = ({*zip(classes.ids, classes.names, strict=True)} for classes in (was, now))
    parts = []
    for what, classes in (("missing", sorted(before - after)), ("new", sorted(after - before))):
        if classes:
            shown = ", ".join(f"{name} (id {i})" for i, name in classes[:SHOWN])
            parts.append(f"{what} {shown}{' and more' if classes[SHOWN:] else ''}")
    return f"the data set's classes are not those of the run: {'; '.join(parts)}"


def check_same_images(
    state: Mapping[str, Any], train: Annotations, val: Annotations | None, run: Path
) -> None:
    """Raises `UserError` that says what differs where a split does not list the images that the run
    was trained on.
    """
    for split, now in (("train", train), ("val", val)) if state[IMAGES] else ():
        before = _unpacked(state[IMAGES].get(split))
        after = [] if now is None else [bytes(name) for name in now.file_names]
        if before != after:
            raise UserError(
                f"{run}: the images of {split} are not those of the run: "
                f"{_difference(before, after)}",
                _other_data(run),
            )


def _other_data(run: Path) -> str:
    return (
        "Name the place of the same data set: --data FOLDER. On other data start a new run from "
        f"its weights: {new_run(run)}"
    )


def _unpacked(names: Tensor | None) -> list[bytes]:
    """The inverse of `packed_file_names`; no names where there is none."""
    if not isinstance(names, Tensor) or names.dtype != torch.uint8:
        return []
    return [bytes(row).rstrip(b"\0") for row in names.reshape(len(names), -1).numpy()]


def _difference(was: list[bytes], now: list[bytes]) -> str:
    """In words: how many then and now, and the first names that only one of them has."""
    parts = [f"{len(was)} then, {len(now)} now"]
    for what, names in (("missing", sorted({*was} - {*now})), ("new", sorted({*now} - {*was}))):
        if names:
            shown = ", ".join(name.decode(errors="replace") for name in names[:SHOWN])
            parts.append(
                f"{what} {shown}{f' and {len(names) - SHOWN} more' if names[SHOWN:] else ''}"
            )
    return "; ".join(parts if parts[1:] else [*parts, "in another order"])
