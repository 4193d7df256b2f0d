"""Trials as jobs of a cluster: Slurm's through submitit, or tasks of Ray. They queue, place and
start again; no scheduling is done here. Both are optional packages."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import yaml

from detrellis.atomic import replace_text
from detrellis.errors import UserError
from detrellis.recipes.values import read_value
from detrellis.study.launch import Job, Launcher, Local, TrialJob
from detrellis.study.plan import LOG

LauncherName = Literal["local", "slurm", "ray"]
STOPPED = 128 + signal.SIGTERM
# In a trial's folder: submitit's files; the job that trains it, while there is one
JOBS, JOB = "job", "job.txt"
TIMEOUTS = 1000  # times that a job is requeued at the end of its time: a trial may take many
WAIT_SECONDS, CHECK_SECONDS = 0.3, 5.0  # between two looks at a job; the latter asks the cluster
ONE_PROCESS = ("nodes", "ntasks_per_node", "tasks_per_node", "num_returns")


def find_launcher(
    name: LauncherName, options: Sequence[str] = (), threads: int | None = None
) -> Launcher:
    """The launcher of that name. `options` are KEY=VALUE of the cluster's own words, and `threads`
    those that were asked for; `UserError` where they are not for this launcher, or it cannot be
    used here."""
    if name == "local":
        if options:
            raise UserError(
                f"--launcher-option {options[0]} is for jobs of a cluster, and --launcher is local",
                "Take --launcher slurm or --launcher ray, or leave it out.",
            )
        return Local()
    if threads is not None:
        words = {"slurm": "cpus_per_task", "ray": "num_cpus"}[name]
        raise UserError(
            f"--threads {threads} is shared out on one machine, and --launcher {name} gives each "
            "run a job of its own",
            f"Say what a job gets: --launcher-option {words}={threads}.",
        )
    given = dict(map(_option, options))
    return Slurm(given) if name == "slurm" else Ray(given)


def _option(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    try:
        if separator:
            return name.strip(), read_value(value)
    except yaml.YAMLError:
        pass
    raise UserError(
        f"--launcher-option {text}: not KEY=VALUE", "For example --launcher-option cpus_per_task=8."
    )


class Slurm:
    """A job of Slurm for each trial.
    `options` are those of `submitit.SlurmExecutor`, in sbatch's words.

    Raises `UserError` where submitit is missing, this is no machine of a Slurm cluster, or an
    option is unknown.
    """

    here = False

    def __init__(self, options: Mapping[str, Any], executor: Any = None) -> None:
        try:
            import submitit
        except ImportError:
            raise UserError(
                "--launcher slurm needs submitit, which is not installed",
                "pip install 'detrellis[slurm]'",
            ) from None
        _one_process(options)
        self._options, self._executor = dict(options), executor or submitit.SlurmExecutor
        if "time" not in options and executor is None:
            raise UserError(
                "--launcher slurm: nothing says how long a job may take",
                "In minutes: --launcher-option time=240. A run that needs longer is requeued, "
                "and goes on.",
            )
        with TemporaryDirectory() as place:  # options are refused before anything is submitted
            self._prepared(Path(place))

    def start(self, folder: Path, threads: int | None) -> Job:
        """Submit the trial, or find the job that an earlier call of the study has left with the
        cluster.
        """
        folder = folder.absolute()
        executor = self._prepared(folder / JOBS)
        if (folder / JOB).exists():
            job = executor.job_class(folder / JOBS, (folder / JOB).read_text())
            if not job.done(force_check=True):
                return SlurmJob(job, folder)
        job = executor.submit(TrialJob(folder))
        replace_text(folder / JOB, job.job_id)
        return SlurmJob(job, folder)

    def _prepared(self, folder: Path) -> Any:
        try:
            executor = self._executor(folder, max_num_timeout=TIMEOUTS)
        except RuntimeError as error:
            raise UserError(
                f"--launcher slurm: {error}",
                "Start the study on a login node, or take --launcher local.",
            ) from None
        try:
            executor.update_parameters(**self._options)
        except (ValueError, TypeError, AssertionError, NameError) as error:
            raise UserError(
                f"--launcher-option: {error}", "Take the names of sbatch's options."
            ) from None
        return executor


class SlurmJob:
    """A trial's job. See `Job`."""

    def __init__(self, job: Any, folder: Path) -> None:
        self._job, self._folder = job, folder
        self._cancelled, self._checked = False, time.monotonic()

    def poll(self) -> int | None:
        """See `Job`. The result is a file;
        that a job has ended without one, only the cluster knows.
        """
        due = self._cancelled and time.monotonic() - self._checked > CHECK_SECONDS
        if due:
            self._checked = time.monotonic()
        if not self._job.done(force_check=due):
            return None
        (self._folder / JOB).unlink(missing_ok=True)
        if self._cancelled and not self._job.paths.result_pickle.exists():
            return STOPPED
        error = self._job.exception()
        return int(self._job.result()) if error is None else _failed(self._folder, error)

    def wait(self) -> int:
        """See `Job`."""
        return _waited(self)

    def terminate(self) -> None:
        """Cancel the job: Slurm sends SIGTERM,
        and waits before it kills (its KillWait, 30 seconds).
        """
        self._cancelled = True
        self._job.cancel(check=False)

    kill = terminate


