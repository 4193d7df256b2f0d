"""Random transformers models to ours and back: equal outputs, with padding in the batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from detrellis.data.classes import ClassMap
from detrellis.errors import UserError
from detrellis.interop.convert import save_huggingface
from detrellis.interop.huggingface import config_of, recipe_of
from detrellis.interop.load import load_foreign
from detrellis.recipes import Recipe, find_recipe
from detrellis.recipes.network import build_detector
from detrellis.types import ImageBatch

from ..small import CLASSES, resized, small, with_own_backbone

transformers = pytest.importorskip("transformers")

RESNET18 = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
SIZES: dict[str, dict[str, Any]] = {
    "small": {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 7, "num_labels": 4},
    "deep": {"encoder_layers": 3, "decoder_layers": 4, "num_queries": 12, "num_labels": 9},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "detr": ("Detr", {}),
    "conditional": ("ConditionalDetr", {}),
    "dab": ("DabDetr", {}),
    "dab with patterns": ("DabDetr", {"num_patterns": 3}),
    "deformable": ("DeformableDetr", {}),
    "deformable refine": ("DeformableDetr", {"with_box_refine": True}),
    "deformable two-stage": (
        "DeformableDetr",
        {"with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 9},
    ),
    "deformable on one level": ("DeformableDetr", {"num_feature_levels": 1}),
}


def make(kind: str, size: str, backbone: str, **changes: Any) -> Any:
    """A transformers model with every parameter random, and running statistics too."""
    name, options = MODELS[kind]
    width = {"small": 32, "deep": 64}[size]
    options = options | SIZES[size] | {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0}
    options |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    options |= {"hidden_size" if name == "DabDetr" else "d_model": width}
    if backbone == "native":
        maps = name == "DeformableDetr" and options.get("num_feature_levels", 4) > 1
        stages = ["stage2", "stage3", "stage4"] if maps else ["stage4"]
        options["backbone_config"] = transformers.ResNetConfig(**RESNET18, out_features=stages)
    elif backbone == "dilated":
        options["dilation"] = True
    options |= changes
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForObjectDetection")(
        getattr(transformers, f"{name}Config")(**options)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point() and "backbone" not in key:
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def batch() -> tuple[Tensor, Tensor]:
    """Two images, the second padded."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.zeros(2, 3, 128, 160)
    padding = torch.ones(2, 128, 160, dtype=torch.bool)
    for i, (height, width) in enumerate(((128, 160), (96, 128))):
        pixels[i, :, :height, :width] = torch.randn(3, height, width, generator=generator)
        padding[i, :height, :width] = False
    return pixels, padding


