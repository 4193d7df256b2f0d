"""Some of the broken inputs that `tests/soak/test_fuzz.py` tries by the thousand;
and what it found, once each.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.table import Table

from detrellis.data.doctor.check import check, prepare
from detrellis.data.files import read_bytes
from detrellis.data.layout import DataSource, resolve
from detrellis.engine.card import Card
from detrellis.engine.checkpoint import load_plain
from detrellis.errors import UserError
from detrellis.interop.files import read_pickle, read_pth
from detrellis.nn.pretrained import read_tensors
from detrellis.outputs import Outputs
from detrellis.recipes import find_recipe
from detrellis.recipes.migrate import read_recipe
from detrellis.recipes.values import read_value
from detrellis.report.charts import line_chart
from detrellis.terminal import Terminal
from detrellis.webpage import document, facts, figure, table
from detrellis.yaml_reader import parse
from tests.data import sets
from tests.fuzz import annotations, checkpoints, images, overrides
from tests.fuzz.harness import Try, failures

EVIL = "<script>alert(1)</script>\"'</style>\x1b[2J"


@pytest.mark.parametrize(
    ("attempt", "seeds"),
    [
        (annotations.attempt, range(26)),
        (images.attempt, range(35)),
        (overrides.attempt, range(10)),
        # The others are large
        (checkpoints.attempt, [s for s in range(24) if s % len(checkpoints.FILES) < 3]),
    ],
    ids=["annotations", "images", "overrides", "checkpoints"],
)
def test_a_few_of_many(attempt: Try, seeds: Sequence[int], tmp_path: Path) -> None:
    assert failures(attempt, seeds, tmp_path) == {}


def test_the_harness_notices(tmp_path: Path) -> None:
    """A traceback, a process that dies,
    and one that is killed from outside or runs out of memory.
    """

    def bad(seed: int, folder: Path) -> None:
        if seed == 1:
            os._exit(7)
        if seed == 2:
            bytearray(8 << 30)
        if seed == 3:
            raise KeyError("three")

    found = failures(bad, range(5), tmp_path)
    assert found.keys() == {1, 2, 3}
    assert "ended with 7" in found[1]
    assert "MemoryError" in found[2]
    assert "KeyError: 'three'" in found[3]


# What the fuzzing found


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    annotations.voc(tmp_path / "data")
    return tmp_path / "data"


def test_pipes_and_devices_are_not_waited_for(voc: Path) -> None:
    file = voc / "Annotations" / "train_0.xml"
    for put in (
        os.mkfifo,
        lambda path: os.symlink("/dev/zero", path),
        lambda path: os.symlink(path.name, path),
    ):
        file.unlink()
        put(file)
        with pytest.raises(UserError, match=r"train_0\.xml: "):
            read_bytes(file)
        found = [f for f in check(resolve(voc), fast=True).errors if f.file == str(file)]
        assert [f.code for f in found] == ["unreadable-labels"]


def test_a_name_that_no_file_system_takes(voc: Path) -> None:
    (voc / "ImageSets" / "Main" / "val.txt").write_text("v" * 5000)
    assert "unreadable-labels" in {f.code for f in check(resolve(voc), fast=True).errors}


@pytest.mark.parametrize(
    "text",
    [
        "&a [*a]",
        "[&a [x], *a]",
        "!!int x",
        "!!timestamp x",
        "!!binary x",
        "[" * 500,
        "{a: " * 500,
        "{[1]: 2}",
    ],
)
def test_yaml_is_plain(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        read_value(text)
    with pytest.raises(UserError, match=r"^-o optim\.lr="):
        find_recipe("tiny").override(f"optim.lr={text}")


def test_an_alias_of_a_word_is_one(tmp_path: Path) -> None:
    assert parse("{a: &x b, c: *x}")[1] == {"a": "b", "c": "b"}
    annotations.yolo(tmp_path)
    lines = [f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]" for n in range(1, 12)]
    (tmp_path / "data.yaml").write_text(
        "b0: &b0 [x, x]\n" + "\n".join(lines) + "\nnames: *b11\ntrain: images/train\n"
    )
    with pytest.raises(UserError, match=r"data\.yaml: malformed yaml"):
        resolve(tmp_path)


def test_a_message_is_short() -> None:
    for text in (
        f"schemes.ms.weight={'x' * 99_999}",
        f"detector.{'y' * 99_999}=1",
        f"detector.queries={'z' * 99_999}",
    ):
        with pytest.raises(UserError) as error:
            find_recipe("tiny").override(text)
        assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    "spoilt", [{"detector": {"encoder": {}, "aligner": 3}}, {"detector": {"queries": {"a": 1}}}, 3]
)
def test_a_stored_recipe_of_another_kind(spoilt: object) -> None:
    with pytest.raises(UserError):
        read_recipe(spoilt, 1)


# What is not trusted


class Touch:
    """A pickle that would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


