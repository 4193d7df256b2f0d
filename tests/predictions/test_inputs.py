from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detrellis.errors import UserError
from detrellis.predictions.inputs import InputPicture, find_pictures, without_repeats
from detrellis.predictions.save import output_names

from .conftest import picture, save


def names(given: object, **how: bool) -> list[str]:
    return [one.path.name for one in find_pictures(given, **how)]  # type: ignore[arg-type,union-attr]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("b.png", "a.jpg", "sub/c.jpg", ".hidden.jpg", "sub/deep/d.webp"):
        save(tmp_path / "pics" / name)
    (tmp_path / "pics" / "notes.txt").write_text("no picture")
    (tmp_path / "pics" / "clip.mp4").write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "pics"


def test_files_and_folders(folder: Path) -> None:
    assert names(folder) == ["a.jpg", "b.png", "clip.mp4"]
    assert names(str(folder), recursive=True) == ["a.jpg", "b.png", "clip.mp4", "c.jpg", "d.webp"]
    assert names([folder / "sub", folder / "b.png"]) == ["c.jpg", "b.png"]
    # Named itself: reading it says what is wrong
    assert names(folder / "notes.txt") == ["notes.txt"]
    assert names(folder / ".hidden.jpg") == [".hidden.jpg"]
    assert (
        len(without_repeats(find_pictures([folder, folder / "a.jpg", "pics/../pics/a*.jpg"]))) == 3
    )


def test_a_pattern_unless_a_file_is_called_so(folder: Path) -> None:
    assert names("pics/*") == ["a.jpg", "b.png", "clip.mp4"]
    assert names("pics/**/*.jpg") == ["a.jpg", "c.jpg"]
    assert names("pics/[ab].*") == ["a.jpg", "b.png"]
    save(folder / "img[1].jpg")
    save(folder / "img1.jpg")
    assert names("pics/img[1].jpg") == ["img[1].jpg"]
    with pytest.raises(UserError, match=r"pics/\*\.bmp: no image fits this pattern"):
        names("pics/*.bmp")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("https://example.org/photo.jpg", "a URL, not a file\n.*Download it first"),
        # Which makes one slash of two
        (Path("https://example.org/photo.jpg"), "a URL, not a file"),
        ("s3://bucket/photo.jpg", "a URL"),
        ("-", "standard input"),
        ("pics/nothing.jpg", "no such file or folder"),
        ("pics/sub/deep/empty", "no images in this folder\n.*It holds: no file"),
        ("texts", "no images in this folder\n.*It holds: 2 .txt, 1 without suffix"),
        (b"bytes", "bytes: not a picture"),
        (7, "int: not a picture"),
        ([7], "picture 0: int: not a picture"),
        ({"path": "a.jpg"}, "dict: not a picture"),
        (None, "NoneType: not a picture"),
    ],
)
def test_what_is_no_picture_is_refused(folder: Path, given: object, message: str) -> None:
    (folder / "sub" / "deep" / "empty").mkdir()
    (folder.parent / "texts").mkdir()
    for name in ("a.txt", "b.TXT", "README"):
        (folder.parent / "texts" / name).touch()
    with pytest.raises(UserError, match=message):
        names(given)


def test_an_animation_is_no_picture_and_a_tiff_with_pages_is(tmp_path: Path) -> None:
    frames = [Image.fromarray(picture(seed=i)) for i in range(3)]
    for suffix in ("gif", "tiff"):
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    animation, pages = find_pictures([tmp_path / "a.gif", tmp_path / "a.tiff"])
    with pytest.raises(UserError, match=r"a\.gif: an animation.*\n.*ffmpeg -i"):
        animation.read()
    np.testing.assert_array_equal(pages.read().permute(1, 2, 0).numpy(), picture(seed=0))
    frames[0].save(tmp_path / "still.gif")
    assert pixels(tmp_path / "still.gif").shape == (40, 64, 3)


def test_a_folder_with_pictures_in_its_folders_says_how(folder: Path) -> None:
    (folder / "sub" / "c.jpg").unlink()
    with pytest.raises(UserError, match=r"1 are in its folders: add --recursive"):
        names(folder / "sub")


def pixels(given: object) -> np.ndarray:
    (one,) = find_pictures(given)  # type: ignore[arg-type]
    return one.read().permute(1, 2, 0).numpy()


