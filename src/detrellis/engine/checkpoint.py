"""What a run leaves behind.

| file in the run's folder | holds |
| --- | --- |
| `last.safetensors`, `best.safetensors` | the detector's weights with a `Card`: enough to rebuild and to name it |
| `last.state.pt` | everything that continuing needs: the trained modules, the optimizer, the average, the position |
| `previous.state.pt` | the state before that, for when the last one turns out to be torn |
| `best/epoch-NNNN-ap-0.NNNN.safetensors` | with `schedule.keep_best`: the weights of the best epochs |
| `metrics.jsonl` | the log |

Every file is written beside its place and moved there, so a crash leaves the old one whole. State
and last weights are moved one after the other once both are whole, and the state alone decides
where a run goes on. Nothing is ever unpickled but plain tensors and containers (`weights_only`).
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from detrellis.atomic import Write, replace_files
from detrellis.detector import Detector
from detrellis.engine.card import OTHER_COPY, Card
from detrellis.errors import Advice, UserError, command, first_line
from detrellis.recipes.network import build_detector

STATE, LAST, BEST = "last.state.pt", "last.safetensors", "best.safetensors"
PREVIOUS = "previous.state.pt"
BEST_FOLDER = "best"
KEPT = re.compile(r"epoch-(\d+)-ap-([\d.]+)\.safetensors")  # in the folder of the best weights
CARD = "card"  # in a state: its card, as safetensors' metadata hold it
OLDER = "older"  # in a state that was loaded: it is the previous one


def save_weights(path: Path, weights: Mapping[str, Tensor], card: Card) -> None:
    """Write a detector's weights with their card."""
    replace_files((path, _weights(weights, card)))


def keep_best(
    folder: Path, weights: Mapping[str, Tensor], card: Card, ap: float, count: int
) -> None:
    """Keep the weights of the `count` best epochs in `folder`, each named by its epoch and AP;
    of equals the earlier.

    Which are kept follows from the files there, so a run that is resumed goes on with them. A file
    that falls behind is removed once the new one is whole.
    """
    name = f"epoch-{card.epoch:04}-ap-{ap:.4f}.safetensors"
    before = {path.name: match for path in folder.glob("*") if (match := KEPT.fullmatch(path.name))}
    # Evaluated again: replaced
    others = {other for other, match in before.items() if int(match[1]) != card.epoch}
    kept = sorted({*others, name}, key=_worst_last)[:count]
    if name in kept:
        save_weights(folder / name, weights, card)
    for gone in before.keys() - set(kept):
        (folder / gone).unlink(missing_ok=True)


def _worst_last(name: str) -> tuple[float, int]:
    match = KEPT.fullmatch(name)
    assert match is not None
    return -float(match[2]), int(match[1])


def save_run(
    run: Path,
    state: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None,
    card: Card,
    *,
    keep: bool = False,
) -> None:
    """Write state and last weights of a run (None: nothing is trained yet),
    both whole before either takes its place.

    The state holds the card too, so it alone decides where a run goes on: it comes first, and
    weights that were not moved after it are written again when the run is resumed. `keep`: the
    state that is there is whole, and stays as the previous one. Raises `OSError` where they cannot
    be written.
    """
    if keep:
        with contextlib.suppress(OSError):  # a file system without hard links keeps none
            (run / PREVIOUS).unlink(missing_ok=True)
            (run / PREVIOUS).hardlink_to(run / STATE)
    whole = {**state, CARD: card.to_metadata()}
    files: list[tuple[Path, Write]] = [(run / STATE, lambda file: torch.save(whole, file))]
    if weights is not None:
        files.append((run / LAST, _weights(weights, card)))
    try:
        replace_files(*files)
    except (
        RuntimeError,
        SafetensorError,
    ) as error:  # whatever else keeps a file from being written
        raise OSError(first_line(error)) from error


def _weights(weights: Mapping[str, Tensor], card: Card) -> Write:
    plain = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    return lambda file: save_file(plain, file, card.to_metadata())


