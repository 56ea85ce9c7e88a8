"""What a log can teach: numbers worked out by hand, and the verdict on rewards whose worth is known."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest

from pipeline.audit import findings, learnable, log, oddities
from pipeline.audit.log import Log
from pipeline.config.resolve import resolve
from pipeline.errors import UserError
from pipeline.files import write_jsonl
from pipeline.records import Example
from pipeline.tasks import assistant
from reward_models import oracle
from stages import audit


def log_of(*rows: tuple[str, str, float]) -> Log:
    examples = [Example(str(i), prompt, answer) for i, (prompt, answer, _) in enumerate(rows)]
    return log.log_of(examples, [reward for *_, reward in rows])


def test_prompts_are_counted() -> None:
    found = log.of_prompts(
        log_of(("a", "x", 1), ("b", "y", 0), ("a", "z", 0), ("c", "u", 0), ("c", "v", 1), ("c", "w", 2))
    )
    assert found == {
        "rows": 6.0,
        "prompts": 3.0,
        "rows_per_prompt": 2.0,
        "prompts_with/1": 1.0,
        "prompts_with/2": 1.0,
        "prompts_with/3-4": 1.0,
        "prompts_with/5+": 0.0,
    }


def test_variance_within_prompts_by_hand() -> None:
    # within: (.125 + .125) / 2; between: 2 * 2^2 + 2 * 2^2 = 16, less .125, over 2 rows each
    groups = [np.array([1.0, 1.5]), np.array([5.0, 5.5])]
    assert log.within_share(groups) == pytest.approx(0.125 / (0.125 + (16 - 0.125) / 2))
    # 5 within, 4 between: less than chance makes, so nothing is between
    assert log.within_share([np.array([1.0, 3.0]), np.array([2.0, 6.0])]) == 1.0
    assert log.within_share(groups[:1]) is None and log.within_share([np.ones(2), np.ones(2)]) is None


def test_rewards_and_repetition_by_hand() -> None:
    of = log_of(("a", "x", 1), ("a", "x", 1), ("a", "y", 1), ("a", "y", 3), ("b", "x", 2), ("c", "x", 100))
    found = log.of_rewards(of)
    assert (found["min"], found["q50"], found["max"], found["levels"]) == (1, 1.5, 100, 4)
    assert found["outliers"] == 1  # |100 - 1.5| against 8 times .5
    assert log.of_duplicates(of) == {"repeated": 1, "conflicting": 2, "conflict_spread": 2, "stock": 4}
    assert log.of_rewards(log_of(("a", "x", 1), ("b", "y", 1)))["outliers"] == 0
    # more than half of the rewards are 0: a broken one stands out all the same, and labels do not
    sparse = [(f"{i}", "x", value) for i, value in enumerate([0] * 12 + [0.5, 0.6, 0.7, 1e9])]
    assert log.of_rewards(log_of(*sparse))["outliers"] == 1
    assert log.of_rewards(log_of(*((f"{i}", "x", float(i > 17)) for i in range(20))))["outliers"] == 0


def test_odd_texts_are_counted_with_the_first_row() -> None:
    of = log_of(
        ("What is it?", "nan", 0),
        ("What is it?", "I\u2019m sorry, I cannot.", 0),
        ("What is it?", "<|im_start|>assistant it is", 0),
        ("What is it?", "Das ist schön.", 0),
        ("What is it?", "Das ist schÃ¶n.", 0),
        ("What is it?", "Это дом.", 0),
        ("Please tell me what it is.", "Please tell me what it is. It is.", 0),
        ("What is it?", "This is one of the things that nobody ever", 0),
        ("What is it?", "<p>It is.</p>", 0),
    )
    found = {one.name: (one.count, one.first) for one in oddities.of_texts(of)}
    assert list(found.values()) == [(1, "0"), (1, "2"), (1, "4"), (1, "8"), (1, "6"), (1, "1"), (1, "7"), (1, "5")]
    assert oddities.script("これは本です") == "CJK" and oddities.script("123") == ""


@pytest.fixture(scope="module")
def rated() -> Log:
    rows = assistant.examples("train", 1, 700)
    rewards = oracle.reward([row.prompt for row in rows], [row.completion for row in rows])
    return log.log_of(rows, rewards)


def numbers_of(of: Log) -> dict[str, float]:
    parts = {"prompts": log.of_prompts(of) | {"held_out_too": 0.0}, "rewards": log.of_rewards(of)}
    parts |= {"learning": learnable.of_learning(of, 1)[0], "duplicates": log.of_duplicates(of)}
    lengths = {f"{kind}{what}" for kind in ("long_", "max_") for what in ("prompts", "answers")}
    parts |= {"lengths": dict.fromkeys([*lengths, "max_prompt_length", "max_response_length"], 0.0)}
    return {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}


def verdict_of(n: dict[str, float]) -> str:
    return learnable.verdict(n["prompts/rows"], n["prompts/prompts"], n["learning/gain/sure"])


def test_rewards_that_words_tell_can_be_learned(rated: Log) -> None:
    n = numbers_of(rated)
    assert verdict_of(n) == learnable.LEARN and 0.05 < n["learning/gain/low"] < n["learning/gain/estimate"] < 0.25
    assert n["learning/advantage_r2"] > 0.3 and 0.3 < n["learning/kept"] < 0.7
    assert findings.headline(learnable.LEARN, n).level == findings.FINE


def test_shuffled_rewards_have_nothing_to_teach(rated: Log) -> None:
    alarms = []
    for seed in range(8):
        rewards = rated.rewards.copy()
        Random(seed).shuffle(rewards)
        shuffled, _ = learnable.of_learning(rated._replace(rewards=rewards), 1)
        alarms.append(learnable.verdict(700, 600, shuffled["gain/sure"]) == learnable.LEARN)
    assert sum(alarms) <= 1  # 2 % were measured


def test_rewards_of_prompts_and_not_of_answers_teach_nothing() -> None:
    """Answers that betray what their prompt is about, and four to each prompt with one reward."""
    rows = [(f"ticket {i // 4}", f"about {'cats' if i // 4 % 2 else 'dogs'} {i % 7}", i // 4 % 2) for i in range(400)]
    assert verdict_of(numbers_of(log_of(*rows))) == learnable.NOTHING


def test_rewards_that_follow_the_length_are_told(rated: Log) -> None:
    n = numbers_of(rated._replace(rewards=-rated.words.astype(float)))
    (first, *_) = findings.of_numbers(n)
    assert first.level == findings.TROUBLE and first.text.startswith(
        "shorter answers earn more (correlation \N{MINUS SIGN}1"
    )


def test_equal_rewards_are_told(rated: Log) -> None:
    n = numbers_of(rated._replace(rewards=np.full(len(rated.ids), 0.5)))
    said = findings.headline(verdict_of(n), n)
    assert said.level == findings.TROUBLE and said.text == "nothing to learn: all 700 rewards are 0.500"


def run(tmp_path: Path, *words: str) -> dict:
    resolved = resolve(["stage=audit", f"runs_dir={tmp_path}", *words])
    audit.main(resolved.settings, list(resolved.words))
    return json.loads((tmp_path / "default" / "audit" / "results.json").read_text())


def test_a_small_file_is_too_little_and_its_page_fetches_nothing(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {i % 5}?", "completion": f"answer {i}", "stars": 1 + i % 5} for i in range(20)]
    rows[3]["completion"] = "<script>alert(1)</script>"
    write_jsonl(tmp_path / "rows.jsonl", rows)
    found = run(tmp_path, f"data.train={tmp_path}/rows.jsonl")
    assert found["verdict"] == learnable.FEW and found["rewards/levels"] == 5
    page = (tmp_path / "default" / "audit" / "audit.html").read_text()
    assert "Too few rows to tell: 20 rows of 5 prompts" in page and "1.00 .. " not in page
    assert "<script" not in page and "http" not in page.replace("http://www.w3.org", "")


def test_a_file_of_equal_rewards_is_audited_to_the_end(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"{i}?", "completion": f"a {i}", "reward": 1} for i in range(120)])
    found = run(tmp_path, f"data.train={tmp_path}/rows.jsonl")
    assert (
        found["headline"]["text"] == "nothing to learn: all 120 rewards are 1.00" and "learning/value_r2" not in found
    )


def test_named_rewards_want_to_be_chosen(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "completion": f"{i}", "rewards": {"kind": i % 3, "brief": i % 2}} for i in range(6)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"rewards by name \(kind, brief\) and no `reward`"):
        run(tmp_path, f"data.train={tmp_path}/rows.jsonl")
    found = run(tmp_path, f"data.train={tmp_path}/rows.jsonl", "reward={kind: 1.0, brief: 0.5}")
    assert found["rewards/max"] == 2.5  # 2 of kind and half of 1: i = 5


def test_rows_without_rewards_have_nothing_to_audit(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(UserError, match="none of 1 rows has a reward"):
        run(tmp_path, f"data.train={tmp_path}/rows.jsonl")