def test_arrays_images_and_tensors_are_the_same_pixels() -> None:
    want = picture()
    tensor = torch.from_numpy(want).permute(2, 0, 1)
    read_only = want.copy()
    read_only.flags.writeable = False
    for given in (
        want,
        want[:, ::-1][:, ::-1],
        read_only,
        Image.fromarray(want),
        tensor,
        tensor.double() / 255,
    ):
        np.testing.assert_array_equal(pixels(given), want)
    grey = np.repeat(want[:, :, :1], 3, axis=2)
    for given in (want[:, :, 0], Image.fromarray(want[:, :, 0]), tensor[:1], tensor[:1] / 255):
        np.testing.assert_array_equal(pixels(given), grey)
    clear = np.dstack([want, np.zeros((40, 64), np.uint8)])
    assert (pixels(clear) == 255).all()  # over white, as files are


def test_what_was_given_is_not_kept_as_it_changes() -> None:
    """A video reader may use one buffer for all frames."""
    frame = picture()
    (one,) = find_pictures(frame)
    before = frame.copy()
    frame[:] = 0
    np.testing.assert_array_equal(one.read().permute(1, 2, 0).numpy(), before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), r"float32, shape \(4, 4, 3\)"),
        (np.zeros((3, 40, 64), np.uint8), r"uint8, shape \(3, 40, 64\)\n.*height, width, 3"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"a list of such arrays"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        (np.zeros((4, 4), np.uint16), "uint16"),
        (torch.zeros(4, 4, 3), r"float32, shape \(4, 4, 3\)"),
        (torch.zeros(2, 3, 4, 4), r"list\(batch\)"),
        (torch.full((3, 4, 4), 255.0), "with values from 255 to 255"),
        (torch.full((3, 4, 4), torch.nan), "with values from nan"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "int64"),
    ],
)
def test_arrays_of_another_kind_are_named(given: object, message: str) -> None:
    with pytest.raises(UserError, match=f"(?s)picture 1: .*{message}"):
        list(find_pictures([picture(), given]))  # type: ignore[list-item]


def test_an_iterator_is_read_as_needed() -> None:
    endless = (picture(seed=i) for i in itertools.count())
    assert len(list(itertools.islice(find_pictures(endless), 3))) == 3


def given(*paths: str, root: str = "") -> list[InputPicture]:
    return [
        one
        for p in paths
        for one in [InputPicture(Path(root, p), Path(p if root else Path(p).name))]
    ]


def test_output_names_are_different_and_do_not_depend_on_the_order() -> None:
    assert output_names(given("/a/x.jpg", "/a/y.jpg")) == ["x", "y"]
    assert output_names(given("x.jpg", "sub/x.jpg", root="/pics")) == ["x", "sub/x"]
    assert output_names(given("/a/x.jpg", "/a/x.png")) == ["x.jpg", "x.png"]
    assert output_names(given("/a/x.jpg", "/b/x.jpg")) == ["a/x", "b/x"]
    # "X" is "x" on some file systems
    assert output_names(given("/a/X.jpg", "/b/x.jpg")) == ["a/X", "b/x"]
    assert output_names(given("/a/c/x.jpg", "/b/c/x.jpg")) == ["a/c/x", "b/c/x"]
    assert output_names([InputPicture(None, Path()), InputPicture(None, Path())]) == [
        "picture-1",
        "picture-2",
    ]
    many = given("/a/x.jpg", "/a/x.png", "/b/x.jpg", "/b/x.png", "/a/x.jpg.jpg", "/a/picture-9.jpg")
    want = dict(zip(many, output_names(many), strict=True))
    assert len({name.casefold() for name in want.values()}) == len(many)
    for order in itertools.islice(itertools.permutations(many), 0, None, 37):
        assert output_names(order) == [want[one] for one in order]
    assert len(set(output_names(given("/a/x.jpg", "/a/x.jpg")))) == 2  # the same one twice


def test_names_stay_below_the_folder() -> None:
    for name in output_names(given("/a/../b/x.jpg", "../x.jpg", "x.jpg", os.path.abspath("x.jpg"))):
        assert not Path(name).is_absolute()
        assert ".." not in Path(name).parts
