"""YAML files and key=value words -> layers of settings that know where each value was written.

`resolve.py` decides which layers make a stage's settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import hints, yaml_text
from pipeline.config.aliases import ALIASES, SAME_VALUES, SWITCHES
from pipeline.config.schema import STAGES
from pipeline.config.validate import SettingPath, text_paths
from pipeline.config.yaml_text import MALFORMED, NULLS, complaint, scalar, value_of
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND_LINE = "command line"
WHOLE = {
    ("reward",),
    ("policies",),
    ("monitors",),
    ("data", "train"),
}  # mappings that a later layer replaces instead of merging into
EXCLUSIVE = (  # giving one of a pair takes back the other, if only an earlier layer gave it
    (("train", "num_train_epochs"), ("train", "max_steps")),
    (("optimizer", "warmup_ratio"), ("optimizer", "warmup_steps")),
    (("train", "micro_batch_size"), ("train", "max_tokens")),
)
TEXTS = text_paths(record for records in STAGES.values() for record in records)


class Leaf(NamedTuple):
    value: Any
    place: str  # "command line", "stages/rl.yaml:4"


Layer = dict[SettingPath, Leaf]


def load_yaml(path: str | Path) -> Any:
    """The content of a YAML file. Raises UserError with file and line."""
    return read_with_lines(Path(path))[0]


def read_with_lines(path: Path) -> tuple[Any, dict[SettingPath, int]]:
    """A YAML file, and the line of every key and list item in it. Raises UserError with file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{label(path)}: cannot be read ({error}); wanted a YAML file") from None
    try:
        return yaml_text.document(text)
    except MALFORMED as error:
        line, problem = complaint(error)
        raise UserError(f"{label(path)}{line}: not YAML: {problem}") from None


def parse_overrides(words: Iterable[str]) -> Layer:
    """key=value words as a layer. Raises UserError for a word without '=' and for a key given twice."""
    layer: Layer = {}
    words = list(words)
    for index, word in enumerate(words):
        _refuse_half_characters(word, COMMAND_LINE)
        name, equals, text = word.partition("=")
        if not equals or not name.strip() or name.startswith("-"):
            raise UserError(f"{COMMAND_LINE}: {word!r}, wanted key=value{hints.cure(words[index:])}")
        _add(layer, _layer(name.strip(), _value(name, text), lambda path: COMMAND_LINE), COMMAND_LINE)
    return layer


def as_word(name: str, value: Any) -> str:
    """name=value, which `parse_overrides` reads back as the same value."""
    if isinstance(value, str) and _reads_as_itself(name, value):
        return f"{name}={value}"
    return f"{name}={yaml_text.as_flow(value)}"


def read_layer(path: Path) -> Layer:
    """A YAML file of settings as a layer. Raises UserError with file and line."""
    return sub_layer(path, *read_with_lines(path), ())


def sub_layer(path: Path, data: Any, lines: Mapping[SettingPath, int], prefix: SettingPath) -> Layer:
    """The mapping `data`, found under `prefix` in the file `path`, as a layer."""
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{label(path)}: {'.'.join(prefix) or 'the file'} is {data!r}, wanted a mapping of settings")
    place = lambda key: f"{label(path)}:{lines[(*prefix, *key)]}"  # noqa: E731
    layer: Layer = {}
    for name, value in data.items():
        _add(layer, _layer(str(name), value, place), place((str(name),)))
    return layer


def word(overrides: Layer, name: str) -> str | None:
    """The value of a word such as stage= or recipe=, None if it is not there. Raises UserError if it is not text."""
    value = overrides[(name,)].value if (name,) in overrides else None
    if value is not None and not isinstance(value, str):
        raise UserError(f"{overrides[(name,)].place}: {name}={value!r}, wanted a name")
    return value


def merge(layers: Iterable[Layer]) -> Layer:
    """Later layers over earlier ones, leaf by leaf. None of the arguments is changed."""
    merged: Layer = {}
    for layer in layers:
        for path, leaf in layer.items():
            inside = [other for other in merged if other != path and other[: len(path)] == path]
            if leaf.value == {} and path not in WHOLE and inside:
                continue
            around = [path[:length] for length in range(1, len(path)) if path[:length] in merged]
            for other in (*inside, *around, *([path] if path in merged else [])):
                del merged[other]
            merged[path] = leaf  # at the end: the order is that of the last writers
        for one, other in (*EXCLUSIVE, *(pair[::-1] for pair in EXCLUSIVE)):
            if one in layer and layer[one].value is not None and other in merged and other not in layer:
                merged[other] = Leaf(None, layer[one].place)
    return merged


