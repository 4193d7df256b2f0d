"""The reference repositories whose checkpoints are read."""

from __future__ import annotations

from detrellis.errors import UserError
from detrellis.interop import (
    codetr,
    dfine_pth,
    lwdetr_pth,
    mask2former,
    mask2former_config,
    maskdino,
    reference,
    rtdetr_pth,
)
from detrellis.interop.family import Loaded, Repository, Weights

MASK2FORMER = Repository(
    "Mask2Former",
    mask2former_config.is_mask2former,
    lambda weights, arguments: mask2former_config.recipe_of_weights(weights),
    lambda weights, detector: mask2former_config.class_count(weights),
    lambda weights, detector: Loaded(dict(weights), mask2former.detectron2(detector)),
)
# The first whose names they are.
REPOSITORIES = (
    MASK2FORMER,
    maskdino.REPOSITORY,
    dfine_pth.REPOSITORY,
    rtdetr_pth.REPOSITORY,
    lwdetr_pth.REPOSITORY,
    codetr.REPOSITORY,
    reference.REPOSITORY,
)


def repository_of(weights: Weights) -> Repository:
    """Whose checkpoint it is. `UserError` where nobody's that Detrellis knows."""
    for repository in REPOSITORIES:
        if repository.holds(weights):
            return repository
    known = ", ".join(repository.about for repository in REPOSITORIES)
    raise UserError("these names belong to no model that Detrellis knows", f"It reads {known}.")
