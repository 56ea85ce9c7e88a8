"""Examples -> a JSON-lines file that `readers.read` gives back as equal Examples."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from pipeline.data import messages
from pipeline.data.columns import OTHER
from pipeline.data.formats import READ_SOMEWHERE
from pipeline.files import write_text
from pipeline.records import Answer, Chat, Example, Message, text_of


def write_rows(path: Path, examples: Iterable[Example]) -> None:
    """One JSON object per Example, columns named as its fields; the file appears complete or not at all."""
    rows = (json.dumps(row_of(example), ensure_ascii=False, allow_nan=False) + "\n" for example in examples)
    write_text(path, "".join(rows))


def row_of(example: Example) -> dict[str, object]:
    """The columns of one Example. Left out is what has no value.

    A row with an empty prompt is plain text: its completion is the column `text`. Further columns keep their names;
    those that a format would take for its own stand in the column OTHER, so that the file reads back as it was written.
    """
    further = {name: value for name, value in example.columns.items() if name not in READ_SOMEWHERE}
    hidden = {name: value for name, value in example.columns.items() if name in READ_SOMEWHERE}
    prompt = example.prompt if isinstance(example.prompt, str) else [messages.as_row(turn) for turn in example.prompt]
    beside = example.prompt if isinstance(example.prompt, Chat) else Chat(())
    completion = example.completion
    if example.turn_weight is not None:
        message = completion if isinstance(completion, Message) else Message("assistant", completion)
        completion = message._replace(weight=example.turn_weight)
    columns = {
        "id": example.id,
        "source": example.source or None,
        "prompt": prompt or None,
        messages.TOOLS: json.loads(beside.tools) if beside.tools else None,
        messages.ARGUMENTS: json.loads(beside.arguments) if beside.arguments else None,
        "completion" if prompt else "text": _written(completion),
        **_sides(example),
        "chosen_reward": example.chosen_reward,
        "rejected_reward": example.rejected_reward,
        "margin": example.margin,
        "correctness": example.correctness,
        "reward": example.reward,
        "rewards": dict(example.rewards) or None,
        "references": list(example.references) or None,
        "candidates": list(example.candidates) or None,
        "candidate_rewards": list(example.candidate_rewards) or None,
        "candidate_scores": {name: list(values) for name, values in example.candidate_scores.items()} or None,
        "unfinished": [text for text in example.unfinished if text in _texts(example)] or None,
        OTHER: hidden or None,
    }
    return {name: value for name, value in columns.items() if value is not None} | further


def _written(answer: Answer | None) -> str | list[dict[str, object]] | None:
    return [messages.as_row(answer)] if isinstance(answer, Message) else answer


def _texts(example: Example) -> set[str]:
    """Those of the responses that the example still holds."""
    answers = (example.completion, example.chosen, example.rejected)
    return {*example.candidates, *(text_of(answer) for answer in answers if answer is not None)}


def _sides(example: Example) -> dict[str, object]:
    """The two responses of a pair: both texts, or both messages."""
    sides = {"chosen": example.chosen, "rejected": example.rejected}
    if any(isinstance(side, Message) for side in sides.values()):
        sides = {name: Message("assistant", side) if isinstance(side, str) else side for name, side in sides.items()}
    return {name: _written(side) for name, side in sides.items()}
