"""Every layout of messages under three makers' templates: the ids that transformers' own apply_chat_template gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.readers import read
from pipeline.data.tokenization import Encoder
from pipeline.errors import UserError
from pipeline.records import Example
from tests import makers, tiny

DATE = "2026-03-01"
HELLO = {"role": "user", "content": "hello , tell me more"}
FOUR = {"role": "assistant", "content": "It is four ."}
SYSTEM = {"role": "system", "content": "Be kind ."}
CALL = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"x": 1, "to": "two é"}}}
AS_TEXT = {**CALL, "function": {"name": "add", "arguments": '{"x": 1, "to": "two é"}'}}
CALLS = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "add", "tool_call_id": "c1", "content": 'he said "4"'}
ADD = {"type": "function", "function": {"name": "add", "description": "Adds é", "parameters": {"type": "object"}}}
TOOLS = {"tools": [ADD]}


def parts(turn: dict) -> dict:
    """The message in OpenAI's parts."""
    half = len(turn["content"]) // 2
    texts = (turn["content"][:half], turn["content"][half:])
    return {**turn, "content": [{"type": "text", "text": text} for text in texts]}


# name -> the row as a file has it, the messages that transformers is given, and what it is given beside them
PLAIN, LONG = (
    [HELLO, FOUR],
    [HELLO, FOUR, {"role": "user", "content": "yes"}, {"role": "assistant", "content": " no\n"}],
)
TOLD, USED = [SYSTEM, *PLAIN], [HELLO, CALLS, RESULT, FOUR]
THOUGHT = [HELLO, {**FOUR, "reasoning_content": "two plus two"}]
LAYOUTS: dict[str, tuple[dict, list[dict], dict[str, Any]]] = {
    "plain": ({"messages": PLAIN}, PLAIN, {}),
    "text": ({"prompt": HELLO["content"], "completion": FOUR["content"]}, PLAIN, {}),
    "several turns": ({"messages": LONG}, LONG, {}),
    "a system": ({"messages": TOLD}, TOLD, {}),
    "a developer": ({"messages": [{**SYSTEM, "role": "developer"}, *PLAIN]}, TOLD, {}),
    "parts": ({"messages": [parts(turn) for turn in PLAIN]}, PLAIN, {}),
    "prompt and completion": ({"prompt": LONG[:-1], "completion": LONG[-1:]}, LONG, {}),
    "chosen": ({"chosen": LONG, "rejected": [*LONG[:-1], FOUR]}, LONG, {}),
    "weights": ({"messages": [HELLO, {**FOUR, "weight": 0}, HELLO, {**FOUR, "weight": 1}]}, PLAIN * 2, {}),
    "rewards": ({"messages": [HELLO, {**FOUR, "reward": 0.5}, HELLO, {**FOUR, "score": 1}]}, PLAIN * 2, {}),
    "tools": ({"messages": PLAIN, **TOOLS}, PLAIN, TOOLS),
    "tools as text": ({"messages": PLAIN, "tools": json.dumps([ADD], ensure_ascii=False)}, PLAIN, TOOLS),
    "no tools": ({"messages": PLAIN, "tools": "[]"}, PLAIN, {}),
    "a call": ({"messages": [HELLO, CALLS], **TOOLS}, [HELLO, CALLS], TOOLS),
    "a call as text": ({"messages": [HELLO, {**CALLS, "content": None, "tool_calls": [AS_TEXT]}]}, [HELLO, CALLS], {}),
    "a former call": (
        {"messages": [HELLO, {"role": "assistant", "function_call": AS_TEXT["function"]}]},
        [HELLO, CALLS],
        {},
    ),
    "a result": ({"messages": USED, **TOOLS}, USED, TOOLS),
    "a former result": ({"messages": [HELLO, CALLS, {**RESULT, "role": "function"}, FOUR]}, USED, {}),
    "a second call": ({"messages": [*USED[:-1], CALLS], **TOOLS}, [*USED[:-1], CALLS], TOOLS),
    "thoughts": ({"messages": THOUGHT}, THOUGHT, {}),
    "thoughts and a call": (
        {"messages": [HELLO, {**CALLS, "content": "Wait .", "thinking": "hm"}]},
        [HELLO, {**CALLS, "content": "Wait .", "reasoning_content": "hm"}],
        {},
    ),
    "arguments": (
        {"messages": LONG, "chat_template_kwargs": {"enable_thinking": False, "date_string": "1 May 2020"}},
        LONG,
        {"enable_thinking": False, "date_string": "1 May 2020"},
    ),
}
# what a template of these cannot write is refused
REFUSED = {
    "gemma": {
        "a system": "System role not supported",
        "a developer": "System role not supported",
        **dict.fromkeys(
            ("tools", "tools as text"), "tools: rows have them, but the tokenizer's chat template reads none"
        ),
        **dict.fromkeys(("a call", "a result", "a second call"), "tools: rows have them"),
        **dict.fromkeys(
            ("a call as text", "a former call", "thoughts and a call"), "some have tool_calls, but the token"
        ),
        "a former result": "some have tool_calls",
    },
}


def example_of(row: dict, folder: Path) -> Example:
    """The row of a file."""
    (folder / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    (example,) = read(str(folder / "rows.jsonl")).examples
    return example


def encoder_of(name: str, limit: int = 600, **template) -> Encoder:
    chosen = tiny.settings("sft").template.model_copy(update={"date": DATE, **template})
    return Encoder(makers.tokenizer_of(name), chosen, limit, 200)


def theirs(name: str, messages: list[dict], **given) -> tuple[int, ...]:
    """What transformers makes of a conversation."""
    given = {"date_string": "01 Mar 2026"} | given
    return tuple(makers.tokenizer_of(name).apply_chat_template(messages, tokenize=True, return_dict=False, **given))


def cut_at_end(ids: tuple[int, ...], end: int) -> tuple[int, ...]:
    """Without the line end that some templates write behind the last end of turn."""
    return ids[: max(i for i, token in enumerate(ids) if token == end) + 1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", makers.TEMPLATES)
def test_a_row_is_what_the_makers_template_makes_of_it(name: str, layout: str, tmp_path: Path) -> None:
    row, messages, given = LAYOUTS[layout]
    encoder, example = encoder_of(name), example_of(row, tmp_path)
    answer = example.chosen if example.completion is None else example.completion
    if layout in REFUSED.get(name, {}):
        with pytest.raises(UserError, match=REFUSED[name][layout]):
            encoder.encode(example.prompt, answer)
        return
    found = encoder.encode(example.prompt, answer)
    prompt = theirs(name, messages[:-1], add_generation_prompt=True, **given)
    assert found.prompt_ids == prompt == encoder.encode_prompt(example.prompt)[0]
    whole = cut_at_end(theirs(name, messages, **given), encoder.eos_id)
    assert found.prompt_ids + found.response_ids == whole
    assert makers.ENDS[name] == encoder.tokenizer.convert_ids_to_tokens(found.response_ids[-1])
