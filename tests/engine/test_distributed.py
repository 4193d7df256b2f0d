"""Two processes on the CPU (gloo): nobody waits for ever, and all keep the same weights."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from rich.console import Console

import detrellis
from detrellis.distributed import (
    TIMEOUT,
    all_gather,
    parallel,
    pick_device,
    process_group,
    reduce_max,
    reduce_maxima,
    reduce_mean,
)
from detrellis.errors import UserError
from detrellis.recipes.build import build, build_schemes
from detrellis.recipes.network import build_detector
from detrellis.recipes.refuse import refuse
from detrellis.schemes.config import SchemesConfig
from detrellis.training import mean_boxes

from ..small import CLASSES, SMALL, images, small, targets
from .test_resume import stop_at

# Each must survive a process whose whole batch has no boxes.
SCHEMES = [
    *(name for name in SchemesConfig.model_fields if name != "co"),
    "co=rcnn+atss+retinanet+fcos+paa+gfl",
]


def stacks(name: str) -> list[tuple[str, ...]]:
    """No scheme, and all that this detector can carry, in as few stacks as they go together in."""
    able: list[tuple[str, ...]] = []
    with torch.device("meta"):
        detector = build_detector(small(name).detector, CLASSES)
    for scheme in SCHEMES:
        for stack in [*able, ("none",)]:
            with contextlib.suppress(UserError), torch.device("meta"):
                refuse(recipe := small(name, (*stack, scheme)))
                build_schemes(recipe, detector, CLASSES, seed=0)
                able = [joined for joined in able if joined != stack] + [(*stack, scheme)]
                break
    assert len({scheme for stack in able for scheme in stack}) > 5
    return [("none",), *able]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def in_processes(function: Callable[..., None], *arguments: object, size: int = 2) -> None:
    """Each is forked from one that has imported all this, and nothing else:
    torch's import takes seconds.
    """
    multiprocessing.set_forkserver_preload([f"{__package__}.preload", __name__])
    mp.start_processes(
        function, (size, free_port(), *arguments), nprocs=size, start_method="forkserver"
    )


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}


def steps(rank: int, size: int, port: int, name: str, out: str) -> None:
    """In each process: two steps with every stack; rank 1 never has a box."""
    os.environ |= environment(rank, size, port)
    torch.set_num_threads(1)
    with process_group("cpu") as own:
        assert (own.rank, own.size, own.is_main_process) == (rank, size, rank == 0)
        truth = targets((0, 0) if rank else (2, 3))
        assert mean_boxes(truth).item() == 2.5
        assert all_gather(rank) == [0, 1]
        assert reduce_mean(torch.tensor(float(rank))).item() == 0.5
        assert reduce_max(rank, own.device) == 1
        assert reduce_maxima([rank, 2 - rank, -rank], own.device) == [1, 2, 0]
        recipes = [small(name, stack) for stack in stacks(name)]
        if name == "tiny":  # parameters without gradients are none that a process waits for
            recipes += [
                recipes[0].override(f"detector.backbone.frozen={stages}") for stages in ("1", "all")
            ]
        for recipe in recipes:
            model = build(recipe, CLASSES)
            model.train()
            together = parallel(model, own)
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            for step in range(2):
                model.reseed(step)
                optimizer.zero_grad()
                losses = together(images(seed=rank), truth).losses
                total = torch.stack(list(losses.values())).sum()
                assert total.isfinite()
                total.backward()
                optimizer.step()
            norms = torch.stack([p.detach().norm() for p in model.parameters()])
            others = all_gather(norms)
            assert torch.equal(others[0], others[1]), recipe
    Path(out, f"{rank}.done").touch()


@pytest.mark.parametrize(
    "name", ["tiny", "deformable_detr_r50_refine", "deformable_detr_r50_two_stage"]
)
def test_a_process_without_boxes(name: str, tmp_path: Path) -> None:
    in_processes(steps, name, str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"0.done", "1.done"}


def passes(rank: int, size: int, port: int) -> None:
    """In each process: passes on the same input, which is another one in each process;
    the last without the others.
    """
    os.environ |= environment(rank, size, port)
    torch.set_num_threads(1)
    with process_group("cpu") as own:
        model = build(small("tiny"), CLASSES)
        model.train()
        together, gradients = parallel(model, own), []
        for network in (together, together, together, model):
            model.reseed(0)
            model.zero_grad(set_to_none=True)
            losses = network(images(seed=rank), targets((2, 3))).losses
            torch.stack(list(losses.values())).sum().backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        first, *later, alone = gradients
        for again in later:
            assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
        for mean, part in zip(first, alone, strict=True):
            torch.testing.assert_close(mean, reduce_mean(part))


@pytest.mark.parametrize("size", [2, 3])
def test_the_first_pass_of_a_process_adds_up_as_the_later_ones(size: int) -> None:
    """DDP lays its buckets out anew after the first:
    a resumed run would otherwise go on with other bits.
    """
    in_processes(passes, size=size)


SETTINGS = [*SMALL, "data.size=[64, 64]", "optim.batch_size=4"]


def on_one_node(rank: int, size: int, port: int, data: str, out: str) -> None:
    """In each process: the run that `torchrun` starts below."""
    os.environ |= environment(rank, size, port)
    torch.set_num_threads(1)
    detrellis.train(
        "tiny",
        data=data,
        out=out,
        override=SETTINGS,
        epochs=1,
        workers=0,
        device="cpu",
        console=quiet(),
    )


def test_the_same_command_under_torchrun_on_two_nodes(shapes: Path, tmp_path: Path) -> None:
    """Two agents with a process each share the recipe's batch and its evaluation, and write one
    run, bit for bit that of one node with two processes; it can be resumed alone."""
    out, other = tmp_path / "run", tmp_path / "one_node"
    agent = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
    ]
    agent += [
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"127.0.0.1:{free_port()}",
        "--rdzv-id",
        "1",
    ]
    agent += [
        "--local-addr",
        "127.0.0.1",
        "-m",
        "detrellis",
        "train",
        "tiny",
        "--data",
        str(shapes),
    ]
    agent += ["--out", str(out), "--epochs", "1", "--workers", "0", "--device", "cpu"]
    nodes = [
        subprocess.Popen(
            [*agent, *(word for setting in SETTINGS for word in ("-o", setting))],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    in_processes(on_one_node, str(shapes), str(other))
    said = [node.communicate(timeout=900) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said[0][1][-3000:] + said[1][1][-3000:]
    assert "".join(output for output, _ in said).count("Done in") == 1
    states = [torch.load(run / "last.state.pt", weights_only=True)["model"] for run in (out, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    state = torch.load(out / "last.state.pt", weights_only=True)
    assert state["step"] == 3  # 11 images in batches of 2 x 2
    assert state["result"]["images"] == 5
    alone = detrellis.evaluate(out / "last.safetensors", workers=0)
    assert alone.ap == pytest.approx(state["result"]["stats"]["AP"], abs=1e-9)


def stopped(rank: int, size: int, port: int, data: str, out: str) -> None:
    """In each process: a run of which rank 1 alone is told to stop, after step 2 of 3."""
    os.environ |= environment(rank, size, port)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            stop_at(patch, 2)
        settings = [*SETTINGS, "detector.backbone.frozen=1"]
        result = detrellis.train(
            "tiny",
            data=data,
            out=out,
            override=settings,
            epochs=1,
            workers=0,
            device="cpu",
            console=quiet(),
        )
    assert not result.finished
    Path(f"{out}.{rank}").write_text(f"{result.steps} {result.signal}")


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_a_signal_to_one_process_stops_all_after_the_same_step(
    shapes: Path, tmp_path: Path
) -> None:
    """One of them saves, nobody waits for ever, and one process alone can go on."""
    out = tmp_path / "run"
    in_processes(stopped, str(shapes), str(out))
    told = [Path(f"{out}.{rank}").read_text() for rank in (0, 1)]
    assert told == [f"2 {signal.SIGTERM.value}"] * 2
    assert torch.load(out / "last.state.pt", weights_only=True)["step"] == 2
    result = detrellis.resume(out, workers=0, device="cpu")
    assert (result.finished, result.steps) == (True, 3)


def lost(rank: int, size: int, port: int, how: str, out: str) -> None:
    """In each process: rank 1 dies, or stands still for longer than the others wait."""
    os.environ |= environment(rank, size, port) | {TIMEOUT: "4"}
    Path(out, f"{rank}.here").touch()
    # They meet within the timeout, however busy the machine is
    while not Path(out, f"{1 - rank}.here").exists():
        time.sleep(0.01)
    others = list[int]()

    def together() -> None:
        with process_group("cpu") as own:
            others.extend(all_gather(os.getpid()))
            if rank == 1 and how == "dies":
                os._exit(0)
            if rank == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            reduce_max(rank, own.device)

    with pytest.raises(
        UserError, match="another process has ended, or has not answered for 4 seconds"
    ):
        together()
    Path(out, f"{rank}.told").touch()
    if how == "stalls" and rank == 0:
        os.kill(others[1], signal.SIGCONT)


@pytest.mark.parametrize(("how", "told"), [("dies", ["0.told"]), ("stalls", ["0.told", "1.told"])])
def test_a_process_that_is_lost_is_not_waited_for(
    how: str, told: list[str], tmp_path: Path
) -> None:
    """The others end with a message, and so does one that goes on after they have."""
    in_processes(lost, how, str(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("*.told")) == told


@pytest.mark.parametrize("text", ["0", "soon", "-5", "99999999"])
def test_a_timeout_that_is_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT, text)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(UserError, match=f"{TIMEOUT}={text}: no number of seconds"),
        process_group("cpu"),
    ):
        pass


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    from detrellis.distributed import World
    from detrellis.engine.batches import batch_per_process

    recipe = small("tiny").override(["optim.batch_size=16", "optim.accumulate=2"])
    assert batch_per_process(recipe, World(0, 4, torch.device("cpu"))) == 2
    with pytest.raises(UserError, match="3 processes"):
        batch_per_process(recipe, World(0, 3, torch.device("cpu")))


def test_cuda_without_a_number_is_the_process_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.set_device refuses a device without a number."""
    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
    assert pick_device("cuda", 2) == torch.device("cuda:2")
    assert pick_device("cuda:1", 2) == torch.device("cuda:1")
