"""What compiles speaks of no CUDA where nobody asked for it."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from detrellis.engine import bench
from detrellis.nn.compiler import EXTENSIONS
from detrellis.nn.kernels.deformable_cpu import COMPILE_FROM, Pieces


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
    part = nn.Identity()
    detector = SimpleNamespace(backbone=part, neck=part, encoder=part, queries=part, decoder=part)
    bench._compile(SimpleNamespace(detector=detector), train=True)  # type: ignore[arg-type]


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
