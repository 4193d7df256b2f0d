"""Every verb with every recipe:
what a recipe costs at full size, and all the rest at a size for a test.

Recipes that come to the same network, schemes and losses at that size share one case. What a verb
does is tested elsewhere; here, that no recipe breaks it: it succeeds, or refuses where a recipe has
not what the verb needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detrellis.data.shapes import write_shapes
from detrellis.engine.log import RunLog
from detrellis.errors import UserError
from detrellis.interop.huggingface import config_of
from detrellis.recipes import RECIPES, Recipe, find_recipe, tiny_sized

from .small import SMALL_EVA, SMALL_VIT, distinct
from .test_cli import call

SIZE = (64, 64)
SMALLEST = [
    "detector.backbone.name=test_resnet",
    "detector.width=64",
    "detector.encoder.layers=1",
    "detector.encoder.heads=4",
    "detector.encoder.hidden=32",
    "detector.decoder.layers=2",
    "detector.decoder.heads=4",
    "detector.decoder.hidden=32",
    "detector.queries.count=8",
    "detector.top_k=10",
    "data.size=[64, 64]",
    # ImageNet's: with the mean and std of timm's test network, a head sees nothing after two steps,
    # and conflicts between heads cannot be analysed.
    "data.mean=[0.485, 0.456, 0.406]",
    "data.std=[0.229, 0.224, 0.225]",
    "optim.batch_size=2",
    "schedule.keep_every=1",
]
NAMES = list(RECIPES)


def overrides(recipe: Recipe) -> list[str]:
    """What makes a recipe small, besides `--scale tiny`; of groups, two, and of noised queries so
    few that no kernel is compiled for them.
    """
    changes = SMALLEST
    if recipe.detector.encoder.kind == "projector":  # a plain ViT, and no encoder
        elsewhere = [
            text
            for text in SMALLEST
            if not text.startswith(("detector.backbone.", "detector.encoder."))
        ]
        changes = [*SMALL_VIT, *elsewhere]
    elif recipe.detector.backbone.kind == "eva02":
        changes = [
            *SMALL_EVA,
            *(text for text in SMALLEST if not text.startswith("detector.backbone.")),
        ]
    if recipe.detector.encoder.kind == "hybrid":
        changes = [*changes, "detector.encoder.blocks=1"]
    schemes = recipe.schemes
    groups = [] if schemes.group is None else ["schemes.group.k=2"]
    return [*changes, *groups, *([] if schemes.cdn is None else ["schemes.cdn.number=20"])]


def as_trained(name: str) -> Recipe:
    """What the options below make of the recipe."""
    recipe = find_recipe(name)
    return (recipe if name == "tiny" else tiny_sized(recipe)).override(overrides(recipe))


def options(name: str) -> list[str]:
    scale = [] if name == "tiny" else ["--scale", "tiny"]
    return scale + [word for text in overrides(find_recipe(name)) for word in ("-o", text)]


TRAINED = distinct({name: as_trained(name) for name in NAMES})
NETWORKS = distinct({name: as_trained(name) for name in NAMES}, ["detector"])  # all that is saved


# Layers are alike: one of the encoder and two of the decoder are counted as all of them are, in a
# quarter of the time.
def fewer(name: str) -> list[str]:
    encoder = (
        []
        if find_recipe(name).detector.encoder.kind == "projector"
        else ["detector.encoder.layers=1"]
    )
    return [*encoder, "detector.decoder.layers=2"]


FULL = distinct(
    {name: find_recipe(name).override(fewer(name)) for name in NAMES},
    ["detector", "schemes", "data"],
)
Call = Callable[..., str]


@pytest.fixture
def detrellis(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """The command line, in this process.
    Figures are made but not drawn, which takes longer than all the rest.
    """
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)

    def run(*arguments: object, code: int = 0) -> str:
        capsys.readouterr()  # what an interruption has left
        return call(*arguments, capsys=capsys, code=code)

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures to train on and one to evaluate on."""
    return write_shapes(
        tmp_path_factory.mktemp("verbs") / "data", train=2, val=1, size=SIZE, masks=True
    )


@pytest.fixture(scope="module")
def runs(data: Path) -> dict[str, Path]:
    """Those trained so far."""
    return {}


