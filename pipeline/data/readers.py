"""A file or hub data set -> Examples: the one door for data. All that is not kept is counted and reported.

result = read("pairs.jsonl.gz", filters=Filters(exclude=("tie", "abrupt")))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from pipeline.data.fields import Columns, RowError, described
from pipeline.data.files import RawRow, candidate_header, is_tab_separated, raw_rows, stem
from pipeline.data.formats import FORMATS, detect, unused_columns
from pipeline.errors import UserError, did_you_mean
from pipeline.records import Example

NAMED = 3  # bad rows that a message quotes
LISTED_SOURCES = 12  # sources that a message lists
RESPONSES = ("completion", "response", "output", "chosen", "rejected", "suffix")
TRUTHS = {"true": True, "1": True, "false": False, "0": False}
ABRUPT, SOURCE = "abrupt ending", "source"  # reasons to drop a row, beside the names of truth-value columns


@dataclass(frozen=True)
class Filters:
    """Which rows to leave out; a row is counted under the first reason that fits, in this order.

    exclude: names of truth-value columns; a row goes where one is true. Every row must have them all.
    drop_abrupt: a row goes if one of its responses is empty or ends with ":" (cleaning rule of the A-LOL release).
    sources: only rows of these sources stay.
    """

    exclude: tuple[str, ...] = ()
    drop_abrupt: bool = False
    sources: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ReadResult:
    """What a file held. rows_read == len(examples) + len(bad_rows) + sum(dropped.values())."""

    examples: list[Example]
    format: str
    bad_rows: list[str]  # "file:line: column: found, wanted"
    rows_read: int
    dropped: dict[str, int] = field(default_factory=dict)  # number of rows by the reason that left them out


class _Outcome(NamedTuple):
    """What became of one row: `bad` and `dropped` are reasons, empty for a row that stays."""

    example: Example | None = None
    bad: str = ""
    dropped: str = ""


def read(
    path: str,
    format: str | None = None,
    filters: Filters | None = None,
    max_bad_rows: int = 0,
    report: Callable[[str], None] = print,
) -> ReadResult:
    """The Examples of a local file, or of a hub data set `owner/name[/folder][@revision][:split]`, in their order.

    Without `format` the first row's columns decide. Ids default to "<file stem>/<line>". `report` gets one line.
    Raises UserError for an unreadable or empty file, an unknown format, more than `max_bad_rows` bad rows, a filter
    that names what is not there, and when no row is left.
    """
    filters = filters or Filters()
    rows, first = _peek(path, format)
    format = format or _detected(path, first)
    _check_flags(path, first, filters.exclude)
    outcomes = [_outcome(path, row, format, filters) for row in rows]
    bad = [outcome.bad for outcome in outcomes if outcome.bad]
    _check_bad(path, bad, len(outcomes), max_bad_rows)
    kept = [outcome.example for outcome in outcomes if not outcome.bad and not outcome.dropped]
    dropped = Counter(outcome.dropped for outcome in outcomes if outcome.dropped)
    sources = Counter(outcome.example.source for outcome in outcomes if outcome.example is not None)
    if not kept:
        raise _nothing_left(path, dropped, sources, filters)
    result = ReadResult(kept, format, bad, len(outcomes), dict(dropped))
    report(_summary(path, result, unused_columns(first.columns, format), sources, filters))
    return result


def _peek(path: str, format: str | None) -> tuple[Iterable[RawRow], RawRow]:
    """(all rows, the first sound one), the file's rows still being read one by one."""
    if format is not None and format not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(
            f"data.format: '{format}' is no format, wanted one of {known}{did_you_mean(format, [*FORMATS])}"
        )
    headerless = format == "candidates_tsv" and is_tab_separated(path) and Path(path).is_file()
    rows = raw_rows(path, header=candidate_header(path) if headerless else None)
    head = []
    for row in rows:
        head.append(row)
        if not row.fault:
            return chain(head, rows), row
    if not head:
        raise UserError(f"{path}: empty, wanted at least one row; check how the file was made")
    faults = [f"{path}:{row.line}: {row.fault}" for row in head]
    raise UserError(f"{_named(path, faults, len(head))}; no line is a row: check how the file was made")


