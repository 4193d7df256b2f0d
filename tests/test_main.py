"""The first and the last moment of the command:
what is set before torch is imported, and signals beside the verb.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from detrellis.__main__ import PASSIVE, main

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """What handles signals here, put back: the command leaves the system's own."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PASSIVE, "RANK"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def test_threads_sleep_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KMP_BLOCKTIME", "200")
    seen: dict[str, str] = {}
    monkeypatch.setattr("detrellis.cli.main", lambda: seen.update(os.environ))
    main()
    assert {name: seen[name] for name in PASSIVE} == {**PASSIVE, "KMP_BLOCKTIME": "200"}


def test_a_signal_after_the_verb_leaves_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detrellis.cli.main", lambda: None)
    main()
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_DFL, signal.SIG_DFL]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_signal_during_the_imports(
    number: signal.Signals,
    rank: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Under torchrun the main process alone says so."""

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr("detrellis.cli.main", lambda: signal.raise_signal(number))
    with pytest.raises(SystemExit, match=str(128 + number)):
        main()
    assert capsys.readouterr().err == ("Stopped.\n" if rank == "0" else "")
