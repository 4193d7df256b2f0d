from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from detrellis.engine.guard import FlatLossWatch, NonFiniteLoss, check_finite
from detrellis.errors import UserError
from detrellis.types import ImageBatch, Targets


def batch() -> dict[str, object]:
    images = ImageBatch(torch.arange(24.0).reshape(2, 3, 2, 2), None)
    targets = Targets(torch.tensor([1, 0]), torch.rand(2, 4), (2, 0))
    return {"images": images, "targets": targets, "paths": [Path("a.jpg")]}


def check(losses: dict[str, float], folder: Path, total: float | None = None) -> float:
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in losses.items()}
    whole = sum(tensors.values(), torch.zeros(())) if total is None else torch.tensor(total)
    return check_finite(
        tensors, whole, 17, [101, 7], batch(), folder / "deep" / "batch.pt", "go on so"
    )


def test_a_finite_loss_passes_and_is_returned(tmp_path: Path) -> None:
    assert check({"class": 1.5, "box": 2.0}, tmp_path) == 3.5
    assert list(tmp_path.iterdir()) == []


def test_a_finite_loss_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    original = torch.Tensor.__float__
    monkeypatch.setattr(
        torch.Tensor, "__float__", lambda self: (reads.append(1), original(self))[1]
    )
    check({f"term {i}": 1.0 for i in range(50)}, tmp_path)
    assert len(reads) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_error_names_term_step_and_images(tmp_path: Path, bad: float) -> None:
    with pytest.raises(NonFiniteLoss) as caught:
        check({"main/class/5": 1.0, "main/giou/3": bad, "dn/box/2": bad}, tmp_path)
    text = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert "step 17" in text
    assert f"main/giou/3 = {bad}, dn/box/2 = {bad}" in text
    assert "main/class/5" not in text
    assert "101, 7" in text
    assert str(tmp_path / "deep" / "batch.pt") in text
    assert caught.value.remedy.endswith("\n  go on so")


