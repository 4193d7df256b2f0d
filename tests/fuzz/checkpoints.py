"""Checkpoints of every kind, spoilt:
ours, states of runs, folders of transformers, `.pth` and `.pkl`.
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from detrellis.data.classes import ClassMap
from detrellis.data.doctor.check import prepare
from detrellis.data.layout import resolve
from detrellis.distributed import World
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import metadata_of, save_run
from detrellis.engine.resume import IMAGES, packed_file_names, resumed_run
from detrellis.engine.state import TrainJob, fresh_state
from detrellis.errors import UserError
from detrellis.interop.convert import save_huggingface
from detrellis.interop.load import load_foreign
from detrellis.loading import load
from detrellis.recipes import Recipe, find_recipe
from detrellis.recipes.build import build
from detrellis.report.thresholds import class_thresholds
from tests.data.sets import CocoSet
from tests.fuzz.harness import refusal
from tests.fuzz.values import VALUES, Random, pick, spoil_bytes, spoil_value
from tests.small import SMALL, with_own_backbone

CLASSES = ClassMap((3, 17, 90), ("cat", "dog", "emu"))
TENSORS: tuple[Callable[[], Any], ...] = (
    lambda: torch.zeros(0),
    lambda: torch.tensor(float("nan")),
    lambda: torch.zeros(2, 3, dtype=torch.complex64),
    lambda: torch.zeros(3, dtype=torch.bool),
    lambda: torch.zeros(2, 2).to_sparse(),
    lambda: torch.zeros(1).expand(1 << 40),
    lambda: torch.zeros(4, device="meta"),
    lambda: torch.nn.Parameter(torch.zeros(3)),
    lambda: torch.full((4, 4), float("inf"), dtype=torch.bfloat16),
    lambda: torch.zeros(1, 1, 1, 1, 1, dtype=torch.int64),
)


def _recipe() -> Recipe:
    return find_recipe("tiny").override([*SMALL, "detector.width=32", "optim.ema=0"])


def run(root: Path) -> None:
    """The folder of a run, of a detector that nobody has trained, and its data."""
    source = resolve(CocoSet(root / "data").write())
    train, val, classes, _ = prepare(source)
    assert val is not None
    card = Card(_recipe(), classes, source.to_dict(), stats={"AP": 0.5})
    state = fresh_state(TrainJob(card, train, None, root), World(0, 1, torch.device("cpu")))
    images = {"train": packed_file_names(train), "val": packed_file_names(val)}
    save_run(root, state.state_dict() | {IMAGES: images}, state.detector.state_dict(), card)
    report = {"epoch": 0, "step": 0, "diagnosis": {"best": {"threshold": 0.3}, "classes": []}}
    report["diagnosis"]["classes"] = [
        {"name": name, "best": {"threshold": 0.2}} for name in classes.names
    ]
    (root / "report.json").write_text(json.dumps(report))


def _reference() -> dict[str, torch.Tensor]:
    from tests.interop.test_reference import frozen, published

    torch.manual_seed(0)
    return published(frozen(with_own_backbone("deformable_detr_r50_two_stage")))[1]


def pth(root: Path) -> None:
    """A reference repository's file."""
    content = {
        "model": _reference(),
        "args": argparse.Namespace(nheads=4, num_queries=12),
        "epoch": 49,
    }
    torch.save(content, root / "checkpoint.pth")


def pkl(root: Path) -> None:
    """Arrays, as detectron2 pickles them."""
    arrays = {name: value.numpy() for name, value in _reference().items()}
    (root / "model_final.pkl").write_bytes(
        pickle.dumps({"model": arrays, "__author__": "third party"})
    )


def huggingface(root: Path) -> None:
    """A folder of transformers."""
    recipe = with_own_backbone("detr_r50")
    recipe = recipe.override(["detector.backbone.norm=frozen"])
    save_huggingface(root, build(recipe, 3).detector.state_dict(), recipe, CLASSES)


FILES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "weights": (run, ("last.safetensors",)),
    "state": (run, ("last.state.pt",)),
    "report": (run, ("report.json",)),
    "pth": (pth, ("checkpoint.pth",)),
    "pkl": (pkl, ("model_final.pkl",)),
    "transformers": (
        huggingface,
        ("config.json", "config.json", "preprocessor_config.json", "model.safetensors"),
    ),
}


@cache
def _whole(write: Callable[[Path], object]) -> Path:
    root = Path(mkdtemp(prefix="fuzz-"))
    write(root)
    return root


# Spoiling


