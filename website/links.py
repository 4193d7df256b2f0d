"""Looks at a built site: what its pages refer to is there,
and nothing is loaded from other hosts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {
    ("script", "src"),
    ("img", "src"),
    ("source", "src"),
    ("iframe", "src"),
    ("link", "href"),
    ("video", "src"),
}
STYLE = re.compile(r"url\(\s*['\"]?(?P<of>[^'\")]+)|@import\s+['\"](?P<sheet>[^'\"]+)")


class Page(HTMLParser):
    """The names that a page can be entered at, and what it refers to:
    address, and whether a browser loads it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.names: set[str] = {""}
        self.references: list[tuple[str, bool]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """One element's names and addresses."""
        for name, value in attrs:
            if name == "id" or (tag, name) == ("a", "name"):
                self.names.add(value or "")
            elif (tag, name) in LOADS and ("rel", "canonical") not in attrs:
                self.references.append((value or "", True))
            elif (tag, name) == ("a", "href"):
                self.references.append((value or "", False))


def problems(site: Path) -> list[str]:
    """A line for each reference that leads nowhere,
    and for each that a browser would load from another host.
    """
    site = site.resolve()
    page = cache(Page)
    found = [
        f"{path.relative_to(site)}: {problem}"
        for path in sorted(site.rglob("*.html"))
        if path.name != "404.html"  # shown at any depth: its addresses are absolute
        for address, loads in page(path).references
        if (problem := _problem(address, loads, path, site, page))
    ]
    return found + [
        f"{path.relative_to(site)}: loads {a}" for path, a in _styles(site) if _elsewhere(a)
    ]


def _problem(
    address: str, loads: bool, path: Path, site: Path, page: Callable[[Path], Page]
) -> str:
    parts = urlsplit(address)
    if _elsewhere(address):
        return f"loads {address}" if loads else ""
    if parts.scheme:  # mailto:, data:
        return ""
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if not target.is_file() or not target.is_relative_to(site):
        return f"{address} is not there"
    if target.suffix == ".html" and unquote(parts.fragment) not in page(target).names:
        return f"{address}: the page has no such anchor"
    return ""


def _elsewhere(address: str) -> bool:
    return urlsplit(address).scheme in ("http", "https") or address.startswith("//")


def _styles(site: Path) -> Iterator[tuple[Path, str]]:
    """What style sheets load."""
    for path in sorted(site.rglob("*.css")):
        for match in STYLE.finditer(path.read_text(encoding="utf-8")):
            yield path, match["of"] or match["sheet"]
