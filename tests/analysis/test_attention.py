"""Weights and points of every kind of cross-attention, and the analysis on small runs."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from detrellis.analysis import attention
from detrellis.analysis.attention import (
    AttentionResult,
    LayerAttention,
    RunAttention,
    analyze,
    draw,
    drawable,
    heated,
    layer_attention,
)
from detrellis.analysis.attention_maps import (
    RecordedAttention,
    decode_recorded,
    head_points,
    head_weights,
    recorded,
    token_weights,
)
from detrellis.analysis.measurements import save
from detrellis.api import load
from detrellis.boxes import cxcywh_to_xyxy
from detrellis.data.decode import read_image
from detrellis.detector import Detector
from detrellis.errors import UserError
from detrellis.nn.attention import DenseAttention
from detrellis.nn.deformable import DeformableAttention
from detrellis.recipes.build import build
from detrellis.types import DecoderOutput, Memory, Spatial

from ..small import images
from .runs import compared, small_recipe, untrained

KINDS = {
    "dense": "detr-r50",
    "point": "conditional-detr-r50",
    "box": "dab-detr-r50",
    "semantic": "sam-detr-r50-smca",
    "levels": "sam-detr-plus-r50",
    "prior": "smca-detr-r50",
    "priors": "smca-detr-ms-r50",
    "deformable": "deformable-detr-r50",
    "proposals": "tiny",
    "each level": "cascade-dino-r50",
}
SAMPLED = ("deformable", "proposals")  # what is read outside the image is lost
QUERIES, HEADS = 12, 4


class Ran(NamedTuple):
    """A detector, and what it did with two images, of whose first a third is padding."""

    kind: str
    detector: Detector
    memory: Memory
    output: DecoderOutput
    layers: list[RecordedAttention]
    references: list[Tensor | None]  # that the decoder gives each layer


@pytest.fixture(scope="module", params=KINDS)
def ran(request: pytest.FixtureRequest) -> Ran:
    detector = build(small_recipe(KINDS[request.param]), 3).detector.eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in detector.parameters():  # nothing says 0, or its bias alone
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        memory = detector.encode(images(((64, 64), (64, 96))))
        with recorded([detector.decoder.position]) as calls:  # type: ignore[list-item]
            output, layers = decode_recorded(detector, memory)
        return Ran(
            request.param, detector, memory, output, layers, [reads for _, _, _, reads, _ in calls]
        )


def chosen(query: int, value: float = 1.0) -> Tensor:
    return value * nn.functional.one_hot(torch.tensor([query] * 2), QUERIES)


def weights_of(layer: RecordedAttention, query: int) -> Tensor:
    found = head_weights(*layer, chosen(query))
    assert found is not None
    return found


def values(own: Any, memory: Memory) -> Tensor:
    """What the tokens contribute, `(B, S, D)`."""
    if hasattr(own, "attentions"):
        levels = memory.tokens.split([height * width for height, width in memory.shapes], dim=1)
        parts = zip(own.attentions, levels, strict=True)
        return torch.cat(
            [values(reader, memory._replace(tokens=tokens)) for reader, tokens in parts], dim=1
        )
    if hasattr(own, "value_projection"):
        found = own.value_projection(memory.tokens)
        assert memory.padding is not None
        return found.masked_fill(memory.padding[..., None], 0)  # type: ignore[no-any-return]
    if hasattr(own, "value"):
        return own.value(memory.tokens)  # type: ignore[no-any-return]
    if hasattr(own, "memory"):
        return own.memory(memory.tokens).chunk(2, -1)[1]  # type: ignore[no-any-return]
    return nn.functional.linear(
        memory.tokens, own.projections.weight.chunk(3)[2], own.projections.bias.chunk(3)[2]
    )


@torch.no_grad()
def test_each_head_reads_tokens_by_its_weights(ran: Ran) -> None:
    assert len(ran.layers) == 2
    for layer in ran.layers:
        own: Any = getattr(layer.attention, "attention", layer.attention)
        output: nn.Module = own.output_projection if ran.kind in SAMPLED else own.output
        results: list[Tensor] = []
        hook = output.register_forward_pre_hook(
            lambda _, inputs, results=results: results.append(inputs[0])
        )
        layer.attention(*layer.call)
        hook.remove()
        split = values(own, ran.memory).unflatten(-1, (HEADS, -1))
        for query in (0, 7):
            read = torch.einsum("bms,bsmd->bmd", weights_of(layer, query), split)
            torch.testing.assert_close(read.flatten(1), results[0][:, query], atol=1e-5, rtol=1e-4)


def central(layer: RecordedAttention) -> int:
    """The query that reads nearest to the middle of both images,
    and so samples least outside them.
    """
    references = layer.call[1].references
    return 3 if references is None else int((references[..., :2] - 0.5).abs().amax((0, 2)).argmin())


def test_weights_sum_to_one_over_valid_cells(ran: Ran) -> None:
    assert ran.memory.padding is not None
    assert ran.memory.padding[0].any()
    for layer in ran.layers:
        query = central(layer)
        found = weights_of(layer, query)
        assert found.shape == (2, HEADS, ran.memory.tokens.shape[1])
        total = found.masked_fill(ran.memory.padding[:, None], 0).sum(-1)
        if ran.kind not in SAMPLED:
            torch.testing.assert_close(total, torch.ones(2, HEADS))
            assert not found[ran.memory.padding[:, None].expand_as(found)].any()
        assert ((total > 0.2) & (total < 1 + 1e-5)).all()
        both = head_weights(*layer, chosen(query) + chosen(5))
        torch.testing.assert_close(both, found + weights_of(layer, 5))
        torch.testing.assert_close(token_weights(*layer, chosen(query)), found.mean(1))


def test_a_layer_reads_the_references_of_the_decoder(ran: Ran) -> None:
    found = [layer_attention(layer, ran.memory, 5, (8, 8)).reference for layer in ran.layers]
    if ran.kind == "dense":
        assert found == ran.references == [None, None]
        return
    for own, reads in zip(found, ran.references, strict=True):
        assert own is not None
        assert reads is not None
        torch.testing.assert_close(torch.tensor(own), reads[0, 5])
    if ran.kind in ("semantic", "levels"):  # refined, and nothing between the stream and the heads
        torch.testing.assert_close(torch.tensor(found[1]), ran.output.boxes[0, 0, 5])


def test_points_are_those_that_are_sampled(ran: Ran) -> None:
    for layer in ran.layers:
        points = head_points(*layer)
        if ran.kind in ("semantic", "levels"):
            assert points is not None
            assert points.shape == (2, QUERIES, HEADS, 1, 2)
            low, high = cxcywh_to_xyxy(layer.call[1].references)[:, :, None, None].chunk(2, -1)
            assert ((points > low) & (points < high)).all()
            assert points.std(2).min() > 0  # each head its own
        elif ran.kind in SAMPLED:
            assert points is not None
            assert points.shape == (2, QUERIES, HEADS, len(ran.memory.shapes) * 4, 2)
        else:
            assert points is None


def test_one_level_of_several_is_read_coarse_first(ran: Ran) -> None:
    found = [layer_attention(layer, ran.memory, 0, (4, 4)).level for layer in ran.layers]
    assert found == ([2, 1] if ran.kind == "levels" else [None, None])
    if ran.kind == "levels":
        fine, middle, _ = (h * w for h, w in ran.memory.shapes)
        own = weights_of(ran.layers[1], 2)
        assert not own[:, :, :fine].any()
        assert not own[:, :, fine + middle :].any()


@pytest.mark.parametrize("size", [2, 4])
def test_deformable_points_are_shares_of_the_unpadded_image(size: int) -> None:
    module = DeformableAttention(16, 2, levels=2, points=1)
    ratios = torch.tensor([[[0.5, 0.75], [0.5, 0.5]]])
    memory = Memory(
        torch.randn(1, 40, 16), torch.randn(1, 40, 16), ((4, 8), (2, 4)), valid_ratios=ratios
    )
    references = torch.tensor([0.3, 0.6, 0.2, 0.4])[:size].expand(1, 3, -1)
    with torch.no_grad():
        module.sampling_offsets.bias.copy_(torch.tensor([1.0, -0.5]).repeat(4))
    found = head_points(
        module, (torch.randn(1, 3, 16), Spatial(torch.randn(1, 3, 16), references), memory)
    )
    assert found is not None
    if size == 2:  # cells of each level: 4 x 3 and 2 x 1 of them hold image
        expected = [[0.3 + 1 / 4, 0.6 - 0.5 / 3], [0.3 + 1 / 2, 0.6 - 0.5 / 1]]
    else:
        expected = [[0.3 + 0.2 / 2, 0.6 - 0.5 * 0.4 / 2]] * 2
    torch.testing.assert_close(found, torch.tensor(expected).expand(1, 3, 2, -1, -1))


def test_maps_have_no_padding_in_them() -> None:
    """The same everywhere in the image:
    padding, which has 0, would darken the map's right and lower border.
    """
    padding = torch.zeros(1, 4, 4, dtype=torch.bool)
    padding[:, 3:], padding[:, :, 2:] = True, True
    memory = Memory(torch.ones(1, 16, 16), torch.ones(1, 16, 16), ((4, 4),), padding.flatten(1))
    call = (torch.randn(1, 3, 16), Spatial(torch.randn(1, 3, 16)), memory)
    found = layer_attention(RecordedAttention(DenseAttention(16, 2), call), memory, 1, (9, 12))
    torch.testing.assert_close(found.maps, torch.ones(2, 9, 12))
    torch.testing.assert_close(found.mean, torch.ones(9, 12))
    assert found.to_dict() == {"reference": None, "points": None, "level": None}


@pytest.fixture(scope="module")
def runs(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("attention")
    kinds = ("dense", "levels", "proposals")
    return {kind: untrained(place / kind, shapes, small_recipe(KINDS[kind])) for kind in kinds}


def first_image(shapes: Path) -> Path:
    images = json.loads((shapes / "annotations" / "instances_val.json").read_text())["images"]
    return shapes / "images" / "val" / str(images[0]["file_name"])


def test_the_whole_analysis(runs: dict[str, Path], shapes: Path, tmp_path: Path) -> None:
    result = analyze(compared(list(runs.values())))
    assert Path(result.image).samefile(first_image(shapes))
    assert np.array_equal(result.picture, read_image(first_image(shapes)).permute(1, 2, 0).numpy())
    for run in result.runs:
        assert len(run.layers) == 2
        for own in run.layers:
            assert own.maps.shape == (HEADS, 64, 64)
            assert own.mean.min() >= 0
            torch.testing.assert_close(own.mean.max(), torch.tensor(1.0))
    files = save(result, tmp_path / "new" / "folder")
    written = json.loads(files.values.read_text())
    assert written == result.to_dict()
    assert written["settings"] == {"image": result.image, "query": None}
    layers = {run["name"]: run["layers"] for run in written["runs"]}
    assert layers["dense"][0] == {"reference": None, "points": None, "level": None}
    assert [layer["level"] for layer in layers["levels"]] == [2, 1]
    assert np.shape(layers["levels"][1]["points"]) == (HEADS, 1, 2)
    assert np.shape(layers["proposals"][1]["points"]) == (HEADS, 3 * 4, 2)
    assert files.figure.stat().st_size > 10_000
    assert result.table().row_count == 3


@pytest.mark.parametrize("kind", ["dense", "levels"])
def test_the_query_is_the_one_that_predicts_best(
    kind: str, runs: dict[str, Path], shapes: Path
) -> None:
    (best,) = analyze(compared(runs[kind]), image=first_image(shapes)).runs
    found = load(runs[kind], device="cpu").predict(first_image(shapes), threshold=0)[0]
    assert best.label == found.names[0]
    assert best.score == pytest.approx(found.scores[0])
    corners = 64 * cxcywh_to_xyxy(torch.tensor(best.box))
    torch.testing.assert_close(
        corners.clamp(0, 64), torch.tensor(found.boxes[0]), atol=1e-3, rtol=0
    )
    (asked,) = analyze(compared(runs[kind]), query=best.query).runs
    assert asked.to_dict() == best.to_dict()
    (other,) = analyze(compared(runs[kind]), query=(best.query + 1) % QUERIES).runs
    assert other.query != best.query
    assert other.box != best.box
    assert other.score <= best.score


def test_what_cannot_be_drawn_is_said(
    runs: dict[str, Path], shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"query=-1\s+Give a whole number, 0 or more"):
        analyze(compared(runs["dense"]), query=-1)
    with pytest.raises(UserError, match=r"dense: no query 12\s+It has 12: take 0 to 11"):
        analyze(compared(runs["dense"]), query=12)
    with pytest.raises(UserError, match=r"nothing\.jpg: no such file"):
        analyze(compared(runs["dense"]), image=tmp_path / "nothing.jpg")
    with pytest.raises(UserError, match="tiny: no such folder or file"):
        analyze(compared("tiny"))
    with pytest.raises(UserError, match="no run to measure"):
        analyze(compared([]))
    model = dataclasses.replace(load(runs["dense"], device="cpu"), data=None)
    monkeypatch.setattr(attention, "load_trained", lambda run, device: model)
    with pytest.raises(
        UserError, match=r"hf:a/b: .*its data are not known\s+Name a picture: --image"
    ):
        analyze(compared("hf:a/b"))
    for parameter in model.detector.decoder.parameters():
        parameter.detach().fill_(torch.nan)
    with pytest.raises(UserError, match="its outputs are not finite"):
        analyze(compared("run"), image=first_image(shapes))


@pytest.mark.parametrize(
    ("size", "expected"),
    [((30, 40), (30, 40)), ((480, 10), (480, 10)), ((600, 960), (300, 480)), ((2000, 1), (480, 1))],
)
def test_large_pictures_are_drawn_smaller(size: tuple[int, int], expected: tuple[int, int]) -> None:
    picture = drawable(torch.full((3, *size), 200, dtype=torch.uint8))
    assert picture.shape == (3, *expected)
    assert picture.dtype == torch.uint8
    assert (picture == 200).all()


def test_the_more_attention_the_less_picture() -> None:
    picture = np.full((1, 3, 3), 255, dtype=np.uint8)
    nothing, some, all_of_it = heated(picture, torch.tensor([[0.0, 0.5, 1.0]]))[0]
    assert nothing.tolist() == pytest.approx([0.6] * 3)
    assert len(set(all_of_it.tolist())) == 3
    assert all_of_it.sum() > some.sum() > 0


def made_up(
    name: str, layers: int, heads: int, points: Tensor | None, reference: tuple[float, ...] | None
) -> RunAttention:
    layer = LayerAttention(reference, points, None, torch.rand(heads, 4, 6), torch.rand(4, 6))
    return RunAttention(
        name, name, "x.jpg", 0, "[class] $x", 0.5, (0.5, 0.5, 0.2, 0.2), (layer,) * layers
    )


def test_detectors_of_any_shape_are_drawn_together() -> None:
    runs = (
        made_up("$x", 1, 8, None, None),
        # A box that reaches beyond the picture
        made_up("[bold]", 6, 2, torch.rand(2, 1, 2), (1.0, 1.0, 2.0, 2.0)),
        made_up("deformable", 3, 2, 3 * torch.rand(2, 16, 2) - 1, (0.5, 0.5)),
    )
    result = AttentionResult(runs, "x.jpg", None, np.zeros((4, 6, 3), dtype=np.uint8))
    figure = draw(result)
    figure.draw_without_rendering()
    shown = [axes for axes in figure.get_axes() if axes.get_images()]
    assert len(shown) == (2 + 7 + 4) + (8 + 2 + 2)
    assert all((*axes.get_xlim(), *axes.get_ylim()) == (0, 1, 1, 0) for axes in shown)
    printed = Console(width=80, file=io.StringIO())
    printed.print(result.table())
    assert isinstance(printed.file, io.StringIO)
    assert [printed.file.getvalue().count(text) for text in ("$x ", "[bold] ", "[class] $x ")] == [
        4,
        1,
        3,
    ]
