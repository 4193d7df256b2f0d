"""FSDP2 in two processes on the CPU (gloo):
the same training, each process with half of what is trained.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import detrellis
from detrellis.distributed import World, process_group, reduce_mean
from detrellis.engine import sharded, train
from detrellis.engine.optim import build_optimizer
from detrellis.engine.sharded import layers, local, shard
from detrellis.errors import UserError
from detrellis.recipes import Recipe
from detrellis.recipes.build import build
from detrellis.types import ImageBatch, Targets

from ..small import CLASSES, SMALL, images, small, targets
from .test_distributed import environment, free_port, in_processes, quiet
from .test_resume import stop_at

SETTINGS = [
    *SMALL,
    "data.size=[64, 64]",
    "optim.batch_size=4",
    "optim.lr=1e-3",
    "optim.accumulate=2",
]
SCHEMES = ("cdn", "group=3", "co=atss")  # with parameters of their own


def pieces(state: train.TrainState) -> dict[str, list[Tensor]]:
    moments = [
        m[name] for m in state.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    ]
    assert state.ema is not None
    return {
        "parameters": list(state.model.parameters()),
        "average": list(state.ema.detector.parameters()),
        "moments": moments,
    }


def runs(rank: int, size: int, port: int, data: str, out: str, second: int) -> None:
    """In each process: a run under DDP, and a sharded one that is stopped and goes on."""
    torch.set_num_threads(1)
    kept: list[train.TrainState] = []
    with pytest.MonkeyPatch.context() as patch:
        made = train.fresh_state
        patch.setattr(train, "fresh_state", lambda *a, **b: kept.append(made(*a, **b)) or kept[-1])
        patch.setattr(sharded, "SMALLEST", 1000)
        options: dict[str, Any] = {"workers": 0, "device": "cpu", "console": quiet()}
        common = options | {"data": data, "scheme": SCHEMES, "epochs": 1}
        os.environ |= environment(rank, size, port)
        detrellis.train("tiny", out=f"{out}/ddp", override=SETTINGS, **common)
        os.environ |= environment(rank, size, second)
        with pytest.MonkeyPatch.context() as stopping:
            if rank == 1:
                stop_at(stopping, 2)
            settings = [*SETTINGS, "optim.fully_shard=true"]
            assert not detrellis.train(
                "tiny", out=f"{out}/fsdp", override=settings, **common
            ).finished
        os.environ |= environment(rank, size, port)
        assert detrellis.resume(f"{out}/fsdp", **options).finished
        assert len(list(layers(kept[-1].model.detector.encoder))) == 1
    counts = {
        name: sum(local(t).numel() for t in tensors) for name, tensors in pieces(kept[-1]).items()
    }
    Path(out, f"{rank}.json").write_text(json.dumps(counts))
    Path(out, "whole.json").write_text(
        json.dumps(
            {name: sum(t.numel() for t in tensors) for name, tensors in pieces(kept[0]).items()}
        )
    )


def difference(one: dict[Any, Tensor], other: dict[Any, Tensor]) -> float:
    assert one.keys() == other.keys()
    apart = sum(float((one[k].double() - other[k].double()).norm() ** 2) for k in one)
    return float((apart / sum(float(one[k].double().norm() ** 2) for k in one)) ** 0.5)


def test_the_same_run_with_half_of_everything_in_each_process(shapes: Path, tmp_path: Path) -> None:
    """Accumulation, clipping, averages, schemes with parameters, a stop and a resume;
    then one process goes on.
    """
    in_processes(runs, str(shapes), str(tmp_path), free_port())
    ddp, fsdp = tmp_path / "ddp", tmp_path / "fsdp"
    states = [torch.load(run / "last.state.pt", weights_only=True) for run in (ddp, fsdp)]
    moments = [
        {i: m["exp_avg"] for i, m in state["optimizer"]["state"].items()} for state in states
    ]
    assert difference(*moments) < 1e-3
    assert difference(*(state["model"] for state in states)) < 1e-4
    weights = [load_file(run / "last.safetensors") for run in (ddp, fsdp)]
    assert difference(*weights) < 1e-4
    # Each process had half of it.
    whole, *parts = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "0", "1")
    )
    for name, count in whole.items():
        assert sum(part[name] for part in parts) == count
        assert max(part[name] for part in parts) < 0.55 * count
    # Any number of processes goes on, sharded or not.
    result = detrellis.resume(
        fsdp, epochs=2, override="optim.fully_shard=false", workers=0, device="cpu"
    )
    assert (result.finished, result.epochs) == (True, 2)


def three_steps(
    recipe: Recipe, batches: tuple[ImageBatch, Targets], world: World, amp: bool
) -> list[float]:
    """The mean loss over all processes in each of three steps."""
    model = build(recipe, CLASSES)
    model.train()
    if world.size > 1:
        shard(model, None, world)
    optimizer, found = build_optimizer(model, recipe.optim), []
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            losses = model(*batches).losses
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.optim.clip)
        optimizer.step()
        found.append(float(reduce_mean(total.detach())))
    return found


def one_image(of: ImageBatch, truth: Targets, i: int) -> tuple[ImageBatch, Targets]:
    rows = slice(sum(truth.sizes[:i]), sum(truth.sizes[: i + 1]))
    return ImageBatch(of.pixels[i : i + 1]), Targets(
        truth.labels[rows], truth.boxes[rows], truth.sizes[i : i + 1]
    )


# Without what depends on the images of a process: BatchNorm's statistics, and how many queries
# denoising has.
ALONE = small("tiny", ("none",)).override(["detector.backbone.frozen=all", "optim.lr=1e-3"])


def halves(rank: int, size: int, port: int, out: str) -> None:
    os.environ |= environment(rank, size, port)
    torch.set_num_threads(1)
    sharded.SMALLEST = 1000
    with process_group("cpu") as world:
        batches = one_image(images(), targets((2, 3)), rank)
        found = [three_steps(ALONE, batches, world, amp) for amp in (False, True)]
    Path(out, str(rank)).write_text(json.dumps(found))


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """Each with one of two images: the same losses, in float32 and in bfloat16."""
    in_processes(halves, str(tmp_path))
    alone = World(0, 1, torch.device("cpu"))
    plain, half = (
        three_steps(ALONE, (images(), targets((2, 3))), alone, amp) for amp in (False, True)
    )
    for rank in "01":
        found = json.loads((tmp_path / rank).read_text())
        assert found[0] == pytest.approx(plain, rel=1e-4)
        assert found[1][0] == pytest.approx(half[0], rel=0.02)
        # Rounding decides which queries are matched
        assert found[1] == pytest.approx(half, rel=0.1)
    assert plain[2] != pytest.approx(plain[0], rel=1e-3)  # it has moved


def test_layers_are_elements_of_lists_and_not_what_is_in_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sharded, "SMALLEST", 100)
    block = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    network = nn.ModuleDict(
        {"stage": nn.Sequential(block, nn.Linear(20, 20)), "head": nn.Linear(20, 20)}
    )
    assert list(layers(network)) == [block[0], network["stage"][1]]


def test_what_is_frozen_at_first_is_not_sharded() -> None:
    with pytest.raises(UserError, match=r"unfreeze_after=2 and optim\.fully_shard"):
        build(
            small("tiny").override(
                [
                    "detector.backbone.frozen=1",
                    "schedule.unfreeze_after=2",
                    "optim.fully_shard=true",
                ]
            ),
            CLASSES,
        )
