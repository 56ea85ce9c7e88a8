"""Which examples a stage sees: of a task, files or the hub; split, filtered, converted, encoded, counted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from pipeline import plugins
from pipeline.config.sections import DataSettings, TemplateSettings
from pipeline.data import columns, convert, hub, mixing, readers, remarks
from pipeline.data.splits import Places, id_names_of, origins, split_places
from pipeline.data.template import prompt_text, response_text
from pipeline.data.tokenization import Encoder
from pipeline.errors import UserError
from pipeline.records import Answer, Example, Item, Row, text_of

logger = logging.getLogger("tiffin")

# by which of these rows are cut into training and validation: the first in which they differ
KEYS = (
    lambda row: row.prompt,
    lambda row: (row.completion, row.chosen, row.rejected, row.candidates),
    lambda row: row.id,
)
NUMBERS = ("reward", "margin", "chosen_reward", "rejected_reward", "correctness")
CUTS_TOLD = 0.1  # the share of responses that may lose their end without a warning


def splits(
    data: DataSettings, seed: int, names: Sequence[str] = ("train", "validation"), carry: bool = False
) -> Iterator[list[Example]]:
    """The rows of each split of `names`, one split after the other. A file is read once, whatever it serves for.

    With `carry`, rows of files keep the columns that their format does not use, for rewards and for what is written.

    Where there is no validation split, `held_out` cuts it from train. Raises UserError where no data is named, or what
    is named cannot be read or lacks a split, or a split has no rows.
    """
    if data.task is not None:
        rows = {name: _of_task(data, name, seed) for name in names}
    else:
        places = split_places(data)
        found = _of_files(data, places, names, carry)
        rows = {name: [row for row, _ in some] for name, some in found.items()}
    rows = columns.filled(rows)
    for name in names:
        if not rows[name]:
            raise UserError(f"data: the {name} split has no rows, wanted at least one: {_cure(data)}")
        if data.task is None:
            turns = remarks.of_turns(name, rows[name]) if name == names[0] else ()
            for line in (*remarks.of_rows(name, rows[name]), *turns):
                logger.info(line)
            yield _mixed(name, rows[name], [file for _, file in found[name]], places, seed)
        else:
            yield rows[name]


def _mixed(split: str, rows: list[Example], files: Sequence[str], places: Places, seed: int) -> list[Example]:
    """The rows, those of train as often as the weight of their file in `files` says; several files are summed up."""
    weights = places[split] if split in places else dict.fromkeys(places["train"], 1.0)
    plain = {*weights.values()} == {1.0}
    numbers = [[1]] * len(rows) if plain else mixing.weighed(rows, files, weights, seed)
    if not plain or len(weights) > 1:
        for line in mixing.summed_up(split, rows, files, weights, [*map(len, numbers)]):
            logger.info(line)
    return rows if plain else mixing.repeated(rows, numbers)


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
    data: DataSettings, places: Places, names: Sequence[str], carry: bool
) -> dict[str, list[tuple[Example, str]]]:
    """Of each split the rows, each with its file, before any weight; what is held out is cut from the union."""
    fraction, ids, origin = data.validation_fraction, id_names_of(places), origins(data, names)
    cut = "train" in places and "validation" not in places  # validation is a part of train
    files = dict.fromkeys(chain.from_iterable(origin.values()))
    read = {file: [(row, file) for row in _read(file, data, carry, ids[file])] for file in files}
    whole = {name: [*chain.from_iterable(read[file] for file in some)] for name, some in origin.items()}
    rows = {name: some[: data.max_rows if name == "train" else None] for name, some in whole.items()}
    asked = [name for name in ("train", "validation") if name in rows]
    if cut and fraction > 0 and asked:
        is_held_out = held_out([row for row, _ in whole[asked[0]]], fraction, data.max_rows)
        for name in asked:
            rows[name] = [one for one in rows[name] if is_held_out(one[0]) == (name == "validation")]
    elif len(asked) == 2:
        for line in remarks.of_splits(*([row for row, _ in rows[name]] for name in asked)):
            logger.warning(line)
    return rows


def held_out(rows: Sequence[Example], fraction: float, most: int | None) -> Callable[[Example], bool]:
    """Which rows of a training file are for validation: those of `fraction` of its prompts, by the hash of the prompt.

    All rows of one prompt stay together; only where all have the same, or none, their texts decide, or ids. Of two or
    more at least one is held out, and of the first `most` rows at least one is not.
    """
    of_both_kinds = len({isinstance(row.prompt, str) for row in rows}) > 1
    keys = (mixing.asked, *KEYS[1:]) if of_both_kinds else KEYS
    key = next((key for key in keys if len({*map(key, rows)}) > 1), keys[-1])
    counts = Counter(map(key, rows))
    places = {one: mixing.place_of(one) for one in counts}
    # where chance leaves nothing to learn, what has most rows stays; where it holds nothing out, what has fewest goes
    kept = max({*map(key, rows[:most])}, key=lambda one: (places[one] >= fraction, counts[one], places[one]))
    others = sorted(counts.keys() - {kept}, key=lambda one: (counts[one], places[one]))
    apart = {one for one in others if places[one] < fraction} or {*others[:1]}
    if len(rows) > 1:
        held = f"{sum(counts[one] for one in apart):,} of {len(rows):,} rows"
        by_row = f"all {len(rows):,} rows have one prompt, or none: cut by row, not by prompt; {held}"
        by_prompt = f"{held} ({len(apart):,} of {len(counts):,} prompts)"
        logger.info(
            f"validation: {by_prompt if key is keys[0] else by_row} are held out of train by "
            f"data.validation_fraction={fraction:g}, at least one is; data.validation=FILE names others"
        )
    return lambda row: key(row) in apart


def _read(place: str, data: DataSettings, carry: bool, name: str) -> list[Example]:
    """The rows of a file or hub name; ids begin with `name`, but of a hub set's folders with theirs."""
    folders = hub.folders(place, data.sources or []) if hub.is_hub_name(place) else {}
    if folders:  # a hub set keeps each source in a folder of its own
        whole = data.model_copy(update={"sources": None})
        return [replace(e, source=s) for s, folder in folders.items() for e in _read(folder, whole, carry, "")]
    filters = readers.Filters(data.exclude, data.drop_abrupt, data.sources)
    return readers.read(place, data.format, filters, data.max_bad_rows, carry, data.columns, name).examples


