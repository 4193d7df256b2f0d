"""Compiled layers compute what they did, each kind in one piece; what compiles speaks of no CUDA
where nobody asked for it. `tests/soak/test_compiled.py` trains and resumes with a real compiler.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from detrellis.engine import bench
from detrellis.errors import UserError
from detrellis.nn import compiled_layers
from detrellis.nn.compiled_layers import compile_layers, eager
from detrellis.nn.compiler import EXTENSIONS
from detrellis.nn.kernels.deformable_cpu import COMPILE_FROM, Pieces
from detrellis.recipes.build import build
from detrellis.recipes.config import Recipe
from detrellis.training import TrainableDetector
from detrellis.types import ImageBatch, Targets

from ..small import images, small, targets, with_bitmaps

CPU = torch.device("cpu")
BATCHES = [
    (images(), targets((3, 2))),
    (images(((96, 64), (64, 64))), targets((1, 4))),
    (images(((64, 64), (64, 64))), targets((0, 9))),
]


def by_itself() -> None:
    """As torch imports it."""
    importlib.import_module(EXTENSIONS)


def for_bags() -> None:
    """What a large training step compiles."""
    assert Pieces().use_compiled(COMPILE_FROM, gradients=True)


def for_bench() -> None:
    """`detrellis bench --compile`;
    parts are compiled at their first call, which there is none of here.
    """
    model = SimpleNamespace(detector=nn.Identity())
    bench._compile(model, torch.device("cpu"), train=False)  # type: ignore[arg-type]


@pytest.mark.parametrize(("compiles", "lines"), [(by_itself, 1), (for_bags, 0), (for_bench, 0)])
def test_no_word_of_cuda(
    compiles: Callable[[], None], lines: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DETRELLIS_MSDA", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)  # there is a compiler; nothing is compiled yet
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    importlib.import_module(EXTENSIONS)  # what follows is put back
    monkeypatch.setattr(torch.utils, "cpp_extension", None)
    monkeypatch.delitem(sys.modules, EXTENSIONS)
    heard: list[str] = []
    logger = logging.getLogger(EXTENSIONS)
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: heard.append(record.getMessage()))
    monkeypatch.setattr(logger, "handlers", [handler])
    compiles()
    assert EXTENSIONS in sys.modules
    assert heard == [f"No CUDA runtime is found, using CUDA_HOME='{tmp_path}'"] * lines
    logger.warning("something else")
    assert heard[lines:] == ["something else"]


def step(model: TrainableDetector, batch: ImageBatch, truth: Targets) -> dict[str, Tensor]:
    """Losses and gradients of a step, by name."""
    torch.manual_seed(0)  # of dropout
    model.reseed(0)
    model.zero_grad()
    losses = model(batch, truth if model.sampling is None else with_bitmaps(truth, batch)).losses
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()} | gradients


def check_compiled(recipe: Recipe, backend: str) -> None:
    """Layers that `backend` compiles give the losses and gradients that they gave, whole, with few
    graphs whatever the sizes, and leave names and evaluation alone.
    """
    torch._dynamo.reset()
    model = build(recipe, 5).train()
    names = list(model.state_dict())
    before = [step(model, *batch) for batch in BATCHES]
    compile_layers(model, CPU, backend)
    counters.clear()
    graphs = []
    for batch, expected in zip(BATCHES, before, strict=True):
        torch.testing.assert_close(step(model, *batch), expected, rtol=1e-4, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert list(model.state_dict()) == names
    assert not counters["graph_break"]
    # With padding and without, and the decoder's first layer apart; none for other sizes
    assert 1 <= graphs[-1] == graphs[-2] <= 8
    counters.clear()
    with eager():
        model.eval().detector.detect(BATCHES[0][0], torch.tensor([[64, 96]] * 2))
    assert not counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_compiled_layers_compute_what_they_did() -> None:
    check_compiled(small("tiny", ("group=3", "align=1")), "eager")


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("g++ is missing\nmore")

    monkeypatch.setattr(compiled_layers.torch, "compile", fail)
    with pytest.raises(UserError, match="does not work on cpu: g\\+\\+ is missing") as raised:
        compile_layers(nn.Identity(), CPU)
    assert "optim.compile=false" in raised.value.remedy
