"""Reward-model losses on pairs and on single responses against hand arithmetic."""

import dataclasses
import math

import pytest
import torch

from pipeline.algorithms import preference
from pipeline.algorithms.stats import reduce
from pipeline.errors import UserError
from pipeline.records import Batch, Needs

Settings = preference.Settings
BT = Settings(objective="bradley_terry", use_margin=False, center_coef=0.0)
MARGIN = dataclasses.replace(BT, use_margin=True)
REGRESSION = Settings(objective="regression", use_margin=False, center_coef=0.0)
MIXED = dataclasses.replace(REGRESSION, objective="mixed")
NUMBERS = {
    "margin": [1.0, 0.0],
    "chosen_reward": [2.0, 0.0],
    "rejected_reward": [0.0, -1.0],
    "correctness": [1.0, 0.0],
}


def make_batch(pairs=2, fillers=0, numbers=NUMBERS):
    half = [[True]] * pairs + [[False]] * fillers
    mask = torch.tensor(half + half)
    ids, lengths = torch.zeros_like(mask, dtype=torch.long), torch.ones(len(mask), dtype=torch.long)
    tensors = {name: torch.tensor(values[:pairs], dtype=torch.float64) for name, values in numbers.items()}
    return Batch(tuple(range(pairs)), ids, torch.ones_like(mask), lengths, ids, mask, tensors)


def value_and_gradient(settings, scores, batch):
    scores = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    total, stats = preference.loss(scores, batch, settings)
    (gradient,) = torch.autograd.grad(total, scores)
    return total.item(), gradient.tolist(), {name: reduce(stat) for name, stat in stats.items()}


# chosen 1, -.5; rejected 0, .5: gaps 1, -1
SCORES = [1.0, -0.5, 0.0, 0.5]


def test_bradley_terry_by_hand():
    total, gradient, _ = value_and_gradient(BT, SCORES, make_batch())
    # ln(1 + e^-1) = .313262, ln(1 + e) = 1.313262; slope -sigmoid(-gap): -.268941, -.731059
    assert total == pytest.approx(0.313262 + 1.313262, abs=1e-6)
    assert gradient == pytest.approx([-0.268941, -0.731059, 0.268941, 0.731059], abs=1e-6)


def test_margin_by_hand():
    total, gradient, _ = value_and_gradient(MARGIN, SCORES, make_batch())
    # gaps 1 - 1 = 0 and -1 - 0: ln 2 + 1.313262; slopes -.5, -.731059
    assert total == pytest.approx(0.693147 + 1.313262, abs=1e-6)
    assert gradient == pytest.approx([-0.5, -0.731059, 0.5, 0.731059], abs=1e-6)


def test_centring_by_hand():
    total, gradient, _ = value_and_gradient(dataclasses.replace(BT, center_coef=0.1), SCORES, make_batch())
    # sums 1 and 0: .1 * 1 more, slope .2 * 1 more on both scores of the first pair
    assert total == pytest.approx(0.313262 + 1.313262 + 0.1, abs=1e-6)
    assert gradient == pytest.approx([-0.268941 + 0.2, -0.731059, 0.268941 + 0.2, 0.731059], abs=1e-6)


def test_regression_by_hand():
    total, gradient, _ = value_and_gradient(REGRESSION, SCORES, make_batch())
    # errors chosen -1, -.5; rejected 0, 1.5: (1 + .25 + 0 + 2.25) / 2; slope = error
    assert total == pytest.approx(1.75)
    assert gradient == pytest.approx([-1.0, -0.5, 0.0, 1.5])


def test_golden_scores():
    numbers = {"chosen_reward": [0.9], "rejected_reward": [0.2]}
    total, gradient, stats = value_and_gradient(REGRESSION, [0.7, 0.1], make_batch(1, numbers=numbers))
    # ((.7 - .9)^2 + (.1 - .2)^2) / 2 = (.04 + .01) / 2; slopes .7 - .9, .1 - .2
    assert total == stats["mse"] == pytest.approx(0.025)
    assert gradient == pytest.approx([-0.2, -0.1])


def test_mixed_by_hand():
    total, gradient, stats = value_and_gradient(MIXED, SCORES, make_batch())
    # over the two responses of a pair, whichever way: pair 1 is trusted, ((1 - 2)^2 + 0) / 2 = .5, slopes -1, 0;
    # pair 2 is ranked, 1.313262 / 2, slopes -.731059 / 2, .731059 / 2
    assert total == pytest.approx(0.5 + 0.656631, abs=1e-6)
    assert gradient == pytest.approx([-1.0, -0.365529, 0.0, 0.365529], abs=1e-6)
    assert stats["mse"] == pytest.approx(0.5)  # of the trusted pair alone


def single_batch(rewards, fillers=0):
    """Responses by themselves, each with its reward."""
    n = len(rewards)
    mask = torch.tensor([[True]] * n + [[False]] * fillers)
    ids, lengths = torch.zeros_like(mask, dtype=torch.long), torch.ones(len(mask), dtype=torch.long)
    numbers = {"reward": torch.tensor(rewards, dtype=torch.float64)}
    return Batch(tuple(range(n)), ids, torch.ones_like(mask), lengths, ids, mask, numbers)


def test_responses_by_themselves():
    total, gradient, stats = value_and_gradient(REGRESSION, [0.7, 0.1, 0.5], single_batch([0.9, 0.2, 0.0]))
    # .04 + .01 + .25; slopes 2 (s - reward)
    assert total == pytest.approx(0.3)
    assert gradient == pytest.approx([-0.4, -0.2, 1.0])
    # scores' mean 1.3 / 3, their variance (.49 + .01 + .25) / 3 - (1.3 / 3)^2 = .062222
    assert stats == pytest.approx(
        {"loss": 0.1, "mse": 0.1, "scores/mean": 1.3 / 3, "scores/std": math.sqrt(0.0622222)}, abs=1e-6
    )


