"""How sure the policy is of a prompt, how many responses that gives, and what the released code drops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.algorithms import capability
from pipeline.rollout.allocation import Record, Sampler
from tests import tiny


def sampler(choices: int = 4, queue: tuple[float, ...] = (), **changes: Any) -> Sampler:
    """That of algo=esrl with `changes`, over the full range of entropies."""
    settings = tiny.settings("rl", "algo=esrl").sampler
    checked = type(settings).model_validate({**settings.model_dump(), "entropy_range": "full", **changes})
    planner = Sampler(checked, choices, 100)
    planner.rewards.extend(queue)
    return planner


def record(**changes: Any) -> Record:
    return Record(**{"reward": 0.5, "entropy": 0.0, "confidence": 0.7, **changes})


def entropy(*rows: list[float]) -> float:
    """Mean nats per token."""
    return float(torch.special.entr(torch.tensor(rows, dtype=torch.float64)).sum(1).mean())


# estimates


@pytest.mark.parametrize(
    "rows, wanted",
    [
        ([[1.0, 0.0, 0.0, 0.0]], 1.0),
        ([[0.25] * 4], 0.0),
        # H = -.7 ln .7 - 3 * .1 ln .1 = .9404; (.9404 + 1.3863)/2 = 1.1634; 1 - 1.1634/1.3863 = .1608
        ([[0.7, 0.1, 0.1, 0.1], [0.25] * 4], 0.1608),
    ],
)
def test_t06_by_entropy(rows: list[list[float]], wanted: float) -> None:
    assert capability.entropy_capability(entropy(*rows), 0.0, math.log(4)) == pytest.approx(wanted, abs=5e-5)


def test_between_two_numbers() -> None:
    """(.5 - 0)/(2 - 0); limited; .5 where low and high are the same."""
    assert capability.place_between(0.5, 0.0, 2.0) == 0.25
    assert capability.place_between(-3.0, 0.0, 2.0) == 0.0 and capability.place_between(9.0, 0.0, 2.0) == 1.0
    assert capability.place_between(7.0, 1.0, 1.0) == 0.5
    assert math.isnan(capability.place_between(math.nan, 0.0, 2.0))


def test_entropy_among_the_last() -> None:
    """Entropies 0 .. 2 in steps of .1: 5 % is .1, 95 % is 1.9; 1 - (.55 - .1)/1.8 = .75. Nothing is known before."""
    planner = sampler(choices=1000, entropy_range="recent")
    assert planner.capability([record(entropy=0.55)]) is None
    for i in range(21):
        planner.learn("a", record(entropy=i / 10))
    assert planner.capability([record(entropy=0.55)]) == pytest.approx(0.75)
    assert sampler(entropy_range=[0.1, 1.9]).capability([record(entropy=0.55)]) == pytest.approx(0.75)


def peaks(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("m, wanted", [(0.1, 0.770), (0.25, 0.653), (0.5, 0.653), (0.9, 0.905), (1.0, 1.0)])
def test_confidence_falls_before_it_rises(m: float, wanted: float) -> None:
    """1 + m ln m: 1 - .230, 1 - .347, 1 - .347, 1 - .095, 1."""
    assert capability.confidence(peaks(m)) == pytest.approx(wanted, abs=5e-4)


def test_confidence_of_nothing() -> None:
    assert capability.confidence(peaks()) == 1.0


def test_combined_and_quantiles() -> None:
    """H = ln 4 / 2: c_ent = .5. Rewards 0 .. 20: 5 % is 1, 95 % is 19; (5.5 - 1)/18 = .25; .4 * .5 + .6 * .25 = .35."""
    assert capability.quantiles([float(i) for i in range(21)], 0.05, 0.95) == pytest.approx((1.0, 19.0))
    planner = sampler(queue=tuple(map(float, range(21))), capability="combined", entropy_weight=0.4)
    found = planner.capability([record(entropy=math.log(4) / 2, reward=5.5)])
    assert found == pytest.approx(0.35)


def test_a_range_of_rewards_stands_for_the_quantiles() -> None:
    assert sampler(capability="reward", reward_range=[0.0, 2.0]).capability([record(reward=0.5)]) == 0.25
    assert sampler(capability="reward").capability([record(reward=0.5)]) is None  # nothing was pushed yet


def test_recent_entropies_are_a_range_too() -> None:
    """Of 0, .1 ... 2: 5 % and 95 % are .1 and 1.9; 1.0 stands in the middle, 1.9 at the end."""
    planner = sampler(entropy_range="recent")
    assert planner.capability([record(entropy=1.0)]) is None  # nothing was seen yet
    for i in range(21):
        planner.learn(str(i), record(entropy=i / 10), [0.5])
    assert planner.capability([record(entropy=1.0)]) == pytest.approx(0.5)
    assert planner.capability([record(entropy=1.9)]) == pytest.approx(0.0)
    assert sampler(entropy_range=[0.0, 2.0]).capability([record(entropy=0.5)]) == 0.75


def test_the_newest_record_and_a_discount() -> None:
    """c = 1 and then .5: the newest alone; with discount .5: (.5 + .5 * 1)/1.5 = 2/3."""
    records = [record(entropy=0.0), record(entropy=math.log(4) / 2)]
    assert sampler().capability(records) == pytest.approx(0.5)
    assert sampler(discount=0.5).capability(records) == pytest.approx(2 / 3)


@pytest.mark.parametrize("found", [[], [record(entropy=math.nan)]])
def test_t07_nothing_known_is_k(found: list[Record]) -> None:
    planner = sampler(k=7)
    for one in found:
        planner.learn("a", one)
    (one,) = planner.plan(["a"])
    assert (one.k, one.capability) == (7, None)


# size and temperature


def test_t07_sizes() -> None:
    """floor(2 + (1 - c) 8 + .5)."""
    levels = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
    assert [capability.size(c, 2, 10) for c in levels] == [10, 8, 6, 4, 3, 2]


@pytest.mark.parametrize("k_min, k_max", [(2, 10), (0, 3), (4, 4), (1, 64)])
def test_t07_sizes_fall_and_stay_within_bounds(k_min: int, k_max: int) -> None:
    found = [capability.size(i / 1000, k_min, k_max) for i in range(1001)]
    assert found == sorted(found, reverse=True) and all(isinstance(k, int) for k in found)
    assert (found[0], found[-1]) == (k_max, k_min)


@pytest.mark.parametrize("by, wanted", [("constant", 0.5), ("capability", 0.75), ("incapability", 1.25)])
def test_temperatures(by: str, wanted: float) -> None:
    """c = .25 between .5 and 1.5: .5 + .25 * 1; .5 + .75 * 1."""
    assert capability.temperature(0.25, 0.5, 1.5, by) == wanted
    planner = sampler(temperature_min=0.5, temperature_max=1.5, temperature_by=by)
    planner.learn("a", record(entropy=0.75 * math.log(4)))
    assert planner.plan(["a"])[0].temperature == pytest.approx(wanted)


# budget


def test_t07_the_largest_give_way_first_and_of_equals_the_first_by_key() -> None:
    """8 + 8 + 3 + 2 = 21 to 15: b 7, a 7, b 6, a 6, ... : the two eights lose three each."""
    assert capability.within_budget([8, 8, 3, 2], ["d", "c", "b", "a"], 15, 2) == [5, 5, 3, 2]
    assert capability.within_budget([8, 8, 3, 2], ["d", "c", "b", "a"], 16, 2) == [6, 5, 3, 2]  # c before d
    assert capability.within_budget([8, 8], ["a", "b"], 99, 2) == [8, 8]


@pytest.mark.parametrize("budget", [1, 5, 9, 14, 30, 100])
def test_t07_never_over_the_budget_nor_below_k_min(budget: int) -> None:
    sizes, keys = [9, 2, 7, 7, 4], ["e", "a", "d", "b", "c"]
    found = capability.within_budget(sizes, keys, budget, 2)
    assert sum(found) <= max(budget, 5 * 2) and min(found) >= 2
    assert sum(found) == min(sum(sizes), max(budget, 10))
    order = [3, 1, 0, 4, 2]  # the same prompts in another order get the same
    again = capability.within_budget([sizes[i] for i in order], [keys[i] for i in order], budget, 2)
    assert again == [found[i] for i in order]


def test_the_plan_keeps_the_budget() -> None:
    planner = sampler(budget=10, k_min=2, k_max=8, k=8)
    planner.learn("a", record(entropy=0.0))  # sure: 2 responses
    planned = planner.plan(["a", "b"])
    assert [one.k for one in planned] == [2, 8]
    assert [one.k for one in planner.plan(["c", "a", "b"])] == [4, 2, 4]


# the released code


def test_t19_scores_of_the_released_code() -> None:
    """1 + mean m e^m: .9 e^.9 = 2.214, .5 e^.5 = .824, (.6 e^.6 + .8 e^.8)/2 = 1.437, .99 e^.99 = 2.664."""
    rows = [(0.9, 0.9), (0.5, 0.5), (0.6, 0.8), (0.99, 0.99)]
    scores = [capability.drop_score(peaks(*row)) for row in rows]
    assert scores == pytest.approx([3.214, 1.824, 2.437, 3.664], abs=5e-4)
    assert capability.dropped(scores, 0.3) == {0, 3}  # A and D go, B and C stay


@pytest.mark.parametrize("m, wanted", [(0.25, 1.321), (0.5, 1.824), (0.9, 3.214), (1.0, 3.718)])
def test_t19_the_score_rises(m: float, wanted: float) -> None:
    assert capability.drop_score(peaks(m)) == pytest.approx(wanted, abs=5e-4)


def test_t19_steps_after_the_end_count_too() -> None:
    """2 tokens at .5 and 8 pads at .99: 1 + (2 * .8244 + 8 * 2.6643)/10 = 3.296, above .6 for ten tokens, 2.093."""
    assert capability.drop_score(peaks(*[0.5] * 2, *[0.99] * 8)) == pytest.approx(3.296, abs=5e-4)
    assert capability.drop_score(peaks(*[0.6] * 10)) == pytest.approx(2.093, abs=5e-4)
    assert capability.confidence(peaks(0.5, 0.5)) == pytest.approx(0.653, abs=5e-4)  # of the response's own tokens


DROPPED = {1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2, 8: 3, 10: 3, 12: 4, 16: 5, 20: 6, 32: 10, 64: 20}


@pytest.mark.parametrize("batch, wanted", DROPPED.items())
def test_t19_how_many_go(batch: int, wanted: int) -> None:
    """ceil(.3 B)."""
    assert len(capability.dropped([float(i % 7) for i in range(batch)], 0.3)) == wanted


def test_of_equal_scores_the_first_goes() -> None:
    assert capability.dropped([1.0, 2.0, 2.0, 2.0], 0.3) == {1, 2}


def test_the_default_tells_the_prompts_of_a_trained_model_apart() -> None:
    """Of 49,152 tokens ln V is 10.8, and a good model's entropies lie between 0.5 and 2."""
    sizes = []
    for given in ("full", tiny.settings("rl", "algo=esrl").sampler.entropy_range):
        planner = sampler(choices=49_152, entropy_range=given)
        for i in range(16):
            planner.learn(str(i), record(entropy=0.5 + 0.1 * i))
        sizes.append([planner.plan([str(i)])[0].k for i in range(16)])
    assert sizes[0] == [2] * 5 + [3] * 11
    assert sizes[1] == sorted(sizes[1]) and {*sizes[1]} == set(range(2, 9))
