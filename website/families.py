"""A page for each family of recipes:
papers, parameters, multiply-adds, and published AP, from the recipes themselves.

Sizes stand in `costs.json` with the digest of all that they follow from; `store_costs` measures
those that are missing. AP comes from the papers' tables that the package holds, and from
`families.yml`, which names the paper.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import defaultdict
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from detrellis.fields import Config
from detrellis.recipes import RECIPES, Recipe, find_recipe
from detrellis.recipes.tables import load_paper, papers

CLASSES = 80  # COCO's
COSTS = Path(__file__).with_name("costs.json")
DESCRIBED = Path(__file__).with_name("families.yml")
HEAD = (
    "| recipe | parameters | multiply-adds | picture | epochs |\n| --- | ---: | ---: | --- | ---: |"
)
PUBLISHED = "| recipe | AP | epochs | from |\n| --- | ---: | ---: | --- |"


class Published(NamedTuple):
    """An AP on COCO val 2017 as a paper states it, in percent."""

    ap: float
    epochs: int | None
    source: str


def pages() -> dict[str, str]:
    """The text of each page by its name: an overview, and a page a family."""
    members, about = families(), described()
    names = {module: f"recipes/{module}.md" for module in members}
    return {"recipes/index.md": _overview(members, about)} | {
        names[module]: _page(about[module], recipes) for module, recipes in members.items()
    }


@cache
def families() -> dict[str, list[Recipe]]:
    """The recipes of each family, which is the file that makes them."""
    members = defaultdict(list)
    for name, make in RECIPES.items():
        maker = make.func if isinstance(make, partial) else make
        members[maker.__module__.rsplit(".", 1)[-1]].append(find_recipe(name))
    return dict(members)


@cache
def described() -> dict[str, dict[str, Any]]:
    """Title, papers and further figures of each family.
    One that nobody has described has its file's first line.
    """
    known = yaml.safe_load(DESCRIBED.read_text(encoding="utf-8"))
    plain = {module: {"title": _first_line(module), "papers": []} for module in families()}
    return plain | known


def _first_line(module: str) -> str:
    text = sys.modules[f"detrellis.recipes.{module}"].__doc__ or module
    return text.strip().splitlines()[0].split(":")[0].rstrip(".")


def published(recipe: str) -> list[Published]:
    """What papers say of this very recipe, by the number of epochs, each AP once."""
    found = [
        Published(row.published["AP"], row.epochs, f"{paper.title.split(':')[0]}, {row.source}")
        for paper in map(load_paper, papers())
        for table in paper.tables
        for row in table.rows
        if row.recipe == recipe
        and not (row.schemes or row.override or row.full or row.missing)
        and "AP" in row.published
        and table.data == "COCO 2017 val"
        and table.metric == "coco"
    ]
    for about in described().values():
        for paper, figures in about.get("published", {}).items():
            if recipe in figures:
                found.append(
                    Published(
                        figures[recipe],
                        find_recipe(recipe).schedule.epochs,
                        f"the paper of {paper}",
                    )
                )
    once = {(p.epochs, p.ap): p for p in reversed(found)}
    return sorted(once.values(), key=lambda p: (p.epochs or 0, p.ap))


def digest(recipe: Recipe) -> str:
    """Of all in a recipe that decides its size at inference. Fields at their defaults do not count,
    so that a new one leaves the others' digests as they are."""
    decides = [_set(recipe.detector), recipe.data.size, recipe.data.max_side, CLASSES]
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[
        :16
    ]


def _set(value: Any) -> Any:
    """What a config sets: its kind, and the fields that are not at their defaults."""
    if not isinstance(value, Config):
        return value
    fields = {
        name: field.get_default(call_default_factory=True)
        for name, field in type(value).model_fields.items()
    }
    given = {name: getattr(value, name) for name in fields}
    return {name: _set(v) for name, v in given.items() if name == "kind" or v != fields[name]}


def store_costs() -> None:
    """Write `costs.json` where recipes have changed:
    what is missing is measured, what no recipe has goes.
    """
    networks = {digest(recipe): recipe for recipe in map(find_recipe, reversed(RECIPES))}
    if costs().keys() == networks.keys():
        return
    kept = {key: size for key, size in costs().items() if key in networks}
    new = {key: measured(recipe) for key, recipe in networks.items() if key not in kept}
    COSTS.write_text(json.dumps(kept | new, indent=1) + "\n")
    costs.cache_clear()


@cache
def costs() -> dict[str, dict[str, Any]]:
    """Parameters, multiply-adds and picture size at inference by digest:
    recipes that differ in training alone are one network."""
    return json.loads(COSTS.read_text()) if COSTS.exists() else {}


def measured(recipe: Recipe) -> dict[str, Any]:
    """What `detrellis info` says, on torch's meta device."""
    from detrellis.engine.measure import measure

    info = measure(recipe, CLASSES)
    return {
        "first": recipe.name,
        "parameters": info.parameters,
        "gflops": info.gflops,
        "size": info.image_size,
    }


def _overview(members: dict[str, list[Recipe]], about: dict[str, dict[str, Any]]) -> str:
    rows = [
        f"| [{about[m]['title']}]({m}.md) | {len(recipes)} | "
        f"{', '.join(f'`{r.name}`' for r in recipes[:3])}{' ...' if len(recipes) > 3 else ''} |"
        for m, recipes in members.items()
    ]
    return "\n".join([OVERVIEW, "| family | recipes | |", "| --- | ---: | --- |", *rows, ""])


def _page(about: dict[str, Any], recipes: list[Recipe]) -> str:
    parts = [f"# {about['title']}"]
    parts += [about["text"].strip()] if "text" in about else []
    parts += ["\n".join(f"* {paper}" for paper in about["papers"])] if about["papers"] else []
    first = recipes[0].name
    parts += [f"```bash\ndetrellis train {first} --data my_data\ndetrellis info {first}\n```"]
    parts += ["\n".join([HEAD, *(_size(r) for r in recipes)]), SIZES]
    rows = [
        f"| `{r.name}` | {p.ap} | {p.epochs or ''} | {p.source} |"
        for r in recipes
        for p in published(r.name)
    ]
    parts += (
        [f"## {about.get('metric', 'AP')} as published", "\n".join([PUBLISHED, *rows]), NOT_OURS]
        if rows
        else []
    )
    parts += [f"More: {', '.join(about['more'])}."] if "more" in about else []
    return "\n\n".join(parts) + "\n"


def _size(recipe: Recipe) -> str:
    said = costs()[digest(recipe)]
    height, width = said["size"]
    return (
        f"| `{recipe.name}` | {said['parameters'] / 1e6:.1f} M | {said['gflops']:.4g} G | "
        f"{width}x{height} | {recipe.schedule.epochs} |"
    )


OVERVIEW = """# Which recipes are there?

Begin with `small`: it starts from ImageNet features, and is made for a few hundred pictures and a CPU. Each of
the others is a paper's network with the paper's schedule; `--scale tiny` makes any of them small.

```bash
detrellis recipes            # all of them
detrellis info dino-r50      # what one costs
detrellis train dino-r50 --scale tiny --data my_data
```
"""
SIZES = (
    f"For {CLASSES} classes, at inference: training schemes are gone. Multiply-adds are of one "
    "picture of the size\nin the table; `detrellis info` counts them."
)
NOT_OURS = (
    "COCO val 2017, in percent, as the named papers state it. **Nothing here has been trained "
    "on COCO**: the figures say what\nthe method can do, not what this code has done. What this "
    "code has done is in [Results](../results.md)."
)
