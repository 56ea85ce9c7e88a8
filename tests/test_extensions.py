"""DeepSpeed's operators, compiled in turn: locks that killed processes left are found, live ones are waited for."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from deepspeed.ops.op_builder.builder import OpBuilder

from pipeline.config.yaml_layers import ROOT
from pipeline.errors import UserError
from pipeline.launch import entry, extensions
from pipeline.trainer import group

pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
SOURCE = """
#include <Python.h>
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "NAME"};
PyMODINIT_FUNC PyInit_NAME(void) { return PyModule_Create(&module); }
"""
LOAD = "import sys; from tests import test_extensions; test_extensions.load(*sys.argv[1:])"
SECONDS = 120


class TinyBuilder(OpBuilder):
    """An operator of one line, which DeepSpeed, torch and ninja build as they build the large ones."""

    def __init__(self, source: Path) -> None:
        super().__init__(name=source.stem)
        self.source = source

    def absolute_name(self) -> str:
        return self.name

    @property
    def folder(self) -> Path:
        return extensions.directory(os.environ) / self.name

    def sources(self) -> list[str]:
        return [str(self.source)]

    def include_paths(self) -> list[str]:
        return [sysconfig.get_path("include")]

    def cxx_args(self) -> list[str]:
        return ["-O0"]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyBuilder:
    """Of an environment of its own, in which nothing was compiled."""
    monkeypatch.delenv(extensions.PLACE, raising=False)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(OpBuilder, "jit_load", group.compile_in_turn)
    entry.set_up_logging()
    source = tmp_path / f"tiny_{tmp_path.stat().st_ino}.cpp"  # torch knows by name what a process has loaded
    source.write_text(SOURCE.replace("NAME", source.stem))
    return TinyBuilder(source)


def another(tiny: TinyBuilder) -> subprocess.Popen[bytes]:
    """A process of the same environment that loads it."""
    return subprocess.Popen([sys.executable, "-c", LOAD, sys.prefix, str(tiny.source)], cwd=ROOT)


def load(prefix: str, source: str) -> None:
    """What `another` does."""
    sys.prefix = prefix
    OpBuilder.jit_load = group.compile_in_turn
    entry.set_up_logging()
    TinyBuilder(Path(source)).load()


def until(what: Callable[[], object]) -> None:
    end = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def slow_compiler(place: Path) -> str:
    """c++ that takes its time over a source until the file `go` is there."""
    file = place / "slow-c++"
    wait = f'case "$*" in *tiny_*.cpp*) touch {place}/at-work; while [ ! -f {place}/go ]; do sleep 0.1; done;; esac\n'
    file.write_text(f'#!/bin/sh\n{wait}exec c++ "$@"\n')
    file.chmod(0o755)
    return str(file)


def test_what_a_killed_process_left_is_removed_and_said(tiny: TinyBuilder, capsys) -> None:
    tiny.folder.mkdir(parents=True)
    (tiny.folder / "lock").touch()
    tiny.load()
    out, err = capsys.readouterr()
    assert err == f"tiffin: {tiny.folder / 'lock'}: left by a process that was killed while it compiled: removed\n"
    assert f"compiling DeepSpeed's {tiny.name} in {tiny.folder}" in out and (tiny.folder / f"{tiny.name}.so").is_file()
    assert not (tiny.folder / "lock").exists() and extensions.PLACE not in os.environ


def test_a_compile_under_way_is_waited_for_and_a_real_kill_costs_nothing(
    tiny: TinyBuilder, tmp_path: Path, monkeypatch, capfd
) -> None:
    """The compiler that a killed process leaves is at work for a while: nobody writes beside it."""
    monkeypatch.setenv("CXX", slow_compiler(tmp_path))
    first = another(tiny)
    until((tmp_path / "at-work").exists)
    second = another(tiny)
    said = []
    until(lambda: "waiting" in "".join([*said, said.append(capfd.readouterr().out) or said[-1]]))
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    time.sleep(5 * extensions.POLL_SECONDS)  # now it has our lock, and torch's is still that of a compiler at work
    assert second.poll() is None and (tiny.folder / "lock").exists()
    (tmp_path / "go").touch()
    assert second.wait(SECONDS) == 0
    out, err = capfd.readouterr()
    assert err.count("removed") == 1
    assert "".join([*said, out]).count(f"waiting for another process that compiles in {tiny.folder}") == 1


def test_in_a_folder_that_others_use_too_only_what_is_old_goes(tmp_path: Path, capsys) -> None:
    entry.set_up_logging()
    (tmp_path / "lock").touch()
    with extensions.turn(tmp_path, ours=False, patience=1.0):
        assert time.time() - tmp_path.stat().st_mtime < SECONDS
    assert capsys.readouterr().out == f"waiting for another process that compiles in {tmp_path}\n"
    held = os.open(tmp_path / "lock", os.O_CREAT | os.O_EXCL)  # as torch holds it
    assert not extensions.at_work(tmp_path)  # this process is no other one
    with subprocess.Popen(["sleep", "60"], pass_fds=[held]) as child:
        assert extensions.at_work(tmp_path) == [child.pid]
        child.kill()
    os.close(held)


def test_an_environment_that_cannot_be_written_has_its_operators_elsewhere(tmp_path: Path, monkeypatch, capsys) -> None:
    entry.set_up_logging()
    monkeypatch.setattr(sys, "prefix", "/proc")
    place = extensions.directory({"XDG_CACHE_HOME": str(tmp_path)})
    assert place.is_relative_to(tmp_path / "tiffin") and str(place) in capsys.readouterr().out
    assert extensions.directory({extensions.PLACE: "mine"}) == Path("mine")


def test_a_compiler_that_is_not_there_is_one_line(tiny: TinyBuilder, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"DeepSpeed's tiny_\d+ cannot be compiled \(.*\), wanted a C\+\+ compiler"):
        tiny.load()
    assert not (tiny.folder / "lock").exists()
