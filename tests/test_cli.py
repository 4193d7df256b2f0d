"""The command line as a user meets it:
help, errors, JSON, exit codes, and the whole path on a small data set.
"""

from __future__ import annotations

import errno
import itertools
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from PIL import Image

import detrellis
from detrellis import api
from detrellis.cli import app, main
from detrellis.cli.entry import start
from detrellis.errors import UserError, command
from detrellis.types import Detections

from .small import SMALL

OPTIONS = [a for s in [*SMALL, "data.size=[64, 64]", "optim.batch_size=4"] for a in ("-o", s)]
ONE_EPOCH = ("--epochs", 1, "--workers", 0, *OPTIONS)
README = Path(__file__).parents[1] / "README.md"
VERBS = [
    "demo",
    "check",
    "train",
    "eval",
    "predict",
    "convert",
    "export",
    "info",
    "bench",
    "recipes",
]
VERBS += ["analyze misalignment", "analyze groups", "analyze one-to-many"]
VERBS += ["analyze discriminability", "analyze instability"]
VERBS += ["analyze branches", "analyze conflicts", "analyze query-distance"]
VERBS += ["analyze attention", "compare", "reproduce", "tune", "serve", "push"]


def call(*arguments: object, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    """Run a command in this process; its standard output."""
    before = sys.argv
    sys.argv = ["detrellis", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stopped:
            main()
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    assert stopped.value.code == code, out + err
    assert "Traceback" not in err
    return out if code == 0 or not err else err


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = call(*verb.split(), "--help", capsys=capsys)
    assert f"Example: detrellis {verb}" in " ".join(text.split())


@pytest.mark.parametrize("columns", [70, 120])
@pytest.mark.parametrize("verb", ["", "analyze", *VERBS])
def test_a_line_of_help_ends_where_the_terminal_does(
    verb: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not where the line of its source does, in the middle of a sentence."""
    monkeypatch.setenv("COLUMNS", str(columns))
    text = call(*verb.split(), "--help", capsys=capsys)
    prose = text.partition("╭")[0].splitlines()
    early = [
        line
        for line, following in itertools.pairwise(prose)
        if line.strip()
        and following.strip()
        and len(line.rstrip()) + len(f" {following.split()[0]}") < columns
    ]
    assert len(prose) > 3
    assert not early
    command = typer.main.get_command(app)
    for word in verb.split():
        command = command.commands[word]  # type: ignore[attr-defined]
    below = getattr(command, "commands", {}).values()
    said = [part.help or "" for part in (*command.params, *below)]  # type: ignore[attr-defined]
    assert not [part for part in said if "\n" in part.replace("\n\n", "")]


def verbs(group: typer.Typer, before: str = "") -> list[str]:
    """Every verb of an app, those of its groups as "group verb"."""
    own = [f"{before}{c.name or c.callback.__name__}" for c in group.registered_commands]  # type: ignore[union-attr]
    groups = [(g.typer_instance, f"{before}{g.name} ") for g in group.registered_groups]
    return [
        *own,
        *(verb for inner, name in groups if inner is not None for verb in verbs(inner, name)),
    ]


def test_every_verb_is_tested() -> None:
    assert sorted(VERBS) == sorted(verbs(app))


LIGHT = [
    ["--version"],
    ["recipes"],
    ["reproduce"],
    ["reproduce", "align"],
    ["reproduce", "align", "3"],
    ["compare", "x"],
    ["compare", "--data", "nowhere"],
    ["train", "tiny", "--data", "nowhere"],
    ["check", "--data", "nowhere"],
]
LIGHT += [
    ["train"],
    ["train", "tinny"],
    ["train", "tiny", "-o", "optim.lrr=1"],
    ["info", "dino"],
    ["bench", "x"],
]
LIGHT += [[*verb.split(), "--help"] for verb in VERBS]
PROBE = """
import sys
import detrellis, detrellis.recipes
from detrellis.cli import main
for words in eval(sys.argv[1]):
    sys.argv = ["detrellis", *words]
    try:
        main()
    except SystemExit:
        pass
    assert "torch" not in sys.modules, words
"""


def test_what_needs_no_torch_does_not_import_it(shapes: Path) -> None:
    data = ["--data", str(shapes)]
    words = [
        *LIGHT,
        ["check", *data],
        ["compare", "--schemes", "none,alignn", *data],
        ["compare", "--schemes", "align", *data],
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROBE, repr(words)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    names = [r["name"] for r in json.loads(call("recipes", "--json", capsys=capsys))]
    bases = ("detr", "conditional-detr", "dab-detr", "dn-detr")
    expected = {f"{base}-r50{dilated}" for base in bases for dilated in ("", "-dc5")}
    expected |= {
        f"deformable-detr-r50{kind}" for kind in ("", "-refine", "-two-stage", "-two-stage-plus")
    }
    expected |= {"dab-deformable-detr-r50", "dn-deformable-detr-r50", "deformable-detr-swin-l"}
    assert {*expected, "tiny", "dino-r50", "dino-r50-5scale", "dino-swin-l"} <= set(names)
    assert "tiny" in call("recipes", capsys=capsys)


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(
        call("info", "tiny", "--classes", 3, "--json", "--scheme", "none,cdn=7", capsys=capsys)
    )
    assert found["schemes"] == [{"name": "cdn", "parameters": 4 * 128, "queries": 14}]
    assert {"parameters", "parameters_trainable", "gflops"} <= set(found)


def test_the_whole_path(
    shapes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    assert "0 errors" in call("check", "--data", shapes, capsys=capsys)
    text = call("train", "tiny", "--data", shapes, "--out", run, *ONE_EPOCH, capsys=capsys)
    assert (
        f"detrellis predict {run}" in " ".join(text.split()).replace(" /", "/") or "Next:" in text
    )
    evaluated = json.loads(
        call("eval", run, "--json", "--workers", 0, "--results", tmp_path / "r.json", capsys=capsys)
    )
    assert evaluated["images"] == 5
    # What NMS leaves has tests of its own; here, that it is asked, and of all
    with monkeypatch.context() as patch:
        asked = []

        def first_two(found: Detections, threshold: float, k: int) -> Detections:
            asked.append((len(found.scores), threshold, k))
            return found.take(torch.arange(min(2, len(found.scores))))

        patch.setattr("detrellis.postprocess.hard_nms", first_two)
        call(
            "eval",
            run,
            "--json",
            "--workers",
            0,
            "--nms",
            0.6,
            "--results",
            tmp_path / "two.json",
            capsys=capsys,
        )
        shown = ("--out", tmp_path / "two", "--threshold", 0, "--nms", 0.5)
        told = json.loads(
            call("predict", run, shapes / "images" / "val", *shown, "--json", capsys=capsys)
        )
    assert asked == [(12 * 5, 0.6, 20)] * 5 + [(12 * 5, 0.5, 20)] * 5
    assert len(told) == 5 * 2
    assert len(json.loads((tmp_path / "two.json").read_text())) == 5 * 2
    assert {"AP", "AP50", "AR100"} <= set(evaluated["stats"])
    rows = json.loads((tmp_path / "r.json").read_text())
    assert {r["category_id"] for r in rows} <= {1, 3, 4, 7, 9}

    pictures = tmp_path / "pictures"
    folder = shapes / "images" / "val"
    call("predict", run, folder, "--out", pictures, "--threshold", 0, capsys=capsys)
    written = sorted(p.stem for p in pictures.glob("*.jpg"))
    assert written == sorted(p.stem for p in folder.iterdir())
    for picture in pictures.glob("*.jpg"):
        Image.open(picture).verify()
    results = json.loads((pictures / "predictions.json").read_text())
    truth = json.loads((shapes / "annotations" / "instances_val.json").read_text())
    ids = {i["file_name"].split("/")[-1]: i["id"] for i in truth["images"]}
    names = {c["id"]: c["name"] for c in truth["categories"]}
    for row in results:
        assert row["image_id"] == ids[Path(row["file_name"]).name]
        assert row["category_name"] == names[row["category_id"]]
    assert len(results) == 5 * 20


def test_train_json_is_json(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "--data",
        shapes,
        "--out",
        tmp_path / "run",
        "--epochs",
        1,
        "--workers",
        0,
        "--json",
    )
    found = json.loads(call("train", "tiny", *arguments, *OPTIONS, capsys=capsys))
    assert found["finished"] is True
    assert found["steps"] == 3
    assert found["result"]["stats"]["AP"] is not None


def test_training_goes_on_from_another_runs_weights(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = ("--data", shapes, "--epochs", 1, "--workers", 0)
    learned = ("-o", "detector.queries.content_from=learned")  # a row for each query
    call("train", "tiny", *rest, "--out", tmp_path / "first", *OPTIONS, *learned, capsys=capsys)
    text = call(
        "train", "--weights", tmp_path / "first", *rest, "--out", tmp_path / "second", capsys=capsys
    )
    assert text.count("class rows: the same 5 classes, all kept") == 1
    settings = (
        "-o",
        "detector.queries.count=15",
        "--scheme",
        "none",
        "--json",
        "--out",
        tmp_path / "third",
    )
    file = tmp_path / "second" / "last.safetensors"
    found = json.loads(call("train", "--weights", file, *rest, *settings, capsys=capsys))
    assert [e["place"] for e in found["transfer"]["exceptions"]] == ["queries.content"]
    assert found["transfer"]["classes"]["same"] is True
    rest = (*rest, "--scale", "tiny", "--out", tmp_path / "fourth")
    text = call("train", "--weights", file, *rest, capsys=capsys, code=2)
    assert "another network" in " ".join(text.split())


def test_what_train_is_told_arrives(
    shapes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, object] = {}

    def kept(*_: object, **options: object) -> None:
        given.update(options)
        raise UserError("so far")

    monkeypatch.setattr(api, "train", kept)
    monkeypatch.setattr(api, "resume", kept)
    words = ("--epochs", 3, "-o", "optim.lr=1e-3", "--device", "cpu", "--workers", 5)
    shared = {"epochs": 3, "override": ["optim.lr=1e-3"], "device": "cpu", "workers": 5}
    call("train", "--resume", tmp_path, *words, "--train", tmp_path, capsys=capsys, code=2)
    assert given.items() >= (shared | {"data": None, "train": tmp_path}).items()
    words = (*words, "--data", shapes, "--seed", 7, "--scheme", "align", "--auto-batch")
    call("train", "tiny", *words, "--out", tmp_path, "--skip-bad", capsys=capsys, code=2)
    more = {"seed": 7, "scheme": ["align"], "auto_batch": True, "out": tmp_path, "skip_bad": True}
    assert given.items() >= (shared | more).items()


def test_two_runs_are_analyzed_side_by_side(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "figures"
    call("train", "tiny", "--data", shapes, "--out", run, *ONE_EPOCH, capsys=capsys)
    rest = ("--out", out, "--workers", 0, "--split", "train", "--batch-size", 2)
    runs = (run / "best.safetensors", run / "last.safetensors")
    text = call(
        "analyze",
        "misalignment",
        *runs,
        *rest,
        "--top",
        "5, 30",
        "--names",
        "best,last",
        capsys=capsys,
    )
    assert [
        word
        for word in ("best", "last", "top 5", "top 30", f"{out}/misalignment.png")
        if word not in text
    ] == []
    with Image.open(out / "misalignment.png") as picture:
        assert picture.width > picture.height
    written = json.loads((out / "misalignment.json").read_text())
    assert [r["name"] for r in written["runs"]] == ["best", "last"]
    assert [r["images"] for r in written["runs"]] == [11, 11]
    found = json.loads(
        call("analyze", "misalignment", run, *rest, "--threshold", 0.1, "--json", capsys=capsys)
    )
    assert found["settings"]["threshold"] == 0.1
    assert list(found["runs"][0]["br_recall"]) == ["10", "50", "100"]


def test_groups_are_analyzed(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "figures"
    rest = ("--workers", 0, "--out", out)
    train = ("train", "tiny", "--data", shapes, "--scheme", "group=2", *ONE_EPOCH)
    call(*train, "--out", run, capsys=capsys)
    text = call("analyze", "groups", run, *rest, "--names", "two", capsys=capsys)
    assert [word for word in ("two", "all 2", f"{out}/groups.png") if word not in text] == []
    found = json.loads(call("analyze", "groups", run, *rest, "--grid", 3, "--json", capsys=capsys))
    assert found["settings"]["grid"] == 3
    assert found["runs"][0]["log"] == []  # not asked for
    assert found == json.loads((out / "groups.json").read_text())
    text = call("analyze", "one-to-many", run, *rest, capsys=capsys)
    assert [
        word for word in ("group-wise", " 24 ", f"{out}/one_to_many.png") if word not in text
    ] == []
    found = json.loads(
        call("analyze", "one-to-many", run, *rest, "--nms", "0.4", "--json", capsys=capsys)
    )
    assert (found["settings"]["nms"], found["runs"][0]["queries"]) == ([0.4], 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "which recipe"),
        (["train", "--data", "."], "--weights RUN"),
        (["train", "--weights", "no_such_run", "--data", "."], "no_such_run"),
        (["train", "--weights", "somewhere", "--resume", "somewhere"], "--resume takes"),
        (["train", "tinny", "--data", "."], "Did you mean tiny"),
        (["train", "tiny"], "--data"),
        (["train", "tiny", "--data", "no_such_folder"], "no_such_folder"),
        (["train", "tiny", "--data", ".", "-o", "optim.lrr=1"], "Did you mean lr"),
        (["train", "tiny", "--resume", "somewhere"], "--resume takes"),
        (["train", "--resume", "no_such_run"], "no_such_run"),
        (["train", "tiny", "--data", ".", "--scheme", "cnd"], "Did you mean cdn"),
        (["eval", "no_such_run"], "no_such_run"),
        (["predict", "no_run", "photo.jpg"], "no_run: no such"),
        (["info", "dino"], "Did you mean dino-r50"),
        (["check"], "--data"),
        (["predict", str(README), str(README)], "README.md: not a checkpoint"),
        (["predict", str(README), "photo.jpg"], "photo.jpg: no such file"),
        (["check", "--data", "no_such_folder"], "no_such_folder"),
        (["analyze", "misalignment", "no_such_run"], "no_such_run"),
        (["analyze", "misalignment", "run", "--top", "10,few"], "--top 10,few: not whole numbers"),
        (["analyze", "groups", "no_such_run"], "no_such_run"),
        (["analyze", "one-to-many", "run", "--nms", "0.5,x"], "--nms 0.5,x: not numbers"),
        (
            ["analyze", "one-to-many", "run", "--nms", "0.5,7"],
            "nms 0.5, 7 Give IoUs between 0 and 1",
        ),
        (["analyze", "misalignment", "run", "--names", "a,b"], "names a, b Give one a run (1)"),
        (
            ["analyze", "misalignment", "run", "--out", str(README)],
            "README.md: a file, not a folder",
        ),
    ],
)
def test_wrong_use_is_a_message_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in " ".join(call(*arguments, capsys=capsys, code=2).split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["analyze", "groupz", "run"], "Did you mean"),
        (["--data", ".", "check"], "Options stand after the verb"),
        (["eval"], "Missing argument"),
        (["eval"], "For example: detrellis eval runs/"),
        (["train", "tiny", "--epochs", "few"], "For example: detrellis train small --data my_data"),
        (["recipes", "--jsn"], "See detrellis recipes --help"),
    ],
)
def test_a_wrong_word_is_told_with_an_example(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in " ".join(call(*arguments, capsys=capsys, code=2).split())


@pytest.mark.parametrize(
    "words", [["train", "tinny"], ["eval"], ["check", "--data", "no_such_folder"]]
)
def test_with_json_a_refusal_is_json_too(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["detrellis", *words, "--json"])
    with pytest.raises(SystemExit, match="2"):
        main()
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert f"error {error['message']}" in err
    assert error["remedy"].splitlines()[0] in err


def begin(verb: Callable[[], None], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line of that verb alone."""
    own = typer.Typer()
    own.command()(verb)
    monkeypatch.setattr(sys, "argv", ["detrellis"])
    with pytest.raises(SystemExit) as stopped:
        start(own)
    assert stopped.value.code == code


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (KeyboardInterrupt(), 130, []),  # of training, which has said where it is
        (MemoryError(), 1, ["error out of memory", "--auto-batch"]),
        (OSError(28, "No space left on device"), 2, ["error No space left on device", "Make room"]),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 2, ["Disk quota exceeded", "Make room"]),
        (
            PermissionError(13, "Permission denied", "a [red] file"),
            2,
            ["error a [red] file: Permission denied", "permissions"],
        ),
        (BrokenPipeError(32, "Broken pipe"), 1, []),
        (
            KeyError("shape"),
            1,
            ["Traceback", "error KeyError: 'shape'", "report it", detrellis.__version__],
        ),
    ],
)
def test_whatever_is_raised_ends_in_words(
    raised: BaseException,
    code: int,
    told: list[str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise raised

    monkeypatch.setattr("detrellis.cli.entry._close_quietly", lambda: None)
    begin(fail, code, monkeypatch)
    out, err = capfd.readouterr()
    assert out == ""
    assert [text for text in told if text not in err] == []
    assert ("Traceback" in err) == ("Traceback" in told)
    assert bool(err) == bool(told)


@pytest.mark.parametrize(
    ("raised", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(32, "Broken pipe"), 1)]
)
def test_what_is_raised_outside_of_a_verb(
    raised: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """While the last lines are flushed, where typer no longer looks."""

    def app(**_: object) -> None:
        raise raised

    monkeypatch.setattr("detrellis.cli.entry._close_quietly", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        start(app)  # type: ignore[arg-type]
    assert stopped.value.code == code
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("becomes", [None, ImportError("a half-imported library")])
@pytest.mark.parametrize("leads", [True, False])
def test_a_signal_is_a_line_and_its_exit_code(
    number: signal.Signals,
    becomes: Exception | None,
    leads: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted() -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            if becomes is not None:
                raise becomes from None
            raise

    # Under torchrun, of one process alone
    monkeypatch.setattr("detrellis.cli.entry.IS_MAIN_PROCESS", leads)
    before = signal.getsignal(number)
    begin(interrupted, 128 + number, monkeypatch)
    assert capsys.readouterr().err == ("Stopped.\n" if leads else "")
    assert signal.getsignal(number) == before


def test_commands_can_be_pasted() -> None:
    words = ["train", "--resume", Path("-my runs/[1] it's"), "data.size=[64, 64]"]
    assert shlex.split(command(*words)) == [
        "detrellis",
        "train",
        "--resume",
        "./-my runs/[1] it's",
        "data.size=[64, 64]",
    ]


def test_training_on_a_bad_data_set_is_refused_or_survived(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One box loses its width: `train` refuses it by name,
    `--skip-bad` leaves it out, `check --fix` writes it away.
    """
    source = json.loads((shapes / "annotations" / "instances_train.json").read_text())
    source["annotations"][0]["bbox"][2] = 0
    bad, images = tmp_path / "bad.json", shapes / "images" / "train"
    bad.write_text(json.dumps(source))
    data = ("--train", bad, "--train-images", images)
    train = ("train", "tiny", *data, *ONE_EPOCH)
    assert f"id {source['annotations'][0]['id']}" in call(*train, capsys=capsys, code=2).replace(
        "annotation ", "id "
    )
    assert "left out 1" in call(*train, "--skip-bad", "--out", tmp_path / "run", capsys=capsys)
    call("check", *data, "--fix", tmp_path / "clean", capsys=capsys, code=1)
    assert "0 errors" in call("check", "--data", tmp_path / "clean", capsys=capsys)


def test_python_interface_speaks_the_same_words(shapes: Path, tmp_path: Path) -> None:
    result = detrellis.train(
        "tiny",
        data=shapes,
        out=tmp_path / "run",
        override=[*SMALL, "data.size=[64, 64]"],
        epochs=1,
        workers=0,
    )
    model = detrellis.load(result.run, device="cpu")
    picture = next((shapes / "images" / "val").iterdir())
    found = model.predict(picture, threshold=0.0)[0]
    assert len(found.scores) == 20
    assert found.scores == sorted(found.scores, reverse=True)
    assert all(0 <= x1 <= x2 <= 64 and 0 <= y1 <= y2 <= 64 for x1, y1, x2, y2 in found.boxes)
    evaluated = partial(detrellis.evaluate, result.run, workers=0)
    assert evaluated().ap == evaluated(tta="64").ap == pytest.approx(result.best, abs=1e-9)
    assert (
        evaluated(tta="64,64,flip").to_dict()
        == evaluated(tta="64,flip").to_dict()
        != evaluated().to_dict()
    )
    untrained = detrellis.load("tiny", classes=3)
    assert len(untrained.classes) == 3
    with pytest.raises(UserError, match="no such file"):
        model.predict("nothing.jpg")
