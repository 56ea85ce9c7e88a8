"""Every layout of messages under three makers' templates: the ids that transformers' own apply_chat_template gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import conversations, encoding
from pipeline.data.cuts import fewer_turns
from pipeline.data.encoding import completion_rows, encode
from pipeline.data.readers import read
from pipeline.data.tokenization import Encoder
from pipeline.data.written_template import for_others
from pipeline.errors import UserError
from pipeline.records import Example, Message
from reward_models import learned
from tests import makers, tiny
from tests.chats import byte_pairs

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
        for _ in range(2):  # not the first time alone
            with pytest.raises(UserError, match=REFUSED[name][layout]):
                encoder.encode(example.prompt, answer)
        return
    found = encoder.encode(example.prompt, answer)
    prompt = theirs(name, messages[:-1], add_generation_prompt=True, **given)
    assert found.prompt_ids == prompt == encoder.encode_prompt(example.prompt)[0]
    whole = cut_at_end(theirs(name, messages, **given), encoder.eos_id)
    assert found.prompt_ids + found.response_ids == whole
    assert makers.ENDS[name] == encoder.tokenizer.convert_ids_to_tokens(found.response_ids[-1])


def test_a_call_of_a_tool_of_the_makers_ends_with_a_token_of_its_own(tmp_path: Path) -> None:
    search = {"type": "function", "function": {"name": "search", "arguments": {"query": "beans"}}}
    messages, given = [HELLO, {**CALLS, "tool_calls": [search]}], {"builtin_tools": ["search"]}
    example = example_of({"messages": messages, "chat_template_kwargs": given}, tmp_path)
    row = encoder_of("llama").encode(example.prompt, example.completion)
    assert row.prompt_ids + row.response_ids == theirs("llama", messages, **given)
    tokens = makers.tokenizer_of("llama").convert_ids_to_tokens(row.response_ids)
    assert (tokens[0], tokens[-1]) == ("<|python_tag|>", "<|eom_id|>")


def test_a_call_may_end_with_a_token_of_its_own_which_sampling_stops_at() -> None:
    """As gpt-oss has <|call|>."""
    calling = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role }}"
        "{% if m.tool_calls %}{{ m.tool_calls | tojson + '<|eom|>' }}{% else %}{{ m.content + '<|im_end|>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    tokenizer = byte_pairs(calling)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|eom|>"]})
    encoder = Encoder(tokenizer, tiny.settings("sft").template, 64, 200)
    assert tokenizer.convert_ids_to_tokens(list(encoder.stop_ids)) == ["<|im_end|>", "</s>", "<|eom|>"]
    row = encoder.encode("why?", Message("assistant", "", json.dumps({"tool_calls": [CALL]})))
    assert (
        row.response_ids[-1] == encoder.stop_ids[2] and encoder.encode("why?", "so").response_ids[-1] == encoder.eos_id
    )


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_every_answer_and_call_is_learned_and_no_result(name: str, tmp_path: Path) -> None:
    """One row holds the whole conversation, of which two turns with their ends are learned."""
    example = example_of({"messages": [*USED, HELLO, FOUR], **TOOLS}, tmp_path)
    encoder, tokenizer = encoder_of(name), makers.tokenizer_of(name)
    apart = encode(conversations.learned([example], "all"), encoder, completion_rows)
    assert [item.example.id for item in apart] == ["rows/1/turn-1", "rows/1/turn-2", "rows/1"]
    rows = [item.rows[0] for item in encoding.joined(apart)]
    said = [
        [token for token, is_learned in zip(row.response_ids, conversations.marks(row), strict=True) if is_learned]
        for row in rows
    ]
    end, call = makers.ENDS[name], '{"x": 1, "to": "two é"}'
    calls = {
        "qwen": f'<tool_call>\n{{"name": "add", "arguments": {call}}}\n</tool_call>{end}',
        "llama": f'{{"name": "add", "parameters": {call}}}{end}',
    }[name]
    # what Qwen's writes after the user's last question, and leaves out of the history: rows stay apart there
    thought = "<think>\n\n</think>\n\n" if name == "qwen" else ""
    texts = [tokenizer.decode([*ids]) for ids in said]
    assert "".join(texts) == f"{thought}{calls}{thought}It is four .{end}" + f"{thought}It is four .{end}"
    assert len(rows) == (3 if name == "qwen" else 1)


def test_thinking_is_off_as_set_and_a_rows_word_goes_before(tmp_path: Path) -> None:
    off = encoder_of("qwen", arguments={"enable_thinking": False})
    assert off.prompt_text("why?").endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    row, whole = (
        off.encode("why?", "so"),
        theirs("qwen", [{"role": "user", "content": "why?"}, {**FOUR, "content": "so"}]),
    )
    assert row.prompt_ids + row.response_ids == cut_at_end(whole, off.eos_id)
    assert off.decode(row.response_ids[:-1], "why?") == "so"
    on = example_of({"prompt": "why?", "completion": "so", "chat_template_kwargs": {"enable_thinking": True}}, tmp_path)
    row = off.encode(on.prompt, on.completion)
    assert row == encoder_of("qwen").encode("why?", "so") and len(row.response_ids) > 5
    assert off.decode(row.response_ids[:-1], on.prompt) == "so"
    with pytest.raises(UserError, match=r"wanted it to follow the prompt: has it reasoning_content where"):
        off.encode("why?", Message("assistant", "so", '{"reasoning_content": "hm"}'))


def test_what_a_template_does_not_read_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    messages = [{**HELLO, "mood": "calm"}, {**FOUR, "reasoning_content": "hm"}]
    example = example_of({"messages": messages, "chat_template_kwargs": {"enable_thinkin": False}}, tmp_path)
    encoder, caplog.handler.records[:] = encoder_of("qwen"), []
    for _ in range(2):
        encoder.encode(example.prompt, example.completion)
    assert caplog.messages == [
        "messages: some have 'mood', but the tokenizer's chat template does not read it: the model does not see it",
        "chat_template_kwargs: 'enable_thinkin' is no variable of the chat template, wanted one of enable_thinking; "
        "did you mean 'enable_thinking'?; it does nothing",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"enable_thinkin": False}, r"template\.arguments: 'enable_thinkin' is no variable .*'enable_thinking'"),
        ({"tools": []}, r"template\.arguments: 'tools' is no variable of the chat template, wanted one of enable_th"),
    ],
)
def test_a_setting_that_the_template_does_not_read_is_refused(arguments: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        encoder_of("qwen", arguments=arguments)
    with pytest.raises(UserError, match=r"template: template\.kind=text reads none of template\.arguments"):
        tiny.settings("sft", "template.kind=text", "template.arguments={enable_thinking: false}")
    with pytest.raises(UserError, match=r"template\.arguments: a, but template\.kind=text reads none"):
        Encoder(tiny.tokenizer(), tiny.settings("sft", "template.arguments={a: 1}").template, 64, 64)


@pytest.mark.parametrize("layout", ["tools", "a call as text", "a result"])
def test_our_own_lines_write_no_tools(layout: str, tmp_path: Path) -> None:
    example = example_of(LAYOUTS[layout][0], tmp_path)
    with pytest.raises(UserError, match=r"template\.kind=text (reads|writes) none, wanted a model with a chat"):
        encoder_of("qwen", kind="text").encode(example.prompt, example.completion)


def test_our_own_lines_leave_thoughts_out_and_say_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    example, encoder = example_of({"messages": THOUGHT}, tmp_path), encoder_of("qwen", kind="text")
    row = encoder.encode(example.prompt, example.completion)
    assert row == encoder.encode(HELLO["content"], FOUR["content"])
    assert "messages: some have 'reasoning_content', but template.kind=text does not read it" in caplog.messages[-1]


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_reward_models_read_a_call_as_the_template_writes_it(name: str, tmp_path: Path) -> None:
    row, messages, given = LAYOUTS["a second call"]
    example, encoder = example_of(row, tmp_path), encoder_of(name)
    whole = learned.read_conversation(encoder, example.prompt, example.completion, 1000)
    assert whole == theirs(name, messages, **given)
    trained = learned.read_as_trained(encoder, example.prompt, example.completion, 1000)
    assert trained == cut_at_end(whole, encoder.eos_id)


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_special_tokens_spelled_in_tools_and_calls_are_text(name: str, tmp_path: Path) -> None:
    end = makers.ENDS[name]
    tool = {"type": "function", "function": {"name": "add", "description": f"ends {end}"}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": end}}}
    messages = [HELLO, {"role": "assistant", "tool_calls": [call]}]
    example = example_of({"messages": messages, "tools": [tool]}, tmp_path)
    encoder = encoder_of(name)
    row = encoder.encode(example.prompt, example.completion)
    whole = makers.tokenizer_of(name).apply_chat_template(
        messages, tools=[tool], tokenize=False, date_string="01 Mar 2026"
    )
    ids = row.prompt_ids + row.response_ids
    assert encoder.tokenizer.decode(ids) == whole.rstrip("\n") and row.spelled
    assert ids.count(encoder.eos_id) == whole.count(end) - 2 and row.response_ids.count(encoder.eos_id) == 1


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_a_long_prompt_keeps_tools_and_no_result_without_its_call(name: str, tmp_path: Path) -> None:
    example = example_of({"messages": [HELLO, FOUR, *USED], **TOOLS}, tmp_path)
    whole = encoder_of(name).encode_prompt(example.prompt)[0]
    # one turn of the user and one of the assistant less, then less and less of the longest text
    shorter = theirs(name, USED[:-1], add_generation_prompt=True, **TOOLS)
    assert encoder_of(name, limit=len(whole) - 1).encode_prompt(example.prompt) == (shorter, True)
    cut = encoder_of(name, limit=len(shorter) - 2).encode_prompt(example.prompt)[0]
    text = makers.tokenizer_of(name).decode(cut)
    assert len(cut) <= len(shorter) - 2 and "Adds é" in text and "4" in text and '"x": 1' in text
    for part in fewer_turns(example.prompt, "beginning"):
        assert part.tools and part.turns[-1].role == "user"


def test_the_saved_template_has_the_arguments_built_in() -> None:
    encoder = encoder_of("qwen", arguments={"enable_thinking": False})
    saved, asked = for_others(encoder), [HELLO]
    found = theirs("qwen", asked, chat_template=saved, add_generation_prompt=True)
    assert found == theirs("qwen", asked, enable_thinking=False, add_generation_prompt=True)
    again = theirs("qwen", asked, chat_template=saved, add_generation_prompt=True, enable_thinking=True)
    assert again == theirs("qwen", asked, add_generation_prompt=True) != found