def _nest(random: Random, value: Any) -> Any:
    """One place of a nest of containers and tensors changed."""
    holder = value
    while True:
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        key = pick(random, list(keys))
        deeper = holder[key]
        if isinstance(deeper, (dict, list)) and deeper and random.random() < 0.7:
            holder = deeper
            continue
        break
    way = int(random.integers(5))
    if way == 0:
        del holder[key]
    elif way == 1:
        holder[key] = pick(random, TENSORS)()
    elif way == 2 and isinstance(deeper, torch.Tensor) and deeper.numel():
        holder[key] = pick(
            random,
            (
                deeper[:1],
                deeper * float("nan"),
                deeper.half(),
                deeper[None],
                deeper.flatten(),
                deeper.to(torch.int8),
            ),
        )
    elif way == 3 and isinstance(holder, dict):
        holder[str(pick(random, VALUES))] = holder.pop(key)
    else:
        holder[key] = pick(random, VALUES)
    return value


def _spoil_torch(random: Random, path: Path) -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, weights_only=True)
    for _ in range(int(random.integers(1, 4))):
        if isinstance(content.get("args"), argparse.Namespace) and random.random() < 0.3:
            setattr(
                content["args"],
                pick(
                    random, ("nheads", "num_queries", "dilation", "group_detr", "dec_layers", "x")
                ),
                pick(random, VALUES),
            )
        elif content:
            content = _nest(random, content)
    path.unlink()
    torch.save(content, path)


def _spoil_safetensors(random: Random, path: Path) -> None:
    """Other tensors, another card, or another header."""
    tensors, metadata = load_file(path), metadata_of(path) or {}
    way = int(random.integers(3))
    if way == 0:
        data = path.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header = json.dumps(spoil_value(random, json.loads(data[8 : 8 + size]))).encode()
        path.unlink()
        path.write_bytes(
            struct.pack("<Q", len(header) if random.random() < 0.8 else 2**40)
            + header
            + data[8 + size :]
        )
        return
    if way == 1 and "detrellis" in metadata:
        card = json.loads(metadata["detrellis"])
        for _ in range(int(random.integers(1, 4))):
            card = spoil_value(random, card) if card else card
        metadata["detrellis"] = json.dumps(card)
        metadata["format"] = str(pick(random, (*range(6), 99, "x", -1, 10**30)))
    else:
        name = pick(random, list(tensors))
        replaced = pick(
            random,
            (
                torch.zeros(0),
                tensors[name].flatten()[:0],
                tensors[name].half(),
                torch.full((2,), float("nan")),
            ),
        )
        tensors[pick(random, (name, "extra", ""))] = replaced
        if random.random() < 0.3:
            del tensors[name]
    path.unlink()
    save_file(tensors, path, metadata)


def _spoil_pickle(random: Random, path: Path) -> None:
    content = pickle.loads(path.read_bytes())
    content = _nest(random, content)
    path.unlink()
    path.write_bytes(pickle.dumps(content, int(random.integers(6))))


def spoil(random: Random, path: Path) -> None:
    """The file with its bytes or its content spoilt."""
    structured = {
        ".pt": _spoil_torch,
        ".pth": _spoil_torch,
        ".pkl": _spoil_pickle,
        ".safetensors": _spoil_safetensors,
    }
    if path.suffix in structured and random.random() < 0.7:
        structured[path.suffix](random, path)
        return
    data = path.read_bytes()
    path.unlink()
    if path.suffix == ".json" and random.random() < 0.8:
        path.write_text(json.dumps(spoil_value(random, json.loads(data))))
    else:
        path.write_bytes(spoil_bytes(random, data))


# Judging


def attempt(seed: int, folder: Path) -> None:
    """A spoilt checkpoint is loaded, or refused by a message that names it."""
    random = np.random.default_rng(seed)
    kind = list(FILES)[seed % len(FILES)]
    write, files = FILES[kind]
    place = shutil.copytree(_whole(write), folder / "run")
    path = Path(place) / pick(random, files)
    spoil(random, path)
    for use in USES[kind]:
        try:
            use(path)
        except UserError as error:
            refusal(error, str(place))


def _go_on(path: Path) -> None:
    resumed = resumed_run(path.parent, None, (), None)
    train, val, classes, _ = prepare(resumed.source)
    resumed.check(train, val, classes)
    state = fresh_state(
        TrainJob(resumed.card, train, val, path.parent),
        World(0, 1, torch.device("cpu")),
        filled=True,
    )
    state.load_state_dict(resumed.state, path.parent)


USES: dict[str, tuple[Callable[[Path], object], ...]] = {
    "weights": (lambda path: load(path.parent), _go_on),
    "state": (_go_on,),
    "report": (lambda path: class_thresholds(path.with_name("last.safetensors"), CLASSES),),
    "pth": (load,),
    "pkl": (load_foreign,),
    "transformers": (lambda path: load(path.parent),),
}
