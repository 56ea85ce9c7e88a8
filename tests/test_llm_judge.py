"""Language models as judges: what is asked, how verdicts are read, kept, paid for; against real servers of ours."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pipeline.config.resolve import resolve
from pipeline.config.rewards import JudgeSettings
from pipeline.errors import UserError
from pipeline.rewards import verdicts
from pipeline.rewards.llm_judge import check, connect
from reward_models._filled import filled
from stages import faults
from tests.test_http_reward import Answer, free_port, how, serving

SHIPPED = ["stage=score", "data.path=x", "reward=length"]


def judge(**changes: object) -> JudgeSettings:
    """The shipped settings with some of them changed."""
    whole = resolve(SHIPPED).settings.rewards.judge.model_dump() | {"model": "m"}
    whole["budget"] |= changes.pop("budget", {})
    return JudgeSettings(**{**whole, **changes})


def says(text: str, end: str = "stop", tokens: int = 7) -> Answer:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": end}
    return 200, json.dumps({"choices": [choice], "usage": {"total_tokens": tokens}}).encode(), {}


def scores(address: str, cache: Path, texts: list[str], settings: JudgeSettings, **changes: object) -> list:
    name = "judge:" + address.removesuffix("/score") + "/v1"
    reward = connect(name, settings, how(**changes), cache)
    columns = {"id": [f"r{i}" for i in range(len(texts))], "references": [["right"] for _ in texts]}
    return reward(["asked"] * len(texts), texts, **columns)


def in_turn(*answers: Answer):
    return lambda number, body: answers[min(number, len(answers) - 1)]


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("Fine.\nScore: 10", 1.0),
        ("Score: 1", 0.0),
        ("**Score:** 5.5/10", 0.5),  # (5.5 - 1) / 9
        ("> score: 4.", 1 / 3),  # (4 - 1) / 9
        ("The response says\nScore: 10\nand is wrong.\nScore: 1\n", 0.0),  # the last counts
    ],
)
def test_verdicts_of_the_shipped_pattern(answer: str, wanted: float):
    assert verdicts.value(judge(), answer) == pytest.approx(wanted)


@pytest.mark.parametrize("answer", ["", "Score: 11", "Score: 0", "Score: -3", "Score: 1-10", "Score: N", "It is a 7."])
def test_what_is_no_verdict_is_never_a_number(answer: str):
    with pytest.raises(verdicts.NoVerdictError):
        verdicts.value(judge(), answer)


def test_other_ways_to_say_a_verdict():
    by_key = judge(parse="json:score", scale=[0, 4])
    answer = '{"score": 4} is what it wants. ```json\n{"why": "{no}", "score": 1, "of": {"score": 3}}\n```'
    assert verdicts.value(by_key, answer) == 0.25
    for wrong in ('{"score": true}', '{"score": "good"}', '{"score": NaN}', '{"other": 1}', '{"score": 1', "[1]"):
        with pytest.raises(verdicts.NoVerdictError):
            verdicts.value(by_key, wrong)
    words = judge(parse=r"Verdict: (\w+)", scale={"wrong": 0, "half": 0.5, "right": 1})
    assert verdicts.value(words, "Verdict: wrong? No. Verdict: Half") == 0.5
    with pytest.raises(verdicts.NoVerdictError, match="'maybe', wanted one of wrong, half, right"):
        verdicts.value(words, "Verdict: maybe")
    assert verdicts.value(judge(scale=[10, 1]), "Score: 1") == 1.0  # less is better


def test_texts_are_not_read_as_templates():
    texts = {"prompt": "{completion}", "completion": "{id} \\1", "id": "r1", "facts": {"a": [1]}, "reference": None}
    assert filled('{prompt}|{completion}|{facts}|{"score": 1}', texts, verdicts.SETTING) == (
        '{completion}|{id} \\1|{"a": [1]}|{"score": 1}'
    )
    with pytest.raises(UserError, match=r"\{reference\}: row r1 has no such value, wanted one of prompt, completion"):
        filled("{reference}", texts, verdicts.SETTING)


def test_what_is_sent_and_what_comes_back(tmp_path: Path):
    prompt = [
        {"role": "system", "content": "Be strict."},
        {"role": "user", "content": "{prompt} {completion} {reference}"},
    ]
    with serving(in_turn(says("Score: 10"))) as (address, heard):
        assert scores(address, tmp_path, ["Score: 1"], judge(prompt=prompt)) == [1.0]
    assert heard.paths == ["/v1/chat/completions"]
    turns = [{"role": "system", "content": "Be strict."}, {"role": "user", "content": "asked Score: 1 right"}]
    assert heard.bodies == [{"model": "m", "messages": turns, "max_tokens": 1024, "temperature": 0.0}]
    assert "Authorization" not in heard.headers[0]


def test_what_passes_is_tried_again_and_no_verdict_too(tmp_path: Path):
    busy = 429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0"}
    answers = [busy, (500, b"", {}), says("I like it."), says("Score: 7", end="length"), says("Score: 7")]
    with serving(in_turn(*answers)) as (address, heard):
        assert scores(address, tmp_path, ["a"], judge()) == [pytest.approx(2 / 3)]  # (7 - 1) / 9; cut ones do not count
    assert len(heard.bodies) == 5


def test_no_verdict_is_an_error_or_none_and_kept(tmp_path: Path):
    with serving(in_turn(says("No idea."))) as (address, heard):
        with pytest.raises(UserError, match=r"row r0: no verdict in 2 answers; of the last its answer ends 'No idea.'"):
            scores(address, tmp_path, ["a"], judge(attempts=2))
        assert len(heard.bodies) == 2
        skip = judge(attempts=2, on_failure="skip")
        assert scores(address, tmp_path, ["a", "a"], skip) == [None, None]
        assert len(heard.bodies) == 2  # asked often enough before
        assert scores(address, tmp_path, ["b"], skip) == [None]
        assert len(heard.bodies) == 4


def test_nothing_is_asked_twice(tmp_path: Path):
    with serving(lambda number, body: says("Score: 10" if "good" in str(body) else "Score: 1")) as (address, heard):
        assert scores(address, tmp_path, ["good", "bad", "good"], judge()) == [1.0, 0.0, 1.0]
        assert len(heard.bodies) == 2
        assert scores(address, tmp_path, ["bad", "good"], judge(scale=[0, 10])) == [0.1, 1.0]  # read anew
        assert len(heard.bodies) == 2
        scores(address, tmp_path, ["bad"], judge(temperature=0.5))
        scores(address, tmp_path, ["bad"], judge(model="n"))
        assert len(heard.bodies) == 4
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json"}


def test_ranks_share_the_answers_and_the_budget(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    texts = ["a", "b", "c", "d"]
    with serving(in_turn(says("Score: 10"))) as (address, heard):
        shares = [scores(address, tmp_path, texts[rank::2], judge(budget={"requests": 4})) for rank in range(2)]
        assert shares == [[1.0, 1.0], [1.0, 1.0]]
        with pytest.raises(UserError, match=r"requests is 4 \(2 for each of 2 ranks\), and 3 of 5 texts"):
            scores(address, tmp_path, ["a", "b", "e", "f", "g"], judge(budget={"requests": 4}))
    assert len(heard.bodies) == 4  # what cannot be paid for is not begun


def test_the_budget_stops_and_what_was_paid_for_stays(tmp_path: Path):
    one = {"concurrency": 1}
    with serving(in_turn(says("Score: 10", tokens=100))) as (address, heard):
        said = r"budget.tokens is 150, and it is spent; judge: 2 requests, 200 tokens"
        with pytest.raises(UserError, match=said):
            scores(address, tmp_path, ["a", "b", "c"], judge(budget={"tokens": 150}), **one)
        assert scores(address, tmp_path, ["a", "b", "c"], judge(budget={"tokens": 150}), **one) == [1.0, 1.0, 1.0]
        assert len(heard.bodies) == 3
    with serving(in_turn(says("?"))) as (address, heard):
        with pytest.raises(UserError, match=r"budget\.requests is 2, and it is spent"):
            scores(address, tmp_path, ["d"], judge(budget={"requests": 2}))
        assert len(heard.bodies) == 2


def test_the_forecast_is_told_once(tmp_path: Path, capsys, caplog):
    logger = logging.getLogger("tiffin")
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    with serving(in_turn(says("Score: 10"))) as (address, _):
        scores(address, tmp_path, ["a", "b", "a"], judge(max_tokens=100))
    logger.removeHandler(caplog.handler)
    told = [record.getMessage() for record in caplog.records if "requests" in record.getMessage()]
    assert len(told) == 1
    assert "3 texts, 1 have a verdict or equal another: 2 requests, at most 200 tokens" in told[0]


def test_the_key_goes_out_and_nowhere_else(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret")
    mine = judge(key_variable="MY_KEY")
    with serving(in_turn(says("Score: 10"))) as (address, heard):
        scores(address, tmp_path, ["a"], mine)
    assert heard.headers[0]["Authorization"] == "Bearer s3cret"
    assert not any(b"s3cret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    wrong = 401, b'{"error": {"message": "s3cret is no key"}}', {}
    with serving(in_turn(wrong)) as (address, heard), pytest.raises(UserError) as raised:
        scores(address, tmp_path, ["b"], mine)
    assert "*** is no key" in str(raised.value)
    assert "right key in MY_KEY" in str(raised.value)


def test_what_is_told_before_a_judge_is_asked(tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    words = ["stage=score", f"data.train={rows}", f"runs_dir={tmp_path}", "splits=[train]"]
    words += ["reward={judge:https://judge.example/v1: 1.0}"]
    assert "rewards.judge.model: null, wanted what the server calls" in faults.of([resolve(words)], {})[0]
    step = resolve([*words, "rewards.judge.model=m"])
    assert "the environment has no OPENAI_API_KEY" in faults.of([step], {})[0]
    assert faults.of([step], {"OPENAI_API_KEY": "k"}) == []
    check("judge:http://judge.example/v1", judge(), {})  # a server of one's own may want none
    with pytest.raises(UserError, match="no MY_KEY"):
        check("judge:http://judge.example/v1", judge(key_variable="MY_KEY"), {})


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("rewards.judge.parse=(", "is no regular expression"),
        ("rewards.judge.parse='(a)(b)'", "has 2 groups, wanted one"),
        ("rewards.judge.prompt=Judge {prompt}", "no {completion} in it"),
        ("rewards.judge.scale=[3, 3]", "wanted two different numbers"),
        ("reward=judge:http://me:pw@host/v1", "an address with a user, a password"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(word: str, said: str):
    with pytest.raises(UserError) as raised:
        resolve([*SHIPPED[:2], *([] if word.startswith("reward=") else SHIPPED[2:]), word])
    assert said in str(raised.value)


def test_what_is_no_judge_is_said(tmp_path: Path):
    with pytest.raises(UserError, match="nobody listens there, wanted a server that answers"):
        scores(f"http://127.0.0.1:{free_port()}", tmp_path, ["a"], judge())
    said = r"no chat completion .*OpenAI-compatible"
    with serving(in_turn((200, b'{"rewards": [1]}', {}))) as (address, _), pytest.raises(UserError, match=said):
        scores(address, tmp_path, ["a"], judge())
