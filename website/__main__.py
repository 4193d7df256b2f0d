"""Builds the site from docs/, strictly:
a link, a page, an anchor or a picture that is not there ends it.

python -m website              # writes build/docs/site
python -m website --out DIR    # elsewhere
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from website.links import problems
from website.stage import stage

ROOT = Path(__file__).parents[1]
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # which zensical writes whatever it is told


def main() -> int:
    """Stage the pages, build them, and look at each link of what came out.
    The exit code: 0 where all is well.
    """
    parser = argparse.ArgumentParser(description="Build the docs site.")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "docs", help="folder, emptied first"
    )
    out = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    config = stage(ROOT, out)
    zensical = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(config)]
    built = subprocess.run(
        zensical, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"}, check=False
    )
    if built.returncode:
        print(
            COLOURS.sub("", f"{built.stdout}\n{built.stderr}".split("Traceback")[0]),
            file=sys.stderr,
        )
        return 1
    wrong = problems(out / "site")
    print(*wrong, sep="\n", file=sys.stderr)
    pages = len(list((out / "site").rglob("*.html")))
    print(f"{pages} pages in {out / 'site'}: {len(wrong) or 'no'} problems")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
