"""The rules of the report: readings by hand, each threshold from both sides."""

from __future__ import annotations

import pytest

from pipeline.report.checks import Reading, judge, of_policies, readings_of
from pipeline.report.spec import FINE, LEVELS, LOOK, TROUBLE, band, rules, wanted
from pipeline.report.stage_checks import OF_KIND, TRAINING, of_stage, series_of, spent


def level(quantity: str, value: float) -> str:
    return judge(quantity, Reading(value, "")).level


# quantity -> values with their verdicts, in rising order; a limit itself is healthy
THRESHOLDS = {
    "estimated_gain": [(0.0, TROUBLE), (0.5, LOOK), (1.0, FINE)],
    "gain": [(-2.1, TROUBLE), (-2.0, LOOK), (1.9, LOOK), (2.0, FINE)],
    "unseen": [(-2.1, TROUBLE), (-2.0, FINE)],
    "parts": [(-2.1, LOOK), (-2.0, FINE)],
    "length": [(0.49, TROUBLE), (0.5, LOOK), (0.67, FINE), (1.33, FINE), (1.34, LOOK), (2.0, LOOK), (2.1, TROUBLE)],
    "length_correlation": [
        *((-0.71, TROUBLE), (-0.7, LOOK), (-0.51, LOOK), (-0.5, FINE)),
        *((0.5, FINE), (0.51, LOOK), (0.7, LOOK), (0.71, TROUBLE)),
    ],
    "variety": [(0.49, TROUBLE), (0.5, LOOK), (0.69, LOOK), (0.7, FINE), (2.0, FINE)],
    "repetition": [(0.2, FINE), (0.21, LOOK), (0.5, LOOK), (0.51, TROUBLE)],
    "cut": [(0.2, FINE), (0.21, LOOK), (0.5, LOOK), (0.51, TROUBLE)],
    "kl": [(0.019, LOOK), (0.02, FINE), (10.0, FINE), (10.1, LOOK)],
    "lowered": [(1.0, FINE), (1.5, FINE), (1.51, LOOK), (3.0, LOOK), (3.1, TROUBLE)],
    "kept": [(0.19, LOOK), (0.2, FINE), (0.8, FINE), (0.81, LOOK)],
    "value_r2": [(-0.01, TROUBLE), (0.0, LOOK), (0.13, LOOK), (0.2, FINE)],
    "clip": [(0.5, FINE), (0.51, LOOK), (0.95, LOOK)],
    "ess": [(0.09, TROUBLE), (0.1, LOOK), (0.29, LOOK), (0.3, FINE)],
    "entropy": [(0.29, LOOK), (0.3, FINE)],
    "best_step": [(0, TROUBLE), (1, FINE)],
    "overfit": [(1.1, FINE), (1.11, LOOK)],
    "pair_lead": [(-0.1, TROUBLE), (0.0, LOOK), (1.9, LOOK), (2.0, FINE)],
    "pair_accuracy": [(0.49, TROUBLE), (0.5, LOOK), (0.59, LOOK), (0.6, FINE)],
    "source_accuracy": [(0.49, LOOK), (0.5, FINE)],
    "pair_gap": [(0.15, FINE), (0.16, LOOK)],
    "grad_spike": [(5.0, FINE), (5.1, LOOK), (20.0, LOOK), (20.1, TROUBLE)],
    "non_finite": [(0.0, FINE), (0.001, LOOK), (0.01, LOOK), (0.011, TROUBLE)],
    "data_cut": [(0.05, FINE), (0.06, LOOK)],
    "masked_start": [(1.0, FINE), (1.1, LOOK)],
    "masked_end": [(1.0, FINE), (1.1, LOOK)],
    "mask_rate": [(0.5, FINE), (0.51, LOOK)],
    "nothing_hidden": [(0.1, FINE), (0.11, LOOK)],
    "equal_rewards": [(0.5, FINE), (0.51, LOOK), (0.9, LOOK), (0.91, TROUBLE)],
    "different_texts": [(0.24, LOOK), (0.25, FINE)],
    "carried_over": [(-2.1, TROUBLE), (-2.0, FINE)],
    "logp_gap": [(1e-7, FINE), (0.02, FINE), (0.021, LOOK), (0.1, LOOK), (0.11, TROUBLE)],
    "equal_groups": [(0.5, FINE), (0.51, LOOK), (0.9, LOOK), (0.91, TROUBLE)],
    "at_k_min": [(0.8, FINE), (0.81, LOOK)],
    "known": [(0.0, LOOK), (0.49, LOOK), (0.5, FINE)],
    "left_out": [(0.5, FINE), (0.51, LOOK), (0.9, LOOK), (0.91, TROUBLE)],
    "baseline": [(1.0, FINE), (1.1, LOOK)],
    "tokens_saved": [(0.09, LOOK), (0.1, FINE)],
    "sampling_time": [(0.9, FINE), (0.91, LOOK)],
}


