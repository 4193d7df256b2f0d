"""One run of a study, in a process of its own: `python -m detrellis.study.child FOLDER`.

`FOLDER/trial.json` holds the recipe whole, so that nothing is lost on a command line. A run that
was stopped goes on.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from detrellis import api
from detrellis.analysis import branches
from detrellis.analysis.runs import ComparedRuns
from detrellis.atomic import replace_text
from detrellis.data.files import read_object
from detrellis.data.layout import DataSource
from detrellis.distributed import pick_device
from detrellis.engine.trackers import ORDER
from detrellis.errors import UserError
from detrellis.recipes.migrate import read_recipe
from detrellis.study.plan import DONE


def main(folder: Path) -> int:
    """Train what `FOLDER/trial.json` says, and write `FOLDER/done.json` after the last epoch;
    the exit code.
    """
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        order = read_object(folder / ORDER, again="Start the study again: it writes this file")
        device, workers, track = order["device"], order["workers"], order.get("track", ())
        if (folder / "last.state.pt").exists():
            result = api.resume(folder, device=device, workers=workers, track=track)
        else:
            result = api.train(
                read_recipe(order["recipe"], order.get("format", 1)),
                data=DataSource.from_dict(order["data"]),
                boxes=order.get("boxes"),
                out=folder,
                seed=order["seed"],
                skip_bad=order["skip_bad"],
                device=device,
                workers=workers,
                track=track,
            )
    except UserError as error:
        print(f"error {error}", flush=True)
        return 2
    if result.finished:
        done = _machine(device) | {"jobs": order["jobs"]}
        if branch := order.get("branch"):
            done["branch"] = ap_of_branch(
                folder, branch, device=device, workers=workers, skip_bad=order["skip_bad"]
            )
        replace_text(folder / DONE, json.dumps(done, indent=1))
    # As the command line: stopped is not finished
    return 0 if result.signal is None else 128 + result.signal


def ap_of_branch(run: Path, branch: str, **options: Any) -> dict[str, float | None]:
    """What a branch of scheme `co` reaches by itself, with the weights of the last epoch:
    AP, AP50 and AP75.
    """
    stats = branches.analyze(ComparedRuns(run, **options)).runs[0].heads[branch].stats
    return {name: stats[name] for name in branches.SHOWN}


def _stop_with_parent() -> None:
    """Nobody writes to the standard input:
    it ends when the parent does, however that ended. Then save and stop.
    """
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _machine(device: str | None) -> dict[str, Any]:
    """The machine's properties that the time and memory of a run depend on."""
    own = pick_device(device)
    cuda = own.type == "cuda"
    memory = torch.cuda.max_memory_allocated(own) if cuda else _resident()
    name = torch.cuda.get_device_name(own) if cuda else own.type
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peak_memory": memory,
    }


def _resident() -> int | None:
    """The peak memory of this process in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
