"""What has to be known of a model type of transformers,
or of a reference repository, to read its checkpoints, and to write the former's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from detrellis.interop.links import Pair
from detrellis.recipes.config import Recipe
from detrellis.recipes.detector import DetectorConfig

Config = Mapping[str, Any]
Weights = Mapping[str, Tensor]


class Loaded(NamedTuple):
    """Their tensors, as the table of `names` calls them."""

    weights: dict[str, Tensor]
    names: list[Pair]


class Family(NamedTuple):
    """The classes of a model type, and the way between its files and ours."""

    about: str  # what people call it
    model: str  # its class
    processor: str  # the class of its image processor
    recipe_of: Callable[[Config], Recipe]  # of a `config.json`
    # What `config.json` says of the network, without its classes
    config_of: Callable[[Recipe], dict[str, Any]]
    # Of a file's tensors, with its `config.json`
    loaded: Callable[[Weights, DetectorConfig, Config], Loaded]
    names: Callable[[DetectorConfig], list[Pair]]  # of the tensors that `stored` expects
    # All tensors of so many classes, as a disk has them
    stored: Callable[[Weights, Recipe, int], dict[str, Tensor]]
    detections: int | None = 100  # that post-processing keeps unless told; None: one for each query
    # Settings of its image processor, instead of those of all; None: it has none
    pictures: Mapping[str, Any] = {}


class Repository(NamedTuple):
    """A reference repository whose state dicts are read,
    some with training arguments beside them.
    """

    about: str  # its models, as people call them
    holds: Callable[[Weights], bool]  # whether the names are its own
    recipe_of: Callable[[Weights, Config], Recipe]  # of shapes and arguments
    class_count: Callable[[Weights, DetectorConfig], int]  # without "no object"
    loaded: Callable[[Weights, DetectorConfig], Loaded]