def _detected(path: str, row: RawRow) -> str:
    try:
        return detect(row.columns)
    except RowError as error:
        raise UserError(
            f"{path}:{row.line}: {error}; rename the columns or name the format with data.format="
        ) from error


def _check_flags(path: str, row: RawRow, names: Sequence[str]) -> None:
    for name in names:
        if name not in row.columns:
            columns = [*row.columns]
            cure = did_you_mean(name, columns) or "; leave it out"
            raise UserError(f"{path}:{row.line}: exclude: no column '{name}', wanted one of {', '.join(columns)}{cure}")


def _outcome(path: str, row: RawRow, format: str, filters: Filters) -> _Outcome:
    try:
        if row.fault:
            raise RowError(row.fault)
        reason = _reason_to_drop(row.columns, filters)
        if reason:
            return _Outcome(dropped=reason)
        example = FORMATS[format].convert(row.columns)
    except RowError as error:
        return _Outcome(bad=f"{path}:{row.line}: {error}")
    example = replace(example, id=example.id or f"{stem(path)}/{row.line}")
    unwanted = filters.sources is not None and example.source not in filters.sources
    return _Outcome(example, dropped=SOURCE if unwanted else "")


def _reason_to_drop(row: Columns, filters: Filters) -> str:
    flagged = next((name for name in filters.exclude if _truth(row, name)), "")
    if flagged:
        return flagged
    return ABRUPT if filters.drop_abrupt and _ends_abruptly(row) else ""


def _truth(row: Columns, name: str) -> bool:
    value = row.get(name)
    known = TRUTHS.get(str(value).lower())
    if known is None:
        raise RowError(f"{name}: {described(value)}, wanted true or false")
    return known


def _ends_abruptly(row: Columns) -> bool:
    values = chain.from_iterable(
        value if isinstance(value, list) else [value] for value in (row.get(name) for name in RESPONSES)
    )
    answers = (value.strip() for value in values if isinstance(value, str))
    return any(not answer or answer.endswith(":") for answer in answers)


def _check_bad(path: str, bad: Sequence[str], rows_read: int, allowed: int) -> None:
    if len(bad) > allowed:
        raise UserError(
            f"{_named(path, bad, rows_read)}; mend the data, or allow them with data.max_bad_rows={len(bad)}"
        )


def _named(path: str, bad: Sequence[str], rows_read: int) -> str:
    """The first bad row, the next ones and the count, on one line."""
    if len(bad) == 1:
        return f"{bad[0]} (1 bad row of {rows_read})"
    following = "; ".join(one.removeprefix(f"{path}:") for one in bad[1:NAMED])
    return f"{bad[0]} ({len(bad)} bad rows of {rows_read}, next {following})"


def _nothing_left(path: str, dropped: Counter, sources: Counter, filters: Filters) -> UserError:
    if dropped[SOURCE]:
        wanted = ", ".join(filters.sources)
        hint = next(filter(None, (did_you_mean(name, [*sources]) for name in filters.sources)), "")
        return UserError(f"{path}: no row of source {wanted}, wanted one of {_counts(sources)}{hint}")
    found = f"all rows dropped ({_counts(dropped)})" if dropped else "only bad rows"
    return UserError(f"{path}: {found}, wanted at least one row; loosen the filters")


def _summary(path: str, result: ReadResult, unused: Sequence[str], sources: Counter, filters: Filters) -> str:
    parts = [f"{path}: {len(result.examples)} of {result.rows_read} rows, format {result.format}"]
    if result.dropped:
        parts.append(f"dropped {_counts(Counter(result.dropped))}")
    if result.bad_rows:
        parts.append(f"bad {_named(path, result.bad_rows, result.rows_read)}")
    if filters.sources is not None:
        parts.append(f"sources there are: {_counts(sources)}")
    unread = [name for name in unused if name not in filters.exclude]
    if unread:
        parts.append(f"columns not used: {', '.join(unread)}")
    return "; ".join(parts)


def _counts(counter: Counter) -> str:
    listed = [f"{name or '(none)'} {count}" for name, count in counter.most_common(LISTED_SOURCES)]
    more = len(counter) - len(listed)
    return ", ".join(listed) + (f" and {more} more" if more > 0 else "")
