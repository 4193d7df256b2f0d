"""The training step with schemes of every seam."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from detrellis.recipes.build import build
from detrellis.schemes.base import Extension, QueryBlock, Step, TrainingScheme
from detrellis.supervision import Supervision
from detrellis.training import TrainableDetector
from detrellis.types import DecoderOutput, Queries

from .small import CLASSES, images, small, targets


class Copies(TrainingScheme):
    """Three copies of the main queries, which must teach exactly what the main ones teach."""

    name = "copies"

    def extend(self, step: Step) -> Extension:
        queries = Queries(*(None if t is None else t.repeat(1, 3, 1) for t in step.queries))
        return Extension([QueryBlock("copies", queries, step.supervision, copies=3)])


class Louder(TrainingScheme):
    """Another supervision, and a loss with a parameter of its own."""

    name = "louder"

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def supervision(self, base: Supervision) -> Supervision:
        return Supervision(base.assign, base.rule, {k: 10 * v for k, v in base.weights.items()})

    def extend(self, step: Step) -> Extension:
        return Extension([], {"louder/states": self.scale * step.memory.tokens.square().mean()})


def losses_with(
    *schemes: TrainingScheme,
    name: str = "tiny",
    sizes: tuple[int, ...] = (2, 3),
    done: float = 0.0,
) -> dict[str, Tensor]:
    plain = build(small(name, ["none"]), CLASSES)
    mode = plain.proposal_targets
    model = TrainableDetector(
        plain.detector, schemes, plain.supervision, proposal_targets=mode
    ).eval()
    model.progress(done)
    out: dict[str, Tensor] = model(images(), targets(sizes)).losses
    return out


@pytest.mark.parametrize("sizes", [(2, 3), (0, 1), (0, 0)])
@pytest.mark.parametrize("name", ["tiny", "deformable_detr_r50", "deformable_detr_r50_two_stage"])
def test_identical_copies_teach_what_one_does(name: str, sizes: tuple[int, ...]) -> None:
    found = losses_with(Copies(), name=name, sizes=sizes)
    boxes = max(sum(sizes), 1)
    for key in [k for k in found if k.startswith("main/")]:
        # The sum over three copies is divided by three times the boxes, but by no less than one.
        expected = found[key] * 3 * boxes / max(3 * sum(sizes), 1)
        torch.testing.assert_close(
            found[key.replace("main", "copies")], expected, atol=1e-5, rtol=1e-5
        )


def test_a_scheme_may_change_supervision_and_add_losses() -> None:
    plain, louder = losses_with(), losses_with(Louder())
    for key in [k for k in plain if k.startswith("main/")]:
        torch.testing.assert_close(louder[key], 10 * plain[key])
    assert louder["louder/states"] > 0
    assert "schemes/idle" in louder
    assert "schemes/idle" not in plain


def test_a_scheme_is_left_out_when_its_time_has_passed() -> None:
    """To the bit: what is left is the training without it."""
    plain = losses_with()
    for until, done, active in ((0.5, 0.49, True), (0.5, 0.5, False), (1.0, 0.99, True)):
        louder, copies = Louder(), Copies()
        louder.until = copies.until = until
        found = losses_with(louder, copies, done=done)
        assert ("louder/states" in found) == ("copies/class/0" in found) == active, (until, done)
        if not active:
            # Its parameters still have gradients, or the processes of a run would wait for them.
            assert found.pop("schemes/idle") == 0
            assert found.keys() == plain.keys()
            assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_a_recipe_says_when_a_scheme_is_switched_off() -> None:
    recipe = small("tiny", ["none", "group=2@0.5", "co=atss@0.25"])
    model = build(recipe, CLASSES).eval()
    for done, trained in ((0.2, {"group", "co_atss"}), (0.3, {"group"}), (0.6, set())):
        model.progress(done)
        names = {name.split("/")[0] for name in model(images(), targets((2, 3))).losses}
        assert names & {"group", "co_atss"} == trained


def test_a_scheme_that_finds_nothing_to_do_gets_gradients_of_zero() -> None:
    """Whatever its parameters are: they are not read."""
    louder = Louder()
    louder.scale = nn.Parameter(torch.tensor(torch.inf))
    idle = losses_with(louder)["schemes/idle"]
    assert idle == 0
    idle.backward()
    assert torch.equal(louder.scale.grad, torch.tensor(0.0))


def test_the_denoising_block() -> None:
    model = build(small("tiny"), CLASSES)
    step = model.begin(images(), targets((2, 4)))
    (block,) = model.training_schemes[0].extend(step).blocks
    assert (block.name, block.copies, block.sees) == ("cdn", 25, ("main",))
    assert block.segment.size == 25 * 2 * 4
    assert block.normaliser == 25 * 6
    assert block.supervision.rule is model.supervision.rule
    outputs = [
        model.detector.decode(
            step.memory,
            {block.segment: block.queries, QueryBlock("main", q, model.supervision).segment: q},
        )
        for q in (step.queries, step.queries._replace(content=step.queries.content + 1))
    ]
    assert not torch.allclose(outputs[0]["cdn"].logits, outputs[1]["cdn"].logits)


def test_objectness_teaches_every_token_and_classes_the_selected_ones() -> None:
    for name, tokens in (("deformable_detr_r50_two_stage", True), ("tiny", False)):
        plain = build(small(name, ["none"]), CLASSES)
        seen = []

        def spy(
            output: DecoderOutput, *rest: object, seen: list[object] = seen
        ) -> dict[str, Tensor]:
            seen.append((output.logits.shape[2], rest[0].labels.max().item()))  # type: ignore[attr-defined]
            return {"class": output.logits.sum((1, 2, 3))}

        spied = Supervision(plain.supervision.assign, spy, {"class": 1.0})
        model = TrainableDetector(
            plain.detector, (), spied, proposal_targets=plain.proposal_targets
        ).eval()
        model(images(), targets((2, 3)))
        count, label = seen[-1]  # type: ignore[misc]
        assert (count > 12) == tokens
        assert (label == 0) == tokens


def test_two_schemes_draw_from_seeds_of_their_own() -> None:
    class Other(Copies):
        name = "other"

    model = TrainableDetector(build(small("tiny", ["none"]), CLASSES).detector, [Copies(), Other()])
    model.reseed(3)
    first, second = (torch.rand(4, generator=s.generator) for s in model.training_schemes)
    assert not torch.equal(first, second)
    model.reseed(3)
    assert torch.equal(first, torch.rand(4, generator=model.training_schemes[0].generator))
