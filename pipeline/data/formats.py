"""The known shapes of a row, and how each becomes an Example.

A format is found by the columns that have a value in the first row, or named with `data.format=`. Beside its own
columns, a row of any format may carry every column that an Example has, under the same name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pipeline.data.columns import CARRIED, COMPLETION, Fields, Prompt, last_answer, prompt_of, response_of
from pipeline.data.fields import (
    Columns,
    RowError,
    first_of,
    has,
    named_numbers,
    number,
    optional_number,
    optional_text,
    text,
)
from pipeline.data.released import candidates_tsv, gen_task, hh, prefix_suffix
from pipeline.errors import did_you_mean
from pipeline.records import Message

REWARD = ("reward", "score")
PUBLISHED = {"article": "highlights", "document": "summary", "dialogue": "summary", "sentence": "question"}
PROMPT = ("prompt", "instruction", "input", "history")  # `prompt`, or the other three


class Format(NamedTuple):
    """One shape of a row. `fields` are those of an Example that it has columns of its own for; it raises RowError."""

    wanted: str  # its columns, in words
    fits: Callable[[Columns], bool]  # asked about the columns of the first row that have a value
    fields: Callable[[Columns], Fields]
    reads: tuple[str, ...]  # the columns it looks at beside CARRIED


def detect(row: Columns) -> str:
    """The first format that fits `row`. Raises RowError with all formats and the nearest column."""
    present = {name: value for name, value in row.items() if value is not None}
    fitting = next((name for name, form in FORMATS.items() if form.fits(present)), None)
    if fitting is not None:
        return fitting
    known = sorted({name for form in FORMATS.values() for name in form.reads} | set(CARRIED))
    hint = next(filter(None, (did_you_mean(name, known) for name in present if name not in known)), "")
    wanted = " | ".join(form.wanted for form in FORMATS.values())
    raise RowError(f"columns {', '.join(present) or '(none)'}: no known format, wanted {wanted}{hint}")


def unused_columns(row: Columns, name: str) -> list[str]:
    """The columns of `row` that format `name` does not look at."""
    return [column for column in row if column not in FORMATS[name].reads and column not in CARRIED]


def scored(row: Columns) -> Fields:
    """A prompt, the response that was given, and what it was worth: `reward`, or `rewards` by name, or both."""
    rewards = named_numbers(row, "rewards")
    reward = optional_number(row, *REWARD) if rewards else number(row, *REWARD)
    return supervised(row) | {"reward": reward, "rewards": rewards}


def supervised(row: Columns) -> Fields:
    """A prompt and its wanted completion: messages, prompt + completion, or instruction + output."""
    if not has(row, "messages"):
        names = COMPLETION if has(row, "prompt") else ("output", *COMPLETION)
        return {"prompt": prompt_of(row), "completion": response_of(row, *names)}
    prompt, completion = last_answer(row["messages"], "messages")
    if not prompt:
        raise RowError("messages: one message, wanted a prompt and the assistant's answer to it")
    return {"prompt": prompt, "completion": completion}


def preference(row: Columns) -> Fields:
    """A prompt with a better and a worse response; these may be chats, which may hold the prompt."""
    if not isinstance(row.get("chosen"), list):
        return {"prompt": prompt_of(row), "chosen": text(row, "chosen"), "rejected": text(row, "rejected")}
    before, chosen = last_answer(row["chosen"], "chosen")
    other, rejected = last_answer(row["rejected"], "rejected")
    if before != other:
        raise RowError("chosen, rejected: differ before their last message, wanted two answers to one prompt")
    return {"prompt": _chat_prompt(row, before), "chosen": chosen, "rejected": rejected}


def candidates(row: Columns) -> Fields:
    """A prompt with responses to learn from; without `prompt`, the `source` column is the prompt, and no label.

    The completion is the `reference`, where that column and no `completion` is there.
    """
    if not has(row, "candidates"):
        raise RowError("candidates: missing, wanted a list")
    has_prompt = first_of(row, PROMPT) is not None
    fields = {"prompt": prompt_of(row)} if has_prompt else {"prompt": text(row, "source"), "source": ""}
    return fields if has(row, "completion") else {**fields, "completion": optional_text(row, "reference")}


def published(row: Columns) -> Fields:
    """A text and its summary, or a sentence and its question, under the names that public data sets give them."""
    names = sorted(PUBLISHED, key=lambda name: name not in row)  # an error names the column that is there
    prompt = text(row, *names)
    return {"prompt": prompt, "completion": text(row, PUBLISHED[first_of(row, names)])}


def plain_text(row: Columns) -> Fields:
    """Text to learn a language from: an empty prompt, and the text as completion."""
    return {"prompt": "", "completion": text(row, "text")}


def prompts(row: Columns) -> Fields:
    """Only something to answer."""
    return {"prompt": prompt_of(row)}


def _chat_prompt(row: Columns, before: tuple[Message, ...]) -> Prompt:
    """The messages before the answers, behind those of `prompt`, if any, that they do not repeat."""
    if not before:
        return prompt_of(row)
    given = prompt_of(row) if isinstance(row.get("prompt"), list) else ()
    return before if before[: len(given)] == given else (*given, *before)


def _has_completion(row: Columns) -> bool:
    return "messages" in row or (_has_prompt(row) and first_of(row, (*COMPLETION, "output")) is not None)


def _has_prompt(row: Columns) -> bool:
    return first_of(row, ("prompt", "instruction")) is not None


def _is_pair(row: Columns) -> bool:
    return "chosen" in row and "rejected" in row


DIALOGUE = (*PROMPT, "messages", *COMPLETION, "output")

# In the order in which they are tried: the special before the general.
FORMATS = {
    "prefix_suffix": Format(
        "prefix + suffix + reward",
        lambda row: "prefix" in row and "suffix" in row,
        prefix_suffix,
        ("prefix", "suffix", "meta"),
    ),
    "gen_task": Format(
        "prompt_or_input_text + references + reward_components",
        lambda row: "prompt_or_input_text" in row,
        gen_task,
        ("prompt_or_input_text", "reward_components"),
    ),
    "candidates_tsv": Format(
        "source, reference and ranked candidates in a tsv without header",
        lambda row: "data_src" in row and "data_kd" in row,
        candidates_tsv,
        ("data_src", "data_gt", "data_kd"),
    ),
    "candidates": Format(
        "prompt or source + candidates",
        lambda row: "candidates" in row,
        candidates,
        PROMPT,
    ),
    "preference": Format(
        "prompt + chosen + rejected",
        lambda row: _is_pair(row) and (_has_prompt(row) or isinstance(row["chosen"], list)),
        preference,
        PROMPT,
    ),
    "hh": Format("chosen + rejected as whole transcripts", _is_pair, hh, ()),
    "scored": Format(
        "prompt + completion + reward",
        lambda row: _has_completion(row) and first_of(row, (*REWARD, "rewards")) is not None,
        scored,
        (*DIALOGUE, *REWARD),
    ),
    "supervised": Format(
        "prompt + completion, messages, or instruction + output", _has_completion, supervised, DIALOGUE
    ),
    "published": Format(
        " | ".join(f"{source} + {wanted}" for source, wanted in PUBLISHED.items()),
        lambda row: any(source in row and wanted in row for source, wanted in PUBLISHED.items()),
        published,
        (*PUBLISHED, *PUBLISHED.values()),
    ),
    "text": Format("text", lambda row: "text" in row, plain_text, ("text",)),
    "prompts": Format("prompt", _has_prompt, prompts, PROMPT),
}
