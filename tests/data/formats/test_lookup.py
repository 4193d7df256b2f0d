"""Names as other machines and tools wrote them: the real file is found, or nothing is guessed."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from detrellis.data.formats.lookup import (
    ResolvedNames,
    find_place,
    readings,
    real_names,
    renaming_notes,
)


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.mark.parametrize(
    ("written", "real"),
    [
        ("a/p.jpg", "a/p.jpg"),
        ("./a/p.jpg", "./a/p.jpg"),  # exists as written
        ("/a/p.jpg", "a/p.jpg"),
        (" a/p.jpg ", "a/p.jpg"),
        ("a\\p.jpg", "a/p.jpg"),
        ("..\\label\\p.jpg", "a/p.jpg"),
        ("../label/p.jpg", "a/p.jpg"),
        ("A/P.JPG", "a/p.jpg"),
        ("p", "a/p.jpg"),
        ("set/a/P", "a/p.jpg"),
        ("C:\\Users\\me\\set\\a\\p.jpg", "a/p.jpg"),
        ("/home/me/set/a/p.jpg", "a/p.jpg"),
        ("http://host:8080/images/1/p.jpg?token=x&y=1", "a/p.jpg"),
        ("file:///C:/set/a/p.jpg", "a/p.jpg"),
        ("s3://bucket/p.jpg", "a/p.jpg"),
        ("images/1/p.jpg", "a/p.jpg"),
        ("/data/upload/1/0a1b2c3d-p.jpg", "a/p.jpg"),
        ("/data/local-files/?d=a/p.jpg", "a/p.jpg"),
        ("http://host/data/local-files/?d=a%5Cp.jpg", "a/p.jpg"),
        ("p.jpg?x=1", "a/p.jpg"),
        ("my%20file.jpg", "my file.jpg"),
        ("http://host/my%20file.jpg", "my file.jpg"),
        (unicodedata.normalize("NFD", "über.jpg"), unicodedata.normalize("NFC", "über.jpg")),
        ("100%.jpg", "100%.jpg"),
        ("a%5Fb.jpg", "a%5Fb.jpg"),  # exists as written, and is not decoded
    ],
)
def test_a_name_finds_its_file(tmp_path: Path, written: str, real: str) -> None:
    touch(
        tmp_path,
        "a/p.jpg",
        "my file.jpg",
        unicodedata.normalize("NFC", "über.jpg"),
        "100%.jpg",
        "a%5Fb.jpg",
    )
    found = real_names([written], tmp_path)
    assert found.names == (real,)
    assert found.renamed == ({} if written == real else {0: written})
    assert not found.unclear


@pytest.mark.parametrize(
    "written", ["q.jpg", "", "/", "a", "http://", "http://[x/p", "?d=", "\0", "a/.p.jpg"]
)
def test_what_is_not_there_stays_as_written(tmp_path: Path, written: str) -> None:
    touch(tmp_path, "a/p.jpg", "b/.q.jpg", "__MACOSX/q.jpg")
    assert real_names([written], tmp_path) == ResolvedNames((written,), {}, {})


def test_two_candidates_are_listed_and_none_is_taken(tmp_path: Path) -> None:
    touch(tmp_path, "a/p.jpg", "b/p.jpg", "P0.jpg", "p0.JPG", "q.jpg", "q.png", "q.txt")
    found = real_names(["p.jpg", "c/p.jpg", "p0.jpg", "q"], tmp_path)
    assert found.names == ("p.jpg", "c/p.jpg", "p0.jpg", "q")
    assert not found.renamed
    pair = ("a/p.jpg", "b/p.jpg")
    assert found.unclear == {0: pair, 1: pair, 2: ("P0.jpg", "p0.JPG"), 3: ("q.jpg", "q.png")}
    (note,) = renaming_notes("train", tmp_path, found)
    assert note.code == "unclear-file"
    assert (
        note.what
        == "4 images are not found for certain, the first: 'p.jpg' could be a/p.jpg or b/p.jpg"
    )


def test_the_longest_tail_decides(tmp_path: Path) -> None:
    touch(tmp_path, "a/p.jpg", "b/p.jpg", "p.jpg")
    written = ["/home/me/a/p.jpg", "D:\\set\\B\\p.jpg"]
    assert real_names(written, tmp_path).names == ("a/p.jpg", "b/p.jpg")


def test_the_very_letters_decide_between_names_that_differ_in_case(tmp_path: Path) -> None:
    touch(tmp_path, "a/p.jpg", "a/P.jpg")
    assert real_names(["x\\p.jpg", "x\\P.jpg"], tmp_path).names == ("a/p.jpg", "a/P.jpg")


def test_a_file_is_given_to_one_name_only(tmp_path: Path) -> None:
    touch(tmp_path, "p.jpg", "q.jpg")
    found = real_names(["p.jpg", "other/p.jpg", "a/q.jpg", "b/q.jpg"], tmp_path)
    assert found.names == ("p.jpg", "other/p.jpg", "a/q.jpg", "b/q.jpg")
    assert sorted(found.unclear) == [1, 2, 3]
    assert "which another name means too" in renaming_notes("train", tmp_path, found)[0].what
    # One path written in two ways is one file: the doctor says that it is listed twice.
    touch(tmp_path, "a/r.jpg")
    assert real_names(["a/r.jpg", "a\\r.jpg"], tmp_path).names == ("a/r.jpg", "a/r.jpg")


def test_another_split_is_another_picture(tmp_path: Path) -> None:
    touch(tmp_path, "val/7.jpg")
    assert real_names(["train\\7.jpg"], tmp_path).names == ("train\\7.jpg",)
    assert real_names(["train2017/7.jpg"], tmp_path / "val").names == ("train2017/7.jpg",)
    assert real_names(["valid\\7.jpg"], tmp_path).names == ("val/7.jpg",)


def test_folders_nearby_come_after_the_root(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "images/p.jpg",
        "depth/p.jpg",
        "more/q.jpg",
        "a/more/r.jpg",
        "b/more/r.jpg",
        "more/s.jpg",
    )
    names = ["x\\p.jpg", "more\\q.jpg", "more\\r.jpg", "s.jpg"]
    found = real_names(names, tmp_path / "images", nearby=[tmp_path])
    # s.jpg could be any picture
    assert found.names == ("p.jpg", "../more/q.jpg", "more\\r.jpg", "s.jpg")
    assert found.unclear == {2: ("../a/more/r.jpg", "../b/more/r.jpg")}


def test_links_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "real/p.jpg")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "images").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "set" / "round").symlink_to(tmp_path / "set", target_is_directory=True)
    assert real_names(["C:\\x\\p.jpg"], tmp_path / "set").names == ("images/p.jpg",)


def test_the_note_says_how_many_and_the_first(tmp_path: Path) -> None:
    touch(tmp_path, "a/p.jpg", "a/q.jpg")
    (note,) = renaming_notes("train", tmp_path, real_names(["a\\p.jpg", "a\\q.jpg"], tmp_path))
    assert (note.code, note.severity, note.count) == ("renamed-file", "note", 2)
    assert note.what == "2 images are listed under other names, the first: 'a\\p.jpg' is a/p.jpg"


def test_places(tmp_path: Path) -> None:
    touch(tmp_path, "Images/train/p.jpg", "lists/val.txt")
    assert find_place("images\\train", [tmp_path]) == tmp_path / "Images" / "train"
    assert find_place("/content/set/Images/train", [tmp_path]) == tmp_path / "Images" / "train"
    assert find_place("../Images/train", [tmp_path]) == tmp_path / "Images" / "train"
    assert (
        find_place("D:\\x\\lists\\val.txt", [tmp_path / "Images", tmp_path])
        == tmp_path / "lists" / "val.txt"
    )
    # One part of two is no evidence
    assert find_place("other/train", [tmp_path / "Images"]) is None
    assert find_place("gone", [tmp_path]) is None


def test_readings_never_hold_an_empty_part() -> None:
    for text in (
        "",
        "//",
        "a//b",
        "http://h",
        "file:///",
        "\\\\server\\share\\x.jpg",
        "C:",
        "%2F",
        "?",
    ):
        assert all(all(parts) for parts in readings(text))


def test_exact_names_cost_one_listing_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{'ab'[n % 2]}/{n}.jpg" for n in range(20)]
    touch(tmp_path, *names)
    listed: list[Path] = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(folder) or listdir(folder))
    monkeypatch.setattr(os, "stat", lambda *_: pytest.fail("a file is asked for"))
    monkeypatch.setattr(os, "walk", lambda *_: pytest.fail("all is listed"))
    found = real_names(names, tmp_path)
    monkeypatch.undo()
    assert found == ResolvedNames(tuple(names), {}, {})
    assert sorted(listed) == [tmp_path / "a", tmp_path / "b"]
