"""A recipe: everything that decides a run, as typed data that is stored with it.

Every field can be set from the command line (`-o optim.lr=1e-4`) or from Python; an unknown name is
refused with the nearest known one.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from detrellis.errors import UserError
from detrellis.fields import (
    Ascending,
    Config,
    Count,
    CountOrNone,
    Key,
    Weight,
    ZeroToBelowOne,
    ZeroToOne,
    configs_of,
    unknown_name,
    within,
)
from detrellis.recipes.data import DataConfig
from detrellis.recipes.detector import DetectorConfig
from detrellis.recipes.overrides import assign
from detrellis.schemes.config import BranchName, SchemesConfig

SCHEMES = tuple(SchemesConfig.model_fields)  # the names of all training schemes
Fraction = Annotated[float, within(0, 1, above=True, below=True)]  # of a run
Factor = Annotated[float, within(0, 1000)]  # on a learning rate


class LossConfig(Config):
    """Loss weights and matching costs. `class` is a Python keyword, hence `classes`."""

    # of positives in sigmoid scores: focal; quality focal, varifocal (RT-DETR detaches the factor
    # of the negatives), position-supervised (Stable-DINO), IA-BCE, matchability-aware (DEIM)
    classification: Literal["focal", "qfl", "vfl", "vfl_detached", "psl", "ia_bce", "mal"] = "focal"
    classes: Weight = 2.0
    box: Weight = 5.0
    giou: Weight = 2.0
    iou_branch: Weight = 1.0
    iou_error: Literal["bce", "l2"] = "bce"  # that the IoU branch learns by; l2: Cascade-DETR's
    mask: Weight = 5.0  # cross-entropy of masks at points
    dice: Weight = 5.0
    cost_classes: Weight = 2.0
    cost_box: Weight = 5.0
    cost_giou: Weight = 2.0
    cost_mask: Weight = 5.0
    cost_dice: Weight = 5.0
    points: Count = 12544  # that masks are compared at
    points_in: Literal["batch", "image"] = "batch"  # batch: in its padding too, which is background
    fgl: Weight = 0.15  # of distributions: fine-grained localization,
    # And decoupled distillation focal loss, of the last layer's to the others' (D-FINE)
    ddf: Weight = 1.5
    salience: Weight = 2.0  # of tokens, where the encoder chooses among them (Salience-DETR)
    # Boxes learn by the union of the matches of all layers and proposals (D-FINE's GO-LSD)
    union: bool = False
    # Queries each target is matched to in every layer, all alike: leaves duplicates
    one_to_many: Count = 1
    no_object: Weight = 0.1  # weight of "no object" in a softmax's cross-entropy


class OptimConfig(Config):
    """AdamW. `scaled`: factors on the learning rate of parameters whose name contains the key."""

    lr: Annotated[float, within(0, 1, above=True)] = 2e-4
    weight_decay: Annotated[float, within(0, 10)] = 1e-4
    scaled: dict[Key, Factor] = Field(default_factory=lambda: {"backbone": 0.1})
    # Of the rate by depth in the backbone; 1: off
    layer_decay: Annotated[float, within(0, 1, above=True)] = 1.0
    decay_norms: bool = True  # whether weight decay covers normalisation layers
    # Weight decay leaves out parameters whose name contains one of these
    undecayed: tuple[Key, ...] = ()
    clip: Weight = 0.1  # norm of the gradient; 0: off
    batch_size: Count = 16  # images a step over all processes and accumulations
    accumulate: Count = 1  # passes a step
    ema: ZeroToBelowOne = 0.0  # decay of the averaged weights; 0: off
    ema_ramp: CountOrNone = 0  # steps in which that decay is approached (RT-DETR: 2000); 0: in 10
    amp: bool = True  # bf16 on GPUs and CPUs that have it: `precision.py`
    compile: bool = False  # the layers of encoder and decoder, with torch.compile
    # Compute these layers again in the backward pass, instead of keeping what they computed
    checkpointing: bool = False
    # Shard parameters, gradients, moments and averages over the processes (FSDP2)
    fully_shard: bool = False

    def steps(self, images: int) -> int:
        """Optimizer steps of an epoch over so many images."""
        return -(-images // self.batch_size)


class ScheduleConfig(Config):
    """Learning rate over the run, in fractions of its steps, so that it fits any data set."""

    epochs: Count = 50
    warmup: ZeroToBelowOne = 0.0
    # Instead of warmup: optimizer steps, whatever the length of the run
    warmup_steps: CountOrNone = 0
    shape: Literal["step", "cosine"] = "step"
    # Step: where the rate is multiplied by 0.1
    drops: Annotated[tuple[Fraction, ...], Ascending] = (0.8,)
    # Cosine: part of the run before the rate falls, warmup included (DEIM's flat cosine)
    flat: ZeroToBelowOne = 0.0
    final: ZeroToOne = 0.0  # cosine: last rate relative to the first
    eval_every: Count = 1  # epochs between two evaluations; the last epoch is always evaluated
    keep_every: CountOrNone = 0  # epochs between two weights files kept as epochs/NNNN; 0: none
    unfreeze_after: CountOrNone = 0  # epochs for which backbone.frozen holds; 0: for the whole run
    keep_best: Annotated[int, within(0, 100)] = (
        0  # weights files of the best epochs kept in best/; 0: best.safetensors alone
    )
    # Evaluations without a higher AP after which the run ends; 0: it never ends early
    patience: CountOrNone = 0


class Recipe(Config):
    """A whole run: network, losses, schemes, optimizer, schedule, data."""

    name: str
    about: str = ""
    detector: DetectorConfig = DetectorConfig()
    loss: LossConfig = LossConfig()
    schemes: SchemesConfig = SchemesConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()

    @property
    def needs_masks(self) -> bool:
        """Whether training reads the objects' masks within their boxes."""
        return self.schemes.co is not None and "mask" in self.schemes.co.branches

    @property
    def needs_bitmaps(self) -> bool:
        """Whether training reads the objects' masks in the whole image."""
        return self.data.masks or self.detector.masks is not None

    def untrained(self) -> Recipe:
        """The same network without reaching for pretrained weights:
        to be measured, or filled with trained ones.
        """
        light = {"backbone": self.detector.backbone.untrained()}
        return self.model_copy(update={"detector": self.detector.model_copy(update=light)})

    def with_statistics(
        self, mean: tuple[float, float, float], std: tuple[float, float, float]
    ) -> Recipe:
        """The same recipe with these for `data.mean` and `data.std` where it leaves them open."""
        known = {"mean": self.data.mean or mean, "std": self.data.std or std}
        return self.model_copy(update={"data": self.data.model_copy(update=known)})

    def override(self, assignments: str | Sequence[str]) -> Recipe:
        """A copy with one or several `key.sub=value` assignments applied;
        values are read as YAML 1.2.

        Raises `UserError` for an unknown key, naming the nearest one, and for a value that does not
        fit.
        """
        data = self.model_dump()
        for text in [assignments] if isinstance(assignments, str) else assignments:
            assign(data, type(self), text)
        return self.checked(data)

    def with_schemes(
        self, names: str | Sequence[str], override: str | Sequence[str] = ()
    ) -> Recipe:
        """A copy with more training schemes: `"cdn=50"`, `"co@0.5"` (for half of the run), or
        several; `"none"` takes away those before it. `override`: assignments to apply to it, the
        schemes' dials among them.

        One that sets what classes learn to the end of the run takes the place of the recipe's
        `loss.classification`, of which nothing is left to do; with a dial that leaves it to the
        recipe, it does not.
        """
        chosen = self.schemes.model_dump()
        for text in (
            part.strip()
            for name in ([names] if isinstance(names, str) else names)
            for part in name.split(",")
        ):
            if text == "none":
                chosen = dict.fromkeys(chosen)
                continue
            scheme, windowed, until = text.partition("@")
            name, separator, value = scheme.partition("=")
            set_to = _dialled(text, name, value) if separator else {}
            if windowed:
                set_to |= {"until": _part(text, until)}
            if name not in chosen:
                raise _unknown_scheme(name, text)
            chosen[name] = (chosen[name] or {}) | set_to
            try:
                SchemesConfig.checked({name: chosen[name]})
            except UserError as error:
                raise UserError(f"--scheme {text}: schemes.{error.message}", _form(name)) from None
        more = self.model_copy(update={"schemes": SchemesConfig.checked(chosen)})
        dialled = more.override(override)
        had, sets = (r.schemes.target_setters(to_the_end=True) for r in (self, dialled))
        if had or not sets:
            return dialled
        loss = self.loss.replace(classification="focal")
        return more.model_copy(update={"loss": loss}).override(override)


