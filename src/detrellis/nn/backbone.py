"""Backbones: torchvision ResNets as the papers use them,
and any timm model with `features_only`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from detrellis.errors import UserError
from detrellis.nn.frozen import FrozenNorm, freeze_timm
from detrellis.nn.pretrained import (
    Source,
    check_timm_name,
    fitted,
    matched,
    torchvision_weights,
    unreachable,
)

Norm = Literal["frozen", "frozen_norm", "batch"]
# How many stages, with the stem, training leaves as they are.
Frozen = int | Literal["all", "stem"]
PATCH = 4
# A pixel's channels side by side: a ResNet-50 is a tenth faster so, and the maps are tokens.
MEMORY = torch.channels_last
BLOCKS = {4: "layer1", 8: "layer2", 16: "layer3", 32: "layer4"}


class Backbone(nn.Module):
    """What backbones share: parts that training leaves as they are,
    for the whole run or until `hold(False)`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = False  # whether the frozen parts are held still
        self._frozen: tuple[nn.Module, ...] = ()
        self._resting: tuple[nn.Parameter, ...] = ()

    def _freeze(self, parts: Sequence[nn.Module], alone: Sequence[nn.Parameter] = ()) -> None:
        """Freeze these parts, and parameters of no part;
        what `norm` has frozen before is not let go with them.
        """
        self._frozen = tuple(parts)
        within = [p for part in parts for p in part.parameters()]
        self._resting = tuple(p for p in [*alone, *within] if p.requires_grad)
        self.hold(True)

    def hold(self, still: bool) -> None:
        """Hold the frozen parts still, without gradients and in eval mode, so that BatchNorm's
        statistics do not move either; or let them be trained."""
        self.held = still
        for parameter in self._resting:
            parameter.requires_grad_(not still)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all parts but those that are held still,
        which stay in evaluation mode.
        """
        super().train(mode)
        for part in (
            (inner for frozen in self._frozen for inner in frozen.modules()) if self.held else ()
        ):
            part.training = False
        return self


class ResNet(Backbone):
    """A torchvision ResNet that returns the maps of the wanted strides.

    `norm="frozen"` fixes statistics and affine of every BatchNorm and freezes the stem and the
    first stage, as all papers do with ImageNet weights; `"frozen_norm"` freezes the norms and
    nothing else (Mask2Former). Without `pretrained` weights nothing may be frozen: `norm="batch"`
    trains all. `dilation` (DC5) keeps the last stage at stride 16 and doubles its dilation instead.
    `frozen` stages and the stem are not trained, with whatever norm.
    """

    def __init__(
        self,
        name: str,
        strides: Sequence[int],
        *,
        pretrained: Source | None,
        norm: Norm,
        dilation: bool = False,
        frozen: Frozen = 0,
    ) -> None:
        super().__init__()
        layer = nn.BatchNorm2d if norm == "batch" else FrozenNorm
        options = {"replace_stride_with_dilation": [False, False, True]} if dilation else {}
        make = partial(
            torchvision.models.get_model, name, weights=None, norm_layer=layer, **options
        )
        model = make()
        model.fc = nn.Identity()
        if pretrained is not None:
            weights = _downloaded(name) if pretrained.file is None else pretrained.read()
            fill(model, weights, pretrained, name, make)
        self.stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
        self.wanted, self.stages = wanted_stages(model, name, strides)
        self.channels = [_channels(self.stages[w]) for w in self.wanted]
        if norm == "frozen":
            for part in (self.stem, self.stages["layer1"]):
                part.requires_grad_(False)
        if frozen:
            self._freeze([self.stem, *first_stages(list(self.stages.values()), frozen, name)])
        self.to(memory_format=MEMORY)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Feature maps `(B, C, h, w)` of `pixels (B, 3, H, W)`, finest first."""
        return stage_maps(self.stem, self.stages, self.wanted, pixels)


def wanted_stages(
    body: nn.Module, name: str, strides: Sequence[int]
) -> tuple[list[str], nn.ModuleDict]:
    """The stages of a ResNet whose maps have the `strides`,
    and all up to the last of them, by name. `UserError` where there is no such map."""
    wanted = [BLOCKS[s] for s in known_strides(name, strides, list(BLOCKS))]
    names = list(BLOCKS.values())
    kept = names[: 1 + max(map(names.index, wanted))]
    return wanted, nn.ModuleDict({stage: body.get_submodule(stage) for stage in kept})


