"""Off-policy estimates of a gain: worked out by hand, and against the truth where it is known."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.algorithms import estimates
from pipeline.algorithms.estimates import HeldOut
from pipeline.report import gains

F64 = torch.float64
ONCE = torch.ones(1, 3, dtype=F64)


def rows(log_ratio, reward, value=None, prompt=None) -> HeldOut:
    n = len(reward)
    return HeldOut(
        torch.tensor(log_ratio, dtype=F64),
        torch.tensor(reward, dtype=F64),
        torch.tensor([0.0] * n if value is None else value, dtype=F64),
        torch.arange(n) if prompt is None else torch.tensor(prompt),
        torch.full((n,), 5),
    )


def by_hand(name: str, of: HeldOut, times=ONCE) -> float:
    return float(estimates.ESTIMATES[name](of, times))


# rho = (1, 2, 1), r = (.2, .8, .5), V = (.4, .4, .5): A = (-.2, .4, 0)
THREE = rows([0.0, math.log(2), 0.0], [0.2, 0.8, 0.5], [0.4, 0.4, 0.5])


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("snips", (0.2 + 1.6 + 0.5) / 4 - 0.5),  # .575 - .5
        ("dr", (-0.2 + 0.8 + 0.0) / 4 - 0.2 / 3),  # .15 - .0667
        ("clipped", (-0.2 + 0.8 + 0.0) / 4 - 0.2 / 3),  # no ratio is 3 nats away from the mean
        ("tempered", (-0.2 + 0.8 + 0.0) / 4 - 0.2 / 3),  # 16 / 6 of 3 rows carry the weight: g = 1
        ("slope", 0.4 * math.log(2) / 3 - 0.2 / 3 * math.log(2) / 3),
        # tanh(ln 2 / 2) = 1/3 for the pairs (1, 2) and (2, 3), each twice, of 6: (.6 + .4) / 3 * 2 / 6
        ("pairs", 1 / 9),
    ],
)
def test_by_hand(name, wanted):
    assert by_hand(name, THREE) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", estimates.ESTIMATES)
def test_forgetting_is_no_gain_and_better_rows_that_rise_are_one(name):
    rewards = [0.2, 0.8, 0.5]
    assert by_hand(name, rows([0.0] * 3, rewards)) == pytest.approx(0, abs=1e-12)
    assert by_hand(name, rows([-40.0] * 3, rewards)) == pytest.approx(0, abs=1e-12)
    assert by_hand(name, rows([-41.0, -39.0, -40.0], rewards)) > 0.05
    assert by_hand(name, rows([-39.0, -41.0, -40.0], rewards)) < -0.05
    shifted = by_hand(name, rows([-41.0, -39.0, -40.0], rewards))
    assert by_hand(name, rows([-1.0, 1.0, 0.0], rewards)) == pytest.approx(shifted, rel=1e-9)


@pytest.mark.parametrize("name", estimates.ESTIMATES)
def test_a_row_that_stands_twice_counts_twice(name):
    """As in a bootstrap; `pairs` leaves out a row beside its own copy, whose gain is 0, so that it is a little more."""
    twice = torch.tensor([[1.0, 2.0, 1.0]], dtype=F64)
    copied = rows([0.0, math.log(2), math.log(2), 0.0], [0.2, 0.8, 0.8, 0.5], [0.4, 0.4, 0.4, 0.5])
    found, wanted = by_hand(name, THREE, twice), by_hand(name, copied, torch.ones(1, 4, dtype=F64))
    assert found == pytest.approx(wanted * (12 / 10 if name == "pairs" else 1))


def test_power_is_the_largest_with_enough_rows():
    ratios = torch.tensor([0.0, 1.0, 4.0, -2.0, 9.0, 3.0], dtype=F64)
    for share in (0.25, 0.5, 0.9):
        g = estimates.power(ratios, share)
        assert estimates.ess(torch.exp(g * ratios)) == pytest.approx(share * 6, rel=1e-6)
        assert estimates.ess(torch.exp((g + 0.01) * ratios)) < share * 6
    assert estimates.power(ratios, 0.0) == 1 and estimates.power(0 * ratios, 1.0) == 1


def test_a_bootstrap_draws_prompts_and_keeps_their_rows_together():
    times = estimates.resampled(torch.tensor([0, 1, 1, 2]), seed=3)
    assert (times[:, 1] == times[:, 2]).all() and not (times[:, 0] == times[:, 1]).all()
    assert (times[:, [0, 1, 3]].sum(1) == 3).all()


def bandit(policy: torch.Tensor, n: int, seed: int) -> tuple[HeldOut, float]:
    """n rows of a reference that picks one of three responses, and the gain of `policy` over it."""
    reference, reward = torch.tensor([0.5, 0.3, 0.2], dtype=F64), torch.tensor([0.2, 0.5, 0.9], dtype=F64)
    drawn = torch.multinomial(reference, n, replacement=True, generator=torch.Generator().manual_seed(seed))
    ratio = (policy / reference).log()[drawn]
    of = HeldOut(ratio, reward[drawn], torch.full((n,), 0.43, dtype=F64), torch.arange(n), torch.full((n,), 5))
    return of, float((policy - reference) @ reward)


def test_rows_that_follow_the_reference_give_the_true_gain():
    policy = torch.tensor([0.2, 0.3, 0.5], dtype=F64)
    found = [bandit(policy, 300, seed) for seed in range(200)]
    truth, gains = found[0][1], [estimates.gain(of, seed) for seed, (of, _) in enumerate(found)]
    assert sum(gain.value for gain in gains) / 200 == pytest.approx(truth, abs=0.005)
    covered = sum(gain.low <= truth <= gain.high for gain in gains)
    assert 168 <= covered <= 192  # 180 at 90 %, give or take 3 x 4.2
    assert all(gain.known and gain.power == 1 for gain in gains)
    assert sum(gain.mass for gain in gains) / 200 == pytest.approx(1.0, abs=0.02)


def test_what_rests_on_few_rows_is_not_known():
    policy = torch.tensor([0.2, 0.3, 0.5], dtype=F64)
    assert estimates.gain(bandit(policy, 12, 0)[0]).unknown == "12 held-out rows, wanted 16 or more"
    of, _ = bandit(policy, 300, 0)
    one = of.log_ratio.clone()
    one[:40] += 1000 * torch.arange(40)
    gain = estimates.gain(HeldOut(*(column[:40] for column in of._replace(log_ratio=one))))
    assert not gain.known and not gain.never and "10 of 40 held-out rows carry the weight, wanted 16" in gain.unknown
    few = estimates.gain(of._replace(prompt=of.prompt % 7))
    assert not few.known and few.unknown == "7 held-out prompts, wanted 8 or more"
    long = estimates.gain(of._replace(words=(of.reward * 100).long()))
    assert not long.known and "rewards follow the length (correlation 1.00)" in long.unknown
    assert few.few and gain.few and not long.few
    gone = estimates.gain(of._replace(log_ratio=of.log_ratio - 10))
    assert not gone.known and not gone.never and not gone.few
    assert gone.unknown.startswith(f"held-out rows are {gone.mass:.2g} times as likely as they were")
    # the report, which needs no torch, says the same
    assert (gains.COUNTS_WORDS, gains.SAYS_OTHERS) == (estimates.LENGTH, estimates.MASS)


def test_ratios_beyond_the_range_of_a_float_have_an_interval_and_those_that_are_no_numbers_none():
    n = 100  # the ratio as it is rests on one row, and a draw without it on the next one: at exp(-1000) of the largest
    alternating = torch.arange(n, dtype=F64) % 2
    of = HeldOut(1000 * torch.arange(n, dtype=F64), alternating, torch.zeros(n), torch.arange(n), torch.full((n,), 5))
    gain = estimates.gain(of)
    assert gain.known and gain.dr == 0.5 and -1 <= gain.low <= gain.value <= gain.high <= 1
    for wrong in (math.nan, math.inf):
        ratios = torch.where(torch.arange(n) == 3, wrong, of.log_ratio)
        assert "not finite" in estimates.gain(of._replace(log_ratio=ratios)).unknown
