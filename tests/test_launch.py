"""The exact commands, and what really happens to ranks, exit codes and signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.config.resolve import resolve_steps
from pipeline.config.sections import LaunchSettings
from pipeline.config.yaml_layers import ROOT
from pipeline.errors import UserError
from pipeline.launch import launcher
from pipeline.launch.launcher import command, environment, first_host, hosts, rank_environment
from pipeline.launch.processes import run
from stages import STARTING
from stages.__main__ import main
from stages.faults import of_launch

PYTHON = sys.executable
DEEPSPEED = [PYTHON, "-m", "deepspeed.launcher.runner"]
ALONE = [*DEEPSPEED, "--hostfile", "/dev/null"]  # else it reads /job/hostfile where there is one
OPTIONS = ["--no_local_rank", "--log_level", "error", "--master_port", "29999", "--module", "stages.sft", "lr=1"]
TORCHRUN = [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node"]
ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}
STEP = {
    "SLURM_JOB_ID": "20007",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}


def settings(**given: object) -> LaunchSettings:
    defaults = {"processes": 1, "hostfile": None, "launcher": "auto", "master_port": None, "ddp_timeout": 60}
    defaults |= {"nnodes": 1, "rdzv_endpoint": None}
    return LaunchSettings(**{**defaults, **given})


@pytest.mark.parametrize(
    ("given", "environ", "argv"),
    [
        ({}, {}, [PYTHON, "-m", "stages.sft", "lr=1"]),
        ({"processes": 2, "master_port": 29999}, {}, [*ALONE, "--num_gpus", "2", *OPTIONS]),
        (
            {"processes": 2, "launcher": "torchrun"},
            {},
            [*TORCHRUN, "2", "--standalone", "--module", "stages.sft", "lr=1"],
        ),
        (
            {"processes": 2, "launcher": "torchrun", "master_port": 29999},
            {},
            [*TORCHRUN, "2", "--master-port", "29999", "--module", "stages.sft", "lr=1"],
        ),
        ({}, ALLOCATION, ["srun", "--kill-on-bad-exit=1", PYTHON, "-m", "stages.sft", "lr=1"]),
        (
            {"processes": 8},  # per node; 2 nodes x 8 = 16
            ALLOCATION,
            ["srun", "--kill-on-bad-exit=1", "--ntasks=16", "--ntasks-per-node=8", PYTHON, "-m", "stages.sft", "lr=1"],
        ),
        ({}, {**ALLOCATION, **STEP}, [PYTHON, "-m", "stages.sft", "lr=1"]),  # already one of srun's tasks
        ({"processes": 8}, {"RANK": "0", "WORLD_SIZE": "8"}, [PYTHON, "-m", "stages.sft", "lr=1"]),  # torchrun's
        ({}, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}, [PYTHON, "-m", "stages.sft", "lr=1"]),
    ],
)
def test_command(given: dict, environ: dict, argv: list[str]):
    assert command(settings(**given), "sft", ["lr=1"], environ) == argv


def test_stages_that_do_not_share_their_work_are_one_process():
    assert command(settings(processes=8), "report", [], {}) == [PYTHON, "-m", "stages.report"]


def test_hostfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "hosts"
    file.write_text("# two machines\na slots=4\n\nb slots=2  # older\n")
    assert hosts(file) == {"a": 4, "b": 2}
    (tmp_path / "pdsh").write_text("#!/bin/sh\n")
    (tmp_path / "pdsh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    argv = command(settings(hostfile=str(file), master_port=29999), "sft", ["lr=1"], {})
    assert argv == [*DEEPSPEED, "--hostfile", str(file), *OPTIONS[:-1], launcher.packed(["lr=1"])]
    file.write_text("localhost slots=3\n")  # no ssh for this machine alone
    argv = command(settings(hostfile=str(file), master_port=29999), "sft", ["lr=1"], {})
    assert argv == [*ALONE, "--num_gpus", "3", *OPTIONS]


def test_a_file_for_sbatch_is_what_a_dry_run_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """A shell reads it; told to save, it asks for another turn, and other codes are its own."""
    words = ["stage=sft", "task=numerals", "run=mine", "gpus=2", "nnodes=4", "launcher=slurm"]
    words += ["template.prompt=It's $5: {prompt}", 'template.human="\n#SBATCH --nodes=64\n"', "dry_run=true"]
    # which the file's allocation will have: the command itself sees them in its plan
    for name in {"SLURM_JOB_ID", "SLURM_NNODES", "SLURM_NTASKS", *(one for one in os.environ if "SLURM" in one)}:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0
    made = capsys.readouterr()
    assert "fault" not in made.err and "over 8 processes" in made.out
    options, _, rest = made.out.partition("\ncd ")
    assert "--nodes=64" in rest and "--nodes=64" not in options
    assert "#SBATCH --nodes=4\n#SBATCH --ntasks-per-node=2\n" in made.out
    called = '#!/bin/sh\necho "$0 $@" >> called\n'
    for name in ("bash", "scontrol"):
        (tmp_path / name).write_text(called + ("exit $CODE\n" if name == "bash" else ""))
        (tmp_path / name).chmod(0o755)
    for code, more in ((75, [f"{tmp_path}/scontrol requeue 7"]), (2, []), (0, [])):
        environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": str(code), "SLURM_JOB_ID": "7"}
        ran = subprocess.run(["/bin/bash", "-c", made.out], cwd="/", env=environ, check=False)
        assert ran.returncode == code
        begun = f"{tmp_path}/bash run.sh stage=sft task=numerals run=mine gpus=2 template.prompt=It's $5: {{prompt}}"
        begun += ' template.human="\n#SBATCH --nodes=64\n" launcher=srun'
        assert (tmp_path / "called").read_text() == "\n".join([begun, *more, ""])
        (tmp_path / "called").unlink()


def test_words_pass_a_shell_unharmed():
    """Whatever they hold: over pdsh they are joined to a line that a shell of the other host reads."""
    words = [
        "template.prompt=It costs $5 ($(date) `id`) & more; %h %n",
        "a='b\"c' d",
        'x={"k": [1, "é\n\u2028"]}',
        "",
        "k=",
    ]
    code = "import json, sys; from pipeline.launch.launcher import unpacked; print(json.dumps(unpacked(sys.argv[1:])))"
    line = " ".join([PYTHON, "-c", f"'{code}'", launcher.packed(words)])
    root = Path(__file__).resolve().parents[1]
    read = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True, cwd=root)
    assert json.loads(read.stdout) == words
    assert launcher.unpacked(["run=a", "lr=1"]) == ["run=a", "lr=1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a 4\n", ":1: 'a 4', wanted 'host slots=8'"),
        ("a slots=4\na slots=4\n", ":2: host a is given twice"),
        ("# none\n", "no host in it"),
    ],
)
def test_bad_hostfiles(tmp_path: Path, text: str, message: str):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=message):
        hosts(tmp_path / "hosts")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"launcher": "single", "processes": 2}, "single, with gpus=2; wanted gpus=1"),
        ({"launcher": "srun"}, "needs a Slurm allocation"),
        ({"launcher": "torchrun", "hostfile": "hosts"}, "only launcher=deepspeed reads it"),
        ({"hostfile": "nowhere"}, "nowhere is not a file"),
    ],
)
def test_contradictions(given: dict, message: str):
    with pytest.raises(UserError, match=message):
        command(settings(**given), "sft", [], {})


def test_environment_keeps_what_is_set_and_shares_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert environment(settings(processes=3), "sft", {})["OMP_NUM_THREADS"] == "2"  # 8 // 3
    assert environment(settings(processes=16), "sft", {})["OMP_NUM_THREADS"] == "1"
    assert environment(settings(processes=3), "report", {})["OMP_NUM_THREADS"] == "8"
    assert environment(settings(), "sft", {"OMP_NUM_THREADS": "5", "HOME": "/h"})["OMP_NUM_THREADS"] == "5"


def test_what_this_machine_has_binds_no_ranks_elsewhere(monkeypatch: pytest.MonkeyPatch):
    """A login node without a GPU starts them on machines that have some."""
    monkeypatch.setattr(launcher, "has_gpu", lambda: False)
    slurm = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}
    assert environment(settings(), "sft", {})["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in environment(settings(), "sft", slurm)
    assert environment(settings(), "report", slurm)["DS_ACCELERATOR"] == "cpu"
    (step,) = resolve_steps(["stage=generate", "splits=[test]", "train.precision=fp16"])
    assert [*of_launch(step.settings, "generate", slurm)] == []


def test_slurm_tasks_become_ranks():
    assert rank_environment(settings(), STEP) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "20007",  # 20000 + 20007 % 20000
    }
    assert rank_environment(settings(), {}) == {}
    assert rank_environment(settings(), {**STEP, "RANK": "0"}) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu03", "gpu03"), ("gpu[03-07,9],login1", "gpu03"), ("a1,a2", "a1"), ("n[9,11]-ib", "n9-ib")],
)
def test_first_host(nodes: str, first: str):
    assert first_host(nodes) == first


def _stage(folder: Path, code: str) -> None:
    """A package `stages` of our own with one stage, sft."""
    (folder / "stages").mkdir()
    (folder / "stages/__init__.py").touch()
    (folder / "stages/sft.py").write_text(code)


RANKS = """
import sys
import torch
import torch.distributed as dist
from pipeline.launch.entry import leave

dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
assert (total.item(), sys.argv[1:]) == (3.0, ["reward={a: 1.0, b/c.py: 0.2}"])  # 1 + 2; words arrive whole
rank = dist.get_rank()
dist.destroy_process_group()  # as the engine does at the end; a live one may abort a rank that exits
leave(lambda: 7 if rank == 1 else 0)
"""


@pytest.mark.parametrize(("launcher", "code"), [("deepspeed", 7), ("torchrun", 1)])
def test_two_real_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str, code: int):
    _stage(tmp_path, RANKS)
    monkeypatch.chdir(tmp_path)  # python -m looks there first
    chosen = settings(processes=2, launcher=launcher)
    env = {**environment(chosen, "sft", os.environ), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    argv = command(chosen, "sft", ["reward={a: 1.0, b/c.py: 0.2}"], env)
    assert run(argv, env) == code


def test_a_start_compiles_nothing_and_says_nothing(tmp_path: Path):
    code = "from pipeline.trainer import group; assert group.start(60).world == 1"
    places = {"PYTHONPATH": str(ROOT), "TORCH_EXTENSIONS_DIR": str(tmp_path), "PATH": "/nowhere"}
    done = subprocess.run([PYTHON, "-c", code], env=places, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


WAITS = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(75))
pathlib.Path("ready").touch()
time.sleep(30)
"""
FORWARDS = "import os, sys; from pipeline.launch.processes import run; sys.exit(run(sys.argv[1:], os.environ))"
OUTER = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"  # a launcher which knows no signals


