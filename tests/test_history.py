"""What is known of each prompt, and the plans that follow from it: the same after a resume and on every rank."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from pipeline.rollout.allocation import Allocation, Sampler, prompt_key
from tests.test_capability import record, sampler


def test_t08_the_newest_records_are_kept() -> None:
    planner = sampler(history=4)
    for reward in range(1, 7):
        planner.learn("a", record(reward=reward))
    assert [one.reward for one in planner.records("a")] == [3, 4, 5, 6]
    assert planner.records("b") == []


def test_t08_a_key_is_made_of_the_ids_alone() -> None:
    """The first 16 digits of sha256("1,23") by sha256sum; 12,3 is another prompt."""
    assert prompt_key([1, 23]) == prompt_key((1, 23)) == "dec1a325b2aab707"
    assert len({prompt_key(ids) for ids in ([1, 23], [12, 3], [1, 2, 3], [])}) == 4


def filled(**changes: Any) -> Sampler:
    """A sampler that has seen three prompts, one of them twice, and left one out."""
    planner = sampler(queue=(0.1, 1 / 3, 0.7), **changes)
    for key, share in (("a", 0.1), ("b", 0.5), ("c", 0.9), ("b", 0.3)):
        planner.learn(key, record(entropy=share * math.log(4), reward=share / 3))
    planner.learn("c", None)
    return planner


HOT = {"temperature_min": 0.5, "temperature_max": 1.5, "temperature_by": "incapability"}


@pytest.mark.parametrize("changes", [HOT, {**HOT, "capability": "combined"}, {"discount": 0.5, "budget": 12}])
def test_t08_a_resume_plans_the_same(changes: dict[str, Any]) -> None:
    planner, keys = filled(**changes), ["c", "a", "new", "b"]
    saved = json.loads(json.dumps(planner.state_dict()))
    other = sampler(queue=(9.0,), **changes)  # what it held before is forgotten
    other.learn("z", record())
    other.load_state_dict(saved)
    assert other.plan(keys) == planner.plan(keys)
    assert other.state_dict() == planner.state_dict() and other.records("z") == []


def test_t08_the_plan_does_not_depend_on_the_order() -> None:
    """Nor, therefore, on which rank holds which prompt."""
    planner, keys = filled(budget=14), ["c", "a", "new", "b"]
    by_key = dict(zip(keys, planner.plan(keys), strict=True))
    for order in (["a", "b", "c", "new"], ["new", "c", "b", "a"]):
        assert planner.plan(order) == [by_key[key] for key in order]


# prompts that are left out


def test_skipped_and_asked_again() -> None:
    """c = .95 is over .9: three times left out, and asked at the fourth; k is max(1, floor(.05 * 8 + .5)) = 1."""
    planner = sampler(k_min=0, k_max=8, skip_above=0.9, recheck=4)
    seen = []
    planner.learn("a", record(entropy=0.05 * math.log(4)))
    for _ in range(8):
        (share,) = planner.plan(["a"])
        seen.append(share.k)
        if share.k:
            planner.learn("a", record(entropy=0.05 * math.log(4)))
        else:
            planner.learn("a", None)
    assert seen == [0, 0, 0, 1, 0, 0, 0, 1]


def test_recheck_of_one_never_leaves_out() -> None:
    planner = sampler(k_min=0, k_max=8, skip_above=0.9, recheck=1)
    planner.learn("a", record(entropy=0.0))
    assert [share.k for share in planner.plan(["a"])] == [1]


def test_all_are_left_out() -> None:
    planner = sampler(k_min=0, k_max=8, skip_above=0.5)
    for key in "ab":
        planner.learn(key, record(entropy=0.0))
    assert [share.k for share in planner.plan(["a", "b"])] == [0, 0]
    assert planner.plan([]) == []


# probes


def test_probes_are_for_prompts_of_which_nothing_is_known() -> None:
    planner = sampler(probe=2)
    planner.learn("a", record())
    assert planner.probes(["a", "b"]) == [False, True]
    assert sampler().probes(["b"]) == [False]


def test_after_a_probe() -> None:
    """c = .5: floor(2 + .5 * 6 + .5) = 5; c = 1 would be 2, but the three probes are there; (5 + 3 + 3)/3 is under 4.

    As hot as the probes were.
    """
    planner = sampler(probe=3, **HOT)
    half, none = record(entropy=0.5 * math.log(4)), record(entropy=0.0)
    assert planner.after_probe([half, none, none]) == Allocation(4, 0.5, pytest.approx(2.5 / 3), (5, 3, 3))
    assert planner.after_probe([none] * 3) == Allocation(3, 0.5, 1.0, (3, 3, 3))


# modes


@pytest.mark.parametrize("mode, wanted", [("static", 5), ("drop", 1), ("drop_fixed", 1)])
def test_other_modes_ask_the_same_of_all(mode: str, wanted: int) -> None:
    planner = sampler(mode=mode, k=5)
    planner.learn("a", record(entropy=0.0))
    assert [share.k for share in planner.plan(["a", "b"])] == [wanted, wanted]


@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({"k_min": 9}, "k_min is 9, wanted at most k_max, 8"),
        ({"temperature_min": 2.0}, "temperature_min is 2.0"),
        ({"reward_range": [1.0, 1.0]}, "reward_range is"),
        ({"k_min": 0}, "k_min is 0 and skip_above is None, wanted both or neither"),
        ({"skip_above": 0.9}, "k_min is 2 and skip_above is 0.9"),
        ({"probe": 2, "capability": "reward"}, "probe is 2 with capability reward"),
        ({"k": 9}, r"k is 9, wanted a number from 2 \(k_min\) to 8"),
        ({"k": 1}, "k is 1, wanted a number from 2"),
        ({"probe": 9}, "probe is 9, wanted 2 to k_max, 8"),
        ({"probe": 1}, "probe is 1, wanted 2 to k_max, 8"),
        ({"probe": 2, "budget": 9}, "probe is 2 and budget is 9, wanted one of them null"),
        ({"mode": "static", "budget": 9}, "budget is 9 with mode static"),
        ({"mode": "drop", "probe": 2}, "probe is 2 with mode drop"),
    ],
)
def test_t18_settings_that_do_not_go_together(changes: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        sampler(**changes)
