"""The commands in the ```bash blocks of pages, as a shell would call them: bash itself expands
loops and variables, and each command is written down instead of called."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

BLOCK = re.compile(r"^[ ]*```bash\n(.*?)^[ ]*```", re.MULTILINE | re.DOTALL)
# Nothing is on the path, so bash hands over every command that is no builtin.
WRITE_DOWN = """PATH=/nowhere
source() { :; }
.() { :; }
kill() { :; }
cd() { :; }
command_not_found_handle() { printf '%s\\0' "$@" >> "$CALLED"; printf '\\0' >> "$CALLED"; }
"""


def blocks(page: Path) -> list[str]:
    """The page's blocks of commands."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def calls(script: str) -> list[list[str]]:
    """The words of every command that the script calls, in its order.
    Raises `ValueError` where bash cannot read it.
    """
    with tempfile.TemporaryDirectory() as folder:
        called = Path(folder, "called")
        text = WRITE_DOWN + script.replace(".venv/bin/", "")
        run = ["bash", "--norc", "--noprofile", "-c", text]
        ended = subprocess.run(
            run,
            cwd=folder,
            env={"CALLED": str(called)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if "syntax error" in ended.stderr or "unexpected" in ended.stderr:
            raise ValueError(ended.stderr)
        written = called.read_bytes().decode() if called.exists() else ""
    return [call.split("\0") for call in written.split("\0\0") if call]
