"""Groups: the prompts of one step with the responses sampled for each, and what loss and log read of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.algorithms import online
from pipeline.algorithms.functional import EQUAL_REWARDS
from pipeline.algorithms.online import GroupStats
from pipeline.algorithms.stats import mean_stat
from pipeline.config.sampler import SamplerSettings
from pipeline.records import Example, Item, Response, Row, Stat
from pipeline.rollout.allocation import Allocation, Record


@dataclass(frozen=True)
class Group:
    """One prompt of a step. It has no responses where it was left out."""

    example: Example
    prompt_ids: tuple[int, ...]
    key: str  # the prompt's name in the history
    allocation: Allocation
    responses: tuple[Response, ...] = ()
    raw: tuple[float, ...] = ()  # the reward of each, before it is shaped
    stats: GroupStats | None = None  # where there are responses
    advantages: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()  # of each response in the mean

    @property
    def rows(self) -> list[Row]:
        """What the model reads, one row per response."""
        return [Row(self.prompt_ids, response.response_ids) for response in self.responses]


def valued(
    groups: Sequence[Group], ref_logps: Sequence[Tensor], queue_mean: float | None, settings: Any
) -> list[Group]:
    """The groups with rewards shaped, compared and weighed.

    ref_logps: (T,) for each response of all groups in order, or nothing where no KL term wants them. settings: those of
    algorithms/online.py.
    """
    refs = iter(ref_logps) if ref_logps else None
    kept = [group for group in groups if group.responses]
    stats = [_stats(group, refs, settings) for group in kept]
    advantages, weights = online.advantages(stats, queue_mean, settings), online.shares(stats, settings.mean_over)
    scored = iter(
        replace(group, stats=one, advantages=tuple(each.tolist()), weights=tuple(shares.tolist()))
        for group, one, each, shares in zip(kept, stats, advantages, weights, strict=True)
    )
    return [next(scored) if group.responses else group for group in groups]


def _stats(group: Group, refs: Iterator[Tensor] | None, settings: Any) -> GroupStats:
    logps = [response.stats.logps.double() for response in group.responses]
    lengths = torch.tensor([float(len(one)) for one in logps], dtype=torch.float64)
    finished = torch.tensor([response.finished for response in group.responses])
    kl = torch.zeros_like(lengths)
    if refs is not None:
        kl = torch.stack([(one - next(refs).double()).sum() for one in logps])  # k1
    rewards = online.shaped(torch.tensor(group.raw, dtype=torch.float64), lengths, finished, kl, settings)
    return GroupStats(rewards, torch.stack([one.sum() for one in logps]), lengths, group.allocation.probed)


def items_of(groups: Sequence[Group], ref_logps: Sequence[Tensor]) -> list[Item]:
    """One item per response, in order, with the numbers that the loss reads."""
    refs, items = iter(ref_logps), []
    for group in groups:
        for j, (response, row) in enumerate(zip(group.responses, group.rows, strict=True)):
            numbers = {
                "advantage": group.advantages[j],
                "share": group.weights[j],
                "reward": group.raw[j],
                "behaviour": float(group.stats.logps[j]),
                "temperature": group.allocation.temperature,
                "leads": float(j == 0),
                "target": 0.0,
            }
            example = replace(group.example, completion=response.text)
            items.append(Item(example, (row,), numbers, (next(refs),) if ref_logps else ()))
    return items


def target_item(example: Example, row: Row, with_reference: bool, target: bool = True) -> Item:
    """A reference text that is learned by likelihood; or, if it is no `target`, a row that nothing is learned from."""
    numbers = dict.fromkeys(("advantage", "share", "reward", "behaviour", "leads"), 0.0)
    refs = (torch.zeros(len(row.response_ids)),) if with_reference else ()
    return Item(example, (row,), {**numbers, "temperature": 1.0, "target": float(target)}, refs)


def untempered(items: Sequence[Item]) -> list[Item]:
    """The items without the number `temperature`, by which logits would be divided: where every one is 1."""
    return [
        replace(item, numbers={name: x for name, x in item.numbers.items() if name != "temperature"}) for item in items
    ]


def record_of(group: Group) -> Record:
    """What the history keeps of a group that has responses; the reward is 0 before these are judged."""
    stats = [response.stats for response in group.responses]
    lengths = [len(response.response_ids) for response in group.responses]
    return Record(
        reward=float(group.stats.rewards.mean()) if group.stats is not None else 0.0,
        entropy=sum(one.entropy * n for one, n in zip(stats, lengths, strict=True)) / sum(lengths),
        confidence=sum(one.confidence for one in stats) / len(stats),
    )


def records_of_others(group: Group) -> list[Record]:
    """For each response what the history would keep of the others; there are at least two."""
    found = group.responses
    return [record_of(replace(group, responses=(*found[:j], *found[j + 1 :]))) for j in range(len(found))]


def statistics(
    groups: Sequence[Group], sampler: SamplerSettings, queue_mean: float | None, generated: int
) -> dict[str, Stat]:
    """rollout/* of every kind of sampling, esrl/* of how it was shared out; the same on every rank.

    generated: tokens sampled in the step, dropped ones included. equal_groups: of the prompts with two responses
    or more. tokens_saved: the share of the tokens that as many responses as possible to every prompt would have taken,
    by the mean length of the prompt's own; like at_k_min nothing where all prompts get as many responses.
    """
    kept = [group for group in groups if group.responses]
    varies = sampler.most > sampler.fewest
    known = [group.allocation.capability for group in groups if group.allocation.capability is not None]
    full = sampler.most * sum(float(group.stats.lengths.mean()) for group in kept)
    taken = sum(float(group.stats.lengths.sum()) for group in kept)
    spreads = [float(group.stats.rewards.max() - group.stats.rewards.min()) for group in kept if len(group.raw) > 1]
    entropies = [one.stats.entropy for group in kept for one in group.responses]
    lengths = [len(one.response_ids) for group in kept for one in group.responses]
    numbers = {
        # where k varies, not the mean over responses
        "rollout/reward_per_prompt": [sum(group.raw) / len(group.raw) for group in kept],
        "rollout/generated_tokens": [generated],
        "rollout/equal_groups": [float(spread <= EQUAL_REWARDS) for spread in spreads],
        "rollout/queue_mean": [] if queue_mean is None else [queue_mean],
        "advantage/mean": [advantage for group in kept for advantage in group.advantages],
        "esrl/capability": known,
        "esrl/known": [float(group.allocation.capability is not None) for group in groups],
        "esrl/samples_per_prompt": [float(len(group.responses)) for group in groups],
        "esrl/at_k_min": [float(len(group.responses) == sampler.fewest) for group in kept] if varies else [],
        "esrl/left_out": [float(not group.responses) for group in groups],
        "esrl/tokens_saved": [1.0 - taken / full] if full and varies else [],
    }
    per_token = torch.tensor(entropies, dtype=torch.float64).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    numbers = {name: torch.tensor(values, dtype=torch.float64) for name, values in numbers.items()}
    return {name: mean_stat(values) for name, values in {**numbers, "entropy": per_token}.items()}


def table(groups: Sequence[Group], count: int) -> list[dict[str, Any]]:
    """The responses to the first `count` prompts, those of a prompt together, as rows of a sample table."""
    return [
        {
            "kind": "rollout",
            "prompt": response.prompt_text,
            "response": response.text,
            "reward": group.raw[j],
            "advantage": group.advantages[j],
            "k": len(group.responses),
            "capability": group.allocation.capability,
            "temperature": group.allocation.temperature,
            "tokens": len(response.response_ids),
        }
        for group in groups[:count]
        for j, response in enumerate(group.responses)
    ]