def test_fillers_of_single_responses_contribute_nothing():
    total, gradient, stats = value_and_gradient(REGRESSION, [0.7, 0.1], single_batch([0.9, 0.2]))
    padded = value_and_gradient(REGRESSION, [0.7, 0.1, math.nan], single_batch([0.9, 0.2], fillers=1))
    assert padded == (total, [*gradient, 0.0], stats)
    assert value_and_gradient(REGRESSION, [math.nan], single_batch([], fillers=1))[:2] == (0.0, [0.0])


def test_statistics_by_hand():
    _, _, stats = value_and_gradient(BT, SCORES, make_batch())
    assert stats == pytest.approx(
        {
            "loss": (0.313262 + 1.313262) / 2,
            "accuracy": 0.5,
            "margin": 0.0,
            "scores/chosen/mean": 0.25,
            "scores/chosen/std": 0.75,
            "scores/rejected/mean": 0.25,
            "scores/rejected/std": 0.25,
        },
        abs=1e-6,
    )


def test_a_tie_is_half_right():
    assert value_and_gradient(BT, [0.0, 1.0, 0.0, 0.0], make_batch())[2]["accuracy"] == 0.75


@pytest.mark.parametrize("settings", [BT, MARGIN, REGRESSION, MIXED])
def test_fillers_contribute_nothing(settings):
    total, gradient, stats = value_and_gradient(settings, SCORES, make_batch())
    nan = math.nan
    padded = value_and_gradient(settings, [*SCORES[:2], nan, *SCORES[2:], nan], make_batch(fillers=1))
    assert padded[0] == total
    assert padded[1] == [*gradient[:2], 0.0, *gradient[2:], 0.0]
    assert padded[2] == stats
    nothing, no_gradient, _ = value_and_gradient(settings, [nan, nan], make_batch(pairs=0, fillers=1))
    assert (nothing, no_gradient) == (0.0, [0.0, 0.0])


@pytest.mark.parametrize("settings", [BT, MARGIN, REGRESSION, MIXED])
def test_micro_batches_add_up(settings):
    total, gradient, _ = value_and_gradient(settings, SCORES, make_batch())
    parts = []
    for pair in range(2):
        numbers = {name: values[pair:] for name, values in NUMBERS.items()}
        parts.append(value_and_gradient(settings, [SCORES[pair], SCORES[2 + pair]], make_batch(1, numbers=numbers)))
    assert parts[0][0] + parts[1][0] == pytest.approx(total)
    assert [parts[0][1][0], parts[1][1][0], parts[0][1][1], parts[1][1][1]] == pytest.approx(gradient)


def test_large_gaps_stay_finite():
    total, gradient, _ = value_and_gradient(BT, [1e4, -1e4, -1e4, 1e4], make_batch())
    assert total == pytest.approx(2e4)  # 0 and 2e4
    assert gradient == pytest.approx([0.0, -1.0, 0.0, 1.0])


def test_descent_learns_the_order_and_not_from_shuffled_pairs():
    def accuracy(flip):
        torch.manual_seed(0)
        better, worse = torch.randn(64, 3) + 1, torch.randn(64, 3)
        swap = torch.rand(64, 1) < 0.5 if flip else torch.zeros(64, 1, dtype=torch.bool)
        chosen, rejected = torch.where(swap, worse, better), torch.where(swap, better, worse)
        w = torch.zeros(3, requires_grad=True)
        for _ in range(30):
            total, _ = preference.loss(torch.cat([chosen, rejected]) @ w, make_batch(64, numbers={}), BT)
            w = (w - torch.autograd.grad(total, w)[0] / 64).detach().requires_grad_()
        return float(((better - worse) @ w > 0).float().mean())

    assert accuracy(flip=False) > 0.85
    assert accuracy(flip=True) < 0.8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"objective": "bt"}, "objective: 'bt', wanted bradley_terry, regression, mixed"),
        ({"center_coef": -1.0}, "center_coef: -1.0, wanted a number >= 0"),
        ({"objective": "regression", "center_coef": 0.1}, "center_coef: 0.1, wanted 0 where objective is regression"),
        ({"objective": "regression", "use_margin": True}, "use_margin: true, wanted false"),
        ({"objective": "mixed", "use_margin": True}, "use_margin: true, wanted false where objective is mixed"),
    ],
)
def test_settings_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BT, **wrong)


def test_missing_numbers_and_wrong_shapes_are_named():
    bare, scores = make_batch(numbers={}), torch.zeros(4)
    with pytest.raises(UserError, match="margin: the batch has no such number"):
        preference.loss(scores, bare, MARGIN)
    with pytest.raises(UserError, match="chosen_reward: the batch has no such number"):
        preference.loss(scores, bare, REGRESSION)
    annotated = make_batch(numbers={name: NUMBERS[name] for name in ("chosen_reward", "rejected_reward")})
    with pytest.raises(UserError, match="correctness: the batch has no such number"):
        preference.loss(scores, annotated, MIXED)
    with pytest.raises(UserError, match=r"margin: shape is \(1,\), wanted \(2,\)"):
        preference.loss(scores, dataclasses.replace(bare, numbers={"margin": torch.zeros(1)}), MARGIN)
    with pytest.raises(AssertionError, match=r"scores: shape is \(3,\), wanted \(4,\)"):
        preference.loss(torch.zeros(3), bare, BT)
    assert preference.needs(MARGIN) == Needs()
