"""The sizes that `info` reports."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from detrellis.engine.measure import measure
from detrellis.engine.multiply_adds import MultiplyAdds
from detrellis.recipes import find_recipe
from detrellis.recipes.build import build

from ..small import CLASSES, SMALL, images, small

PAPERS = {  # millions of parameters in their tables
    "detr-r50": 41,
    "detr-r50-dc5": 41,
    "conditional-detr-r50": 44,
    "conditional-detr-r50-dc5": 44,
    "dab-detr-r50": 44,
    "dab-detr-r50-dc5": 44,
    "dn-detr-r50": 44,
    "dn-detr-r50-dc5": 44,
    "deformable-detr-r50": 40,
    "dino-r50": 47,
    "dino-swin-l": 218,
    "deformable-detr-swin-l": 218,
    "tiny": 4.5,
}


@pytest.mark.parametrize(("name", "millions"), PAPERS.items())
def test_parameters_agree_with_the_papers(name: str, millions: float) -> None:
    found = measure(find_recipe(name), 91)
    assert found.parameters / 1e6 == pytest.approx(millions, abs=1)


def test_multiply_adds_of_dino_agree_with_its_paper() -> None:
    """279 G on COCO's average validation image, which is a little smaller than 1333 x 800."""
    assert measure(find_recipe("dino-r50"), 91).gflops == pytest.approx(285, rel=0.05)


def test_counts_are_those_of_the_built_model() -> None:
    found = measure(small("tiny"), CLASSES)
    model = build(small("tiny"), CLASSES)
    assert found.parameters == sum(p.numel() for p in model.detector.parameters())
    assert [(s.name, s.parameters, s.queries) for s in found.schemes] == [
        ("cdn", (CLASSES + 1) * 64, 200)
    ]


def test_schemes_cost_nothing_at_inference() -> None:
    recipe = find_recipe("tiny").override(SMALL)
    plain, with_scheme = (measure(r, CLASSES) for r in (recipe.with_schemes(["none"]), recipe))
    assert (plain.parameters, plain.gflops) == (with_scheme.parameters, with_scheme.gflops)


@pytest.mark.parametrize(
    "name",
    ["tiny", "detr_r50", "sam_detr_r50_smca", "sam_detr_plus_r50_smca_dn", "smca_detr_ms_r50"],
)
def test_multiply_adds_are_those_of_a_real_pass(name: str) -> None:
    """On the meta device nothing is computed:
    each operation has to say there what it would cost and return.
    """
    recipe = small(name).override(["data.size=[64, 96]", "data.augment=fixed"])
    # OneDNN's products go uncounted
    detector = build(recipe, CLASSES).detector.eval().requires_grad_(False).double()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        detector(
            images(((64, 96),))._replace(pixels=torch.zeros(1, 3, 64, 96, dtype=torch.float64))
        )
    assert measure(recipe, CLASSES).gflops == round(counter.get_total_flops() / 2 / 1e9, 2)


def test_elementwise_results_on_the_meta_device_are_laid_out_as_torch_lays_them_out() -> None:
    """At the first call, and at the next one of the same shapes, which torch is not asked about."""
    tensors = [
        torch.empty(2, 3, device="meta"),
        torch.empty(3, 2, device="meta").t(),
        torch.empty(2, 1, dtype=torch.float64, device="meta"),
        torch.empty(2, 3, dtype=torch.int64, device="meta"),
    ]

    def results() -> list[object]:
        pairs = [(a, b) for a in tensors for b in tensors]
        made = [
            result
            for a, b in pairs
            for result in (a + b, a > b, a * 2, a * 2.5, torch.where(a > b, a, b), a.clone())
        ]
        made += [a.clone().mul_(2) for a in tensors]
        return [(t.shape, t.stride(), t.dtype, t.device) for t in made]

    expected = results()
    with MultiplyAdds():
        assert results() == expected
        assert results() == expected