def test_the_batch_is_saved_for_weights_only_loading(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(NonFiniteLoss):
        check({"a": 1.0, "b": math.nan}, tmp_path)
    saved = torch.load(tmp_path / "deep" / "batch.pt", weights_only=True)
    assert (saved["step"], saved["image_ids"]) == (17, [101, 7])
    assert saved["losses"]["a"] == 1.0
    assert math.isnan(saved["losses"]["b"])
    assert torch.equal(saved["batch"]["images"]["pixels"], torch.arange(24.0).reshape(2, 3, 2, 2))
    assert saved["batch"]["images"]["padding"] is None
    assert torch.equal(saved["batch"]["targets"]["labels"], torch.tensor([1, 0]))
    assert saved["batch"]["targets"]["sizes"] == [2, 0]


def test_a_view_is_saved_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    view = torch.zeros(1_000_000)[:3]
    with pytest.raises(NonFiniteLoss):
        check_finite({}, torch.tensor(math.nan), 1, [1], [view], tmp_path / "b.pt")
    assert (tmp_path / "b.pt").stat().st_size < 10_000


def test_a_sum_that_overflows_is_said_to(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteLoss, match="every term is finite, but their sum is inf"):
        check({"a": 3e38, "b": 3e38}, tmp_path)


def test_a_full_disk_does_not_hide_the_loss(tmp_path: Path) -> None:
    (tmp_path / "deep").write_text("a file where the folder should be")
    with pytest.raises(NonFiniteLoss, match=r"a = nan(.|\n)*could not be saved"):
        check({"a": math.nan}, tmp_path)


def test_many_terms_and_images_are_cut_short(tmp_path: Path) -> None:
    losses = {f"term{i}": torch.tensor(math.nan) for i in range(80)}
    with pytest.raises(NonFiniteLoss, match="and 74 more") as caught:
        check_finite(losses, torch.tensor(math.nan), 1, range(100), [], tmp_path / "b.pt")
    assert "and 68 more" in str(caught.value)
    assert len(str(caught.value)) < 1500


def run(
    watch: FlatLossWatch,
    losses: np.ndarray,
    ious: np.ndarray | None = None,
    every: int = 1,
    start: int = 1,
) -> list[tuple[int, str]]:
    warnings = []
    for i in range(0, len(losses), every):
        text = watch.update(start + i, float(losses[i]), None if ious is None else float(ious[i]))
        if text is not None:
            warnings.append((start + i, text))
    return warnings


def noisy(
    rng: np.random.Generator, level: float, slope: float, noise: float, steps: int = 1000
) -> np.ndarray:
    values = level + slope * np.arange(steps) + rng.normal(0, noise, steps)
    values[rng.integers(0, steps, 20)] *= 10  # batches far off
    return values


@pytest.mark.parametrize("seed", range(5))
def test_flat_is_reported_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ious = noisy(rng, 0.1, 0, 0.03)
    ious[rng.random(1000) < 0.2] = math.nan  # no box in these
    (warning,) = run(FlatLossWatch(500), noisy(rng, 20, 0, 3), ious)
    assert warning[0] == 501
    for hint in (
        "learning rate",
        "detrellis check",
        "pretrained",
        "queries",
        "overfit",
        "500 steps",
        "matched IoU 0.",
    ):
        assert hint in warning[1]


@pytest.mark.parametrize("seed", range(5))
def test_a_rising_loss_is_not_learning(seed: int) -> None:
    assert run(FlatLossWatch(500), noisy(np.random.default_rng(seed), 20, 0.01, 1))


@pytest.mark.parametrize("seed", range(5))
def test_a_falling_loss_or_a_rising_iou_is_learning(seed: int) -> None:
    rng = np.random.default_rng(seed)
    flat, flat_iou = noisy(rng, 20, 0, 1), noisy(rng, 0.1, 0, 0.02)
    assert not run(FlatLossWatch(500), noisy(rng, 20, -0.01, 1), flat_iou)
    assert not run(FlatLossWatch(500), flat, noisy(rng, 0.1, 0.0005, 0.02))


def test_a_fall_of_a_few_percent_in_little_noise_counts_and_in_much_noise_does_not() -> None:
    rng = np.random.default_rng(0)
    step = np.where(np.arange(1000) < 250, 20.0, 19.0)
    assert not run(FlatLossWatch(500), step + rng.normal(0, 0.2, 1000))
    assert run(FlatLossWatch(500), step + np.tile([-12.0, 12.0, -4.0, 4.0], 250))


def test_a_fall_of_one_percent_is_no_learning() -> None:
    assert run(FlatLossWatch(500), np.linspace(20, 19.8, 501))


def test_only_the_last_fifth_is_compared() -> None:
    late = np.concatenate([np.full(420, 20.0), np.full(580, 15.0)])
    assert not run(FlatLossWatch(500), late)


def test_a_later_plateau_is_convergence() -> None:
    losses = np.concatenate([np.linspace(20, 5, 600), np.full(3000, 5.0)])
    assert not run(FlatLossWatch(500), losses)


def test_a_run_from_good_weights_is_not_warned() -> None:
    assert not run(FlatLossWatch(500), np.full(1000, 3.0), np.full(1000, 0.9))


def test_without_any_matched_box_the_loss_decides() -> None:
    assert run(FlatLossWatch(500), np.full(1000, 3.0), np.full(1000, math.nan))
    assert not run(FlatLossWatch(500), np.linspace(3, 1, 1000), np.full(1000, math.nan))


@pytest.mark.parametrize("every", [20, 100, 400])
def test_values_shown_rarely_are_enough_in_the_end(every: int) -> None:
    (warning,) = run(FlatLossWatch(500), np.full(8000, 3.0), every=every)
    assert max(500, 9 * every) <= warning[0] <= 10 * every + 501  # five values in each window
    assert not run(FlatLossWatch(500), np.linspace(3, 1, 8000), every=every)


def test_only_steps_since_the_start_count() -> None:
    (warning,) = run(FlatLossWatch(500), np.full(1000, 3.0), start=10_000)
    assert warning[0] == 10_500


@pytest.mark.parametrize("cut", [3, 90, 101, 300, 499, 700])
def test_resume_continues_the_watch(cut: int) -> None:
    rng = np.random.default_rng(1)
    losses, ious = noisy(rng, 20, 0, 3), noisy(rng, 0.1, 0, 0.02)
    whole = run(FlatLossWatch(500), losses, ious)
    first, second = FlatLossWatch(500), FlatLossWatch(500)
    before = run(first, losses[:cut], ious[:cut])
    state = json.loads(json.dumps(first.state_dict()))
    run(first, losses, start=5000)  # going on does not change the saved state
    second.load_state_dict(state)
    assert before + run(second, losses[cut:], ious[cut:], start=1 + cut) == whole


def test_state_is_a_copy(tmp_path: Path) -> None:
    watch = FlatLossWatch(500)
    run(watch, np.full(50, 3.0), np.full(50, 0.5))
    state = watch.state_dict()
    before = json.dumps(state)
    run(watch, np.full(300, 9.0), start=51)
    assert json.dumps(state) == before
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == state
