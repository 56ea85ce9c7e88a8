"""Which examples a stage sees: of a task, files or the hub; split, filtered, converted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache as once_only
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import plugins
from pipeline.config.sections import DataSettings, TemplateSettings
from pipeline.data import columns, convert, hub, mixing, readers, remarks
from pipeline.data.cache import Cache, Writer, digest, say
from pipeline.data.rows import Fix, Rows, Store
from pipeline.data.splits import Places, id_names_of, origins, split_places
from pipeline.data.stored import SCHEMA, Sink
from pipeline.data.template import prompt_text, response_text
from pipeline.errors import UserError
from pipeline.files import fingerprint
from pipeline.records import Example, text_of

logger = logging.getLogger("tiffin")

# by which of these rows are cut into training and validation: the first in which they differ; facts of `rows.FACTS`
KEYS = ("prompt", "answers", "id")
LARGE = 1 << 28  # bytes of a file of which it is said that it will be read
CUTS_TOLD = 0.1  # the share of responses that may lose their end without a warning


def splits(
    data: DataSettings,
    seed: int,
    names: Sequence[str] = ("train", "validation"),
    carry: bool = False,
    folder: Path | None = None,
) -> Iterator[Rows]:
    """The rows of each split of `names`, one split after the other. A file is read once, whatever it serves for.

    With `carry`, rows of files keep the columns that their format does not use, for rewards and for what is written.
    What is read is kept in `folder`, a run's cache: other ranks and later starts map it. Without, it is in memory.

    Where there is no validation split, `held_out` cuts it from train. Raises UserError where no data is named, or what
    is named cannot be read or lacks a split, or a split has no rows.
    """
    if data.task is not None:
        rows = {name: Rows.of(_of_task(data, name, seed)) for name in names}
    else:
        places = split_places(data)
        rows = _of_files(data, places, names, carry, None if folder is None else Cache(folder, data.workers))
    rows = columns.filled(rows)
    for name in names:
        if not rows[name]:
            raise UserError(f"data: the {name} split has no rows, wanted at least one: {_cure(data)}")
        if data.task is None:
            turns = remarks.of_turns(name, rows[name]) if name == names[0] else ()
            for line in (*remarks.of_rows(name, rows[name]), *turns):
                logger.info(line)
            yield _mixed(name, rows[name], places, seed)
        else:
            yield rows[name]


def _mixed(split: str, rows: Rows, places: Places, seed: int) -> Rows:
    """The rows, those of train as often as the weight of their file says; several files are summed up."""
    weights = places[split] if split in places else dict.fromkeys(places["train"], 1.0)
    plain, files = {*weights.values()} == {1.0}, [store.file for store in rows.stores]
    counts = np.ones(len(rows), np.int64) if plain else mixing.weighed(rows, [weights[file] for file in files], seed)
    if not plain or len(weights) > 1:
        for line in mixing.summed_up(split, rows, files, weights, counts):
            logger.info(line)
    return rows if plain else mixing.repeated(rows, counts)


def _cure(data: DataSettings) -> str:
    if data.task is not None and data.sources is not None:
        return f"does task {data.task} have rows of data.sources ({', '.join(data.sources)})?"
    if data.task is not None:
        return f"choose another split, or let task {data.task} make some"
    return "one row cannot be cut in two: give data.validation="


def _of_task(data: DataSettings, split: str, seed: int) -> list[Example]:
    make = plugins.load(data.task, "pipeline.tasks", "data.task", "examples")
    size = data.task_size if split == "train" else None
    place = f"data.task {data.task}, called with ({split!r}, {seed}, {size})"
    rows = plugins.guarded(place, lambda: make(split, seed, size))
    if not isinstance(rows, list) or not all(isinstance(row, Example) for row in rows):
        wrong = next((row for row in rows if not isinstance(row, Example)), rows) if isinstance(rows, list) else rows
        raise UserError(f"{place}: it returned {wrong!r:.60}, wanted a list of pipeline.records.Example")
    columns.checked_columns(rows, place)
    kept = [row for row in rows if data.sources is None or row.source in data.sources]
    return kept[: data.max_rows] if split == "train" else kept


def _of_files(
    data: DataSettings, places: Places, names: Sequence[str], carry: bool, cache: Cache | None
) -> dict[str, Rows]:
    """Of each split the rows before any weight; what is held out is cut from the union."""
    fraction, ids, origin = data.validation_fraction, id_names_of(places), origins(data, names)
    cut = "train" in places and "validation" not in places  # validation is a part of train
    most = data.max_rows if data.streaming else None
    read = once_only(lambda file, left: _read(file, data, carry, ids[file], cache, left))  # whatever it serves for
    whole = {name: Rows.whole([*_first(some, most, read)]) for name, some in origin.items()}
    rows = {name: some.take(slice(data.max_rows if name == "train" else None), name) for name, some in whole.items()}
    asked = [name for name in ("train", "validation") if name in rows]
    if cut and fraction > 0 and asked:
        apart = held_out(whole[asked[0]], fraction, data.max_rows)
        for name in asked:
            mine = apart[: len(rows[name])]
            rows[name] = rows[name].take(mine if name == "validation" else ~mine)
    elif len(asked) == 2:
        for line in remarks.of_splits(*(rows[name] for name in asked)):
            logger.warning(line)
    return rows


def held_out(rows: Rows, fraction: float, most: int | None) -> np.ndarray:
    """(n,) bool, which rows of a training file are for validation: those of `fraction` of its prompts, by their hash.

    All rows of one prompt stay together; only where all have the same, or none, their texts decide, or ids. Of two or
    more at least one is held out, and of the first `most` rows at least one is not.
    """
    chats = rows.column("is_chat")
    keys = ("asked", *KEYS[1:]) if chats.any() and not chats.all() else KEYS
    for key in keys:
        hashes, of_row, counts = np.unique(rows.column(key), return_inverse=True, return_counts=True)
        if len(hashes) > 1:
            break
    places = hashes.astype(np.float64) / 2**64
    # where chance leaves nothing to learn, what has most rows stays; where it holds nothing out, what has fewest goes
    first = np.unique(of_row[:most])
    kept = first[np.lexsort((places[first], counts[first], places[first] >= fraction))[-1:]]
    apart = places < fraction
    apart[kept] = False
    others = np.lexsort((places, counts))
    if not apart.any():
        apart[others[~np.isin(others, kept)][:1]] = True
    if len(rows) > 1:
        held = f"{int(counts[apart].sum()):,} of {len(rows):,} rows"
        by_row = f"all {len(rows):,} rows have one prompt, or none: cut by row, not by prompt; {held}"
        by_prompt = f"{held} ({int(apart.sum()):,} of {len(counts):,} prompts)"
        logger.info(
            f"validation: {by_prompt if key == keys[0] else by_row} are held out of train by "
            f"data.validation_fraction={fraction:g}, at least one is; data.validation=FILE names others"
        )
    return apart[of_row]


def _first(places: Iterable[Any], most: int | None, read: Callable[[Any, int | None], list[Store]]) -> Iterator[Store]:
    """The stores that `read` makes of the places, one after the other: of so many rows in all, None for all rows."""
    left = most
    for place in places:
        if left == 0:
            return
        found = read(place, left)
        left = None if left is None else left - sum(map(len, found))
        yield from found


def _read(place: str, data: DataSettings, carry: bool, name: str, cache: Cache | None, most: int | None) -> list[Store]:
    """The first `most` rows of a file or hub name; ids begin with `name`, but of a hub set's folders with theirs."""
    folders = hub.folders(place, data.sources or []) if hub.is_hub_name(place) else {}
    if folders:  # a hub set keeps each source in a folder of its own
        whole = data.model_copy(update={"sources": None})

        def of_source(source: str, left: int | None) -> list[Store]:
            found = _read(folders[source], whole, carry, "", cache, left)
            return [replace(store, file=place, fix=replace(store.fix, source=source)) for store in found]

        return [*_first(folders, most, of_source)]
    filters = readers.Filters(data.exclude, data.drop_abrupt, data.sources)
    asked = (place, data.format, filters, data.max_bad_rows, carry, data.columns, name, most)
    if cache is None:
        result = readers.read(*asked)
        return [Store(result.kept, place, fix=result.fix)]
    return [stored(cache, *asked)]


