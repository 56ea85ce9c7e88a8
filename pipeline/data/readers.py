"""The rows of a file or hub data set as Examples. Rows that are left out are counted, and the counts logged.

result = read("pairs.jsonl.gz", filters=Filters(exclude=("tie", "abrupt")))
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

from pipeline.data import mapping, messages, reading, remarks
from pipeline.data.columns import example_of, further, refused
from pipeline.data.fields import Columns, RowError, TeachesNothingError, described
from pipeline.data.files import RawRow, raw_rows, stem
from pipeline.data.formats import FORMATS, used_columns
from pipeline.data.reading import RowReading
from pipeline.data.released import parts_early
from pipeline.data.rewards_seen import RewardsSeen
from pipeline.data.rows import Fix, Rows, Store
from pipeline.data.stored import Names, Sink
from pipeline.errors import UserError, did_you_mean
from pipeline.records import Example

logger = logging.getLogger("tiffin")

HEAD = 1000  # rows that are read before it is known what they are
SHOWN_BAD_ROWS = 3  # in a message
SHOWN_SOURCES = 12  # in a message
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

    exclude: Sequence[str] = ()
    drop_abrupt: bool = False
    sources: Sequence[str] | None = None


@dataclass
class ReadResult:
    """What a file held; each of its rows is an example, bad or dropped."""

    format: str
    kept: Sink | list[Example]  # the rows as they came, before `fix`
    bad_rows: list[str] = field(default_factory=list)  # "file:line: column: found, wanted"
    dropped: Counter[str] = field(default_factory=Counter)  # number of rows by the reason that left them out
    sources: Counter[str] = field(default_factory=Counter)  # number of rows, also of sources that are not wanted
    further: dict[str, str] = field(default_factory=dict)  # columns that no field is made of: why not carried, or ""
    shortened: int = 0  # number of transcripts that go on with the human behind the answer that is read
    overruled: int = 0  # number of rows whose reward is not read, as their last message has one of its own
    rewards: RewardsSeen = field(default_factory=RewardsSeen)
    names: Names = field(default_factory=Names)  # of further columns, as far as they are carried

    @property
    def fix(self) -> Fix:
        """What all rows are given or lose, now that the last one is read."""
        return Fix(tuple(name for name, why in self.further.items() if why), self.rewards.rewarded)

    @property
    def examples(self) -> Rows:
        """The rows, of those that were read into a list."""
        return Rows.whole([Store(self.kept, fix=self.fix)])

    @property
    def rows_read(self) -> int:
        return len(self.kept) + len(self.bad_rows) + self.dropped.total()


def read(
    path: str,
    format: str | None = None,
    filters: Filters | None = None,
    max_bad_rows: int = 0,
    carry: bool = False,
    columns: mapping.Given | None = None,
    name: str = "",
    most: int | None = None,
    sink: Sink | None = None,
) -> ReadResult:
    """The Examples of a local file, or of a hub data set `owner/name[/folder][@revision][:split]`, in their order.

    `columns` says which of the file's columns are ours: {our name: theirs}. Without `format` the first row's columns
    decide, those that have a value in one of the first HEAD rows. Ids default to "<name>/<line>", the name to the
    file's stem. With `carry` Examples keep the columns that the format does not use, for rewards. One line is logged.
    They go into `sink`, where one is given, as they come; else they are in memory as `examples`. With `most` reading
    ends with so many Examples: what follows is neither fetched nor refused.

    Raises UserError for an unreadable or empty file, an unknown format, more than `max_bad_rows` bad rows, a filter or
    `columns` that name what is not there, and when no row is left.
    """
    filters = filters or Filters()
    rows, sound = _peek(path, format, streaming=most is not None)
    first = RawRow(sound[0].line, reading.filled([row.columns for row in sound]))
    how = reading.decide(path, sound, format, columns or {})
    _check_flags(path, first, filters.exclude)
    result = _read_rows(path, rows, how, filters, carry, name, sink, most)
    _refuse_bad(path, result, max_bad_rows)
    if not len(result.kept):
        raise _nothing_left(path, result, filters)
    ended = len(result.kept) == most
    logger.info(_summary(path, result, how, filters, carry) + "; a stream that is read no further" * ended)
    unread = [name for name, why in result.further.items() if why or not carry]
    others = {name: value for name, value in first.columns.items() if name not in how.judged.attributes}
    if lost := remarks.of_columns(others, [name for name in unread if name not in filters.exclude]):
        logger.warning(f"{path}: not read, though it bears on what is learned: {'; '.join(lost)}")
    return result


def head(
    path: str,
    format: str | None,
    filters: Filters,
    max_bad_rows: int,
    columns: mapping.Given | None = None,
    streaming: bool = False,
) -> Rows:
    """The Examples among the first rows of a local file: what `read` refuses of them is refused, and nothing logged."""
    rows, sound = _peek(path, format, streaming)
    how = reading.decide(path, sound, format, columns or {})
    _check_flags(path, sound[0], filters.exclude)
    rows = iter(rows)
    result = _read_rows(path, islice(rows, HEAD), how, filters, carry=False)
    _refuse_bad(path, result, max_bad_rows, more=next(rows, None) is not None)
    return result.examples


def _refuse_bad(path: str, result: ReadResult, most: int, more: bool = False) -> None:
    """Raises UserError where there are too many bad rows; `more`: there are rows behind those that were read."""
    if (bad := len(result.bad_rows)) > most:
        found = _first_bad(path, result.bad_rows, f"the first {result.rows_read}" if more else result.rows_read)
        number = f"{bad} or more" if more else bad
        raise UserError(f"{found}; fix the data, or allow them with data.max_bad_rows={number}")


def _peek(path: str, format: str | None, streaming: bool) -> tuple[Iterable[RawRow], list[RawRow]]:
    """(all rows, the sound ones among the first), most of the file's rows still being read one by one."""
    if format is not None and format not in FORMATS:
        known = ", ".join(FORMATS)
        raise UserError(f"data.format: '{format}' is no format, wanted one of {known}{did_you_mean(format, FORMATS)}")
    rows = iter(raw_rows(path, format == "candidates_tsv", streaming))
    head = [*islice(rows, HEAD)]
    while head and head[-1].error and (row := next(rows, None)):
        head.append(row)
    if not head:
        raise UserError(f"{path}: empty, wanted at least one row; check how the file was made")
    sound = [row for row in head if not row.error]
    if not sound:
        errors = [f"{path}:{row.line}: {row.error}" for row in head]
        raise UserError(f"{_first_bad(path, errors, len(head))}; no line is a row: check how the file was made")
    return chain(head, rows), sound


