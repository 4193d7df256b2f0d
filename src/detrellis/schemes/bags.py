"""One-to-many supervision by as many queries as fit each target,
which DAC-DETR and MS-DETR share.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from detrellis.matching import Dynamic
from detrellis.schemes.config import DynamicConfig
from detrellis.set_loss import SetLoss
from detrellis.supervision import Supervision


def one_to_many(
    base: Supervision, k: int, config: DynamicConfig, generator: torch.Generator
) -> Supervision:
    """The base's losses, of pairs by the dynamic rule,
    its random part drawn from the `generator`.
    """
    assert isinstance(base.rule, SetLoss)
    assign = Dynamic(
        lambda count: torch.randperm(count, generator=generator).numpy(),
        k,
        config.threshold,
        config.overlap,
        config.positive_fraction,
    )
    return replace(base, assign=assign, rule=replace(base.rule, once=True))