@pytest.mark.parametrize("quantity", rules())
def test_thresholds(quantity):
    for value, expected in THRESHOLDS[quantity]:
        assert level(quantity, value) == expected, value


def test_every_rule_is_read_from_somewhere():
    of_two_policies = {"gain", "unseen", "parts"}
    by_function = {*TRAINING, *(quantity for takes in OF_KIND.values() for quantity in takes)}
    by_itself = {quantity for quantity, rule in rules().items() if rule.reads}
    assert by_function | by_itself | of_two_policies == set(rules())
    assert not by_function & by_itself
    assert {rules()[quantity].reads for quantity in by_itself} == {"end", "share", "drift"}


def test_every_limit_has_one_bound_and_says_what_to_do_and_why():
    for rule in rules().values():
        for limit in rule.limits:
            assert limit.side in ("below", "above")
            assert limit.means and limit.do and limit.why and limit.level in LEVELS and limit.level != FINE
        graver = [LEVELS.index(limit.level) for limit in rule.limits]
        assert graver == sorted(graver), rule.name  # else a graver limit behind a milder one would never speak


def test_the_band_is_made_of_the_tightest_limits():
    assert band("length") == (0.67, 1.33)
    assert band("value_r2") == (0.2, None)
    assert wanted("kept") == "healthy from 0.2 to 0.8"
    assert wanted("length") == "healthy from 0.67 to 1.33 times the start"
    assert wanted("grad_spike") == "healthy up to 5 times the median"


def test_the_gain_is_counted_in_standard_errors():
    sft = {"reward": 0.40, "reward_se": 0.03}
    rl = {"reward": 0.50, "reward_se": 0.04}
    # sqrt(0.03^2 + 0.04^2) = 0.05; 0.10 / 0.05 = 2
    quantity, reading = readings_of(sft, rl)["reward"]
    assert quantity == "gain" and reading.value == pytest.approx(2.0)
    assert reading.text == "0.400 to 0.500, 2.00 standard errors"
    # without errors two of them are 2 % of 0.40 = 0.008: 0.10 / 0.004 = 25
    assert readings_of({"reward": 0.40}, {"reward": 0.50})["reward"][1].value == pytest.approx(25.0)


def test_what_was_never_trained_on_is_judged_apart_and_only_where_the_reward_rose():
    names = ("reward", "rewards/a/mean", "rewards/b/mean", "rewards/oracle:a/mean")
    sft = dict(zip(names, (0.5, 0.5, 0.5, 0.5), strict=True))
    rl = dict(zip(names, (0.6, 0.6, 0.3, 0.4), strict=True))
    # one standard error is half of 2 % of 0.5: 0.005; a is a copy of the reward
    found = readings_of(sft, rl)
    assert {tag: quantity for tag, (quantity, _) in found.items()} == {
        "reward": "gain",
        "rewards/b/mean": "parts",
        "rewards/oracle:a/mean": "unseen",
    }
    assert found["rewards/b/mean"][1].value == pytest.approx(-40.0)  # -0.2 / 0.005
    for monitor in ("b", "runs/other/reward/b/model"):
        assert readings_of(sft, rl, monitors=[monitor])["rewards/b/mean"][0] == "unseen"
    judged = of_policies(sft, rl)
    assert (judged["rewards/b/mean"].level, judged["rewards/oracle:a/mean"].level) == (LOOK, TROUBLE)
    assert readings_of(sft, {**rl, "reward": 0.4}).keys() == {"reward"}


def test_responses_beside_the_first_policy():
    sft = {"completions/mean_words": 20.0, "completions/distinct_2": 0.4, "completions/repetition": 0.1}
    rl = {"completions/mean_words": 30.0, "completions/distinct_2": 0.1, "completions/repetition": 0.3}
    # of the correlations with length the reward's own is judged, not those of its parts
    more = {"reward_length_correlation": -0.3, "rewards/a/length_correlation": -0.6, "objective/kl": 2.0}
    found = readings_of(sft, rl | more)
    values = {quantity: reading.value for quantity, reading in found.values()}
    assert values == pytest.approx(
        {"length": 1.5, "variety": 0.25, "repetition": 0.3, "length_correlation": -0.3, "kl": 2.0}
    )
    assert found["completions/repetition"][1].text == "10% to 30%"


