"""How the rows of a file are read, decided from the first of them: names, layout, judgements, format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.data import formats, judgements, layouts, mapping
from pipeline.data.fields import Columns, RowError, TeachesNothingError, first_of, has, without
from pipeline.data.files import RawRow
from pipeline.data.judgements import Judging
from pipeline.errors import UserError

NO_JUDGEMENT = Judging({}, {})
JUDGE = tuple(judgements.NAMES)  # a `reward` that only some rows have is read wherever it stands


@dataclass(frozen=True)
class RowReading:
    """What every row of one file goes through on its way to a format's columns."""

    format: str
    given: mapping.Given
    layout: str | None
    judged: Judging
    notes: tuple[str, ...]  # what was chosen, in words
    single: str | None  # the column that is the reward of each row, where it is called so
    scaled: bool  # the rewards were not called so: their range is worth a word

    def of(self, row: Columns) -> Columns:
        """The columns of a row under our names. Raises RowError, TeachesNothingError."""
        row = mapping.mapped(row, self.given)
        row = layouts.LAYOUTS[self.layout].rewrite(row) if self.layout else row
        other = first_of(row, formats.REWARD)
        if self.single is not None and other not in (None, self.single):
            raise RowError(
                f"{self.single}: no value, wanted a finite number as in other rows (`{other}` may have another scale: "
                f"data.columns='{{reward: {other}}}' takes it for all rows)"
            )
        return judgements.named(row, self.judged)

    def spoken(self, error: RowError) -> str:
        """The error of a row, with what the file calls our column that it begins with."""
        column = str(error).partition(":")[0].partition("[")[0]
        if column in self.given:
            return f"{error} (data.columns: {mapping.spoken({column: self.given[column]})})"
        return f"{error} (read as {self.layout})" if self.layout else str(error)


def decide(file: str, rows: Sequence[RawRow], format: str | None, given: mapping.Given) -> RowReading:
    """How to read a file that begins with `rows`. Raises UserError where nothing that is known fits."""
    mapping.check(file, given, [row.columns for row in rows])
    renamed = [mapping.mapped(row.columns, given) for row in rows]
    layout = layouts.of(filled(renamed))
    if layout is not None:
        renamed = _rewritten(file, rows, renamed, layout)
    judged = _judged(renamed, given) if format in (None, "scored") else NO_JUDGEMENT
    try:
        first = filled(renamed)
        if judged.kinds or judged.attributes:  # of several rows: their `rewards` need not agree with one row's columns
            first = judgements.named(without(first, "rewards"), judged)
        format = format or formats.detect(first)
    except RowError as error:
        raise UserError(
            f"{file}:{rows[0].line}: {error}; say which is which with data.columns='{{prompt: ..., completion: ..., "
            "reward: ...}', or name the format with data.format="
        ) from error
    notes = _notes(rows[0].columns, given, layout, judged, format)
    scaled = bool(judged.kinds) or "reward" in given or "candidate_rewards" in first or "candidates" in first
    single = first_of(first, formats.REWARD) if format == "scored" else None
    if beside := [name for name in formats.REWARD if single not in (None, name) and has(first, name)]:
        notes = (*notes, f"{beside[0]} is not read: the reward is {single}")
    return RowReading(format, given, layout, judged, notes, single, scaled or layout is not None)


def filled(rows: Sequence[Columns]) -> Columns:
    """The first row; where it has no value, that of the first which has one: what a file is hangs on no gap.

    Of columns that the first row has not, those count that judge: logs write them where there is a judgement alone.
    """
    first = dict(rows[0])
    first |= {name: None for name in JUDGE if name not in first and any(has(row, name) for row in rows)}
    for name in [name for name, value in first.items() if value is None]:
        first[name] = next((row[name] for row in rows if has(row, name)), None)
    return first


def _rewritten(file: str, rows: Sequence[RawRow], renamed: Sequence[Columns], layout: str) -> list[Columns]:
    """The rows of which `layout` makes ours. Raises UserError where it makes any of none."""
    made, errors = [], []
    for raw, row in zip(rows, renamed, strict=True):
        try:
            made.append(layouts.LAYOUTS[layout].rewrite(row))
        except (RowError, TeachesNothingError) as error:
            errors.append(f"{file}:{raw.line}: {error} (read as {layout}; none of the first {len(rows)} rows is sound)")
    if not made:
        raise UserError(errors[0])
    return made


def _judged(rows: Sequence[Columns], given: mapping.Given) -> Judging:
    """The columns that judge the response of each row; none where it has a reward, or no response."""
    first = filled(rows)
    if has(first, "chosen") or has(first, "candidates") or not formats.has_completion(first):
        return NO_JUDGEMENT
    attributes = judgements.attributes(rows)
    if "reward" in given:  # it may be a label, thumbs or stars
        return judgements.find(rows, ["reward"])._replace(unread={}, attributes=attributes)
    judged_already = any(has(first, name) for name in (*formats.REWARD, "rewards"))
    names = [] if judged_already else [name for name in judgements.NAMES if name in first]
    return judgements.find(rows, names)._replace(attributes=attributes)


def _notes(row: Columns, given: mapping.Given, layout: str | None, judged: Judging, format: str) -> tuple[str, ...]:
    """What was chosen for a file that begins with `row`, in words."""
    notes = [mapping.spoken(given)] if given else []
    notes += [f"own {name} not read" for name in given if name in row and name not in given.values()]
    if layout is not None:
        said = layouts.LAYOUTS[layout].says(mapping.mapped(row, given))
        notes.append(f"layout {layout}" + (f": {said}" if said else ""))
    if len(judged.kinds) == 1 and not judged.attributes:
        ((name, kind),) = judged.kinds.items()
        notes.append(f"the reward is {given.get(name, name)}, {kind}")
    notes += [f"{name} is no reward: {why}" for name, why in judged.unread.items()]
    said = formats.FORMATS[format].says
    return (*notes, said) if said else tuple(notes)