# What a family of recipes exports: the name of each, and the function that makes it.
Recipes = Mapping[str, Callable[[], Recipe]]


def _dialled(text: str, name: str, value: str) -> dict[str, Any]:
    """What N in `--scheme NAME=N` sets: a number, or names with + between."""
    if name == "none":
        raise UserError(f"--scheme {text}: none takes no number", "Write --scheme none.")
    if name not in SCHEMES:
        raise _unknown_scheme(name, text)
    dial = _dial(name)
    if not dial:
        raise UserError(f"--scheme {text}: {name} takes no number", f"Write --scheme {name}.")
    if name == "co":
        return {dial: tuple(part.strip() for part in value.split("+") if part.strip())}
    if not re.fullmatch(r"[-+]?\d{1,20}", value.strip()):
        raise UserError(f"--scheme {text}: {value!r} is not a whole number", _form(name))
    return {dial: int(value)}


def _part(text: str, until: str) -> float:
    """UNTIL in `--scheme NAME@UNTIL`."""
    try:
        part = float(until)
    except ValueError:
        part = math.nan
    if 0 < part <= 1:
        return part
    raise UserError(
        f"--scheme {text}: {until!r} is no part of the run, which is above 0 and at most 1",
        f"Write --scheme {text.partition('@')[0]}@0.5, to switch it off after half of the run.",
    )


def _dial(name: str) -> str:
    """The field that N in `--scheme NAME=N` sets; empty where a scheme has none."""
    (config,) = configs_of(SchemesConfig.model_fields[name].annotation)
    return getattr(config, "dial", "")


def _form(name: str) -> str:
    """How a scheme's dial is written."""
    dial = _dial(name)
    if name == "co":
        return (
            "Write --scheme co=atss+rcnn: heads joined with +, any of "
            f"{', '.join(typing.get_args(BranchName))}."
        )
    return (
        f"Write --scheme {name}=N; N sets schemes.{name}.{dial}."
        if dial
        else f"Write --scheme {name}."
    )


def _unknown_scheme(name: str, text: str) -> UserError:
    if name in typing.get_args(BranchName):
        return UserError(
            f"--scheme {text}: {name} is a head of the scheme co",
            f"Join heads with +: --scheme co=atss+{name}.",
        )
    return unknown_name(name, [*SCHEMES, "none"], f"--scheme {text}")
