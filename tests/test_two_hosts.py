"""Two hosts on one machine: network namespaces with an sshd each, and DeepSpeed's launcher over pdsh between them.

Needs root, ip, sshd and pdsh; nothing of the user's ssh is read or written.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("ip", "ssh", "ssh-keygen", "pdsh")
SSHD = "/usr/sbin/sshd"
TINY = ["data.task=numerals", "data.task_size=60", "batch_size=4", "zero=zero3", "eval.max_rows=4", "save_steps=null"]
TINY += ["eval.generate=false", "model.scratch.hidden_size=32", "model.scratch.num_heads=2", "max_steps=60"]
ODD = 'It costs $5 ($(date)) `id`; 100% "{prompt}"'  # a shell would read it otherwise
TINY += ["logging_steps=1", f"template.prompt={ODD}"]

NUMBERS = count(os.getpid())  # of pairs of namespaces

missing = [name for name in TOOLS if shutil.which(name) is None] + ([] if Path(SSHD).is_file() else [SSHD])
if os.geteuid() != 0:
    missing.append("root")
if not missing:  # root within a container may not make them
    probe = f"tiffin-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode:
        missing.append("network namespaces")
    else:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"two hosts in namespaces want {', '.join(missing)}"),
    pytest.mark.usefixtures("whole_machine"),
]


class Hosts(NamedTuple):
    """Both namespaces, the first of which the command is given in."""

    names: tuple[str, str]
    addresses: tuple[str, str]
    folder: Path

    def environment(self) -> dict[str, str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(self, *words: str) -> subprocess.Popen[str]:
        argv = ["ip", "netns", "exec", self.names[0], sys.executable, "-m", "stages", *words]
        argv += [f"hostfile={self.folder / 'hosts'}"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(argv, cwd=ROOT, env=self.environment(), start_new_session=True, **pipes)

    def run(self, *words: str) -> str:
        process = self.start(*words)
        said = process.communicate(timeout=240)[0]
        assert process.returncode == 0, said[-3000:]
        return said

    def ranks(self, host: int) -> list[int]:
        """The processes of a stage on a host."""
        listed = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True, check=True)
        return [int(pid) for pid in listed.stdout.split() if is_rank(Path("/proc") / pid / "cmdline")]


def is_rank(command: Path) -> bool:
    try:
        words = command.read_bytes().split(b"\0")
    except OSError:
        return False
    return words[1:3] == [b"-u", b"-m"] and words[3].startswith(b"stages.")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What TINY leaves on one host."""
    folder = tmp_path_factory.mktemp("alone")
    argv = [sys.executable, "-m", "stages", "stage=sft", *TINY, f"runs_dir={folder}", "gpus=2"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(argv, cwd=ROOT, env=environ, check=True, capture_output=True, timeout=240)
    return weights(folder / "default/sft")


@contextmanager
def two_hosts(folder: Path, blind_to: Path | None = None) -> Iterator[Hosts]:
    """Both, until the end; `blind_to`: a folder in whose place the second sees an empty one of its own."""
    number = next(NUMBERS)
    net, tag = f"10.99.{number % 250}", number % 100_000
    names, addresses = tuple(f"tiffin-{tag}-{one}" for one in "ab"), (f"{net}.1", f"{net}.2")
    with ExitStack() as stack:
        for name in names:
            call("ip", "netns", "add", name)
            stack.callback(call, "ip", "netns", "del", name)
            call("ip", "-n", name, "link", "set", "lo", "up")
        ends = [f"tf{tag}{one}" for one in "ab"]
        call("ip", "link", "add", ends[0], "netns", names[0], "type", "veth", "peer", ends[1], "netns", names[1])
        for name, link, address in zip(names, ends, addresses, strict=True):
            call("ip", "-n", name, "addr", "add", f"{address}/24", "dev", link)
            call("ip", "-n", name, "link", "set", link, "up")
            etc = Path("/etc/netns") / name  # what the namespace reads as /etc/hosts
            etc.mkdir(parents=True)
            stack.callback(shutil.rmtree, etc)
            both = "".join(f"{one} {other}\n" for one, other in zip(addresses, names, strict=True))
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{both}{address} {socket.gethostname()}\n")
        write_ssh(folder)
        (folder / "hosts").write_text("".join(f"{address} slots=1\n" for address in addresses))
        for place, name in enumerate(names):
            hidden = f"mount -t tmpfs none {blind_to} && " if place == 1 and blind_to is not None else ""
            served = f"{hidden}exec {SSHD} -D -f {folder / 'sshd_config'}"
            # it sees its own processes only, all of which end with it
            own = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
            daemon = subprocess.Popen(["ip", "netns", "exec", name, *own, "sh", "-c", served])
            stack.callback(end, daemon)
        both = Hosts(names, addresses, folder)
        wait_for(both)
        yield both


def write_ssh(folder: Path) -> None:
    """Keys, what the daemons read, and an `ssh` that reads no file of the user's."""
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("key", "host_key"):
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name))
    (folder / "sshd_config").write_text(
        f"HostKey {folder / 'host_key'}\nAuthorizedKeysFile {folder / 'key.pub'}\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nPermitRootLogin yes\nPidFile none\n"
    )
    (folder / "ssh_config").write_text(
        f"Host *\n IdentityFile {folder / 'key'}\n StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n"
        " LogLevel ERROR\n"
    )
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder / "ssh_config"} "$@"\n')
    (folder / "bin" / "ssh").chmod(0o755)


