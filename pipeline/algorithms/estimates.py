"""How much more reward a policy earns than its reference, from held-out logged responses alone: nothing is sampled.

The rows (x, y, r) are taken to follow the reference, which was fitted to such rows. With lr = ln pi(y|x) - ln ref(y|x)
of the whole response, rho = exp(lr) and A = r - V(x), V the reward to expect of the prompt:

    snips    sum rho r / sum rho - mean r      self-normalised importance sampling (Swaminathan and Joachims 2015)
    dr       sum rho A / sum rho - mean A      the same, V as control variate (Dudik et al. 2011)
    clipped  dr with lr - mean lr held to [-CLIP, CLIP], so that no row outweighs the others (Ionides 2008)
    slope    covariance of A and lr            first order in lr: what a small step in this direction gains
    pairs    mean over pairs of rows of (A_i - A_j) tanh((lr_i - lr_j) / 2): what is gained by choosing one of two
             responses of the reference by its ratio

All are 0 where pi = ref, and where every row became less likely by the same factor: forgetting is no gain. The weighted
loss of training is no such estimate: A+ clip(rho) nll falls when rows are merely forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CLIP = 3.0  # nats
LEVEL = 0.9  # of the intervals
DRAWS = 500  # of the bootstrap


class HeldOut(NamedTuple):
    """Logged responses that the policy did not learn from, (n,) each."""

    log_ratio: Tensor  # float64, ln(policy / reference) of the whole response
    reward: Tensor  # float64
    value: Tensor  # float64, the reward to expect of the prompt
    prompt: Tensor  # int64 in [0, prompts): which rows have one prompt


class Gain(NamedTuple):
    """How much more reward a policy earns than the reference; `low` and `high` hold the truth LEVEL of the time."""

    value: float
    low: float
    high: float
    ess: float  # effective sample size of the weights, in rows


def ess(weights: Tensor) -> float:
    """(sum w)^2 / sum w^2, in [1, n]: how many rows carry the weight."""
    return float(weights.sum() ** 2 / weights.square().sum())


def snips(rows: HeldOut, times: Tensor) -> Tensor:
    """(D,) of each of D draws in which row i stands times[d, i] times; so are the others."""
    return _shift(_ratios(rows.log_ratio), rows.reward, times)


def dr(rows: HeldOut, times: Tensor) -> Tensor:
    return _shift(_ratios(rows.log_ratio), rows.reward - rows.value, times)


def clipped(rows: HeldOut, times: Tensor) -> Tensor:
    return _shift(clipped_ratios(rows.log_ratio), rows.reward - rows.value, times)


def slope(rows: HeldOut, times: Tensor) -> Tensor:
    share = times / times.sum(1, keepdim=True)
    advantage = rows.reward - rows.value
    return share @ (advantage * rows.log_ratio) - (share @ advantage) * (share @ rows.log_ratio)


def pairs(rows: HeldOut, times: Tensor) -> Tensor:
    advantage, lr = rows.reward - rows.value, rows.log_ratio
    gains = (advantage[:, None] - advantage) * torch.tanh((lr[:, None] - lr) / 2)  # (n, n)
    compared = times.sum(1) ** 2 - times.square().sum(1)  # without a row beside itself, whose gain is 0
    return torch.einsum("di,ij,dj->d", times, gains, times) / compared


ESTIMATES: dict[str, Callable[[HeldOut, Tensor], Tensor]] = {
    "snips": snips,
    "dr": dr,
    "clipped": clipped,
    "slope": slope,
    "pairs": pairs,
}


def gain(rows: HeldOut, by: str = "clipped", seed: int = 0) -> Gain:
    """The estimate called `by`, with the middle LEVEL of a bootstrap over prompts as interval."""
    once = torch.ones(1, len(rows.reward), dtype=torch.float64)
    drawn = ESTIMATES[by](rows, resampled(rows.prompt, seed))
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(drawn, ends).tolist()
    return Gain(float(ESTIMATES[by](rows, once)), low, high, ess(clipped_ratios(rows.log_ratio)))


def resampled(prompt: Tensor, seed: int) -> Tensor:
    """(DRAWS, n) float64: how often each row stands in draws of as many prompts as there are, with replacement."""
    count = int(prompt.max()) + 1
    drawn = torch.randint(count, (DRAWS, count), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(DRAWS, count, dtype=torch.float64)
    return times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))[:, prompt]


def clipped_ratios(log_ratio: Tensor) -> Tensor:
    """(n,) exp(lr - mean lr), held to exp(-CLIP) .. exp(CLIP)."""
    return torch.exp((log_ratio - log_ratio.mean()).clamp(-CLIP, CLIP))


def _ratios(log_ratio: Tensor) -> Tensor:
    return torch.exp(log_ratio - log_ratio.max())  # scaled: only shares count


def _shift(weights: Tensor, numbers: Tensor, times: Tensor) -> Tensor:
    """(D,) the weighted mean of `numbers` less their plain mean."""
    weighted = times * weights
    return (weighted @ numbers) / weighted.sum(1) - (times @ numbers) / times.sum(1)
