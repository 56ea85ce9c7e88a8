"""Reward functions as TRL documents them: called as they are, wherever something is judged, with the data's columns."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.data import readers
from pipeline.errors import UserError
from pipeline.launch import run_dir
from pipeline.records import Example, Message, Response
from pipeline.rewards import scoring
from pipeline.rewards.http import connect
from pipeline.rewards.rewards import Rewards, WeightedReward, loaded
from pipeline.rewards.workers import RewardWorkers
from pipeline.rl.compositions import judging
from stages import score as score_stage
from tests import rolling, tiny
from tests.test_serve import HOW, at, serving

FUNCTIONS = '''
import asyncio
import re

session = None

def by_letters(completions, **kwargs):
    return [float(len(completion)) for completion in completions]

def by_tokens(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]

def boxed(completions, ground_truth, **kwargs):
    found = [re.search(r"\\[(.*?)\\]", completion) for completion in completions]
    return [float(bool(match) and match.group(1) == right) for match, right in zip(found, ground_truth)]

def narrow(completions, ground_truth):
    return [float(text == right) for text, right in zip(completions, ground_truth)]

def maths(prompts, completions, task, **kwargs):
    return [1.0 if one == "maths" else None for one in task]

def code(prompts, completions, task, **kwargs):
    return [-1.0 if one == "code" else None for one in task]

def chat_form(prompts, completions, **kwargs):
    return [float(p[-1]["role"] == "user" and c[0] == {"role": "assistant", "content": "yes"})
            for p, c in zip(prompts, completions)]

def logs(completions, log_extra=None, log_metric=None, trainer_state=None, **kwargs):
    log_extra("words", [len(text.split()) for text in completions])
    log_metric("share", 0.5)
    return [float(trainer_state is None)] * len(completions)

def logs_unnamed(completions, **kwargs):
    kwargs["log_metric"]("share", 0.5)
    return [float(kwargs["trainer_state"] is None)] * len(completions)

async def slow(prompts, completions, **kwargs):
    """Keeps what belongs to the event loop from call to call, as a client of a service does."""
    global session
    session = session or asyncio.get_running_loop()
    await asyncio.sleep(0.001)
    return [float(session is asyncio.get_running_loop())] * len(completions)

async def fails(completions, **kwargs):
    await asyncio.sleep(0)
    return completions[0].no_such_method()

def spoils(completions, ground_truth, **kwargs):
    taken = [right.pop() for right in ground_truth]
    return [float(one) for one in taken]
'''
ONE = "def any_name(completions, **kwargs):\n    return [1.0] * len(completions)\n\ndef _private():\n    pass\n"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("trl") / "mine.py"
    made.write_text(FUNCTIONS)
    return made


def rewards(file: Path, *names: str, workers: int = 0) -> Rewards:
    apart = RewardWorkers({name: f"{file}:{name}" for name in names}, workers) if workers else None
    return Rewards([WeightedReward(name, 1.0, loaded(f"{file}:{name}")) for name in names], apart)


def judged(file: Path, rows: Sequence[Example], texts: Sequence[str], *names: str, workers: int = 0) -> list[float]:
    return list(scoring.score_texts(tiny.ranks(), rewards(file, *names, workers=workers), rows, texts).total)


def row(id: str = "r", prompt: object = "p", **columns: object) -> Example:
    return Example(id, prompt, columns=columns)


ROWS = [row("a", ground_truth="7"), row("b", ground_truth="8"), row("c", ground_truth=None)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_column_of_the_data_decides(file: Path, workers: int) -> None:
    assert judged(file, ROWS, ["it is [7]", "[7]", "none"], "boxed", workers=workers) == [1.0, 0.0, 0.0]
    assert judged(file, ROWS, ["7", "7", "x"], "narrow", workers=workers) == [1.0, 0.0, 0.0]  # takes no **kwargs


def test_a_served_reward_is_given_the_columns_and_the_chats(file: Path) -> None:
    chat = (Message("system", "s"), Message("user", "u"))
    for name, rows, wanted in (("boxed", ROWS[:2], [1.0, 0.0]), ("chat_form", [row("d", chat)] * 2, [0.0, 1.0])):
        with serving(f"reward={file}:{name}") as port:
            served = scoring.reward_columns(rows)
            texts = ["[7]", "yes"]
            assert connect(at(port), HOW)(prompts=["p", "p"], completions=texts, **served) == wanted
    tasks = [row("e", task="maths"), row("f", task="code")]
    with serving(f"reward={file}:maths") as port:
        assert connect(at(port), HOW)(["p"] * 2, ["x"] * 2, **scoring.reward_columns(tasks)) == [1.0, None]


def test_none_is_for_another_reward(file: Path) -> None:
    rows = [row("a", task="maths"), row("b", task="code"), row("c", task="poetry")]
    assert judged(file, rows[:2], ["x", "y"], "maths", "code") == [1.0, -1.0]
    with pytest.raises(
        UserError, match=r"^reward: row c: none of maths, code judges 'z' \(all returned None\), wanted a"
    ):
        judged(file, rows, ["x", "y", "z"], "maths", "code")


def test_chats_are_messages_and_texts_are_texts(file: Path, tmp_path: Path) -> None:
    chat = row("c", (Message("user", "hello"),))
    assert judged(file, [chat, chat], ["yes", "no"], "chat_form") == [1.0, 0.0]
    # a text of three letters; a list of one message
    assert judged(file, [row(), chat], ["yes", "yes"], "by_letters") == [3.0, 1.0]
    (tmp_path / "text.py").write_text('CHATS = "text"\ndef f(completions):\n    return [*map(len, completions)]\n')
    assert judged(tmp_path / "text.py", [chat], ["yes"], "f") == [3.0]
    (tmp_path / "odd.py").write_text('CHATS = "dicts"\ndef f(completions):\n    return []\n')
    with pytest.raises(UserError, match="CHATS is 'dicts', wanted 'messages' or 'text'"):
        loaded(f"{tmp_path}/odd.py")


def test_our_own_rewards_read_chats_as_text() -> None:
    chat = replace(row("c", (Message("user", "hello"),)), references=("the cat sat down",))
    for name in ("rouge", "bleu", "chrf", "squad", "length"):
        columns = scoring.reward_columns([chat])
        assert loaded(name)(["user: hello"], ["the cat sat down"], **columns)[0] > 0.5, name


def test_token_ids_are_those_of_the_policy(file: Path) -> None:
    answers = [Response(row(), "p", "x y", (3,), (4, 5, 2), True), Response(row(), "p", "x", (3,), (4,), False)]
    assert scoring.score_responses(tiny.ranks(), rewards(file, "by_tokens"), answers).total == [3.0, 1.0]
    with pytest.raises(UserError, match=r"reward .*by_tokens: it takes completion_ids, which only a policy's own resp"):
        judged(file, [row()], ["x"], "by_tokens")


def test_of_compositions_too(file: Path) -> None:
    rows = [row("a", ground_truth="7"), row("b", ground_truth="8")]
    texts, ids = [["[7]", "[8]", "[7]"], ["[7]", "[8]", "[9]"]], [[[1], [2, 2], [3] * 9]] * 2
    found = judging(rewards(file, "boxed", "by_tokens"), rows, texts, ids)()
    assert found.raw["boxed"] == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert found.raw["by_tokens"] == [1.0, 2.0, 1.0, 1.0, 2.0, 9.0]  # equal texts of a row are judged once


def test_async_functions_share_one_event_loop(file: Path) -> None:
    scorer = rewards(file, "slow")
    for _ in range(2):
        assert scoring.score_texts(tiny.ranks(), scorer, [row()], ["x"]).total == [1.0]


def test_an_async_function_that_fails_names_its_line(file: Path) -> None:
    line = FUNCTIONS[: FUNCTIONS.index("no_such_method")].count("\n") + 1
    with pytest.raises(UserError, match=rf"AttributeError: .* 'no_such_method' \(.*mine\.py:{line}\)$"):
        judged(file, [row()], ["x"], "fails")


def test_what_is_logged_is_taken_and_said_not_to_be_kept(file: Path, capsys: pytest.CaptureFixture) -> None:
    assert judged(file, [row()], ["x"], "logs") == [1.0]
    assert capsys.readouterr().out == f"reward {file}:logs: what it gives to log_extra and log_metric is not kept\n"
    assert judged(file, [row()], ["x"], "logs_unnamed") == [1.0]


def test_a_reward_cannot_change_the_rows(file: Path) -> None:
    rows = [row(ground_truth=["1", "2"])]
    for _ in range(2):
        assert judged(file, rows, ["x"], "spoils") == [2.0]
    assert rows[0].columns == {"ground_truth": ["1", "2"]}


def test_a_column_that_no_row_has(file: Path) -> None:
    with pytest.raises(UserError) as raised:
        judged(file, [row(ground_thruth="7")], ["x"], "boxed")
    assert str(raised.value) == (
        f"reward {file}:boxed: it takes ground_truth, which no row has, wanted one of the columns "
        "ground_thruth, id, source, references, raw_prompt; did you mean 'ground_thruth'?"
    )


def test_one_function_of_any_name(file: Path, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(ONE)
    assert loaded(f"{tmp_path}/one.py").function.__name__ == "any_name"
    (tmp_path / "both.py").write_text(ONE + "\ndef reward(completions):\n    return []\n")
    assert loaded(f"{tmp_path}/both.py").function.__name__ == "reward"
    (tmp_path / "two.py").write_text(ONE + "\nasync def other(completions):\n    return []\n")
    said = r"two.py: 2 functions \(any_name, other\), wanted one of them named, as in .*/two.py:any_name, or one called"
    with pytest.raises(UserError, match=said):
        loaded(f"{tmp_path}/two.py")
    with pytest.raises(UserError, match=r"no function 'reward' in .*, it has none"):
        (tmp_path / "none.py").write_text("x = 1\n")
        loaded(f"{tmp_path}/none.py")


def test_a_reward_is_tried_on_a_real_row(file: Path, capsys: pytest.CaptureFixture) -> None:
    chat = Example("data/4", (Message("user", "hi"),), completion="yes")
    scoring.try_rewards(tiny.ranks(), rewards(file, "chat_form", "by_tokens"), chat, written=True)
    how = "given prompts and completions of chats as messages, as in TRL"
    assert f'reward chat_form, by_tokens: {how} (CHATS = "text" in the file makes them text)' in capsys.readouterr().out
    with pytest.raises(UserError, match=r"chat_form, .*: TypeError: .* \(tried on row r before anything else\)$"):
        scoring.try_rewards(tiny.ranks(), rewards(file, "chat_form"), row(), written=True)
    with pytest.raises(UserError, match=r"it takes completion_ids.* \(tried on row r before anything else\)$"):
        scoring.try_rewards(tiny.ranks(), rewards(file, "by_tokens"), row(), written=False)


def test_a_step_of_reinforce_learns_from_a_column(file: Path, tmp_path: Path) -> None:
    """The reward is the number that the prompt's row holds; every response of the prompt has it."""
    (tmp_path / "given.py").write_text(
        "def given(completions, worth, **kwargs):\n    return [2.0 * x for x in worth]\n"
    )
    trainer = rolling.trainer_of(rolling.CASES["reinforce"], "zero0", tmp_path)
    trainer.windows.rewards = rewards(tmp_path / "given.py", "given")
    trainer.windows.prompts = [replace(one, columns={"worth": i}) for i, one in enumerate(trainer.windows.prompts)]
    (seen,) = rolling.run(trainer, steps=1)
    groups = trainer.windows.groups
    assert [group.raw for group in groups] == [(2.0 * group.example.columns["worth"],) * 3 for group in groups]
    assert math.isfinite(seen["logged"]["train/loss"])


