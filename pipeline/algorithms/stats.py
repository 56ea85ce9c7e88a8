"""Statistics that the algorithms log, as sums that add over micro-batches and ranks.

Nothing here carries a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.algorithms.functional import item_numbers, k3, sequence_logp, token_log_ratios
from pipeline.records import Batch, Stat

LOGGED_NUMBERS = {  # tags of mean and standard deviation; `reward` is what TRL calls that of the policy's own responses
    "reward": ("logged/reward", "logged/reward_std"),
    "value": ("value/mean", "value/std"),
    "advantage": ("advantage/mean", "advantage/std"),
}


@torch.no_grad()
def logged_stats(logp: Tensor, batch: Batch, per_sequence: Tensor) -> dict[str, Stat]:
    """What is logged of logged responses, whatever is learned from them; logp (B, T), per_sequence (B,) their losses.

    logps/* are nats per response; logged/kl is k3 per response: KL(reference, policy).
    """
    rows = batch.sequence_mask
    stats = {
        "loss": mean_stat(per_sequence, rows),
        "logps/policy": mean_stat(sequence_logp(logp, batch.response_mask), rows),
    }
    for name, (mean, std) in LOGGED_NUMBERS.items():
        if name in batch.numbers:
            values = item_numbers(batch, name, like=logp)
            stats |= {mean: mean_stat(values, rows), std: std_stat(values, rows)}
    if batch.ref_logp is not None:
        stats["logged/kl"] = mean_stat(k3(token_log_ratios(logp, batch)).sum(1), rows)
        stats["logps/ref"] = mean_stat(sequence_logp(batch.ref_logp, batch.response_mask), rows)
    return stats


@torch.no_grad()
def lowered_stats(logp: Tensor, batch: Batch, lowered: Tensor) -> dict[str, Stat]:
    """logps/lowered, nats per response, of the rows that are to become less likely, lowered (B,) bool; beside it the
    reference's."""
    counted = lowered & batch.sequence_mask
    stats = {"logps/lowered": mean_stat(sequence_logp(logp, batch.response_mask), counted)}
    if batch.ref_logp is not None:
        stats["logps/ref_lowered"] = mean_stat(sequence_logp(batch.ref_logp, batch.response_mask), counted)
    return stats


@torch.no_grad()
def side_stats(
    implicit: Tensor,
    logp: Tensor,
    batch: Batch,
    sides: Callable[[Tensor], tuple[Tensor, Tensor]],
    counted: tuple[Tensor, Tensor],
) -> dict[str, Stat]:
    """Of chosen and of rejected responses: rewards/*, the implicit rewards beta * ln(pi / pi_ref), implicit (B,); and
    logps/*, nats per response, beside the reference's.

    `sides` makes of numbers of the rows (B,) those of the chosen and those of the rejected ones; `counted` says which
    of either count. Where logps/chosen falls too, the policy moves away from both, to what nobody has seen.
    """
    of_rows = {
        "rewards/": implicit,
        "logps/": sequence_logp(logp, batch.response_mask),
        "logps/ref_": sequence_logp(batch.ref_logp, batch.response_mask),
    }
    return {
        f"{prefix}{side}": mean_stat(numbers, rows)
        for prefix, values in of_rows.items()
        for side, numbers, rows in zip(("chosen", "rejected"), sides(values), counted, strict=True)
    }


def right(better: Tensor, worse: Tensor | float) -> Tensor:
    """float64: 1 where `better` is the larger of the two, else 0; a tie, as at the start, is half right."""
    return (better > worse).double() + 0.5 * (better == worse).double()


def mean_stat(values: Tensor, mask: Tensor | None = None) -> Stat:
    """The mean of `values` (any shape) where `mask` is True, as an additive record."""
    return Stat("mean", _moments(values, mask))


def std_stat(values: Tensor, mask: Tensor | None = None) -> Stat:
    """The population standard deviation of `values` where `mask` is True, as an additive record."""
    return Stat("std", _moments(values, mask))


def ess_stat(weights: Tensor, mask: Tensor | None = None) -> Stat:
    """The effective sample share (sum w)^2 / (n sum w^2) of `weights` where `mask` is True, as an additive record."""
    return Stat("ess", _moments(weights, mask))


def _moments(values: Tensor, mask: Tensor | None) -> Tensor:
    """(3,) float64 without gradient: count, sum and sum of squares."""
    x = values.detach().double()
    counted = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand_as(x)
    x = torch.where(counted, x, 0.0)
    return torch.stack([counted.sum().double(), x.sum(), x.square().sum()])


def merge(a: Stat, b: Stat) -> Stat:
    """The statistic of both samples together."""
    assert a.kind == b.kind, f"a {a.kind} cannot be merged with a {b.kind}"
    return Stat(a.kind, a.sums + b.sums)


def reduce(stat: Stat) -> float:
    """The statistic's value; NaN where nothing was counted, and for the effective share of weights that are all 0."""
    n, total, squares = stat.sums.tolist()
    if n == 0:
        return math.nan
    if stat.kind == "mean":
        return total / n
    if stat.kind == "std":
        return math.sqrt(max(squares / n - (total / n) ** 2, 0.0))
    assert stat.kind == "ess", f"unknown kind of statistic: {stat.kind}"
    return total**2 / (n * squares) if squares > 0 else math.nan
