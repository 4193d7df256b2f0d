"""The commands of the pages, executed in their order: as they stand, on small data and networks.

What a reader brings (`my_data`, `RUN`, `photo.jpg`) is made; recipes are shrunk, and runs are an
epoch long. `tests/website/test_commands.py` reads all commands, of every page, each time.
"""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from website.commands import blocks, calls

from detrellis import recipes
from detrellis.cli import main
from detrellis.data.shapes import write_shapes
from detrellis.recipes import Recipe, find_recipe
from detrellis.study import rows
from tests.small import shrink

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *(
        page
        for page in sorted((ROOT / "docs").glob("*.md"))
        if page.stem != "tutorial" and blocks(page)  # which has a test of its own
    ),
]
# What needs a network, a checkpoint of others or a terminal, or is executed elsewhere.
ELSEWHERE = {
    "hf:": "tests/hub, tests/interop",
    "push": "tests/hub",
    "my_data/a.json": "tests/data/test_layout.py",
    ".pth": "tests/interop",
    "serve": "tests/serving",
    "reproduce align": "tests/study/test_verbs.py",
    "runs/objects365": "tests/recipes/test_large.py",
    "objects365 --skip-bad": "tests/data/formats/test_objects365.py",
    "mask": "tests/test_masks.py, tests/engine/test_mask_eval.py",
    "--tta-views": "tests/engine/test_views.py",  # short sides of 640 and more
    "--launcher": "tests/study/test_launch.py",
}
DATA = ("my_data", "my_other_data", "coco", "lvis", "DATA", "VOC")
# Runs that docs/analysis.md compares and does not train
RUNS = ("runs/baseline", "runs/align", "runs/co", "runs/detr", "runs/conditional", "runs/sam")
SHORTER = {
    "train": ["--epochs", "1", "--workers", "0"],
    "compare": ["--epochs", "1", "--seeds", "1", "--workers", "0"],
    "tune": ["--epochs", "1", "--trials", "2", "--workers", "0"],
    "export": ["--size", "64x64"],
}


def shrunk(name: str) -> Recipe:
    """The recipe of that name, small enough to be trained in seconds."""
    recipe = shrink(find_recipe(name))
    size = "64" if isinstance(recipe.data.size, int) else "[64, 64]"
    sizes = [f"data.size={size}", "data.max_side=null", "data.sides=null", "data.sides_max=null"]
    short = ["data.multi_scale=null", "optim.batch_size=4", "schedule.warmup_steps=0"]
    return recipe.override([*sizes, *short])


@pytest.fixture(scope="module")
def brought(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages take for granted: data sets, pictures, a video and a run."""
    folder = tmp_path_factory.mktemp("brought")
    data = write_shapes(folder / "my_data", train=11, val=5, size=(64, 64))
    labels = data / "annotations"
    shutil.copy(labels / "instances_val.json", labels / "instances_test.json")
    shutil.copytree(data / "images" / "val", data / "images" / "test")
    for name in DATA[1:]:
        shutil.copytree(data, folder / name)
    for name, split in (("a/labels.json", "train"), ("c/labels.json", "val")):
        (folder / name).parent.mkdir()
        shutil.copy(labels / f"instances_{split}.json", folder / name)
    shutil.copytree(data / "images" / "train", folder / "b" / "pictures")
    shutil.copytree(data / "images" / "val", folder / "d" / "pictures")
    pixels = np.random.default_rng(0).integers(0, 255, (900, 1300, 3), dtype=np.uint8)
    for name in ("photo.jpg", "picture.jpg", "folder/1.png", "more/2.png", "aerial.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        side = 900 if name == "aerial.jpg" else 64
        Image.fromarray(pixels[:side, :side]).save(folder / name)
    film = importlib.import_module("tests.predictions.test_video").film
    film(folder / "clip.mp4")
    return folder


def elsewhere(words: list[str]) -> bool:
    text = " ".join(words)
    return words[0] != "detrellis" or any(part in text for part in ELSEWHERE)


@pytest.mark.filterwarnings("ignore::detrellis.errors.Advice")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page(
    page: Path, brought: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = shutil.copytree(brought, tmp_path / "here")
    monkeypatch.chdir(here)
    for module in (recipes, rows):
        monkeypatch.setattr(module, "find_recipe", shrunk)
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = ["detrellis", "train", "small", "--data", "my_data", "--out", "RUN"]
    execute(first, monkeypatch)
    text = page.read_text()
    for run in ("runs/first", *RUNS):
        if run in text and not re.search(rf"--out {run}(?![\w-])", text):
            shutil.copytree("RUN", run)
    for words in calls("\n".join(blocks(page))):
        if not elsewhere(words):
            execute(words, monkeypatch)


def execute(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = [place for word in words for place in expanded(word)]
    monkeypatch.setattr(sys, "argv", [*words, *SHORTER.get(words[1], [])])
    if "--resume" in words:
        monkeypatch.setattr(sys, "argv", words)
    if "schedule.keep_every=1" in words:  # to be compared epoch by epoch
        monkeypatch.setattr(sys, "argv", [*sys.argv, "--epochs", "2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code, " ".join(sys.argv)


def expanded(word: str) -> list[str]:
    """As a shell would, with the files that are there when the command is called."""
    return sorted(str(place) for place in Path().glob(word)) if "*" in word else [word]
