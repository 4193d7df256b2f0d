"""Files are written whole or not at all, with the permissions of any new file."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from detrellis.atomic import _partial, replace_files, replace_text, sweep


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_is_honoured_whoever_writes(tmp_path: Path, umask: int, mode: int) -> None:
    """safetensors writes through a temporary file that only its owner may read."""
    old = os.umask(umask)
    try:
        replace_files((tmp_path / "a.safetensors", lambda p: save_file({"a": torch.zeros(1)}, p)))
        replace_text(tmp_path / "b.json", "{}")
    finally:
        os.umask(old)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a.safetensors", "b.json")] == [
        mode,
        mode,
    ]


def test_a_file_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        own = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, own=own: (done.append(name), own(*args))
        )
    replace_files(
        (tmp_path / "a", lambda p: p.write_text("a")), (tmp_path / "b", lambda p: p.write_text("b"))
    )
    assert done == ["fsync", "fsync", "replace", "replace", "fsync"]  # the folder's, at the end


def test_names_may_be_as_long_as_the_system_takes_them(tmp_path: Path) -> None:
    names = [f"{'x' * 250}{number}.md" for number in range(2)]
    replace_files(
        *((tmp_path / name, lambda p, name=name: p.write_text(name[250:])) for name in names)
    )
    assert [(tmp_path / name).read_text() for name in names] == ["0.md", "1.md"]
    (tmp_path / names[0]).unlink()
    (tmp_path / names[1]).rename(_partial(tmp_path / names[1]))
    sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_all_or_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match="No space"):
        replace_files((tmp_path / "a", lambda p: p.write_text("new")), (tmp_path / "b", fail))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old"}


@pytest.mark.parametrize(
    ("told", "free", "number"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 0, errno.ENOSPC),
        # Torch, on a full disk
        (RuntimeError("unexpected pos 2816192 vs 2816088"), 4096, errno.ENOSPC),
        (RuntimeError("unexpected pos 2816192 vs 2816088"), 1 << 30, None),
        (SafetensorError("I/O error: Disk quota exceeded (os error 122)"), 1 << 30, 122),
        (KeyError("shape"), 0, None),
    ],
)
def test_what_the_system_says_is_told_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Exception, free: int, number: int | None
) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise told

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 0, free))  # type: ignore[attr-defined]
    with pytest.raises(type(told) if number is None else OSError) as error:
        replace_files((tmp_path / "a", fail))
    if number is not None:
        assert (error.value.errno, error.value.filename) == (number, str(tmp_path / "a"))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    for name in (".last.state.pt.123.partial", ".keep.partial", "mine.123.partial", ".x.y"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".keep.partial",
        ".x.y",
        "mine.123.partial",
    ]
    sweep(tmp_path / "nowhere")
