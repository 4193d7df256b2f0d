"""What is saved of a run while it trains, and what an error that ends it says of going on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from detrellis.distributed import World, reduce_max
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import CARD, LAST, OLDER, metadata_of, save_run
from detrellis.engine.guard import NonFiniteLoss, check_weights, divergence_remedy
from detrellis.engine.log import RunLog
from detrellis.engine.resume import IMAGES, LOG, SEEN, packed_file_names
from detrellis.engine.samples import images_an_epoch
from detrellis.engine.state import TrainJob, TrainState
from detrellis.errors import UserError, command

SAVE_EVERY_SECONDS = 1200.0  # within an epoch; every epoch's end saves anyway


class SaveError(UserError):
    """The run could not be saved."""


class RunSaves:
    """The saves of one run, in one process: the state, its last weights, and their card."""

    def __init__(self, job: TrainJob, world: World, state: TrainState, log: RunLog) -> None:
        self.job, self.world, self.state, self.log = job, world, state, log
        self.between_steps = True  # the state is one that a run may go on from
        self.saved_position: tuple[int, int] | None = None  # epochs and steps done in what is saved
        # Step of the weights in `state.result`
        self.evaluated_step = None if job.card.stats is None else state.step
        self.saved_at = time.monotonic()
        splits = {"train": job.train, "val": job.val}
        self.images = {split: packed_file_names(a) for split, a in splits.items() if a is not None}

    def save_at_start(self, resume: Mapping[str, Any] | None) -> None:
        """Save before the first step: a full disk shows now, and whatever comes, there is a state
        to go on from. Of a resumed run what a crash or a change of settings has left different on
        the disk is written again."""
        if resume is not None:
            self.log.load_state_dict(resume.get(LOG))
            if OLDER not in resume:
                self.saved_position = (self.state.epoch, self.state.step)
        mine = self.card(self.state.epoch).to_metadata()
        weights = mine if self.state.step == 0 else metadata_of(self.job.out / LAST)
        changed = resume is None or OLDER in resume or resume[CARD] != mine or weights != mine
        # The files may be written anew before another process reads them: all save if one has to.
        if reduce_max(int(changed), self.world.device):
            self.save()

    def save(self) -> None:
        """The state to resume from, and the last weights once there has been a step."""
        now = time.monotonic()
        self.state.seconds += now - self.saved_at
        self.saved_at = now
        more = {
            IMAGES: self.images,
            SEEN: images_an_epoch(self.job.train, self.job.card.recipe),
            LOG: self.log.state_dict(),
        }
        whole = self.state.state_dict() | more
        weights = self.state.weights() if self.state.step else None
        if self.world.is_main_process:
            check_weights(whole["model"].values(), self.state.step, self.divergence_remedy())
            try:
                keep = self.saved_position is not None
                save_run(self.job.out, whole, weights, self.card(self.state.epoch), keep=keep)
            except OSError as error:
                message = f"{self.job.out}: the run cannot be saved ({error.strerror or error})"
                raise SaveError(message, self._resume_remedy()) from error
        self.saved_position = (self.state.epoch, self.state.step)

    def are_due(self) -> bool:
        """Whether so long has passed since the last one that a long epoch is saved."""
        return time.monotonic() - self.saved_at > SAVE_EVERY_SECONDS

    def has_unsaved_steps(self) -> bool:
        """Whether there were steps since the run was saved."""
        return self.saved_position is None or self.saved_position[1] != self.state.step

    @contextlib.contextmanager
    def saved_on_error(self) -> Iterator[None]:
        """Save what is trained before an error ends the run; the error then says how to go on."""
        try:
            yield
        except KeyboardInterrupt:
            self.log.say(f"Stopped at once. {self._resume_remedy()}")
            raise
        except (SaveError, NonFiniteLoss):
            raise
        except Exception as error:
            alone = self.state.sharded is None  # the others may not come to save
            if (
                alone
                and self.between_steps
                and self.saved_position not in (None, (self.state.epoch, self.state.step))
            ):
                with contextlib.suppress(UserError):  # the last checkpoint has to do
                    self.save()
            remedy = self._resume_remedy()
            if isinstance(error, UserError):
                raise UserError(
                    error.message, f"{error.remedy}\n  {remedy}" if error.remedy else remedy
                ) from error
            if isinstance(error, OSError):
                place = "" if error.filename is None else f"{error.filename}: "
                raise UserError(f"{place}{error.strerror or error}", remedy) from error
            error.add_note(remedy)
            raise

    def _resume_remedy(self) -> str:
        """How to go on from what is saved, which the main process alone knows."""
        resume = command("train", "--resume", self.job.out)
        if not self.world.is_main_process:
            return f"Go on with: {resume}"
        if self.saved_position is None:
            return "Nothing has been trained yet: make room, or take another --out."
        if self.state.step == 0:
            return (
                f"Nothing has been trained yet. Go on with: {resume}; with other settings take "
                "another --out."
            )
        step = self.saved_position[1]
        all_of = "Nothing that was trained is lost: the" if step == self.state.step else "The"
        return f"{all_of} run is saved up to step {step}. Go on with: {resume}"

    def divergence_remedy(self) -> str:
        """What to do about a loss that is not finite."""
        config = self.job.card.recipe.optim
        step = 0 if self.saved_position is None else self.saved_position[1]
        return divergence_remedy(self.job.out, config.lr, config.clip, step)

    def card(self, epoch: int) -> Card:
        """The card of the present weights;
        with their evaluation, if they are what was evaluated last.
        """
        result = self.state.result if self.evaluated_step == self.state.step else None
        return replace(
            self.job.card,
            epoch=epoch,
            step=self.state.step,
            stats=None if result is None else result.stats,
        )
