"""Messages as files have them: what is read of them, what is refused, and what their weights and rewards do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config.resolve import resolve
from pipeline.data import conversations, convert, dataset, messages
from pipeline.data.fields import RowError
from pipeline.data.prompts import gold
from pipeline.data.readers import read
from pipeline.data.write import row_of
from pipeline.errors import UserError
from pipeline.records import Chat, Example, Message, text_of
from pipeline.rewards.scoring import raw_prompt, reward_columns

USER, SO = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLS, RESULT = {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}
WHY = Message("user", "why?")


def examples(folder: Path, *rows: dict) -> list[Example]:
    """The rows of a file."""
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read(str(folder / "a.jsonl")).examples


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        (
            {**USER, "content": [{"type": "image_url", "image_url": {}}]},
            "m[0].content[0].type: 'image_url' is text, wanted 'text': images, audio and files are not read",
        ),
        ({**USER, "content": [{"type": "text"}]}, "m[0].content[0].text: null, wanted text"),
        ({**USER, "content": []}, "m[0].content: empty, wanted text"),
        ({**USER, "content": None}, "m[0].content: null, wanted text"),
        ({**SO, "content": "", "tool_calls": []}, "m[0].content: empty, wanted text"),
        (
            {**SO, "weight": 0.5},
            "m[0].weight: 0.5 is a number, wanted 0 (is not learned) or 1: to make a",
        ),
        ({**SO, "reward": "high"}, "m[0].reward: 'high' is text, wanted a finite number"),
        ({**USER, "tool_calls": [CALL]}, "m[0].tool_calls: in a message of 'user', wanted them in one of 'assistant'"),
        ({**SO, "tool_calls": {"name": "f"}}, "m[0].tool_calls: {'name': 'f'} is a mapping, wanted a list of {"),
        ({**SO, "tool_calls": [{"function": {}}]}, "m[0].tool_calls[0].function.name: null, wanted text"),
        (
            {**SO, "tool_calls": [{"function": {"name": "f", "arguments": "x=1"}}]},
            "m[0].tool_calls[0].function.arguments: 'x=1' is text, and no JSON, wanted a mapping, or its JSON text",
        ),
        (
            {**SO, "tool_calls": [{"name": "f", "arguments": [1]}]},
            "m[0].tool_calls[0].function.arguments: [1] is a list, wanted a mapping, or its JSON text",
        ),
        ({"role": "tol", "content": "3"}, "m[0].role: 'tol' is text, wanted one of system, developer, user, assistant"),
    ],
)
def test_a_message_that_is_none(turn: dict, said: str) -> None:
    with pytest.raises(RowError) as error:
        messages.read([turn], "m")
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [USER, SO], "tools": 3}, "tools: 3 is a number, wanted a list of functions, or its JSON text"),
        ({"messages": [USER, SO], "tools": '["f"]'}, "tools[0]: 'f' is text, wanted the JSON schema of a function"),
        ({"messages": [USER, SO], "tools": "f()"}, "tools: 'f()' is text, and no JSON, wanted a list of functions"),
        (
            {"messages": [USER, SO], "chat_template_kwargs": [1]},
            "chat_template_kwargs: [1] is a list, wanted a",
        ),
        ({"text": "so", "tools": [CALL]}, "tools: given for plain text, around which no template stands"),
        (
            {"messages": [USER, CALLS, SO]},
            "messages: the last two are the assistant's, wanted a tool's result",
        ),
    ],
)
def test_a_row_whose_template_can_be_given_nothing(row: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        examples(tmp_path, row)
    assert str(error.value).startswith(f"{tmp_path}/a.jsonl:1: {said}")


def test_what_is_in_messages_is_kept_and_can_be_a_key(tmp_path: Path) -> None:
    given = {"a": None, "enable_thinking": False}
    (row,) = examples(
        tmp_path, {"prompt": "why?", "completion": [CALLS], "tools": [CALL], "chat_template_kwargs": given}
    )
    assert row.prompt == Chat((WHY,), json.dumps([CALL]), '{"enable_thinking": false}') and {row.prompt: 1}[row.prompt]
    assert row.prompt != row.prompt.turns and isinstance(row.completion, Message) and {row.completion}
    assert row.completion.given() == {"content": "", **CALLS}
    assert text_of(row.completion) == json.dumps(CALL) and text_of("so") == "so"
    # as of a message without more, by which splits and caches go
    assert repr(WHY) == "Message(role='user', content='why?')"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, CALLS, RESULT, {**SO, "weight": 0}], "tools": [CALL]},
        {"messages": [USER, {**SO, "weight": 1, "reward": 0.5, "name": "x"}, USER, SO], "reward": 2.0},
        {"prompt": "why?", "chosen": [CALLS], "rejected": [SO], "chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_written_rows_read_back_as_they_were(row: dict, tmp_path: Path) -> None:
    before = examples(tmp_path, {**row, "id": "a"})
    after = examples(tmp_path, *map(row_of, before))
    assert after == before
    if not isinstance(before[0].prompt, str):
        assert [tuple(turn) for turn in after[0].prompt] == [tuple(turn) for turn in before[0].prompt]


def test_rewards_are_given_what_a_model_reads_its_prompt_from(tmp_path: Path) -> None:
    rows = examples(
        tmp_path,
        {"prompt": [USER, CALLS, {**RESULT, "name": "f"}], "completion": "so", "tools": [CALL]},
        {"prompt": [USER], "completion": "so"},
    )
    columns = reward_columns(rows)
    assert columns["tools"] == [[CALL], None] and columns["chat_template_kwargs"] == [None, None]
    assert columns["raw_prompt"][0] == [USER, {"content": "", **CALLS}, {**RESULT, "name": "f"}]
    beside = (columns[name] for name in messages.COLUMNS)
    found = [messages.given_back(*one) for one in zip(columns["raw_prompt"], *beside, strict=True)]
    assert found == [row.prompt for row in rows] and raw_prompt(Example("a", "why?")) == "why?"
    assert "tools" not in reward_columns(rows[1:])
    called = Message("assistant", "Wait .", json.dumps({"tool_calls": [CALL], "thinking": "hm"}))
    assert text_of(called) == f"Wait .\n{json.dumps(CALL)}" and messages.given_back([called.given()]) == (called,)


# weights


WEIGHED = [USER, {**SO, "weight": 0}, USER, {**SO, "content": "for"}, USER, {**SO, "content": "no", "weight": 1}]


def test_turns_of_weight_0_are_read_and_not_learned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = examples(tmp_path, {"messages": WEIGHED}, {"messages": [USER, SO]})
    with caplog.at_level("INFO", "tiffin"):
        which = conversations.resolved("auto", rows)
        learned = conversations.learned(rows, which)
    assert which == "all" and conversations.resolved("auto", rows[1:]) == conversations.resolved("last", rows) == "last"
    assert [(row.id, row.completion) for row in learned] == [("a/1/turn-2", "for"), ("a/1", "no"), ("a/2", "so")]
    assert learned[0].prompt == (WHY, Message("assistant", "so"), WHY)  # weights are none of what is read
    assert repr(learned[0].prompt[1]) == "Message(role='assistant', content='so')"
    assert caplog.messages[-2:] == [
        "train_on: 1 of 2 rows have messages with weights: all turns are learned",
        "train_on=all: 1 of 4 turns have weight 0: not learned",
    ]
    assert conversations.watched(rows, "all") == learned


def test_a_last_turn_of_weight_0_teaches_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = examples(tmp_path, {"messages": [USER, {**SO, "weight": 0}]}, {"messages": [USER, SO]})
    assert conversations.learned(rows, "last") == conversations.watched(rows, "last") == rows[1:]
    assert "train_on=last: 1 of 2 turns have weight 0: not learned" in caplog.text
    with pytest.raises(UserError, match=r"a/1: weight 0, as all 1 turns have that train_on=all learns, wanted 1"):
        conversations.learned(rows[:1], "all")
    assert [gold(row) for row in rows] == [(), ("so",)]


def test_weights_are_no_error_where_no_turn_goes_before(tmp_path: Path) -> None:
    rows = examples(tmp_path, {"messages": [USER, {**SO, "weight": 1}]})
    assert conversations.learned(rows, "all") == rows


# rewards of turns


def test_each_turn_with_a_reward_is_a_scored_row(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    last = {"role": "assistant", "content": "no", "reward": 0.25}
    both = [USER, {**SO, "reward": 1}, USER, {**SO, "content": "for"}, USER, last]
    rows = [{"messages": both, "reward": 9, "k": 1}, {"messages": both[:4]}, {"messages": [USER, SO], "reward": 2}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["stage=sft", f"data.train={path}", "data.validation_fraction=0"]
    (train,) = dataset.splits(resolve(words).settings.data, 0, ("train",), carry=True)
    scored = convert.to_scored(train, "chosen")
    found = [(row.id, row.completion, row.reward, row.columns) for row in scored]
    assert found == [
        ("a/1/turn-1", "so", 1.0, {"k": 1}),
        ("a/1", "no", 0.25, {"k": 1}),
        ("a/2/turn-1", "so", 1.0, {"k": None}),
        ("a/3", "so", 2.0, {"k": None}),
    ]
    assert scored[0].prompt == (WHY,) and scored[1].prompt[1] == Message("assistant", "so")
    said = "".join(capsys.readouterr())
    assert "rows with a reward beside that of their last message 1: the message's counts" in said
    assert (
        "train: 2 of 3 rows have rewards of earlier turns: each such turn is a row of its own in stage=rl and score; "
        "the last answer of 1 has none and is left out there"
    ) in said


def test_the_answers_of_a_pair_may_bring_their_rewards(tmp_path: Path) -> None:
    chosen, rejected = [USER, {**SO, "score": 2}], [USER, {**SO, "content": "no", "score": 1}]
    pairs = [{"chosen": chosen, "rejected": rejected}, {"chosen": chosen, "rejected": rejected, "chosen_score": 5}]
    found = [(row.chosen, row.chosen_reward, row.rejected_reward) for row in examples(tmp_path, *pairs)]
    assert found == [("so", 2.0, 1.0), ("so", 5.0, 1.0)]
