"""Which examples a stage sees: of a task, files or the hub; split, filtered, converted, encoded, counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import plugins
from pipeline.config.sections import DataSettings, TemplateSettings
from pipeline.data import convert, hub, readers, splits
from pipeline.data.tokenization import Encoder
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.records import Example, Item, Row

NUMBERS = ("reward", "margin", "chosen_reward", "rejected_reward", "correctness")
Report = Callable[[str], None]


def load(data: DataSettings, split: str, seed: int, report: Report = print) -> list[Example]:
    """The examples of one split, in their order.

    Raises:
        UserError: no data is named, or what is named cannot be read or holds no such split.
    """
    examples = _of_files(data, split, report) if data.task is None else _of_task(data, split, seed)
    if not examples:
        raise UserError(f"data: the {split} split has no rows, wanted at least one: {_cure(data, split)}")
    if split == "train" and data.max_rows is not None:
        examples = examples[: data.max_rows]
    return examples


def _cure(data: DataSettings, split: str) -> str:
    if data.task is not None and data.sources is not None:
        return f"does task {data.task} have rows of data.sources ({', '.join(data.sources)})?"
    if data.task is not None:
        return f"choose another split, or let task {data.task} make some"
    return f"raise data.validation_fraction ({data.validation_fraction}), or give data.validation="


def _of_task(data: DataSettings, split: str, seed: int) -> list[Example]:
    make = plugins.load(data.task, "pipeline.tasks", "data.task", "examples")
    size = data.task_size if split == "train" else None
    place = f"data.task {data.task}, called with ({split!r}, {seed}, {size})"
    rows = plugins.guarded(place, lambda: make(split, seed, size))
    if not isinstance(rows, list) or not all(isinstance(row, Example) for row in rows):
        wrong = next((row for row in rows if not isinstance(row, Example)), rows) if isinstance(rows, list) else rows
        raise UserError(f"{place}: it returned {wrong!r:.60}, wanted a list of pipeline.records.Example")
    return [row for row in rows if data.sources is None or row.source in data.sources]


def _of_files(data: DataSettings, split: str, report: Report) -> list[Example]:
    place = splits.split_places(data)
    if split in place:
        return _read(place[split], data, report)
    if split != "validation" or data.validation_fraction == 0 or "train" not in place:
        known = ", ".join(place)
        raise UserError(f"data: there is no {split} split, only {known}: give data.{split}=")
    return [e for e in _read(place["train"], data, report) if held_out(e, data.validation_fraction)]


def _read(place: str, data: DataSettings, report: Report) -> list[Example]:
    folders = hub.folders(place, data.sources or []) if hub.is_hub_name(place) else {}
    if folders:  # a hub set keeps each source in a folder of its own
        whole = data.model_copy(update={"sources": None})
        return [replace(e, source=s) for s, folder in folders.items() for e in _read(folder, whole, report)]
    sources = None if data.sources is None else tuple(data.sources)
    filters = readers.Filters(tuple(data.exclude), data.drop_abrupt, sources)
    return readers.read(place, data.format, filters, data.max_bad_rows, report).examples


def held_out(example: Example, fraction: float) -> bool:
    """Whether a row of train belongs to validation where there is no such split: all rows of a prompt go together."""
    digest = hashlib.sha256(repr(example.prompt).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def load_train(data: DataSettings, seed: int, report: Report = print) -> list[Example]:
    """The training split, without what serves as validation where there is no such split."""
    examples = load(data, "train", seed, report)
    if data.task is not None or "validation" in splits.split_places(data):
        return examples
    kept = [e for e in examples if not held_out(e, data.validation_fraction)]
    if not kept:
        raise UserError(
            f"data.validation_fraction: {data.validation_fraction} holds all {len(examples)} rows of train out, wanted "
            "some to learn from: lower it, or give data.validation= (all rows of one prompt stay together)"
        )
    return kept


def load_split(data: DataSettings, split: str, seed: int, report: Report = print) -> list[Example]:
    """The rows of `split` as stages that do not learn see them: those of train without what serves as validation."""
    return load_train(data, seed, report) if split == "train" else load(data, split, seed, report)


def supervised(examples: Sequence[Example]) -> list[Example]:
    """Rows with a completion to imitate: their own, else the chosen response."""
    return list(convert.to_supervised(examples))


def scored(examples: Sequence[Example], data: DataSettings) -> list[Example]:
    """Rows with one logged response each: their own, else the chosen or both responses of the pair."""
    nothing = ("chosen", "rejected", "chosen_reward", "rejected_reward", "margin", "correctness")
    return [replace(example, **dict.fromkeys(nothing)) for example in convert.to_scored(examples, data.responses)]


def judgeable(examples: Sequence[Example], data: DataSettings) -> list[Example]:
    """Rows with candidates as they are; of all others the rows that `scored` makes."""
    return [row for one in examples for row in ([one] if one.candidates else scored([one], data))]


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
    """What the examples look like to a model, to make a vocabulary of."""
    found: list[str] = []
    for example in examples:
        prompt = example.prompt if isinstance(example.prompt, str) else " ".join(t.content for t in example.prompt)
        found.append(template.prompt.replace("{prompt}", prompt))
        answers = (example.completion, example.chosen, example.rejected)
        found += [template.response.replace("{response}", text) for text in answers if text]
    return found


@dataclass(frozen=True)
class Encoded:
    """The items of one split and what encoding did to them."""

    items: list[Item]
    tokens: int
    response_tokens: int
    cut_prompts: int
    cut_responses: int
    dropped: int = 0

    def counts(self) -> dict[str, int]:
        """What data.json says of a split: rows, responses (two in a pair), tokens, and how many were cut."""
        return {
            "rows": len(self.items),
            "responses": sum(len(item.rows) for item in self.items),
            "tokens": self.tokens,
            "response_tokens": self.response_tokens,
            "cut_prompts": self.cut_prompts,
            "cut_responses": self.cut_responses,
        }

    def summary(self, name: str) -> str:
        parts = [
            f"{name}: {len(self.items):,} rows",
            f"{self.tokens:,} tokens ({self.response_tokens:,} of responses)",
            f"{self.cut_prompts:,} prompts and {self.cut_responses:,} responses cut",
        ]
        if self.dropped:
            parts.append(f"{self.dropped:,} rows dropped")
        return ", ".join(parts)


def encode(
    examples: Sequence[Example], encoder: Encoder, rows_of: Callable[[Example, Encoder], tuple[Row, ...]]
) -> Encoded:
    """Items of `examples`, each with the rows that `rows_of` makes of it."""
    numbers = numbers_of(examples)
    items = [Item(one, rows_of(one, encoder), known) for one, known in zip(examples, numbers, strict=True)]
    rows = [row for item in items for row in item.rows]
    return Encoded(
        items,
        tokens=sum(len(row) for row in rows),
        response_tokens=sum(len(row.response_ids) for row in rows),
        cut_prompts=sum(row.cut_prompt for row in rows),
        cut_responses=sum(row.cut_response for row in rows),
    )


def note(directory: Path, train: Encoded, validation: Encoded) -> None:
    """data.json: what the stage's rows came to, for the report."""
    write_json(directory / "data.json", {"train": train.counts(), "validation": validation.counts()})


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


def unique_prompts(examples: Sequence[Example]) -> list[Example]:
    """The first example of each prompt, with the references of all examples of that prompt, each once."""
    groups: dict[object, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.prompt, []).append(example)
    return [
        replace(rows[0], references=tuple(dict.fromkeys(text for row in rows for text in row.references)))
        for rows in groups.values()
    ]


def reference_text(example: Example) -> str:
    """The first reference, else the completion. Raises UserError where there is neither."""
    found = example.references[0] if example.references else example.completion
    if not found:
        raise UserError(
            f"{example.id}: no reference text, wanted one to learn from: give the row a column `completion` "
            "or `references`"
        )
    return found
