"""`-o` with whatever a hand or a script may write,
and stored recipes with anything in the place of anything.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detrellis.errors import UserError
from detrellis.fields import Config, configs_of
from detrellis.recipes import RECIPES, Recipe, find_recipe
from detrellis.recipes.migrate import FORMAT, read_recipe
from detrellis.recipes.network import build_detector
from tests.fuzz.harness import short
from tests.fuzz.values import NAMES, VALUES, Random, pick, spoil_text, spoil_value

LEVELS = [f"&{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
BOMB = f"[&a [x, x, x], {', '.join(LEVELS)}]"
TEXTS = (
    *(
        "",
        " ",
        "null",
        "~",
        "true",
        "no",
        "1",
        "-1",
        "0",
        "2.5",
        "1e-4",
        "1e308",
        "-1e308",
        "1e999",
        ".nan",
        ".inf",
        "9" * 2000,
    ),
    *(
        "[]",
        "{}",
        "[1, 2]",
        "[[1]]",
        "{a: 1}",
        "{kind: dino}",
        "{a: {b: [1, {c: 2}]}}",
        "[" * 500,
        "[1",
        "{",
        "'",
        '"',
        "a: b: c",
    ),
    *(
        "!!int x",
        "!!float x",
        "!!timestamp x",
        "!!bool x",
        "!!binary x",
        "!!python/object/apply:os.system [ls]",
        "!x y",
    ),
    *(
        "&a [*a]",
        BOMB,
        "*a",
        "? [1]",
        "{[1]: 2}",
        "? {a: 1}\n: 2",
        "<<: 1",
        "{<<: {a: 1}}",
        "2026-01-01",
        "0x10",
        "1_000",
        "010",
    ),
    *(
        "\t",
        "\0",
        "\x1b[2J",
        "猫",
        "\ud800",
        "--- 1\n--- 2",
        "%YAML 9.9\n---\n1",
        "x" * 100_000,
        "all",
        "auto",
        "none",
        "resnet50",
        "sine",
    ),
)


def _fields(config: type[Config], prefix: str = "") -> list[str]:
    """The dotted names of all fields, those of each kind."""
    found = []
    for name, field in config.model_fields.items():
        found.append(f"{prefix}{name}")
        for kind in configs_of(field.annotation):
            found += _fields(kind, f"{prefix}{name}.")
    return list(dict.fromkeys(found))


@cache
def _known() -> list[str]:
    return _fields(Recipe)


def override(random: Random) -> str:
    """One `-o`: mostly a field that exists, with any value."""
    name = str(pick(random, _known()))
    way = int(random.integers(8))
    if way == 0:
        name = spoil_text(random, name)
    elif way == 1:
        name = f"{name}.{pick(random, ('', 'x', 'kind', '0', '__class__', *NAMES))}"
    value = str(pick(random, TEXTS) if random.random() < 0.8 else pick(random, VALUES))
    return (
        f"{name}={value}"
        if way != 2
        else pick(random, (name, f"{name} = {value}", f"{name}=={value}", value, f"{name}:{value}"))
    )


def _plain_numbers(data: Any) -> bool:
    return "NaN" not in json.dumps(data) and "Infinity" not in json.dumps(data)


def attempt(seed: int, folder: Path) -> None:
    """A recipe with other values, or one that was stored and spoilt,
    is refused in a few words, or can be built.
    """
    random = np.random.default_rng(seed)
    try:
        if seed % 2:
            recipe = find_recipe(str(pick(random, list(RECIPES)))).override(
                [override(random) for _ in range(int(random.integers(1, 4)))]
            )
        else:
            data = find_recipe(str(pick(random, list(RECIPES)))).model_dump(mode="json")
            for _ in range(int(random.integers(1, 4))):
                data = spoil_value(random, data)
            recipe = read_recipe(data, int(random.integers(FORMAT + 1)))
    except UserError as error:
        short(error)
        return
    data = recipe.model_dump(mode="json")
    assert _plain_numbers(data)
    assert read_recipe(json.loads(json.dumps(data)), FORMAT) == recipe
    with torch.device("meta"):
        build_detector(recipe.untrained().detector, 3)
