"""Maps and curves on cases made by hand,
attention against its definition, and the whole analysis on small runs.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from detrellis.analysis.attention_maps import recorded, token_weights
from detrellis.analysis.discriminability import (
    Curve,
    DiscriminabilityResult,
    Of,
    RunDiscriminability,
    ScoredImage,
    analyze,
    draw,
    feature_score,
    foreground,
    fractions_above,
)
from detrellis.analysis.measurements import save
from detrellis.analysis.pictures import Picture, attention_score, levels
from detrellis.distributed import World
from detrellis.engine.evaluate import EvalOptions
from detrellis.errors import UserError
from detrellis.loading import open_split
from detrellis.nn.attention import DenseAttention
from detrellis.nn.conditional import ConditionalCrossAttention
from detrellis.nn.deformable import DeformableAttention
from detrellis.types import Memory, Spatial

from .runs import compared, small_recipe, untrained

HERE = World(0, 1, torch.device("cpu"))
STEPS = torch.arange(5) / 4


def test_a_level_is_resized_then_divided_by_its_maximum() -> None:
    two, one = torch.tensor([[0.0, 8.0]]), torch.tensor([[3.0]])
    assert feature_score([two], (1, 4)).tolist() == [[0, 0.25, 0.75, 1]]
    assert feature_score([two], (1, 1)).tolist() == [[1]]  # the maximum of what is left of it
    assert feature_score([two, one], (2, 4)).tolist() == [[0.5, 0.625, 0.875, 1]] * 2
    assert feature_score([two * 0], (1, 4)).tolist() == [[0] * 4]


def test_levels_count_as_much_as_they_are_attended_to() -> None:
    fine, coarse = torch.tensor([[0.5, 0.0], [0.0, 0.0]]), torch.tensor([[0.5]])
    # On four pixels: a fourth of the coarse level's half each, and the fine level's half on one.
    torch.testing.assert_close(
        attention_score([fine, coarse], (2, 2)), torch.tensor([[1, 0.2], [0.2, 0.2]])
    )
    assert attention_score([fine], (2, 2)).tolist() == [[1, 0], [0, 0]]
    assert attention_score([fine * 0, coarse * 0], (2, 2)).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([[1, 0, 3, 2]], [[0, 1, 1], [0, 1, 1]]),
        ([[0.5, 0.5, 2.5, 2.0]], [[0, 0, 0], [0, 1, 0]]),  # a centre on the edge is not inside
        ([[0.6, 0.6, 1.4, 1.4]], [[0, 0, 0], [0, 0, 0]]),  # no pixel's centre
        ([[-5, -5, 1, 1], [2, 1, 9, 9]], [[1, 0, 0], [0, 0, 1]]),
        ([[0, 0, 2, 2], [1, 0, 3, 2]], [[1, 1, 1], [1, 1, 1]]),
        ([], [[0, 0, 0], [0, 0, 0]]),
    ],
)
def test_foreground_is_pixel_centres_strictly_inside(
    boxes: list[list[float]], expected: list[list[int]]
) -> None:
    assert foreground(torch.tensor(boxes).view(-1, 4), (2, 3)).int().tolist() == expected


def test_shares_are_strictly_above() -> None:
    score, where = torch.tensor([[0.0, 0.25, 0.5, 1.0]]), torch.tensor([[True, True, True, False]])
    assert fractions_above(score, where, STEPS).tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0, 0])
    assert fractions_above(score, ~where, STEPS).tolist() == [1, 1, 1, 1, 0]
    assert fractions_above(score, where & ~where, STEPS).isnan().all()


def test_the_area_is_the_chance_that_an_object_scores_higher() -> None:
    """Of a random pixel of it than a random one of the background, a tie counting half."""
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(20, 20, generator=generator)
    inside = torch.rand(20, 20, generator=generator) > 0.7
    score = (score + 0.3 * inside).clamp(max=1) * (score > 0.2)  # some are 0, some are 1
    thresholds = torch.arange(2**16 + 1) / 2**16
    shares = torch.stack([fractions_above(score, part, thresholds) for part in (inside, ~inside)])
    curve = Curve.of(thresholds, shares)
    more = (score[inside][:, None] > score[~inside]).double() + 0.5 * (
        score[inside][:, None] == score[~inside]
    )
    assert curve.area == pytest.approx(float(more.mean()), abs=1e-4)
    inverted = torch.stack(
        [fractions_above(1 - score, part, thresholds) for part in (inside, ~inside)]
    )
    assert Curve.of(thresholds, inverted).area == pytest.approx(1 - curve.area, abs=1e-4)

    assert 50 < len(curve.iof) <= 101
    assert (curve.iof[-1], curve.iob[-1]) == (0, 0)
    assert list(curve.iob) == sorted(curve.iob, reverse=True)
    rows = (torch.tensor(curve.thresholds) * 2**16).long()
    assert torch.equal(shares[:, rows], torch.tensor([curve.iof, curve.iob], dtype=torch.float64))


def test_maps_that_know_all_or_nothing() -> None:
    known = torch.tensor([[1.0, 1, 1, 1, 0], [0.0, 0, 0, 0, 0]])
    assert Curve.of(STEPS, known).area == 1
    assert Curve.of(STEPS, known.flip(0)).area == 0
    assert Curve.of(STEPS, torch.zeros(2, 5)).area == 0.5  # 0 everywhere: above no threshold
    narrow = Curve.of(STEPS, torch.tensor([[1.0, 1, 1, 1, 0]] * 2))
    assert (narrow.area, narrow.thresholds) == (0.5, (0, 1))


def memory(padded: bool) -> Memory:
    """Two images on two levels; of the second one,
    the last row and column are padding on the finer.
    """
    tokens, position = torch.randn(2, 26, 16), torch.randn(2, 26, 16)
    masks = [torch.zeros(2, 4, 5, dtype=torch.bool), torch.zeros(2, 2, 3, dtype=torch.bool)]
    masks[0][1, 3:], masks[0][1, :, 4:], masks[1][1, :, 2:] = True, True, True
    ratios = torch.tensor([[[1, 1], [1, 1]], [[4 / 5, 3 / 4], [2 / 3, 1]]])
    flat = torch.cat([m.flatten(1) for m in masks], 1)
    return Memory(tokens, position, ((4, 5), (2, 3)), *((flat, ratios) if padded else (None, None)))


def test_levels_are_maps_without_padding() -> None:
    values = torch.arange(26.0)
    assert [m.shape for m in levels(values, memory(False), 1)] == [(4, 5), (2, 3)]
    fine, coarse = levels(values, memory(True), 1)
    assert fine.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8], [10, 11, 12, 13]]
    assert coarse.tolist() == [[20, 21], [23, 24]]
    assert [m.shape for m in levels(values, memory(True), 0)] == [(4, 5), (2, 3)]


def attentions(heads: int) -> dict[str, tuple[nn.Module, str]]:
    """Each kind with random weights, and the name of its output projection."""
    torch.manual_seed(0)
    deformable = DeformableAttention(16, heads, 2, 3)
    for layer in (deformable.sampling_offsets, deformable.attention_weights):
        nn.init.normal_(layer.weight, std=0.3)
    conditional = ConditionalCrossAttention(16, heads, first=True)
    kinds = [
        (deformable, "output_projection"),
        (DenseAttention(16, heads), "output"),
        (conditional, "output"),
    ]
    return dict(zip(("deformable", "dense", "conditional"), kinds, strict=True))


def values(attention: nn.Module, memory: Memory) -> Tensor:
    """What the tokens contribute, `(B, S, D)`."""
    if isinstance(attention, DeformableAttention):
        found = attention.value_projection(memory.tokens)
        out: Tensor = (
            found if memory.padding is None else found.masked_fill(memory.padding[..., None], 0)
        )
        return out
    if isinstance(attention, DenseAttention):
        weight, bias = attention.projections.weight, attention.projections.bias
        return nn.functional.linear(memory.tokens, weight[32:], bias[32:])
    return attention.memory(memory.tokens)[..., 16:]  # type: ignore[no-any-return, operator]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("references", [2, 4])
@pytest.mark.parametrize("kind", ["deformable", "dense", "conditional"])
def test_weights_say_what_the_attention_reads(kind: str, references: int, padded: bool) -> None:
    """Its result is the tokens' values, each times its weight."""
    attention, output = attentions(heads=1)[kind]
    where = Spatial(torch.randn(2, 3, 16), torch.rand(2, 3, references), torch.randn(2, 3, 16))
    call, results = (torch.randn(2, 3, 16), where, memory(padded)), []
    hook = getattr(attention, output).register_forward_pre_hook(
        lambda _, inputs: results.append(inputs[0])
    )
    with torch.no_grad():
        attention(*call)
        hook.remove()
        own = values(attention, call[2])
        for query in range(3):
            weights = token_weights(
                attention, call, nn.functional.one_hot(torch.tensor([query] * 2), 3).float()
            )
            torch.testing.assert_close(
                torch.einsum("bs,bsd->bd", weights, own), results[0][:, query]
            )
            if padded:
                assert not weights[1, 15:20].any()
    assert not any(p.grad is not None for p in attention.parameters())


