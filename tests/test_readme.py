"""The documents' commands mean something: every `bash run.sh` line in them resolves."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pipeline.config.resolve import resolve_steps
from pipeline.data.formats import FORMATS

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "pipeline/data/README.md", "pipeline/bench/RESULTS.md")
TEXTS = [(ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS]
COMMANDS = [command for text in TEXTS for command in re.findall(r"bash run\.sh[^\n`#]*", text)]


@pytest.mark.parametrize("command", [c for c in COMMANDS if not re.search(r"stage=(help|test)", c)])
def test_a_command_of_the_documents_resolves(command: str) -> None:
    assert resolve_steps(shlex.split(command)[2:])


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 8
    assert all("bash run.sh" in text for text in TEXTS)


def test_the_data_document_names_every_format():
    table = re.findall(r"^\| `(\w+)` \|", TEXTS[1], flags=re.MULTILINE)
    assert {*FORMATS} <= {*table}
