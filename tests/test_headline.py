"""The sentence on what a stage came to: its numbers, and a verdict that never calls nothing a success."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config.resolve import resolve
from pipeline.files import write_json, write_text
from pipeline.report.findings import judge_run
from pipeline.report.headline import Headline, headline
from pipeline.report.spec import FINE, LOOK, TROUBLE
from pipeline.report.stages import stages_of, verdicts
from pipeline.report.tables import policies_table
from stages import report

START = {"eval/reward": 1.08, "eval/reward_se": 0.05, "eval/rewards/x/mean": 1.08, "eval/loss": 2.0}
ENDED = {"model_step": 300, "steps": 400, "seconds": 9.0}


def of(folder: Path, kind: str, results: dict, start: dict | None = None, **files: object) -> Headline:
    """The sentence on a stage that left these results and evaluated `start` before its first step.

    `files`: config, data, as JSON, which YAML reads too.
    """
    name = f"{kind}/x" if kind == "reward" else kind
    for file, content in files.items():
        write_json(folder / name / f"{file}.{'yaml' if file == 'config' else 'json'}", content)
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
    assert found.level == TROUBLE
    assert found.text.startswith("taught nothing: in 400 steps no evaluation was better than the start, model/ holds")


def test_the_reward_of_logged_rows_is_not_called_the_policys(tmp_path: Path) -> None:
    """It is the same whatever was learned; the weighted loss falls, and does not tell what the policy says."""
    logged = {"eval/logged/reward": 0.25, "eval/loss": 2.0}
    found = of(tmp_path, "rl", {**logged, "eval/loss": 1.5, **ENDED}, logged)
    assert found.text == (
        "held-out loss 2.00 to 1.50 at step 300 of 400: better: of logged responses, as nothing judged its own "
        "(reward=NAME would)"
    )
    assert found.level == LOOK


@pytest.mark.parametrize(
    ("ratio", "start", "end"), [("sequence", 2.0, 2.5), ("sequence", 2.0, 1.5), ("none", 0.0, 0.0)]
)
def test_a_loss_that_compares_nothing_is_neither_success_nor_failure(
    tmp_path: Path, ratio: str, start: float, end: float
) -> None:
    """Weights that follow the policy, or no held-out row with a weight: the last weights are kept then."""
    method = {"algorithm": {"file": "offline", "settings": {"ratio": ratio}}}
    found = of(tmp_path, "rl", {"eval/loss": end, **ENDED}, {"eval/loss": start}, config=method)
    assert ": it says nothing under this method, and nothing judged the policy's own responses" in found.text
    assert found.level == LOOK
    assert "best_step" not in verdicts(stages_of(tmp_path)[0])


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
    right = f"{accuracy:.3f} of {pairs:,} held-out pairs in the right order at step 300 of 400, "
    right += f"by length alone 0.600: {words}"
    assert found == Headline(right, level)


@pytest.mark.parametrize(("follows", "level"), [(0.15, LOOK), (0.25, FINE), (-0.1, TROUBLE)])
def test_a_correlation_that_chance_reaches_is_no_success(tmp_path: Path, follows: float, level: str) -> None:
    """Two standard errors of none are 2 / sqrt(100) = 0.2."""
    results = {"eval/correlation": follows, **ENDED}
    found = of(tmp_path, "reward", results, {"eval/correlation": 0.0}, data={"validation": {"rows": 100}})
    assert found.level == level and ("chance alone" in found.text) == (level == LOOK)


@pytest.mark.parametrize(("pairs", "level"), [(3.0, LOOK), (100.0, FINE)])  # 2/3 - 1/2 against 1 / sqrt(pairs)
def test_a_few_pairs_prove_nothing(tmp_path: Path, pairs: float, level: str) -> None:
    results = {"eval/accuracy": 2 / 3, "eval/pairs": pairs, **ENDED}
    assert of(tmp_path, "reward", results, {"eval/accuracy": 0.5}).level == level


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


@pytest.mark.parametrize(
    ("error", "text", "level"),
    [
        (0.0, "reward 0.200 to 0.900 (+0.700, sure)", FINE),  # each policy earns one reward for all that it says
        (None, "reward 0.200 to 0.900 (+0.700, the same within noise)", LOOK),  # a single response
    ],
)
def test_rewards_without_a_spread(tmp_path: Path, error: float | None, text: str, level: str) -> None:
    results = {name: {"reward": reward, "reward_se": error} for name, reward in (("sft", 0.2), ("rl", 0.9))}
    assert of(tmp_path, "evaluate", results) == Headline(text, level)
    (stage,) = stages_of(tmp_path)
    table = policies_table(stage.name, results, judge_run([stage]).policies[stage.name])
    assert ("same" in table.rows[0][-1].text) == (level == LOOK)


def test_two_oracles_that_differ_and_one_that_judged_nothing(tmp_path: Path) -> None:
    sft = {**policy(1.08, 1.0, 20.0), "rewards/oracle:b/mean": 1.0, "rewards/oracle:c/mean": 1.0}
    rl = {**policy(1.45, 1.4, 20.0), "rewards/oracle:b/mean": 1.0, "rewards/oracle:c/mean": None}
    found = of(tmp_path, "evaluate", {"sft": sft, "rl": rl}).text
    assert "agrees" not in found and "(oracle) 1.00 to 1.40 (rose), True b (oracle) 1.00 to 1.00 (the same" in found


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