def stage_maps(
    stem: nn.Module, stages: nn.ModuleDict, wanted: Sequence[str], pixels: Tensor
) -> list[Tensor]:
    """What the `wanted` stages make of `pixels (B, 3, H, W)`: maps `(B, C, h, w)`, finest first."""
    x, maps = stem(pixels.contiguous(memory_format=MEMORY)), []
    for name, stage in stages.items():
        x = stage(x)
        if name in wanted:
            maps.append(x)
    return maps


def fill(
    model: nn.Module,
    weights: dict[str, Tensor],
    source: Source,
    name: str,
    whole: Callable[[], nn.Module],
) -> None:
    """Load the `weights` that `source` gave;
    `whole` makes the network that `model` is a part of. `UserError` for a misfit."""

    def state() -> dict[str, Tensor]:
        with torch.device("meta"):  # names and shapes are all that is needed of it
            return whole().state_dict()

    try:
        model.load_state_dict(fitted(weights, model.state_dict(), state))
    except ValueError as error:
        raise UserError(
            f"{source.file}: its weights do not fit backbone {name}: {error}",
            "Name weights of this backbone, or the backbone of these weights: -o "
            "detector.backbone.name=NAME.",
        ) from None


def fill_by_name(
    model: nn.Module, weights: Mapping[str, Tensor], source: Source, network: str, remedy: str
) -> None:
    """Load the `weights` that `source` gave, in the names of `model`, which may have more than it
    needs. `UserError` for a misfit, which calls the model `network`."""
    try:
        model.load_state_dict(matched(weights, model.state_dict()))
    except ValueError as error:
        raise UserError(
            f"{source.about}: its weights do not fit {network}: {error}", remedy
        ) from None


def _downloaded(name: str) -> dict[str, Tensor]:
    """The weights of a torchvision ResNet from its host."""
    try:
        weights: dict[str, Tensor] = torchvision_weights(name).get_state_dict(check_hash=True)
    except (OSError, RuntimeError) as error:  # no answer, or not the file that was expected
        raise unreachable(name, error) from None
    return weights


def fetched(
    name: str, source: Source, create: Callable[..., Any] | None = None, **options: Any
) -> Any:
    """A timm model with the weights that timm fetches, or has fetched:
    its maps alone, or what `create` makes.
    """
    before = {} if source.file is None else {"pretrained_cfg_overlay": {"file": str(source.file)}}
    try:
        return (create or _create)(name, pretrained=True, **before, **options)
    except (OSError, RuntimeError) as error:
        raise unreachable(name, error) from None


def published(name: str | None, source: Source) -> dict[str, Tensor]:
    """The weights of a whole network, without its classifier:
    of the source's file, or of timm's model `name`.
    """
    import timm

    if not (source.fetched and name):
        return source.read()
    state: dict[str, Tensor] = fetched(name, source, timm.create_model, num_classes=0).state_dict()
    return state


def known_strides(name: str, strides: Sequence[int], available: Sequence[int]) -> Sequence[int]:
    """The wanted `strides`; `UserError` where the backbone has no map of one of them."""
    if missing := [s for s in strides if s not in available]:
        raise UserError(
            f"backbone {name} has no map of stride {missing[0]}",
            f"It has {', '.join(map(str, available))}: -o "
            f"'detector.backbone.strides={list(available)[-3:]}'.",
        )
    return strides


def _channels(stage: nn.Module) -> int:
    convolutions = [m for m in stage.modules() if isinstance(m, nn.Conv2d)]
    return max(c.out_channels for c in convolutions)


def first_stages(stages: Sequence[nn.Module], count: Frozen, name: str) -> Sequence[nn.Module]:
    """The first `count` stages, of the stem alone none; `UserError` where there are fewer."""
    if count == "stem":
        return []
    if count != "all" and count > len(stages):
        raise UserError(
            f"detector.backbone.frozen={count}: backbone {name} has {len(stages)} stages here",
            "Freeze fewer, or -o detector.backbone.frozen=all.",
        )
    return stages if count == "all" else stages[:count]


