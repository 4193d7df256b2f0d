"""The Python interface: the same verbs and words as the command line, returning typed results."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Unpack

import torch

from detrellis.data.annotations import Annotations
from detrellis.data.check import prepare, prepare_split
from detrellis.data.classes import ClassMap
from detrellis.data.decode import read_image
from detrellis.data.files import IMAGE_SUFFIXES
from detrellis.data.layout import DataSource, find_data
from detrellis.data.loader import Loader, stack_images
from detrellis.data.transforms import eval_transform
from detrellis.detector import Detector
from detrellis.engine.bench import BenchResult, How, bench_recipe
from detrellis.engine.checkpoint import Card, find_weights, load_state, load_weights
from detrellis.engine.coco_eval import EvalResult
from detrellis.engine.console import track
from detrellis.engine.distributed import World, pick_device, world
from detrellis.engine.evaluate import On, collect, eval_loader, measured_on
from detrellis.engine.measure import Info, measure
from detrellis.engine.train import Job, TrainResult
from detrellis.engine.train import train as run_job
from detrellis.engine.transfer import Source
from detrellis.errors import UserError
from detrellis.interop.convert import convert as convert
from detrellis.interop.convert import load_any
from detrellis.interop.load import is_foreign
from detrellis.recipes import Recipe, find_recipe, tiny_sized
from detrellis.recipes.build import build
from detrellis.types import Detections
from detrellis.visualize import draw_detections

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console

Paths = str | Path | Sequence[str | Path]
Scale = Literal["tiny"]


@dataclass(frozen=True)
class Prediction:
    """Detections of one picture, with names and the data set's own category ids; best first."""

    path: Path
    size: tuple[int, int]  # height, width
    scores: list[float]
    names: list[str]
    labels: list[int]  # class index 0..C-1
    category_ids: list[int]
    boxes: list[tuple[float, float, float, float]]  # x1, y1, x2, y2 in pixels

    def to_coco(self, image_id: int) -> list[dict[str, Any]]:
        """COCO results, which tools for it read, each with the file's and the class's name added."""
        rows = zip(self.scores, self.names, self.category_ids, self.boxes, strict=True)
        return [
            {
                "image_id": image_id,
                "category_id": category,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
                "category_name": name,
                "file_name": str(self.path),
            }
            for score, name, category, (x1, y1, x2, y2) in rows
        ]

    def draw(self, class_names: Sequence[str]) -> Image:
        """The picture with boxes, names and scores."""
        from PIL import Image

        picture = Image.fromarray(read_image(self.path).permute(1, 2, 0).numpy())
        return draw_detections(picture, self.boxes, self.labels, self.scores, class_names)


@dataclass
class Model:
    """A detector that knows its recipe and its classes."""

    detector: Detector
    recipe: Recipe
    classes: ClassMap
    device: torch.device
    data: Mapping[str, Any] | None = None  # the `DataSource` it was trained on, as `to_dict` gives it

    def predict(self, paths: Paths, *, threshold: float = 0.3) -> list[Prediction]:
        """Detections scoring at least `threshold`, of images and of the images in folders, in order."""
        return list(self.stream(paths, threshold=threshold))

    def stream(self, paths: Paths, *, threshold: float = 0.3) -> Iterator[Prediction]:
        """As `predict`, one picture at a time."""
        data = self.recipe.data
        transform = eval_transform(data.size, **data.resizing())
        nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
        for path in find_pictures(paths):
            image = read_image(path)
            size = (int(image.shape[1]), int(image.shape[2]))
            batch = stack_images([transform(image, *nothing)[0]], transform.pad_to).to(self.device)
            found = self.detector.detect(batch, torch.tensor([size], device=self.device))[0]
            yield self._prediction(path, size, found, threshold)

    def _prediction(self, path: Path, size: tuple[int, int], found: Detections, threshold: float) -> Prediction:
        height, width = size
        boxes = found.boxes.cpu().clamp(min=0).minimum(torch.tensor([width, height, width, height]))
        kept = found.scores.cpu() >= threshold
        labels = found.labels.cpu()[kept].tolist()
        return Prediction(
            path,
            size,
            found.scores.cpu()[kept].tolist(),
            [self.classes.names[i] for i in labels],
            labels,
            [self.classes.ids[i] for i in labels],
            [tuple(b) for b in boxes[kept].tolist()],
        )


def find_pictures(paths: Paths) -> list[Path]:
    """Image files among `paths`, and those directly in folders among them, sorted by name."""
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(path)
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise UserError(f"{path}: no images in this folder", f"Known: {', '.join(sorted(IMAGE_SUFFIXES))}.")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder", "Give images or folders of images.")
    return found


