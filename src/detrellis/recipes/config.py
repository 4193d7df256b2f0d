"""A recipe: everything that decides a run, as typed data that is stored with it.

Every field can be set from the command line (`-o optim.lr=1e-4`) or from Python; an unknown name is refused with the
nearest known one.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from detrellis.errors import UserError
from detrellis.fields import (
    Ascending,
    Config,
    Count,
    CountOrNone,
    Few,
    Key,
    Portion,
    Share,
    Some,
    Weight,
    unknown_name,
    within,
)
from detrellis.recipes.schemes import Branch, SchemesConfig
from detrellis.recipes.values import read_value

Side = Annotated[int, within(1, 16384)]  # of a picture, in pixels
Fraction = Annotated[float, within(0, 1, above=True, below=True)]  # of a run
Factor = Annotated[float, within(0, 1000)]  # on a learning rate
Magnification = Annotated[float, within(0, 10, above=True)]


def _size(value: Any) -> Any:
    sides = [value] if isinstance(value, int) else list(value) if isinstance(value, list | tuple) else []
    numbers = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if numbers and len(sides) == (1 if isinstance(value, int) else 2) and all(1 <= side <= 16384 for side in sides):
        return value if isinstance(value, int) else tuple(sides)
    raise PydanticCustomError(
        "size", "has to be the short side, such as 640, or [height, width], such as [480, 640], each at most 16384"
    )


def _lowest_first(zoom: tuple[float, float]) -> tuple[float, float]:
    if zoom[0] > zoom[1]:
        raise PydanticCustomError("order", "has to be [lowest, highest], such as [0.8, 1.25]")
    return zoom


Size = Annotated[int | tuple[int, int], BeforeValidator(_size)]
Zoom = Annotated[tuple[Magnification, Magnification], AfterValidator(_lowest_first)]
Strides = Annotated[tuple[Count, ...], Ascending, Some]


class BackboneConfig(Config):
    """`name`: a torchvision ResNet (`resnet18`, `34`, `50`, `101`) or any timm model with feature maps."""

    name: str = "resnet50"
    pretrained: bool = True
    norm: Literal["auto", "frozen", "batch"] = "auto"  # auto: frozen with pretrained weights, trained without
    dilation: bool = False  # DC5
    drop_path: Portion = 0.0  # rate of dropped residual branches, for timm models that have it
    strides: Strides = (8, 16, 32)
    # stages, with the stem, that training leaves as they are, BatchNorm's statistics too; 0: what `norm` freezes
    frozen: Annotated[int, within(0, 99)] | Literal["all"] = 0

    @property
    def normalisation(self) -> Literal["frozen", "batch"]:
        """`norm` with "auto" decided."""
        return self.norm if self.norm != "auto" else "frozen" if self.pretrained else "batch"


class AlignerConfig(Config):
    """How semantic attention samples a query anew (SAM-DETR); all but the defaults are ablations."""

    resample: Literal["points", "avg", "max"] = "points"  # salient points, or the pooled region
    keypoints: Few | None = None  # points of a query; fewer than heads are shared, more add heads; None: one a head
    reweight: bool = True  # gates that the old query gives
    search: Literal["box", "image"] = "box"  # where the points may lie
    zero_init: bool = False  # points start in the centres of the boxes


class DetectorConfig(Config):
    """The network parts; see docs/architecture.md."""

    backbone: BackboneConfig = BackboneConfig()
    width: Annotated[int, within(4, 8192)] = 256
    heads: Few = 8
    encoder_heads: Few | None = None  # of the encoder's attention; None: the same
    levels: Annotated[int, within(1, 8)] = 4
    points: Few = 4
    encoder_points: Few | None = None  # of the encoder's deformable attention; None: the same
    encoder: Literal["deformable", "dense", "intra_scale"] = "deformable"  # intra_scale: SMCA's, on several levels
    neck_norm: bool | None = None  # GroupNorm after the projection; None: with several levels
    # dense, conditional and semantic read one level; of several, each layer reads one, coarse to fine
    cross_attention: Literal["deformable", "dense", "conditional", "semantic"] = "deformable"
    aligner: AlignerConfig = AlignerConfig()  # of semantic attention
    smca: bool = False  # a Gaussian prior on dense or semantic attention
    encoder_layers: Few = 6
    decoder_layers: Few = 6
    hidden: Count = 1024  # of the feed-forward blocks
    encoder_hidden: Count | None = None  # of the encoder's; None: the same
    activation: Literal["relu", "prelu", "gelu", "silu"] = "relu"  # of the feed-forward blocks
    dropout: Portion = 0.1
    # learned: positions; anchors: boxes; proposals: boxes and contents from the encoder; mixed: boxes, learned contents
    queries: Literal["learned", "anchors", "proposals", "mixed"] = "learned"
    query_count: Annotated[int, within(1, 100_000)] = 300
    content: Literal["zero", "shared", "learned"] = "learned"  # of learned and anchor queries; shared: one for all
    patterns: Annotated[int, within(0, 100)] = 0  # contents that each anchor stands with (DAB-DETR); 0: off
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
    eps: Annotated[float, within(0, 0.5, above=True, below=True)] = 1e-5  # of the inverse sigmoid
    position_temperature: Annotated[float, within(1, 1e6)] = 10000.0
    position_offset: Annotated[float, within(-1, 1)] = -0.5
    proposal_targets: Literal["objectness", "classes"] = "objectness"
    empty_compete: bool = False  # tokens that can propose nothing are ranked too, as in the reference codes
    top_k: Count = 100  # detections of an image, at most
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

    lr: Annotated[float, within(0, 1, above=True)] = 2e-4
    weight_decay: Annotated[float, within(0, 10)] = 1e-4
    scaled: dict[Key, Factor] = Field(default_factory=lambda: {"backbone": 0.1})
    decay_norms: bool = True  # whether weight decay covers normalisation layers
    clip: Weight = 0.1  # norm of the gradient; 0: off
    batch_size: Count = 16  # images a step over all processes and accumulations
    accumulate: Count = 1  # passes a step
    ema: Portion = 0.0  # decay of the averaged weights; 0: off
    amp: bool = True  # bf16 on GPUs that have it


class ScheduleConfig(Config):
    """Learning rate over the run, in fractions of its steps, so that it fits any data set."""

    epochs: Count = 50
    warmup: Portion = 0.0
    shape: Literal["step", "cosine"] = "step"
    drops: Annotated[tuple[Fraction, ...], Ascending] = (0.8,)  # step: where the rate is multiplied by 0.1
    final: Share = 0.0  # cosine: last rate relative to the first
    eval_every: Count = 1  # epochs between two evaluations; the last epoch is always evaluated
    keep_every: CountOrNone = 0  # epochs between two weights files kept as epochs/NNNN; 0: none


class DataConfig(Config):
    """Image size and augmentation; `size`: short side, or (height, width)."""

    size: Size = 800
    max_side: Side | None = None  # of the long side where size is the short one; None: size * 1333 / 800
    exact_long: bool = False  # round a long side that meets its limit as transformers does, when not augmenting
    augment: Literal["detr", "fixed", "none"] = "detr"
    keep_aspect: bool = True
    hflip: Share = 0.5
    vflip: Share = 0.0
    jitter: Share | None = None  # strength of the colour jitter; None: the policy's own
    zoom: Zoom | None = None  # lowest and highest magnification; None: the policy's own
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
        """A copy with one or several `key.sub=value` assignments applied; values are read as YAML 1.2.

        Raises `UserError` for an unknown key, naming the nearest one, and for a value that does not fit.
        """
        data = self.model_dump()
        for text in [assignments] if isinstance(assignments, str) else assignments:
            key, separator, value = text.partition("=")
            if not separator:
                raise UserError(f"-o {text}: no value", "Write -o key.sub=value, for example -o optim.lr=1e-4.")
            try:
                parsed = read_value(value)
            except yaml.YAMLError:
                raise UserError(f"-o {text}: {value!r} is not YAML", "Quote it: -o 'data.size=[192, 256]'.") from None
            _set(data, type(self), key.strip().split("."), parsed, text)
        return self.checked(data)

    def with_schemes(self, names: str | Sequence[str]) -> Recipe:
        """A copy with more training schemes: `"cdn=50"`, or several; `"none"` takes away those before it."""
        chosen = self.schemes.model_dump()
        for text in (
            part.strip() for name in ([names] if isinstance(names, str) else names) for part in name.split(",")
        ):
            name, separator, value = text.partition("=")
            if name == "none" and not separator:
                chosen = dict.fromkeys(chosen)
                continue
            set_to = _dialled(text, name, value) if separator else {}
            if name not in chosen:
                raise _unknown_scheme(name, text)
            chosen[name] = (chosen[name] or {}) | set_to
            try:
                SchemesConfig.checked({name: chosen[name]})
            except UserError as error:
                raise UserError(f"--scheme {text}: schemes.{error.message}", _form(name)) from None
        return self.model_copy(update={"schemes": SchemesConfig.checked(chosen)})


def _dialled(text: str, name: str, value: str) -> dict[str, Any]:
    """What N in `--scheme NAME=N` sets: a number, or names with + between."""
    if name == "none":
        raise UserError(f"--scheme {text}: none takes no number", "Write --scheme none.")
    if name not in SchemesConfig.model_fields:
        raise _unknown_scheme(name, text)
    config = config_of(SchemesConfig.model_fields[name].annotation)
    dial: str = getattr(config, "dial", "")
    if not dial or config is None:
        raise UserError(f"--scheme {text}: {name} takes no number", f"Write --scheme {name}.")
    if name == "co":
        return {dial: tuple(part.strip() for part in value.split("+") if part.strip())}
    if not re.fullmatch(r"[-+]?\d{1,20}", value.strip()):
        raise UserError(f"--scheme {text}: {value!r} is not a whole number", _form(name))
    return {dial: int(value)}


def _form(name: str) -> str:
    """How a scheme's dial is written."""
    config = config_of(SchemesConfig.model_fields[name].annotation)
    dial = getattr(config, "dial", "")
    if name == "co":
        return f"Write --scheme co=atss+rcnn: heads joined with +, any of {', '.join(typing.get_args(Branch))}."
    return f"Write --scheme {name}=N; N sets schemes.{name}.{dial}." if dial else f"Write --scheme {name}."


def _unknown_scheme(name: str, text: str) -> UserError:
    if name in typing.get_args(Branch):
        return UserError(
            f"--scheme {text}: {name} is a head of the scheme co", f"Join heads with +: --scheme co=atss+{name}."
        )
    return unknown_name(name, [*SchemesConfig.model_fields, "none"], f"--scheme {text}")


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
        switch = inner is not None and isinstance(value, bool)  # a scheme, on or off
        data[name] = ({} if value else None) if switch else value
        return
    if data[name] is None:
        data[name] = {}
    if not isinstance(data[name], dict):
        raise UserError(f"-o {text}: {name} has no parts", f"Write -o {name}=value.")
    if inner is None:  # a mapping with free keys
        data[name][".".join(rest)] = value
        return
    _set(data[name], inner, rest, value, text)
