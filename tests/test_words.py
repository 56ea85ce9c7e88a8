"""Whatever the documents and our messages tell a user to type is accepted: every `key=` in them is a setting."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config.aliases import ALIASES, SWITCHES
from pipeline.config.resolve import CONTROL
from pipeline.config.schema import STAGES
from pipeline.config.validate import known_paths
from pipeline.config.yaml_layers import read_layer
from tests.documents import DOCUMENTS, ROOT

WORD = re.compile(r"(?<![\w{.-])([a-z_]+(?:\.[a-z_]+)*)=(?!=)")
DRAWN = (
    "pipeline/report/svg.py",
    "pipeline/report/comparison.py",
    "pipeline/report/figure.py",
)  # their words are attributes of SVG
FILES = [path for folder in ("pipeline", "stages", "reward_models") for path in sorted((ROOT / folder).rglob("*.py"))]
FILES += sorted((ROOT / "pipeline" / "report").rglob("*.yaml"))
OTHERS = {"key", "slots", "num_labels", "pad_token_id"}  # of `key=value` itself; of a hostfile; of peft
OTHERS |= {"code"}  # of a shell
OF_THE_KILLER = {"processes", "kills", "switch", "zeros"}  # tests/kill_and_resume.py
OF_THE_SERVER = {"port", "host", "threads", "max_request_mb"}  # reward_models/serve.py


def known() -> set[str]:
    """What may stand before the '=' of a word; a comparison passes `rl.x` and `evaluate.x` on to those stages."""
    named = {*ALIASES, *SWITCHES, *CONTROL}
    own = {stage: {".".join(path) for record in STAGES[stage] for path in known_paths(record)} for stage in STAGES}
    passed = {f"{stage}.{name}" for stage in ("rl", "evaluate") for name in (*own[stage], *ALIASES)}
    free = {".".join(path) for file in (ROOT / "stages").glob("**/*.yaml") for path in read_layer(file)}
    return named | passed | free | {name for names in own.values() for name in names}


def texts(path: Path) -> Iterator[str]:
    """The strings of a file, docstrings left out; of data, all of it."""
    if path.suffix == ".yaml":
        yield path.read_text(encoding="utf-8")
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value


@pytest.mark.parametrize("path", [path for path in FILES if path.relative_to(ROOT).as_posix() not in DRAWN], ids=str)
def test_every_word_in_a_message_is_a_setting(path: Path):
    used = {word for text in texts(path) for word in WORD.findall(text)}
    assert used <= known() | OTHERS


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_word_in_the_documents_is_a_setting(name: str):
    assert set(WORD.findall(DOCUMENTS[name])) <= known() | OTHERS | OF_THE_KILLER | OF_THE_SERVER


def test_there_are_words_in_the_documents():
    assert {"learning_rate", "kl_form", "rl.max_steps"} <= {
        one for text in DOCUMENTS.values() for one in WORD.findall(text)
    }
