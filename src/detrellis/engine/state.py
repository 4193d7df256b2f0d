"""What decides a run, and everything that changes while it trains."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from rich.console import RenderableType
from rich.text import Text
from torch import Tensor

from detrellis.data.annotations import Annotations
from detrellis.detector import Detector
from detrellis.distributed import World
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import STATE, new_run
from detrellis.engine.ema import EMA
from detrellis.engine.eval_result import EvalResult
from detrellis.engine.guard import FlatLossWatch
from detrellis.engine.optim import build_optimizer
from detrellis.engine.samples import class_counts
from detrellis.engine.sharded import WholeDetector, part_of, parts_of, shard, whole
from detrellis.engine.trackers import Tracker
from detrellis.engine.transfer import InitialWeights, take_boxes, transfer
from detrellis.engine.transfer_report import TransferReport
from detrellis.errors import Advice, UserError
from detrellis.recipes.build import build
from detrellis.recipes.config import Recipe, ScheduleConfig
from detrellis.recipes.migrate import renamed_parameters
from detrellis.training import TrainableDetector

NUMBERS = ("step", "epoch", "best", "since_best", "seconds")  # of a state, saved as they are


@dataclass(frozen=True)
class TrainJob:
    """Everything that decides a run."""

    card: Card  # recipe, classes, data source, seed
    train: Annotations
    val: Annotations | None
    out: Path
    workers: int = 2
    initial: InitialWeights | None = None  # weights to start from, instead of the recipe's own
    boxes: Mapping[str, Tensor] | None = None  # weights whose reference boxes are taken over
    trackers: Sequence[Tracker] = ()  # where the log goes besides `metrics.jsonl`

    def check_validation(self) -> None:
        """`UserError` where the recipe asks for what only an evaluation tells,
        and there are no images for one.
        """
        asked = [
            name for name in ("patience", "keep_best") if getattr(self.card.recipe.schedule, name)
        ]
        if asked and self.val is None:
            raise UserError(
                f"schedule.{asked[0]} goes by AP, and the data set has no validation split",
                f"Name one (--val), take --hold-out, or -o schedule.{asked[0]}=0.",
            )


@dataclass
class TrainState:
    """Everything that changes during a run."""

    model: TrainableDetector
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    watch: FlatLossWatch
    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs done
    best: float | None = None
    since_best: int = 0  # evaluations
    seconds: float = 0.0
    result: EvalResult | None = field(default=None)
    transfer: TransferReport | None = None  # of the process that started the run; not saved
    # To evaluate with, where the processes have a part of all this each
    sharded: WholeDetector | None = None

    @property
    def detector(self) -> Detector:
        """The detector to evaluate and to save: the averaged one where there is one."""
        return self.model.detector if self.ema is None else self.ema.detector

    def weights(self) -> Mapping[str, Tensor]:
        """Whole weights of `detector`; where they are sharded every process has to call it."""
        weights: Mapping[str, Tensor] = self.detector.state_dict()
        if self.sharded is not None:
            weights = whole(weights, everywhere=True)
        return weights

    @contextlib.contextmanager
    def whole_detector(self, device: torch.device) -> Iterator[Detector]:
        """`detector` as one that can be called;
        where it is sharded every process has to ask for it.
        """
        if self.sharded is None:
            yield self.detector
        else:
            yield self.sharded.filled(self.weights(), device)
            self.sharded.empty()

    def finished(self, schedule: ScheduleConfig) -> bool:
        """Whether the run is over: all its epochs are done, or its patience is at an end."""
        return self.epoch >= schedule.epochs or patience_left(schedule, self.since_best) == 0

    def state_dict(self) -> dict[str, Any]:
        """The state as plain tensors, numbers and containers;
        where it is sharded every process has to call it, and the first gets the tensors."""
        tensors = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.detector.state_dict(),
        }
        return {
            **(tensors if self.sharded is None else whole(tensors)),
            "watch": self.watch.state_dict(),
            "result": None if self.result is None else self.result.to_dict(),
            **{name: getattr(self, name) for name in NUMBERS},
        }

    def load_state_dict(self, state: Mapping[str, Any], run: Path) -> None:
        """The inverse of `state_dict`;
        `UserError` where it does not fit what the run's recipe builds.
        """
        try:
            self._fill(state)
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            raise UserError(
                f"{run / STATE}: does not fit its run: {_misfit(error)}",
                "Take another copy of it. Its weights may still be whole: start a new run from "
                f"them with {new_run(run)}",
            ) from error

    def _fill(self, state: Mapping[str, Any]) -> None:
        state = {"since_best": 0, **state}  # states of before 0.1.0 have none
        self.model.load_state_dict(parts_of(renamed_parameters(state["model"]), self.model))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments_of = state["optimizer"]["state"]
        for number, moments in moments_of.items():
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = part_of(moments[name], parameters[number])
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in self.optimizer.state.items():
            if any(moments[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
                raise ValueError("the optimizer's moments have other shapes than the parameters")
        if self.ema is not None:
            self.ema.detector.load_state_dict(parts_of(state["ema"], self.ema.detector))
        self.watch.load_state_dict(state["watch"])
        self.result = None if state["result"] is None else EvalResult.from_dict(state["result"])
        for name in NUMBERS:
            setattr(self, name, state[name])


def patience_left(schedule: ScheduleConfig, since_best: int) -> int | None:
    """Evaluations without a higher AP that the run may still have;
    None where it never ends early.
    """
    return max(schedule.patience - since_best, 0) if schedule.patience else None


def advise_on_frozen(recipe: Recipe, random: bool) -> None:
    """Warns of a backbone that is frozen with `random` weights,
    or without its BatchNorm statistics.
    """
    if recipe.detector.backbone.frozen and random:
        warnings.warn(
            Advice(
                "detector.backbone.frozen without pretrained weights: what is random stays "
                "random. Leave it out, or start from trained weights (--weights)."
            ),
            stacklevel=2,
        )
    zero = [key for key, factor in recipe.optim.scaled.items() if factor == 0 and "backbone" in key]
    if zero and recipe.detector.backbone.frozen != "all":
        warnings.warn(
            Advice(
                f"optim.scaled.{zero[0]}=0 stops the optimizer, but BatchNorm's statistics go on "
                "moving. To freeze the backbone: -o detector.backbone.frozen=all, or a number "
                "of stages."
            ),
            stacklevel=2,
        )


def _misfit(error: Exception) -> str:
    """What an exception of `load_state_dict` says, on one line."""
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing"
    # Torch's first only names the class
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shorten((lines[1:] or lines or [type(error).__name__])[0], 200)


def _optimizer(model: TrainableDetector, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer of all that is trained, also of what is frozen at first:
    it has no moments until it moves.
    """
    if not recipe.schedule.unfreeze_after:
        return build_optimizer(model, recipe.optim)
    backbone = model.detector.backbone
    backbone.hold(False)
    optimizer = build_optimizer(model, recipe.optim)
    backbone.hold(True)
    return optimizer


