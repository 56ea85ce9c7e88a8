"""Lots: the prompts of one step with the responses sampled for each; what they become for the loss and for the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.algorithms import online
from pipeline.algorithms.functional import EQUAL_REWARDS, mean_stat
from pipeline.algorithms.online import Told
from pipeline.records import Example, Item, Response, Row, Stat
from pipeline.rollout.allocation import Record, Share


@dataclass(frozen=True)
class Lot:
    """One prompt of a step. It has no responses where it was left out."""

    example: Example
    prompt_ids: tuple[int, ...]
    key: str  # the prompt's name in the history
    share: Share
    responses: tuple[Response, ...] = ()
    raw: tuple[float, ...] = ()  # what the rewards say of each
    told: Told | None = None  # what they are worth, where there are any
    advantages: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()  # the weight of each response in the mean

    @property
    def rows(self) -> list[Row]:
        """What the model reads, one row per response."""
        return [Row(self.prompt_ids, response.response_ids) for response in self.responses]


def valued(lots: Sequence[Lot], ref_logps: Sequence[Tensor], queue_mean: float | None, settings: Any) -> list[Lot]:
    """The lots with rewards shaped, compared and weighed.

    ref_logps: (T,) for each response of all lots in order, or nothing where no KL term wants them. settings: those of
    algorithms/online.py.
    """
    refs = iter(ref_logps)
    told = [_told(lot, refs if ref_logps else None, settings) if lot.responses else None for lot in lots]
    there = [one for one in told if one is not None]
    advantages = iter(online.advantages(there, queue_mean, settings))
    weights = iter(online.shares(there, settings.mean_over))
    return [
        replace(lot, told=one, advantages=tuple(next(advantages).tolist()), shares=tuple(next(weights).tolist()))
        if one is not None
        else lot
        for lot, one in zip(lots, told, strict=True)
    ]


def _told(lot: Lot, refs: Any, settings: Any) -> Told:
    seen = [response.seen.logps.double() for response in lot.responses]
    lengths = torch.tensor([float(len(logps)) for logps in seen], dtype=torch.float64)
    finished = torch.tensor([response.finished for response in lot.responses])
    kl = torch.zeros_like(lengths)
    if refs is not None:
        kl = torch.stack([online.divergence(logps, next(refs).double(), settings.kl_form) for logps in seen])
    rewards = online.shaped(torch.tensor(lot.raw, dtype=torch.float64), lengths, finished, kl, settings)
    return Told(rewards, torch.stack([logps.sum() for logps in seen]), lengths)


def items_of(lots: Sequence[Lot], ref_logps: Sequence[Tensor]) -> list[Item]:
    """One item per response, in order, with the numbers that the loss reads."""
    refs, items = iter(ref_logps), []
    for lot in lots:
        for j, (response, row) in enumerate(zip(lot.responses, lot.rows, strict=True)):
            numbers = {
                "advantage": lot.advantages[j],
                "share": lot.shares[j],
                "reward": lot.raw[j],
                "behaviour": float(lot.told.logps[j]),
                "temperature": lot.share.temperature,
                "leads": float(j == 0),
                "target": 0.0,
            }
            example = replace(lot.example, completion=response.text)
            items.append(Item(example, (row,), numbers, (next(refs),) if ref_logps else ()))
    return items


SILENT = {"advantage": 0.0, "share": 0.0, "reward": 0.0, "behaviour": 0.0, "temperature": 1.0, "leads": 0.0}


def target_item(example: Example, row: Row, with_reference: bool, target: bool = True) -> Item:
    """A reference that is learned by likelihood; or, where it is no `target`, a row that nothing is learned from."""
    refs = (torch.zeros(len(row.response_ids)),) if with_reference else ()
    return Item(example, (row,), {**SILENT, "target": float(target)}, refs)


def untempered(items: Sequence[Item]) -> list[Item]:
    """The items without the number `temperature`, by which logits would be divided: where every one is 1."""
    bare = [{name: x for name, x in item.numbers.items() if name != "temperature"} for item in items]
    return [replace(item, numbers=numbers) for item, numbers in zip(items, bare, strict=True)]


def record_of(lot: Lot, step: int) -> Record:
    """What the history keeps of a lot that has responses."""
    seen = [response.seen for response in lot.responses]
    lengths = [len(response.response_ids) for response in lot.responses]
    tokens, k = sum(lengths), len(seen)
    return Record(
        step=step,
        k=k,
        temperature=lot.share.temperature,
        reward=float(lot.told.rewards.mean()) if lot.told is not None else 0.0,
        reward_std=float(lot.told.rewards.std(unbiased=False)) if lot.told is not None else 0.0,
        entropy=sum(look.entropy * n for look, n in zip(seen, lengths, strict=True)) / tokens,
        confidence=sum(look.confidence for look in seen) / k,
        logp=sum(float(look.logps.double().sum()) for look in seen) / k,
        length=tokens / k,
        finished=sum(response.finished for response in lot.responses) / k,
    )


def statistics(
    lots: Sequence[Lot], k_max: int, least: int, queue_mean: float | None, generated: int
) -> dict[str, Stat]:
    """rollout/* of every kind of sampling, esrl/* of how it was shared out; the same on every rank.

    generated: tokens sampled in the step, those thrown away included. equal_groups: of the prompts with two responses
    or more. tokens_saved: the share of the tokens that k_max responses to every prompt would have taken, by the mean
    length of the prompt's own; like at_k_min nothing where all prompts get as many responses.
    """
    there = [lot for lot in lots if lot.responses]
    shared_out = k_max > least
    known = [lot.share.capability for lot in lots if lot.share.capability is not None]
    lengths = [float(lot.told.lengths.mean()) for lot in there]
    full = k_max * sum(lengths)
    taken = sum(float(lot.told.lengths.sum()) for lot in there)
    spreads = [float(lot.told.rewards.max() - lot.told.rewards.min()) for lot in there if len(lot.responses) > 1]
    entropies = [sum(one.seen.entropy for one in lot.responses) / len(lot.responses) for lot in there]
    numbers = {
        "reward/per_prompt": [sum(lot.raw) / len(lot.raw) for lot in there],  # where k varies, unlike reward/mean
        "rollout/generated_tokens": [generated],
        "rollout/equal_groups": [float(spread <= EQUAL_REWARDS) for spread in spreads],
        "rollout/queue_mean": [] if queue_mean is None else [queue_mean],
        "advantage/mean": [advantage for lot in there for advantage in lot.advantages],
        "objective/entropy": entropies,
        "esrl/capability": known,
        "esrl/known": [float(lot.share.capability is not None) for lot in lots],
        "esrl/samples_per_prompt": [float(len(lot.responses)) for lot in lots],
        "esrl/at_k_min": [float(len(lot.responses) == least) for lot in there] if shared_out else [],
        "esrl/left_out": [float(not lot.responses) for lot in lots],
        "esrl/tokens_saved": [1.0 - taken / full] if full and shared_out else [],
    }
    return {name: mean_stat(torch.tensor(values, dtype=torch.float64)) for name, values in numbers.items()}


def table(lots: Sequence[Lot], count: int) -> list[dict[str, Any]]:
    """The responses to the first `count` prompts, those of a prompt together, as rows of a sample table."""
    return [
        {
            "kind": "rollout",
            "prompt": response.prompt_text,
            "response": response.text,
            "reward": lot.raw[j],
            "advantage": lot.advantages[j],
            "k": len(lot.responses),
            "capability": lot.share.capability,
            "temperature": lot.share.temperature,
            "tokens": len(response.response_ids),
        }
        for lot in lots[:count]
        for j, response in enumerate(lot.responses)
    ]
