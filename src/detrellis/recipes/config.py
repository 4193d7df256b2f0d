"""A recipe: everything that decides a run, as typed data that is stored with it.

Every field can be set from the command line (`-o optim.lr=1e-4`) or from Python; an unknown name is refused with the
nearest known one.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from detrellis.errors import UserError
from detrellis.recipes.fields import Config, Count, Positive, Share, Weight
from detrellis.recipes.schemes import SchemesConfig


class BackboneConfig(Config):
    """`name`: a torchvision ResNet (`resnet18`, `34`, `50`, `101`) or any timm model with feature maps."""

    name: str = "resnet50"
    pretrained: bool = True
    norm: Literal["auto", "frozen", "batch"] = "auto"  # auto: frozen with pretrained weights, trained without
    dilation: bool = False  # DC5
    drop_path: Share = 0.0  # rate of dropped residual branches, for timm models that have it
    strides: tuple[int, ...] = (8, 16, 32)

    @property
    def normalisation(self) -> Literal["frozen", "batch"]:
        """`norm` with "auto" decided."""
        return self.norm if self.norm != "auto" else "frozen" if self.pretrained else "batch"


class AlignerConfig(Config):
    """How semantic attention samples a query anew (SAM-DETR); all but the defaults are ablations."""

    resample: Literal["points", "avg", "max"] = "points"  # salient points, or the pooled region
    keypoints: Count | None = None  # points of a query; fewer than heads are shared, more add heads; None: one a head
    reweight: bool = True  # gates that the old query gives
    search: Literal["box", "image"] = "box"  # where the points may lie
    zero_init: bool = False  # points start in the centres of the boxes


class DetectorConfig(Config):
    """The network parts; see docs/architecture.md."""

    backbone: BackboneConfig = BackboneConfig()
    width: Count = 256
    heads: Count = 8
    levels: Count = 4
    points: Count = 4
    encoder: Literal["deformable", "dense", "intra_scale"] = "deformable"  # intra_scale: SMCA's, on several levels
    neck_norm: bool | None = None  # GroupNorm after the projection; None: with several levels
    # dense, conditional and semantic read one level; of several, each layer reads one, coarse to fine
    cross_attention: Literal["deformable", "dense", "conditional", "semantic"] = "deformable"
    aligner: AlignerConfig = AlignerConfig()  # of semantic attention
    smca: bool = False  # a Gaussian prior on dense or semantic attention
    encoder_layers: Count = 6
    decoder_layers: Count = 6
    hidden: Count = 1024  # of the feed-forward blocks
    encoder_hidden: Count | None = None  # of the encoder's; None: the same
    activation: Literal["relu", "prelu"] = "relu"  # of the feed-forward blocks
    dropout: Share = 0.1
    # learned: positions; anchors: boxes; proposals: boxes and contents from the encoder; mixed: boxes, learned contents
    queries: Literal["learned", "anchors", "proposals", "mixed"] = "learned"
    query_count: Count = 300
    content: Literal["zero", "shared", "learned"] = "learned"  # of learned and anchor queries; shared: one for all
    patterns: Annotated[int, Field(ge=0)] = 0  # contents that each anchor stands with (DAB-DETR); 0: off
    indicator: bool = False  # keep a content channel that tells denoising queries (DN-DETR)
    fixed_centres: bool = False  # anchors' centres are drawn uniformly and not trained
    frozen_boxes: bool = False  # anchors, centres and sizes, are not trained (SAM-DETR, Table 5)
    query_position: Literal["queries", "boxes"] = "queries"  # boxes: derived from the current boxes at each layer
    position_scale: bool = False  # positions times an MLP of the content, in the encoder too (DAB-DETR)
    refine: Literal["none", "detached", "look_forward_twice"] = "none"
    final_norm: bool = False
    shared_heads: bool = False
    scores: Literal["sigmoid", "softmax"] = "sigmoid"  # softmax: classes exclude each other, one means "no object"
    iou_branch: Literal["none", "product", "root"] = "none"  # a head that learns the IoU, and how scores use it
    eps: Positive = 1e-5  # of the inverse sigmoid
    position_temperature: Positive = 10000.0
    position_offset: float = -0.5
    proposal_targets: Literal["objectness", "classes"] = "objectness"
    empty_compete: bool = False  # tokens that can propose nothing are ranked too, as in the reference codes
    top_k: Count = 100
    soft_nms: Share | None = None  # detections that overlap a better one of their class by this lose score; None: off


class LossConfig(Config):
    """Loss weights and matching costs. `class` is a Python keyword, hence `classes`."""

    # of positives in sigmoid scores: focal; quality focal, varifocal, position-supervised (Stable-DINO), IA-BCE
    classification: Literal["focal", "qfl", "vfl", "psl", "ia_bce"] = "focal"
    classes: Weight = 2.0
    box: Weight = 5.0
    giou: Weight = 2.0
    iou_branch: Weight = 1.0
    cost_classes: Weight = 2.0
    cost_box: Weight = 5.0
    cost_giou: Weight = 2.0
    one_to_many: Count = 1  # queries each target is matched to in every layer, all alike: leaves duplicates
    no_object: Weight = 0.1  # weight of "no object" in a softmax's cross-entropy


class OptimConfig(Config):
    """AdamW. `scaled`: factors on the learning rate of parameters whose name contains the key."""

    lr: Positive = 2e-4
    weight_decay: Weight = 1e-4
    scaled: dict[str, float] = Field(default_factory=lambda: {"backbone": 0.1})
    decay_norms: bool = True  # whether weight decay covers normalisation layers
    clip: Weight = 0.1  # norm of the gradient; 0: off
    batch_size: Count = 16  # images a step over all processes and accumulations
    accumulate: Count = 1  # passes a step
    ema: Share = 0.0  # decay of the averaged weights; 0: off
    amp: bool = True  # bf16 on GPUs that have it


class ScheduleConfig(Config):
    """Learning rate over the run, in fractions of its steps, so that it fits any data set."""

    epochs: Count = 50
    warmup: Share = 0.0
    shape: Literal["step", "cosine"] = "step"
    drops: tuple[float, ...] = (0.8,)  # step: where the rate is multiplied by 0.1
    final: Share = 0.0  # cosine: last rate relative to the first
    eval_every: Count = 1  # epochs between two evaluations; the last epoch is always evaluated
    keep_every: Annotated[int, Field(ge=0)] = 0  # epochs between two weights files kept as epochs/NNNN; 0: none


class DataConfig(Config):
    """Image size and augmentation; `size`: short side, or (height, width)."""

    size: int | tuple[int, int] = 800
    max_side: int | None = None  # of the long side where size is the short one; None: size * 1333 / 800
    exact_long: bool = False  # round a long side that meets its limit as transformers does, when not augmenting
    augment: Literal["detr", "fixed", "none"] = "detr"
    keep_aspect: bool = True
    hflip: Share = 0.5
    vflip: Share = 0.0
    jitter: float | None = None  # strength of the colour jitter; None: the policy's own
    zoom: tuple[float, float] | None = None  # lowest and highest magnification; None: the policy's own
    group_by_aspect: bool = False  # batches of one orientation, which saves padding

    def resizing(self) -> dict[str, Any]:
        """The arguments of `eval_transform` besides the size."""
        return {"max_size": self.max_side, "keep_aspect": self.keep_aspect, "exact_long": self.exact_long}

    def augmentation(self) -> dict[str, Any]:
        """The arguments of `train_transform` besides policy and size."""
        named = {k: getattr(self, k) for k in ("keep_aspect", "hflip", "vflip", "jitter", "zoom")}
        return named | {"max_size": self.max_side}


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
        """Whether training reads the objects' masks."""
        return self.schemes.co is not None and "mask" in self.schemes.co.branches

    def untrained(self) -> Recipe:
        """The same network without reaching for pretrained weights: to be measured, or filled with trained ones."""
        backbone = self.detector.backbone
        light = backbone.model_copy(update={"pretrained": False, "norm": backbone.normalisation})
        return self.model_copy(update={"detector": self.detector.model_copy(update={"backbone": light})})

    def override(self, assignments: str | Sequence[str]) -> Recipe:
        """A copy with one or several `key.sub=value` assignments applied; values are read as YAML.

        Raises `UserError` for an unknown key, naming the nearest one, and for a value of the wrong type.
        """
        data = self.model_dump()
        for text in [assignments] if isinstance(assignments, str) else assignments:
            key, separator, value = text.partition("=")
            if not separator:
                raise UserError(f"-o {text}: no value", "Write -o key.sub=value, for example -o optim.lr=1e-4.")
            try:
                parsed = _value(value)
            except yaml.YAMLError:
                raise UserError(f"-o {text}: {value!r} is not YAML", "Quote it: -o 'data.size=[192, 256]'.") from None
            _set(data, type(self), key.strip().split("."), parsed, text)
        return self.checked(data)

    def with_schemes(self, names: str | Sequence[str]) -> Recipe:
        """A copy with more training schemes: `"cdn=50"`, or several; `"none"` takes away those before it."""
        known = list(SchemesConfig.model_fields)
        chosen = self.schemes.model_dump()
        given = [names] if isinstance(names, str) else names
        for text in (part.strip() for name in given for part in name.split(",")):
            name, separator, value = text.partition("=")
            if name == "none":
                chosen = dict.fromkeys(known)
                continue
            if name not in known:
                raise unknown_name(name, [*known, "none"], f"--scheme {text}")
            config = config_of(SchemesConfig.model_fields[name].annotation)
            dial: str = getattr(config, "dial", "")
            if separator and not dial:
                raise UserError(f"--scheme {text}: {name} takes no number", f"Write --scheme {name}.")
            set_to = {dial: _dialled(config, value, text)} if separator and config is not None else {}
            chosen[name] = (chosen[name] or {}) | set_to
        return self.model_copy(update={"schemes": SchemesConfig.checked(chosen)})