def fresh_state(job: TrainJob, world: World, *, filled: bool = False) -> TrainState:
    """Model, optimizer and average at the start of a run.

    `filled`: all weights are about to be replaced by those of a stopped run, so none have to be
    fetched or read.
    """
    recipe, classes = job.card.recipe, job.card.classes
    initial = None if filled else job.initial
    fetch = not filled and initial is None
    if not filled:
        advise_on_frozen(recipe, random=initial is None and not recipe.detector.backbone.pretrained)
    model = build(
        recipe if fetch else recipe.untrained(), len(classes), seed=job.card.seed, stored=filled
    )
    report = None
    if initial is not None:
        report = transfer(model.detector, classes, initial, objectness=recipe.detector.objectness)
        for scheme in model.training_schemes:
            scheme.start_from(model.detector)
    if job.boxes is not None:
        take_boxes(model.detector, job.boxes)
    model.count_classes(torch.from_numpy(class_counts(job.train)))
    sharded = WholeDetector(model.detector) if recipe.optim.fully_shard and world.size > 1 else None
    if sharded is None:
        model.to(world.device)
    model.train()
    ema = (
        EMA(model.detector, recipe.optim.ema, recipe.optim.ema_ramp)
        if recipe.optim.ema > 0
        else None
    )
    if sharded is not None:  # from the host, layer by layer: the whole may not fit on the device
        shard(model, None if ema is None else ema.detector, world)
    optimizer = _optimizer(model, recipe)
    return TrainState(model, optimizer, ema, FlatLossWatch(), transfer=report, sharded=sharded)


def origins_of(card: Card, state: TrainState) -> list[RenderableType]:
    """What a fresh run starts from, for a console:
    pretrained or trained weights, and reference boxes.
    """
    lines: list[RenderableType] = []
    if card.backbone is not None:
        lines.append(Text(f"Backbone's pretrained weights: {card.backbone}"))
    if state.transfer is not None:
        lines.append(state.transfer.table(card.weights or ""))
    if card.boxes is not None:
        lines.append(Text(f"Reference boxes from {card.boxes}"))
    return lines