@torch.no_grad()
def outputs(model: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    pixels, padding = batch()
    out = model.to(dtype)(pixels.to(dtype), pixel_mask=(~padding).long())
    return out.logits, out.pred_boxes


@torch.no_grad()
def our_outputs(folder: Path, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    found = load_foreign(folder)
    # A stage behind the last one that is read
    assert all("backbone" in name for name in found.skipped)
    detector = build_detector(found.recipe.detector, len(found.classes)).eval()
    detector.load_state_dict(dict(found.weights))
    pixels, padding = batch()
    out = detector.to(dtype)(ImageBatch(pixels.to(dtype), padding))
    return out.logits[0], out.boxes[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", MODELS)
def test_round_trip(kind: str, size: str, tmp_path: Path) -> None:
    backbone = {"small": "native", "deep": "timm"}[size]
    theirs = make(kind, size, backbone)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = outputs(theirs, torch.float32)
    for actual, wanted in zip(
        our_outputs(tmp_path / "theirs", torch.float32), expected, strict=True
    ):
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)

    found = load_foreign(tmp_path / "theirs")
    save_huggingface(tmp_path / "back", found.weights, found.recipe, found.classes)
    back, report = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for actual, wanted in zip(outputs(back.eval(), torch.float32), expected, strict=True):
        torch.testing.assert_close(
            actual, wanted, atol=1e-4 if backbone == "native" else 0, rtol=1e-4
        )
    assert back.config.id2label == theirs.config.id2label


SETTINGS: list[tuple[str, dict[str, Any]]] = [  # valid ones that no published file has
    ("detr", {"d_model": 36}),
    ("conditional", {"d_model": 60, "encoder_attention_heads": 2}),
    ("dab", {"hidden_size": 44, "encoder_ffn_dim": 20}),
    ("deformable", {"encoder_n_points": 2, "decoder_n_points": 3}),
    (
        "deformable refine",
        {"encoder_n_points": 5, "encoder_attention_heads": 8, "decoder_ffn_dim": 24},
    ),
    ("deformable two-stage", {"encoder_n_points": 1, "decoder_n_points": 6, "num_queries": 20}),
    (
        "deformable",
        {"backbone_config": {**RESNET18, "model_type": "resnet", "out_features": ["stage4"]}},
    ),
    (
        "deformable",
        {"num_feature_levels": 2, "backbone_config": {**RESNET18, "model_type": "resnet"}},
    ),
    ("detr", {"backbone_config": {**RESNET18, "model_type": "resnet", "out_features": ["stage3"]}}),
    ("detr", {"dilation": True}),  # which their own ResNet does not read
    ("detr", {"activation_function": "gelu"}),
    ("deformable", {"activation_function": "silu"}),
    ("conditional", {"activation_function": "prelu"}),
    ("dab", {"activation_function": "relu", "random_refpoints_xy": True}),
    ("dab", {"temperature_height": 10, "temperature_width": 10}),
    ("detr", {"attention_dropout": 0.1, "activation_dropout": 0.1, "encoder_layerdrop": 0.1}),
]


@pytest.mark.parametrize(("kind", "changes"), SETTINGS)
def test_unusual_settings_give_equal_outputs_there_and_back(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    theirs = make(kind, "small", "native", **changes)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = outputs(theirs, torch.float32)
    for actual, wanted in zip(
        our_outputs(tmp_path / "theirs", torch.float32), expected, strict=True
    ):
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)
    found = load_foreign(tmp_path / "theirs")
    save_huggingface(tmp_path / "back", found.weights, found.recipe, found.classes)
    back, report = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for actual, wanted in zip(outputs(back.eval(), torch.float32), expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


# What each field of their configurations is to a detector of ours.
# A size, or a part that ours have too.
READ = """
    activation_function backbone_config d_model hidden_size dilation dropout num_queries num_patterns num_feature_levels
    encoder_layers encoder_ffn_dim encoder_attention_heads encoder_n_points temperature_height temperature_width
    decoder_layers decoder_ffn_dim decoder_attention_heads decoder_n_points two_stage two_stage_num_proposals
    with_box_refine
"""
REFUSED = {  # with any value but the one that ours stand for
    "num_channels": 4,
    "position_embedding_type": "learned",
    "keep_query_pos": True,
    "normalize_before": True,
    "sine_position_embedding_scale": 3.0,
    "query_dim": 2,
}
# Changes no prediction.
TRAINING = """
    attention_dropout activation_dropout encoder_layerdrop decoder_layerdrop init_std init_xavier_std auxiliary_loss
    class_cost bbox_cost giou_cost mask_loss_coefficient dice_loss_coefficient cls_loss_coefficient eos_coefficient
    bbox_loss_coefficient giou_loss_coefficient focal_alpha random_refpoints_xy initializer_bias_prior_prob
    return_intermediate disable_custom_kernels tie_word_embeddings is_encoder_decoder max_position_embeddings
"""


@pytest.mark.parametrize("name", ["Detr", "ConditionalDetr", "DabDetr", "DeformableDetr"])
def test_every_field_of_a_configuration_is_known(name: str) -> None:
    """A newer transformers with another field fails here:
    it has to be read, refused, or of training alone.
    """
    config = getattr(transformers, f"{name}Config")
    common = set(transformers.PreTrainedConfig().to_dict())
    own = set(config().to_dict()) - common - {"model_type"}
    assert own - {*READ.split(), *REFUSED, *TRAINING.split()} == set()
    plain = config().to_dict()
    recipe_of(plain)
    for field, value in REFUSED.items():
        if field in own:
            with pytest.raises(UserError, match=field):
                recipe_of(plain | {field: value})


# Whatever the model is in, they compute DAB-DETR's softmax and two-stage proposals' positions in
# float32.
@pytest.mark.parametrize(
    "kind", [k for k in MODELS if not k.startswith("dab") and "two-stage" not in k]
)
def test_equal_in_double_precision(kind: str, tmp_path: Path) -> None:
    theirs = make(kind, "small", "native")
    theirs.save_pretrained(tmp_path / "theirs")
    for actual, wanted in zip(
        our_outputs(tmp_path / "theirs", torch.float64), outputs(theirs, torch.float64), strict=True
    ):
        torch.testing.assert_close(actual, wanted, atol=1e-8, rtol=0)


def test_distinct_class_heads_stay_distinct(tmp_path: Path) -> None:
    """With box refinement transformers ties the class heads of all layers,
    unless the file holds each of them.
    """
    recipe = with_own_backbone("deformable_detr_r50_refine")
    compare_with_theirs(recipe, tmp_path)


@pytest.mark.parametrize(
    "name", ["detr_r50_dc5", "conditional_detr_r50_dc5", "dab_detr_r50_dc5", "dn_detr_r50"]
)
def test_ours_in_transformers(name: str, tmp_path: Path) -> None:
    """Dilated backbones, and DN-DETR's shared content, which becomes DAB-DETR's one pattern."""
    compare_with_theirs(with_own_backbone(name), tmp_path)


@torch.no_grad()
def compare_with_theirs(recipe: Recipe, folder: Path) -> None:
    torch.manual_seed(0)
    detector = build_detector(recipe.detector, CLASSES).eval()
    for p in detector.parameters():
        p += 0.05 * torch.randn_like(p)
    classes = ClassMap(tuple(range(3, 3 + CLASSES)), tuple("abcde"))
    save_huggingface(folder / "out", detector.state_dict(), recipe, classes)
    theirs, report = transformers.AutoModelForObjectDetection.from_pretrained(
        folder / "out", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert theirs.config.id2label == dict(enumerate("abcde"))
    pixels, padding = batch()
    ours = detector(ImageBatch(pixels, padding))
    logits, boxes = outputs(theirs.eval(), torch.float32)
    torch.testing.assert_close(ours.logits[0], logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.boxes[0], boxes, atol=1e-4, rtol=1e-4)
    again = load_foreign(folder / "out")
    assert again.classes == ClassMap(tuple(range(3, 3 + CLASSES)), tuple("abcde"))


def test_names_in_memory_load_too(tmp_path: Path) -> None:
    theirs = make("conditional", "small", "native")
    theirs.config.save_pretrained(tmp_path)
    save_file(
        {k: v.clone() for k, v in theirs.state_dict().items()}, tmp_path / "model.safetensors"
    )
    for actual, wanted in zip(
        our_outputs(tmp_path, torch.float32), outputs(theirs, torch.float32), strict=True
    ):
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


def test_shards(tmp_path: Path) -> None:
    theirs = make("detr", "small", "native")
    theirs.save_pretrained(tmp_path, max_shard_size="10MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for actual, wanted in zip(
        our_outputs(tmp_path, torch.float32), outputs(theirs, torch.float32), strict=True
    ):
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


def test_auxiliary_losses_do_not_change_predictions(tmp_path: Path) -> None:
    """transformers feeds normed states to the next layer then;
    the reference, and every published weight, does not.
    """
    theirs = make("detr", "small", "native")
    theirs.save_pretrained(tmp_path)
    expected = outputs(theirs, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"auxiliary_loss": True}))
    for actual, wanted in zip(our_outputs(tmp_path, torch.float32), expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detr")
    make("detr", "small", "native").save_pretrained(folder)
    return folder


def broken(saved: Path, to: Path, **config: Any) -> Path:
    shutil.copytree(saved, to)
    old = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(old | config))
    return to


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "yolos"}, "model_type 'yolos'"),
        ({"position_embedding_type": "learned"}, "position_embedding_type='learned'"),
        ({"decoder_layers": 3}, r"layers\.2\..* is missing"),
        ({"d_model": 64}, "has the shape"),
        ({"encoder_ffn_dim": 64}, "has the shape"),
        ({"activation_function": "mish"}, "activation_function='mish'"),
        (
            {"d_model": 30, "encoder_attention_heads": 4},
            "width=30 is not a multiple of decoder.heads=4",
        ),
        ({"backbone_config": {"model_type": "swin"}}, "backbone_config 'swin'"),
        (
            {"backbone_config": {"model_type": "timm_backbone", "output_stride": 8}},
            "output_stride=8",
        ),
        ({"num_queries": "many"}, r"queries\.count"),
        ({"encoder_layers": None}, r"encoder\.layers"),
        ({"id2label": ["a", "b"]}, "malformed"),
        ({"backbone_config": "resnet50"}, "malformed"),
        ({"backbone_config": {"model_type": "resnet", "depths": [1, 1, 1, 1]}}, "backbone"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(
    change: dict[str, Any], message: str, saved: Path, tmp_path: Path
) -> None:
    folder = broken(saved, tmp_path / "broken", **change)
    with pytest.raises(UserError, match=message) as error:
        load_foreign(folder)
    assert str(folder) in str(error.value)


def test_broken_files_are_named(saved: Path, tmp_path: Path) -> None:
    folder = broken(saved, tmp_path / "broken")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors: not a whole"):
        load_foreign(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load_foreign(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: malformed JSON"):
        load_foreign(folder)
    with pytest.raises(UserError, match="no such file"):
        load_foreign(tmp_path / "nowhere")


def test_detectors_that_transformers_lacks_are_refused(tmp_path: Path) -> None:
    recipe = small("tiny")
    weights = build_detector(recipe.detector, 2).state_dict()
    with pytest.raises(UserError, match="no such model"):
        save_huggingface(tmp_path / "out", weights, recipe, ClassMap((0, 1), ("a", "b")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            "deformable-detr-r50",
            "detector.decoder.cross_first=true",
            r"decoder\.cross_first=True, theirs is False",
        ),
        ("deformable-detr-r50-refine", "detector.decoder.relation=true", r"decoder\.relation"),
        ("rtdetr-r18", "detector.decoder.cross_first=true", r"decoder\.cross_first"),
        ("lwdetr-tiny", "detector.decoder.cross_first=true", r"decoder\.cross_first"),
        ("deformable-detr-r50", "detector.masks={width: 64}", r"masks|no such model"),
    ],
)
def test_parts_that_their_model_lacks_are_refused_by_name(
    name: str, change: str, said: str
) -> None:
    recipe = find_recipe(name)
    assert config_of(recipe, {0: "a"})
    with pytest.raises(UserError, match=said):
        config_of(recipe.override(change), {0: "a"})


def test_the_hub_is_asked_for_by_name(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.append(repository)
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert len(load_foreign("hf:org/name").classes) == 4
    assert asked == ["org/name"]

    def unreachable(repository: str, allow_patterns: list[str]) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(UserError, match="hf:org/name cannot be fetched"):
        load_foreign("hf:org/name")


def test_empty_proposals_compete_as_in_transformers(tmp_path: Path) -> None:
    """Where the head ranks an empty memory first,
    theirs selects tokens that can propose nothing: so has ours to.
    """
    theirs = make("deformable two-stage", "small", "native")
    with torch.no_grad():
        empty = theirs.model.enc_output_norm(theirs.model.enc_output.bias)
        for heads in (theirs.class_embed, theirs.model.decoder.class_embed):
            heads[-1].weight[0] = empty
    theirs.save_pretrained(tmp_path)
    expected = outputs(theirs, torch.float32)
    actual = our_outputs(tmp_path, torch.float32)
    torch.testing.assert_close(actual[0], expected[0], atol=1e-4, rtol=1e-4)
    found = load_foreign(tmp_path)
    plain = resized(found.recipe.detector, queries={"empty_compete": False})
    detector = build_detector(plain, len(found.classes)).eval()
    detector.load_state_dict(dict(found.weights))
    with torch.no_grad():
        assert not torch.allclose(detector(ImageBatch(*batch())).logits[0], expected[0], atol=1e-2)


def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    """Without box refinement one head serves all layers;
    a file whose layers differ belongs to another model.
    """
    theirs = make("deformable", "small", "native")
    theirs.config.save_pretrained(tmp_path)
    weights = {k: v.clone() for k, v in theirs.state_dict().items()}
    weights["class_embed.1.weight"] = weights["class_embed.1.weight"] + 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"class_embed\.0\.weight and class_embed\.1\.weight differ"
    ):
        load_foreign(tmp_path)
