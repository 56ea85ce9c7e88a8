"""The documents mean something: each `bash run.sh` in them resolves, links and paths exist, README stays short."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import pytest

from pipeline.config.resolve import resolve_steps
from pipeline.data.formats import FORMATS
from tests.documents import DOCUMENTS, FOLDERS, ROOT

COMMAND = re.compile(r"bash run\.sh[^\n`#]*")
LINK = re.compile(r"\]\(([^)\s]+)\)")
OURS = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`")
YOURS = "mine"  # what a reader is asked to write
MOST_BYTES = 16_000  # what is read in one sitting, twenty rows of data in it; the rest stands beside what it describes


def commands() -> Iterator[str]:
    for text in DOCUMENTS.values():
        yield from (found for found in COMMAND.findall(text) if not re.search(r"stage=(help|test)", found))


def anchors(text: str) -> set[str]:
    """What a link's #part may be: the headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("command", dict.fromkeys(commands()))
def test_a_command_of_the_documents_resolves(command: str) -> None:
    assert resolve_steps(shlex.split(command)[2:])


def test_there_are_commands() -> None:
    assert len(set(commands())) > 30
    assert {"README.md", "stages/recipes/RESULTS.md", "reward_models/README.md"} <= set(DOCUMENTS)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_exist(name: str) -> None:
    for link in LINK.findall(DOCUMENTS[name]):
        place, _, part = link.partition("#")
        if "://" in link:
            continue
        path = ((ROOT / name).parent / place).resolve() if place else ROOT / name
        assert path.exists(), f"{name}: {link}"
        assert not part or part in anchors(path.read_text(encoding="utf-8")), f"{name}: {link}"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_exist(name: str) -> None:
    named = {path for path in OURS.findall(DOCUMENTS[name]) if YOURS not in path}
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]


def test_readme_is_short() -> None:
    assert len(DOCUMENTS["README.md"].encode()) <= MOST_BYTES


def test_the_data_document_names_every_format():
    table = re.findall(r"^\| `(\w+)` \|", DOCUMENTS["pipeline/data/README.md"], flags=re.MULTILINE)
    assert {*FORMATS} <= {*table}