@pytest.mark.parametrize("outer", [[], [PYTHON, "-c", OUTER]])
def test_sigterm_reaches_the_rank_and_its_exit_code_comes_back(tmp_path: Path, outer: list[str]):
    _stage(tmp_path, WAITS)
    root = str(ROOT)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{root}"}
    process = subprocess.Popen(
        [PYTHON, "-c", FORWARDS, *outer, PYTHON, "-m", "stages.sft"], env=env, cwd=tmp_path, stdin=subprocess.DEVNULL
    )
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75


def test_a_killed_child_is_128_and_the_signal():
    assert run([PYTHON, "-c", "import os; os.kill(os.getpid(), 9)"], os.environ) == 137


# Ctrl-C

INTERRUPTED = """
import os, pathlib, signal, time
from pipeline.launch import stopping
signal.signal(signal.SIGINT, lambda number, frame: stopping.leave("the rank says it"))
pathlib.Path("ready" + os.environ.get("RANK", "0")).touch()
time.sleep(60)
"""
COMMAND = """
import os, sys
from pipeline.launch.processes import run
sys.exit(run(sys.argv[1:], os.environ, lambda: print("the command says it", file=sys.stderr)))
"""


def _interrupted(folder: Path, argv: list[str], env: dict, ready: Callable[[subprocess.Popen], bool]) -> str:
    """What a command printed that was interrupted once `ready`; it ended with 130 and left nothing running."""
    words = [PYTHON, "-c", COMMAND, *argv]
    process = subprocess.Popen(
        words, env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=-1, stderr=-1, text=True, start_new_session=True
    )
    limit = time.monotonic() + 120
    while not ready(process):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert not psutil.wait_procs(family, timeout=10)[1]
    return out + err


@pytest.mark.parametrize("launcher", ["single", "deepspeed", "torchrun"])
def test_ctrl_c_is_told_once_and_by_a_rank(tmp_path: Path, launcher: str):
    """A launcher between says nothing of its own; they would print the end of a rank, torchrun with a traceback."""
    _stage(tmp_path, INTERRUPTED)
    shutil.copy(ROOT / "stages" / "__init__.py", tmp_path / "stages")
    count = 1 if launcher == "single" else 2
    chosen = settings(processes=count, launcher=launcher)
    env = {**environment(chosen, "sft", os.environ), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    started = [tmp_path / f"ready{rank}" for rank in range(count)]
    told = _interrupted(tmp_path, command(chosen, "sft", [], env), env, lambda _: all(one.exists() for one in started))
    assert told == "tiffin: the rank says it\n"


@pytest.mark.parametrize("launcher", ["single", "deepspeed"])
def test_ctrl_c_before_there_is_a_rank_that_can_speak(tmp_path: Path, launcher: str):
    """While torch is imported the command speaks; a rank, or a launcher that starts some, dies without a word."""
    _stage(tmp_path, "import time\ntime.sleep(60)")
    shutil.copy(ROOT / "stages" / "__init__.py", tmp_path / "stages")
    chosen = settings(processes=1 if launcher == "single" else 2, launcher=launcher)
    env = {**environment(chosen, "sft", os.environ), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    begun = lambda process: bool(psutil.Process(process.pid).children())  # noqa: E731
    assert _interrupted(tmp_path, command(chosen, "sft", [], env), env, begun) == "the command says it\n"


def test_ctrl_c_while_the_command_itself_is_starting(tmp_path: Path):
    (tmp_path / "pydantic.py").write_text("import time\nopen('ready', 'w').close()\ntime.sleep(60)")  # a slow import
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    process = subprocess.Popen([PYTHON, "-m", "stages"], env=env, cwd=tmp_path, stdout=-1, stderr=-1, text=True)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", STARTING.decode())