class Ray:
    """A task of Ray for each trial.
    `options` are those of a remote function, such as num_gpus and resources.

    Takes the cluster that `RAY_ADDRESS` names or that runs on this machine, or starts one here.
    Tasks end with the study. Raises `UserError` where ray is missing, the cluster cannot be
    reached, or an option is unknown.
    """

    here = False

    def __init__(self, options: Mapping[str, Any]) -> None:
        try:
            import ray
        except ImportError:
            raise UserError(
                "--launcher ray needs ray, which is not installed", "pip install 'detrellis[ray]'"
            ) from None
        _one_process(options)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        handler = signal.getsignal(signal.SIGTERM)  # which ray replaces by its own
        try:
            if not ray.is_initialized():
                ray.init(log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError) as error:
            raise UserError(
                f"--launcher ray: {error}",
                "Say where the cluster is (RAY_ADDRESS), or start one: ray start --head.",
            ) from None
        finally:
            signal.signal(signal.SIGTERM, handler)
        one_gpu = {"num_gpus": 1} if ray.cluster_resources().get("GPU") else {}
        try:
            self._run = ray.remote(run_trial).options(**one_gpu | dict(options))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"--launcher-option: {error}", "Take the names of ray's task options."
            ) from None

    def start(self, folder: Path, threads: int | None) -> Job:
        """See `Launcher`."""
        return RayJob(self._run.remote(TrialJob(folder.absolute())), folder)


def run_trial(job: TrialJob) -> int:
    """What a task of Ray runs."""
    return job()


class RayJob:
    """A trial's task. See `Job`."""

    def __init__(self, task: Any, folder: Path) -> None:
        self._task, self._folder = task, folder

    def poll(self) -> int | None:
        """See `Job`."""
        import ray

        ended, _ = ray.wait([self._task], timeout=0)
        if not ended:
            return None
        try:
            return int(ray.get(self._task))
        except ray.exceptions.TaskCancelledError:
            return STOPPED
        except ray.exceptions.RayError as error:  # the worker, or its machine, has gone too often
            return _failed(self._folder, error)

    def wait(self) -> int:
        """See `Job`."""
        return _waited(self)

    def terminate(self) -> None:
        """Cancel the task: a `KeyboardInterrupt` in its worker, which lets the trial save."""
        import ray

        ray.cancel(self._task)

    kill = terminate


def _waited(job: Job) -> int:
    while (code := job.poll()) is None:
        time.sleep(WAIT_SECONDS)
    return code


def _failed(folder: Path, error: BaseException) -> int:
    """The exit code of a job that ended without a result;
    what the cluster says stands at the end of its log.
    """
    with (folder / LOG).open("a", encoding="utf-8") as log:
        log.write(f"{type(error).__name__}: {error}\n")
    return 1


def _one_process(options: Mapping[str, Any]) -> None:
    if wrong := [name for name in ONE_PROCESS if options.get(name, 1) != 1]:
        raise UserError(
            f"--launcher-option {wrong[0]}={options[wrong[0]]}: a run of a study is one process",
            "Leave it out; a single run on many GPUs is torchrun's.",
        )