def stored(cache: Cache, place: str, *asked: Any) -> Store:
    """What `readers.read` makes of a file, kept in the cache; what it logs is logged each time.

    Raises UserError as it does, and where the file changes while it is read.
    """

    def make(writer: Writer) -> dict[str, Any]:
        sink = Sink(writer)
        result = readers.read(place, *asked, sink=sink)
        sink.flush()
        if mark(place, streaming) != found:
            raise UserError(f"{place}: it changed while it was read, wanted a file that stays: start again")
        return result.names.facts() | {"without": result.fix.without, "reward": result.fix.reward}

    *_, most = asked
    streaming = most is not None
    found = mark(place, streaming)
    user = ["file", place, *map(plain, asked)]
    key = [*user, found]
    size = Path(place).stat().st_size if Path(place).is_file() else 0
    before = f"{place}: {size / 1e9:.1f} GB to read, once per machine" if size > LARGE else ""
    if streaming:
        before = f"{place}: its first {most:,} rows to read, once per machine"
    entry = cache.entry("rows", user, key, SCHEMA, make, before)
    say(entry.lines)
    fix = Fix(tuple(entry.facts["without"]), entry.facts["reward"])
    return Store(entry, place, digest(key), digest(user), fix, cache)


def mark(place: str, streaming: bool) -> str:
    """What tells the content of a file, or of a hub data set, from any other."""
    return hub.mark(place, streaming) if hub.is_hub_name(place) else fingerprint(place)


def plain(value: Any) -> Any:
    """A setting as JSON has it."""
    return asdict(value) if isinstance(value, readers.Filters) else value


def judgeable(examples: Sequence[Example], data: DataSettings) -> list[Example]:
    """Rows with candidates as they are; of all others those with one response each that `convert.to_scored` makes."""
    return [row for e in examples for row in ([e] if e.candidates else convert.to_scored([e], data.responses))]


def require(examples: Sequence[Example], columns: Sequence[str], why: str) -> None:
    """Raises UserError where a row has no number in one of `columns`, fields of an Example."""
    for column in columns:
        without = np.flatnonzero(np.isnan(Rows.of(examples).column(column)))
        if len(without):
            raise UserError(
                f"{examples[int(without[0])].id}: no {column}, which {why} wants in every row "
                f"({len(without)} of {len(examples)} have none): add the column, or choose otherwise"
            )


def texts(examples: Sequence[Example], template: TemplateSettings) -> list[str]:
    """What the examples look like to a model without a chat template, to make a vocabulary of."""
    shown: list[str] = []
    for example in examples:
        shown.append(prompt_text(example.prompt, template))
        answers = (example.completion, example.chosen, example.rejected)
        shown += [response_text(text_of(answer), template, example.prompt) for answer in answers if answer]
    return shown


def warn_of_cuts(cut: int, total: int, limit: str, what: str) -> bool:
    """Say so where more than a tenth of `total` responses lose their end to `limit`, a setting with its value.

    Whether it was said.
    """
    many = cut > CUTS_TOLD * total
    if many:
        logger.warning(f"{limit} cuts {cut:,} of {total:,} responses {what}: raise it")
    return many
