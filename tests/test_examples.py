"""What stands in examples/: files that parse, commands that `detrellis` takes,
and a Slurm script that goes on after a preemption."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from detrellis.cli import app

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "examples" / "slurm.sh"
SBATCH = {  # of sbatch's options, those that a job of several nodes has a use for
    *(
        "account",
        "constraint",
        "cpus-per-task",
        "error",
        "exclude",
        "gpus-per-node",
        "job-name",
        "mem",
        "nodes",
    ),
    *("ntasks-per-node", "open-mode", "output", "partition", "qos", "requeue", "signal", "time"),
}


def accepted(words: list[str]) -> str:
    """The verb of a command, whose options are all known and of the right type."""
    group: Any = get_command(app)
    name, verb, rest = group.resolve_command(group.make_context("detrellis", list(words)), words)
    verb.make_context(name, rest)
    return str(name)


@pytest.mark.parametrize("name", ["skypilot.yaml", "kubernetes.yaml"])
def test_the_commands_of_other_clusters_are_known(name: str) -> None:
    text = (ROOT / "examples" / name).read_text()
    documents: list[dict[str, Any]] = list(yaml.safe_load_all(text))
    script = (
        documents[-1]["run"] if "run" in documents[-1] else _container(documents[-1])["args"][0]
    )
    commands = [shlex.split(found) for found in re.findall(r'words="(.*?)"', script)]
    assert [accepted(words) for words in commands] == ["train", "train"]
    assert "--resume" in commands[1]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def _container(job: dict[str, Any]) -> dict[str, Any]:
    assert (job["kind"], job["spec"]["completionMode"]) == ("Job", "Indexed")
    container: dict[str, Any] = job["spec"]["template"]["spec"]["containers"][0]
    return container


def test_the_fields_of_the_slurm_script() -> None:
    fields = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", SLURM.read_text(), re.MULTILINE))
    assert len(fields) == SLURM.read_text().count("#SBATCH ")
    assert fields.keys() <= SBATCH
    # What lets a job go on: one task a node for torchrun, a signal to the script in time, and its
    # place in the queue.
    assert (fields["ntasks-per-node"], fields["open-mode"], fields["requeue"]) == (
        "1",
        "append",
        "",
    )
    assert re.fullmatch(r"B:TERM@\d+", fields["signal"])
    assert re.fullmatch(r"\d\d:\d\d:\d\d", fields["time"])


def fake(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """An environment with a Slurm of two nodes,
    and a torchrun that trains until SIGTERM and then saves.
    """
    (programs := tmp_path / "bin").mkdir()
    fake(programs, "srun", 'shift; exec "$@"')
    fake(
        programs,
        "scontrol",
        f'[ "$1" = show ] && printf "a1\\na2\\n" || echo "$@" >> {tmp_path}/requeued',
    )
    fake(
        programs,
        "torchrun",
        f"""echo "$@" >> {tmp_path}/started
trap 'touch {tmp_path}/run/last.state.pt; exit 1' TERM
[[ " $* " == *" --resume "* ]] && exit 0
sleep 60 & wait""",
    )
    (tmp_path / "run").mkdir()
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "a[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }
    return {"PATH": f"{programs}:{os.environ['PATH']}", **slurm}


def test_a_job_of_slurm_that_is_preempted_goes_on(tmp_path: Path, cluster: dict[str, str]) -> None:
    words = ["bash", str(SLURM), str(tmp_path / "run"), "dino-r50", "--data", "my data"]
    job = subprocess.Popen(words, env=cluster)
    while not (tmp_path / "started").exists():
        assert job.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)  # torchrun waits for its signal
    job.send_signal(signal.SIGTERM)
    assert job.wait() == 0
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert subprocess.run(words, env=cluster).returncode == 0
    first, second = (tmp_path / "started").read_text().splitlines()
    assert (
        "--nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint a1:29500 --rdzv-id 7"
        in first
    )
    assert first.endswith(f"-m detrellis train dino-r50 --data my data --out {tmp_path}/run")
    assert second.endswith(f"-m detrellis train --resume {tmp_path}/run")
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"  # a run that has finished is not


def test_a_job_of_slurm_that_fails_is_not_requeued(tmp_path: Path, cluster: dict[str, str]) -> None:
    fake(tmp_path / "bin", "torchrun", "exit 3")
    assert (
        subprocess.run(["bash", str(SLURM), str(tmp_path / "run"), "tiny"], env=cluster).returncode
        == 3
    )
    assert not (tmp_path / "requeued").exists()
