"""A small data set on disk, shared by the tests of the engine and the interface."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer.main

from detrellis.data.shapes import write_shapes


def pytest_collection_finish() -> None:
    """What is imported and collected stays:
    the garbage collector need not look at all of it again and again, nor so often at what the
    tests make.
    """
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or libraries say at the exit that they have leaked


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 training and 5 validation pictures of 64x64 pixels: batches do not come out even."""
    return write_shapes(tmp_path_factory.mktemp("shapes") / "data", train=11, val=5, size=(64, 64))


@pytest.fixture(scope="session", autouse=True)
def one_command_line() -> Iterator[None]:
    """Typer builds the verbs and their options at each call.
    A process of users has one call, this one has hundreds.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", cache(typer.main.get_command))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_power_cut() -> Iterator[None]:
    """Whatever a test ends is a process, and what that has written is the system's. A training
    would wait for the disk some twenty times; which file is put there when, a test of `atomic`
    sees."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