def _check_flags(path: str, row: RawRow, names: Sequence[str]) -> None:
    for name in names:
        if name not in row.columns:
            columns = [*row.columns]
            cure = did_you_mean(name, columns) or "; leave it out"
            raise UserError(f"{path}:{row.line}: exclude: no column '{name}', wanted one of {', '.join(columns)}{cure}")


def _read_rows(
    path: str,
    rows: Iterable[RawRow],
    how: RowReading,
    filters: Filters,
    carry: bool,
    name: str = "",
    sink: Sink | None = None,
    most: int | None = None,
) -> ReadResult:
    """Every row once, from its columns to an Example or to the reason why it is none."""
    name = name or stem(path)
    result, form, used = (
        ReadResult(how.format, [] if sink is None else sink),
        FORMATS[how.format],
        used_columns(how.format),
    )
    for row in rows:
        example, more, whys = None, {}, {}
        try:
            if row.error:
                raise RowError(row.error)
            reason = _flag(row.columns, filters)
            if not reason:
                columns = how.of(row.columns)
                reason = ABRUPT if filters.drop_abrupt and _ends_abruptly(columns) else ""
            if not reason:
                more = further(columns, used)
                whys = {column: refused(column, value) if carry else "" for column, value in more.items()}
                carried = {column: value for column, value in more.items() if not whys[column]} if carry else None
                example = example_of(columns, form.read(columns), f"{name}/{row.line}", carried)
        except RowError as error:
            result.bad_rows.append(f"{path}:{row.line}: {row.error or how.spoken(error)}")
            continue
        except TeachesNothingError as error:
            reason = str(error)
        if example is not None:
            result.sources[example.source] += 1
            # only now: some formats keep the source in a column of another name
            reason = SOURCE if filters.sources is not None and example.source not in filters.sources else ""
        if reason:
            result.dropped[reason] += 1
        else:
            _keep(result, example, whys)
            result.shortened += how.format == "hh" and parts_early(columns)
            result.overruled += messages.overrules(columns)
            if len(result.kept) == most:
                break
    return result


