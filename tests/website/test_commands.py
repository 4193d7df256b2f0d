"""Every command in the pages is one:
its verb, options, values, recipe, schemes, fields, targets, extras and files.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import typer
from website.commands import blocks, calls

from detrellis.cli import app
from detrellis.errors import UserError
from detrellis.recipes import choose_recipe
from detrellis.study.rows import parse_rows

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def check_verb(words: list[str]) -> None:
    """Parse the words as the command line would, and build the recipe that they ask for."""
    command, path = typer.main.get_command(app), "detrellis"
    while hasattr(command, "commands"):
        assert words, f"{path}: no verb"
        assert words[0] in command.commands, f"{path} has no verb {words[:1]}"
        path, command, words = f"{path} {words[0]}", command.commands[words[0]], words[1:]
    if words == ["--help"]:
        return
    values = command.make_context(path, words).params
    recipe = values.get("recipe")
    if recipe is None:
        return
    override = values.get("override") or ()
    if schemes := values.get("schemes"):
        for row in parse_rows(schemes):
            choose_recipe(recipe, values.get("scale"), row, override)
    elif path != "detrellis reproduce":
        choose_recipe(recipe, values.get("scale"), values.get("scheme") or (), override)


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def extras() -> set[str]:
    return set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    )


def check_call(words: list[str]) -> None:
    """Whatever of ours a command names is there."""
    first, *others = words
    for i, word in enumerate(words):
        if word == "detrellis" and (i == 0 or words[i - 1] == "-m"):
            check_verb(words[i + 1 :])
    if first == "make":
        asked = [word for word in others if "=" not in word and not word.startswith("-")]
        assert set(asked) <= targets(), f"the Makefile has no {asked}"
    if first == "pip":
        named = {
            extra
            for word in others
            for part in re.findall(r"\[([\w,]+)\]", word)
            for extra in part.split(",")
        }
        assert named <= extras(), f"pyproject.toml has no {named - extras()}"
    script = next((word for word in words if word.endswith(".py")), None)
    if script is not None and first.startswith("python"):
        shared = ROOT / script.replace(Path(script).name, "common.py")  # of all benchmarks
        source = (ROOT / script).read_text() + (shared.read_text() if shared.exists() else "")
        missing = [
            word
            for word in others
            if word.startswith("--") and f'"{word.partition("=")[0]}"' not in source
        ]
        assert not missing, f"{script} has no {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands(page: Path) -> None:
    for words in calls("\n".join(blocks(page))):
        try:
            check_call(words)
        except UserError as error:
            pytest.fail(f"{' '.join(words)}: {error}")
        except typer.TyperException as error:
            pytest.fail(f"{' '.join(words)}: {error.format_message()}")


@pytest.mark.parametrize(
    "wrong",
    [
        "detrellis trian small",
        "detrellis train small --dat my_data",
        "detrellis train smal --data my_data",
        "detrellis train small --data my_data -o optim.lrr=1",
        "detrellis train small --data my_data --scheme alin",
        "detrellis export RUN --format tflite",
        "torchrun --nproc-per-node 2 -m detrellis train --workers -1",
        "make tset",
        "pip install 'detrellis[exprt]'",
        "python benchmarks/step.py --no-such",
    ],
)
def test_a_wrong_command_is_noticed(wrong: str) -> None:
    (words,) = calls(wrong)
    with pytest.raises((AssertionError, UserError, typer.TyperException)):
        check_call(words)


def test_a_shell_expands_what_pages_say() -> None:
    script = (
        'run() { detrellis train "$@"; }\nfor n in 1 2; do\n'
        "  X=1 run small --seed $n \\\n    --data d  # said\ndone\n"
    )
    assert calls(script) == [
        ["detrellis", "train", "small", "--seed", n, "--data", "d"] for n in "12"
    ]


def test_a_page_that_no_shell_reads_is_refused() -> None:
    with pytest.raises(ValueError, match="syntax error"):
        calls("for x in 1; do\n")
