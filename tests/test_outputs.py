"""No verb writes over what it did not make."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from detrellis.errors import UserError
from detrellis.outputs import Outputs


def test_a_second_call_may_write_over_the_first_ones_files(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    for text in ("one", "two"):
        outputs = Outputs(out)
        outputs.ready(["a/x.txt"])
        outputs.write("a/x.txt", text)
        assert (out / "a" / "x.txt").read_text() == text
    assert sorted(p.name for p in out.rglob("*") if p.is_file()) == [".detrellis.jsonl", "x.txt"]


def test_what_somebody_else_made_or_changed_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("mine")
    with pytest.raises(UserError, match=r"photo\.jpg: is there already.*\n.*--out"):
        Outputs(tmp_path).ready(["other.jpg", "photo.jpg"])
    with pytest.raises(UserError, match=r"photo\.jpg: is there already"):  # it came after `ready`
        Outputs(tmp_path).write("photo.jpg", "drawn")
    assert (tmp_path / "photo.jpg").read_text() == "mine"
    Outputs(tmp_path).write("labels.txt", "0 1")
    (tmp_path / "labels.txt").write_text("0 1, put right by hand")
    with pytest.raises(UserError, match="has been changed since"):
        Outputs(tmp_path).ready(["labels.txt"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".detrellis.jsonl",
        "labels.txt",
        "photo.jpg",
    ]


def test_an_input_is_refused_also_where_an_earlier_call_made_it(tmp_path: Path) -> None:
    Outputs(tmp_path).write("drawn.jpg", "drawn")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "drawn.jpg")
    with pytest.raises(UserError, match="an input"):
        Outputs(tmp_path).ready(["drawn.jpg"], inputs=[tmp_path / "link.jpg"])
    with pytest.raises(UserError, match="an input"):
        Outputs(tmp_path).ready(["drawn.jpg"], inputs=[tmp_path])
    Outputs(tmp_path).ready(["drawn.jpg"], inputs=[tmp_path / "other.jpg"])


@pytest.mark.parametrize("to", ["there", "nowhere"])
def test_a_link_is_not_written_through(tmp_path: Path, to: str) -> None:
    (tmp_path / "there").write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    (out / "x").symlink_to(tmp_path / to)
    for write in (lambda: Outputs(out).ready(["x"]), lambda: Outputs(out).write("x", "drawn")):
        with pytest.raises(UserError, match="is there already"):
            write()
    assert (tmp_path / "there").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_a_link_to_what_was_made_here_stays_a_link(tmp_path: Path) -> None:
    """The user has put the result elsewhere."""
    made = Outputs(tmp_path / "out").write("x", "drawn")
    made.rename(tmp_path / "kept")
    made.symlink_to(tmp_path / "kept")
    with pytest.raises(UserError, match="has been changed since"):
        Outputs(tmp_path / "out").ready(["x"])
    assert made.is_symlink()


def test_without_hard_links_nothing_is_written_over_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "not supported")

    monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "mine").write_text("mine")
    Outputs(tmp_path).write("new", "new")
    assert (tmp_path / "new").read_text() == "new"
    with pytest.raises(UserError, match="is there already"):
        Outputs(tmp_path).write("mine", "drawn")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_crash_while_writing_leaves_the_old_file_and_no_stranger(tmp_path: Path) -> None:
    Outputs(tmp_path).write("x", "old")

    def break_off(partial: Path) -> None:
        partial.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Outputs(tmp_path).write_with("x", break_off)
    assert (tmp_path / "x").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".detrellis.jsonl", "x"]
    with (tmp_path / ".detrellis.jsonl").open("a") as made:
        made.write('{"file": "y", "sh')  # cut off
    Outputs(tmp_path).ready(["x", "y"])


def test_a_folder_of_ours_alone_can_be_used_again_and_is_cleared(tmp_path: Path) -> None:
    out = tmp_path / "out"
    Outputs(out).alone()
    assert not out.exists()  # nothing is made before there is something to write
    Outputs(out).write("annotations/val.json", "[]")
    outputs = Outputs(out)
    outputs.alone()
    outputs.clear()
    assert not (out / "annotations" / "val.json").exists()
    (out / "library.bin").write_text("weights")
    outputs.note()
    Outputs(out).alone()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt: is there already"):
        Outputs(out).alone()


def test_a_log_stays_ours_while_it_grows(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        Outputs(tmp_path).ready(["metrics.jsonl"])
    (tmp_path / "metrics.jsonl").unlink()
    Outputs(tmp_path).take(["metrics.jsonl"])
    (tmp_path / "metrics.jsonl").write_text("a line, and another")
    Outputs(tmp_path).ready(["metrics.jsonl"])


def test_a_folder_that_cannot_be_written_is_named_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"file: a file, not a folder\n.*--results"):
            Outputs(folder, "--results").ready(["x"])
    monkeypatch.setattr(os, "access", lambda *_: False)  # who runs the tests may be root
    with pytest.raises(UserError, match="cannot be written"):
        Outputs(tmp_path / "new").ready(["x"])
