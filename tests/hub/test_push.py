"""What `push` sends, and what `hf:org/name` loads again, without a network."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import detrellis
from detrellis.data.classes import ClassMap
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import load_weights, save_weights
from detrellis.errors import UserError
from detrellis.hub.push import push
from detrellis.predictions.model import Model

hub = pytest.importorskip("huggingface_hub")

NAMES = ("cat | <b>dog</b>", "bird\n# big", "plain")
SECRET = "/home/somebody/secret"


class Hub:
    """The part of the hub's interface that is used; it keeps what it is sent."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made, self.raises = folder, {}, None

    def create_repo(self, repository: str, **options: Any) -> None:
        if self.raises is not None:
            raise self.raises
        self.made[repository] = options

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        self.made[repo_id] |= {"message": commit_message}
        shutil.copytree(folder_path, self.folder / repo_id)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", lambda **_: made)
    return made


@pytest.fixture
def finished(model: Model, tmp_path: Path) -> Path:
    """A run whose card holds every path that one may hold, with a report."""
    data = {"kind": "coco", "folder": SECRET, "splits": {}}
    changes = [{"epoch": 1, "step": 3, "data": data}]
    paths = {
        "weights": f"{SECRET}/first",
        "boxes": f"{SECRET}/boxes",
        "backbone": f"{SECRET}/b.pth",
    }
    backbone = model.recipe.detector.backbone.model_copy(update={"weights": f"{SECRET}/b.pth"})
    recipe = model.recipe.replace(detector=model.recipe.detector.replace(backbone=backbone))
    card = Card(
        recipe, ClassMap((1, 3, 7), NAMES), data, epoch=4, step=12, stats={"AP": 0.5, "AP75": None}
    )
    run = tmp_path / "run"
    save_weights(
        run / "best.safetensors",
        model.detector.state_dict(),
        replace(card, changes=changes, **paths),
    )
    row = {"name": NAMES[0], "ap": 0.25, "ground_truth": 17}
    result = {"stats": {"AP": 0.5, "AP50": 0.75}, "ap_interval": 0.03, "per_class": [row]}
    facts = {"Data": {"Annotations": f"{SECRET}/val.json", "Images": "20, of 3 sizes"}}
    (run / "report.json").write_text(
        json.dumps({"epoch": 4, "step": 12, "result": result, "facts": facts})
    )
    return run


def test_what_is_sent(finished: Path, remote: Hub) -> None:
    done = push(finished, "hf:my-org/cells", licence="apache-2.0")
    assert remote.made == {
        "my-org/cells": {"private": True, "exist_ok": True, "message": done_message(finished)}
    }
    sent = remote.folder / "my-org" / "cells"
    assert (
        sorted(p.name for p in sent.iterdir())
        == list(done.files)
        == ["README.md", "model.safetensors", "recipe.json"]
    )
    assert SECRET.encode() not in b"".join(path.read_bytes() for path in sent.iterdir())
    push(finished, "my-org/open", public=True, message="first")
    assert remote.made["my-org/open"] == {"private": False, "exist_ok": True, "message": "first"}


def done_message(run: Path) -> str:
    return f"{load_weights(run)[1].recipe.name} after 4 epochs"


def test_the_model_card(finished: Path, remote: Hub) -> None:
    push(finished, "my-org/cells", licence="mit")
    text = (remote.folder / "my-org" / "cells" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    said = yaml.safe_load(front)
    assert (said["license"], said["pipeline_tag"], said["library_name"]) == (
        "mit",
        "object-detection",
        "detrellis",
    )
    metrics = said["model-index"][0]["results"][0]["metrics"]
    assert [(m["name"], m["value"]) for m in metrics] == [("box AP", 50.0), ("box AP50", 75.0)]
    wanted = (
        "50.0 ± 3.0",
        "| AP50 | 75.0 |",
        "20, of 3 sizes",
        'detrellis.load("hf:my-org/cells")',
        "step 12",
        "mit.",
    )
    assert [word for word in wanted if word not in body] == []
    assert "| 1 | cat \\| &lt;b>dog&lt;/b> | 25.0 | 17 |" in body
    assert "| 3 | bird \\# big | - | - |" in body


def test_the_accuracy_of_masks_is_called_so(finished: Path, remote: Hub) -> None:
    report = json.loads((finished / "report.json").read_text())
    report["result"]["of"] = "mask"
    (finished / "report.json").write_text(json.dumps(report))
    push(finished, "my-org/cells")
    text = (remote.folder / "my-org" / "cells" / "README.md").read_text()
    assert "name: mask AP50" in text
    assert "IoU of each mask" in text


def test_a_card_says_no_more_than_is_known(finished: Path, remote: Hub) -> None:
    (finished / "report.json").unlink()
    push(finished, "my-org/cells")
    text = (remote.folder / "my-org" / "cells" / "README.md").read_text()
    assert "license" not in text
    wanted = ("No licence has been chosen", "| AP | 50.0 |", "Nothing is known of the data")
    assert [word for word in wanted if word not in text] == []
    assert "±" not in text


def test_pushed_weights_are_loaded_from_the_cache_offline(
    finished: Path, remote: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(finished, "my-org/cells")
    # The cache as huggingface_hub leaves it, and no network.
    cached = tmp_path / "cache" / "models--my-org--cells"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(remote.folder / "my-org" / "cells", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    model = detrellis.load("hf:my-org/cells")
    assert model.classes.names == NAMES
    weights, _ = load_weights(finished)
    loaded = model.detector.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    with pytest.raises(UserError, match="hf:my-org/other cannot be fetched"):
        detrellis.load("hf:my-org/other")


def test_a_token_is_never_printed(finished: Path, remote: Hub) -> None:
    remote.raises = OSError("401 for Bearer hf_AbCdEf123 (token hf_AbCdEf123)")
    with pytest.raises(UserError) as told:
        push(finished, "my-org/cells")
    assert "AbCdEf" not in str(told.value)
    assert "hf auth login" in told.value.remedy


@pytest.mark.parametrize(
    ("repository", "options", "message"),
    [
        ("cells", {}, "organisation/name"),
        ("a/b/c", {}, "organisation/name"),
        ("a/b", {"licence": "My own"}, "licence"),
    ],
)
def test_names_are_checked(
    finished: Path, remote: Hub, repository: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        push(finished, repository, **options)
    assert remote.made == {}


def test_somebody_elses_checkpoint_is_not_pushed(remote: Hub) -> None:
    with pytest.raises(UserError, match="not a run of Detrellis"):
        push("hf:facebook/detr-resnet-50", "my-org/detr")
