"""The built-in `docstrings` task: real text that every machine has, for summarisation scored by ROUGE.

A task module offers `examples(split, seed, size) -> list[Example]`. Here the prompt is the source of a function or
class of the running Python's standard library without its docstring, the completion the docstring's first sentence.
A module belongs to one split, by the hash of its name; rows therefore differ between Python versions, not machines.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import cache
from inspect import cleandoc
from pathlib import Path
from random import Random

from pipeline.errors import UserError
from pipeline.records import Example
from pipeline.tasks.shares import check_split, split_of

TASK = "docstrings"
SPLIT_SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}  # of the modules

MAX_LINES, MAX_CHARACTERS = 60, 1500  # of a prompt
MIN_WORDS, MAX_WORDS = 4, 40  # of a summary

# Not library code, or not the same on every machine that has this Python.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "ensurepip", "__pycache__"}
_SKIPPED |= {"site-packages", "dist-packages", "sitecustomize.py", "usercustomize.py"}

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def examples(split: str, seed: int, size: int | None = None) -> list[Example]:
    """The split's rows in an order drawn from `seed`, the first `size` of them (default: all).

    Raises UserError for an unknown split, and where the standard library is not there as source.
    """
    check_split(TASK, split, SPLIT_SHARES)
    rng = Random(f"{TASK}-{seed}-{split}")
    return sorted(_rows(split), key=lambda _: rng.random())[:size]


@cache
def _rows(split: str) -> tuple[Example, ...]:
    """All rows of a split, by module and line; of definitions with the same name the first."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = list(_source_files(root))
    if not paths:
        raise UserError(f"data.task: docstrings: no .py file in {root}, wanted a Python with its library as source")
    rows: dict[str, Example] = {}
    for path in paths:
        module = _module_name(path.relative_to(root))
        if split_of(module, SPLIT_SHARES) == split:
            for row in _module_rows(module, path):
                rows.setdefault(row.id, row)
    return tuple(rows.values())


def _source_files(folder: Path) -> Iterator[Path]:
    """Importable .py files under `folder`, sorted, without entering what is skipped."""
    for path in sorted(folder.iterdir()):
        if path.name in _SKIPPED or not path.stem.isidentifier():
            continue
        if path.is_dir():
            yield from _source_files(path)
        elif path.suffix == ".py":
            yield path


def _module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _module_rows(module: str, path: Path) -> Iterator[Example]:
    with tokenize.open(path) as file:  # honours the coding comment
        source = file.read()
    lines = source.splitlines()
    for name, node in _definitions(ast.parse(source), module):
        docstring = ast.get_docstring(node, clean=False)
        summary = first_sentence(docstring) if docstring else ""
        prompt = _source_without_docstring(node, lines) if _is_usable(summary) else ""
        if prompt.count("\n") >= 1:  # more than the signature
            yield Example(id=name, prompt=prompt, completion=summary, source=module)


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    """Functions and classes with their qualified names, outer before inner, at any depth."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            name = f"{prefix}.{child.name}"
            yield name, child
            yield from _definitions(child, name)
        elif isinstance(child, ast.stmt | ast.excepthandler):  # an if, a try ...; expressions define nothing
            yield from _definitions(child, prefix)


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring's first paragraph, on one line."""
    paragraph = re.split(r"\n\s*\n", cleandoc(docstring).strip())[0]
    line = " ".join(paragraph.split())
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", line)[0]


def _is_usable(summary: str) -> bool:
    words = summary.split()
    plain = summary.isascii() and not re.search(r">>>|->|==|::", summary)
    return plain and MIN_WORDS <= len(words) <= MAX_WORDS and words[0].isalpha() and words[0][0].isupper()


def _source_without_docstring(node: Definition, lines: list[str]) -> str:
    """Whole lines of the definition, at most MAX_LINES and MAX_CHARACTERS; empty if the docstring shares a line."""
    docstring = node.body[0]
    if docstring.lineno == node.lineno:
        return ""
    whole = [*lines[node.lineno - 1 : docstring.lineno - 1], *lines[docstring.end_lineno : node.end_lineno]]
    kept = [line.removeprefix(" " * node.col_offset) for line in whole if line.strip()][:MAX_LINES]
    while sum(len(line) + 1 for line in kept) > MAX_CHARACTERS:
        kept.pop()
    return "\n".join(kept)
