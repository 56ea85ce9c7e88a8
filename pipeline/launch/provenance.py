"""When, where and with which versions a stage was started: starts.jsonl, one line per start, resumed ones included."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from pipeline.errors import UserError

NAME = "starts.jsonl"
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "peft")


def note(directory: Path, step: int) -> None:
    """Append this start, which goes on from `step`: when (UTC), on what, with which versions."""
    row = {"when": datetime.now(timezone.utc).isoformat(timespec="seconds"), "step": step, "device": device()}
    row["versions"] = {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / NAME
    if path.is_file():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # without a last line that a kill cut short
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(directory: Path) -> list[dict]:
    """The starts of a stage in their order; none where nothing was noted. Raises UserError on a line that is no JSON.

    A last line that a kill cut short is dropped.
    """
    path = directory / NAME
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error.msg}); remove that line") from error
    return rows


def device() -> str:
    """What this process computes on."""
    import torch  # only what trains has loaded it already; reading starts needs none

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"
