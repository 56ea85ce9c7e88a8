"""The sentence on what a stage came to: its numbers, and a verdict that never calls nothing a success."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config.resolve import resolve
from pipeline.files import write_json, write_text
from pipeline.report.headline import Headline, headline
from pipeline.report.spec import FINE, LOOK, TROUBLE
from pipeline.report.stages import stages_of
from stages import report

START = {"eval/reward": 1.08, "eval/reward_se": 0.05, "eval/rewards/x/mean": 1.08, "eval/loss": 2.0}
ENDED = {"model_step": 300, "steps": 400, "seconds": 9.0}


def of(folder: Path, kind: str, results: dict, start: dict | None = None) -> Headline:
    """The sentence on a stage that left these results and evaluated `start` before its first step."""
    name = f"{kind}/x" if kind == "reward" else kind
    rows = [{"step": 0, "time": 0.0, **start}, {"step": 400, "time": 9.0, **results}] if start else []
    write_text(folder / name / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if results:
        write_json(folder / name / "results.json", results)
    (stage,) = stages_of(folder)
    return headline(stage)


@pytest.mark.parametrize(
    ("end", "verdict", "level"),
    [
        (1.45, "better", FINE),  # 0.37 / hypot(0.05, 0.05) = 5.2 standard errors
        (1.20, "the same within noise", LOOK),  # 1.7
        (0.90, "worse, no evaluation was better than the start", TROUBLE),
    ],
)
def test_rl_is_judged_by_the_reward_of_its_own_responses(tmp_path: Path, end: float, verdict: str, level: str) -> None:
    results = {**START, "eval/reward": end, "eval/rewards/x/mean": end, **ENDED}
    found = of(tmp_path, "rl", results, START)
    shown = "0.900" if end == 0.9 else f"{end:.2f}"
    assert found == Headline(f"held-out reward 1.08 to {shown} at step 300 of 400: {verdict}", level)


def test_weights_it_began_with_are_no_success(tmp_path: Path) -> None:
    found = of(tmp_path, "rl", {**START, **ENDED, "model_step": 0}, START)
    assert not found.success and found.level == TROUBLE
    assert found.text.startswith("taught nothing: in 400 steps no evaluation was better than the start, model/ holds")


def test_a_loss_whose_weights_follow_the_policy_is_no_verdict(tmp_path: Path) -> None:
    found = of(tmp_path, "rl", {"eval/loss": 10.5, **ENDED, "chosen_by": None}, {"eval/loss": 6.03})
    assert found.level == LOOK and found.text.startswith("nothing tells whether it helped")


def test_the_reward_of_logged_rows_is_not_called_the_policys(tmp_path: Path) -> None:
    """It is the same whatever was learned; the weighted loss falls, and does not tell what the policy says."""
    logged = {"eval/logged/reward": 0.25, "eval/loss": 2.0}
    found = of(tmp_path, "rl", {**logged, "eval/loss": 1.5, **ENDED}, logged)
    assert found.text == (
        "held-out loss 2.00 to 1.50 at step 300 of 400: better: of logged responses, as nothing judged its own "
        "(reward=NAME would)"
    )
    assert found.level == LOOK


def test_sft_is_judged_by_its_held_out_loss(tmp_path: Path) -> None:
    start = {"eval/loss": 7.2, "eval/perplexity": 1339.0}
    found = of(tmp_path, "sft", {"eval/loss": 1.3, "eval/perplexity": 3.67, **ENDED}, start)
    assert found == Headline("held-out loss 7.20 to 1.30 at step 300 of 400: better", FINE)


def test_without_held_out_rows_nothing_is_known(tmp_path: Path) -> None:
    found = of(tmp_path, "sft", ENDED)
    assert found == Headline("no held-out rows: nothing tells whether it helped (at step 300 of 400)", LOOK)


@pytest.mark.parametrize(
    ("accuracy", "pairs", "words", "level"),
    [
        (0.61, 500, "hardly more than length", LOOK),  # a lead of 0.01, with a standard error of 0.022
        (0.72, 500, "more than length", FINE),
        (0.58, 40_000, "no more than length", TROUBLE),
    ],
)
def test_reward_models_are_judged_against_length(
    tmp_path: Path, accuracy: float, pairs: int, words: str, level: str
) -> None:
    numbers = {"eval/accuracy": accuracy, "eval/length_accuracy": 0.60, "eval/pairs": float(pairs), **ENDED}
    found = of(tmp_path, "reward", numbers, {"eval/accuracy": 0.5})
    right = f"{accuracy:.3f} of {pairs:,} held-out pairs in the right order, by length alone 0.600: {words}"
    assert found == Headline(right, level)


def policy(reward: float, oracle: float, words: float) -> dict[str, float]:
    return {
        "reward": reward,
        "reward_se": 0.05,
        "rewards/oracle:truth/mean": oracle,
        "rewards/oracle:truth/se": 0.05,
        "completions/mean_words": words,
    }


@pytest.mark.parametrize(
    ("after", "text", "level"),
    [
        (policy(1.45, 1.4, 22.4), "reward 1.08 to 1.45 (+0.370, sure), the oracle agrees, 22 words (was 20)", FINE),
        (
            policy(1.45, 1.05, 22.0),
            "reward 1.08 to 1.45 (+0.370, sure), True truth (oracle) 1.00 to 1.05 (the same within noise), "
            "22 words (was 20)",
            FINE,
        ),
        (
            policy(1.45, 0.5, 22.0),
            "reward 1.08 to 1.45 (+0.370, sure), True truth (oracle) 1.00 to 0.500 (fell), 22 words (was 20), "
            "but what it was never trained on fell",
            TROUBLE,
        ),
        (policy(1.1, 1.0, 20.0), "reward 1.08 to 1.10 (+0.0200, the same within noise), the oracle agrees", LOOK),
        (policy(0.7, 0.6, 20.0), "reward 1.08 to 0.700 (\N{MINUS SIGN}0.380, worse), the oracle agrees", TROUBLE),
    ],
)
def test_an_evaluation_says_whether_the_gain_is_sure_and_true(
    tmp_path: Path, after: dict, text: str, level: str
) -> None:
    found = of(tmp_path, "evaluate", {"sft": policy(1.08, 1.0, 20.0), "rl": after})
    assert found.text.startswith(text) and found.level == level


def test_the_report_prints_what_asks_for_a_look_and_then_the_page(tmp_path: Path, capsys) -> None:
    of(tmp_path / "default", "rl", {**START, **ENDED, "eval/reward": 0.9, "model_step": 0}, START)
    step = resolve(["stage=report", f"runs_dir={tmp_path}"])
    report.main(step.settings, step.words)
    *found, last = capsys.readouterr().out.splitlines()
    assert found[0].startswith("Trouble: Reinforcement learning: Step of the best evaluation: 0 of 400: ")
    levels = [line.split(":")[0] for line in found]
    assert 1 <= len(found) <= 9 and levels == sorted(levels, key=[TROUBLE, LOOK].index)
    assert last.startswith(f"{tmp_path}/default/report.html: taught nothing: in 400 steps")


def test_what_has_not_ended_is_not_judged(tmp_path: Path) -> None:
    assert of(tmp_path, "rl", {}, {"eval/loss": 2.0}) == Headline("not finished, 400 steps so far", LOOK)
