"""How a stage is started: one process, the DeepSpeed launcher, torchrun or srun; the exact command and environment.

What the launchers do (DeepSpeed 0.19.8, torch 2.13, two gloo ranks on CPU):
- DeepSpeed's passes the exit code of the first rank that fails; torchrun always exits 1 and prints a traceback.
- DeepSpeed's adds --local_rank=N to the words unless given --no_local_rank.
- With a hostfile DeepSpeed's launcher tries ssh even for one host; over pdsh it exports only variables that begin
  with PYTHON, NCCL and a few more, and joins all words to a line that a shell of the other host reads: `$5`, `(`, `%h`
  and quotes would not arrive.
"""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config.sections import LaunchSettings
from pipeline.errors import UserError
from pipeline.launch.machine import has_gpu

DISTRIBUTED = ("sft", "reward", "rl", "score", "generate", "evaluate")
OF_SLURM = ("launcher=", "launch.launcher=", "nnodes=", "launch.nnodes=", "dry_run=")
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on
PACKED = "packed:"
PORTS = range(20_000, 32_000)
NO_HOSTFILE = os.devnull  # no regular file, so that DeepSpeed reads no hosts, and not those of /job/hostfile either
ALONE = ["--hostfile", NO_HOSTFILE]


def command(settings: LaunchSettings, stage: str, words: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """The command that runs `stages/<stage>.py` with `words` on every rank. Raises UserError."""
    module = [f"stages.{stage}", *words]
    launcher = choose(settings, stage, environ)
    if launcher == "deepspeed":
        options = ["--no_local_rank", "--log_level", "error", "--master_port", str(_port(settings))]
        resources = _resources(settings)
        if resources[:2] != ALONE:  # a shell of each host reads what it is to run
            module = [module[0], packed(words)]
        return [sys.executable, "-m", "deepspeed.launcher.runner", *resources, *options, "--module", *module]
    if launcher == "torchrun":
        port = ["--standalone"] if settings.master_port is None else ["--master-port", str(_port(settings))]
        if settings.rdzv_endpoint is not None:
            port = ["--nnodes", str(settings.nnodes), "--rdzv-backend", "c10d", "--rdzv-id", f"tiffin-{stage}"]
            port += ["--rdzv-endpoint", settings.rdzv_endpoint]
        options = ["--nproc-per-node", str(settings.processes), *port]
        return [sys.executable, "-m", "torch.distributed.run", *options, "--module", *module]
    if launcher == "srun":
        return ["srun", "--kill-on-bad-exit=1", *_tasks(settings, environ), sys.executable, "-m", *module]
    return [sys.executable, "-m", *module]


def batch_file(settings: LaunchSettings, name: str, words: Sequence[Sequence[str]], shown: str) -> str:
    """A file for sbatch that runs these commands' words, saves before its time is up, and goes on when it is requeued.

    `shown` stands in it as comments.
    """
    gpus = f"{'' if has_gpu() else '#'}#SBATCH --gpus-per-node={settings.processes}"
    lines = ["#!/bin/bash", f"#SBATCH --job-name={re.sub(r'[^a-zA-Z0-9_.-]', '_', name)}"]
    lines.append(f"#SBATCH --nodes={settings.nnodes}")
    lines += [f"#SBATCH --ntasks-per-node={settings.processes}", gpus]
    lines += ["#SBATCH --requeue", "#SBATCH --open-mode=append"]
    lines += ["# so many seconds before its time is up each rank is told to save", "#SBATCH --signal=TERM@120", ""]
    lines += [f"cd {shlex.quote(os.getcwd())} || exit", ""]
    # behind the first command, where sbatch reads no more options, whatever a setting holds
    lines += [f"# {line}".rstrip() for line in shown.splitlines()]
    lines += ["", "code=0"]
    for one in words:
        kept = [word for word in one if not word.startswith(OF_SLURM)]
        lines.append(f'[ "$code" -eq 0 ] && {{ bash run.sh {shlex.join([*kept, "launcher=srun"])} || code=$?; }}')
    lines += [f'if [ "$code" -eq {PREEMPTED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi', 'exit "$code"']
    return "\n".join(lines)


def packed(words: Sequence[str]) -> str:
    """The words as one of letters, digits, - and _, which no shell and no launcher reads as anything else."""
    return PACKED + base64.urlsafe_b64encode(json.dumps(list(words)).encode()).decode().rstrip("=")


def unpacked(words: Sequence[str]) -> list[str]:
    """The words that were given to `packed`; all others as they are."""
    if len(words) != 1 or not words[0].startswith(PACKED):
        return list(words)
    text = words[0].removeprefix(PACKED)
    return json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))


def world(settings: LaunchSettings, stage: str, environ: Mapping[str, str]) -> int:
    """How many ranks `command` starts. Raises UserError as `command` does."""
    launcher = choose(settings, stage, environ)
    if launcher == "deepspeed" and settings.hostfile is not None:
        slots = hosts(Path(settings.hostfile))
        return len(slots) * settings.processes if settings.processes > 1 < len(slots) else sum(slots.values())
    if launcher == "srun" and settings.processes == 1:
        return int(environ.get("SLURM_NTASKS", "1"))
    nodes = int(environ.get("SLURM_NNODES", "1")) if launcher == "srun" else settings.nnodes
    return 1 if launcher == "single" else nodes * settings.processes


