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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detrellis.atomic import sweep
from detrellis.data.loader import Batch, DetectionDataset, Loader, build_loader
from detrellis.data.sampler import BatchSampler
from detrellis.data.transforms import train_transform
from detrellis.distributed import World, reduce_max
from detrellis.engine.checkpoint import BEST, CARD, LAST, Card, metadata_of, save_run, save_weights
from detrellis.engine.coco_eval import EvalResult
from detrellis.engine.evaluate import NMS, collect, duplicates_line, eval_loader
from detrellis.engine.guard import NonFiniteLoss, check_finite, check_weights, lower_rate
from detrellis.engine.log import RunLog, Timer
from detrellis.engine.optim import schedule_factor, set_learning_rate
from detrellis.engine.resume import IMAGES, names_of
from detrellis.engine.state import Job, State, fresh_state
from detrellis.engine.transfer_report import Transfer
from detrellis.errors import UserError, command
from detrellis.recipes.config import Recipe
from detrellis.terminal import Terminal
from detrellis.training import StepOutput, TrainableDetector

WATCH_EVERY = 10  # steps between two looks at the matched IoU, each of which waits for the device
SAVE_EVERY_SECONDS = 1200.0  # within an epoch; every epoch's end saves anyway


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
    signal: int | None = None  # its number: the command line exits with 128 more
    transfer: Transfer | None = None  # what was kept of the weights that it started from

    def stopped(self) -> str:
        """Of an unfinished run: what stopped it, and where."""
        assert self.signal is not None
        return f"Stopped by {signal.Signals(self.signal).name} after step {self.steps}, and saved."

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        result = None if self.result is None else self.result.to_dict()
        moved = None if self.transfer is None else self.transfer.to_dict()
        return {**vars(self), "run": str(self.run), "result": result, "transfer": moved}


def train(job: Job, world: World, resume: dict[str, Any] | None = None, console: Console | None = None) -> TrainResult:
    """Train to the end of the recipe's schedule, or until a signal; `resume` is what `load_state` gave.

    The state is saved before the first step, after the steps of each epoch and now and then between, so that whatever
    ends the process leaves a run that can go on. An evaluation adds a few numbers, which the next state holds: a run
    that is killed before it is saved evaluates again, with the same result.
    """
    epochs = job.card.recipe.schedule.epochs
    if world.is_main_process:
        sweep(job.out)
        sweep(job.out / "epochs")
    state = fresh_state(job, world, filled=resume is not None)
    if resume is not None:
        state.load_state_dict(resume, job.out)
    elif state.transfer is not None and world.is_main_process:
        (console or Terminal()).print(state.transfer.table(job.card.weights or ""))
    if job.boxes is not None and world.is_main_process:
        (console or Terminal()).print(Text(f"Reference boxes from {job.card.boxes}"))
    loader, steps_per_epoch = train_loader(job, world)
    log = RunLog(
        job.out, epochs=epochs, steps_per_epoch=steps_per_epoch, step=state.step, rank=world.rank, console=console
    )
    run = Run(job, world, state, loader, steps_per_epoch, log)
    with log, _signals() as caught, contextlib.closing(loader), run.kept():
        run.begin(resume)
        while state.epoch < epochs and not run.stopped:
            log.start_epoch(state.epoch + 1)
            for batches in itertools.takewhile(lambda _: not run.stopped, run.steps()):
                run.train_step(batches)
                run.look_around(caught)
            if not run.stopped:
                run.end_epoch()
                run.stopped = run.signalled(caught)
            if run.stopped or state.epoch == epochs or run.trained():
                run.save()
    finished, position = state.epoch >= epochs, (state.epoch, state.step, state.seconds)
    number = None if finished else run.stopped
    return TrainResult(job.out, *position, state.best, state.result, finished, number, state.transfer)


class SaveError(UserError):
    """The run could not be saved."""


