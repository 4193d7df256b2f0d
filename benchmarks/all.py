"""Every benchmark that has a budget, one after the other, and a table of what was measured:
`make bench`.

    python benchmarks/all.py [NAME ...]      # for example: python benchmarks/all.py step matching

Speed is never a test: the exit code is 0 whatever the table says, because shared machines are
noisy. A benchmark that cannot run says so in the table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Row
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
NAMES = (
    "step",
    "deformable",
    "matching",
    "evaluation",
    "loader",
    "inference",
    "schemes",
    "groups",
    "semantic",
    "masks",
    "realtime",
    "vit",
    "large_set",
)


def rows_of(name: str, folder: Path) -> list[Row] | None:
    """Run one benchmark in a process of its own; its rows, or None where it failed."""
    print(f"\n== {name}", flush=True)
    to = folder / f"{name}.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / f"{name}.py")]
    if name == "deformable":  # has a table of its own, with its budgets in the last column
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        print(done.stdout, end="", flush=True)
        return None if done.returncode else deformable_rows(done.stdout)
    done = subprocess.run([*command, "--json", str(to)], env=environment)
    return [Row(**row) for row in json.loads(to.read_text())] if done.returncode == 0 else None


def deformable_rows(text: str) -> list[Row]:
    """The rows of `deformable.py`'s two tables that have a budget:
    forward and backward together.
    """
    rows, workload = [], ""
    for line in text.splitlines():
        if found := re.match(r"(enc|dec)\s+forward", line):
            workload = {"enc": "encoder", "dec": "decoder"}[found[1]]
        elif found := re.match(r"(\w+) .* ([\d.]+)x\s+([\d.]+)$", line):
            what = f"{workload} layer, {found[1]}, against grid_sample"
            rows.append(Row(what, float(found[2]), float(found[3]), "x"))
    return rows


def table(found: dict[str, list[Row] | None]) -> Table:
    """All rows."""
    shown = Table("benchmark", "what", "measured", "budget", "")
    for name, rows in found.items():
        if rows is None:
            shown.add_row(name, "did not run to its end", "-", "-", "[red]FAILED[/]")
        for row in rows or []:
            sign = ">=" if row.at_least else "<="
            verdict = "[green]ok[/]" if row.ok else "[red]MISSED[/]"
            measured, budget = f"{row.measured:.3g} {row.unit}", f"{sign} {row.budget:g} {row.unit}"
            shown.add_row(name, row.what, measured, budget, verdict)
    return shown


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; default: all"
    )
    names = parser.parse_args().names or NAMES
    if unknown := set(names) - set(NAMES):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as folder:
        found = {name: rows_of(name, Path(folder)) for name in names}
    print()
    # A file has no width of its own
    Console(width=None if sys.stdout.isatty() else 120).print(table(found))


if __name__ == "__main__":
    main()
