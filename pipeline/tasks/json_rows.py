"""The elements of a JSON array in a file, each with the line on which it begins."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from pipeline.errors import UserError

_DECODER = json.JSONDecoder()
_BLANK = re.compile(r"[ \t\r\n]*")
_WANTED = 'wanted an array of objects, {"data": [...]} or one object per line'


def array_rows(path: str, text: str) -> Iterator[tuple[int, object]]:
    """(line, element) of `[...]` or `{"data": [...]}`; nothing for blank text.

    Raises UserError where the text breaks off or is something else, before the first element.
    """
    if not text.strip():
        return
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise UserError(f"{path}:{line}: no JSON ({error}), {_WANTED}; mend or write the file again") from error
    wrapped = isinstance(whole, dict) and isinstance(whole.get("data"), list)
    if not wrapped and not isinstance(whole, list):
        raise UserError(f'{path}:1: JSON of type {type(whole).__name__} without a "data" array, {_WANTED}; rewrite it')
    yield from _elements(text, _data_start(text) if wrapped else text.index("["))


def _data_start(text: str) -> int:
    """Where the `[` of the value of "data" stands in a sound JSON object (the last one counts, as in json.loads)."""
    start = -1
    at = _skip_blank(text, text.index("{") + 1)
    while text[at] != "}":
        name, at = _DECODER.raw_decode(text, at)
        at = _skip_blank(text, _skip_blank(text, at) + 1)  # over the colon
        start = at if name == "data" else start
        at = _after_value(text, at)
    return start


def _elements(text: str, start: int) -> Iterator[tuple[int, object]]:
    """(line, element) of the sound JSON array whose `[` stands at `start`."""
    at = _skip_blank(text, start + 1)
    line, counted = 1, 0
    while text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        yield line, _DECODER.raw_decode(text, at)[0]
        at = _after_value(text, at)


def _after_value(text: str, at: int) -> int:
    """The next value's position, or that of the closing bracket."""
    at = _skip_blank(text, _DECODER.raw_decode(text, at)[1])
    return _skip_blank(text, at + 1) if text[at] == "," else at


def _skip_blank(text: str, at: int) -> int:
    return _BLANK.match(text, at).end()
