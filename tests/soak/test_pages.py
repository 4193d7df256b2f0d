"""The docs site as it is built, page by page in a browser."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import WIDTHS, Browser, served

pytest.importorskip("zensical")


def test_no_page_is_wider_than_a_phone(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-m", "website", "--out", tmp_path / "docs"], cwd=root, check=True
    )
    site = tmp_path / "docs" / "site"
    pages = [page.relative_to(site).as_posix() for page in sorted(site.rglob("index.html"))]
    assert len(pages) > 50
    wide = {}
    with served(site) as address, Browser(tmp_path / "browser") as browser:
        for width in WIDTHS:
            for page in pages:
                browser.open(f"{address}/{page}", width)
                if (pixels := browser.too_wide()) > 0:
                    wide[page, width] = pixels
                elsewhere = [a for a in browser.loaded() if not a.startswith((address, "data:"))]
                assert not elsewhere, (page, elsewhere)
    assert wide == {}