class Allocate:
    """One that would take all memory."""

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return np.ndarray, ((1 << 38,),)


@pytest.mark.parametrize("read", [load_plain, read_pth, read_pickle, read_tensors])
def test_no_reader_of_pickles_runs_any(read: Callable[[Path], object], tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    for number, evil in enumerate((Touch(touched), Allocate())):
        content = {
            "model": {"a": torch.zeros(1)} if read is not read_pickle else {"a": np.zeros(1)},
            "x": evil,
        }
        for name, saved in (("zip", _torch_saved(content)), ("pickle", pickle.dumps(content, 2))):
            file = tmp_path / f"{name}{number}.pth"
            file.write_bytes(saved)
            with pytest.raises(UserError, match=file.name) as error:
                read(file)
            assert "can still be loaded" not in str(error.value)
    assert not touched.exists()


def _torch_saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize(
    "change", [{"epoch": "3"}, {"data": 3}, {"stats": {"AP": []}}, {"changes": 7}, {"seed": None}]
)
def test_the_types_of_a_card_are_checked(change: dict[str, object], tmp_path: Path) -> None:
    from detrellis.data.classes import ClassMap

    metadata = Card(find_recipe("tiny"), ClassMap((1,), ("a",)), {}).to_metadata()
    card = json.loads(metadata["detrellis"]) | change
    if change == {"epoch": "3"}:
        card["epoch"] = "three"
    with pytest.raises(UserError, match=rf"its card cannot be read \({next(iter(change))}"):
        Card.from_metadata(metadata | {"detrellis": json.dumps(card)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="without a Detrellis card"):
        Card.from_metadata([1], tmp_path)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot be understood"):
        DataSource.from_dict({"kind": "none"})


def test_shards_of_a_checkpoint_lie_beside_it(tmp_path: Path) -> None:
    from detrellis.interop.files import read_folder

    for name in ("../other.safetensors", "/etc/passwd", "a/b.safetensors"):
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": name}})
        )
        with pytest.raises(UserError, match="does not name files of this folder"):
            read_folder(tmp_path)


def test_images_outside_are_told(tmp_path: Path) -> None:
    data = sets.CocoSet(tmp_path / "data")
    for number, path in enumerate(
        (tmp_path / "above.jpg", tmp_path / "absolute.jpg", tmp_path / "linked.jpg")
    ):
        data.image("train", number).rename(path)
    data.image("train", 2).symlink_to(tmp_path / "linked.jpg")
    data.listed(0)["file_name"], data.listed(1)["file_name"] = (
        "../../../above.jpg",
        str(tmp_path / "absolute.jpg"),
    )
    source = resolve(data.write())
    (told,) = [f for f in check(source).findings if f.code == "outside-folder"]
    assert (told.severity, told.split, told.count) == ("note", "train", 3)
    assert str(tmp_path / "above.jpg") in told.what
    assert len(prepare(source)[0]) == sets.COUNTS["train"]


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x"])
def test_nothing_is_written_outside(name: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="leads out of"):
        Outputs(tmp_path / "out").write(name, "")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_steers_the_terminal(terminal: bool) -> None:
    said = io.StringIO()
    console = Terminal(file=said, width=80, force_terminal=terminal, color_system=None)
    rows = Table("name", title="a\x1b]0;title\x07")
    rows.add_row("cat\x1b[2J\x9b31m\u202e")
    for show in (console.say, console.print, console.heading):
        show("dog\x1b[31m\x00\r")  # type: ignore[operator]
    console.print(rows)
    assert annotations.plain(
        said.getvalue().replace("\x1b[1m", "").replace("\x1b[0m", "").replace("\x1b[3m", "")
    )
    assert "cat\\x1b[2J\\x9b31m\\u202e" in said.getvalue()


def test_a_page_escapes_all_that_it_is_given() -> None:
    chart = line_chart({EVIL: [(0.0, 1.0), (1.0, 2.0)]}, EVIL, EVIL)
    parts = [table(EVIL, [EVIL], [[EVIL]]), figure(chart, EVIL), facts({EVIL: EVIL})]
    page = document(EVIL, parts)
    assert "<script" not in page
    assert "\"'" not in page
    assert page.count("</style>") == 1
