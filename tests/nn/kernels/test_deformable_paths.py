"""Every CPU path of deformable attention against the grid_sample form,
and the choice between them.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from detrellis.nn.kernels import deformable_bag, deformable_cpu
from detrellis.nn.kernels.deformable import ms_deform_attn
from detrellis.nn.kernels.deformable_cpu import COMPILE_FROM, Pieces
from detrellis.nn.kernels.deformable_reference import ms_deform_attn_reference
from detrellis.recipes.build import build
from detrellis.types import Memory, Spatial

from ...small import CLASSES, images, small

SHAPES = ((3, 4), (1, 1), (2, 5))
HEADS, POINTS, WIDTH = 2, 2, 4
TOKENS = sum(h * w for h, w in SHAPES)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-6}


@pytest.fixture(scope="module", autouse=True)
def compiled_here() -> Iterator[None]:
    """Nothing compiled yet, and none of the layouts counted that other tests of this process have
    compiled for.
    """
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deformable_cpu, "pieces", Pieces())
        yield


@pytest.fixture(params=["eager", "compiled"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """One of the CPU paths, forced; a failed compile fails the test."""
    if request.param == "compiled" and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("DETRELLIS_MSDA", request.param)
    yield request.param
    assert not deformable_cpu.pieces.failed


@pytest.fixture
def own_pieces(monkeypatch: pytest.MonkeyPatch) -> Pieces:
    """Pieces that nothing happened to, and a log that repeats what was said before."""
    deformable_cpu.say.cache_clear()
    monkeypatch.setattr(deformable_cpu, "pieces", Pieces())
    return deformable_cpu.pieces


def inputs(
    batch: int = 2, queries: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """Value, locations (some outside the map) and weights."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (batch, queries, HEADS, len(SHAPES), POINTS)
    value = torch.randn(batch, TOKENS, HEADS, WIDTH, generator=generator, dtype=torch.float64)
    locations = torch.rand(*sizes, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    weights = torch.rand(*sizes, generator=generator, dtype=torch.float64)
    return [t.to(dtype) for t in (value, locations, weights / weights.sum((-1, -2), keepdim=True))]


def run(
    function: Any, tensors: list[Tensor], needs: tuple[bool, ...] = (True, True, True)
) -> list[Tensor]:
    """The output and the gradients of those that need one."""
    value, locations, weights = (
        t.detach().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)
    )
    out = function(value, SHAPES, locations, weights)
    wanted = [t for t in (value, locations, weights) if t.requires_grad]
    upstream = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).to(out.dtype)
    return [out.detach(), *(torch.autograd.grad(out, wanted, upstream) if wanted else ())]


def compare(tensors: list[Tensor], needs: tuple[bool, ...] = (True, True, True)) -> None:
    tolerance = TOLERANCE[tensors[0].dtype]
    expected = run(ms_deform_attn_reference, tensors, needs)
    for ours, theirs in zip(run(ms_deform_attn, tensors, needs), expected, strict=True):
        assert (ours - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max().item())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_the_reference(path: str, dtype: torch.dtype) -> None:
    compare(inputs(dtype=dtype))


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3))[:-1])
def test_any_inputs_need_gradients(path: str, needs: tuple[bool, ...]) -> None:
    compare(inputs(dtype=torch.float32), needs)


def test_gradcheck(path: str) -> None:
    tensors = [t.requires_grad_() for t in inputs(1, 2)]
    assert torch.autograd.gradcheck(lambda v, x, w: ms_deform_attn(v, SHAPES, x, w), tensors)


def test_inputs_that_are_not_contiguous(path: str) -> None:
    value, locations, weights = inputs(dtype=torch.float32)
    value = value.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    locations = torch.stack([locations, locations], dim=-1)[..., 0]
    weights = weights.transpose(1, 4).contiguous().transpose(1, 4)
    assert not any(t.is_contiguous() for t in (value, locations, weights))
    compare([value, locations, weights])


@pytest.mark.parametrize(
    "place",
    [(-5.0, 0.5), (0.5, 7.0), (-1e6, 1e30), (0.0, 0.0), (1.0, 1.0), (0.5, 1.0), (0.0, 0.25)],
    ids=str,
)
def test_outside_and_on_the_border(path: str, place: tuple[float, float]) -> None:
    value, locations, weights = inputs()
    compare([value, torch.tensor(place, dtype=torch.float64).expand_as(locations), weights])