SETTINGS = ("data.validation_fraction=0", "splits=[train]", "rewards.normalise=none")


def test_the_score_stage_keeps_the_columns(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = [
        {"prompt": "1 + 1", "completion": "[2]", "ground_truth": "2", "task": "maths", "score": 9, "level": 3},
        {"prompt": "print", "completion": "[x]", "ground_truth": "y", "task": "code", "tests": ["a", {"b": None}]},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in given))
    spec = f"{{{file}:boxed: 1.0, {file}:maths: 0.5, {file}:code: 0.25}}"
    words = (f"runs_dir={tmp_path}", f"data.train={data}", "data.format=supervised", f"reward={spec}", *SETTINGS)
    score_stage.main(tiny.settings("score", *words), list(words))
    assert "columns carried along: ground_truth, task, score, level, tests" in capsys.readouterr().out
    left = run_dir.run_dir(tiny.settings("score", *words)) / "score"
    written = [json.loads(line) for line in (left / "train.jsonl").read_text().splitlines()]
    # [2] is right: 1 + .5; [x] is wrong: 0 - .25
    assert [one["reward"] for one in written] == [1.5, -0.25]
    assert written[1]["rewards"] == {"mine:boxed": 0.0, "mine:code": -1.0}  # the other did not judge it
    assert written[0]["other_columns"] == {"score": 9} and written[0]["level"] == 3 and written[0]["tests"] is None
    again = readers.read(str(left / "train.jsonl"), carry=True).examples
    assert [one.columns for one in again] == [
        {"ground_truth": "2", "task": "maths", "score": 9, "level": 3, "tests": None},
        {"ground_truth": "y", "task": "code", "score": None, "level": None, "tests": ["a", {"b": None}]},
    ]
    results = json.loads((left / "results.json").read_text())["train"]
    assert results["rewards/mine:maths/judged"] == 0.5 and results["rewards/mine:maths/mean"] == 1.0


def test_candidates_are_tried_with_the_answer_that_they_are_compared_with(tmp_path: Path) -> None:
    row = {"prompt": "p", "completion": "the cat sat", "candidates": ["a dog", "the cat"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    words = (f"runs_dir={tmp_path}", f"data.train={tmp_path}/rows.jsonl", "reward=rouge:rouge1", *SETTINGS)
    score_stage.main(tiny.settings("score", *words), list(words))
    left = run_dir.run_dir(tiny.settings("score", *words)) / "score"
    # 2 of 2 words among 3: F1 = 2 * 1 * 2/3 / (1 + 2/3)
    assert json.loads((left / "train.jsonl").read_text())["candidate_rewards"] == pytest.approx([0.8, 0.0])
