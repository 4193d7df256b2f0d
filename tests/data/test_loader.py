"""Batches: the same whatever loads them, and right to the last number."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from detrellis.data import dataset as dataset_module
from detrellis.data.annotations import Annotations
from detrellis.data.batch import Batch, Collate, Normalise, stack_images
from detrellis.data.classes import ClassMap
from detrellis.data.dataset import DetectionDataset, Sample, mixed_seed
from detrellis.data.loader import build_loader
from detrellis.data.lsj import LargeScale, LargeScaleJitter
from detrellis.data.sampler import BatchSampler, EvalSampler
from detrellis.data.transforms import Finish, train_transform
from detrellis.errors import UserError
from detrellis.types import IMAGENET_MEAN, IMAGENET_STD

Row = tuple[tuple[float, float, float, float], int, bool]  # COCO box, label, crowd


def annotate(root: Path, sizes: list[tuple[int, int]], rows: list[list[Row]]) -> Annotations:
    flat = [row for own in rows for row in own]
    boxes = np.array([box for box, _, _ in flat], dtype=np.float64).reshape(-1, 4)
    return Annotations(
        root=root,
        classes=ClassMap((2, 5, 9), ("a", "b", "c")),
        image_ids=np.arange(len(sizes)) * 10 + 7,
        file_names=np.array([f"{i}.png".encode() for i in range(len(sizes))]),
        sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        starts=np.cumsum([0] + [len(own) for own in rows]),
        boxes=boxes,
        labels=np.array([label for _, label, _ in flat], dtype=np.int64),
        crowd=np.array([crowd for _, _, crowd in flat], dtype=bool),
        areas=boxes[:, 2] * boxes[:, 3],
        ids=np.arange(len(flat)) + 1,
    )


@pytest.fixture(scope="module")
def annotations(tmp_path_factory: pytest.TempPathFactory) -> Annotations:
    """Eleven noisy pictures of different sizes;
    the third has no boxes, the fifth a crowd region only.
    """
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    sizes = [(int(h), int(w)) for h, w in random.integers(40, 90, (11, 2))]
    rows: list[list[Row]] = []
    for index, (h, w) in enumerate(sizes):
        Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(
            root / f"{index}.png"
        )
        count = 0 if index == 2 else 1 + index % 3
        rows.append(
            [
                ((3.5 + k, 2, w / 2, h / 3), int(random.integers(3)), index == 4 or k == 2)
                for k in range(count)
            ]
        )
    return annotate(root, sizes, rows)


def assert_same(a: Any, b: Any) -> None:
    """Bit for bit."""
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, tuple | list):
        assert type(a) is type(b)
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


AUGMENTATIONS: dict[str, Callable[[], Any]] = {
    "detr": lambda: train_transform("detr", 64, jitter=0.3),
    "fixed": lambda: train_transform("fixed", (64, 72)),
    "lsj": lambda: LargeScaleJitter(64, LargeScale(), Finish(), 114),
}


@pytest.mark.parametrize("policy", AUGMENTATIONS)
def test_augmentation_is_a_function_of_seed_epoch_and_index(
    annotations: Annotations, policy: str
) -> None:
    first, second = (
        DetectionDataset(annotations, AUGMENTATIONS[policy](), seed=3) for _ in range(2)
    )
    other = DetectionDataset(annotations, AUGMENTATIONS[policy](), seed=4)
    for index in range(len(first)):
        torch.manual_seed(index)  # the state around it is of no concern
        sample = first[1, index]
        torch.rand(5)
        assert_same(sample, second[1, index])
        differ = [
            s.image.shape != sample.image.shape or bool((s.image != sample.image).any())
            for s in (first[2, index], other[1, index])
        ]
        assert all(differ)


def test_loading_leaves_the_global_random_state_alone(annotations: Annotations) -> None:
    dataset = DetectionDataset(annotations, AUGMENTATIONS["fixed"]())
    for workers in (0, 1):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        list(build_loader(dataset, BatchSampler(len(dataset), 4), workers=workers))
        assert torch.equal(before, torch.get_rng_state())


def test_seeds_are_well_mixed() -> None:
    seeds = [mixed_seed(s, e, i) for s in range(10) for e in range(10) for i in range(100)]
    assert len({seed & 0xFFFFFFFF for seed in seeds}) > 9990  # what torch's generator reads of them
    torch.default_generator.manual_seed(max(seeds))


@pytest.mark.parametrize("policy", AUGMENTATIONS)
def test_workers_and_resuming_change_nothing(annotations: Annotations, policy: str) -> None:
    dataset = DetectionDataset(annotations, AUGMENTATIONS[policy](), seed=1)
    sampler = BatchSampler(len(dataset), 3, seed=1)
    inline, forked = (build_loader(dataset, sampler, workers=workers) for workers in (0, 2))
    assert len(inline) == len(forked) == 4
    for epoch in range(2):
        sampler.set_position(epoch)
        whole = list(inline)
        assert_same(list(forked), whole)
        sampler.set_position(epoch, 2)
        assert_same(list(forked), whole[2:])


def test_collate_against_the_naive_version() -> None:
    shapes, counts = [(30, 41), (52, 20), (52, 41)], [2, 0, 3]
    samples = []
    for index, ((h, w), n) in enumerate(zip(shapes, counts, strict=True)):
        low = torch.rand(n, 2) * torch.tensor([w / 2, h / 2])
        boxes = torch.cat([low, low + 1 + torch.rand(n, 2) * torch.tensor([w / 3, h / 3])], dim=1)
        image = torch.randint(0, 256, (3, h, w), dtype=torch.uint8)
        samples.append(Sample(image, boxes, torch.randint(0, 5, (n,)), index + 100, (2 * h, 3 * w)))
    batch = Collate()(samples)
    assert isinstance(batch, Batch)
    assert batch.images.pixels.shape == (3, 3, 52, 41)
    assert batch.images.padding is not None
    assert batch.image_ids == (100, 101, 102)
    assert batch.sizes.tolist() == [[2 * h, 3 * w] for h, w in shapes]
    assert batch.sizes.dtype == torch.int64
    assert batch.targets.sizes == (2, 0, 3)
    assert torch.equal(batch.targets.labels, torch.cat([s.labels for s in samples]))
    assert batch.targets.boxes.dtype == torch.float32
    row = 0
    for b, (sample, (h, w)) in enumerate(zip(samples, shapes, strict=True)):
        for c in range(3):
            expected = (sample.image[c].double() / 255 - IMAGENET_MEAN[c]) / IMAGENET_STD[c]
            torch.testing.assert_close(
                batch.images.pixels[b, c, :h, :w].double(), expected, atol=1e-6, rtol=0
            )
        outside = torch.ones(52, 41, dtype=torch.bool)
        outside[:h, :w] = False
        assert torch.equal(batch.images.padding[b], outside)
        assert (batch.images.pixels[b][:, outside] == 0).all()
        for x1, y1, x2, y2 in sample.boxes.tolist():
            expected = torch.tensor(
                [(x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w, (y2 - y1) / h]
            )
            torch.testing.assert_close(batch.targets.boxes[row], expected)
            row += 1


def test_padding_is_none_where_nothing_is_padded() -> None:
    same = [torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8) for _ in range(2)]
    assert stack_images(same).padding is None
    assert stack_images(same, (20, 30)).padding is None
    padded = stack_images(same, (24, 30))
    assert padded.padding is not None
    assert padded.pixels.shape == (2, 3, 24, 30)
    assert torch.equal(padded.pixels[:, :, :20], stack_images(same).pixels)
    assert padded.padding[:, 20:].all()
    assert not padded.padding[:, :20].any()


def test_padding_is_zero_whatever_the_memory_held(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape: empty(*shape).fill_(torch.nan))
    sizes = [(20, 30), (40, 10), (33, 50)]
    batch = stack_images([torch.full((3, *size), 200, dtype=torch.uint8) for size in sizes])
    assert batch.padding is not None
    assert not batch.pixels.isnan().any()
    assert torch.equal((batch.pixels == 0).all(1), batch.padding)
    assert [int((~padding).sum()) for padding in batch.padding] == [h * w for h, w in sizes]


def test_one_size_for_every_batch_of_a_fixed_size(annotations: Annotations) -> None:
    dataset = DetectionDataset(annotations, AUGMENTATIONS["fixed"]())
    for batch in build_loader(dataset, EvalSampler(len(dataset), 1)):
        assert batch.images.pixels.shape == (1, 3, 64, 72)


def test_images_without_boxes_stay_and_crowds_go(annotations: Annotations) -> None:
    dataset = DetectionDataset(annotations, train_transform("none", 64))
    batches = list(build_loader(dataset, EvalSampler(len(dataset), 4)))
    assert [i for b in batches for i in b.image_ids] == annotations.image_ids.tolist()
    sizes = [n for b in batches for n in b.targets.sizes]
    own = [
        slice(a, b) for a, b in zip(annotations.starts[:-1], annotations.starts[1:], strict=True)
    ]
    assert sizes == [int((~annotations.crowd[s]).sum()) for s in own]
    assert sizes[2] == sizes[4] == 0
    labels = torch.cat([b.targets.labels for b in batches])
    assert labels.tolist() == annotations.labels[~annotations.crowd].tolist()
    # Boxes, undone: relative to the image's own size, so the resize does not show.
    boxes = torch.cat([b.targets.boxes for b in batches]).double().numpy()
    scale = np.repeat(annotations.sizes[:, ::-1], sizes, axis=0)
    undone = np.concatenate(
        [(boxes[:, :2] - boxes[:, 2:] / 2) * scale, boxes[:, 2:] * scale], axis=1
    )
    np.testing.assert_allclose(undone, annotations.boxes[~annotations.crowd], atol=1e-4)


def test_a_batch_without_any_boxes(annotations: Annotations) -> None:
    dataset = DetectionDataset(annotations, train_transform("none", 64))
    batch = Collate()([dataset[0, 2], dataset[0, 4]])
    assert isinstance(batch, Batch)
    assert batch.targets.boxes.shape == (0, 4)
    assert batch.targets.labels.shape == (0,)
    assert batch.targets.labels.dtype == torch.int64
    assert batch.targets.sizes == (0, 0)
    empty = annotate(annotations.root, [(1, 1)], [[]])
    assert DetectionDataset(empty, train_transform("none", 64)).boxes.shape == (0, 4)


def test_degenerate_boxes_are_dropped(tmp_path: Path) -> None:
    Image.new("RGB", (50, 40)).save(tmp_path / "0.png")
    rows: list[Row] = [
        ((5, 5, 0, 9), 0, False),
        ((60, 5, 9, 9), 1, False),
        ((45, 35, 99, 99), 2, False),
    ]
    sample = DetectionDataset(annotate(tmp_path, [(40, 50)], [rows]), train_transform("none", 80))[
        0, 0
    ]
    assert sample.labels.tolist() == [2]
    assert sample.boxes.tolist() == [[90, 70, 100, 80]]


def test_moving(annotations: Annotations) -> None:
    dataset = DetectionDataset(annotations, AUGMENTATIONS["detr"]())
    (batch,) = build_loader(dataset, EvalSampler(len(dataset), 99))
    assert_same(batch.to("cpu"), batch)
    meta = batch.to("meta")
    assert {t.device.type for t in (meta.images.pixels, meta.targets.boxes, meta.sizes)} == {"meta"}
    assert meta.targets.sizes == batch.targets.sizes


def test_pinning_keeps_the_types(annotations: Annotations, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's pinning would take the named tuples apart;
    what it calls instead is `Batch.pin_memory`.
    """
    dataset = DetectionDataset(annotations, AUGMENTATIONS["detr"]())
    (batch,) = build_loader(dataset, EvalSampler(len(dataset), 99))
    pinned = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self, *_: pinned.append(self) or self)
    assert_same(pin_memory(batch), batch)
    assert len(pinned) == 5  # pixels, padding, labels, boxes, sizes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_batches(annotations: Annotations) -> None:
    dataset = DetectionDataset(annotations, AUGMENTATIONS["detr"]())
    (batch,) = build_loader(dataset, EvalSampler(len(dataset), 99))
    (pinned,) = build_loader(dataset, EvalSampler(len(dataset), 99), workers=1, pin_memory=True)
    assert pinned.images.pixels.is_pinned()
    assert_same(pinned, batch)
    assert_same(pinned.to("cuda", non_blocking=True).to("cpu"), batch)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(b"text"), "not an image"),
        (lambda path: path.write_bytes(path.read_bytes()[:90]), "cannot be read"),
        (lambda path: Image.new("RGB", (30, 20)).save(path), "30x20 pixels .* say 50x40"),
    ],
)
def test_bad_images_speak_to_the_user(
    tmp_path: Path, workers: int, spoil: Callable[[Path], None], words: str
) -> None:
    for index in range(3):
        Image.fromarray(
            np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        ).save(tmp_path / f"{index}.png")
    spoil(tmp_path / "1.png")
    dataset = DetectionDataset(
        annotate(tmp_path, [(40, 50)] * 3, [[], [], []]), train_transform("none", 40)
    )
    with pytest.raises(UserError, match=words) as caught:
        list(build_loader(dataset, EvalSampler(3, 1), workers=workers))
    assert str(tmp_path / "1.png") in caught.value.message
    assert caught.value.remedy
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda: os._exit(1), "An image may have ended it"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "An image may have ended it"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), "The shared memory ran out"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "mostly because the memory ran out"),
    ],
)
def test_a_worker_that_dies_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Callable[[], None], words: str
) -> None:
    dataset = DetectionDataset(annotate(tmp_path, [(40, 50)], [[]]), train_transform("none", 40))
    monkeypatch.setattr(dataset_module, "read_image", lambda *_: end())
    with pytest.raises(UserError, match="fewer workers") as caught:
        list(build_loader(dataset, EvalSampler(1, 1), workers=1))
    assert words in (caught.value.remedy or "")


