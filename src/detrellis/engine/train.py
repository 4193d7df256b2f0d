"""The training loop, read top to bottom.

Nothing random has a state of its own: before each step every generator is seeded from (seed, step, process), and an
image's augmentation from (seed, epoch, image). A resumed run therefore continues bit for bit; on a GPU as far as its
kernels are deterministic, which the backward pass of `grid_sample` is not.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detrellis.data.annotations import Annotations
from detrellis.data.loader import Batch, DetectionDataset, Loader, build_loader
from detrellis.data.sampler import BatchSampler
from detrellis.data.transforms import train_transform
from detrellis.detector import Detector
from detrellis.engine.checkpoint import Card, save_state, save_weights
from detrellis.engine.coco_eval import EvalResult
from detrellis.engine.distributed import World, sum_over
from detrellis.engine.ema import EMA
from detrellis.engine.evaluate import NMS, collect, duplicates_line, eval_loader
from detrellis.engine.guard import FlatLossWatch, check_finite
from detrellis.engine.log import RunLog, Timer
from detrellis.engine.optim import build_optimizer, schedule_factor, set_learning_rate
from detrellis.engine.transfer import Source, take_boxes, transfer
from detrellis.engine.transfer_report import Transfer
from detrellis.errors import UserError
from detrellis.recipes.build import build
from detrellis.recipes.config import Recipe
from detrellis.terminal import Terminal
from detrellis.training import StepOutput, TrainableDetector

WATCH_EVERY = 10  # steps between two looks at the matched IoU, each of which waits for the device
SAVE_EVERY_SECONDS = 1200.0  # within an epoch; every epoch's end saves anyway


@dataclass(frozen=True)
class Job:
    """All that decides a run."""

    card: Card  # recipe, classes, data source, seed
    train: Annotations
    val: Annotations | None
    out: Path
    workers: int = 2
    initial: Source | None = None  # weights to start from, instead of the recipe's own
    boxes: Mapping[str, Tensor] | None = None  # weights whose reference boxes are taken over


@dataclass(frozen=True)
class TrainResult:
    """Where the run is and how well it did."""

    run: Path
    epochs: int  # finished
    steps: int
    seconds: float
    best: float | None  # highest AP of any epoch
    result: EvalResult | None  # of the last evaluation
    finished: bool  # False: stopped by a signal; resume to go on
    transfer: Transfer | None = None  # what was kept of the weights that it started from

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        result = None if self.result is None else self.result.to_dict()
        moved = None if self.transfer is None else self.transfer.to_dict()
        return {**vars(self), "run": str(self.run), "result": result, "transfer": moved}


@dataclass
class State:
    """Everything that changes during a run."""

    model: TrainableDetector
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    watch: FlatLossWatch
    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs done
    best: float | None = None
    seconds: float = 0.0
    result: EvalResult | None = field(default=None)
    transfer: Transfer | None = None  # of the process that started the run; not saved

    @property
    def detector(self) -> Detector:
        """The one to evaluate and to save."""
        return self.model.detector if self.ema is None else self.ema.detector

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.detector.state_dict(),
            "watch": self.watch.state_dict(),
            "result": None if self.result is None else self.result.to_dict(),
            **{name: getattr(self, name) for name in ("step", "epoch", "best", "seconds")},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.detector.load_state_dict(state["ema"])
        self.watch.load_state_dict(state["watch"])
        self.result = None if state["result"] is None else EvalResult.from_dict(state["result"])
        for name in ("step", "epoch", "best", "seconds"):
            setattr(self, name, state[name])


def train(job: Job, world: World, resume: dict[str, Any] | None = None, console: Console | None = None) -> TrainResult:
    """Train to the end of the recipe's schedule, or until a signal; `resume` is what `load_state` gave."""
    epochs = job.card.recipe.schedule.epochs
    state = fresh_state(job, world, filled=resume is not None)
    if resume is not None:
        state.load_state_dict(resume)
    elif state.transfer is not None and world.leads:
        (console or Terminal()).print(state.transfer.table(job.card.weights or ""))
    if job.boxes is not None and world.leads:
        (console or Terminal()).print(Text(f"Reference boxes from {job.card.boxes}"))
    loader, steps_per_epoch = train_loader(job, world)
    log = RunLog(
        job.out, epochs=epochs, steps_per_epoch=steps_per_epoch, step=state.step, rank=world.rank, console=console
    )
    run = Run(job, world, state, loader, steps_per_epoch, log)
    with log, _signals() as caught, contextlib.closing(loader):
        while state.epoch < epochs and not run.stopped:
            log.start_epoch(state.epoch + 1)
            for batches in itertools.takewhile(lambda _: not run.stopped, run.steps()):
                run.train_step(batches)
                run.look_around(bool(caught))
            if not run.stopped:
                run.end_epoch()
            run.save()
    finished, position = state.epoch >= epochs, (state.epoch, state.step, state.seconds)
    return TrainResult(job.out, *position, state.best, state.result, finished, state.transfer)