def test_on_the_border_of_two_cells(path: str) -> None:
    """The derivative is that of the cell which starts there.
    All of these numbers are exact in binary.
    """
    shapes = ((4, 4), (2, 8))
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, 32, HEADS, WIDTH, generator=generator, dtype=torch.float64)
    places = (torch.arange(-1, 9) + 0.5) / 8
    grid = torch.stack(torch.meshgrid(places, places, indexing="ij"), dim=-1).flatten(0, 1).double()
    locations = grid[None, :, None, None, None].expand(1, 100, HEADS, 2, 3, 2)
    weights = torch.rand(1, 100, HEADS, 2, 3, generator=generator, dtype=torch.float64)
    found = []
    for function in (ms_deform_attn, ms_deform_attn_reference):
        tensors = [t.clone().requires_grad_() for t in (value, locations, weights)]
        out = function(tensors[0], shapes, *tensors[1:])
        found.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("batch", "queries"), [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_sample(path: str, batch: int, queries: int) -> None:
    tensors = inputs(batch, queries)
    out, *gradients = run(ms_deform_attn, tensors)
    assert out.shape == (batch, queries, HEADS * WIDTH)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(gradients, tensors, strict=True))


def test_what_is_not_a_number_stays_so(path: str) -> None:
    value, locations, weights = inputs(dtype=torch.float32)
    locations[0, 0, 0, 0, 0] = math.nan
    out, *_ = run(ms_deform_attn, [value, locations, weights])
    assert out[0, 0, :WIDTH].isnan().all()
    assert out[0, 1:].isfinite().all()


def test_half_precision(path: str) -> None:
    """Locations and sums stay float32."""
    value, locations, weights = inputs(dtype=torch.float32)
    out, *gradients = run(ms_deform_attn, [value.bfloat16(), locations, weights.bfloat16()])
    exact, *expected = run(
        ms_deform_attn_reference, [value.bfloat16().float(), locations, weights.bfloat16().float()]
    )
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.bfloat16]
    torch.testing.assert_close(out.float(), exact, rtol=2**-8, atol=1e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=2**-7, atol=0.02)


def test_under_autocast(path: str) -> None:
    from detrellis.nn.deformable import DeformableAttention

    torch.manual_seed(0)
    module = DeformableAttention(HEADS * WIDTH, HEADS, len(SHAPES), POINTS)
    tokens = torch.randn(2, TOKENS, HEADS * WIDTH)
    where = Spatial(torch.zeros(2, 5, HEADS * WIDTH), torch.rand(2, 5, 2))
    memory = Memory(tokens, tokens, SHAPES)
    x = torch.randn(2, 5, HEADS * WIDTH)
    exact = module(x, where, memory)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, where, memory)
    out.sum().backward()
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


def test_more_rows_than_int32_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETRELLIS_MSDA", "eager")
    tensors = inputs(dtype=torch.float32)
    assert deformable_bag.lay_out(tensors[0], SHAPES, tensors[2]).rows.dtype == torch.int32
    monkeypatch.setattr(deformable_bag, "INT32_MAX", 10)
    assert deformable_bag.lay_out(tensors[0], SHAPES, tensors[2]).rows.dtype == torch.int64
    compare(tensors)


