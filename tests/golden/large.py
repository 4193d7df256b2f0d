"""Parts of the large recipes, against Co-DETR's, EVA-02's and Stable-DINO's."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from detrellis.data.sampler import repeat_factors, repeats
from detrellis.losses import bce_loss
from detrellis.nn.encoder import MemoryFusion
from detrellis.nn.eva import EvaViT
from detrellis.nn.pyramid import SimplePyramid
from detrellis.pairs import hard_target
from detrellis.schemes.config import FederatedConfig
from detrellis.schemes.federated import Federated
from detrellis.set_loss import CLASSIFICATION, SetLoss
from detrellis.supervision import Supervision, supervise
from detrellis.types import Assignment, Targets

from .align import one_layer
from .arrays import Arrays, close

DRAWS = 2000


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
        global_blocks=c["global_blocks"],
        grid=c["pretrain"] // c["patch"],
        extent=c["image"] // c["patch"] if c["fixed_rope"] else None,
    )
    _loaded(network, {name: value for name, value in a.group("p/").items() if "rope" not in name})
    maps: list[Tensor] = []
    for block in network.blocks:
        block.register_forward_hook(lambda _module, _arguments, out: maps.append(out))
    close(network.embedded(a["pixel_values"]), a["embedded"], 1e-10)
    (out,) = network(a["pixel_values"])
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
    pyramid = _loaded(SimplePyramid(channels, width, (4, 8, 16, 32, 64)), state)
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
    _loaded(
        fusion,
        {f"{part}.{w}": a[f"{prefix}{w}"] for part, prefix in names.items() for w in weights},
    )
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


LOSSES = {
    "bce": SetLoss(hard_target, bce_loss, negative_weight=1.0, gamma=0.0),
    "focal": SetLoss(),
    "qfl": CLASSIFICATION["qfl"],
}


def check_federated(a: Arrays) -> None:
    """In each case three losses over a given sample of classes,
    and how often classes are drawn in many.
    """
    for case in range(a.count(r"c\d+_num")):
        targets = {
            name: a[f"c{case}_{name}"]
            for name in ("counts", "gt", "kept", "logits", "positive", "iou")
        }
        _check_losses_over(
            a, case, **{name: targets[name] for name in ("kept", "logits", "positive", "iou")}
        )
        if f"c{case}_frequency" in a:
            power, number = float(a[f"c{case}_power"]), a.number(f"c{case}_num")
            scheme = Federated(FederatedConfig(classes=number, power=power), len(targets["counts"]))
            scheme.count_classes(targets["counts"])
            truth = Targets(
                targets["gt"], torch.zeros(len(targets["gt"]), 4), (len(targets["gt"]),)
            )
            drawn = torch.zeros(len(targets["counts"]))
            for seed in range(DRAWS):
                scheme.reseed(seed)
                columns = scheme.columns(truth)
                assert columns[targets["gt"]].all()
                assert columns.sum() == max(number, len(targets["gt"].unique()))
                drawn += columns
            drawn[targets["gt"]] = 0
            # The reference's frequencies are of 20,000 draws; these of fewer, within five standard
            # deviations.
            assert (drawn / DRAWS - a[f"c{case}_frequency"]).abs().max() < 5 * 0.5 / DRAWS**0.5


def _check_losses_over(
    a: Arrays, case: int, *, kept: Tensor, logits: Tensor, positive: Tensor, iou: Tensor
) -> None:
    columns = torch.zeros(logits.shape[1], dtype=torch.bool).index_fill(0, kept, True)
    query, label = positive.unbind(1)
    # Boxes of unit height that overlap their targets by the IoU that is wanted.
    boxes = torch.tensor([0.5, 0.5, 1.0, 1.0], dtype=torch.float64).repeat(len(iou), 1)
    boxes[:, 2] = iou
    whole = torch.tensor([0.5, 0.5, 1.0, 1.0], dtype=torch.float64).repeat(len(label), 1)
    for name, rule in LOSSES.items():
        variable = logits.clone().requires_grad_()
        supervision = Supervision(
            rule=rule, weights={"class": 1.0, "box": 0.0, "giou": 0.0}, columns=lambda _: columns
        )
        rows = torch.arange(len(query))
        known = Assignment(torch.zeros_like(query), torch.zeros_like(query), query, rows, rows)
        truth = Targets(label, whole, (len(label),))
        task = supervision.known(known).task(
            "main", one_layer(variable[None], boxes[None]), truth, torch.tensor(1.0)
        )
        loss = supervise([task])[0]["main/class/0"]
        loss.backward()
        assert variable.grad is not None
        assert not variable.grad[:, ~columns].any()
        close(loss, a[f"c{case}_{name}"], 1e-9, name)
        close(variable.grad, a[f"c{case}_{name}_grad"], 1e-9, name)
