"""What is logged of a step's prompts and their responses, by hand."""

from __future__ import annotations

import torch

from pipeline.algorithms.online import GroupStats
from pipeline.records import Example, Response, SampleStats
from pipeline.rollout import groups
from pipeline.rollout.allocation import Allocation
from pipeline.rollout.groups import Group
from tests import tiny


def group(rewards: list[float], length: int, entropy: float = 0.5, capability: float | None = None) -> Group:
    """A prompt with a response of `length` tokens for each reward; the advantage is the reward less 1."""
    example, ids = Example("a", "Why?"), tuple(range(length))
    stats = SampleStats(torch.zeros(length), entropy, 1.0, 1.0, 0)
    responses = tuple(Response(example, "Why?", "So.", (1,), ids, True, stats) for _ in rewards)
    values = torch.tensor(rewards, dtype=torch.float64)
    worth = GroupStats(values, torch.zeros_like(values), torch.full_like(values, length)) if rewards else None
    allocation = Allocation(len(rewards), 1.0, capability)
    return Group(example, (1,), "key", allocation, responses, tuple(rewards), worth, tuple(r - 1.0 for r in rewards))


def means(found: dict) -> dict[str, float | None]:
    return {name: float(stat.sums[1] / stat.sums[0]) if stat.sums[0] else None for name, stat in found.items()}


STEP = [
    group([1.0, 1.0, 2.0, 3.0], 10, capability=0.5),
    group([2.0, 2.0], 5),
    group([4.0], 5),
    group([], 0, capability=1.0),
]


def test_statistics_by_hand() -> None:
    settings = tiny.settings("rl", "algo=esrl", "sampler.k_min=1", "sampler.k_max=4", "sampler.k=4")
    found = means(groups.statistics(STEP, settings.sampler, queue_mean=None, generated=60))
    # taken 4 * 10 + 2 * 5 + 1 * 5 = 55 of 4 * (10 + 5 + 5) = 80; one of the two prompts with several responses is equal
    assert found["esrl/tokens_saved"] == 1 - 55 / 80 and found["rollout/equal_groups"] == 0.5
    assert found["esrl/at_k_min"] == 1 / 3 and found["esrl/left_out"] == 0.25 and found["esrl/known"] == 0.5
    assert found["esrl/samples_per_prompt"] == 7 / 4 and found["esrl/capability"] == 0.75
    assert found["advantage/mean"] == 8 / 7  # 15 - 7 of seven responses
    assert found["rollout/generated_tokens"] == 60 and found["rollout/queue_mean"] is None


def test_where_all_prompts_get_as_many_nothing_is_shared_out() -> None:
    settings = tiny.settings("rl", "algo=reinforce", "sampler.k=1")
    found = means(groups.statistics([group([1.0], 3), group([1.0], 4)], settings.sampler, queue_mean=0.25, generated=7))
    alone = ("esrl/tokens_saved", "esrl/at_k_min", "rollout/equal_groups")  # one response equals no other
    assert [found[name] for name in alone] == [None] * 3 and found["rollout/queue_mean"] == 0.25


def test_a_table_keeps_the_responses_of_a_prompt_together() -> None:
    rows = groups.table(STEP, 2)
    assert [(row["kind"], row["reward"], row["advantage"], row["k"]) for row in rows] == [
        ("rollout", 1.0, 0.0, 4),
        ("rollout", 1.0, 0.0, 4),
        ("rollout", 2.0, 1.0, 4),
        ("rollout", 3.0, 2.0, 4),
        ("rollout", 2.0, 1.0, 2),
        ("rollout", 2.0, 1.0, 2),
    ]
    assert rows[0]["capability"] == 0.5 and rows[4]["capability"] is None and rows[4]["tokens"] == 5
