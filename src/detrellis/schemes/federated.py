"""The federated loss (Zhou et al., 2021), for sets with very many classes such as LVIS.

At each step the class losses of all queries count a few classes only: those that the batch has, and
others drawn by how many images have them, until there are enough. A rare class is then not pushed
down by every image that lacks it. Boxes and the matching are untouched.

| deviation from the released code | why |
| --- | --- |
| the background is no class that counts towards `classes` | there it takes a place in most steps, by a slip |
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from detrellis.schemes.base import TrainingScheme
from detrellis.schemes.config import FederatedConfig
from detrellis.supervision import Supervision
from detrellis.types import Targets


class Federated(TrainingScheme):
    """Losses over a sample of the classes, the same for all blocks, layers and heads of a step."""

    name = "federated"
    requires = frozenset({"sigmoid_scores"})

    def __init__(self, config: FederatedConfig, classes: int) -> None:
        super().__init__()
        self.config = config
        self.log_weights = torch.zeros(classes)
        self.scores = torch.zeros(classes)

    def count_classes(self, images: Tensor) -> None:
        """See `TrainingScheme`."""
        self.log_weights = self.config.power * images.to(torch.float32).log()

    def reseed(self, seed: int) -> None:
        """Draw anew: the highest sums of log weights and Gumbel noise are a draw without
        replacement.
        """
        super().reseed(seed)
        uniform = torch.rand(len(self.log_weights), generator=self.generator).clamp(min=1e-30)
        self.scores = self.log_weights - (-uniform.log()).log()

    def supervision(self, base: Supervision) -> Supervision:
        """The base's over the sample."""
        return replace(base, columns=self.columns)

    def columns(self, targets: Targets) -> Tensor:
        """The classes that count in this step, `(C,)` bool: those of the targets always."""
        scores = self.scores.to(targets.labels.device, non_blocking=True)
        scores = scores.index_fill(0, targets.labels, torch.inf)
        chosen = scores.topk(min(self.config.classes, len(scores))).indices
        return torch.isposinf(scores).index_fill(0, chosen, True)
