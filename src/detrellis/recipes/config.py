"""A recipe: everything that decides a run, as typed data that is stored with it.

Every field can be set from the command line (`-o optim.lr=1e-4`) or from Python; an unknown name is refused with the
nearest known one.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from detrellis.errors import UserError

Count = Annotated[int, Field(gt=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


class Config(BaseModel):
    """Frozen, and closed to unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def checked(cls, data: dict[str, Any]) -> Self:
        """From plain data; `UserError` for a value that does not fit, naming the field."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(p) for p in first["loc"])
            raise UserError(f"{place}: {first['msg'].lower()}, not {first['input']!r}") from None


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


class DetectorConfig(Config):
    """The network parts; see docs/architecture.md."""

    backbone: BackboneConfig = BackboneConfig()
    width: Count = 256
    heads: Count = 8
    levels: Count = 4
    points: Count = 4
    encoder: Literal["deformable", "dense"] = "deformable"  # dense: one level, projected without a norm (DETR)
    cross_attention: Literal["deformable", "dense", "conditional"] = "deformable"
    encoder_layers: Count = 6
    decoder_layers: Count = 6
    hidden: Count = 1024  # of the feed-forward blocks
    activation: Literal["relu", "prelu"] = "relu"  # of the feed-forward blocks
    dropout: Share = 0.1
    # learned: positions; anchors: boxes; proposals: boxes and contents from the encoder; mixed: boxes, learned contents
    queries: Literal["learned", "anchors", "proposals", "mixed"] = "learned"
    query_count: Count = 300
    content: Literal["zero", "shared", "learned"] = "learned"  # of learned and anchor queries; shared: one for all
    patterns: Annotated[int, Field(ge=0)] = 0  # contents that each anchor stands with (DAB-DETR); 0: off
    indicator: bool = False  # keep a content channel that tells denoising queries (DN-DETR)
    fixed_centres: bool = False  # anchors' centres are drawn uniformly and not trained
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


class DNConfig(Config):
    """Denoising (DN-DETR)."""

    dial: ClassVar[str] = "groups"
    groups: Count = 5
    total: Count | None = None  # as many groups as keep this many queries in the fullest image, instead of `groups`
    label_noise: Share = 0.2
    box_noise: Weight = 0.4
    padded_background: bool = False  # slots that an image does not fill learn "no object"
    sees: Literal["main", "all"] = "main"  # with groups: whether it reads the first group only


class CDNConfig(Config):
    """Contrastive denoising (DINO)."""

    dial: ClassVar[str] = "number"  # what N sets in --scheme cdn=N
    number: Count = 100
    label_noise: Share = 0.5
    box_noise: Weight = 1.0
    sees: Literal["main", "all"] = "main"


class HybridConfig(Config):
    """Hybrid matching (H-DETR)."""

    dial: ClassVar[str] = "k"
    k: Count = 6  # queries for each target in the extra block
    queries: Count | None = None  # of the extra block; None: five for each of the detector's, at most 1500
    weight: Weight = 1.0  # lambda
    divisor: Literal["copies", "boxes"] = "copies"


class AlignConfig(Config):
    """Many-to-one matching and the Align Loss (Align-DETR)."""

    dial: ClassVar[str] = "k"
    k: Count = 4  # candidates for each target
    k_encoder: Count | None = None  # among the encoder's proposals; None: k
    k_last: Count = 1  # in the last decoder layer
    alpha: Share = 0.25  # confidence against IoU in the quality
    tau: Positive = 1.5  # how slowly lower ranks fade
    gamma: Annotated[float, Field(ge=1)] = 2.0
    floor: Share = 0.01  # lowest quality that a target is computed from
    classification: Literal["align", "ia_bce", "base"] = "align"  # ia_bce: as released; base: loss.classification
    rank_boxes: bool = True
    iou_eps: Weight = 0.0  # 1e-6: as in the released code


class StableConfig(Config):
    """Position-supervised loss and position-modulated matching (Stable-DINO)."""

    supervised: bool = True
    modulated: bool = True
    classes: Weight = 6.0  # weight of the supervised loss; denoising keeps 1
    beta: Weight = 0.5  # how much the position counts in the matching


class GroupConfig(Config):
    """Groups of queries (Group DETR)."""

    dial: ClassVar[str] = "k"
    k: Count | None = None  # groups; None: 11, or 3 in two-stage detectors
    reduction: Literal["mean", "sum"] = "mean"  # of the groups' losses
    proposals: Literal["heads", "shared", "split"] = "heads"  # of two-stage detectors
    contents: Literal["fresh", "copied"] = "fresh"  # what the further groups' learned contents begin as
    distances: bool = False  # log how far apart the groups' queries are


class SchemesConfig(Config):
    """Training schemes; None: off."""

    dn: DNConfig | None = None
    cdn: CDNConfig | None = None
    hybrid: HybridConfig | None = None
    align: AlignConfig | None = None
    stable: StableConfig | None = None
    group: GroupConfig | None = None


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
            if separator and not value.isdecimal():
                raise UserError(
                    f"--scheme {text}: {value!r} is not a number", f"Write --scheme {name}=N; N sets {dial}."
                )
            chosen[name] = (chosen[name] or {}) | ({dial: int(value)} if separator else {})
        return self.model_copy(update={"schemes": SchemesConfig.checked(chosen)})


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
