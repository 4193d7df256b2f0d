"""Parts of the large recipes, against Co-DETR's, EVA-02's and Stable-DINO's."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from detrellis.data.sampler import repeat_factors, repeats
from detrellis.nn.encoder import MemoryFusion
from detrellis.nn.eva import EvaViT
from detrellis.nn.pyramid import SimplePyramid

from .arrays import Arrays, close


def _loaded(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    module.double().load_state_dict(state)
    return module.eval()


def check_vit(a: Arrays) -> None:
    """Every block's map, the output and gradients; tables of angles are ours, not read."""
    c = a.json("cfg")
    network = EvaViT(
        width=c["d"],
        depth=c["depth"],
        heads=c["heads"],
        window=c["window"],
        globals_=c["global_blocks"],
        grid=c["pretrain"] // c["patch"],
        patch=c["patch"],
        extent=c["image"] // c["patch"] if c["fixed_rope"] else None,
    )
    _loaded(network, {name: value for name, value in a.group("p/").items() if "rope" not in name})
    maps: list[Tensor] = []
    for block in network.blocks:
        block.register_forward_hook(lambda _module, _arguments, out: maps.append(out))
    close(network.embedded(a["pixel_values"]), a["embedded"], 1e-10)
    out = network(a["pixel_values"])
    for i, found in enumerate(maps):
        close(found, a[f"block{i}"], 1e-10, f"block {i}")
    close(out, a["out"], 1e-10)
    (out * a["weight"]).sum().backward()
    parameters = dict(network.named_parameters())
    for name, expected in a.group("grad/").items():
        gradient = parameters[name].grad
        assert gradient is not None
        close(gradient, expected, 1e-9, name)


def check_pyramid(a: Arrays) -> None:
    """All levels."""
    state = a.group("p/")
    channels, width = state["p4.0.weight"].shape[1], state["p4.0.weight"].shape[0]
    pyramid = _loaded(SimplePyramid(channels, width), state)
    levels = pyramid(a["x"])
    assert len(levels) == a.count(r"out\d+")
    for i, level in enumerate(levels):
        close(level, a[f"out{i}"], 1e-10, f"level {i}")


def check_memory_fusion(a: Arrays) -> None:
    """Of the encoder's input and all its layers' outputs."""
    states = list(a["states"])
    fusion = MemoryFusion(states[0].shape[-1], len(states) - 1)
    names = {"projection": "", "norm": "norm_"}
    weights = ("weight", "bias")
    _loaded(fusion, {f"{part}.{w}": a[f"{prefix}{w}"] for part, prefix in names.items() for w in weights})
    close(fusion(states), a["out"], 1e-10)


def check_repeat_factors(a: Arrays) -> None:
    """LVIS' factors at several thresholds, and how often each image then stands in an epoch."""
    starts, labels = a.data["image_starts"], a.data["image_classes"]
    thresholds = [name.removeprefix("factors_") for name in a.data if name.startswith("factors_")]
    assert thresholds
    for threshold in thresholds:
        factors = repeat_factors(starts, labels, int(labels.max()) + 1, float(threshold))
        np.testing.assert_allclose(factors, a.data[f"factors_{threshold}"], rtol=1e-6)
        # As float32, in which the reference compares its draws.
        times = repeats(a.data[f"factors_{threshold}"], a.data["u"])
        np.testing.assert_array_equal(times, a.data[f"times_{threshold}"])
