"""Chat messages as files have them, and what a row brings for their template: OpenAI's layout, which TRL's is too.

A message has a role and a content, which is text or parts of it. What else a template can be given of it (`tool_calls`,
`name`, `tool_call_id`, `reasoning_content` ...) is kept as JSON text. `function` and `function_call`, the former names
of `tool` and `tool_calls`, are read as these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from pipeline.data import fields
from pipeline.data.fields import Columns, RowError
from pipeline.errors import did_you_mean
from pipeline.records import Answer, Chat, Message

ROLES = ("system", "developer", "user", "assistant", "tool")
TOOLS, ARGUMENTS = "tools", "chat_template_kwargs"  # columns for the template
COLUMNS = (TOOLS, ARGUMENTS)
REWARD = ("reward", "score")
READ = ("role", "content", "tool_calls", "function_call")  # keys of every message that are not kept as they are
READ_OF_ANSWERS = ("weight", *REWARD)  # and of the assistant's
WANTED = '{"role": ..., "content": ...}'
WANTED_CALL = '{"type": "function", "function": {"name": ..., "arguments": {...}}}'

Prompt = str | tuple[Message, ...] | Chat


def read(value: object, place: str) -> tuple[Message, ...]:
    """Chat messages from a list of {"role": ..., "content": ...}; at least one. Raises RowError."""
    turns = fields.checked_list(value, place, f"a list of {WANTED}")
    if not turns:
        raise RowError(f"{place}: empty, wanted at least one message")
    return tuple(_message(turn, f"{place}[{i}]") for i, turn in enumerate(turns))


def for_template(row: Columns, prompt: Prompt) -> Prompt:
    """`prompt` with the row's columns `tools` and `chat_template_kwargs`, where it has them; a text is then a message.

    Both may be JSON text. An argument that is null counts as not given: tables of Arrow have them in every row.
    """
    tools = [_mapping(one, f"{TOOLS}[{i}]", "the JSON schema of a function") for i, one in enumerate(_tools(row))]
    given = _unpacked(row.get(ARGUMENTS), ARGUMENTS, "a mapping")
    arguments = {} if given is None else _mapping(given, ARGUMENTS, "a mapping of the template's variables")
    arguments = {name: value for name, value in arguments.items() if value is not None}
    if not tools and not arguments:
        return prompt
    if not prompt:
        raise RowError(f"{TOOLS if tools else ARGUMENTS}: given for plain text, around which no template stands")
    turns = (Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
    return Chat(turns, _json(tools, TOOLS) if tools else "", _json(arguments, ARGUMENTS) if arguments else "")


def any_reward(row: Columns) -> bool:
    """Whether a message of the row has a reward, so that the row need have none."""
    turns = row.get("messages")
    listed = turns if isinstance(turns, list | tuple) else ()
    return any(isinstance(turn, Mapping) and fields.first_of(turn, REWARD) is not None for turn in listed)


def overrules(row: Columns) -> bool:
    """Whether a sound row has a reward, and its last message another one, which counts."""
    last = row["messages"][-1] if fields.has(row, "messages") else {}
    return fields.first_of(row, REWARD) is not None and fields.first_of(last, REWARD) is not None


def given_back(raw: str | Sequence[Columns], tools: object = None, arguments: object = None) -> Prompt:
    """The prompt that rewards are given as `raw_prompt`, with the columns of `for_template` beside it."""
    if isinstance(raw, str):
        return raw
    rest = [{name: value for name, value in turn.items() if name not in ("role", "content")} for turn in raw]
    turns = tuple(
        Message(turn["role"], turn["content"], _json(more, "raw_prompt") if more else "")
        for turn, more in zip(raw, rest, strict=True)
    )
    return for_template({TOOLS: tools, ARGUMENTS: arguments}, turns)


def answer_of(message: Message) -> Answer:
    """What is to be learned of a message, its weight and reward aside: its text where that is all there is of it."""
    return message._replace(weight=None, reward=None) if message.more else message.content


def as_row(message: Message) -> dict[str, object]:
    """A message as `read` reads it."""
    numbers = {"weight": message.weight, "reward": message.reward}
    return message.given() | {name: value for name, value in numbers.items() if value is not None}


def _message(turn: object, place: str) -> Message:
    turn = _mapping(turn, place, WANTED)
    role = "tool" if turn.get("role") == "function" else turn.get("role")
    if role not in ROLES:
        hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        raise RowError(f"{place}.role: {fields.described(role)}, wanted one of {', '.join(ROLES)}{hint}")
    answers = role == "assistant"
    own = (*READ, *READ_OF_ANSWERS) if answers else READ
    more = {name: value for name, value in turn.items() if name not in own and value is not None}
    if calls := _calls(turn, place):
        if not answers:
            raise RowError(f"{place}.tool_calls: in a message of '{role}', wanted them in one of 'assistant'")
        more["tool_calls"] = calls
    # a call says nothing beside, and a tool's result may be empty
    content = _content(turn.get("content"), f"{place}.content", may_be_empty=bool(calls) or role == "tool")
    message = Message(role, content, _json(more, place) if more else "")
    if not answers:
        return message
    reward = fields.first_of(turn, REWARD)
    number = None if reward is None else fields.checked_number(turn[reward], f"{place}.{reward}")
    return message._replace(weight=_weight(turn, place), reward=number)


def _content(value: object, place: str, may_be_empty: bool) -> str:
    """The text of a content, or of its parts, which follow one another with nothing between."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = "".join(_part(part, f"{place}[{i}]") for i, part in enumerate(value))
    return "" if may_be_empty and value in (None, "") else fields.checked_text(value, place)


