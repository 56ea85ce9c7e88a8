"""How sure the policy is of a prompt, and how many responses the prompt gets: more where it is unsure.

    c in [0, 1], 1: it can do no better
    entropy       c = 1 - (mean over tokens of H_t - low) / (high - low), from 0 to ln V unless set otherwise
    reward        c = (mean reward - low) / (high - low), limited to [0, 1]
    combined      c = w * entropy + (1 - w) * reward
    confidence    c = 1 + mean over tokens of m_t ln m_t, m_t the largest probability; falls before it rises
    k = floor(k_min + (1 - c) (k_max - k_min) + 1/2), limited to [k_min, k_max]
    temperature = low + g (high - low), g = c or 1 - c, or 0 for a constant one

That sampling follows the policy's capability is the idea of Wang et al., "ESRL: Efficient Sampling-based Reinforcement
Learning for Sequence Generation" (AAAI 2024, arXiv 2308.02223). The formulas here are this project's own.

The released code does something else, which `drop_score` and `dropped` reproduce for comparison: every prompt gets one
response, and then the surest ones are dropped, when their cost is already paid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def entropy_capability(entropy: float, low: float, high: float) -> float:
    """From 1 for a policy that is sure, at `low` mean nats per token or less, to 0 at `high` or more."""
    return 1.0 - place_between(entropy, low, high)


def place_between(value: float, low: float, high: float) -> float:
    """Where `value` stands between `low` and `high`, in [0, 1]; 0.5 where these are the same; NaN stays NaN."""
    share = (value - low) / (high - low) if high > low else 0.5
    return share if math.isnan(share) else min(1.0, max(0.0, share))


def confidence(peaks: Tensor) -> float:
    """1 + mean of m ln m, in [1 - 1/e, 1], m (T,) the largest probability at each token; 1 without any token."""
    return 1.0 - float(torch.special.entr(peaks.double()).mean()) if len(peaks) else 1.0


def size(capability: float, k_min: int, k_max: int) -> int:
    """How many responses."""
    return min(k_max, max(k_min, math.floor(k_min + (1.0 - capability) * (k_max - k_min) + 0.5)))


def temperature(capability: float, low: float, high: float, by: str) -> float:
    """At which temperature. by: constant, capability (higher where it is sure), incapability (where it is not)."""
    share = {"constant": 0.0, "capability": capability, "incapability": 1.0 - capability}[by]
    return low + share * (high - low)


def within_budget(sizes: Sequence[int], keys: Sequence[str], budget: int, k_min: int) -> list[int]:
    """`sizes` made smaller until they sum to `budget`: always the largest first, of equal ones the first by key.

    Never below `k_min`: where all are there, the sum may stay above the budget.
    """
    lowered = list(sizes)
    order = sorted(range(len(lowered)), key=lambda i: keys[i])
    while sum(lowered) > budget:
        largest = max(order, key=lambda i: lowered[i])  # the first of equals
        if lowered[largest] <= k_min:
            break
        lowered[largest] -= 1
    return lowered


def quantiles(values: Sequence[float], low: float, high: float) -> tuple[float, float]:
    """The two quantiles of at least one value, interpolated linearly."""
    shares = torch.tensor([low, high], dtype=torch.float64)
    return tuple(torch.tensor(list(values), dtype=torch.float64).quantile(shares).tolist())


def drop_score(peaks: Tensor) -> float:
    """1 + mean of m e^m, in (1, 1 + e], of the largest probabilities m (T,); the larger, the surer.

    The released code's score, which takes a probability for its logarithm, and means over every decoded step of the
    batch, those after a response's own end included.
    """
    wide = peaks.double()
    return 1.0 + float((wide * wide.exp()).mean())


def dropped(scores: Sequence[float], share: float) -> set[int]:
    """The places of the ceil(share * n) largest of n scores; of equal ones the first."""
    count = math.ceil(round(share * len(scores), 9))  # 0.3 * 10 is a hair above 3
    return set(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])