@pytest.fixture
def trained(runs: dict[str, Path], data: Path, detrellis: Call) -> Callable[[str], Path]:
    """Of a recipe's name, a run of two epochs of a step each,
    that was broken off in the second and resumed.
    """

    def train(name: str) -> Path:
        if name not in runs:
            out = data.parent / name
            begun = ("train", name, "--data", data, "--out", out, "--epochs", 2, "--workers", 0)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(RunLog, "step", interrupted(RunLog.step))
                detrellis(*begun, *options(name), code=130)
            found = json.loads(detrellis("train", "--resume", out, "--workers", 0, "--json"))
            assert (found["finished"], found["steps"]) == (True, 2)
            runs[name] = out
        return runs[name]

    return train


def interrupted(log_step: Callable[..., None]) -> Callable[..., None]:
    """Logs the first step, and does not survive the second."""

    def step(self: RunLog, number: int, *arguments: Any, **more: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt
        log_step(self, number, *arguments, **more)

    return step


@pytest.mark.parametrize("name", FULL)
def test_info_at_full_size(name: str, detrellis: Call) -> None:
    found = json.loads(
        detrellis("info", name, "--json", *(word for text in fewer(name) for word in ("-o", text)))
    )
    assert found["parameters"] > 1e6
    assert found["gflops"] > 0.5


@pytest.mark.parametrize("name", TRAINED)
def test_train_and_resume(name: str, trained: Callable[[str], Path]) -> None:
    assert (trained(name) / "last.safetensors").exists()


@pytest.mark.parametrize("name", TRAINED)
def test_bench(name: str, detrellis: Call) -> None:
    how = ("--size", "64x64", "--runs", 1, "--json", *options(name))
    # Where nothing trains, detectors alone differ
    modes = [[], ["--train"]] if name in NETWORKS else [["--train"]]
    for more in modes:
        assert json.loads(detrellis("bench", name, *how, *more))["timings"]


@pytest.mark.parametrize("name", NETWORKS)
def test_eval_predict_and_convert(
    name: str, trained: Callable[[str], Path], data: Path, tmp_path: Path, detrellis: Call
) -> None:
    run = trained(name)
    assert json.loads(detrellis("eval", run, "--workers", 0, "--json"))["images"] == 1
    shown = ("--out", tmp_path / "pictures", "--threshold", 0, "--json")
    assert len(json.loads(detrellis("predict", run, data / "images" / "val", *shown))) in (8, 10)
    detrellis(
        "convert",
        run,
        tmp_path / "theirs",
        code=0 if exists_in_transformers(as_trained(name)) else 2,
    )


def exists_in_transformers(recipe: Recipe) -> bool:
    try:
        config_of(recipe, {0: "class"})
    except UserError:
        return False
    return True


ANYTHING = ["misalignment", "one-to-many", "discriminability", "instability", "attention"]
OF_GROUPS = ["groups"]
OF_BRANCHES = ["branches", "conflicts", "query-distance"]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("what", ANYTHING)
def test_analyze_detectors(
    name: str, what: str, trained: Callable[[str], Path], tmp_path: Path, detrellis: Call
) -> None:
    boxless = (
        what in ("misalignment", "instability", "attention") and not as_trained(name).detector.boxes
    )
    analyze(what, trained(name), tmp_path, detrellis, code=2 if boxless else 0)


@pytest.mark.parametrize("name", TRAINED)
def test_analyze_schemes(
    name: str, trained: Callable[[str], Path], tmp_path: Path, detrellis: Call
) -> None:
    schemes = as_trained(name).schemes
    for whats, scheme in ((OF_GROUPS, schemes.group), (OF_BRANCHES, schemes.co)):
        for what in whats:
            analyze(
                what, trained(name), tmp_path / what, detrellis, code=2 if scheme is None else 0
            )


def analyze(what: str, run: Path, out: Path, detrellis: Call, code: int = 0) -> None:
    """The analysis, of which a `code` of 2 says that it has to be refused."""
    loading = [] if what == "attention" else ["--workers", 0]
    detrellis("analyze", what, run, "--out", out, *loading, code=code)
    if code == 0:
        assert len(list(out.glob("*.json"))) == 1
