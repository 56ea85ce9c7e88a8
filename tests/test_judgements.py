"""Labels, thumbs and stars as rewards; columns named by data.columns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config.resolve import resolve
from pipeline.data import convert, dataset, pairs
from pipeline.data.judgements import number
from pipeline.data.readers import Filters, head, read
from pipeline.data.write import write_rows
from pipeline.errors import UserError
from pipeline.records import Example, Message
from stages import faults

ROW = {"prompt": "p", "completion": "c"}


def write(folder: Path, *rows: dict, name: str = "train.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def judged(folder: Path, name: str, *values: object) -> list[Example]:
    return read(write(folder, *({**ROW, name: value} for value in values))).examples


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, (1.0, "true or false")),
        ("False", (0.0, "true or false")),
        ("Yes", (1.0, "true or false")),
        ("no", (0.0, "true or false")),
        ("up", (1.0, "thumbs up or down")),
        ("Thumbs_Down", (0.0, "thumbs up or down")),
        ("thumbs-up", (1.0, "thumbs up or down")),
        ("👍🏽", (1.0, "thumbs up or down")),
        ("👎", (0.0, "thumbs up or down")),
        ("positive", (1.0, "thumbs up or down")),
        (4, (4.0, "numbers")),
        ("-1", (-1.0, "numbers")),
        ("4.5 stars", (4.5, "numbers")),
        ("1 star", (1.0, "numbers")),
        ("★★★★☆", (4.0, "numbers")),
        ("☆☆☆☆☆", (0.0, "numbers")),
        ("⭐️⭐️", (2.0, "numbers")),
        ("4/5", (4.0, "of 5")),
        ("7 out of 10", (7.0, "of 10")),
    ],
)
def test_what_a_judgement_stands_for(value, expected) -> None:
    assert number(value, "rating") == expected


@pytest.mark.parametrize(
    ("name", "values", "rewards", "said"),
    [
        ("label", (True, False), (1.0, 0.0), "the reward is label, true or false; rewards 0..1, levels 2"),
        ("label", (1, 0), (1.0, 0.0), "the reward is label, true or false"),
        ("kto_tag", ("true", "false"), (1.0, 0.0), "the reward is kto_tag, true or false"),
        ("thumbs", ("up", "down"), (1.0, 0.0), "the reward is thumbs, thumbs up or down"),
        ("feedback", ("👎", "👍"), (0.0, 1.0), "the reward is feedback, thumbs up or down"),
        ("thumbs", (1, -1), (1.0, -1.0), "the reward is thumbs, numbers; rewards -1..1, levels 2"),
        ("stars", ("★★★☆☆", 5), (3.0, 5.0), "the reward is stars, numbers; rewards 3..5, levels 2"),
        ("rating", ("4/5", "1/5"), (4.0, 1.0), "the reward is rating, of 5; rewards 1..4, levels 2"),
    ],
)
def test_the_one_column_that_judges_is_the_reward(tmp_path, capsys, name, values, rewards, said) -> None:
    found = judged(tmp_path, name, *values)
    assert found == [
        Example(f"train/{i}", "p", "c", reward=one, rewards={name: one}) for i, one in enumerate(rewards, start=1)
    ]
    assert f"format scored; {said}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "values", "why"),
    [
        ("label", (1, 0, 2), "label is no reward: 2 is a number, wanted true or false"),
        ("label", ("spam", "ham"), "label is no reward: 'spam' is text, wanted true or false"),
        ("feedback", ("up", "The second step is wrong."), "feedback is no reward: 'The second step is wrong.' is text"),
        ("rating", ("4/5", "8/10"), "rating is no reward: some of 10, some of 5"),
        ("rating", ("up", 3), "rating is no reward: some numbers, some thumbs up or down"),
        ("stars", (True, False), "stars is no reward: True is a truth value, wanted a number of stars"),
    ],
)
def test_another_column_of_such_a_name_is_none(tmp_path, capsys, name, values, why) -> None:
    rows = [{**ROW, name: value} for value in values]
    found = read(write(tmp_path, *rows), carry=True)
    assert found.format == "supervised" and [one.reward for one in found.examples] == [None] * len(values)
    assert [one.columns for one in found.examples] == [{name: value} for value in values]
    assert why in capsys.readouterr().out


def test_columns_without_values_and_rewards_of_another_kind(tmp_path) -> None:
    (found,) = read(write(tmp_path, {**ROW, "label": True, "chosen": None, "reward": None})).examples
    assert found.reward == 1.0
    path = write(tmp_path, {**ROW, "helpfulness": 1, "coherence": 2, "rewards": [1]})
    with pytest.raises(UserError, match=r"train.jsonl:1: rewards: \[1\] is a list, wanted a mapping"):
        read(path)


def test_rows_without_a_judgement_and_of_another_kind_are_bad(tmp_path) -> None:
    rows = [{**ROW, "label": True}, {**ROW, "label": None}, ROW]
    path = write(tmp_path, *rows)
    with pytest.raises(UserError, match=r":2: label: null, wanted true or false .*next 3: label: missing"):
        read(path)
    assert len(read(path, max_bad_rows=2).examples) == 1
    late = write(tmp_path, *[{**ROW, "rating": "4/5"}] * 1000, {**ROW, "rating": "8/10"})
    with pytest.raises(UserError, match=r":1001: rating: '8/10' is text, wanted of 5 as in other rows"):
        read(late)


def test_a_format_without_rewards_reads_no_judgement(tmp_path) -> None:
    found = read(write(tmp_path, {**ROW, "label": True}, {**ROW, "label": None}), "supervised").examples
    assert [(one.reward, one.rewards) for one in found] == [(None, {}), (None, {})]


def test_several_columns_that_judge_are_named_and_none_is_guessed(tmp_path, capsys) -> None:
    (found,) = read(write(tmp_path, {**ROW, "rating": 4, "thumbs": "up"})).examples
    assert (found.reward, found.rewards) == (None, {"rating": 4.0, "thumbs": 1.0})
    assert (
        "no reward, but scores by name (thumbs, rating): choose with reward='{thumbs: 1.0}'" in capsys.readouterr().out
    )


def test_a_reward_column_wins_and_the_label_stays(tmp_path) -> None:
    (found,) = read(write(tmp_path, {**ROW, "reward": 0.5, "label": True}), carry=True).examples
    assert (found.reward, found.rewards, found.columns) == (0.5, {}, {"label": True})


def test_one_name_among_rewards_is_the_reward_and_two_are_not(tmp_path, capsys) -> None:
    rows = [{**ROW, "rewards": {"good": 1}}, {**ROW, "rewards": {"good": 3}}]
    assert [(one.reward, one.rewards) for one in read(write(tmp_path, *rows)).examples] == [
        (1.0, {"good": 1.0}),
        (3.0, {"good": 3.0}),
    ]
    assert "the reward is good, the only one of `rewards`; rewards 1..3, levels 2" in capsys.readouterr().out
    several = read(write(tmp_path, rows[0], {**ROW, "rewards": {"good": 3, "safe": 1}})).examples
    assert [one.reward for one in several] == [None, None]
    assert "no reward, but scores by name (good, safe): choose with reward='{good: 1.0}'" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"choose one of its `rewards` with data.columns='\{reward: good\}'"):
        convert.with_score(several[0])


def test_a_label_that_travels_is_not_read_as_a_reward_later(tmp_path) -> None:
    row = Example("a", "p", "c", columns={"label": True, "helpfulness": 3, "correctness_": 1})
    write_rows(tmp_path / "rows.jsonl", [row])
    assert read(str(tmp_path / "rows.jsonl"), carry=True).examples == [row]


FLAT = {"question": "q", "reply": "r", "annotations": {"quality": 3, "tone": {"kind": 2}}, "good": True, "rated": "★★"}


@pytest.mark.parametrize(
    ("given", "row", "expected"),
    [
        (
            {"prompt": "question", "completion": "reply", "reward": "annotations.quality"},
            FLAT,
            Example("train/1", "q", "r", reward=3.0),
        ),
        (
            {"prompt": "question", "completion": "reply", "reward": "good"},
            FLAT,
            Example("train/1", "q", "r", reward=1.0),
        ),
        (
            {"prompt": "question", "completion": "reply", "reward": "rated"},
            FLAT,
            Example("train/1", "q", "r", reward=2.0),
        ),
        (
            {
                "prompt": "question",
                "completion": "reply",
                "rewards": ["annotations.quality", "annotations.tone.kind", "good"],
            },
            FLAT,
            Example("train/1", "q", "r", rewards={"quality": 3.0, "kind": 2.0, "good": 1.0}),
        ),
        ({"completion": "b.c"}, {"prompt": "p", "completion": "a", "b.c": "d"}, Example("train/1", "p", "d")),
        (
            {"candidates": "answers.text", "candidate_rewards": "answers.votes"},
            {"prompt": "p", "answers": [{"text": "a", "votes": 1}, {"text": "b", "votes": 2}]},
            Example("train/1", "p", candidates=("b", "a"), candidate_rewards=(2.0, 1.0)),
        ),
        (
            {"reward": "helpfulness"},
            {**ROW, "helpfulness": 4, "coherence": 3},
            Example("train/1", "p", "c", reward=4.0, rewards={"helpfulness": 4.0, "coherence": 3.0}),
        ),
        (
            {"reward": "safe"},
            {**ROW, "rewards": {"safe": 1, "brief": 2}},
            Example("train/1", "p", "c", reward=1.0, rewards={"safe": 1.0, "brief": 2.0}),
        ),
        (
            {"messages": "dialogue"},
            {"dialogue": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}]},
            Example("train/1", (Message("user", "p"),), "c"),
        ),
    ],
)
def test_columns_are_read_under_other_names(tmp_path, given, row, expected) -> None:
    assert read(write(tmp_path, row), columns=given).examples == [expected]


def test_what_was_mapped_is_said(tmp_path, capsys) -> None:
    path = write(tmp_path, {"prompt": "old", "question": "q", "answer": "a", "helpfulness": 2})
    given = {"prompt": "question", "completion": "answer", "reward": "helpfulness"}
    assert read(path, columns=given).examples == [Example("train/1", "q", "a", reward=2.0)]
    assert capsys.readouterr().out == (
        f"{path}: 1 of 1 rows, format scored; prompt is question, completion is answer, reward is helpfulness; own "
        "prompt not read; the reward is helpfulness, numbers; rewards 2..2, levels 1\n"
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"promt": "question"},
            "data.columns: 'promt' is no column that is read here, wanted one of prompt,.*'prompt'?",
        ),
        (
            {"prompt": "qestion"},
            "train.jsonl: data.columns: prompt: no column 'qestion', wanted one of question,.*'question'?",
        ),
        (
            {"reward": "annotations.qualty"},
            "data.columns: reward: no column 'annotations.qualty', wanted one of quality, tone.*mean 'quality'?",
        ),
        (
            {"reward": ["good", "rated"]},
            "data.columns: reward: ['good', 'rated'], wanted one name: only `rewards` takes",
        ),
        ({"rewards": ["annotations.tone", "rated.tone"]}, "annotations.tone, rated.tone would be called tone, wanted"),
        ({"source": "reply"}, "no known format.*say which is which with data.columns="),
        (
            {"prompt": "question", "completion": "reply", "margin": "reply"},
            "train.jsonl:1: margin: 'r' is text, wanted a finite number (data.columns: margin is reply)",
        ),
    ],
)
def test_names_that_are_not_there(tmp_path, given, said) -> None:
    path = write(tmp_path, FLAT)
    for reading in (lambda: read(path, columns=given), lambda: head(path, None, Filters(), 0, given)):
        with pytest.raises(UserError) as caught:
            reading()
        assert all(part in str(caught.value) for part in said.split(".*"))


def test_settings_reach_the_rows_and_the_checks_before_a_start(tmp_path) -> None:
    rows = [{"question": f"q{i % 2}", "reply": f"r{i}", "stars": i} for i in range(4)]
    path = write(tmp_path, *rows)
    words = ["stage=reward", f"data.train={path}", f"data.validation={path}", f"runs_dir={tmp_path}"]
    given = "data.columns={prompt: question, completion: reply}"
    settings = resolve([*words, given]).settings.data
    train, _ = dataset.splits(settings, 0)
    assert [(one.chosen, one.rejected) for one in pairs.paired(train)] == [("r2", "r0"), ("r3", "r1")]
    asked = resolve([*words, "data.columns={prompt: qestion}"])
    assert [line for line in faults.of([asked], {}) if "no column 'qestion'" in line]
    assert not faults.of([resolve([*words, given])], {})


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{}, {"thumbs": "up"}], ":1: thumbs: missing, wanted up or down"),
        (
            [{"reward": None, "score": 80}, {"reward": 1, "score": 90}],
            ":1: reward: no value, wanted a finite number as",
        ),
        ([{"reward": 1}, {"score": 80}], ":2: reward: no value, wanted a finite number as in other rows (`score` may"),
        (
            [{"helpfulness": 3, "correctness": 1}, {"helpfulness": 3, "correctness": 1, "rewards": {"correctness": 2}}],
            ":2: rewards: correctness is also a column, of another value",
        ),
    ],
)
def test_rewards_are_not_taken_from_where_other_rows_have_none(tmp_path, rows, said) -> None:
    path = write(tmp_path, *(ROW | row for row in rows))
    with pytest.raises(UserError) as caught:
        read(path)
    assert f"{path}{said}" in str(caught.value) and "data.max_bad_rows=1" in str(caught.value)
    assert len(read(path, max_bad_rows=1).examples) == 1


def test_a_score_beside_a_reward_is_said_not_to_be_read(tmp_path, capsys) -> None:
    path = write(tmp_path, {**ROW, "reward": 1, "score": 80})
    assert read(path).examples[0].reward == 1.0
    assert "score is not read: the reward is reward" in capsys.readouterr().out
    assert read(path, columns={"reward": "score"}).examples[0].reward == 80.0


def test_rewards_of_candidates_by_either_name_and_by_others(tmp_path, capsys) -> None:
    listed = [{"text": "a", "reward": 1}, {"text": "b", "reward": 2}]
    (row,) = read(write(tmp_path, {"prompt": "p", "candidates": listed})).examples
    assert (row.candidates, row.candidate_rewards) == (("b", "a"), (2.0, 1.0))
    path = write(tmp_path, {"prompt": "p", "candidates": [{"text": "a", "reward": 1, "score": 2}]})
    with pytest.raises(UserError, match=r"candidates\[0\]: both score and reward, wanted one of them"):
        read(path)
    named = [{"text": "a", "rewards": {"x": 1}}, {"text": "b", "rewards": {"x": 2}}]
    path = write(tmp_path, {"prompt": "p", "candidates": named})
    assert read(path).examples[0].candidates == ("a", "b")
    cure = "data.columns='{candidate_rewards: candidates.rewards.x}'"
    assert f"so that the order given counts: choose with {cure}" in capsys.readouterr().out
    assert read(path, columns={"candidate_rewards": "candidates.rewards.x"}).examples[0].candidates == ("b", "a")


def test_tools_are_a_column_to_map(tmp_path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    (row,) = read(write(tmp_path, {**ROW, "functions": tools}), columns={"tools": "functions"}).examples
    assert json.loads(row.prompt.tools) == tools
