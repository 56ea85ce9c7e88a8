"""The columns that rows of several formats share: prompt, response, candidates, and all that an Example can carry."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from pipeline.data import fields, messages
from pipeline.data.fields import Columns, RowError
from pipeline.data.rows import Rows
from pipeline.data.transcripts import marked_turns, turns_of
from pipeline.errors import UserError
from pipeline.records import REWARD_ARGUMENTS, Example, Message, text_of

COMPLETION = ("completion", "response")
CHOSEN_REWARD = ("chosen_reward", "chosen_score", "score_chosen", "chosen_gpt_score", "chosen-rating")
REJECTED_REWARD = ("rejected_reward", "rejected_score", "score_rejected", "rejected_gpt_score", "rejected-rating")

Fields = dict[str, object]  # some of an Example's, by name
Prompt = str | tuple[Message, ...]  # as formats read it; see `messages.for_template`


def prompt_of(row: Columns) -> Prompt:
    """The `prompt` column, text or chat messages; else `instruction`, with `input` and `history`, as a chat."""
    if not fields.has(row, "prompt") and fields.has(row, "instruction"):
        return _instruction(row)
    if _is_list(row, "prompt"):
        return messages.read(row["prompt"], "prompt")
    text = fields.text(row, "prompt")
    return marked_turns(text) or text


def response_of(row: Columns, *names: str) -> str | Message:
    """The first of `names` that has a value: text, or a list of one assistant message, see `last_answer`."""
    for name in names:
        if _is_list(row, name):
            before, answer = last_answer(row[name], name)
            if before:
                raise RowError(f"{name}: {len(before) + 1} messages, wanted one from the assistant")
            return answer
        if fields.has(row, name):
            break
    return fields.text(row, *names)


def last_answer(value: object, place: str) -> tuple[tuple[Message, ...], str | Message]:
    """Chat messages as (all but the last, the last one's text); the last must be the assistant's.

    It stays a message where its text is not all: where it calls tools, thinks, or has a weight or a reward. One of the
    assistant before it is the beginning of what it says, an empty line between them.
    """
    turns = messages.read(value, place)
    if turns[-1].role != "assistant":
        raise RowError(f"{place}: the last message is from '{turns[-1].role}', wanted one from 'assistant'")
    *before, answer = turns
    if before and before[-1].role == "assistant":
        if before[-1].more or answer.more:
            raise RowError(f"{place}: the last two are the assistant's, wanted a tool's result or a user between them")
        before[-1] = Message("assistant", f"{before[-1].content}\n\n")
    return tuple(before), answer if answer.more or (answer.weight, answer.reward) != (None, None) else answer.content


def example_of(row: Columns, given: Fields, id: str, carried: Columns | None = None) -> Example:
    """The Example of a row: `given` are the fields that its format knows, the others come from their usual columns.

    `carried` are the further columns that it keeps as they are.

    `id` is for a row that names none.
    """
    whole = {name: read(row, *names) for name, (read, *names) in CARRIERS.items() if name not in given} | given
    if "candidates" not in given:
        whole |= candidate_list(row)
    kept = {sys.intern(name): value for name, value in (carried or {}).items()}  # every row has the same few names
    named = {"id": whole["id"] or id, "source": whole["source"] or "", "references": whole["references"] or ()}
    return Example(**_with_unfinished(_of_chat(row, _in_turns(whole | named))), columns=kept)


def _of_chat(row: Columns, whole: Fields) -> Fields:
    """The fields of a row, the prompt with what its template is given, weight and reward of answers by themselves.

    The reward of an answer counts before the row's; of the two of a pair only where the row has none.
    """
    found = {"prompt": messages.for_template(row, whole["prompt"])}
    for name in ("completion", "chosen", "rejected"):
        if isinstance(answer := whole[name], Message):
            found[name] = messages.answer_of(answer)
            if name == "completion":
                found["turn_weight"] = answer.weight
                found["reward"] = whole["reward"] if answer.reward is None else answer.reward
            elif whole[f"{name}_reward"] is None:
                found[f"{name}_reward"] = answer.reward
    return whole | found


def _in_turns(whole: Fields) -> Fields:
    """The fields of a row; where its prompt is a transcript, with its turns, and answers without the mark's blank."""
    turns = turns_of(whole["prompt"]) if isinstance(whole["prompt"], str) else None
    if turns is None:
        return whole
    texts = [name for name in ("completion", "chosen", "rejected") if isinstance(whole[name], str)]
    answers = {name: whole[name].removeprefix(" ") for name in texts}
    lists = [name for name in ("references", "candidates", "unfinished") if isinstance(whole[name], tuple)]
    several = {name: tuple(one.removeprefix(" ") for one in whole[name]) for name in lists}
    return {**whole, "prompt": turns, **answers, **several}


def _with_unfinished(whole: Fields) -> Fields:
    """The fields of a row, those of its responses that were cut off as texts; true is the completion."""
    if not whole["unfinished"]:
        return whole | {"unfinished": ()}
    answers = [whole[name] for name in ("completion", "chosen", "rejected") if whole[name] is not None]
    texts, cut = {*map(text_of, answers), *whole["candidates"]}, whole["unfinished"]
    if cut is True:
        if whole["completion"] is None:
            raise RowError("unfinished: true, in a row without a completion, wanted the texts that were cut off")
        cut = (text_of(whole["completion"]),)
    if unknown := [text for text in cut if text not in texts]:
        raise RowError(f"unfinished: {fields.described(unknown[0])}, and no response of the row, wanted one")
    return whole | {"unfinished": cut}


def further(row: Columns, used: Collection[str]) -> dict[str, object]:
    """The columns of a row beside those that are `used`, and what OTHER holds: the same, under names of formats."""
    return {name: value for name, value in row.items() if name not in used} | fields.mapping(row, OTHER)


def refused(name: str, value: object) -> str:
    """Why a row cannot carry the further column `name`; "" where it can."""
    if name in REWARD_ARGUMENTS or name in CARRIED:
        return "its name means something else to rewards"
    return "" if fields.fits_json(value) else "JSON cannot hold it"


def checked_columns(examples: Sequence[Example], place: str) -> None:
    """Raises UserError for an Example made by a user's code whose further columns cannot be carried."""
    for example in examples:
        for name, value in example.columns.items():
            if why := refused(name, value):
                wanted = "a name of its own, and text, numbers, lists or mappings"
                raise UserError(f"{place}: row {example.id}, column '{name}': {why}, wanted {wanted}")


def filled(parts: Mapping[str, Rows]) -> dict[str, Rows]:
    """The rows of all splits, each with every further column that one of them has: None where it has no value."""
    known = [store.names() for rows in parts.values() for store in rows.stores]
    names = dict.fromkeys(name for some, _ in known for name in some)
    if all(uniform and len(some) == len(names) for some, uniform in known):
        return dict(parts)  # as most files are: every row has all
    nothing = dict.fromkeys(name for rows in parts.values() for row in rows for name in row.columns)
    return {split: replace(rows, filled=tuple(nothing)) for split, rows in parts.items()}


def candidate_list(row: Columns) -> Fields:
    """`candidates`, `candidate_rewards` and `candidate_scores`, best first; empty where there is no such column.

    The column is a list of {"text", "score" (or "reward"), "rewards": {name: number}}, of which the text alone must be
    there, or of text; the other two columns may stand beside it. With rewards, the candidates are put in their order,
    and equal ones keep theirs; without, the order given counts.
    """
    if not fields.has(row, "candidates"):
        return ranked((), ())
    values = fields.checked_list(row["candidates"], "candidates", "a list")
    if not values:
        raise RowError("candidates: empty, wanted at least one")
    rewards, scores = fields.numbers(row, "candidate_rewards"), _candidate_scores(row, len(values))
    if not isinstance(values[0], Mapping):
        return ranked(fields.texts(row, "candidates"), rewards, scores)
    found = [_candidate(value, f"candidates[{i}]") for i, value in enumerate(values)]
    texts, own, named = zip(*found, strict=True)
    names = dict.fromkeys(name for one in named for name in one)
    scores |= {name: tuple(one.get(name) for one in named) for name in names}
    return ranked(texts, rewards or tuple(score for score in own if score is not None), scores)


def ranked(
    candidates: tuple[str, ...], rewards: tuple[float, ...], scores: Mapping[str, Sequence[float | None]] | None = None
) -> Fields:
    """All three fields, ordered by falling reward (stable); as they are where there are no rewards."""
    if rewards and len(rewards) != len(candidates):
        raise RowError(f"candidates: {len(rewards)} scores for {len(candidates)} candidates, wanted one each, or none")
    order = sorted(range(len(candidates)), key=lambda i: -rewards[i] if rewards else 0)
    return {
        "candidates": tuple(candidates[i] for i in order),
        "candidate_rewards": tuple(rewards[i] for i in order) if rewards else (),
        "candidate_scores": {name: tuple(values[i] for i in order) for name, values in (scores or {}).items()},
    }


def _candidate(value: object, place: str) -> tuple[str, float | None, dict[str, float]]:
    if not isinstance(value, Mapping):
        raise RowError(f'{place}: {fields.described(value)}, wanted {{"text": ..., "score": ...}}')
    try:
        named = fields.named_numbers(value, "rewards")
    except RowError as error:
        raise RowError(f"{place}.{error}") from error
    if len(given := [name for name in ("score", "reward") if fields.has(value, name)]) > 1:
        raise RowError(f"{place}: both score and reward, wanted one of them; the other may be one of its `rewards`")
    score = fields.checked_number(value[given[0]], f"{place}.{given[0]}") if given else None
    return fields.checked_text(value.get("text"), f"{place}.text"), score, named


def _candidate_scores(row: Columns, count: int) -> dict[str, tuple[float | None, ...]]:
    found: dict[str, tuple[float | None, ...]] = {}
    for name, values in fields.mapping(row, "candidate_scores", "a mapping of names to lists of numbers").items():
        place = f"candidate_scores.{name}"
        listed = fields.checked_list(values, place, f"a list of {count} numbers or nulls", count)
        found[str(name)] = tuple(None if one is None else fields.checked_number(one, place) for one in listed)
    return found


def _instruction(row: Columns) -> tuple[Message, ...]:
    """history [[query, response], ...] as turns, then the instruction, with the input on a line of its own."""
    turns = []
    history = (
        fields.checked_list(row["history"], "history", "[[query, response], ...]") if fields.has(row, "history") else ()
    )
    for i, turn in enumerate(history):
        query, response = fields.checked_list(turn, f"history[{i}]", "[query, response]", 2)
        turns.append(Message("user", fields.checked_text(query, f"history[{i}][0]")))
        turns.append(Message("assistant", fields.checked_text(response, f"history[{i}][1]")))
    request = fields.text(row, "instruction")
    if row.get("input") not in (None, ""):
        request = f"{request}\n{fields.text(row, 'input')}"
    return (*turns, Message("user", request))


def _optional_response(row: Columns, name: str) -> str | Message | None:
    return None if row.get(name) in (None, "") else response_of(row, name)


def _number_or_truth(row: Columns, *names: str) -> float | None:
    """1 or 0 of a truth value, else the number."""
    value = row.get(fields.first_of(row, names))
    return float(value) if isinstance(value, bool) else fields.optional_number(row, *names)


def _truth_or_texts(row: Columns, name: str) -> bool | tuple[str, ...] | None:
    return row[name] if isinstance(row.get(name), bool) else fields.texts(row, name)


def _is_list(row: Columns, name: str) -> bool:
    return isinstance(row.get(name), list | tuple)


# field of an Example -> how to read it, and the columns that may carry it, unless the row's format gives it
CARRIERS: Mapping[str, tuple] = {
    "id": (fields.optional_label, "id"),
    "source": (fields.optional_label, "source"),
    "completion": (_optional_response, "completion"),
    "references": (fields.texts, "references", "reference"),
    "chosen": (_optional_response, "chosen"),
    "rejected": (_optional_response, "rejected"),
    "chosen_reward": (fields.optional_number, *CHOSEN_REWARD),
    "rejected_reward": (fields.optional_number, *REJECTED_REWARD),
    "margin": (fields.optional_number, "margin"),
    "correctness": (_number_or_truth, "correctness", "gpt_correctness"),
    "reward": (fields.optional_number, "reward"),
    "rewards": (fields.named_numbers, "rewards"),
    "unfinished": (_truth_or_texts, "unfinished"),
}
OTHER = "other_columns"  # holds, in files of ours, the further columns that have the name of a format's column
CARRIED = {
    OTHER,
    "candidates",
    "candidate_rewards",
    "candidate_scores",
    *messages.COLUMNS,
    *(name for _, *names in CARRIERS.values() for name in names),
}