def metadata_of(path: Path) -> dict[str, str] | None:
    """The metadata in the header of a weights file; None where there is no whole file."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return None


def find_weights(place: Path) -> Path:
    """The weights file of a run, the best one or else the last; or the file itself."""
    if place.is_file():
        return place
    for name in (BEST, LAST):
        if (place / name).is_file():
            return place / name
    if (place / STATE).is_file():
        raise UserError(
            f"{place}: a run that has not trained yet",
            f"Go on with it: {command('train', '--resume', place)}",
        )
    what = (
        "no run: there are no weights in this folder"
        if place.is_dir()
        else "no such folder or file"
    )
    raise UserError(f"{place}: {what}", GIVE_A_RUN)


GIVE_A_RUN = "Give the folder of a run, or a .safetensors file from one."
EXPORTED = (".onnx", ".xml", ".pt2")


def load_weights(place: Path) -> tuple[dict[str, Tensor], Card]:
    """Weights and card of a run's folder or of one file;
    a file that is broken gives one error and nothing else.
    """
    path = find_weights(place)
    if path.suffix in EXPORTED:
        raise UserError(
            f"{path}: an exported network, which runs and no more",
            "Give the run that it was made from.",
        )
    try:
        with safe_open(path, framework="pt") as file:
            card = Card.from_metadata(file.metadata(), path)
            return {name: file.get_tensor(name) for name in file.keys()}, card  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        if path.suffix != ".safetensors":  # a picture in the place of the run, for example
            raise UserError(f"{path}: not a checkpoint ({error})", GIVE_A_RUN) from None
        empty = (
            "an empty file (0 bytes)"
            if path.stat().st_size == 0
            else f"not a whole checkpoint ({error})"
        )
        raise UserError(f"{path}: {empty}", _other_copy(path)) from None


def _other_copy(path: Path) -> str:
    others = [name for name in (BEST, LAST) if name != path.name and path.with_name(name).is_file()]
    return (
        f"Take another copy, or the run's other file: {path.with_name(others[0])}."
        if others
        else OTHER_COPY
    )


def fill(detector: Detector, weights: Mapping[str, Tensor], path: Path) -> Detector:
    """The detector with these weights, all of them;
    `UserError` that names file and tensor, and nothing is loaded.
    """
    check_fit(detector, weights, path)
    detector.load_state_dict(dict(weights))
    return detector


def check_fit(detector: Detector, weights: Mapping[str, Tensor], path: Path) -> None:
    """Raises `UserError` that names file and tensor where the weights are not the detector's,
    or not finite.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in detector.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [f"{name} is missing" for name in expected if name not in given]
    for name, shape in given.items():
        if expected.get(name, shape) != shape:
            wrong.append(f"{name} has the shape {shape}, not {expected[name]}")
    wrong += [f"{name} is no part of it" for name in given if name not in expected]
    wrong = wrong or [
        f"{name} holds numbers that are not finite" for name, t in weights.items() if not _finite(t)
    ]
    if wrong:
        more = f", and {len(wrong) - 1} more such" if wrong[1:] else ""
        raise UserError(
            f"{path}: no weights for the recipe in its card: {wrong[0]}{more}", _other_copy(path)
        )


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def load_whole(place: Path) -> tuple[dict[str, Tensor], Card]:
    """As `load_weights`, with the check that the weights are what the card's recipe needs.
    No detector is built.
    """
    path = find_weights(place)
    weights, card = load_weights(path)
    with torch.device("meta"):
        detector = build_detector(card.recipe.untrained().detector, len(card.classes))
    check_fit(detector, weights, path)
    return weights, card


def load_plain(path: Path, allowed: Sequence[type] = ()) -> Any:
    """What `torch.save` wrote: tensors, numbers and containers,
    and objects of `allowed` types, on the host.

    Nothing else is unpickled: it could run any code. `UserError` says in our words what is wrong
    with a file.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickles that are none of torch's
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle make the reader fail in any way
        if path.stat().st_size == 0:
            raise UserError(f"{path}: an empty file (0 bytes)", OTHER_COPY) from None
        if match := re.search(
            r"(?:GLOBAL|class) `?([\w.]+)`? was not an allowed global", str(error)
        ):
            raise UserError(
                f"{path}: holds Python objects besides tensors ({match[1]}). They could run "
                "code, and are not read",
                "Save its state dict alone: torch.save(model.state_dict(), FILE).",
            ) from None
        raise UserError(
            f"{path}: not a whole file of torch.save: cut off, or something else", OTHER_COPY
        ) from None


def load_state(run: Path) -> dict[str, Any]:
    """The state to resume `run` from, on the host;
    where the last one is missing or torn, the one before it.

    That is told as `Advice`, and the run ends with the same bits: it only has more to do.
    `UserError` where neither is whole.
    """
    try:
        return _read_state(run, STATE)
    except UserError as error:
        try:
            state = _read_state(run, PREVIOUS)
        except UserError:
            raise error from None
        message = (
            f"{error.message}. The run goes on from the state before it, {PREVIOUS}, after step "
            f"{state.get('step')}."
        )
        warnings.warn(Advice(message), stacklevel=2)
        return {**state, OLDER: True}


def _read_state(run: Path, name: str) -> dict[str, Any]:
    path = run / name
    if not path.is_file():
        raise _nothing_to_resume(run)
    try:
        state = load_plain(path)
    except UserError as error:
        raise UserError(error.message, _weights_alone(run) or error.remedy) from None
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"{path}: not the state of a run", _weights_alone(run) or OTHER_COPY)
    return state


def _nothing_to_resume(run: Path) -> UserError:
    if run.is_file():
        return UserError(
            f"{run}: a file, and a run is a folder",
            f"Give the folder: {command('train', '--resume', run.parent)}",
        )
    if not run.is_dir():
        return UserError(f"{run}: no such run", "Give the folder of a started run.")
    return UserError(
        f"{run}: nothing to resume: {STATE} is missing",
        _weights_alone(run) or "Give the folder of a started run.",
    )


def _weights_alone(run: Path) -> str:
    """The remedy for a run whose weights alone are there; empty where they are not."""
    if not any((run / name).is_file() for name in (BEST, LAST)):
        return ""
    return (
        "It cannot be resumed. Its weights are there: start a new run from them with "
        f"{new_run(run)}"
    )


def new_run(weights: Path) -> str:
    """The command for a new run from these weights, or from those of a run."""
    return command("train", "--weights", weights, "--data", "FOLDER")
