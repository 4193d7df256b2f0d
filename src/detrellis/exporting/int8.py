"""An exported network with its backbone, neck and encoder in 8-bit integers, and what that costs.

OpenVINO's nncf chooses the ranges of the activations on training pictures. What chooses queries,
and the decoder, stay in float: a box is refined by small differences, which eight bits round away.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from detrellis.data.annotations import Annotations
from detrellis.data.dataset import DetectionDataset
from detrellis.data.doctor.check import prepare_split
from detrellis.data.layout import DataSource
from detrellis.data.transforms import eval_transform
from detrellis.distributed import World
from detrellis.engine.card import Card
from detrellis.engine.evaluate import EvalOptions, collect, eval_loader, evaluated_split
from detrellis.errors import UserError
from detrellis.exported import INPUT, Array, ExportedDetector, load_exported
from detrellis.predictions.model import Model

PICTURES = 128  # at most, spread evenly over the training images
MAX_LOSS = 0.01  # AP that eight bits may cost
# In eight bits; all else stays in float
PARTS = ("detector.backbone", "detector.neck", "detector.encoder")


@dataclass(frozen=True)
class Measured:
    """How good and how fast a network is:
    AP, and the median time of one picture in milliseconds.
    """

    ap: float
    ms: float


@dataclass(frozen=True)
class Quantised:
    """What eight bits cost: the network before and after, on the same validation images."""

    pictures: int  # that it was calibrated on
    before: Measured
    after: Measured

    @property
    def passed(self) -> bool:
        """Whether it costs no more than `MAX_LOSS`."""
        return self.before.ap - self.after.ap <= MAX_LOSS

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    def table(self) -> Table:
        """For a rich console."""
        caption = (
            f"Calibrated on {self.pictures} training images; times on this machine, a picture at "
            "a time"
        )
        table = Table(
            title="What eight bits cost",
            title_justify="left",
            caption=caption,
            caption_justify="left",
        )
        for name in ("", "AP", "ms"):
            table.add_column(name, justify="right" if name else "left")
        for name, measured in (("float32", self.before), ("int8", self.after)):
            table.add_row(name, f"{100 * measured.ap:.1f}", f"{measured.ms:.1f}")
        return table


class Quantiser:
    """Makes int8 of exported networks of one run: what it calibrates on, and what it measures."""

    def __init__(self, run: str | Path, model: Model, data: str | Path | None) -> None:
        """Find the images: of `data`, a data set in a known layout, or of the run's own.

        Raises `UserError` where there are none, or they have errors.
        """
        source, split = evaluated_split(run, model.data, EvalOptions(data))
        self.val = _split(source, split, model)
        self.train = _split(source, "train", model) if "train" in source.splits else self.val
        if not len(self.val.boxes):
            raise UserError(
                "--int8: the validation split has no objects, so nobody can see what eight "
                "bits cost"
            )

    def quantise(self, network: Path, out: Path, metadata: Mapping[str, str]) -> Quantised:
        """Write the OpenVINO `network` to `out`, in eight bits, and say what that costs.

        Raises `UserError` where it costs more than `MAX_LOSS`.
        """
        import openvino

        pictures = Pictures(self.train, *load_exported(network))
        model = _quantised(openvino.Core().read_model(network), pictures)
        for key, value in metadata.items():
            model.set_rt_info(value, [key])
        openvino.save_model(model, out, compress_to_fp16=False)
        done = Quantised(len(pictures), self._measured(network), self._measured(out))
        if done.passed:
            return done
        before, after = done.before, done.after
        raise UserError(
            f"--int8 costs {100 * (before.ap - after.ap):.1f} AP: {100 * before.ap:.1f} in "
            f"float32, {100 * after.ap:.1f} in int8 ({before.ms:.1f} and {after.ms:.1f} ms a "
            "picture). Nothing was written",
            f"At most {100 * MAX_LOSS:.0f} AP is accepted. Calibrate on more or other pictures "
            "with --calibrate DATA, or take --fp16.",
        )

    def _measured(self, network: Path) -> Measured:
        detector, card = load_exported(network)
        run, times = detector.network.run, []

        def timed(pixels: Array) -> Mapping[str, Array]:
            start = time.perf_counter()
            outputs = run(pixels)
            times.append(time.perf_counter() - start)
            return outputs

        detector.network = detector.network._replace(run=timed)
        world = World(0, 1, torch.device("cpu"))
        with contextlib.closing(eval_loader(self.val, card.recipe.data, 1, 0, world)) as loader:
            (evaluator,) = collect(detector.eval(), loader, self.val, world.device)
        return Measured(evaluator.compute().ap or 0.0, 1000 * statistics.median(times))


class Pictures:
    """Images of a split as an exported network reads them, one at a time, `(1, 3, h, w)` from 0 to
    1; always the same ones, however often they are iterated over. Raises `UserError` at one of a
    size that the network does not take."""

    def __init__(self, annotations: Annotations, detector: ExportedDetector, card: Card) -> None:
        data, self.detector = card.recipe.data, detector
        self.dataset = DetectionDataset(annotations, eval_transform(data.size, **data.resizing()))
        count = len(self.dataset)
        self.chosen = np.unique(
            np.linspace(0, count - 1, min(count, PICTURES)).round().astype(int)
        ).tolist()

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[dict[str, Array]]:
        for index in self.chosen:
            image = self.dataset[0, index].image[None]
            self.detector.check_size(*image.shape[-2:])
            yield {INPUT: image.numpy().astype(np.float32) / 255}


def _split(source: DataSource, split: str, model: Model) -> Annotations:
    return prepare_split(source, split, model.classes)[0]


def _quantised(model: Any, pictures: Pictures) -> Any:
    """The OpenVINO model with `PARTS` in eight bits."""
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    names = [op.get_friendly_name() for op in model.get_ops()]
    float_ = [name for name in names if not name.startswith(PARTS)]
    return nncf.quantize(
        model,
        nncf.Dataset(pictures),
        subset_size=len(pictures),
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=float_, validate=False),
    )
