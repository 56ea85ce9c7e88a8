"""One process at a time in a directory; whoever holds it, its death frees it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.launch import run_dir

HOLDER = """
import sys, time
from pathlib import Path
from pipeline.launch import run_dir
{how}
"""
CLAIM = "run_dir.claim(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
WAIT = "with run_dir.waiting(Path(sys.argv[1])): print('held', flush=True); time.sleep(0.3)"


def holder(directory: Path, how: str) -> subprocess.Popen:
    words = [sys.executable, "-c", HOLDER.format(how=how), str(directory)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    first = holder(tmp_path, CLAIM)
    with pytest.raises(UserError, match="another process is at work there, wanted one at a time: wait for it") as error:
        run_dir.claim(tmp_path)
    assert str(error.value).startswith(str(tmp_path))
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    run_dir.claim(tmp_path)
    run_dir.claim(tmp_path)  # what one holds one may claim again


def test_waiting_for_the_lock(tmp_path: Path) -> None:
    first = holder(tmp_path, WAIT)
    began = time.monotonic()
    with run_dir.waiting(tmp_path):
        assert time.monotonic() - began > 0.1
    first.communicate()
    with run_dir.waiting(tmp_path):  # free again
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_of(tmp_path: Path, capsys, monkeypatch, number: int) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    run_dir.claim(tmp_path)
    with run_dir.waiting(tmp_path):
        pass
    said = f"{tmp_path / '.lock'}: this file system has no locks: start one process at a time\n"
    assert capsys.readouterr().err == f"tiffin: {said}" * 2
