"""Box geometry on the awkward cases that data sets and denoising produce."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import generalized_box_iou

from detrellis.boxes import (
    cxcywh_to_xyxy,
    giou,
    inverse_sigmoid,
    iou,
    pairwise_giou,
    xyxy_to_cxcywh,
)

unit = st.floats(0, 1, allow_nan=False, width=32)
box = st.tuples(unit, unit, unit, unit).map(lambda v: torch.tensor(v, dtype=torch.float64))


@given(box)
def test_formats_are_inverse(b: torch.Tensor) -> None:
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(b)), b)


@given(box, box)
def test_iou_is_a_share_and_giou_bounds_it(a: torch.Tensor, b: torch.Tensor) -> None:
    a, b = cxcywh_to_xyxy(a), cxcywh_to_xyxy(b)
    overlap, general = float(iou(a, b)), float(giou(a, b))
    assert 0 <= overlap <= 1 + 1e-9
    assert -1 - 1e-9 <= general <= overlap + 1e-9


def test_agrees_with_torchvision() -> None:
    a, b = (cxcywh_to_xyxy(torch.rand(n, 4, dtype=torch.float64) + 0.1) for n in (5, 7))
    torch.testing.assert_close(pairwise_giou(a, b), generalized_box_iou(a, b))


def test_boxes_of_no_size_give_finite_values_and_gradients() -> None:
    a = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.2, 0.2]], requires_grad=True)
    b = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    value = giou(cxcywh_to_xyxy(a), cxcywh_to_xyxy(b))
    value.sum().backward()
    assert value.isfinite().all()
    assert a.grad is not None
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("eps", [1e-3, 1e-5])
def test_inverse_sigmoid_saturates_at_its_eps(eps: float) -> None:
    x = torch.tensor([0.0, 1.0, 0.25, -1.0, 2.0], dtype=torch.float64)
    most = math.log(1 / eps)
    expected = torch.tensor([-most, most, math.log(1 / 3), -most, most], dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(x, eps), expected)