def test_our_own_mistakes_keep_their_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*_: object) -> Tensor:
        raise RuntimeError("a mistake of ours")

    dataset = DetectionDataset(annotate(tmp_path, [(40, 50)], [[]]), train_transform("none", 40))
    monkeypatch.setattr(dataset_module, "read_image", mistaken)
    with pytest.raises(RuntimeError, match="in mistaken"):
        list(build_loader(dataset, EvalSampler(1, 1), workers=1))


def test_workers_compute_with_one_thread(
    annotations: Annotations, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = DetectionDataset(annotations, train_transform("none", 64))
    monkeypatch.setattr(dataset_module, "mixed_seed", lambda *_: torch.get_num_threads())
    monkeypatch.setattr(
        type(dataset.augmentation.calm),
        "__call__",
        lambda self, i, b, n: (i, b, torch.tensor([torch.initial_seed()])),
    )
    (batch,) = build_loader(dataset, EvalSampler(1, 1), workers=1)
    assert batch.targets.labels.tolist() == [1]


def test_can_be_sent_to_a_spawned_worker(annotations: Annotations) -> None:
    dataset = DetectionDataset(annotations, AUGMENTATIONS["detr"](), seed=5)
    again = pickle.loads(pickle.dumps(dataset))
    assert_same(again[1, 3], dataset[1, 3])


STOPS = """
import pickle, sys
from detrellis.data.loader import build_loader
from detrellis.data.sampler import EvalSampler
dataset = pickle.load(sys.stdin.buffer)
loader = build_loader(dataset, EvalSampler(len(dataset), 1), workers=1)
for batch in loader:
    raise RuntimeError("of the caller's own")
"""


def test_an_error_of_the_caller_ends_the_process(annotations: Annotations) -> None:
    """Its traceback holds the loader until the interpreter has gone,
    whose workers ignore the signal by which Python asks them to end.
    """
    dataset = DetectionDataset(annotations, train_transform("none", 64))
    done = subprocess.run(
        [sys.executable, "-c", STOPS],
        input=pickle.dumps(dataset),
        stderr=subprocess.PIPE,
        timeout=60,
    )
    assert done.returncode == 1
    assert b"RuntimeError: of the caller's own" in done.stderr


def crowded(images: int, each: int, bitmaps: bool = False) -> DetectionDataset:
    rows: list[list[Row]] = [[((0, 0, 5, 5), 0, False)] * each] * images
    annotations = annotate(Path("/none"), [(8, 8)] * images, rows)
    if bitmaps:
        outlines: list[Any] = [[[0, 0, 5, 0, 5, 5]], {"size": [8, 8], "counts": [0, 5, 59]}]
        read = lambda _, lines: [outlines[line % 2] for line in lines]  # noqa: E731
        annotations = replace(annotations, lines=np.arange(images * each), segmentations=read)
    return DetectionDataset(annotations, train_transform("none", (8, 8)), bitmaps=bitmaps)


@pytest.mark.parametrize("bitmaps", [False, True])
def test_holds_no_python_object_per_image(bitmaps: bool) -> None:
    """What a worker shares with its parent must have no reference counts to write."""

    def objects(root: object) -> int:
        seen: set[int] = set()
        queue = [root]
        while queue:
            item = queue.pop()
            if id(item) in seen or isinstance(item, type):
                continue
            seen.add(id(item))
            if isinstance(item, np.ndarray):
                assert item.dtype != object
            queue += gc.get_referents(item)
        return len(seen)

    assert objects(vars(crowded(5, 3, bitmaps))) == objects(vars(crowded(200, 30, bitmaps)))


def private_bytes() -> int:
    """Memory that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024


def report_private(samples: list[Sample]) -> int:
    return private_bytes()


def private_growth(dataset: DetectionDataset) -> int:
    """By how much a worker's own memory grows over an epoch, from its first batch on."""
    batches = EvalSampler(len(dataset), 100)
    seen = list(
        DataLoader(dataset, batch_sampler=batches, num_workers=1, collate_fn=report_private)
    )
    assert len(seen) == 40
    return max(seen) - seen[0]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_share_the_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading every annotation in a worker copies hardly any of them;
    as Python objects they would all be copied. What else grows, in whatever memory earlier tests
    have left, grows with one box an image as well.
    """
    dataset = crowded(4000, 250)
    shared = sum(a.nbytes for a in vars(dataset).values() if isinstance(a, np.ndarray))
    assert shared > 20e6
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr(dataset_module, "read_image", lambda *_: image)
    assert private_growth(dataset) - private_growth(crowded(4000, 1)) < 0.4 * shared


def report_left_alone(samples: list[Sample]) -> int:
    """How many objects this process's garbage collection does not look at."""
    return gc.get_freeze_count()


def test_garbage_collection_in_workers_leaves_alone_what_they_inherit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It writes to each container that it looks at, and so would copy the memory that workers
    share."""
    inherited: list[list[int]] = [[] for _ in range(10_000)]
    before = gc.get_freeze_count()
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr(dataset_module, "read_image", lambda *_: image)
    loader = build_loader(crowded(8, 1), EvalSampler(8, 4), workers=1)
    monkeypatch.setattr(loader.batches, "collate_fn", report_left_alone)
    (first, _) = loader.batches
    loader.close()
    assert first >= before + len(inherited)


def test_other_statistics_normalise_and_give_the_colours_back() -> None:
    image = torch.arange(256).repeat(3, 2).view(3, 2, 256).byte()
    normalise = Normalise((0.1, 0.2, 0.3), (0.5, 1.0, 0.25))
    pixels = stack_images([image], normalise=normalise).pixels[0]
    for c, (mean, std) in enumerate(zip(normalise.mean, normalise.std, strict=True)):
        expected = (image[c].double() / 255 - mean) / std
        torch.testing.assert_close(pixels[c].double(), expected, atol=1e-6, rtol=0)
    assert torch.equal(normalise.colours(pixels), image)
    assert torch.equal(
        stack_images([image]).pixels,
        stack_images([image], normalise=Normalise.of(None, None)).pixels,
    )
    assert Normalise.of(None, (0.5, 0.5, 0.5)) == Normalise(IMAGENET_MEAN, (0.5, 0.5, 0.5))