class Run:
    """One run in one process: the parts that the loop above puts in order."""

    def __init__(self, job: Job, world: World, state: State, loader: Loader, steps_per_epoch: int, log: RunLog) -> None:
        self.job, self.world, self.state, self.loader, self.log = job, world, state, loader, log
        self.recipe, self.steps_per_epoch = job.card.recipe, steps_per_epoch
        self.model = _distributed(state.model, world)
        self.timer = Timer()
        self.stopped = False
        self.saved = time.monotonic()
        batch = loader_batch(self.recipe, world)
        self.val = None if job.val is None else eval_loader(job.val, self.recipe.data, batch, job.workers, world)

    def steps(self) -> Iterator[list[Batch]]:
        """The batches of each optimizer step that this epoch still has to do."""
        assert isinstance(self.loader.sampler, BatchSampler)
        accumulate, state = self.recipe.optim.accumulate, self.state
        done = (state.step - state.epoch * self.steps_per_epoch) * accumulate
        self.loader.sampler.set_position(state.epoch, min(done, len(self.loader)))
        group: list[Batch] = []
        for batch in self.timer.each("data", self.loader):
            group.append(batch)
            if len(group) == accumulate:
                yield group
                group = []
        if group:
            yield group

    def train_step(self, batches: list[Batch]) -> None:
        """One optimizer step over one batch, or over several with accumulation."""
        config, schedule, state = self.recipe.optim, self.recipe.schedule, self.state
        lr = config.lr * schedule_factor(state.step / (self.steps_per_epoch * schedule.epochs), schedule)
        set_learning_rate(state.optimizer, lr)
        state.optimizer.zero_grad(set_to_none=True)
        seed = zlib.crc32(f"{self.job.card.seed}/{state.step}/{self.world.rank}".encode())
        torch.manual_seed(seed)
        state.model.reseed(seed)
        outs, total = [], 0.0
        for i, batch in enumerate(batches):
            with self._quiet(i < len(batches) - 1):
                out, value = self._pass(batch, share=1 / len(batches))
            outs.append(out)
            total += value / len(batches)
        with self.timer.part("optimizer"):
            if config.clip > 0:
                nn.utils.clip_grad_norm_(state.model.parameters(), config.clip)
            state.optimizer.step()
            state.step += 1
            if state.ema is not None:
                state.ema.update(state.model.detector, state.step)
        losses, metrics = _mean([o.losses for o in outs]), _mean([o.metrics for o in outs])
        images = sum(len(b.image_ids) for b in batches) * self.world.size
        self.log.step(state.step, losses, metrics, total=total, lr=lr, images=images)
        if state.step % WATCH_EVERY == 0:
            self.log.say(state.watch.update(state.step, total, float(metrics["main/iou"])) or "")

    def _pass(self, batch: Batch, share: float) -> tuple[StepOutput, float]:
        """Forward and backward of one batch; bf16 where the GPU has it."""
        device, number = self.world.device, self.state.step + 1
        amp = self.recipe.optim.amp and device.type == "cuda" and torch.cuda.is_bf16_supported()
        with self.timer.part("forward"):
            batch = batch.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                out: StepOutput = self.model(batch.images, batch.targets)
            out = out._replace(metrics=out.metrics | {"data/padding": padded_share(batch)})
            total = torch.stack(list(out.losses.values())).sum()
            save_to = self.job.out / f"bad_batch-{self.world.rank}.pt"
            value = check_finite(out.losses, total, number, batch.image_ids, batch, save_to)
        with self.timer.part("backward"):
            (total * share).backward()
        return out, value

    def _quiet(self, more: bool) -> contextlib.AbstractContextManager[Any]:
        """DDP exchanges gradients in the last pass of a step only."""
        if more and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def look_around(self, caught: bool) -> None:
        """Between two steps: stop where a signal came to any process, all after the same step, or the others would
        wait for ever; save now and then, so that a long epoch is not lost."""
        self.stopped = self._agreed(caught)
        if self._agreed(time.monotonic() - self.saved > SAVE_EVERY_SECONDS):
            self.save()

    def _agreed(self, value: bool) -> bool:
        if self.world.size == 1:
            return value
        return bool(sum_over(torch.tensor(float(value), device=self.world.device)).item())

    def end_epoch(self) -> None:
        """Evaluate, keep the best weights and the epoch's own, write its row."""
        state, schedule, val = self.state, self.recipe.schedule, self.job.val
        state.epoch += 1
        last = state.epoch == schedule.epochs
        due, stats, apart = last or state.epoch % schedule.eval_every == 0, None, None
        if val is not None and self.val is not None and due:
            with self.timer.part("eval"):
                batches = self.log.track(self.val, "evaluate", len(self.val))
                thresholds = (None, NMS) if last else (None,)
                found = collect(state.detector, batches, val, self.world.device, thresholds)
                state.result, *after = (evaluator.compute() for evaluator in found)
                apart = after[0] if last else None
            stats = state.result.stats
            if state.result.ap is not None and (state.best is None or state.result.ap > state.best):
                state.best = state.result.ap
                if self.world.leads:
                    save_weights(self.job.out / "best.safetensors", state.detector.state_dict(), self._card())
        if self.world.leads and schedule.keep_every and state.epoch % schedule.keep_every == 0:
            kept = self.job.out / "epochs" / f"{state.epoch:04}.safetensors"
            save_weights(kept, state.detector.state_dict(), self._card())
        self.log.end_epoch(self.timer.take(), stats, None if apart is None else apart.stats)
        if apart is not None and state.result is not None:
            self.log.say(duplicates_line(state.result, apart) or "")

    def save(self) -> None:
        """Last weights, and the state to resume from."""
        now = time.monotonic()
        self.state.seconds += now - self.saved
        self.saved = now
        if self.world.leads:
            save_weights(self.job.out / "last.safetensors", self.state.detector.state_dict(), self._card())
            save_state(self.job.out / "last.state.pt", self.state.state_dict())

    def _card(self) -> Card:
        stats = None if self.state.result is None else self.state.result.stats
        return replace(self.job.card, epoch=self.state.epoch, stats=stats)