def _dialled(config: type[Config], value: str, text: str) -> int | tuple[str, ...]:
    """What N in `--scheme NAME=N` sets: a number, or names with + between."""
    name, dial = text.partition("=")[0], getattr(config, "dial", "")
    if typing.get_origin(config.model_fields[dial].annotation) is tuple:
        return tuple(part.strip() for part in value.split("+"))
    if not value.isdecimal():
        raise UserError(f"--scheme {text}: {value!r} is not a number", f"Write --scheme {name}=N; N sets {dial}.")
    return int(value)


def _value(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def config_of(annotation: Any) -> type[Config] | None:
    """The configuration class behind a field's annotation, also where it may be None."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    found = [o for o in options if isinstance(o, type) and issubclass(o, Config)]
    return found[0] if found else None


def _set(data: dict[str, Any], config: type[Config], path: list[str], value: Any, text: str) -> None:
    """Set one value in nested plain data, checking each name against the class that holds it."""
    name, rest = path[0], path[1:]
    if name not in config.model_fields:
        raise unknown_name(name, list(config.model_fields), f"-o {text}")
    inner = config_of(config.model_fields[name].annotation)
    if not rest:
        data[name] = {} if inner is not None and value is True else value
        return
    if data[name] is None:
        data[name] = {}
    if inner is None and isinstance(data[name], dict):  # a mapping with free keys
        data[name][".".join(rest)] = value
        return
    if inner is None:
        raise UserError(f"-o {text}: {name} has no parts", f"Write -o {name}=value.")
    _set(data[name], inner, rest, value, text)


def unknown_name(name: str, known: Sequence[str], where: str) -> UserError:
    """The error for a name that does not exist, with the nearest ones that do."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    remedy = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
    return UserError(f"{where}: there is no {name!r}", remedy)
