"""Typed access to the columns of one raw row. Every error is a RowError: "column: found, wanted"."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from pipeline.errors import did_you_mean

Columns = Mapping[str, object]

LARGEST = 3.4e38  # of a float32, in which models are trained
SHOWN_CHARACTERS = 40  # of a wrong value in a message: enough to find it, not enough to fill a log with it


class RowError(Exception):
    """One row that cannot become an Example; the reader adds file and line."""


class TeachesNothingError(Exception):
    """A sound row that says nothing, as a tie of two responses; its text is the reason under which it is counted."""


def has(row: Columns, name: str) -> bool:
    """True if the column is there and not null."""
    return row.get(name) is not None


def first_of(row: Columns, names: Sequence[str]) -> str | None:
    """The first of several names for one thing that the row has a value for."""
    for name in names:  # a plain loop: this is asked thirty times a row
        if row.get(name) is not None:
            return name
    return None


def named(row: Columns, names: Sequence[str]) -> str:
    """The first of `names` that has a value, else that is there, else the first."""
    return first_of(row, names) or next((name for name in names if name in row), names[0])


def without(row: Columns, *names: str) -> dict[str, object]:
    return {name: value for name, value in row.items() if name not in names}


def text(row: Columns, *names: str) -> str:
    """The text of the first column there is of `names`; empty or blank text is refused."""
    name = _required(row, names, "text")
    return checked_text(row[name], name)


def checked_text(value: object, place: str) -> str:
    """`value`, which must be text with something in it that UTF-8 can write."""
    if not isinstance(value, str):
        raise RowError(f"{place}: {described(value)}, wanted text")
    if not value.strip():
        raise RowError(f"{place}: empty, wanted text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{place}: half a surrogate pair at character {error.start + 1}, wanted whole text") from error
    return value


def optional_text(row: Columns, name: str) -> str | None:
    """The text of a column that may be absent, null or empty (all three give None)."""
    return None if row.get(name) in (None, "") else checked_text(row[name], name)


def optional_label(row: Columns, name: str) -> str | None:
    """As `optional_text`, and a whole number counts as text: what files use for ids."""
    value = row.get(name)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else optional_text(row, name)


def number(row: Columns, *names: str) -> float:
    """The finite number of the first column there is of `names`; numeric text (csv) is read as a number."""
    name = _required(row, names, "a finite number")
    return checked_number(row[name], name)


def optional_number(row: Columns, *names: str) -> float | None:
    """As `number`, or None where none of `names` has a value."""
    name = first_of(row, names)
    return None if name is None else checked_number(row[name], name)


def checked_number(value: object, place: str) -> float:
    """`value` as a float that is finite in float32. True and false are no numbers."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST:  # nan is neither above nor below
        raise RowError(f"{place}: {described(value)}, wanted a finite number")
    return number


def texts(row: Columns, *names: str) -> tuple[str, ...] | None:
    """A list of texts (one text counts as a list of one), or None where no column of `names` has a value."""
    name = first_of(row, names)
    if name is None:
        return None
    if isinstance(row[name], str):
        return (checked_text(row[name], name),)
    values = checked_list(row[name], name, "a list of text")
    return tuple(checked_text(value, f"{name}[{i}]") for i, value in enumerate(values))


def numbers(row: Columns, name: str) -> tuple[float, ...]:
    """A list of finite numbers, empty where the column has no value."""
    values = checked_list(row[name], name, "a list of numbers") if has(row, name) else ()
    return tuple(checked_number(value, f"{name}[{i}]") for i, value in enumerate(values))


def named_numbers(row: Columns, name: str) -> dict[str, float]:
    """A mapping of names to finite numbers, empty where the column has no value; null entries are left out."""
    value = mapping(row, name, "a mapping of names to finite numbers")
    return {str(key): checked_number(one, f"{name}.{key}") for key, one in value.items() if one is not None}


def mapping(row: Columns, name: str, wanted: str = "a mapping") -> Columns:
    """What a column of names and values holds, empty where it has no value."""
    if not has(row, name):
        return {}
    value = row[name]
    if not isinstance(value, Mapping):
        raise RowError(f"{name}: {described(value)}, wanted {wanted}")
    return value


def checked_list(value: object, place: str, wanted: str, length: int | None = None) -> Sequence[object]:
    """`value`, which must be a list, of `length` entries where that is given."""
    if not isinstance(value, list | tuple):
        raise RowError(f"{place}: {described(value)}, wanted {wanted}")
    if length is not None and len(value) != length:
        raise RowError(f"{place}: {len(value)} entries, wanted {wanted}")
    return value


def fits_json(value: object) -> bool:
    """Whether JSON gives `value` back: text, a finite number, a truth value, null, or a list or mapping of these."""
    if isinstance(value, str):
        return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list):
        return all(map(fits_json, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(fits_json, (*value, *value.values())))
    return value is None or isinstance(value, int)


def described(value: object) -> str:
    """What a wrong value is, in words and short: 'high' is text; null; 3 is a number."""
    if value is None:
        return "null"
    kinds = ((bool, "a truth value"), (str, "text"), (int | float, "a number"), (list | tuple, "a list"))
    kind = next((words for type_, words in kinds if isinstance(value, type_)), None)
    if kind is None:
        kind = "a mapping" if isinstance(value, Mapping) else f"a {type(value).__name__}"
    shown = repr(value)
    return f"{shown if len(shown) <= SHOWN_CHARACTERS else shown[:SHOWN_CHARACTERS] + '...'} is {kind}"


def _required(row: Columns, names: Sequence[str], wanted: str) -> str:
    name = first_of(row, names)
    if name is not None:
        return name
    if names[0] in row:
        raise RowError(f"{names[0]}: null, wanted {wanted}")
    called = names[0] if len(names) == 1 else f"{names[0]} (or {', '.join(names[1:])})"
    hint = next(filter(None, (did_you_mean(known, list(row)) for known in names)), "")
    raise RowError(f"{called}: missing, wanted {wanted}{hint}")
