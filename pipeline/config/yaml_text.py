"""YAML's text and what it says, and nothing of settings. The only importer of yaml."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import yaml

NULLS = ("null", "Null", "NULL", "~")
CORE = ("null", "bool", "int", "float", "str", "seq", "map")  # YAML's own kinds of values
MALFORMED = (yaml.YAMLError, ValueError, LookupError, RecursionError)  # the last three: !!int x, !!bool x, [[[[...
END = "...\n"  # of a document that is one scalar


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core scalars: 1e-5 is a float; yes, no, on, off, dates and 010 are text; keys are unique."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own attribute)
    yaml_constructors = {  # noqa: RUF012
        tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag.endswith(CORE)
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key is a list or a mapping, wanted text"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=True)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read back as text, and escapes what shows no sign."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def represent_str(self, text: str) -> yaml.ScalarNode:
        shown = all(sign.isprintable() or sign == "\n" for sign in text)  # PyYAML folds U+0085 away
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if shown else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


for _class in (_Loader, _Dumper):
    for _tag, _pattern, _first in (
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
        ("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
        ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def dump_yaml(mapping: Mapping[str, Any]) -> str:
    """YAML text which `load_yaml` reads back as the same mapping."""
    return yaml.dump(dict(mapping), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def as_flow(value: Any) -> str:
    """`value` in brackets and quotes on one line, without a character that shows no sign; `value_of` reads it back."""
    style = '"' if isinstance(value, str) else None  # of the rest, what needs quotes gets them
    text = yaml.dump(
        value, Dumper=_Dumper, default_style=style, default_flow_style=True, sort_keys=False, width=math.inf
    )
    return text.removesuffix(END).rstrip()


def value_of(text: str) -> Any:
    """What a YAML text says. Raises MALFORMED."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def scalar(text: str) -> Any:
    """What a text says that is one scalar, whatever it contains. Raises MALFORMED."""
    loader = _Loader("")
    return loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text))


@lru_cache(maxsize=64)  # a comparison of many steps reads the same files for each; nobody writes into what is returned
def document(text: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    """What a YAML text says, and the line of every key and list item in it. Raises MALFORMED."""
    loader = _Loader(text)
    node = loader.get_single_node()
    return (None, {}) if node is None else (loader.construct_document(node), dict(_lines(node, ())))


def complaint(error: Exception) -> tuple[str, str]:
    """Of one of MALFORMED: ":3" where it tells the line, and what is wrong, in one line."""
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    text = error.problem if isinstance(error, yaml.MarkedYAMLError) and error.problem else str(error)
    return f":{mark.line + 1}" if mark else "", " ".join(text.split())


def _lines(node: yaml.Node, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    """(path, line counted from 1) of every key and list item under `node`."""
    if isinstance(node, yaml.MappingNode):
        inner = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        inner = [(str(index), value, value) for index, value in enumerate(node.value)]
    else:
        return
    for name, marked, value in inner:
        yield (*path, name), marked.start_mark.line + 1
        yield from _lines(value, (*path, name))
