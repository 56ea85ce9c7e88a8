"""Columns of a file under our names, as data.columns says: {prompt: question, reward: annotations.quality}."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pipeline.data.fields import Columns
from pipeline.data.judgements import ATTRIBUTES
from pipeline.data.messages import COLUMNS
from pipeline.errors import UserError, did_you_mean

Given = Mapping[str, str | Sequence[str]]  # our column -> the file's; of `rewards` one or several

TARGETS = (
    "prompt",
    "completion",
    "messages",
    "reward",
    "rewards",
    "chosen",
    "rejected",
    "chosen_reward",
    "rejected_reward",
    "margin",
    "correctness",
    "better",
    "candidates",
    "candidate_rewards",
    "references",
    "instruction",
    "input",
    "history",
    "text",
    "id",
    "source",
    *COLUMNS,
)
MISSING = object()


def check(file: str, given: Given, rows: Sequence[Columns]) -> None:
    """Raises UserError for a name of ours that there is not, and for one of the file that none of `rows` has."""
    for target, names in given.items():
        if target not in TARGETS:
            raise UserError(
                f"data.columns: '{target}' is no column that is read here, wanted one of {', '.join(TARGETS)}"
                f"{did_you_mean(target, TARGETS)}"
            )
        if not names:
            raise UserError(f"data.columns: {target}: {names!r}, wanted the name of a column")
        if not isinstance(names, str) and target != "rewards":
            raise UserError(f"data.columns: {target}: {list(names)}, wanted one name: only `rewards` takes several")
        if len(short := {_last(name) for name in _listed(names)}) < len(_listed(names)):
            raise UserError(
                f"data.columns: {target}: {', '.join(_listed(names))} would be called {', '.join(sorted(short))}, "
                "wanted names that end differently: name one of them, or rename the column"
            )
        for name in _listed(names):
            if all(value_at(row, name) is MISSING for row in rows):
                place, there = _nearest(name, rows)
                raise UserError(
                    f"{file}: data.columns: {target}: no column '{place}', wanted one of {', '.join(there)}"
                    f"{did_you_mean(place.rpartition('.')[2], there)}"
                )


def mapped(row: Columns, given: Given) -> Columns:
    """The row with the columns that `given` names under our names.

    A column that has gone under another name is gone; of several attributes the one that became the reward stays one
    of the `rewards`.
    """
    if not given:
        return row
    aspects = {name for name in ATTRIBUTES if name in row}
    gone = {name for names in given.values() for name in _listed(names) if len(aspects) < 2 or name not in aspects}
    kept = {name: value for name, value in row.items() if name not in gone}
    return kept | {target: _taken(row, target, names) for target, names in given.items()}


def spoken(given: Given) -> str:
    """prompt is question, reward is annotations.quality"""
    return ", ".join(f"{target} is {' and '.join(_listed(names))}" for target, names in given.items())


def value_at(holder: object, path: str) -> object:
    """What lies at a dotted path, else under that name in `rewards`; MISSING where nothing does.

    A list gives a list: what lies there in each entry.
    """
    if isinstance(holder, list | tuple):
        found = [value_at(entry, path) for entry in holder]
        nowhere = all(value is MISSING for value in found)
        return MISSING if nowhere else [None if value is MISSING else value for value in found]
    if not isinstance(holder, Mapping):
        return MISSING
    if path in holder:
        return holder[path]
    head, dot, rest = path.partition(".")
    return value_at(holder[head], rest) if dot and head in holder else value_at(holder.get("rewards"), path)


def _taken(row: Columns, target: str, names: str | Sequence[str]) -> object:
    values = {_last(name): _value(row, name) for name in _listed(names)}
    first = next(iter(values.values()))
    if target != "rewards" or (isinstance(names, str) and isinstance(first, Mapping)):
        return first
    return {name: float(value) if isinstance(value, bool) else value for name, value in values.items()}


def _value(row: Columns, name: str) -> object:
    value = value_at(row, name)
    return None if value is MISSING else value


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _listed(names: str | Sequence[str]) -> Sequence[str]:
    return [names] if isinstance(names, str) else names


def _nearest(name: str, holders: Iterable[object], before: str = "") -> tuple[str, list[str]]:
    """(the path up to where it leads no further, what there is in that place)."""
    head, _, rest = name.partition(".")
    flat = [one for holder in holders for one in (holder if isinstance(holder, list | tuple) else [holder])]
    there = [one for one in flat if isinstance(one, Mapping)]
    inside = [one[head] for one in there if head in one]
    if inside and rest:
        return _nearest(rest, inside, f"{before}{head}.")
    return f"{before}{head}", [*dict.fromkeys(str(key) for one in there for key in one)]