def test_same_bits(path: str) -> None:
    """From run to run; and the forward pass on both paths, so that a run may mix them."""
    tensors = inputs(queries=300, dtype=torch.float32)
    first, second = run(ms_deform_attn, tensors), run(ms_deform_attn, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    layout = deformable_bag.lay_out(tensors[0], SHAPES, tensors[2])
    points, weights = tensors[1].flatten(3, 4).flatten(0, 1), tensors[2].flatten(3).flatten(0, 1)
    ids, shares = deformable_bag.bags(*layout, points, weights)
    table = tensors[0].view(-1, WIDTH)
    expected = torch.nn.functional.embedding_bag(ids, table, per_sample_weights=shares, mode="sum")
    assert torch.equal(first[0], expected.view_as(first[0]))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_other_sizes_do_not_compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETRELLIS_MSDA", "compiled")
    run(ms_deform_attn, inputs(2, 7, torch.float32))
    before = counters["stats"]["unique_graphs"]
    for batch, queries in ((2, 9), (3, 31), (1, 64), (4, 100)):
        compare(inputs(batch, queries, torch.float32))
    assert counters["stats"]["unique_graphs"] <= before + 1
    assert not deformable_cpu.pieces.failed


def test_choice(monkeypatch: pytest.MonkeyPatch, own_pieces: Pieces) -> None:
    """Only a call's own size decides, unless the environment does."""
    monkeypatch.delenv("DETRELLIS_MSDA", raising=False)
    monkeypatch.setattr(torch, "compile", lambda piece, **_: piece)
    assert not own_pieces.use_compiled(COMPILE_FROM, gradients=False)
    assert not own_pieces.use_compiled(COMPILE_FROM - 1, gradients=True)
    assert not own_pieces.compiled
    if shutil.which("g++") is not None:
        assert own_pieces.use_compiled(COMPILE_FROM, gradients=True)
        assert own_pieces.use_compiled(1, gradients=False)  # the same bits
        assert not own_pieces.use_compiled(COMPILE_FROM - 1, gradients=True)
    monkeypatch.setenv("DETRELLIS_MSDA", "eager")
    assert not own_pieces.use_compiled(COMPILE_FROM, gradients=True)


def test_no_compiler(
    monkeypatch: pytest.MonkeyPatch, own_pieces: Pieces, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DETRELLIS_MSDA", "compiled")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.INFO, "detrellis"):
        compare(inputs())
        compare(inputs())
    assert own_pieces.failed
    assert [r.getMessage() for r in caplog.records] == [
        "deformable attention: eager bags on the CPU "
        "(cannot compile: FileNotFoundError: there is no C++ compiler no-such-compiler)"
    ]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_compile_that_fails(
    monkeypatch: pytest.MonkeyPatch, own_pieces: Pieces, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise PermissionError("[Errno 13] the cache\nis read-only")

    monkeypatch.setenv("DETRELLIS_MSDA", "compiled")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    with caplog.at_level(logging.INFO, "detrellis"):
        compare(inputs())
    assert own_pieces.failed
    assert (
        "cannot compile: PermissionError: [Errno 13] the cache" in caplog.records[-1].getMessage()
    )
    assert sum("cannot compile" in r.getMessage() for r in caplog.records) == 1


def test_reference_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs()
    monkeypatch.setenv("DETRELLIS_MSDA", "reference")
    found, expected = run(ms_deform_attn, tensors), run(ms_deform_attn_reference, tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_shapes_without_memory() -> None:
    value, locations, weights = (t.to("meta") for t in inputs())
    assert ms_deform_attn(value, SHAPES, locations, weights).shape == (2, 5, HEADS * WIDTH)


def test_inside_torch_compile(path: str) -> None:
    def function(value: Tensor, shapes: Any, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn(value * 2, shapes, locations.sin(), weights) + 1

    tensors = inputs()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(run(compiled, tensors), run(function, tensors), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)])
def test_registered_as_torch_wants_it(
    monkeypatch: pytest.MonkeyPatch, needs: tuple[bool, ...]
) -> None:
    monkeypatch.setenv("DETRELLIS_MSDA", "eager")
    tensors = [t.requires_grad_(n) for t, n in zip(inputs(), needs, strict=True)]
    sizes = [n for shape in SHAPES for n in shape]
    torch.library.opcheck(torch.ops.detrellis.ms_deform_attn, (*tensors, sizes, True))
    upstream = torch.ones(2, 5, HEADS * WIDTH, dtype=torch.float64)
    detached = [t.detach() for t in tensors]
    torch.library.opcheck(
        torch.ops.detrellis.ms_deform_attn_backward,
        (upstream, *detached, sizes, [needs[0], any(needs[1:])]),
    )


def test_import_without_the_compiler(tmp_path: Path) -> None:
    """`torch._dynamo` takes two seconds to import, and cannot be where its cache cannot."""
    (tmp_path / "file").touch()
    program = """
import logging, sys, torch
from detrellis.nn.kernels.deformable import ms_deform_attn
assert "torch._dynamo" not in sys.modules
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
for _ in range(2):
    ms_deform_attn(torch.ones(1, 4, 1, 2), [(2, 2)], torch.ones(1, 3, 1, 1, 1, 2), torch.ones(1, 3, 1, 1, 1))
"""
    variables = os.environ | {
        "DETRELLIS_MSDA": "compiled",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "in"),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "eager bags on the CPU (cannot compile: " in done.stdout
    assert done.stdout.count("\n") == 1


@torch.no_grad()
def test_a_compiled_detector() -> None:
    """Without graph breaks, and the same outputs."""
    detector = build(small("tiny"), CLASSES).eval().detector
    batch = images(((64, 96), (64, 80)))
    expected = detector(batch)
    compiled = torch.compile(detector, fullgraph=True, backend="aot_eager")(batch)
    torch.testing.assert_close(compiled.logits, expected.logits)
    torch.testing.assert_close(compiled.boxes, expected.boxes)


@torch.no_grad()
def test_export_has_standard_operations_only() -> None:
    class Wrapped(torch.nn.Module):
        def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return ms_deform_attn(value, SHAPES, locations, weights)

    tensors = tuple(inputs(dtype=torch.float32))
    program = torch.export.export(Wrapped(), tensors)
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("grid_sampler" in n for n in names) == len(SHAPES)
    assert not any("detrellis" in n for n in names)
