"""The trackers that are known by name: TensorBoard, trackio, wandb and MLflow.

Each library is imported when its tracker begins, and takes its settings from its own environment
variables. Without any, all of them keep what they are given on this machine, and nobody needs an
account.

| name | without settings | with |
| --- | --- | --- |
| `tensorboard` | `tensorboard/` in the run | |
| `trackio` | `~/.cache/huggingface/trackio`, for `trackio show` | `TRACKIO_SPACE_ID`, `TRACKIO_DIR` |
| `wandb` | offline, `wandb/` in the run, for `wandb sync` | `wandb login` or `WANDB_API_KEY`; `WANDB_PROJECT`, ... |
| `mlflow` | `mlruns/` in the working folder, for `mlflow ui` | `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME` |
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import netrc
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from PIL import Image

from detrellis.arguments import nearest
from detrellis.engine.trackers import Status, TrackedRun, Tracker
from detrellis.errors import UserError

PROJECT = "detrellis"  # where the library's own variable does not say


class TensorBoard:
    """Curves in `tensorboard/` of the run, as `tensorboard --logdir runs` shows them."""

    name = "tensorboard"
    remedy = "Where the disk is full, make room."

    def start(self, run: TrackedRun, resume: str | None) -> None:
        """See `Tracker`; what a resumed run does again is taken out of the curves."""
        writer = _imported("torch.utils.tensorboard", self.name).SummaryWriter
        self._writer: Any = writer(
            str(run.folder / "tensorboard"), purge_step=run.step + 1 if run.step else None
        )

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_picture(self, name: str, picture: Image.Image, step: int) -> None:
        """See `Tracker`."""
        self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def end(self, status: Status) -> None:
        """See `Tracker`."""
        self._writer.close()


class Wandb:
    """Weights & Biases; offline, in `wandb/` of the run, where nobody has logged in."""

    name = "wandb"
    remedy = (
        "Check the connection and `wandb login`, or set WANDB_MODE=offline and send it later: "
        "wandb sync."
    )

    def start(self, run: TrackedRun, resume: str | None) -> str:
        """See `Tracker`. Steps are a value of their own:
        those that a resumed run does again are not refused.
        """
        self._library: Any = _imported("wandb", self.name)
        id_ = resume or uuid.uuid4().hex[:12]
        # Else it asks, and waits
        known = os.environ.get("WANDB_MODE") or (None if _wandb_key() else "offline")
        self._run = self._library.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=id_,
            name=run.name,
            group=os.environ.get("WANDB_RUN_GROUP") or run.study,
            resume="allow",
            mode=known,
            dir=str(run.folder),
            config=dict(run.config),
            settings=self._library.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")
        return id_

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log({**values, "step": step})

    def log_picture(self, name: str, picture: Image.Image, step: int) -> None:
        """See `Tracker`."""
        self._run.log({name: self._library.Image(picture), "step": step})

    def end(self, status: Status) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=0 if status == "finished" else 1)


class MLflow:
    """MLflow's tracking, by its client alone: `mlflow-skinny` is enough."""

    name = "mlflow"
    remedy = "Check MLFLOW_TRACKING_URI, or leave it out: the run is then kept in mlruns/."
    statuses: Mapping[Status, str] = {
        "finished": "FINISHED",
        "stopped": "KILLED",
        "failed": "FAILED",
    }

    def start(self, run: TrackedRun, resume: str | None) -> str:
        """See `Tracker`."""
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # a machine without git is no matter
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        place = os.environ.get("MLFLOW_TRACKING_URI", Path("mlruns").absolute().as_uri())
        if place.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        tracking = _imported("mlflow.tracking", self.name)
        self._client: Any = tracking.MlflowClient(tracking_uri=place)
        if resume is not None:
            self._client.update_run(resume, status="RUNNING")
            self._run = resume
            return resume
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", run.study or PROJECT)
        if self._client.get_experiment_by_name(experiment) is None:
            with contextlib.suppress(Exception):  # another run of a study makes it at the same time
                self._client.create_experiment(experiment)
        id_ = self._client.get_experiment_by_name(experiment).experiment_id
        tags = {"study": run.study} if run.study else {}
        self._run = str(self._client.create_run(id_, run_name=run.name, tags=tags).info.run_id)
        self._client.log_dict(self._run, dict(run.config), "config.json")
        return self._run

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        entities = importlib.import_module("mlflow.entities")
        now = int(1000 * time.time())
        # In a folder of files, a number cannot have the name that others begin with.
        plain = {name: value for name, value in values.items() if name != "epoch"}
        rows = [entities.Metric(name, value, now, step) for name, value in plain.items()]
        for i in range(0, len(rows), 1000):  # more at a time are refused
            self._client.log_batch(self._run, metrics=rows[i : i + 1000], synchronous=True)

    def log_picture(self, name: str, picture: Image.Image, step: int) -> None:
        """See `Tracker`."""
        self._client.log_image(self._run, picture, f"{name}-{step}.png")

    def end(self, status: Status) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._run, self.statuses[status])


class Trackio:
    """trackio, which keeps runs on this machine and shows them with `trackio show`."""

    name = "trackio"
    remedy = (
        "Where TRACKIO_SPACE_ID is set, check the connection, or unset it: runs then stay on "
        "this machine."
    )

    def start(self, run: TrackedRun, resume: str | None) -> str:
        """See `Tracker`. Its runs go by name:
        that of the folder, with a part that no other run has.
        """
        self._library: Any = _imported("trackio", self.name)
        name = resume or f"{run.name}-{uuid.uuid4().hex[:6]}"
        with contextlib.redirect_stdout(sys.stderr):  # what it says is no part of --json
            self._run = self._library.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=name,
                group=run.study,
                config=dict(run.config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
            )
        return name

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=step)

    def log_picture(self, name: str, picture: Image.Image, step: int) -> None:
        """See `Tracker`."""
        self._run.log({name: self._library.Image(picture)}, step=step)

    def end(self, status: Status) -> None:
        """See `Tracker`."""
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


KNOWN: Mapping[str, Callable[[], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
    "mlflow": MLflow,
}
Track = str | Tracker


def tracker_names(words: Sequence[str]) -> tuple[str, ...]:
    """The names in `words`, in each of which several stand with commas.

    Raises `UserError` for a tracker that nobody knows, and for one whose library is not installed.
    """
    names = tuple(name for word in words for name in word.split(","))
    for name in names:
        if name not in KNOWN:
            raise UserError(f"--track {name}: no such tracker", nearest(name, list(KNOWN)))
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"--track {name}: {name} is not installed", f"pip install 'detrellis[{name}]'"
            )
    return names


def named(names: Sequence[str]) -> list[Tracker]:
    """The trackers of these names, each once; those that are not known are left out."""
    return [KNOWN[name]() for name in dict.fromkeys(names) if name in KNOWN]


def _imported(module: str, name: str) -> Any:
    """The module of a tracker's library. Raises `UserError` where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError("is not installed", f"pip install 'detrellis[{name}]'") from None


def _wandb_key() -> bool:
    """Whether somebody has logged in to wandb here: it keeps its keys in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    places = (
        [Path(os.environ["NETRC"])]
        if os.environ.get("NETRC")
        else [Path.home() / ".netrc", Path.home() / "_netrc"]
    )
    for place in places:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(str(place)).authenticators(host):
                return True
    return False