class Run:
    """One run in one process: the parts that the loop above puts in order."""

    def __init__(self, job: Job, world: World, state: State, loader: Loader, steps_per_epoch: int, log: RunLog) -> None:
        self.job, self.world, self.state, self.loader, self.log = job, world, state, loader, log
        self.recipe, self.steps_per_epoch = job.card.recipe, steps_per_epoch
        self.model = _distributed(state.model, world)
        self.timer = Timer()
        self.stopped = 0  # number of the signal that did
        self.whole = True  # between two steps, when the state is one that a run may go on from
        self.safe: tuple[int, int] | None = None  # epochs and steps done in what is saved
        self.measured = None if job.card.stats is None else state.step  # step of the weights that the result is of
        self.saved = time.monotonic()
        self.images = {split: names_of(a) for split, a in (("train", job.train), ("val", job.val)) if a is not None}
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
        self.whole = False
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
        due = state.step % WATCH_EVERY == 0
        warning = state.watch.update(state.step, total, float(metrics["main/iou"])) if due else None
        self.whole = True
        self.log.step(state.step, losses, metrics, total=total, lr=lr, images=images)
        self.log.say(warning or "")

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
            value = check_finite(out.losses, total, number, batch.image_ids, batch, save_to, self._lower_rate())
        with self.timer.part("backward"):
            (total * share).backward()
        return out, value

    def _quiet(self, more: bool) -> contextlib.AbstractContextManager[Any]:
        """DDP exchanges gradients in the last pass of a step only."""
        if more and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def look_around(self, caught: list[int]) -> None:
        """Between two steps: stop where a signal came to any process, all after the same step, or the others would
        wait for ever; save now and then, so that a long epoch is not lost."""
        self.stopped = self.signalled(caught)
        if reduce_max(int(time.monotonic() - self.saved > SAVE_EVERY_SECONDS), self.world.device):
            self.save()

    def signalled(self, caught: list[int]) -> int:
        """The number of a signal that came to any process, else 0."""
        return reduce_max(caught[0] if caught else 0, self.world.device)

    def end_epoch(self) -> None:
        """Evaluate, keep the best weights and the epoch's own, write its row."""
        state, schedule, epoch = self.state, self.recipe.schedule, self.state.epoch + 1
        last = epoch == schedule.epochs
        stats, apart = None, None
        if self.val is not None and (last or epoch % schedule.eval_every == 0):
            self.save()  # an evaluation that fails, or is not waited for, costs nothing that was trained
            apart = self.evaluate(last)
            stats = None if state.result is None else state.result.stats
        if self.world.is_main_process and schedule.keep_every and epoch % schedule.keep_every == 0:
            kept = self.job.out / "epochs" / f"{epoch:04}.safetensors"
            save_weights(kept, state.detector.state_dict(), self._card(epoch))
        state.epoch = epoch
        self.log.end_epoch(self.timer.take(), stats, None if apart is None else apart.stats)
        if apart is not None and state.result is not None:
            self.log.say(duplicates_line(state.result, apart) or "")

    def evaluate(self, last: bool) -> EvalResult | None:
        """Measure the epoch, and keep its weights if they are the best; the last one's result without duplicates."""
        state, loader, val = self.state, self.val, self.job.val
        assert loader is not None
        assert val is not None
        with self.timer.part("eval"):
            batches = self.log.track(loader, "evaluate", len(loader))
            found = collect(state.detector, batches, val, self.world.device, (None, NMS) if last else (None,))
            state.result, *after = (evaluator.compute() for evaluator in found)
            self.measured = state.step
        if state.result.ap is not None and (state.best is None or state.result.ap > state.best):
            if self.world.is_main_process:
                card = self._card(state.epoch + 1)
                save_weights(self.job.out / BEST, state.detector.state_dict(), card)
            state.best = state.result.ap
        return after[0] if last else None

    def begin(self, resume: Mapping[str, Any] | None) -> None:
        """Save before the first step: a full disk shows now, and whatever comes, there is a state to go on from. Of a
        resumed run what a crash or a change of settings has left different on the disk is written again."""
        if resume is not None:
            self.safe = (self.state.epoch, self.state.step)
        mine = self._card(self.state.epoch).to_metadata()
        weights = mine if self.state.step == 0 else metadata_of(self.job.out / LAST)
        if resume is None or resume[CARD] != mine or weights != mine:
            self.save()

    def save(self) -> None:
        """The state to resume from, and the last weights once there has been a step."""
        now = time.monotonic()
        self.state.seconds += now - self.saved
        self.saved = now
        if not self.world.is_main_process:
            return
        check_weights(self.state.model.state_dict().values(), self.state.step, self._lower_rate())
        weights = self.state.detector.state_dict() if self.state.step else None
        try:
            save_run(
                self.job.out, {**self.state.state_dict(), IMAGES: self.images}, weights, self._card(self.state.epoch)
            )
        except OSError as error:
            raise SaveError(
                f"{self.job.out}: the run cannot be saved ({error.strerror or error})", self._go_on()
            ) from error
        self.safe = (self.state.epoch, self.state.step)

    def trained(self) -> bool:
        """Whether there were steps since what is saved."""
        return self.safe is None or self.safe[1] != self.state.step

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Save what is trained before an error ends the run; the error then says how to go on."""
        try:
            yield
        except KeyboardInterrupt:
            self.log.say(f"Stopped at once. {self._go_on()}")
            raise
        except (SaveError, NonFiniteLoss):
            raise
        except Exception as error:
            if self.whole and self.safe not in (None, (self.state.epoch, self.state.step)):
                with contextlib.suppress(UserError):  # the last checkpoint has to do
                    self.save()
            told = self._go_on()
            if isinstance(error, UserError):
                raise UserError(error.message, f"{error.remedy}\n  {told}" if error.remedy else told) from error
            if isinstance(error, OSError):
                place = "" if error.filename is None else f"{error.filename}: "
                raise UserError(f"{place}{error.strerror or error}", told) from error
            error.add_note(told)
            raise

    def _go_on(self) -> str:
        """How to go on from what is saved."""
        if self.safe is None:
            return "Nothing has been trained yet: make room, or take another --out."
        resume = command("train", "--resume", self.job.out)
        if self.state.step == 0:
            return f"Nothing has been trained yet. Go on with: {resume}; with other settings take another --out."
        all_of = "Nothing that was trained is lost: the" if self.safe[1] == self.state.step else "The"
        return f"{all_of} run is saved up to step {self.safe[1]}. Go on with: {resume}"

    def _lower_rate(self) -> str:
        config, safe = self.recipe.optim, 0 if self.safe is None else self.safe[1]
        return lower_rate(self.job.out, config.lr, config.clip, safe)

    def _card(self, epoch: int) -> Card:
        result = self.state.result if self.measured == self.state.step else None
        return replace(self.job.card, epoch=epoch, step=self.state.step, stats=None if result is None else result.stats)


def _mean(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each entry over the passes of a step; a pass may lack some (no denoising without boxes)."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {n: torch.stack([p[n].detach() for p in parts if n in p]).mean() for n in names}


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