@pytest.mark.parametrize("kind", ["deformable", "dense", "conditional"])
def test_weights_are_sums_over_queries_and_means_over_heads(kind: str) -> None:
    attention, _ = attentions(heads=4)[kind]
    where = Spatial(
        torch.randn(2, 3, 16),
        torch.tensor([0.5, 0.5, 0.1, 0.1]).expand(2, 3, 4),
        torch.randn(2, 3, 16),
    )
    call = (torch.randn(2, 3, 16), where, memory(False))
    chosen = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    weights = token_weights(attention, call, chosen)
    assert weights.sum(1).tolist() == pytest.approx([2, 0], abs=1e-5)
    each = [
        token_weights(attention, call, nn.functional.one_hot(torch.tensor([q] * 2), 3).float())
        for q in (0, 2)
    ]
    torch.testing.assert_close(weights[0], sum(each)[0])  # type: ignore[index]


def test_what_an_unknown_attention_attends_to_is_not_guessed() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor, where: Spatial, memory: Memory) -> Tensor:
            return x

    call = (torch.randn(2, 3, 16), Spatial(torch.randn(2, 3, 16)), memory(False))
    with pytest.raises(
        UserError, match=r"what Other attends to cannot be read off it\s+Compare .* --of encoder"
    ):
        token_weights(Other(), call, torch.ones(2, 3))


