"""`--auto-batch`: the worst step, how many images of it fit, and the recipe that comes of it."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
from rich.console import Console

import detrellis
from detrellis.data.batch import Collate
from detrellis.data.doctor.check import prepare
from detrellis.data.layout import find_data
from detrellis.distributed import World, process_group
from detrellis.engine import auto_batch, trial
from detrellis.engine.auto_batch import (
    MAX_IMAGES,
    WorstStep,
    images_that_fit,
    with_auto_batch,
    worst_step,
)
from detrellis.engine.checkpoint import load_state
from detrellis.engine.samples import training_dataset
from detrellis.errors import UserError

from ..small import CLASSES, SMALL, small
from .test_distributed import environment, in_processes

ALONE = World(0, 1, torch.device("cpu"))
WORST = WorstStep(64, 64, 6)
GB = 1 << 30
FOUR = "optim.batch_size=4"


def fitting(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """So many images fit."""
    monkeypatch.setattr(auto_batch, "images_that_fit", lambda *_: count)


@pytest.mark.parametrize("limit", range(12))
def test_the_largest_that_fits(limit: int) -> None:
    tried: list[int] = []
    assert trial.largest(lambda n: tried.append(n) or n <= limit, 9) == min(limit, 9)  # type: ignore[func-returns-value]
    assert len(tried) == len(set(tried)) <= 7


def test_a_gpu_is_tried_until_it_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []

    def step(count: int) -> None:
        if count > 21:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (40 * GB, 80 * GB))
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, _: shares.append(share)
    )
    assert trial.fitting_on_gpu(step, torch.device("cuda:0")) == 21
    assert shares == [pytest.approx(0.4)]


@pytest.mark.parametrize(
    ("room", "fit"), [(2.9, 0), (3.2, 1), (5.1, 1), (5.3, 2), (9.5, 4), (1000, MAX_IMAGES)]
)
def test_a_cpu_s_room_is_shared_by_what_each_image_takes(room: float, fit: int) -> None:
    """1 GB for weights, 2 for each image, and 0.1 in the loader."""
    steps: list[int] = []
    found = trial.fitting_on_cpu(
        steps.append, room * GB, GB // 10, lambda: (1 + 2 * max(steps)) * GB
    )
    assert found == fit
    assert max(steps) == (2 if fit else 1)


def test_memory_that_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The machine's, or a container's: pages of files that it may drop are free."""
    monkeypatch.setattr(trial, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(trial, "CGROUP", tmp_path)
    with pytest.raises(UserError, match="does not say how much memory is left"):
        trial.available()
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:    5000 kB\n")
    assert trial.available() == 5000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 500000\n")
    assert trial.available() == 5000 * 1024
    (tmp_path / "memory.max").write_text("4000000\n")
    assert trial.available() == 1_500_000


MIXED = ["data.augment=small", "data.mosaic=1", "data.mixup=1", "data.multi_scale=[0.5, 1.5]"]


@pytest.mark.parametrize(
    ("settings", "worst"),
    [
        (["data.augment=none"], (96, 96)),
        (["data.augment=fixed"], (96, 96)),
        (MIXED, (128, 128)),
        (["data.augment=detr", "data.size=96"], None),
        (["data.augment=lsj"], (96, 96)),
    ],
    ids=["none", "fixed", "mixed", "detr", "lsj"],
)
def test_no_batch_is_larger_than_the_worst(
    shapes: Path, settings: list[str], worst: tuple[int, int] | None
) -> None:
    training, *_ = prepare(find_data(shapes))
    recipe = small("tiny").override(["data.size=[96, 96]", "data.zoom=null", *settings])
    most = worst_step(training, recipe)
    assert worst in (None, most[:2])
    dataset, sizes, boxes = training_dataset(training, recipe, seed=0), [], []
    for epoch in range(6):
        batch = Collate(dataset.augmentation.pad_to)(
            dataset.__getitems__([(epoch, i) for i in range(len(dataset))])
        )
        sizes.append(tuple(batch.images.pixels.shape[2:]))  # type: ignore[union-attr]
        boxes.append(max(batch.targets.sizes))  # type: ignore[union-attr]
    assert max(height for height, _ in sizes) <= most.height
    assert max(width for _, width in sizes) <= most.width
    assert max(boxes) <= most.boxes
    assert most.boxes == max(training.starts[1:] - training.starts[:-1]) * (
        8 if settings == MIXED else 1
    )


@pytest.mark.parametrize(("fit", "passes"), [(1, 12), (2, 6), (5, 3), (11, 2), (12, 1), (256, 1)])
def test_the_step_keeps_its_images_and_its_rate(
    shapes: Path, fit: int, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitting(monkeypatch, fit)
    training, *_ = prepare(find_data(shapes))
    recipe = small("tiny").override("optim.batch_size=12")
    chosen, told = with_auto_batch(recipe, training, ALONE, workers=0)
    assert chosen == recipe.override(f"optim.accumulate={passes}")
    assert f"12 images in {passes} pass{'' if passes == 1 else 'es'} of {12 // passes} " in told
    assert f"the learning rate stays {recipe.optim.lr:g}" in told


def test_what_cannot_be_fitted_is_refused(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitting(monkeypatch, 0)
    training, *_ = prepare(find_data(shapes))
    with pytest.raises(UserError, match=r"one image of .* does not fit into the memory of cpu"):
        with_auto_batch(small("tiny"), training, ALONE, workers=0)
    two = World(0, 2, torch.device("cpu"))
    with pytest.raises(UserError, match="fully_shard"):
        with_auto_batch(small("tiny").override("optim.fully_shard=true"), training, two, workers=0)
    with pytest.raises(UserError, match=r"--auto-batch and -o optim\.accumulate=2"):
        detrellis.train(
            "tiny", data=shapes, auto_batch=True, override=["optim.lr=1e-3", "optim.accumulate=2"]
        )


def test_the_run_s_recipe_holds_what_was_found(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said before training starts, and who resumes the run tries nothing."""
    fitting(monkeypatch, 3)
    console = Console(file=io.StringIO(), width=400)
    settings = [*SMALL, "data.size=[64, 64]", FOUR]
    out = tmp_path / "run"
    options: dict[str, object] = {"workers": 0, "device": "cpu", "console": console}
    detrellis.train(
        "tiny", data=shapes, out=out, override=settings, epochs=1, auto_batch=True, **options
    )  # type: ignore[arg-type]
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "3 images of 64x64 pixels" in said
    assert "(optim.accumulate=2)" in said
    monkeypatch.setattr(auto_batch, "images_that_fit", None)
    assert detrellis.resume(out, epochs=2, workers=0, device="cpu").finished
    recipe = detrellis.load(out).recipe
    assert (recipe.optim.batch_size, recipe.optim.accumulate) == (4, 2)
    assert load_state(out)["step"] == 6  # 11 images


def test_a_real_step_is_tried() -> None:
    assert (
        1 < images_that_fit(small("tiny", ("cdn",)), CLASSES, WORST, ALONE, workers=1) <= MAX_IMAGES
    )


def test_a_step_that_fails_otherwise_says_so() -> None:
    nowhere = World(0, 1, torch.device("cuda:99"))
    with pytest.raises(UserError, match="--auto-batch: the step that was tried failed: "):
        images_that_fit(small("tiny"), CLASSES, WORST, nowhere, workers=0)


def in_each(rank: int, size: int, port: int, data: str) -> None:
    """In each process: the first one alone tries."""
    os.environ |= environment(rank, size, port)
    with process_group("cpu") as own, pytest.MonkeyPatch.context() as patch:
        patch.setattr(auto_batch, "images_that_fit", [lambda *_: 3, None][rank])
        training, *_ = prepare(find_data(data))
        chosen, told = with_auto_batch(
            small("tiny").override("optim.batch_size=8"), training, own, workers=0
        )
    assert chosen.optim.accumulate == 2
    assert "2 passes of 2 in each of 2 processes" in told


def test_all_processes_take_what_fits_the_first(shapes: Path) -> None:
    in_processes(in_each, str(shapes))
