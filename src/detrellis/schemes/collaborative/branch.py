"""What an auxiliary head is to the scheme:
a module with one-to-many assignment on the encoder's memory.
"""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from detrellis.schemes.collaborative.scene import BranchAssignment, Draw, Predictions, Scene


@runtime_checkable
class Branch(Protocol):
    """Dense heads are `DenseBranch`es."""

    name: ClassVar[str]
    softmax: ClassVar[bool]  # whether its classes exclude each other, and a last one is "no object"

    def __call__(self, scene: Scene, draw: Draw) -> tuple[dict[str, Tensor], BranchAssignment]:
        """Losses by name, weighted against each other, and what is assigned in each image."""

    def predict(self, scene: Scene) -> list[Predictions]:
        """The branch's own detections in each image."""
