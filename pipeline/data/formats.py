"""The known shapes of a row, and how each becomes an Example.

A format is found by the first row's columns that have a value in it or in one of the next, or named with
`data.format=`. Beside its own columns, a row of any format may carry every column that an Example has, under the same
name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from pipeline.data import fields, judgements, layouts, messages
from pipeline.data.columns import CARRIED, COMPLETION, Fields, Prompt, last_answer, prompt_of, response_of
from pipeline.data.fields import Columns, RowError
from pipeline.data.released import candidates_tsv, gen_task, hh, prefix_suffix
from pipeline.data.transcripts import ASSISTANT
from pipeline.errors import did_you_mean
from pipeline.records import Message

REWARD = ("reward", "score")
PUBLISHED = {"article": "highlights", "document": "summary", "dialogue": "summary", "sentence": "question"}
PROMPT = ("prompt", "instruction", "input", "history")  # `prompt`, or the other three


class Format(NamedTuple):
    """One shape of a row. `read` gives the fields of an Example that it has columns of its own for, or a RowError."""

    wanted: str  # its columns, in words
    fits: Callable[[Columns], bool]  # of the columns that have a value
    read: Callable[[Columns], Fields]
    reads: tuple[str, ...]  # the columns it uses beside CARRIED
    says: str = ""  # what it chooses, for the log


def detect(row: Columns) -> str:
    """The first format that fits the columns of `row` that have a value, else all of them.

    Raises RowError with all formats and the nearest column.
    """
    present = {name: value for name, value in row.items() if value is not None}
    named = {name: "" if value is None else value for name, value in row.items()}  # each row then says what is null
    for columns in (present, named):
        fitting = next((name for name, form in FORMATS.items() if form.fits(columns)), None)
        if fitting is not None:
            return fitting
    known = sorted(READ_SOMEWHERE)
    hint = next(filter(None, (did_you_mean(name, known) for name in present if name not in known)), "")
    wanted = " | ".join(form.wanted for form in FORMATS.values())
    raise RowError(f"columns {', '.join(present) or '(none)'}: no known format, wanted {wanted}{hint}")


def used_columns(name: str) -> set[str]:
    """The columns that format `name` makes fields of."""
    return {*FORMATS[name].reads} | CARRIED


def scored(row: Columns) -> Fields:
    """A prompt, the response that was given, and what it was worth: `reward`, or `rewards` by name, or both."""
    rewards = fields.named_numbers(row, "rewards")
    optional = rewards or messages.any_reward(row)
    reward = fields.optional_number(row, *REWARD) if optional else fields.number(row, *REWARD)
    return supervised(row) | {"reward": reward, "rewards": rewards}


def supervised(row: Columns) -> Fields:
    """A prompt and its wanted completion: messages, prompt + completion, or instruction + output."""
    if not fields.has(row, "messages"):
        names = COMPLETION if fields.has(row, "prompt") else ("output", *COMPLETION)
        return {"prompt": prompt_of(row), "completion": response_of(row, *names)}
    prompt, completion = last_answer(row["messages"], "messages")
    if not prompt:
        raise RowError("messages: one message, wanted a prompt and the assistant's answer to it")
    return {"prompt": prompt, "completion": completion}


def preference(row: Columns) -> Fields:
    """A prompt with a better and a worse response; these may be chats, which may hold the prompt."""
    if not isinstance(row.get("chosen"), list):
        return {"prompt": prompt_of(row)} | {name: fields.text(row, name) for name in ("chosen", "rejected")}
    before, chosen = last_answer(row["chosen"], "chosen")
    other, rejected = last_answer(row.get("rejected"), "rejected")
    if before != other:
        raise RowError("chosen, rejected: differ before their last message, wanted two answers to one prompt")
    return {"prompt": _chat_prompt(row, before), "chosen": chosen, "rejected": rejected}


def implicit_prompt(row: Columns) -> Fields:
    """Two texts that begin alike: the prompt is what they share, up to the mark of the last turn, else the last word.

    It ends before the blank, with which the responses begin.
    """
    chosen, rejected = fields.text(row, "chosen"), fields.text(row, "rejected")
    parted = (i for i, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other)
    shared = chosen[: next(parted, min(len(chosen), len(rejected)))]
    marks = [mark.end() for mark in TURN.finditer(shared)]
    words = [blank.start() for blank in re.finditer(r"(?<=\S)\s+(?=\S|\Z)", shared)]
    if not marks and not words:
        raise RowError("chosen, rejected: share no beginning, wanted two answers behind one prompt, or a `prompt`")
    cut = marks[-1] if marks else words[-1]
    sides = {"chosen": chosen[cut:], "rejected": rejected[cut:]}
    return {"prompt": chosen[:cut]} | {
        name: fields.checked_text(text, f"{name}, its answer") for name, text in sides.items()
    }


def candidates(row: Columns) -> Fields:
    """A prompt with responses to learn from; without `prompt`, the `source` column is the prompt, and no label.

    The completion is the `reference`, where that column and no `completion` is there.
    """
    if not fields.has(row, "candidates"):
        raise RowError("candidates: missing, wanted a list")
    has_prompt = fields.first_of(row, PROMPT) is not None
    given = {"prompt": prompt_of(row)} if has_prompt else {"prompt": fields.text(row, "source"), "source": ""}
    return given if fields.has(row, "completion") else {**given, "completion": fields.optional_text(row, "reference")}


def published(row: Columns) -> Fields:
    """A text and its summary, or a sentence and its question, under the names that public data sets give them."""
    names = sorted(PUBLISHED, key=lambda name: name not in row)  # an error names the column that is there
    prompt = fields.text(row, *names)
    return {"prompt": prompt, "completion": fields.text(row, PUBLISHED[fields.first_of(row, names)])}


def _chat_prompt(row: Columns, before: tuple[Message, ...]) -> Prompt:
    """The messages before the answers, behind those of `prompt`, if any, that they do not repeat."""
    if not before:
        return prompt_of(row)
    given = prompt_of(row) if isinstance(row.get("prompt"), list) else ()
    return before if before[: len(given)] == given else (*given, *before)


def has_completion(row: Columns) -> bool:
    """Whether a row has a response to its prompt."""
    return "messages" in row or (_has_prompt(row) and fields.first_of(row, (*COMPLETION, "output")) is not None)


def _has_prompt(row: Columns) -> bool:
    return fields.first_of(row, ("prompt", "instruction")) is not None


def _is_pair(row: Columns) -> bool:
    return "chosen" in row and "rejected" in row


# what comes before an answer in one text: "Assistant:", "### Response:", "TL;DR:", or the marks of chat templates
TURN = re.compile(
    r"^[#\s]*(?:assistant|ai|bot|answer|a|response|output|summary|tl;dr):"
    r"|<\|assistant\|>|<\|im_start\|>assistant\n|<start_of_turn>model\n|\[/INST\]",
    re.I | re.M,
)
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
    "candidates": Format("prompt or source + candidates", lambda row: "candidates" in row, candidates, PROMPT),
    "preference": Format(
        "prompt + chosen + rejected",
        lambda row: _is_pair(row) and (_has_prompt(row) or isinstance(row["chosen"], list)),
        preference,
        PROMPT,
    ),
    "hh": Format(
        "chosen + rejected as whole transcripts",
        lambda row: _is_pair(row) and ASSISTANT in str(row["chosen"]),
        hh,
        (),
    ),
    "implicit_prompt": Format(
        "chosen + rejected that begin alike",
        _is_pair,
        implicit_prompt,
        (),
        "the prompt is what both texts share, up to the mark of the last turn, else the last whole word",
    ),
    "scored": Format(
        "prompt + completion + reward",
        lambda row: has_completion(row) and fields.first_of(row, (*REWARD, "rewards")) is not None,
        scored,
        (*DIALOGUE, *REWARD),
    ),
    "supervised": Format(
        "prompt + completion, messages, or instruction + output", has_completion, supervised, DIALOGUE
    ),
    "published": Format(
        " | ".join(f"{source} + {wanted}" for source, wanted in PUBLISHED.items()),
        lambda row: any(source in row and wanted in row for source, wanted in PUBLISHED.items()),
        published,
        (*PUBLISHED, *PUBLISHED.values()),
    ),
    "text": Format(  # to learn a language from: the prompt is empty
        "text", lambda row: "text" in row, lambda row: {"prompt": "", "completion": fields.text(row, "text")}, ("text",)
    ),
    "prompts": Format("prompt", _has_prompt, lambda row: {"prompt": prompt_of(row)}, PROMPT),
}
READ_SOMEWHERE = (
    {name for form in FORMATS.values() for name in form.reads}
    | CARRIED
    | layouts.HIDDEN
    | {*judgements.NAMES, *judgements.ATTRIBUTES}
)
