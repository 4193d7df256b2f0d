"""What an auxiliary head is to the scheme."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from detrellis.schemes.collaborative.scene import Draw, Found, Predictions, Scene


class Branch(nn.Module, ABC):
    """A head with one-to-many assignment on the encoder's memory."""

    name: ClassVar[str]
    softmax: ClassVar[bool] = False  # its classes exclude each other, and a last one is "no object"

    @abstractmethod
    def forward(self, scene: Scene, draw: Draw) -> tuple[dict[str, Tensor], list[Found]]:
        """Losses by name, weighted against each other, and what is assigned in each image."""

    @abstractmethod
    def predict(self, scene: Scene) -> list[Predictions]:
        """The branch's own detections in each image."""
