"""Lays out the pages that zensical builds:
docs/ as it stands, two files from above it, and what is generated.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from website import families, reference

ABOVE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "README.md": "index.md",
}
LINK = re.compile(r"(?P<mark>!?)\[(?P<text>[^\]]*)\]\((?P<to>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)


def stage(root: Path, out: Path) -> Path:
    """Write pages and configuration into `out`; the path of the configuration."""
    pages = out / "pages"
    shutil.copytree(root / "docs", pages)
    for source in sorted((root / "docs").rglob("*.md")):
        _lay(source, pages / source.relative_to(root / "docs"), root)
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        _lay(root / name, pages / ABOVE[name], root)
    families.store_costs()
    recipes = families.pages()
    generated = {**recipes, "cli.md": reference.cli_page(), "api.md": reference.api_page()}
    for name, text in generated.items():
        (pages / name).parent.mkdir(exist_ok=True)
        (pages / name).write_text(text, encoding="utf-8")
    shutil.copy(Path(__file__).with_name("site.css"), pages)
    config = yaml.safe_load(Path(__file__).with_name("config.yml").read_text(encoding="utf-8"))
    config["nav"] = navigation(config["nav"], pages, list(recipes))
    (out / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return out / "mkdocs.yml"


def navigation(
    listed: list[dict[str, Any]], pages: Path, recipes: list[str]
) -> list[dict[str, Any]]:
    """The listed pages with the generated ones; a page of docs/ that is not listed is a guide."""
    sections = {title: section for entry in listed for title, section in entry.items()}
    sections["Recipes"] = [*recipes, *sections["Recipes"]]
    sections["Reference"] = ["cli.md", "api.md", *sections["Reference"]]
    known = {
        page
        for section in sections.values()
        for page in ([section] if isinstance(section, str) else section)
    }
    others = sorted(page.name for page in pages.glob("*.md") if page.name not in known)
    *guides, last = sections["Guides"]
    sections["Guides"] = [*guides, *others, last]
    return [{title: section} for title, section in sections.items()]


def _lay(source: Path, target: Path, root: Path) -> None:
    target.write_text(relinked(source.read_text(encoding="utf-8"), source, root), encoding="utf-8")


def relinked(text: str, source: Path, root: Path) -> str:
    """The page's text with links as they are on the site: to files that are no pages only their
    names remain, and a page that is called by its file's name is called by its title.

    A link that leads nowhere stays as it is, so that the build ends with it.
    """
    here = source.parent if source.is_relative_to(root / "docs") else root / "docs"

    def link(match: re.Match[str]) -> str:
        to = match["to"]
        if "://" in to or to.startswith("mailto:"):
            return match[0]
        file = Path(os.path.normpath(source.parent / to))
        if not file.exists():
            return match[0]
        if file.is_relative_to(root / "docs"):
            page = os.path.relpath(file, here)
        elif (above := ABOVE.get(os.path.relpath(file, root))) is not None:
            page = os.path.relpath(root / "docs" / above, here)
        else:
            return match["text"]
        text = _title(file) if match["text"] == file.name else match["text"]
        return f"{match['mark']}[{text}]({page}{match['anchor'] or ''})"

    parts = FENCE.split(text)
    return "".join(part if i % 2 else LINK.sub(link, part) for i, part in enumerate(parts))


def _title(page: Path) -> str:
    return page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