def _mean(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each entry over the passes of a step; a pass may lack some (no denoising without boxes)."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {n: torch.stack([p[n].detach() for p in parts if n in p]).mean() for n in names}


def fresh_state(job: Job, world: World, *, filled: bool = False) -> State:
    """Model, optimizer and average at the start of a run.

    `filled`: all weights are about to be replaced by those of a stopped run, so none have to be fetched or read.
    """
    recipe, classes = job.card.recipe, job.card.classes
    initial = None if filled else job.initial
    fetch = not filled and initial is None
    model = build(recipe if fetch else recipe.untrained(), len(classes), seed=job.card.seed)
    report = None
    if initial is not None:
        objectness = recipe.detector.proposal_targets == "objectness"
        report = transfer(model.detector, classes, initial, objectness=objectness)
        for scheme in model.training_schemes:
            scheme.start_from(model.detector)
    if job.boxes is not None:
        take_boxes(model.detector, job.boxes)
    model.to(world.device).train()
    optimizer = build_optimizer(model, recipe.optim)
    ema = EMA(model.detector, recipe.optim.ema) if recipe.optim.ema > 0 else None
    return State(model, optimizer, ema, FlatLossWatch(), transfer=report)


def _distributed(model: TrainableDetector, world: World) -> nn.Module:
    if world.size == 1:
        return model
    devices = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices)


def padded_share(batch: Batch) -> torch.Tensor:
    """Share of a batch's pixels that are padding: work done for nothing, which `data.group_by_aspect` lowers."""
    padding = batch.images.padding
    return batch.images.pixels.new_zeros(()) if padding is None else padding.float().mean()


def loader_batch(recipe: Recipe, world: World) -> int:
    """Images a process takes at a time, so that all of them make the recipe's batch."""
    parts = world.size * recipe.optim.accumulate
    if recipe.optim.batch_size % parts:
        raise UserError(
            f"a batch of {recipe.optim.batch_size} images cannot be shared by {world.size} processes with "
            f"{recipe.optim.accumulate} accumulated passes",
            f"Take a multiple of {parts}: -o optim.batch_size={max(parts, recipe.optim.batch_size // parts * parts)}.",
        )
    return recipe.optim.batch_size // parts


def train_loader(job: Job, world: World) -> tuple[Loader, int]:
    """The loader, and optimizer steps an epoch."""
    recipe, data = job.card.recipe, job.card.recipe.data
    transform = train_transform(data.augment, data.size, **data.augmentation())
    sampler = BatchSampler(
        len(job.train),
        loader_batch(recipe, world),
        seed=job.card.seed,
        rank=world.rank,
        world_size=world.size,
        group_by_aspect=job.train.sizes if data.group_by_aspect else None,
    )
    dataset = DetectionDataset(job.train, transform, job.card.seed, masks=recipe.needs_masks)
    loader = build_loader(dataset, sampler, workers=job.workers, pin_memory=world.device.type == "cuda")
    return loader, -(-len(sampler) // recipe.optim.accumulate)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C are noted in the list and acted on between two steps; a second Ctrl-C stops at once."""
    caught: list[int] = []

    def note(number: int, frame: object) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    previous = {}
    with contextlib.suppress(ValueError):  # not the main thread: the caller handles signals
        previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