def rl_rows(n: int = 20) -> list[dict]:
    """The last tenth of 20 points are two, the first tenth too."""
    return [
        {
            "step": i + 1,
            "ratio/clip_fraction_low": 0.25,
            "ratio/clip_fraction_high": 0.5 if i >= n - 2 else 0.0,
            "ratio/ess": 0.5,
            "train/grad_norm": {0: 90.0, 9: 12.0}.get(i, 2.0),
            "eval/completions/mean_words": 10.0 if i < 2 else 40.0,
        }
        for i in range(n)
    ]


def test_curves_of_rl():
    rows = [{"step": 0, "value/r2": 0.13, "advantage/kept_fraction": 0.5}, *rl_rows()]
    found = of_stage("rl", series_of(rows), {"model_step": 20, "steps": 20}, {"non_finite": 2})
    values = {quantity: reading.value for quantity, reading in found.items()}
    # spike: the first tenth of 20 points (90) is warm-up; 12 / 2 = 6. non-finite: 2 of 20 steps.
    # length: from 10 to 40. clip: 0.25 + 0.5.
    expected = {"non_finite": 0.1, "grad_spike": 6.0, "length": 4.0, "kept": 0.5, "value_r2": 0.13}
    assert values == pytest.approx({**expected, "clip": 0.75, "ess": 0.5})
    assert found["clip"].text == "75% (25% at the lower bound, 50% at the upper bound)"
    # of a method that learns from all rows the kept share says nothing; 120 nats are twice 60
    rows[0] |= {"advantage/raised_fraction": 0.5}
    rows[-1] |= {"eval/logps/lowered": -120.0, "eval/logps/ref_lowered": -60.0}
    found = of_stage("rl", series_of(rows), {}, {})
    assert "kept" not in found and found["lowered"].value == 2.0
    assert judge("value_r2", found["value_r2"]).means.startswith("it hardly foresees which prompts")


def masked_rows(*decoded: float) -> list[dict]:
    """Greedy compositions rise from 0.1 to 0.5; the decoded responses' rewards are given, of standard error 0.03."""
    looks = [
        {"eval/reward": reward, "eval/reward_se": 0.03, "eval/loss": 2.0, "eval/masked_loss": 3.5 - i}
        for i, reward in enumerate(decoded)
    ]
    shares = {"mask_rate": 0.6, "nothing_hidden": 0.2, "equal_rewards": 0.75, "different_texts": 0.125}
    shares = {f"semi_offline/{name}": value for name, value in shares.items()}
    return [{"step": i, **shares, "semi_offline/greedy_reward": 0.1 + 0.4 * i, **look} for i, look in enumerate(looks)]


def test_curves_of_hidden_tokens():
    found = of_stage("rl", series_of(masked_rows(0.40, 0.25)), {}, {})
    values = {quantity: reading.value for quantity, reading in found.items()}
    # two errors of 0.03 give 0.0424 for a difference: -0.15 / 0.0424 = -3.54; at the start 3.5 - 2.0
    shares = {"mask_rate": 0.6, "nothing_hidden": 0.2, "equal_rewards": 0.75, "different_texts": 0.125}
    assert values == pytest.approx({**shares, "masked_start": 1.5, "carried_over": -3.5355, "best_step": 0}, rel=1e-4)
    assert found["carried_over"].text == "greedy compositions 0.100 to 0.500, decoded responses 0.400 to 0.250"
    assert found["masked_start"].text == "2.00 on whole inputs, 3.50 on masked ones"
    assert of_stage("sft", series_of(masked_rows(0.4, 0.4)), {}, {})["masked_end"].value == pytest.approx(0.5)


def test_compositions_that_do_not_gain_carry_nothing_over():
    rows = [{**row, "semi_offline/greedy_reward": 0.5 - row["step"]} for row in masked_rows(0.4, 0.1)]
    assert "carried_over" not in of_stage("rl", series_of(rows), {}, {})
    assert "carried_over" not in of_stage("rl", series_of(masked_rows(0.4)), {}, {})


def sampled_rows(**shared_out: float) -> list[dict]:
    """Two rows of two steps each: 600 and 100 tokens per step, of 2 seconds per step 1 to sample."""
    stats = {"rollout/logp_gap": 0.125, "rollout/equal_groups": 0.25, "esrl/known": 0.0, "esrl/left_out": 0.75}
    stats |= {"advantage/mean": -0.6, "advantage/std": 0.4, "perf/sampling_seconds": 1.0, "perf/step_seconds": 2.0}
    tokens = [{"step": 2, "rollout/generated_tokens": 600.0}, {"step": 4, "rollout/generated_tokens": 100.0}]
    return [{**row, **stats, **shared_out} for row in tokens]


