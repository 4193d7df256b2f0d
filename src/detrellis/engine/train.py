"""The training loop, read top to bottom.

Nothing random has a state of its own: before each step every generator is seeded from (seed, step,
process), and an image's augmentation from (seed, epoch, image). A resumed run therefore continues
bit for bit; on a GPU as far as its kernels are deterministic, which the backward pass of
`grid_sample` is not.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detrellis.atomic import replace_files, sweep
from detrellis.data.batch import Batch
from detrellis.data.loader import Loader
from detrellis.data.masks import run_lengths
from detrellis.data.sampler import BatchSampler
from detrellis.distributed import World, parallel, reduce_maxima, same_statistics
from detrellis.engine.batches import (
    batch_per_process,
    padded_fraction,
    train_loader,
    unreadable_line,
)
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import BEST, BEST_FOLDER, keep_best, save_weights
from detrellis.engine.coco_eval import CocoEvaluator
from detrellis.engine.eval_result import EvalResult
from detrellis.engine.evaluate import NMS, collect, duplicates_line, eval_loader
from detrellis.engine.guard import check_finite
from detrellis.engine.log import RunLog, Timer
from detrellis.engine.means import mean_over_passes
from detrellis.engine.optim import check_warmup, schedule_factor, set_learning_rate
from detrellis.engine.outcome import TrainResult
from detrellis.engine.samples import SHEET, samples_sheet
from detrellis.engine.saves import RunSaves
from detrellis.engine.state import TrainJob, TrainState, fresh_state, origins_of, patience_left
from detrellis.errors import UserError
from detrellis.nn.compiled_layers import compile_layers, eager
from detrellis.precision import autocast, has_bfloat16
from detrellis.signals import collected
from detrellis.terminal import Terminal
from detrellis.training import StepOutput

WATCH_EVERY = 10  # steps between two looks at the matched IoU, each of which waits for the device
SAMPLES = 9  # pictures on the sheet of what is trained on


def train(
    job: TrainJob,
    world: World,
    resume: dict[str, Any] | None = None,
    console: Console | None = None,
    report: Callable[[CocoEvaluator, Card], None] = lambda *_: None,
) -> TrainResult:
    """Train to the end of the recipe's schedule, or until a signal;
    `resume` is what `load_state` gave.

    `report` is called at the end with what the best weights detected, where this process evaluated
    them. The state is saved before the first step, after the steps of each epoch and now and then
    between, so that whatever ends the process leaves a run that can go on. An evaluation adds a few
    numbers, which the next state holds: a run that is killed before it is saved evaluates again,
    with the same result.
    """
    schedule = job.card.recipe.schedule
    epochs = schedule.epochs
    job.check_validation()
    if world.is_main_process:  # what a process that was killed left half written
        sweep(job.out)
        sweep(job.out / "epochs")
        sweep(job.out / BEST_FOLDER)
    # The state: of the stopped run, or fresh, and then perhaps from other weights.
    state = fresh_state(job, world, filled=resume is not None)
    if resume is not None:
        state.load_state_dict(resume, job.out)
    elif world.is_main_process and (origins := origins_of(job.card, state)):
        (console or Terminal()).print(*origins, sep="\n")
    loader, steps_per_epoch = train_loader(job, world)
    check_warmup(steps_per_epoch * epochs, schedule)
    # Once for all evaluations; an object without a mask is told before anything is written.
    bitmaps = job.val if job.card.recipe.needs_bitmaps else None
    masks = None if bitmaps is None else run_lengths(bitmaps)
    tracked: Any = {"trackers": job.trackers, "config": job.card.settings()}
    length: Any = {"epochs": epochs, "steps_per_epoch": steps_per_epoch, "step": state.step}
    log = RunLog(job.out, **length, rank=world.rank, console=console, **tracked)
    run = TrainRun(job, world, state, loader, steps_per_epoch, log, masks)
    with log, collected() as caught, contextlib.closing(loader), run.saves.saved_on_error():
        run.saves.save_at_start(resume)
        run.introduce(fresh=resume is None)
        while not state.finished(schedule) and not run.stopped:
            run.start_epoch()
            for batches in itertools.takewhile(lambda _: not run.stopped, run.steps()):
                run.train_step(batches)
                run.stop_or_save(caught)
            if not run.stopped:
                run.end_epoch()
                run.stopped = run.received_signal(caught)
            if run.stopped or state.finished(schedule) or run.saves.has_unsaved_steps():
                run.saves.save()
        log.status = "finished" if state.finished(schedule) else "stopped"
    finished, position = state.finished(schedule), (state.epoch, state.step, state.seconds)
    number, early = None if finished else run.stopped, finished and state.epoch < epochs
    if finished and run.best is not None and world.is_main_process:
        report(*run.best)
    return TrainResult(
        job.out, *position, state.best, state.result, finished, number, early, state.transfer
    )


class TrainRun:
    """One run in one process: the parts that the loop above puts in order."""

    def __init__(
        self,
        job: TrainJob,
        world: World,
        state: TrainState,
        loader: Loader,
        steps_per_epoch: int,
        log: RunLog,
        masks: list[dict[str, Any]] | None,
    ) -> None:
        self.job, self.world, self.state, self.loader, self.log = job, world, state, loader, log
        self.recipe, self.steps_per_epoch = job.card.recipe, steps_per_epoch
        if self.recipe.optim.compile:
            compile_layers(state.model, world.device)
        self.model = parallel(state.model, world) if state.sharded is None else state.model
        self.timer = Timer()
        self.stopped = 0  # number of the signal that stopped it
        self.saves = RunSaves(job, world, state, log)
        self.best: tuple[CocoEvaluator, Card] | None = None  # what the best weights detected
        batch = batch_per_process(self.recipe, world)
        self.val = (
            None
            if job.val is None
            else eval_loader(job.val, self.recipe.data, batch, job.workers, world)
        )
        self.masks = masks  # of the validation images

    def introduce(self, fresh: bool) -> None:
        """Says in which precision it computes; of a `fresh` run, what is trained on is drawn."""
        if self.recipe.optim.amp and has_bfloat16(self.world.device):
            self.log.say("Products in bfloat16; in float32 with -o optim.amp=false.")
        if fresh and self.world.is_main_process:
            self.show_samples()

    def show_samples(self) -> None:
        """What is trained on, as one picture, in the run's folder and in the trackers."""
        # Of a picture that cannot be read: the step that needs it says more
        with contextlib.suppress(UserError):
            sheet = samples_sheet(self.loader.dataset, self.job.train.classes.names, SAMPLES)
            replace_files((self.job.out / SHEET, lambda path: sheet.save(path, "JPEG", quality=90)))
            self.log.picture("train_samples", sheet)

    def start_epoch(self) -> None:
        """What was frozen for the first epochs alone is trained from here on; a resumed run finds
        its place the same way. DDP has counted the parameters that get gradients, so it has to be
        made anew."""
        backbone, until = self.state.model.detector.backbone, self.recipe.schedule.unfreeze_after
        if until and backbone.held and self.state.epoch >= until:
            backbone.hold(False)
            self.model = self.state.model
            gc.collect()  # the hooks of the old one end with it
            self.model = parallel(self.state.model, self.world)
            self.log.say(f"After epoch {until} the whole backbone is trained.")
        self.log.start_epoch(self.state.epoch + 1)

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
        self.saves.between_steps = False
        # The learning rate, and the seed of everything random in this step.
        steps = self.steps_per_epoch * schedule.epochs
        lr = config.lr * schedule_factor(state.step, steps, schedule)
        set_learning_rate(state.optimizer, lr)
        state.optimizer.zero_grad(set_to_none=True)
        seed = zlib.crc32(f"{self.job.card.seed}/{state.step}/{self.world.rank}".encode())
        torch.manual_seed(seed)
        state.model.reseed(seed)
        state.model.progress(state.step / steps)
        # Forward and backward passes.
        outputs, total = [], 0.0
        for i, batch in enumerate(batches):
            with self._without_gradient_sync(i < len(batches) - 1):
                output, value = self._forward_backward(batch, weight=1 / len(batches))
            outputs.append(output)
            total += value / len(batches)
        # The update.
        with self.timer.part("optimizer"):
            if config.clip > 0:
                nn.utils.clip_grad_norm_(state.model.parameters(), config.clip)
            state.optimizer.step()
            state.step += 1
            if self.world.size > 1:
                same_statistics(state.model)
            if state.ema is not None:
                state.ema.update(state.model.detector, state.step)
        # The log, and now and then a look at whether anything is learned.
        losses = mean_over_passes([o.losses for o in outputs])
        metrics = mean_over_passes([o.metrics for o in outputs])
        images = sum(len(b.image_ids) for b in batches) * self.world.size
        due = state.step % WATCH_EVERY == 0
        warning = state.watch.update(state.step, total, float(metrics["main/iou"])) if due else None
        self.saves.between_steps = True
        self.log.step(state.step, losses, metrics, total=total, lr=lr, images=images)
        self.log.say(warning or "")

    def _forward_backward(self, batch: Batch, weight: float) -> tuple[StepOutput, float]:
        """Forward and backward of one batch, whose loss counts with `weight`;
        bf16 where the device has it.
        """
        device, number = self.world.device, self.state.step + 1
        with self.timer.part("forward"):
            batch = batch.to(device, non_blocking=True)
            with autocast(device, self.recipe.optim.amp):
                output: StepOutput = self.model(batch.images, batch.targets)
            output = output._replace(
                metrics=output.metrics | {"data/padding": padded_fraction(batch)}
            )
            total = torch.stack(list(output.losses.values())).sum()
            save_to = self.job.out / f"bad_batch-{self.world.rank}.pt"
            remedy = self.saves.divergence_remedy()
            value = check_finite(
                output.losses, total, number, batch.image_ids, batch, save_to, remedy
            )
        with self.timer.part("backward"):
            (total * weight).backward()
        return output, value

    def _without_gradient_sync(self, accumulating: bool) -> contextlib.AbstractContextManager[Any]:
        """DDP exchanges gradients in the last pass of a step only,
        not while they are accumulated.
        """
        if accumulating and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def stop_or_save(self, caught: list[int]) -> None:
        """Between two steps: stop where a signal came to any process, all after the same step, or
        the others would wait for ever; save now and then, so that a long epoch is not lost."""
        self.stopped, due = self._of_any_process(caught, due=self.saves.are_due())
        if due:
            self.saves.save()

    def received_signal(self, caught: list[int]) -> int:
        """The number of a signal that came to any process, else 0."""
        return self._of_any_process(caught, due=False)[0]

    def _of_any_process(self, caught: list[int], *, due: bool) -> list[int]:
        """The number of a signal that came to any process, and whether a save is `due` in any."""
        return reduce_maxima([caught[0] if caught else 0, int(due)], self.world.device)

    def end_epoch(self) -> None:
        """Evaluate, save the best weights and those of the epoch where the recipe keeps them,
        and log the epoch.
        """
        state, schedule, epoch = self.state, self.recipe.schedule, self.state.epoch + 1
        last, evaluates = epoch == schedule.epochs, False
        # The evaluation; what the last one says besides is measured where it may turn out to be the
        # last.
        stats, after_nms = None, None
        if self.val is not None and (last or epoch % schedule.eval_every == 0):
            # An evaluation that fails, or is not waited for, costs nothing that was trained
            self.saves.save()
            after_nms = self.evaluate(last or patience_left(schedule, state.since_best) == 1)
            stats, evaluates = None if state.result is None else state.result.stats, True
        if schedule.keep_every and epoch % schedule.keep_every == 0:
            weights, path = state.weights(), self.job.out / "epochs" / f"{epoch:04}.safetensors"
            if self.world.is_main_process:
                save_weights(path, weights, self.saves.card(epoch))
        state.epoch = epoch
        # The log.
        after_nms = after_nms if state.finished(schedule) else None
        evaluated = (
            {"eval": state.result, "after_nms": after_nms}
            if evaluates and state.finished(schedule)
            else {}
        )
        resampled = {
            name: result.resampled
            for name, result in evaluated.items()
            if result and result.resampled
        }
        self.log.end_epoch(
            self.timer.take(), stats, None if after_nms is None else after_nms.stats, resampled
        )
        self.log.say(unreadable_line(self.job.out))
        if after_nms is not None and state.result is not None:
            needed = {name for scheme in state.model.training_schemes for name in scheme.requires}
            line = duplicates_line(state.result, after_nms, self.recipe, needed)
            self.log.say(line or "")

    def evaluate(self, last: bool) -> EvalResult | None:
        """Evaluate the epoch, and save its weights if they are among the best;
        of the `last`, the result after NMS.
        """
        state, loader, val = self.state, self.val, self.job.val
        assert loader is not None
        assert val is not None
        with state.whole_detector(self.world.device) as detector:
            with self.timer.part("eval"):
                batches = self.log.track(loader, "evaluate", len(loader))
                thresholds = (None, NMS) if last else (None,)
                with eager() if self.recipe.optim.compile else contextlib.nullcontext():
                    evaluators = collect(
                        detector, batches, val, self.world.device, thresholds, truth=self.masks
                    )
                state.result, *after_nms = (e.compute(resample=last, of=e.kind) for e in evaluators)
                self.saves.evaluated_step = state.step
            if state.result.ap is not None:
                self._save_best(state.result.ap, evaluators[0], detector.state_dict())
        return after_nms[0] if last else None

    def _save_best(
        self, ap: float, evaluator: CocoEvaluator, weights: Mapping[str, torch.Tensor]
    ) -> None:
        """Save the epoch's weights if they are the best,
        or among as many of the best as the recipe keeps.
        """
        state = self.state
        count = self.recipe.schedule.keep_best
        card = self.saves.card(self.state.epoch + 1)
        if count and self.world.is_main_process:
            keep_best(self.job.out / BEST_FOLDER, weights, card, ap, count)
        state.since_best += 1
        if state.best is None or ap > state.best:
            if self.world.is_main_process:
                save_weights(self.job.out / BEST, weights, card)
            state.best, state.since_best, self.best = ap, 0, (evaluator, card)