def test_recording_ends_with_its_context() -> None:
    layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    with recorded(layers) as calls:
        for layer in reversed(layers):
            layer(torch.zeros(1, 2))
    layers[0](torch.zeros(1, 2))
    assert len(calls) == 2
    assert not any(layer._forward_pre_hooks for layer in layers)


@pytest.fixture(scope="module")
def runs(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ("tiny", "detr-r50", "conditional-detr-r50")
    place = tmp_path_factory.mktemp("discriminability")
    return {name: untrained(place / name, shapes, small_recipe(name)) for name in names}


@pytest.mark.parametrize("of", ["encoder", "attention"])
def test_the_whole_analysis(of: Of, runs: dict[str, Path], tmp_path: Path) -> None:
    result = analyze(compared(list(runs.values()), names=["[bold]", "$x", "c"]), of=of, images=2)
    for run in result.runs:
        assert (run.images, run.skipped) == (5, 0)
        assert 0 < run.curve.area < 1
        assert [e.row for e in run.examples] == [0, 1]
        # Without padding
        assert all(e.score.shape == e.picture.pixels.shape[:2] == (64, 64) for e in run.examples)
        assert all(e.score.min() >= 0 and e.score.max() <= 1 for e in run.examples)
    files = save(result, tmp_path / "new" / "folder")
    written = json.loads(files.values.read_text())
    assert written == result.to_dict()
    assert written["settings"] == {"of": of, "split": "val", "steps": 2**16}
    assert [r["name"] for r in written["runs"]] == ["[bold]", "$x", "c"]
    assert written["runs"][0].keys() >= {"area", "iof", "iob", "thresholds", "images", "skipped"}
    assert files.figure.stat().st_size > 10_000
    assert result.table().row_count == 3


@pytest.mark.parametrize("of", ["encoder", "attention"])
def test_batches_change_nothing(of: Of, runs: dict[str, Path]) -> None:
    one, other = (analyze(compared(runs["tiny"], batch_size=n), of=of).runs[0] for n in (1, 4))
    assert one.curve.area == pytest.approx(other.curve.area, abs=1e-3)
    torch.testing.assert_close(one.examples[3].score, other.examples[3].score, atol=1e-4, rtol=0)


def test_the_maps_are_of_the_encoders_output(runs: dict[str, Path]) -> None:
    found = analyze(compared(runs["conditional-detr-r50"], batch_size=1)).runs[0].examples
    with open_split(
        runs["conditional-detr-r50"], HERE, EvalOptions(workers=0, batch_size=1)
    ) as opened:
        for batch, example in zip(opened.loader, found, strict=False):
            with torch.no_grad():
                encoded = opened.model.detector.encode(batch.images)
            norms = encoded.tokens[0].norm(dim=-1).view(4, 4)
            score = nn.functional.interpolate(norms[None, None], (64, 64), mode="bilinear")[0, 0]
            torch.testing.assert_close(example.score, score / score.max(), atol=1e-5, rtol=0)


def test_images_without_boxes_are_left_out(
    runs: dict[str, Path], shapes: Path, tmp_path: Path
) -> None:
    source = json.loads((shapes / "annotations" / "instances_val.json").read_text())
    images, first = shapes / "images" / "val", source["images"][0]["id"]
    file = tmp_path / "val.json"

    def measured(of: Of) -> RunDiscriminability:
        file.write_text(json.dumps(source))
        return analyze(compared(runs["tiny"], val=file, val_images=images), of=of).runs[0]

    for annotation in source["annotations"]:
        annotation["iscrowd"] = int(annotation["image_id"] == first)
    for of in ("encoder", "attention"):
        found = measured(of)
        assert (found.images, found.skipped) == (4, 1)
        assert [e.row for e in found.examples] == [1, 2, 3, 4]
    for annotation in source["annotations"]:
        annotation["iscrowd"] = 1
    with pytest.raises(UserError, match=r"val.json: no image with both foreground and background"):
        measured("attention")


def test_any_number_of_pictures_can_be_drawn() -> None:
    curve = Curve.of(STEPS, torch.tensor([[1.0, 1, 0.5, 0.2, 0], [1, 0.5, 0.2, 0, 0]]))
    colours, boxes = torch.zeros(6, 8, 3).byte().numpy(), torch.tensor([[1.0, 1, 4, 5]]).numpy()
    examples = tuple(
        ScoredImage(row, Picture(colours, boxes), torch.rand(6, 8)) for row in range(3)
    )

    def run(data: str, count: int) -> RunDiscriminability:
        return RunDiscriminability("$x", "run", data, 3, 0, curve, examples[:count])

    for runs, panels in (
        ((run("a", 0),), 1),
        ((run("a", 3), run("a", 3)), 1 + 3 * 3),  # the images once
        ((run("a", 3), run("b", 2)), 1 + 4 * 3),  # other images: both
    ):
        figure = draw(DiscriminabilityResult(runs, "encoder", "val"))
        figure.draw_without_rendering()
        assert len(figure.get_axes()) == panels


def test_what_cannot_be_measured_is_said() -> None:
    for wrong, message in (
        ({"of": "decoder"}, "of='decoder'\\s+Did you mean 'encoder'"),
        ({"images": -1}, "images=-1"),
    ):
        with pytest.raises(UserError, match=message):
            analyze(compared("run"), **wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="Give one a run"):
        compared("run", names=["a", "b"])
    with pytest.raises(UserError, match="no run to measure"):
        analyze(compared([]))