def wait_for(hosts: Hosts) -> None:
    """Until both daemons answer."""
    for address in hosts.addresses:
        for _ in range(100):
            asked = ["ip", "netns", "exec", hosts.names[0], str(hosts.folder / "bin" / "ssh"), address, "true"]
            if subprocess.run(asked, capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.1)
        else:
            pytest.skip(f"no sshd comes up at {address}")


def end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.kill()  # unshare heeds no SIGTERM
    daemon.wait(10)


def call(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)


def weights(stage: Path) -> str:
    """sha256 of what a stage left."""
    return hashlib.sha256((stage / "model" / "model.safetensors").read_bytes()).hexdigest()


class Ended(NamedTuple):
    code: int
    said: str

    def told(self) -> list[str]:
        """The lines that are no results."""
        return re.findall("^.*tiffin: .*$", self.said, re.MULTILINE)


def stopped(hosts: Hosts, words: list[str], logged: Path, stop: Callable[[subprocess.Popen[str]], None]) -> Ended:
    """A start in which `stop` was called after two steps; nothing stays behind on either host."""
    rows = lambda: len(logged.read_text().splitlines()) if logged.is_file() else 0  # noqa: E731
    before, process = rows(), hosts.start(*words)
    while rows() < before + 3 and process.poll() is None:
        time.sleep(0.02)
    stop(process)
    said = process.communicate(timeout=60)[0]
    assert not hosts.ranks(0) and not hosts.ranks(1), said[-3000:]
    return Ended(process.returncode, said)


def test_what_is_stopped_and_killed_goes_on_and_ends_as_on_one_host(hosts: Hosts, alone: str, tmp_path: Path) -> None:
    """SIGTERM to the command, the death of a rank on the other host, Ctrl-C to the command's whole process group."""
    words, stage = ["stage=sft", *TINY, f"runs_dir={tmp_path / 'two'}"], tmp_path / "two/default/sft"
    start = partial(stopped, hosts, words, stage / "metrics.jsonl")
    saved = start(lambda process: process.terminate())
    assert saved.code == 75, saved.said[-3000:]
    assert len(saved.told()) == 2 and all("stopped by SIGTERM after step" in line for line in saved.told())  # per host
    killed = start(lambda process: os.kill(hosts.ranks(1)[0], signal.SIGKILL))
    assert killed.code not in (0, 2) and "Traceback" not in killed.said, killed.said[-3000:]
    interrupted = start(lambda process: os.killpg(process.pid, signal.SIGINT))
    (line,) = interrupted.told()
    assert interrupted.code == 130 and "is saved; the same command goes on from there" in line
    assert "It costs $5 ($(date)) `id`; 100% " in hosts.run(*words)
    assert weights(stage) == alone


def test_torchrun_meets_on_two_hosts(hosts: Hosts, alone: str, tmp_path: Path) -> None:
    """The same command on both; the bytes are those of one host."""
    words = ["-m", "stages", "stage=sft", *TINY, "launcher=torchrun", "nnodes=2"]
    words += [f"rdzv_endpoint={hosts.addresses[0]}:29577", f"runs_dir={tmp_path / 'two'}"]
    # torchrun's hosts call each other by their names: these have names of their own
    named = ["unshare", "--uts", "sh", "-c", 'hostname "$1" && shift && exec "$@"', "sh"]
    argv = [["ip", "netns", "exec", name, *named, name, sys.executable, *words] for name in hosts.names]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(one, cwd=ROOT, env=hosts.environment(), **pipes) for one in argv]
    said = [one.communicate(timeout=240)[0] for one in started]
    assert [one.returncode for one in started] == [0, 0], said[0][-2000:] + said[1][-2000:]
    assert weights(tmp_path / "two/default/sft") == alone


def test_a_host_that_does_not_see_the_run_says_so(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    (tmp_path / "ssh").mkdir()
    with two_hosts(tmp_path / "ssh", blind_to=runs) as hosts:
        process = hosts.start("stage=sft", *TINY, f"runs_dir={runs}")
        said = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "does not see what rank 0 writes" in said and "Traceback" not in said
