"""AdamW over the recipe's parameter groups, and the learning rate along the run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from detrellis.errors import UserError
from detrellis.recipes.config import OptimConfig, ScheduleConfig

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)
# A stage and a block in it, or a block alone, as torchvision and timm name them: layer1.0,
# stages_0.blocks.1, blocks.7.
BLOCK = re.compile(
    r"(?:^|[._])(?:stages?|layers?|blocks?|features)[._]?(\d+)(?:\.(?:blocks?\.)?(\d+))?"
)


def learning_rate_scale(name: str, scaled: Mapping[str, float]) -> float:
    """Factor on the learning rate of parameter `name`; the first key that it contains decides."""
    return next((factor for key, factor in scaled.items() if key in name), 1.0)


def layer_factors(names: Sequence[str], rate: float) -> dict[str, float]:
    """Factor on the learning rate of each parameter by its depth in the backbone (BEiT, Bao et al.,
    2022).

    Of n blocks the last learns at `rate`, the first at `rate ** n`, and what comes before it at
    `rate ** (n + 1)`; what follows the last block, and all that is no backbone, has factor 1.
    `names` are in the model's order. A block is a residual block of a CNN, or a layer of a
    Transformer; what stands between two stages belongs to the later one's first block. Raises
    `UserError` where the backbone's names show no blocks.
    """
    blocks = {name: _block(name) for name in names if "backbone." in name}
    order = sorted({block for block in blocks.values() if block is not None})
    if not order:
        raise UserError(
            f"optim.layer_decay={rate:g}: detrellis does not know the blocks of this backbone",
            "Take -o optim.layer_decay=1 and one factor for all of it: -o "
            "optim.scaled.backbone=0.1.",
        )
    # Layers from here to the backbone's end
    factors, behind = dict.fromkeys(names, 1.0), len(order) + 1
    for name, block in blocks.items():
        if block is not None:
            behind = len(order) - order.index(block)
            factors[name] = rate**behind
        elif behind > len(order):  # no block yet: the stem, patches, positions
            factors[name] = rate**behind
    return factors


def _block(name: str) -> tuple[int, int] | None:
    """The stage of a backbone's parameter and the block in it; None outside of blocks."""
    match = BLOCK.search(name.partition("backbone.")[2])
    return None if match is None else (int(match[1]), int(match[2] or 0))


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """One group for each factor and weight decay;
    `scale` stays in the group for `set_learning_rate`.
    """
    names = [name for name, _ in model.named_parameters()]
    by_depth = (
        dict.fromkeys(names, 1.0)
        if config.layer_decay == 1
        else layer_factors(names, config.layer_decay)
    )
    norms = {
        p for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            left_out = (parameter in norms and not config.decay_norms) or any(
                key in name for key in config.undecayed
            )
            decay = 0.0 if left_out else config.weight_decay
            factor = learning_rate_scale(name, config.scaled) * by_depth[name]
            groups.setdefault((factor, decay), []).append(parameter)
    rows = [
        {"params": p, "lr": config.lr * scale, "scale": scale, "weight_decay": decay}
        for (scale, decay), p in groups.items()
    ]
    # Fused: one pass over each tensor instead of a dozen, four times as fast on a CPU.
    return torch.optim.AdamW(rows, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def schedule_factor(step: float, steps: int, config: ScheduleConfig) -> float:
    """Factor on every learning rate after `step` of the run's `steps`."""
    progress = step / steps
    warmup = config.warmup_steps / steps if config.warmup_steps else config.warmup
    if progress < warmup:
        return progress / warmup
    if config.shape == "step":
        return float(0.1 ** sum(progress >= drop for drop in config.drops))
    begin = max(warmup, config.flat)
    along = max(progress - begin, 0.0) / max(1 - begin, 1e-9)
    return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * along))


def check_warmup(steps: int, config: ScheduleConfig) -> None:
    """`UserError` where a run of so many steps would be over before it is warm."""
    if config.warmup_steps >= steps:
        raise UserError(
            f"schedule.warmup_steps={config.warmup_steps}: the whole run has {steps} steps",
            f"Take fewer, such as -o schedule.warmup_steps={steps // 20}, or more --epochs.",
        )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of each parameter group: `lr` times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
