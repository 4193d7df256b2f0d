"""Two checks on a run: one stops it when the loss is not finite,
the other warns when nothing is learned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from detrellis.atomic import replace_files
from detrellis.errors import UserError, command, listed


class NonFiniteLoss(UserError):
    """The loss, or a weight, became infinite or NaN."""


def check_finite(
    losses: Mapping[str, Tensor],
    total: Tensor,
    step: int,
    image_ids: Sequence[int],
    batch: object,
    save_to: Path,
    remedy: str = "",
) -> float:
    """The value of `total`, read from its device: the one wait of the whole check.

    Raises NonFiniteLoss where it is not finite; it names the loss terms, the step and the images,
    and says where `batch` (tensors in any nest of named tuples, dicts, lists and tuples) was saved
    together with the losses, as a file for `torch.load(..., weights_only=True)`. `remedy` is what
    to do then: see `divergence_remedy`.
    """
    value = float(total.detach())
    if math.isfinite(value):
        return value
    values = {name: float(v.detach()) for name, v in losses.items()}
    wrong = [f"{name} = {v}" for name, v in values.items() if not math.isfinite(v)]
    terms = (
        listed(wrong, 6)
        if wrong
        else f"every term is finite, but their sum is {value}: it overflowed"
    )
    images = [int(i) for i in image_ids]
    record = {"step": step, "image_ids": images, "losses": values, "batch": _plain(batch)}
    message = (
        f"step {step}: the loss is not finite: {terms}\n  images of this step: {listed(images, 32)}"
    )
    raise NonFiniteLoss(
        message, "\n  ".join(part for part in (_saved(record, Path(save_to)), remedy) if part)
    )


def check_weights(tensors: Iterable[Tensor], step: int, remedy: str) -> None:
    """Raises NonFiniteLoss where trained weights are not finite,
    so that they never take a good checkpoint's place.
    """
    if not all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point()):
        raise NonFiniteLoss(
            f"step {step}: the weights are not finite any more, and are not saved", remedy
        )


def divergence_remedy(run: Path, lr: float, clip: float, step: int) -> str:
    """What to do about a loss that is not finite: the command that goes on from the last
    checkpoint, of step `step`, with a tenth of the learning rate; and what else may help."""
    return (
        f"Go on from the last checkpoint, of step {step}, with a lower learning rate:\n    "
        f"{command('train', '--resume', run, '-o', f'optim.lr={lr / 10:g}')}\n  or with stronger "
        f"clipping (-o optim.clip={(clip or 1.0) / 10:g}), or in float32 if this run used "
        "bfloat16\n  (-o optim.amp=false). `detrellis check` finds boxes that no loss can learn "
        "from. If the same images come\n  back, look at them; if others do, the weights had "
        "already diverged."
    )


TOLERANCE = 0.02  # the change that counts: relative for the loss, absolute for the matched IoU
GOOD_IOU = 0.8  # matched IoU from which a run has little left to learn
FEWEST = 5  # values that a window holds at least


class FlatLossWatch:
    """Warns once when, after `steps` steps,
    neither the loss has fallen nor the matched IoU has risen.

    Compares medians of the first and of the last fifth of the steps. A change counts when it is
    larger than `TOLERANCE` and stands out from the scatter within the windows. A run is checked
    once: a plateau later on is what convergence looks like. A run that has a matched IoU of
    `GOOD_IOU` or more, from trained weights, is not checked by its loss.
    """

    MEMBERS = ("_start", "_done", "_first", "_recent")

    def __init__(self, steps: int = 500) -> None:
        assert steps > 0
        self.steps = steps
        self._start: int | None = None
        self._done = False
        self._first: list[list[float]] = []  # [step, loss, IoU]
        self._recent: list[list[float]] = []

    def update(self, step: int, loss: float, matched_iou: float | None = None) -> str | None:
        """Takes the values of a step (not every step need be shown),
        and returns the warning, at most once.

        `matched_iou` is None or NaN where no box was matched.
        """
        if self._done or not math.isfinite(loss):
            return None
        self._start = step if self._start is None else self._start
        iou = math.nan if matched_iou is None else matched_iou
        window, passed = self.steps / 5, step - self._start
        if passed <= window or len(self._first) < FEWEST:
            self._first.append([step, loss, iou])
            return None
        self._recent.append([step, loss, iou])
        # Shown rarely, a window holds its fewest values even if they reach further back.
        inside = sum(s > step - window for s, _, _ in self._recent)
        self._recent = self._recent[-max(inside, FEWEST) :]
        if passed < self.steps or len(self._recent) < FEWEST:
            return None
        self._done = True
        return self._warning(step)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, for a checkpoint."""
        return {name: _plain(getattr(self, name)) for name in self.MEMBERS}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` gave."""
        for name in self.MEMBERS:
            setattr(self, name, _plain(state[name]))

    def _warning(self, step: int) -> str | None:
        first_loss, last_loss = (
            [loss for _, loss, _ in window] for window in (self._first, self._recent)
        )
        first_iou, last_iou = (
            [iou for _, _, iou in window if not math.isnan(iou)]
            for window in (self._first, self._recent)
        )
        if _fell(first_loss, last_loss, TOLERANCE * abs(median(first_loss))):
            return None
        overlap = ""
        if first_iou and last_iou:
            rose = _fell([-v for v in first_iou], [-v for v in last_iou], TOLERANCE)
            if rose or median(last_iou) >= GOOD_IOU:
                return None
            overlap = f", matched IoU {median(first_iou):.2f} to {median(last_iou):.2f}"
        change = f"loss {median(first_loss):.4g} to {median(last_loss):.4g}{overlap}"
        return (
            f"nothing has been learned in {step - (self._start or 0)} steps: "
            f"{change}.\n{_FLAT_REMEDY}"
        )


_FLAT_REMEDY = (
    "  Try, in this order:\n  - `detrellis check` on the training set: do the boxes fit the "
    "images?\n  - overfit a few images: a loss that does not fall there either is not a matter "
    "of the data's size\n  - a learning rate ten times higher, or ten times lower\n  - "
    "pretrained weights: a detector from scratch needs many more steps than this before it "
    "moves\n  - more queries, if an image can hold more objects than there are queries"
)


def _fell(first: Sequence[float], last: Sequence[float], least: float) -> bool:
    """Whether the median fell by more than `least` and by more than twice its standard error."""
    error = math.hypot(_median_error(first), _median_error(last))
    return median(first) - median(last) > max(least, 2 * error)


def _median_error(values: Sequence[float]) -> float:
    """Standard error of the median of normally distributed values,
    with a spread that outliers do not move.
    """
    middle = median(values)
    spread = 1.4826 * median(abs(v - middle) for v in values)
    return 1.2533 * spread / math.sqrt(len(values))


def _plain(value: object) -> object:
    """A copy of the nest in plain containers and tensors on the host,
    the kinds that `weights_only` loading accepts.
    """
    if isinstance(value, Tensor):
        # A clone: a view would be saved with all of what it looks at
        return value.detach().cpu().clone()
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, int | float | str | bool | None) else repr(value)


def _saved(record: Mapping[str, Any], path: Path) -> str:
    try:
        replace_files((path, lambda file: torch.save(dict(record), file)))
    except (OSError, RuntimeError) as error:  # the loss is the news; a full disk must not hide it
        return f"The batch could not be saved to {path}: {error}"
    return f"The batch is saved in {path}: torch.load({str(path)!r}, weights_only=True)"