def judgeable(examples: Sequence[Example], data: DataSettings) -> list[Example]:
    """Rows with candidates as they are; of all others those with one response each that `convert.to_scored` makes."""
    return [row for e in examples for row in ([e] if e.candidates else convert.to_scored([e], data.responses))]


def require(examples: Sequence[Example], columns: Sequence[str], why: str) -> None:
    """Raises UserError where a row has no number in one of `columns`, fields of an Example."""
    for column in columns:
        without = [example.id for example in examples if getattr(example, column) is None]
        if without:
            raise UserError(
                f"{without[0]}: no {column}, which {why} wants in every row "
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


def encode(
    examples: Sequence[Example], encoder: Encoder, rows_of: Callable[[Example, Encoder], tuple[Row, ...]]
) -> list[Item]:
    """Items of `examples`, each with the rows that `rows_of` makes of it."""
    numbers = numbers_of(examples)
    return [Item(one, rows_of(one, encoder), known) for one, known in zip(examples, numbers, strict=True)]


def counts(items: Sequence[Item]) -> dict[str, int]:
    """What data.json says of a split: rows, responses (two in a pair), tokens, how many were cut, what they spell."""
    rows = [row for item in items for row in item.rows]
    return {
        "rows": len(items),
        "responses": len(rows),
        "tokens": sum(len(row) for row in rows),
        "response_tokens": sum(len(row.response_ids) for row in rows),
        "cut_prompts": sum(row.cut_prompt for row in rows),
        "cut_responses": sum(row.cut_response for row in rows),
        "spelled_special_tokens": sum(row.spelled for row in rows),
        "own_ends": sum(row.own_end for row in rows),
    }


def warn_of_cuts(cut: int, total: int, limit: str, what: str) -> None:
    """Say so where more than a tenth of `total` responses lose their end to `limit`, a setting with its value."""
    if cut > CUTS_TOLD * total:
        logger.warning(f"{limit} cuts {cut:,} of {total:,} responses {what}: raise it")


def completion_rows(example: Example, encoder: Encoder) -> tuple[Row, ...]:
    return (encoder.encode(example.prompt, example.completion),)


def pair_rows(example: Example, encoder: Encoder) -> tuple[Row, ...]:
    return (encoder.encode(example.prompt, example.chosen), encoder.encode(example.prompt, example.rejected))


def prompt_rows(example: Example, encoder: Encoder) -> tuple[Row, ...]:
    return (encoder.encode(example.prompt, None),)


def numbers_of(examples: Sequence[Example]) -> list[dict[str, float]]:
    """The numbers that each row brings along: those which every row has, so that any of them make a micro-batch."""
    whole = [name for name in NUMBERS if all(getattr(example, name) is not None for example in examples)]
    return [{name: getattr(example, name) for name in whole} for example in examples]


def with_numbers(items: Sequence[Item], **numbers: Sequence[float]) -> list[Item]:
    """The items with further numbers, one per item in each sequence."""
    return [
        replace(item, numbers={**item.numbers, **{name: float(values[i]) for name, values in numbers.items()}})
        for i, item in enumerate(items)
    ]


def gold(example: Example) -> tuple[str, ...]:
    """What a new response to the prompt is compared with: the references given, else the answer that the row holds.

    That is its completion or the chosen side of its pair. A completion with a reward, or of a pair's rejected side, is
    a response of any quality, and so none; nor is one of weight 0.
    """
    judged = example.reward is not None or example.rewards or example.id.endswith(convert.REJECTED)
    judged = judged or example.turn_weight == 0
    answer = example.chosen if example.completion is None else None if judged else example.completion
    return example.references or (() if answer is None else (text_of(answer),))


def with_gold(examples: Sequence[Example]) -> list[Example]:
    """The examples with what new responses to their prompts are compared with as references."""
    return [replace(example, references=gold(example)) for example in examples]


def unique_prompts(examples: Sequence[Example], copies: bool = False) -> list[Example]:
    """The first example of each prompt, to be answered anew; its references are what is gold in any of that prompt.

    With `copies`, which the weights of files make, each copy of a prompt is one of its own. Further columns stay those
    of the first example; a line is logged where they differ.
    """
    groups: dict[object, list[Example]] = {}
    for example in examples:
        number = mixing.copy_number(example) if copies else 1
        groups.setdefault((number, example.prompt), []).append(example)
    differing = sum(any(row.columns != rows[0].columns for row in rows) for rows in groups.values())
    if differing:
        logger.info(f"{differing:,} of {len(groups):,} prompts have rows of different columns: the first row's count")
    return [
        replace(rows[0], references=tuple(dict.fromkeys(text for row in rows for text in gold(row))))
        for rows in groups.values()
    ]


def reference_text(example: Example) -> Answer:
    """The first reference, else the completion. Raises UserError where there is neither."""
    text = example.references[0] if example.references else example.completion
    if not text:
        raise UserError(
            f"{example.id}: no reference text, wanted one to learn from: give the row a column `completion` "
            "or `references`"
        )
    return text