def load(source: str | Path, *, classes: ClassMap | int | None = None, device: str | None = None) -> Model:
    """A trained detector from a run's folder or weights file, from a Hugging Face folder, `hf:org/name` or a reference
    repository's `.pth`; or an untrained one from a recipe's name.

    `classes` is for a recipe only: the class map, or a number of classes (default 80).
    """
    place, own = Path(source), pick_device(device)
    if place.exists() or is_foreign(source):
        weights, card = load_any(source)
        detector = build(card.recipe.untrained(), len(card.classes)).detector
        detector.load_state_dict(weights)
        return Model(detector.to(own).eval(), card.recipe, card.classes, own, card.data or None)
    if len(place.parts) > 1:
        raise UserError(f"{place}: no such run", "Give a run, a weights file, hf:org/name, or a recipe's name.")
    recipe = find_recipe(str(source))
    if not isinstance(classes, ClassMap):
        count = 80 if classes is None else classes
        classes = ClassMap(tuple(range(count)), tuple(f"class {i}" for i in range(count)))
    return Model(build(recipe, len(classes)).detector.to(own).eval(), recipe, classes, own)


def train(
    recipe: str | Recipe | None = None,
    *,
    weights: str | Path | None = None,
    data: str | Path | DataSource | None = None,
    train: str | Path | None = None,
    train_images: str | Path | None = None,
    val: str | Path | None = None,
    val_images: str | Path | None = None,
    scale: Scale | None = None,
    scheme: str | Sequence[str] = (),
    override: str | Sequence[str] = (),
    epochs: int | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
    workers: int = 2,
    skip_bad: bool = False,
    console: Console | None = None,
) -> TrainResult:
    """Train a recipe on a data set: a folder in a known layout (`data`), or COCO files (`train`, `val`).

    `weights` are what it starts from: a run's folder or weights file, of any classes. What fits is taken over, rows of
    the class heads by the classes' names; the result's `transfer` tells what did. Without `recipe`, theirs is trained.
    `scale="tiny"` takes the recipe at a size for CPUs and small data, `scheme` adds training schemes (`"cdn=50"`),
    `override` sets recipe fields (`"optim.lr=1e-4"`), `out` is the run's folder (default: `runs/` with the recipe's
    name and the time). Raises `UserError` where the data set has errors, unless `skip_bad` drops the bad records.
    """
    own_recipe, initial = _start(recipe, weights)
    chosen = _chosen(own_recipe, scale, scheme, override)
    if epochs is not None:
        chosen = chosen.override([f"schedule.epochs={epochs}"])
    source = find_data(data, train, train_images, val, val_images)
    folder = Path(out) if out is not None else Path("runs") / f"{chosen.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (folder / "last.state.pt").exists():
        raise UserError(
            f"{folder}: there is a run in this folder", f"Go on with it: --resume {folder}. Or take another --out."
        )
    with world(device) as own:
        training, validation, classes = _prepared(source, skip_bad, own, console)
        origin = None if weights is None else str(weights) if is_foreign(weights) else str(Path(weights).absolute())
        card = Card(chosen, classes, source.to_dict(), seed, skip_bad, weights=origin)
        return run_job(Job(card, training, validation, folder, workers, initial), own, console=console)


def _start(recipe: str | Recipe | None, weights: str | Path | None) -> tuple[str | Recipe, Source | None]:
    """The recipe to train, by default that of the weights, and the weights to start from."""
    if weights is None:
        if recipe is None:
            raise UserError(
                "train: which recipe?",
                "For example: detrellis train tiny --data my_data. See detrellis recipes. "
                "Or start from a trained one with its own recipe: --weights RUN.",
            )
        return recipe, None
    tensors, card = load_any(weights)
    objectness = card.recipe.detector.proposal_targets == "objectness"
    return card.recipe if recipe is None else recipe, Source(tensors, card.classes, objectness)


def resume(
    run: str | Path, *, device: str | None = None, workers: int = 2, console: Console | None = None
) -> TrainResult:
    """Continue a run that was stopped, bit for bit; recipe, data and seed are the run's own."""
    place = Path(run)
    state = load_state(place)
    _, card = load_weights(place / "last.safetensors")
    with world(device) as own:
        training, validation, classes = _prepared(DataSource.from_dict(card.data), card.skip_bad, own, console)
        if classes != card.classes:
            raise UserError(f"{place}: the data set's classes have changed since", "Start a new run on the new data.")
        fresh = replace(card, epoch=0, stats=None)
        return run_job(Job(fresh, training, validation, place, workers), own, state, console=console)


def evaluate(
    run: str | Path,
    *,
    results: str | Path | None = None,
    nms: float | None = None,
    device: str | None = None,
    progress: bool = False,
    **on: Unpack[On],
) -> EvalResult:
    """COCO box AP of a run on its own validation split, on another split, or on another data set with its classes.

    `on` is what `On` in `engine/evaluate.py` lists: `data`, `val`, `split`, `skip_bad`, `workers` and so on. `results`
    names a file for the detections in COCO's results format. `nms` applies non-maximum suppression at that IoU first:
    how much AP that gains says how many duplicates the detector leaves. Raises `UserError` where the data set has
    errors, unless `skip_bad` drops the bad records.
    """
    with world(device) as own, open_split(run, own, **on) as opened:
        batches = track(opened.loader, "evaluate", len(opened.loader), progress and own.leads)
        evaluator = collect(opened.model.detector, batches, opened.annotations, own.device, nms)
        if results is not None and own.leads:
            Path(results).parent.mkdir(parents=True, exist_ok=True)
            evaluator.results_json(results)
        return evaluator.compute()