class TimmBackbone(Backbone):
    """Any timm model by name, reduced to the maps of the wanted strides.

    `drop_path`: rate of dropped residual branches while training (stochastic depth). A Swin
    Transformer's maps get a LayerNorm each, as all papers on them have it. `frozen`: stages are
    what ends with a map of stride 4 or more.
    """

    def __init__(
        self,
        name: str,
        strides: Sequence[int],
        *,
        pretrained: Source | None,
        norm: Norm,
        drop_path: float = 0.0,
        frozen: Frozen = 0,
    ) -> None:
        super().__init__()
        import timm  # only here: its import takes a second that no torchvision backbone needs

        check_timm_name(name)
        info: Any = _create(name, pretrained=False).feature_info
        reductions = info.reduction()
        if len(set(reductions)) == 1 and not set(strides) <= set(reductions):
            raise UserError(
                f"backbone {name} is a plain ViT with maps of one stride, {reductions[0]}",
                "A pyramid makes more: -o detector.backbone.kind=timm_vit -o "
                f"detector.backbone.name={name}.",
            )
        indices = tuple(reductions.index(s) for s in known_strides(name, strides, reductions))
        # Not every model knows the option
        rate: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        model: Any = _create(name, pretrained=False, out_indices=indices, **rate)
        if pretrained is not None and pretrained.fetched:
            model = fetched(name, pretrained, out_indices=indices, **rate)
        elif pretrained is not None:
            fill(model, pretrained.read(), pretrained, name, partial(timm.create_model, name))
        for part in model.modules():
            # Timm's Swin drops a tenth unless told otherwise
            if not rate and hasattr(part, "drop_prob"):
                part.drop_prob = 0.0
        self.channels_last = str(getattr(model, "output_fmt", "NCHW")) in ("NHWC", "Format.NHWC")
        self.channels: list[int] = list(model.feature_info.channels())
        self.model = model if norm == "batch" else freeze_timm(model)
        swin = self.channels_last and name.startswith("swin")
        if swin:
            from detrellis.nn.swin import pad_before_shifting

            pad_before_shifting(model)
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.channels) if swin else None
        if frozen == "all":
            self._freeze([self])
        elif frozen:
            self._freeze(
                _until(
                    self.model,
                    [i["module"] for i in info.info if i["reduction"] >= 4],
                    frozen,
                    name,
                )
            )
        self.to(memory_format=MEMORY)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Feature maps `(B, C, h, w)` of `pixels (B, 3, H, W)`, finest first."""
        # Models that cut the image into patches refuse a size that is no multiple of them.
        height, width = pixels.shape[-2:]
        pixels = F.pad(pixels, (0, -width % PATCH, 0, -height % PATCH)).contiguous(
            memory_format=MEMORY
        )
        maps: list[Tensor] = self.model(pixels)
        if self.norms is not None:
            maps = [norm(m) for norm, m in zip(self.norms, maps, strict=True)]
        return [m.permute(0, 3, 1, 2).contiguous() for m in maps] if self.channels_last else maps


def _until(
    model: nn.Module, ends: Sequence[str], count: int | Literal["stem"], name: str
) -> list[nn.Module]:
    """The parts of a timm model up to the end of its stem, or of stage `count`;
    `ends` names each stage's last part.
    """
    in_order = isinstance(model, nn.ModuleDict)  # its parts have names without dots
    parts = dict(model.named_children()) if in_order else _in_sequence(model)
    ends = [end.replace(".", "_") if in_order else end for end in ends]
    ends = [end for end in ends if end in parts]
    if not ends:
        raise UserError(
            f"detrellis does not know the stages of backbone {name}",
            "Freeze it whole: -o detector.backbone.frozen=all.",
        )
    first_stages([parts[end] for end in ends], count, name)
    names = list(parts)
    if count == "stem":
        of_stages = next(
            i for i, part in enumerate(names) if part == ends[0] or part.startswith("blocks.")
        )
        return [parts[part] for part in names[:of_stages]]
    return [parts[part] for part in names[: names.index(ends[count - 1]) + 1]]


def _in_sequence(model: nn.Module) -> dict[str, nn.Module]:
    """A stem and then `blocks`, one after the other,
    as EfficientNets and MobileNets are built; nothing of others.
    """
    parts = dict(model.named_children())
    if not isinstance(parts.get("blocks"), nn.Sequential):
        return {}
    stem = {name: part for name, part in parts.items() if name != "blocks"}
    return stem | {f"blocks.{name}": block for name, block in parts["blocks"].named_children()}


def _create(name: str, **options: Any) -> Any:
    """The timm model; one with windows is otherwise built for a single image size.

    A Swin's windows are shifted in every stage, as all papers on it have them: timm leaves out the
    shift where a window covers the whole map of the size that it was trained at.
    """
    import timm

    options |= {"always_partition": True} if name.startswith("swin") else {}
    with contextlib.suppress(TypeError):  # most models know no such option
        return timm.create_model(name, features_only=True, strict_img_size=False, **options)
    return timm.create_model(name, features_only=True, **options)