def _part(part: object, place: str) -> str:
    part = _mapping(part, place, '{"type": "text", "text": ...}')
    if part.get("type") != "text":
        kind = fields.described(part.get("type"))
        raise RowError(f"{place}.type: {kind}, wanted 'text': images, audio and files are not read")
    text = part.get("text")
    if not isinstance(text, str):
        raise RowError(f"{place}.text: {fields.described(text)}, wanted text")
    return text


def _calls(turn: Columns, place: str) -> list[dict[str, object]]:
    """The calls of tools of a message, each with its arguments as a mapping, which templates write as JSON."""
    listed, name = turn.get("tool_calls"), f"{place}.tool_calls"
    if listed is None and turn.get("function_call") is not None:
        listed, name = [{"type": "function", "function": turn["function_call"]}], f"{place}.function_call"
    if listed is None:
        return []
    calls = fields.checked_list(listed, name, f"a list of {WANTED_CALL}")
    return [_call(call, f"{name}[{i}]") for i, call in enumerate(calls)]


def _call(call: object, place: str) -> dict[str, object]:
    call = dict(_mapping(call, place, WANTED_CALL))
    function = _mapping(call["function"], f"{place}.function", WANTED_CALL) if "function" in call else call
    fields.checked_text(function.get("name"), f"{place}.function.name")
    where = f"{place}.function.arguments"
    arguments = _unpacked(function.get("arguments"), where, "a mapping")
    arguments = {} if arguments is None else _mapping(arguments, where, "a mapping, or its JSON text")
    whole = {**function, "arguments": dict(arguments)}
    return {**call, "function": whole} if "function" in call else whole


def _weight(turn: Columns, place: str) -> float | None:
    """0 or 1, as OpenAI has them; a loss counts a token or does not."""
    if turn.get("weight") is None:
        return None
    weight = fields.checked_number(turn["weight"], f"{place}.weight")
    if weight not in (0.0, 1.0):
        raise RowError(
            f"{place}.weight: {fields.described(turn['weight'])}, wanted 0 (is not learned) or 1: to make a row count "
            "more give it a reward and use stage=rl, or repeat it"
        )
    return weight


def _tools(row: Columns) -> Sequence[object]:
    value = _unpacked(row.get(TOOLS), TOOLS, "a list of functions")
    return () if value is None else fields.checked_list(value, TOOLS, "a list of functions, or its JSON text")


def _unpacked(value: object, place: str, wanted: str) -> object:
    """`value`, or what it is the JSON text of; None of empty text."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError:
        raise RowError(f"{place}: {fields.described(value)}, and no JSON, wanted {wanted}, or its JSON text") from None


def _mapping(value: object, place: str, wanted: str) -> Columns:
    if not isinstance(value, Mapping):
        raise RowError(f"{place}: {fields.described(value)}, wanted {wanted}")
    return value


def _json(value: list | dict, place: str) -> str:
    """The JSON text of `value`, whose order is that in which templates write it."""
    if not fields.fits_json(value):
        raise RowError(f"{place}: holds what JSON cannot, wanted text, numbers, lists and mappings of these")
    return json.dumps(value, ensure_ascii=False)
