"""README's commands mean something: every `bash run.sh` line in it resolves."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pipeline.config.resolve import resolve_steps

ROOT = Path(__file__).parent.parent
COMMANDS = re.findall(r"bash run\.sh[^\n`#]*", (ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", [c for c in COMMANDS if not re.search(r"stage=(help|test)", c)])
def test_a_command_of_the_readme_resolves(command: str) -> None:
    assert resolve_steps(shlex.split(command)[2:])


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 8
