"""Reading weights from wherever they are.
Nothing is ever unpickled but plain tensors and containers.
"""

from __future__ import annotations

import argparse
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from detrellis.data.files import read_object
from detrellis.engine.card import OTHER_COPY
from detrellis.engine.checkpoint import CARD, load_plain
from detrellis.errors import UserError, cut

# What NumPy pickles numbers with; its module has another name in each major version.
_scalar = np.float64(0).__reduce__()[0]
NAMED = "Give a file with a state dict, alone or under the name `model`."
HUB = "hf:"
OURS = "model.safetensors"  # what `push` calls the weights of a run
PATTERNS = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]


def fetch(repository: str) -> Path:
    """The folder of `org/name` from the Hugging Face Hub, or from its cache."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )
    except ImportError:
        raise UserError(
            f"{HUB}{repository}: huggingface_hub is missing", "pip install huggingface_hub"
        ) from None
    try:
        folder = Path(snapshot_download(repository, allow_patterns=PATTERNS))
        if not any(folder.glob("*.safetensors")):  # old repositories hold a pickle only
            folder = Path(
                snapshot_download(repository, allow_patterns=[*PATTERNS, "pytorch_model.bin"])
            )
        return folder
    except HFValidationError as error:
        raise UserError(f"{HUB}{repository}: {error}", f"Write {HUB}organisation/name.") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"{HUB}{repository} cannot be fetched ({first})",
            "Check the name and the connection, or give a local folder with config.json and "
            "model.safetensors.",
        ) from None


def read_config(path: Path) -> dict[str, Any]:
    """The object in one of the JSON files of a Hugging Face folder."""
    if not path.is_file():
        raise UserError(
            f"{path} is missing", "Give a folder with config.json and model.safetensors."
        )
    return read_object(path, again=OTHER_COPY.rstrip("."))


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder, in one file or in shards."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = read_config(index).get("weight_map")
        names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
        # A file elsewhere is none of the checkpoint's
        if not names or any(Path(name).name != name for name in names):
            raise UserError(f"{index}: `weight_map` does not name files of this folder", OTHER_COPY)
        return {k: v for name in names for k, v in read_safetensors(folder / name).items()}
    if (folder / "model.safetensors").is_file():
        return read_safetensors(folder / "model.safetensors")
    if (folder / "pytorch_model.bin").is_file():
        return read_pth(folder / "pytorch_model.bin")[0]
    raise UserError(
        f"{folder}: no model.safetensors", "Give a folder with config.json and model.safetensors."
    )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing, although its index names it", OTHER_COPY) from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({cut(str(error))})", OTHER_COPY
        ) from None
    return tensors


class _Kind:
    """Stands for `numpy.ndarray` in pickles, which call it by nothing but `_empty`:
    a size alone could take any memory."""


def _empty(kind: type, shape: object, code: object) -> Any:
    """The array that the next step of a pickle fills."""
    return np.zeros(0)


def _bytes(text: str, encoding: str) -> bytes:
    """What the oldest pickles write bytes with."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode(encoding)


class _Arrays(pickle.Unpickler):
    """Finds what NumPy's arrays are pickled with, and nothing else."""

    KNOWN: ClassVar[dict[tuple[str, str], Any]] = {
        **{(f"numpy.{core}.multiarray", "_reconstruct"): _empty for core in ("core", "_core")},
        **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
        ("numpy", "ndarray"): _Kind,
        ("numpy", "dtype"): np.dtype,
        ("collections", "OrderedDict"): OrderedDict,
        ("_codecs", "encode"): _bytes,
    }

    def find_class(self, module: str, name: str) -> Any:
        """One of those. Raises `pickle.UnpicklingError` for anything else, before it is called."""
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return self.KNOWN[module, name]


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of detectron2's `.pkl`:
    a dictionary of NumPy arrays, alone or under the name `model`.

    Nothing but arrays and containers is unpickled. Raises `UserError` for a file that asks for
    more, or is damaged.
    """
    try:
        with path.open("rb") as file:
            content = _Arrays(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise UserError(f"{path}: not a pickle of arrays ({cut(str(error))})", OTHER_COPY) from None
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: not a state dict", NAMED)
    numeric = {
        str(k): v for k, v in content.items() if isinstance(v, np.ndarray) and v.dtype.kind in "fiu"
    }
    if not numeric:
        raise UserError(f"{path}: holds no arrays", NAMED)
    return {name: torch.from_numpy(np.array(value)) for name, value in numeric.items()}


def read_pth(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict in a `.pth` file,
    and the training arguments beside it where the file has them.

    Reference repositories keep it under `model` (or `state_dict`), with an `argparse.Namespace`,
    and averaged weights under `ema.module` or `ema_model`, which are taken where there are any:
    they are what its authors evaluate.
    """
    content = load_plain(path, [argparse.Namespace])
    if isinstance(content, Mapping) and {CARD, "optimizer"} <= content.keys():
        raise UserError(
            f"{path}: the state of a run, not its weights", f"Give the run's folder: {path.parent}."
        )
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: not a state dict", NAMED)
    arguments = content.get("args")
    average = content.get("ema")
    if isinstance(average, Mapping) and isinstance(average.get("module"), Mapping):
        content = {"model": average["module"]}
    for name in ("ema_model", "model", "state_dict", "model_state_dict"):
        if isinstance(content.get(name), Mapping):
            content = content[name]
            break
    weights = {
        str(k).removeprefix("module."): v for k, v in content.items() if isinstance(v, Tensor)
    }
    if not weights:
        raise UserError(f"{path}: holds no tensors", NAMED)
    return weights, dict(vars(arguments)) if isinstance(arguments, argparse.Namespace) else {}