def choose(settings: LaunchSettings, stage: str, environ: Mapping[str, str]) -> str:
    """single | deepspeed | torchrun | srun: what `launch.launcher: auto` means here. Raises UserError."""
    if stage not in DISTRIBUTED or is_rank(environ):
        return "single"
    if settings.launcher == "single" and settings.processes > 1:
        raise UserError(f"launch.launcher: single, with gpus={settings.processes}; wanted gpus=1 or launcher=auto")
    if settings.hostfile and settings.launcher not in ("auto", "deepspeed"):
        raise UserError(f"launch.hostfile: only launcher=deepspeed reads it, found launcher={settings.launcher}")
    if settings.launcher in ("srun", "slurm") and "SLURM_JOB_ID" not in environ:
        problem = f"{settings.launcher} needs a Slurm allocation (sbatch or salloc); none is open here"
        raise UserError(f"launch.launcher: {problem}: launcher=slurm dry_run=true prints a file for sbatch")
    if settings.launcher == "slurm":
        return "srun"
    if settings.launcher != "auto":
        return settings.launcher
    many_tasks = int(environ.get("SLURM_NTASKS", "1")) > 1 or int(environ.get("SLURM_NNODES", "1")) > 1
    if "SLURM_JOB_ID" in environ and many_tasks and not settings.hostfile:
        return "srun"
    if settings.nnodes > 1:
        return "torchrun"
    return "deepspeed" if settings.hostfile or settings.processes > 1 else "single"


def is_here(settings: LaunchSettings, stage: str, environ: Mapping[str, str]) -> bool:
    """Whether the ranks run on this machine, for all that can be known. Raises UserError as `command` does."""
    return settings.hostfile is None and choose(settings, stage, environ) != "srun"


def is_rank(environ: Mapping[str, str]) -> bool:
    """Whether someone's launcher (torchrun, mpirun with RANK, srun with several tasks) already started this process."""
    return {"RANK", "WORLD_SIZE"} <= set(environ) or int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def environment(settings: LaunchSettings, stage: str, environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` with what the ranks need; what is already set is kept."""
    launcher = choose(settings, stage, environ)
    processes = 1 if launcher == "single" else settings.processes
    added = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // processes))}
    if is_here(settings, stage, environ) and not has_gpu():
        added["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed warns that it found no GPU
    return {**added, **environ}


def rank_environment(settings: LaunchSettings, environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of a Slurm task; nothing where they are set."""
    if "RANK" in environ or int(environ.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return {}
    port = settings.master_port or 20000 + int(environ["SLURM_JOB_ID"]) % 20000  # the same on every node
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "MASTER_ADDR": first_host(environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(port),
    }


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: 'gpu[03-07,9],login1' -> 'gpu03'."""
    first = re.sub(r"\[([0-9]+)[^]]*\]", r"\1", nodes)
    return first.split(",")[0]


def hosts(path: Path) -> dict[str, int]:
    """Host -> slots from lines 'host slots=8'. Raises UserError with file and line."""
    if not path.is_file():
        raise UserError(f"launch.hostfile: {path} is not a file; wanted lines 'host slots=8'")
    slots_of: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        text = line.split("#")[0].strip()
        match = re.fullmatch(r"(\S+)\s+slots=([1-9][0-9]*)", text)
        if text and not match:
            raise UserError(f"{path}:{number}: {text!r}, wanted 'host slots=8'")
        if match and match[1] in slots_of:
            raise UserError(f"{path}:{number}: host {match[1]} is given twice")
        if match:
            slots_of[match[1]] = int(match[2])
    if not slots_of:
        raise UserError(f"{path}: no host in it, wanted lines 'host slots=8'")
    return slots_of


def _resources(settings: LaunchSettings) -> list[str]:
    """DeepSpeed's options for the ranks: of this machine, or of a hostfile with several."""
    if settings.hostfile is None:
        return [*ALONE, "--num_gpus", str(settings.processes)]
    listed = hosts(Path(settings.hostfile))
    if len(listed) == 1 and next(iter(listed)) in ("localhost", "127.0.0.1", socket.gethostname()):
        return [*ALONE, "--num_gpus", str(next(iter(listed.values())))]
    if not shutil.which("pdsh"):
        raise UserError("launch.hostfile: several machines need the program pdsh, not found; install it, or use Slurm")
    per_host = ["--num_gpus", str(settings.processes)] if settings.processes > 1 else []
    alone = ["--force_multi"] if len(listed) == 1 else []  # else DeepSpeed starts the ranks of one host here
    return ["--hostfile", settings.hostfile, *alone, *per_host]


def _tasks(settings: LaunchSettings, environ: Mapping[str, str]) -> list[str]:
    """srun takes the allocation's tasks; `processes` above 1 are tasks per node."""
    if settings.processes == 1:
        return []
    nodes = int(environ.get("SLURM_NNODES", "1"))
    return [f"--ntasks={nodes * settings.processes}", f"--ntasks-per-node={settings.processes}"]


def _port(settings: LaunchSettings) -> int:
    """The port of rank 0: the one set, else one that is free now."""
    if settings.master_port is not None:
        _refuse_taken(settings)
        return settings.master_port
    return free_port()


def free_port() -> int:
    """A port that nobody listens on, from below those that systems hand out to outgoing connections.

    It is bound by another process a moment later: one of the system's own choice could be gone by then.
    """
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:  # somebody's
                continue
            return port
    raise UserError(f"launch.master_port: no port from {PORTS[0]} to {PORTS[-1]} is free, wanted one: give another")


def _refuse_taken(settings: LaunchSettings) -> None:
    """Raises UserError where another process listens on the port; other machines of a hostfile are not checked."""
    if settings.hostfile is not None:
        return
    with socket.socket() as wanted:
        wanted.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            wanted.bind(("", settings.master_port))
        except OSError as error:
            found = f"{settings.master_port} cannot be had ({error.strerror})"
            raise UserError(f"launch.master_port: {found}, wanted a free port: leave it out for one") from None
