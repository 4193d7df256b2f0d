"""What the site is made of: generated pages follow the code,
links are looked at, and messages are the library's.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from website.links import problems
from website.stage import navigation, relinked

import detrellis
from detrellis.recipes import RECIPES, find_recipe
from website import families, reference

ROOT = Path(__file__).parents[2]


def messages() -> list[str]:
    """The text of every string in the package, with … for what is filled in."""
    found = []
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def says(text: str, message: str) -> bool:
    """Whether the message is the text, with anything in the places of its …"""
    parts = [re.escape(part.strip()) for part in message.split("…")]
    return re.search(".*".join(parts), text, re.DOTALL) is not None


def test_troubleshooting_quotes_what_the_library_prints() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    assert len(quoted) > 15
    printed = messages()
    assert [message for message in quoted if not any(says(text, message) for text in printed)] == []
    assert not any(says(text, "the loss is rather finite: …") for text in printed)


def test_a_link_that_leads_nowhere_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h1 id="top"></h1><a href="b/">b</a><a href="#top">t</a><a href="b/#in">i</a><a href="https://arxiv.org">x</a>'
        '<img src="none.png"><a href="c.html">c</a><a href="b/#out">o</a><script src="https://elsewhere/x.js"></script>'
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "index.html").write_text('<p id="in"><a href="../../outside">o</a></p>')
    (tmp_path / "site.css").write_text(
        "a { background: url(https://elsewhere/font.woff) } b { background: url(x) }"
    )
    said = "\n".join(problems(tmp_path))
    assert len(said.splitlines()) == 6
    for wrong in (
        "none.png is not there",
        "c.html is not there",
        "b/#out: ",
        "loads https://elsewhere/x.js",
    ):
        assert wrong in said
    assert "../../outside is not there" in said
    assert "loads https://elsewhere/font.woff" in said


def test_links_out_of_the_docs(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("CONTRIBUTING.md", "code.py", "docs/a.md", "docs/b.md"):
        (tmp_path / name).write_text("# The title\n\nText.\n")
    text = (
        "[c](../CONTRIBUTING.md) [s](../code.py) [b](b.md#x) [b.md](b.md) "
        "[n](../none.md)\n```\n[s](../code.py)\n```\n"
    )
    assert relinked(text, tmp_path / "docs" / "a.md", tmp_path) == (
        "[c](contributing.md) s [b](b.md#x) [The title](b.md) "
        "[n](../none.md)\n```\n[s](../code.py)\n```\n"
    )
    assert relinked("[a](docs/a.md)", tmp_path / "CONTRIBUTING.md", tmp_path) == "[a](a.md)"


def test_a_page_that_nobody_listed_is_a_guide(tmp_path: Path) -> None:
    for name in ("index", "data", "last", "new", "cli", "api", "runs", "detectors"):
        (tmp_path / f"{name}.md").write_text("")
    listed = [
        {"Home": "index.md"},
        {"Guides": ["data.md", "last.md"]},
        {"Recipes": ["detectors.md"]},
        {"Reference": ["runs.md"]},
    ]
    assert navigation(listed, tmp_path, ["recipes/a.md"]) == [
        {"Home": "index.md"},
        {"Guides": ["data.md", "new.md", "last.md"]},
        {"Recipes": ["recipes/a.md", "detectors.md"]},
        {"Reference": ["cli.md", "api.md", "runs.md"]},
    ]


def test_sizes_are_stored_of_the_recipes_as_they_are() -> None:
    networks = {families.digest(find_recipe(name)) for name in RECIPES}
    assert families.costs().keys() == networks, "python -m website writes costs.json anew"


def test_each_recipe_has_its_size_on_one_page() -> None:
    pages = families.pages()
    for name in RECIPES:
        stored = families.costs()[families.digest(find_recipe(name))]
        row = f"| `{name}` | {stored['parameters'] / 1e6:.1f} M | {stored['gflops']:.4g} G |"
        assert sum(row in text for text in pages.values()) == 1


def test_what_is_missing_is_measured_and_what_is_over_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, key = families.costs(), families.digest(find_recipe("tiny"))
    monkeypatch.setattr(families, "COSTS", tmp_path / "costs.json")
    families.COSTS.write_text(
        json.dumps({k: v for k, v in before.items() if k != key} | {"of old": before[key]})
    )
    families.costs.cache_clear()
    families.store_costs()
    stored = families.costs()
    families.costs.cache_clear()
    assert stored == before


@pytest.mark.parametrize("name", ["small", "dfine-n"])
def test_stored_sizes_are_what_the_network_has(name: str) -> None:
    recipe = find_recipe(name)
    measured = families.measured(recipe)
    stored = families.costs()[families.digest(recipe)]
    for what in ("parameters", "gflops"):
        assert stored[what] == measured[what]


def test_sizes_follow_the_network_and_not_the_training() -> None:
    base = find_recipe("small")
    assert families.digest(base.override("optim.lr=1e-5")) == families.digest(base)
    assert families.digest(base.override("detector.queries.count=55")) != families.digest(base)
    assert families.digest(base.override("data.size=[64, 64]")) != families.digest(base)


def test_published_figures_name_recipes_and_papers() -> None:
    (detr,) = families.published("detr-r50")
    assert (detr.ap, detr.epochs) == (42.0, 500)
    assert detr.source.endswith("Table 2, row 2")
    assert families.published("dfine-s") == [families.Published(48.5, 132, "the paper of D-FINE")]
    assert families.published("tiny") == []
    for about in families.described().values():
        for figures in about.get("published", {}).values():
            assert figures.keys() <= RECIPES.keys()


def test_the_reference_has_every_public_name() -> None:
    page = reference.api_page()
    for name in detrellis.__all__:
        assert f"## `detrellis.{name}`" in page
    assert "detrellis.export(\n    run: str | Path,\n" in page
    assert "`Prediction.boxes`" in page
    assert "| `Seed` | `int`, from 0 to " in page


def test_the_reference_has_every_command() -> None:
    page = reference.cli_page()
    assert "## `detrellis analyze groups`" in page
    assert "detrellis train small --data my_data --epochs auto" in page
    assert "| `--data` | " in page
    assert "Default: `2`." in page
