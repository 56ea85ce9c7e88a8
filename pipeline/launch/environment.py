"""Finds or makes the Python environment that run.sh hands over to. Standard library only: it runs before any install.

`python -m pipeline.launch.environment [dev]` prints the interpreter to use: this one if its packages are within the
ranges of setup.py, else that of `.venv` beside it, made with the pins of constraints.txt where needed. Exit code 2 on
failure, 130 on Ctrl-C. DeepSpeed's operators are not compiled here: only offload takes them, and says so.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
VENV = ROOT / ".venv"
MARKER = VENV / ".tiffin-ready"  # written last: without it, an install was interrupted and is done again
COMPARE: dict[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    ">=": lambda found, wanted: found >= wanted,
    "==": lambda found, wanted: found == wanted,
    "<": lambda found, wanted: found < wanted,
}


class InstallError(Exception):
    """The environment could not be made; the message is one line."""


def requirements(dev: bool) -> list[str]:
    """The ranges in setup.py, read without running it."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    lists = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return lists["REQUIREMENTS"] + (lists["DEV"] if dev else [])


def missing(ranges: Sequence[str]) -> list[str]:
    """Those of `ranges` ("torch>=2.6,<3") that this Python's packages do not satisfy."""
    return [one for one in ranges if not _satisfied(one)]


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version without trailing zeros: "2.13.0+cpu" -> (2, 13), "2.6.0a0+git" -> (2, 6)."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match[0].split(".")] if match else [0]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def choose(dev: bool) -> Path:
    """The interpreter to use; makes or completes `.venv` if this Python will not do. Raises InstallError."""
    if not (lacking := missing(requirements(dev))):
        return Path(sys.executable)
    if os.environ.get("PYTHON"):
        several = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        _say(f"PYTHON={os.environ['PYTHON']} is not used, it lacks {lacking[0]}{several}: {VENV} is")
    with (ROOT / "constraints.txt").open() as lock:  # ranks of one machine may start together
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _ready(dev):
            _make(dev)
    return VENV / "bin" / "python"


def _satisfied(wanted: str) -> bool:
    name, limits = re.match(r"([\w.-]+)(.*)", wanted).groups()
    try:
        installed = release(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False
    parts = (re.match(r"(>=|==|<)(.+)", limit.strip()).groups() for limit in limits.split(","))
    return all(COMPARE[sign](installed, release(version)) for sign, version in parts)


def _fingerprint() -> str:
    content = (ROOT / "setup.py").read_bytes() + (ROOT / "constraints.txt").read_bytes()
    return hashlib.sha256(content).hexdigest()


def _ready(dev: bool) -> bool:
    if not MARKER.is_file():
        return False
    mark = json.loads(MARKER.read_text())
    return mark["fingerprint"] == _fingerprint() and (mark["dev"] or not dev)


def _make(dev: bool) -> None:
    """Create `.venv` unless a finished one is there, install the pins, torch first, and write the marker."""
    if not (shutil.which("c++") or shutil.which("g++")):
        _say("no C++ compiler found: DeepSpeed cannot build its CPU optimizers (offload configurations)")
    torch = [one for one in requirements(dev) if one.startswith("torch")]
    own_torch = sys.prefix == sys.base_prefix and not missing(torch)
    if MARKER.is_file():
        _say(f"completing {VENV}")
        dev = dev or json.loads(MARKER.read_text())["dev"]
        MARKER.unlink()
    else:
        _say(f"making {VENV} with Python {sys.version.split()[0]}" + (", torch from this Python" if own_torch else ""))
        _create(own_torch)
    pins = _pins(own_torch)
    if not own_torch:
        _install(["torch"], pins, "torch (some minutes)")
    _install(requirements(dev), pins, "the other packages")
    MARKER.write_text(json.dumps({"fingerprint": _fingerprint(), "dev": dev}))
    _say("the environment is ready")


def _create(own_torch: bool) -> None:
    try:
        venv.create(VENV, clear=True, with_pip=True, system_site_packages=own_torch)
    except (OSError, subprocess.CalledProcessError) as error:
        cure = "install python3-venv, or the packages of setup.py into a Python of your own (PYTHON=/path/to/python)"
        raise InstallError(f"{VENV}: cannot be made ({error}); {cure}") from None


def _pins(own_torch: bool) -> Path:
    """The constraints file; with a torch that the user brought, a copy that pins that one."""
    if not own_torch:
        return ROOT / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if not line.startswith("torch==")]
    path = VENV / "constraints.txt"
    path.write_text("\n".join([*kept, f"torch=={importlib.metadata.version('torch')}", ""]))
    return path


def _install(packages: Sequence[str], pins: Path, what: str) -> None:
    _say(f"installing {what}")
    log = VENV / "install.log"
    with log.open("a") as file:
        argv = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--no-input", "-c", str(pins), *packages]
        code = subprocess.call(argv, stdout=file, stderr=subprocess.STDOUT)
    if code != 0:
        for line in log.read_text(errors="replace").splitlines()[-15:]:
            print(f"  {line}", file=sys.stderr)
        raise InstallError(f"pip could not install {what}; its last lines are above, the whole log is {log}")


def _say(text: str) -> None:
    print(f"tiffin: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        print(choose(dev="dev" in sys.argv[1:]))
    except InstallError as failure:
        _say(str(failure))
        sys.exit(2)
    except KeyboardInterrupt:
        _say("stopped by Ctrl-C; the same command makes the environment anew, of what was fetched by then")
        sys.exit(130)