def nested(layer: Layer) -> dict[str, Any]:
    """A flat layer as nested mappings."""
    tree: dict[str, Any] = {}
    for path, leaf in layer.items():
        here = tree
        for part in path[:-1]:
            here = here.setdefault(part, {})
        here[path[-1]] = leaf.value
    return tree


def label(path: Path) -> str:
    """How messages call a file: relative to the checkout if it is one of ours, else as the user gave it."""
    absolute = path.resolve()
    return str(absolute.relative_to(ROOT)) if absolute.is_relative_to(ROOT) else str(path)


def first_comment(path: Path) -> str:
    """The comment on a file's first line, '' without one: the description of a stage, algorithm or recipe."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[0].removeprefix("#").strip() if lines and lines[0].startswith("#") else ""


def _add(layer: Layer, more: Layer, place: str) -> None:
    """Add `more` to the `layer` that is being built; a setting given twice under any of its names is an error."""
    for path, leaf in more.items():
        if any(path[: len(other)] == other or other[: len(path)] == path for other in layer):
            raise UserError(f"{place}: {'.'.join(path)} is given twice; give it once")
        _refuse_half_characters(json.dumps([path, leaf.value], ensure_ascii=False, default=str), place)
        layer[path] = leaf


def _refuse_half_characters(text: str, place: str) -> None:
    """Raise UserError for what no file can hold: bytes of a word that are not UTF-8, or one half of a pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: {text!r} is not UTF-8, wanted text that is") from None


def _layer(name: str, value: Any, place: Callable[[SettingPath], str]) -> Layer:
    """A top-level name and its value as leaves; `place` tells where a path, before aliases, was written."""
    target, meant = _target(name, value, place((name,)))
    leaves = [(path[len(target) :], leaf) for path, leaf in _leaves(target, meant)]
    return {(*target, *path): Leaf(_usual((*target, *path), leaf), place((name, *path))) for path, leaf in leaves}


def _usual(path: SettingPath, value: Any) -> Any:
    """`zero2` of train.zero: 2; any other value as it is."""
    same = SAME_VALUES.get(".".join(path), {})
    return same.get(str(value), value)


def _leaves(path: SettingPath, value: Any) -> Iterator[tuple[SettingPath, Any]]:
    if isinstance(value, dict) and value and path not in WHOLE:
        for key, inner in value.items():
            yield from _leaves((*path, str(key)), inner)
    else:
        yield path, value


def _target(name: str, value: Any, place: str) -> tuple[SettingPath, Any]:
    """The path and the value that a top-level name stands for. `model: {path: x}` is a section, `model: x` an alias."""
    if said := hints.advice(name, value):
        raise UserError(f"{place}: {said}")
    if name in SWITCHES:
        setting, meaning = SWITCHES[name]
        if value is not True:
            raise UserError(f"{place}: {name}: {value!r}, wanted true; set {setting}=fp32 for neither")
        return tuple(setting.split(".")), meaning
    if name in ALIASES and not isinstance(value, dict):
        return tuple(ALIASES[name].split(".")), value
    return tuple(name.split(".")), value


def _value(name: str, text: str) -> Any:
    """The value of a word. A setting that is text gets it as it stands, but for whole quotes around it and for null;
    another gets YAML where it starts with a bracket or a quote, else one scalar, whatever it contains."""
    path, first = tuple(ALIASES.get(name, name).split(".")), text.lstrip()[:1]
    section = name in ALIASES and first == "{"  # `model={revision: main}`
    if path not in TEXTS or section:
        try:
            return value_of(text) if first and first in "[{'\"" else scalar(text)
        except MALFORMED as error:
            quote = "; put quotes around a name that begins with *" if re.search(r"[\[{,]\s*\*", text) else ""
            raise UserError(f"{COMMAND_LINE}: {name}: {text!r} is not YAML: {complaint(error)[1]}{quote}") from None
    if text in NULLS or (text == "" and TEXTS[path]):
        return None
    try:
        quoted = value_of(text) if first and first in "'\"" else None
    except MALFORMED:  # a text that starts with a quotation
        quoted = None
    return quoted if isinstance(quoted, str) else text


def _reads_as_itself(name: str, text: str) -> bool:
    """Whether the value of name=text is the text, and no process refuses the word."""
    try:
        return "\0" not in text and _value(name, text) == text
    except UserError:
        return False
