"""A settings mapping against its pydantic schema; whatever is wrong becomes one line with the place it came from."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.config.aliases import ALIASES
from pipeline.errors import UserError, did_you_mean

SettingPath = tuple[str, ...]  # ("optimizer", "learning_rate")

WANTED = {
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("int_type", "int_parsing"), "a whole number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a mapping"),
    "string_type": "text",
    "list_type": "a list",
    "none_required": "null",
    "finite_number": "a finite number",
}
LIMITS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def known_paths(schema: type[BaseModel]) -> Iterator[SettingPath]:
    """Every settable path of `schema`, sections before what they hold."""
    return (path for path, _ in known_fields(schema))


def known_fields(schema: type[BaseModel], prefix: SettingPath = ()) -> Iterator[tuple[SettingPath, Any]]:
    """The same paths, each with its type."""
    for name, field in schema.model_fields.items():
        path = (*prefix, name)
        yield path, field.annotation
        for part in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from known_fields(part, path)


def text_paths(schemas: Iterable[type[BaseModel]]) -> dict[SettingPath, bool]:
    """The settings that hold text and nothing else, in all of `schemas` that have them; and whether null is one too."""
    members: dict[SettingPath, set[Any]] = {}
    for schema in schemas:
        for path, annotation in known_fields(schema):
            members.setdefault(path, set()).update(_members(annotation))
    return {path: type(None) in kinds for path, kinds in members.items() if kinds - {type(None)} == {str}}


def _members(annotation: Any) -> Iterator[Any]:
    """The types that a union is of, or the one; without what Annotated adds."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        yield from _members(inside[0])
    elif origin in (typing.Union, types.UnionType):
        for one in inside:
            yield from _members(one)
    else:
        yield annotation if origin is None else origin


def validated(
    schema: type[BaseModel],
    mapping: Mapping[str, Any],
    places: Mapping[SettingPath, str],
    known: Iterable[SettingPath],
) -> BaseModel:
    """`mapping` as an instance of `schema`.

    `places` says for each path where its value was written, `known` what a wrong one may stand for. Raises UserError
    for the first error, with a count of the others.
    """
    try:
        return schema.model_validate(mapping)
    except ValidationError as error:
        by_path: dict[SettingPath, list[Any]] = {}
        for one in error.errors(include_url=False):
            by_path.setdefault(_real_path(one, mapping), []).append(one)
    path = next(iter(by_path))
    inside = [other for other in by_path if other[: len(path)] == path]  # of a union, the member that came furthest
    path = max(inside, key=len)
    more = len(by_path) - len(inside)
    others = f" (and {more} more)" if more else ""
    where = f"{_place(path, places)}: " + (f"{'.'.join(path)}: " if path else "")  # a rule about several has no path
    raise UserError(f"{where}{_complaint(known, path, by_path[path])}{others}")


def nearest_path(wrong: SettingPath, known: Iterable[SettingPath]) -> str:
    """ "; did you mean 'a.b'?" for a dotted path: the whole path first, then a setting of the same last name."""
    known = list(known)
    by_last_name = {path[-1]: path for path in reversed(known)}
    whole = did_you_mean(".".join(wrong), [".".join(path) for path in known])
    if wrong[-1] in by_last_name:
        return f"; did you mean {'.'.join(by_last_name[wrong[-1]])!r}?"
    if whole:
        return whole
    near = difflib.get_close_matches(wrong[-1], list(by_last_name), n=1, cutoff=0.7)
    return f"; did you mean {'.'.join(by_last_name[near[0]])!r}?" if near else ""


def _nearest_name(wrong: SettingPath, known: Sequence[SettingPath]) -> str:
    """As `nearest_path`, but a short name comes first."""
    short = [name for name, target in ALIASES.items() if tuple(target.split(".")) in known]
    exact = wrong[-1] if wrong[-1] in short else ".".join(wrong)  # `train.lr`
    return did_you_mean(exact, short) or nearest_path(wrong, known)


def describe(value: Any) -> str:
    """A value as a user wrote it, cut at 60 characters."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)  # null, true, false
    return text if len(text) <= 60 else text[:57] + "..."


def _real_path(error: Any, mapping: Mapping[str, Any]) -> SettingPath:
    """The path of an error without the names that pydantic adds for the members of a union."""
    path: list[str] = []
    here: Any = mapping
    for part in error["loc"]:
        if (isinstance(here, Mapping) and part in here) or (isinstance(here, list) and isinstance(part, int)):
            here = here[part]
        elif not (isinstance(here, Mapping) and error["type"] == "missing"):
            continue
        path.append(str(part))
    return tuple(path)


def _place(path: SettingPath, places: Mapping[SettingPath, str]) -> str:
    """Where `path` was written: its own place, that of what it lies in, or of the first thing that lies in it."""
    for length in range(len(path), 0, -1):
        if path[:length] in places:
            return places[path[:length]]
    inside = [place for other, place in places.items() if other[: len(path)] == path]
    return inside[-1] if inside else "settings"


def _complaint(known: Iterable[SettingPath], path: SettingPath, errors: list[Any]) -> str:
    first = errors[0]
    if first["type"] == "extra_forbidden":
        return "no such setting" + (_nearest_name(path, list(known)) or "; see stage=help")
    if first["type"] == "missing":
        return "missing; the defaults in stages/*.yaml should give it"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    wanted = " or ".join(dict.fromkeys(_wanted(error) for error in errors))
    value = first["input"]
    if first["type"] in WANTED and isinstance(value, str):
        return f"{describe(value)} is text, wanted {wanted}"
    # of a literal error: "'llama', 't5' or 'bart'" -> llama, t5, bart
    choices = first["ctx"]["expected"].split("'")[1::2] if first["type"] == "literal_error" else []
    near = did_you_mean(value, choices) if isinstance(value, str) else ""
    return f"{describe(value)}, wanted {wanted}{near}"


def one_complaint(error: ValidationError) -> tuple[SettingPath, str]:
    """The path of the first error of any pydantic schema, and what was found and wanted there."""
    first = error.errors(include_url=False)[0]
    path = tuple(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return path, "missing, wanted a value"
    if first["type"] in ("value_error", "assertion_error"):
        return path, str(first["ctx"]["error"])
    return path, f"{describe(first['input'])}, wanted {_wanted(first)}"


def _wanted(error: Any) -> str:
    kind = error["type"]
    if kind in LIMITS:
        key, words = LIMITS[kind]
        return f"{words} {error['ctx'][key]:g}"
    if kind == "too_short":
        return f"at least {error['ctx']['min_length']} of them"
    if kind == "literal_error":
        return error["ctx"]["expected"].replace("'", "")
    return WANTED[kind] if kind in WANTED else error["msg"].removeprefix("Input should be ")
