"""One process at a time in a directory; whoever holds it, its death frees it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import locks
from pipeline.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from pipeline import locks
{how}
"""
CLAIM = "locks.claim(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
WAIT = "with locks.waiting(Path(sys.argv[1])): print('held', flush=True); time.sleep(0.3)"


def holder(directory: Path, how: str) -> subprocess.Popen:
    words = [sys.executable, "-c", HOLDER.format(how=how), str(directory)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    first = holder(tmp_path, CLAIM)
    with pytest.raises(UserError, match="another process is at work there, wanted one at a time: wait for it") as error:
        locks.claim(tmp_path)
    assert str(error.value).startswith(str(tmp_path))
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    locks.claim(tmp_path)
    locks.claim(tmp_path)  # what one holds one may claim again


def test_waiting_for_the_lock(tmp_path: Path) -> None:
    first = holder(tmp_path, WAIT)
    began = time.monotonic()
    with locks.waiting(tmp_path):
        assert time.monotonic() - began > 0.1
    first.communicate()
    with locks.waiting(tmp_path):  # free again
        pass