def _keep(result: ReadResult, example: Example, whys: Mapping[str, str]) -> None:
    """Note a row that stays; `whys`: its further columns, and why each is not carried, "" where it is."""
    result.kept.append(example)
    result.rewards.see(example)
    result.names.see(example)
    for column, why in whys.items():
        if not result.further.get(column):
            result.further[column] = why


def _flag(row: Columns, filters: Filters) -> str:
    return next((name for name in filters.exclude if _truth(row, name)), "")


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


def _first_bad(path: str, bad: Sequence[str], rows_read: int | str) -> str:
    """The first bad row, the next ones and the count, on one line."""
    if len(bad) == 1:
        return f"{bad[0]} (1 bad row of {rows_read})"
    following = "; ".join(one.removeprefix(f"{path}:") for one in bad[1:SHOWN_BAD_ROWS])
    return f"{bad[0]} ({len(bad)} bad rows of {rows_read}, next {following})"


def _nothing_left(path: str, result: ReadResult, filters: Filters) -> UserError:
    if result.dropped[SOURCE]:
        wanted = ", ".join(filters.sources)
        hint = next(filter(None, (did_you_mean(name, [*result.sources]) for name in filters.sources)), "")
        return UserError(f"{path}: no row of source {wanted}, wanted one of {_counts(result.sources)}{hint}")
    if not result.dropped:
        return UserError(f"{_first_bad(path, result.bad_rows, result.rows_read)}; no row is left: fix the data")
    return UserError(
        f"{path}: all rows dropped ({_counts(result.dropped)}), wanted at least one row; loosen the filters"
    )


def _summary(path: str, result: ReadResult, how: RowReading, filters: Filters, carry: bool) -> str:
    parts = [f"{path}: {len(result.kept)} of {result.rows_read} rows, format {result.format}"]
    parts += [*how.notes, *result.rewards.spoken(how.scaled)]
    if result.dropped:
        parts.append(f"dropped {_counts(result.dropped)}")
    if result.bad_rows:
        parts.append(f"bad {_first_bad(path, result.bad_rows, result.rows_read)}")
    if result.shortened:
        parts.append(f"transcripts that part before their last turn {result.shortened}, read up to the human's next")
    if result.overruled:
        parts.append(f"rows with a reward beside that of their last message {result.overruled}: the message's counts")
    if filters.sources is not None:
        parts.append(f"sources there are: {_counts(result.sources)}")
    carried = [name for name, why in result.further.items() if carry and not why]
    if carried:
        parts.append(f"columns carried along: {', '.join(carried)}")
    unread = [name for name in result.further if name not in carried and name not in filters.exclude]
    if unread:
        reasons = {name: f" ({why})" if (why := result.further[name]) else "" for name in unread}
        parts.append(f"columns not used: {', '.join(name + why for name, why in reasons.items())}")
    return "; ".join(parts)


def _counts(counter: Counter[str]) -> str:
    listed = [f"{name or '(none)'} {count}" for name, count in counter.most_common(SHOWN_SOURCES)]
    more = len(counter) - len(listed)
    return ", ".join(listed) + (f" and {more} more" if more > 0 else "")
