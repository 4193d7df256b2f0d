"""Invariants 1 to 4 of docs/architecture.md on every stack of schemes.
Each is built once and trained once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from detrellis.detector import Detector
from detrellis.recipes import Recipe
from detrellis.recipes.build import build
from detrellis.recipes.detector import DetectorConfig
from detrellis.schemes.base import QueryBlock
from detrellis.training import TrainableDetector
from detrellis.types import ImageBatch, Targets

from ..small import CLASSES, distinct, images, small, targets
from .models import CASES, begin, compare, fill, flat, make, recipe_of, restored, train_step

# Stacks of two that do the same work
pytestmark = pytest.mark.filterwarnings("ignore::detrellis.errors.Advice")

Stack = tuple[str, str]  # a recipe's name and that of its schemes

BATCHES: dict[str, tuple[Any, Targets]] = {  # besides a usual one
    "more targets than queries beside an image without boxes": (
        ((64, 96), (48, 96)),
        targets((15, 0)),
    ),
    "no boxes at all": (((64, 96), (64, 80)), targets((0, 0))),
    "one image, a box of a pixel and one of no size": (
        ((64, 64),),
        targets((2,), side=torch.tensor([[1 / 64], [0.0]])),
    ),
}


@pytest.fixture(scope="module", params=distinct(CASES), ids="-".join)
def case(request: pytest.FixtureRequest) -> Stack:
    """The tests of one stack run one after another."""
    found: Stack = request.param
    return found


@pytest.fixture(scope="module")
def model(case: Stack) -> TrainableDetector:
    """As built. What changes it restores it."""
    return make(*case)


class Plain(NamedTuple):
    """A detector without schemes, as built. What changes it restores it."""

    detector: Detector
    flops: int
    output: Tensor


@pytest.fixture(scope="module")
def plain(case: Stack) -> Plain:
    """That of this stack's recipe."""
    return build_plain(recipe_of(*case).with_schemes(["none"]).model_dump_json())


@lru_cache(maxsize=2)  # several stacks have the same
def build_plain(recipe: str) -> Plain:
    detector = build(Recipe.model_validate_json(recipe), CLASSES).detector
    return Plain(detector, *count_flops(detector))


class Trained(NamedTuple):
    """What a model came to after a step on each of the batches above."""

    sizes: dict[str, dict[str, float]]  # of each parameter's gradient, by batch
    detector: dict[str, Tensor]  # its weights
    flops: int
    output: Tensor


@pytest.fixture(scope="module")
def trained(model: TrainableDetector) -> Trained:
    with restored(model):
        sizes = {
            what: train_on(model, images(sizes), truth, what)
            for what, (sizes, truth) in BATCHES.items()
        }
        weights = {key: value.clone() for key, value in model.detector.state_dict().items()}
        return Trained(sizes, weights, *count_flops(model.detector))


def train_on(
    model: TrainableDetector, batch: ImageBatch, truth: Targets, what: str
) -> dict[str, float]:
    """A step in which all is finite and all that is trained gets a gradient;
    the size of each, by name.
    """
    losses = train_step(model, batch, truth)
    bad = [k for k, v in losses.items() if not v.isfinite()]
    assert not bad, (what, bad)
    expected = {k for k, p in model.named_parameters() if p.requires_grad}
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected, (what, expected ^ gradients.keys())
    sizes = torch.stack([g.abs().sum() for g in gradients.values()])
    assert sizes.isfinite().all(), what
    return dict(zip(gradients, sizes.tolist(), strict=True))


def test_schemes_do_not_change_the_detector(model: TrainableDetector, plain: Plain) -> None:
    """Neither its keys, nor its first weights, nor its output."""
    found, expected = model.detector.state_dict(), plain.detector.state_dict()
    assert list(found) == list(expected)
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key
    with torch.no_grad():
        assert torch.equal(flat(model.detector.eval()(images())), plain.output)


@torch.no_grad()
def test_blocks_are_isolated(model: TrainableDetector) -> None:
    with restored(model):
        step = begin(model)
        main = QueryBlock("main", step.queries, model.supervision)
        blocks = [main, *(b for s in model.training_schemes for b in s.extend(step).blocks)]
        together = model.detector.decode(step.memory, {b.segment: b.queries for b in blocks})
        compare(
            together["main"],
            model.detector.decode(step.memory, {main.segment: step.queries})["main"],
        )
        for block in blocks[1:]:
            seen = {
                b.segment: b.queries for b in blocks if b.name == block.name or b.name in block.sees
            }
            compare(together[block.name], model.detector.decode(step.memory, seen)[block.name])


def test_any_batch_is_finite_and_trains_the_same_parameters(trained: Trained) -> None:
    # An all-zero gradient everywhere would satisfy the rest.
    assert [what for what, sizes in trained.sizes.items() if not any(sizes.values())] == []


def test_every_parameter_matters(case: Stack, model: TrainableDetector) -> None:
    """On a usual batch, after the heads have left their zero start,
    no parameter's gradient is zero throughout.
    """
    with restored(model):
        with torch.no_grad():
            for p in model.parameters():
                p += 0.02 * torch.randn_like(p)
        sizes = train_on(model, images(((64, 96), (64, 80))), targets((3, 4)), "usual")
    idle = {key for key, size in sizes.items() if size == 0}
    # Its queries have contents from the start
    filled = any(scheme.name == "co" for scheme in model.training_schemes)
    assert idle == (set() if filled else reads_only_zeros(small(case[0]).detector))


def reads_only_zeros(detector: DetectorConfig) -> set[str]:
    """A projection of contents alone,
    in the first layer of a detector whose contents start at 0, cannot learn.
    """
    zero = detector.queries.kind in ("learned", "anchors") and detector.queries.content == "zero"
    zero = zero and detector.cross_attention.kind in ("conditional", "semantic")
    return {"detector.decoder.layers.0.self_attention.content.weight"} if zero else set()


@torch.no_grad()
def test_no_scheme_is_in_the_detector(trained: Trained, plain: Plain) -> None:
    """After training, too, it needs the multiply-adds of one without schemes,
    and says the same with equal weights.
    """
    assert trained.flops == plain.flops
    with restored(plain.detector):
        fill(plain.detector, trained.detector)
        assert torch.equal(trained.output, flat(plain.detector.eval()(images())))


class MultiplyAdds(TorchDispatchMode):
    """Counts as torch's own counter does,
    which also keeps the modules apart and takes three times as long.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


@torch.no_grad()
def count_flops(detector: Detector) -> tuple[int, Tensor]:
    """And the output. Nothing of the detector is trained afterwards."""
    detector.eval().requires_grad_(False)
    with MultiplyAdds() as counter:
        output = flat(detector(images()))
    return counter.total, output
