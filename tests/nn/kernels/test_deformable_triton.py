"""The CUDA kernels without a GPU: their results in Triton's interpreter, and what they compile to.

Triton decides at import whether it interprets, so each of the two runs this file as a program of
its own.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

SHAPES = ((3, 4), (1, 1), (2, 5))
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}
NEEDS = ((True, True), (True, False), (False, True))

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize(
    ("what", "variables"), [("interpret", {"TRITON_INTERPRET": "1"}), ("compile", {})]
)
def test_without_a_gpu(what: str, variables: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, __file__, what],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("fine\n")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    from detrellis.nn.kernels.deformable import _triton_works

    assert _triton_works()
    for width, queries in ((3, 37), (32, 70)):
        check(dtype, width, queries, "cuda")


def test_a_gpu_without_triton_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The other path is several times slower: nobody should find that out by waiting."""
    from detrellis.nn.kernels import deformable, deformable_triton

    def broken() -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(deformable_triton, "probe", broken)
    deformable._triton_works.cache_clear()
    with caplog.at_level("WARNING"):
        assert not deformable._triton_works()
    deformable._triton_works.cache_clear()
    assert "several times slower; Triton does not work: RuntimeError: no compiler" in caplog.text


def inputs(dtype: torch.dtype, width: int, queries: int, device: str = "cpu") -> tuple[Tensor, ...]:
    """Upstream gradient, value, locations (some outside, some on borders of cells) and weights."""
    generator = torch.Generator().manual_seed(0)
    precise = torch.promote_types(dtype, torch.float32)
    sizes = (2, queries, 2, len(SHAPES), 1)
    value = torch.randn(
        2, sum(h * w for h, w in SHAPES), 2, width, generator=generator, dtype=torch.float64
    )
    locations = torch.rand(*sizes, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    locations[0, :1] = 0.5
    locations[1, :1] = 1e6
    weights = torch.rand(*sizes, generator=generator, dtype=torch.float64)
    upstream = torch.randn(2, queries, 2 * width, generator=generator, dtype=torch.float64)
    types = (dtype, dtype, precise, precise)
    return tuple(
        t.to(device, d) for t, d in zip((upstream, value, locations, weights), types, strict=True)
    )


def check(dtype: torch.dtype, width: int, queries: int, device: str = "cpu") -> None:
    """Against the reference in float64, with both ways to sum the gradients of rows."""
    from detrellis.nn.kernels import deformable_triton
    from detrellis.nn.kernels.deformable_reference import ms_deform_attn_reference

    upstream, *tensors = inputs(dtype, width, queries, device)
    exact = [t.double().requires_grad_() for t in tensors]
    expected = ms_deform_attn_reference(exact[0], SHAPES, *exact[1:])
    gradients = torch.autograd.grad(expected, exact, upstream.double())
    out = deformable_triton.forward(*tensors, SHAPES, True)
    assert out.dtype == dtype
    close(out, expected, dtype)
    for deterministic, needs in itertools.product(
        (False, True), NEEDS if dtype == torch.float64 else NEEDS[:1]
    ):
        torch.use_deterministic_algorithms(deterministic)
        found = deformable_triton.backward(upstream, *tensors, SHAPES, needs)
        torch.use_deterministic_algorithms(False)
        for ours, theirs, needed in zip(
            found, gradients, (needs[0], needs[1], needs[1]), strict=True
        ):
            assert needed or not ours.numel()
            if needed:
                close(
                    ours,
                    theirs,
                    dtype if ours is found[0] else torch.promote_types(dtype, torch.float32),
                )


def close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    assert (ours.double() - theirs).abs().max() <= TOLERANCE[dtype] * max(
        1.0, theirs.abs().max().item()
    )


def interpret() -> None:
    """Program: all types, channels that are no power of two,
    queries that do not fill a program; nothing at all.
    """
    from detrellis.nn.kernels import deformable_triton

    check(torch.float64, 3, 37)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check(dtype, 32, 5)
    upstream, *tensors = inputs(torch.float32, 4, 0)
    assert deformable_triton.forward(*tensors, SHAPES, True).shape == (2, 0, 8)
    assert not deformable_triton.backward(upstream, *tensors, SHAPES, [True, True])[0].any()


def compile_only() -> None:
    """Program: through Triton's compiler to the assembly of a GPU that is not there,
    launching nothing.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class NoDriver:
        """What the compiler asks of a driver."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    triton.runtime.driver.set_active(NoDriver())
    run, assembly = JITFunction.run, []

    def warm_up(self: Any, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        assembly.append(run(self, *arguments, grid=grid, warmup=True, **constants).asm["ptx"])

    JITFunction.run = warm_up
    from detrellis.nn.kernels import deformable_triton

    for dtype in TOLERANCE:
        upstream, *tensors = inputs(dtype, 32, 37)
        assembly.clear()
        deformable_triton.forward(*tensors, SHAPES, True)
        deformable_triton.backward(upstream, *tensors, SHAPES, [True, True])
        deformable_triton.backward(upstream, *tensors, SHAPES, [False, True])
        torch.use_deterministic_algorithms(True)
        deformable_triton.backward(upstream, *tensors, SHAPES, [True, True])
        torch.use_deterministic_algorithms(False)
        assert ["red.global" in text or "atom." in text for text in assembly] == [
            False,
            True,
            False,
            False,
            False,
        ]
        # 16-byte loads of rows; additions of 16 bytes where the hardware has them.
        wide = r"ld\.global\.v2\.b64" if dtype == torch.float64 else r"ld\.global\.v4\.b32"
        assert all(re.search(wide, text) for text in assembly[:4])
        assert dtype == torch.float64 or "add.v4.f32" in assembly[1]
    one, place = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1, 1, 2), 0.5)
    deformable_triton.backward(one, one, place, place[..., 0].contiguous(), [(1, 1)], [True, True])


if __name__ == "__main__":
    {"interpret": interpret, "compile": compile_only}[sys.argv[1]]()
    print("fine")
