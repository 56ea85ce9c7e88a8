"""A real Slurm of two nodes on this machine: what a dry run prints is submitted, told to save, and requeued.

Needs root, Slurm's daemons and munge; ends all of them, and /etc/hosts is as it was.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from pipeline.launch.launcher import free_port
from tests.test_two_hosts import ROOT, weights

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "squeue", "sinfo")
NODES = ("tiffin-n1", "tiffin-n2")
HOSTS = Path("/etc/hosts")
TINY = ["data.task=numerals", "data.task_size=200", "batch_size=4", "zero=zero3", "eval.max_rows=4", "save_steps=null"]
TINY += ["eval.generate=false", "model.scratch.hidden_size=32", "model.scratch.num_heads=2", "max_steps=40"]

missing = [name for name in TOOLS if shutil.which(name) is None] + (["root"] if os.geteuid() != 0 else [])
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"a Slurm of one machine wants {', '.join(missing)}"),
    pytest.mark.usefixtures("whole_machine"),
]


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """The daemons, until the end; the environment in which commands are given. Requeued jobs wait for 7 s."""
    config = f"ClusterName=t\nSlurmctldHost={socket.gethostname()}\nSlurmctldPort={free_port()}\nSlurmUser=root\n"
    config += f"SlurmdUser=root\nAuthType=auth/munge\nAuthInfo=socket={folder / 'munge.socket'},cred_expire=6\n"
    config += f"StateSaveLocation={folder}\nSlurmdSpoolDir={folder}/spool-%n\nSlurmctldPidFile={folder}/ctld.pid\n"
    config += f"SlurmdPidFile={folder}/%n.pid\nSlurmctldLogFile={folder}/ctld.log\nSlurmdLogFile={folder}/%n.log\n"
    config += "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nMpiDefault=none\nReturnToService=2\n"
    config += "SelectType=select/cons_tres\nSelectTypeParameters=CR_CPU\nSlurmdParameters=config_overrides\n"
    config += "SchedulerParameters=requeue_delay=1,sched_interval=1\n"
    for name in NODES:
        config += f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={free_port()} CPUs=1\n"
    config += "PartitionName=p Nodes=ALL Default=YES State=UP\n"
    (folder / "slurm.conf").write_text(config)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    environ = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    before = HOSTS.read_bytes()
    with ExitStack() as stack:
        stack.callback(os.truncate, HOSTS, len(before))  # it is whole at any time: others read it meanwhile
        with HOSTS.open("ab") as file:
            file.write(f"\n127.0.0.1 {' '.join(NODES)}\n".encode())
        files = [f"--{kind}={folder / name}" for kind, name in (("key-file", "munge.key"), ("socket", "munge.socket"))]
        files += [f"--{kind}={folder / name}" for kind, name in (("pid-file", "munge.pid"), ("log-file", "munge.log"))]
        files.append(f"--seed-file={folder / 'munge.seed'}")
        daemons = [["munged", "--foreground", "--force", *files], ["slurmctld", "-D"]]
        daemons += [["slurmd", "-D", "-N", name] for name in NODES]
        for argv in daemons:
            began = subprocess.Popen(argv, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            stack.callback(end, began)
        try:
            until(lambda: said(environ, "sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"], 60)
        except AssertionError:
            pytest.skip("no Slurm of two nodes comes up here")
        try:
            yield environ
        finally:  # or its ranks would outlive the daemons
            said(environ, "scancel", "--user=root")
            until(lambda: not said(environ, "squeue", "-h").strip(), 60)


def end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.send_signal(signal.SIGTERM)
    try:
        daemon.wait(15)
    except subprocess.TimeoutExpired:
        daemon.kill()


def said(environ: dict[str, str], *argv: str) -> str:
    return subprocess.run(argv, env=environ, capture_output=True, text=True, check=False).stdout


def until(true: Callable[[], bool], seconds: float) -> None:
    last = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < last, f"not after {seconds} s"
        time.sleep(0.2)


def test_a_job_is_told_to_save_is_requeued_and_goes_on(tmp_path: Path) -> None:
    runs, log = tmp_path / "runs", tmp_path / "log"
    # of a short name: sockets in it may have no more than some hundred letters
    with TemporaryDirectory() as folder, slurm(Path(folder)) as environ:
        words = ["stage=sft", *TINY, f"runs_dir={runs}", "launcher=slurm", "nnodes=2", "dry_run=true"]
        file = said(environ, sys.executable, "-m", "stages", *words)
        (tmp_path / "job.sh").write_text(file.replace("bash run.sh", f"{sys.executable} -m stages"))
        job = said(environ, "sbatch", "--parsable", f"--output={log}", str(tmp_path / "job.sh")).strip()
        logged = runs / "default/sft/metrics.jsonl"
        until(lambda: logged.is_file() and '"step": 10' in logged.read_text(), 180)
        said(environ, "scancel", "--signal=TERM", job)
        state = lambda: said(environ, "squeue", "-h", "-o", "%T")  # noqa: E731
        until(lambda: state().strip() == "PENDING", 60)
        assert "is saved" in log.read_text()
        assert (runs / "default/sft/checkpoints/latest").is_file()
        until((runs / "default/sft/results.json").is_file, 180)
        until(lambda: not state().strip(), 60)
    assert "goes on from step" in log.read_text()
    alone = [sys.executable, "-m", "stages", "stage=sft", *TINY, f"runs_dir={tmp_path / 'one'}", "gpus=2"]
    subprocess.run(alone, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    assert weights(runs / "default/sft") == weights(tmp_path / "one/default/sft")