def test_curves_of_dynamic_sampling():
    rows = sampled_rows(**{"esrl/at_k_min": 0.875, "esrl/tokens_saved": 0.75})
    rows[0]["esrl/tokens_saved"] = 0.0
    found = of_stage("rl", series_of(rows), {}, {})
    # 2 * 600 + 2 * 100 = 1400 tokens in place of 2 * 600 + 2 * 100 / 0.25 = 2000; |-0.6| / 0.4; 1 s of 2 s
    shares = {"equal_groups": 0.25, "known": 0.0, "left_out": 0.75, "at_k_min": 0.875, "tokens_saved": 0.3}
    values = {quantity: reading.value for quantity, reading in found.items()}
    assert values == pytest.approx({**shares, "logp_gap": 0.125, "baseline": 1.5, "sampling_time": 0.5})
    assert found["tokens_saved"].text == "30%, 1,400 tokens in place of 2,000"
    assert found["sampling_time"].text == "350 a step, 1,400 in all, in 50% of the time"
    assert spent(series_of(rows)) == pytest.approx({"generated_tokens": 1400, "tokens_saved": 0.3})


def test_a_fixed_number_of_samples_is_not_judged_as_a_dynamic_one():
    nothing = dict.fromkeys(("esrl/at_k_min", "esrl/tokens_saved"))
    rows = [{**row, "advantage/mean": 1e-9} for row in sampled_rows(**nothing)]  # compared with one another
    found = of_stage("rl", series_of(rows), {}, {})
    assert found.keys() == {"logp_gap", "equal_groups", "sampling_time"}
    assert spent(series_of(rows)) == {"generated_tokens": 1400}
    assert spent({}) == {}


def test_curves_of_a_reward_model():
    losses = (2.0, 1.0, 1.2)
    rows = [
        {"step": i, "eval/loss": loss, "train/accuracy": 0.9, "eval/accuracy": 0.7} for i, loss in enumerate(losses)
    ]
    pairs = {"eval/accuracy": 0.6, "eval/length_accuracy": 0.5, "eval/pairs": 96.0}
    sources = {"eval/accuracy/a": 0.4, "eval/pairs/a": 29.0, "eval/accuracy/b": 0.5, "eval/pairs/b": 30.0}
    found = of_stage("reward", series_of(rows), pairs | sources, {"rows": 50, "responses": 100, "cut_responses": 7})
    values = {quantity: reading.value for quantity, reading in found.items()}
    # sqrt(0.6 * 0.4 / 96) = 0.05, so the lead of 0.1 is two errors; source a has too few pairs; 0.9 - 0.7
    expected = {"overfit": 1.2, "pair_lead": 2.0, "pair_accuracy": 0.6, "source_accuracy": 0.5, "pair_gap": 0.2}
    expected["best_step"] = 1
    assert values == pytest.approx({**expected, "data_cut": 0.07})


def test_a_weighted_loss_cannot_overfit():
    rows = [{"step": i, "eval/loss": loss} for i, loss in enumerate((2.0, 1.0, 1.2))]
    assert of_stage("sft", series_of(rows), {}, {})["overfit"].value == pytest.approx(1.2)
    assert "overfit" not in of_stage("rl", series_of(rows), {}, {})


@pytest.mark.parametrize(("rewards", "step"), [((0.5, 0.4, 0.45), 0), ((0.5, 0.7, 0.7), 10), ((0.5, 0.6, 0.7), 20)])
def test_the_best_step_is_that_of_the_best_evaluation_whatever_was_kept(rewards: tuple[float, ...], step: int):
    """With train.keep=last the weights kept are the last, step 20; the losses fall, as they do in RL come what may."""
    rows = [{"step": 10 * i, "eval/loss": -i, "eval/reward": x} for i, x in enumerate(rewards)]
    found = of_stage("rl", series_of(rows), {"model_step": 20, "steps": 20}, {})["best_step"]
    assert (found.value, found.text) == (step, f"{step} of 20")
    assert judge("best_step", found).level == (FINE if step else TROUBLE)
    # without a reward that judges responses, that of the logged rows says nothing, and the loss is read
    unjudged = [{"step": row["step"], "eval/loss": row["eval/loss"], "eval/logged/reward": 0.5} for row in rows]
    assert of_stage("rl", series_of(unjudged), {}, {})["best_step"].value == 20
    assert "best_step" not in of_stage("rl", series_of(rows[:1]), {}, {})