class Opened(NamedTuple):
    """A trained detector, and this process's share of the images that it is measured on."""

    run: str
    model: Model
    annotations: Annotations
    loader: Loader
    files: str  # where the annotations come from


@contextlib.contextmanager
def open_split(run: str | Path, own: World, **on: Unpack[On]) -> Iterator[Opened]:
    """Load a run and what it is measured on; the loader's workers end with the context."""
    model = _trained(run, str(own.device))
    source, split = measured_on(run, model.data, on)
    annotations, _ = prepare_split(source, split, model.classes, on.get("skip_bad", False))
    loader = eval_loader(annotations, model.recipe.data, on.get("batch_size", 4), on.get("workers", 2), own)
    with contextlib.closing(loader):
        yield Opened(str(run), model, annotations, loader, str(source.splits[split].annotations))


def predict(
    run: str | Path,
    paths: Paths,
    *,
    threshold: float = 0.3,
    out: str | Path | None = None,
    device: str | None = None,
    progress: bool = False,
) -> list[Prediction]:
    """Detections of a run on images and folders; with `out`, annotated pictures and `predictions.json` go there."""
    model = _trained(run, device)
    pictures = find_pictures(paths)
    found = track(model.stream(pictures, threshold=threshold), "predict", len(pictures), progress)
    return list(found) if out is None else save_predictions(model, found, Path(out))


def _trained(run: str | Path, device: str | None) -> Model:
    """As `load`, but no recipe's name: it would predict with random weights."""
    return load(run if is_foreign(run) else find_weights(Path(run)), device=device)


def save_predictions(model: Model, found: Iterable[Prediction], out: Path) -> list[Prediction]:
    """Write each prediction's picture as it comes, and all of them as COCO results; returns them as a list.

    A picture that belongs to the data set the model was trained on keeps its image id there; others count on from the
    highest one.
    """
    out.mkdir(parents=True, exist_ok=True)
    predictions: list[Prediction] = []
    taken: set[str] = set()
    for prediction in found:
        predictions.append(prediction)
        name = prediction.path.stem
        while name in taken:  # the same name in another folder
            name += "_"
        taken.add(name)
        prediction.draw(model.classes.names).save(out / f"{name}.jpg", quality=92)
    rows = [row for p, i in zip(predictions, image_ids(predictions, model.data), strict=True) for row in p.to_coco(i)]
    (out / "predictions.json").write_text(json.dumps(rows, indent=1))
    return predictions


def image_ids(predictions: Sequence[Prediction], data: Mapping[str, Any] | None) -> list[int]:
    """The data set's own id of each picture, where the data set is still there and holds it."""
    known: dict[Path, int] = {}
    if data is not None:
        with contextlib.suppress(UserError):  # moved or deleted since: then nothing is known
            for raw in DataSource.from_dict(data).load_all().values():
                known |= {raw.path(row).resolve(): int(i) for row, i in enumerate(raw.image_ids)}
    fresh = itertools.count(max(known.values(), default=0) + 1)
    return [known[p.path.resolve()] if p.path.resolve() in known else next(fresh) for p in predictions]


def info(
    recipe: str | Recipe,
    *,
    classes: int = 80,
    scale: Scale | None = None,
    scheme: str | Sequence[str] = (),
    override: str | Sequence[str] = (),
) -> Info:
    """Parameters, multiply-adds and training schemes of a recipe."""
    return measure(_chosen(recipe, scale, scheme, override), classes)


def bench(
    recipe: str | Recipe,
    *,
    classes: int = 80,
    scale: Scale | None = None,
    scheme: str | Sequence[str] = (),
    override: str | Sequence[str] = (),
    **how: Unpack[How],
) -> BenchResult:
    """Latency and throughput of a recipe with random weights: inference, or a training step. See `engine/bench.py`."""
    return bench_recipe(_chosen(recipe, scale, scheme, override), classes, **how)


def _chosen(
    recipe: str | Recipe, scale: Scale | None, scheme: str | Sequence[str], override: str | Sequence[str]
) -> Recipe:
    chosen = find_recipe(recipe) if isinstance(recipe, str) else recipe
    if scale is not None:
        chosen = tiny_sized(chosen)
    return chosen.with_schemes(scheme).override(override)


def _prepared(
    source: DataSource, skip_bad: bool, own: World, console: Console | None
) -> tuple[Annotations, Annotations | None, ClassMap]:
    """The data set after its fast check; the first process says what was found and what was left out."""
    training, validation, classes, report = prepare(source, skip_bad=skip_bad)
    if own.leads:
        speak = print if console is None else console.print
        for split, skipped in report.skipped.items():
            speak(f"{split}: left out {', '.join(f'{n} {code}' for code, n in skipped.items())}")
        if warnings := report.text("warning"):
            speak(warnings)
        if validation is None:
            speak("No validation split: the run is not evaluated, and its last weights are the ones to use.")
    return training, validation, classes
