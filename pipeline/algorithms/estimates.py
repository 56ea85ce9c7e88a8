"""How much more reward a policy earns than its reference, from held-out logged responses alone: nothing is sampled.

The rows (x, y, r) are taken to follow the reference, which was fitted to such rows. With lr = ln pi(y|x) - ln ref(y|x)
of the whole response, rho = exp(lr) and A = r - V(x), V the reward to expect of the prompt:

    snips     sum rho r / sum rho - mean r      self-normalised importance sampling (Swaminathan and Joachims 2015)
    dr        sum rho A / sum rho - mean A      the same, V as control variate (Dudik et al. 2011)
    tempered  dr with rho^g, g <= 1 the largest for which the effective sample size is at least SHARE of the rows
    clipped   dr with lr - mean lr held to [-CLIP, CLIP], so that no row outweighs the others (Ionides 2008)
    slope     covariance of A and lr            first order in lr: what a small step in this direction gains
    pairs     mean over pairs of rows of (A_i - A_j) tanh((lr_i - lr_j) / 2): what is gained by choosing one of two
              responses of the reference by its ratio

All are 0 where pi = ref, and where every row became less likely by the same factor: forgetting is no gain. The weighted
loss of training is no such estimate: A+ clip(rho) nll falls when rows are merely forgotten.

`gain` gives two of them, both chosen by measurement (stages/recipes/RESULTS.md). How much was gained: `tempered`. rho
of whole responses soon rests on a handful of rows; rho^g is the ratio of a policy on the way from the reference to pi
(flattened weights, Shimodaira 2000). How far to look is a choice between what few rows say and what is only half the
way, and logged rows never follow the reference quite: so the interval reaches from the least to the greatest of what a
bootstrap over prompts gives for the shares of SPAN, the whole ratio among them. Which of several policies gained more:
`dr`, of which the level is too high and the order the best.

What none of them sees is what a policy says that was never logged. `mass`, the mean of rho, is 1 where it says the
logged responses and no others; a policy that ran away has next to none left, and shares of that say nothing of it: then
nothing is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SHARE = 1 / 4  # of the rows, that `tempered` rests on at least
SPAN = (1 / 2, SHARE, 0.0)  # such shares between which the interval reaches; 0: the ratio as it is
FLOOR = 16.0  # rows: an estimate that rests on fewer is not known
FEWEST_PROMPTS = 8  # a bootstrap over fewer draws intervals that are far too narrow
LENGTH = 0.7  # a correlation of rewards with words above which ratios of whole responses, sums over tokens, mislead
CLIP = 3.0  # nats
MASS = 0.05  # with less none is known: of 20 policies 18 had 0.28 or more, those of 0.03 and 0.002 a wrong sign
LEVEL = 0.9  # of the intervals
DRAWS = 500  # of the bootstrap
HALVINGS = 40  # of the interval in which g lies


class HeldOut(NamedTuple):
    """Logged responses that the policy did not learn from, (n,) each."""

    log_ratio: Tensor  # float64, ln(policy / reference) of the whole response
    reward: Tensor  # float64
    value: Tensor  # float64, the reward to expect of the prompt
    prompt: Tensor  # int64 in [0, prompts): which rows have one prompt
    words: Tensor  # int64, of the responses


class Gain(NamedTuple):
    """How much more reward a policy earns than the reference; `low` and `high` hold the truth LEVEL of the time."""

    value: float
    low: float
    high: float
    dr: float  # with the whole ratio: it says too much, and tells better which of several policies gained more
    ess: float  # effective sample size, in rows, that it rests on
    mass: float  # mean of rho: how likely the policy holds the rows, in how likely the reference does
    power: float  # in [0, 1], how far on the way from the reference to the policy it looks
    rows: int
    prompts: int
    length_correlation: float  # of rewards and words; 0 where one of the two does not vary

    @property
    def known(self) -> bool:
        """Whether it is to be believed."""
        return not self.unknown

    @property
    def never(self) -> bool:
        """Whether no policy's gain would be known by these rows."""
        return abs(self.length_correlation) > LENGTH or self.prompts < FEWEST_PROMPTS or self.rows < FLOOR

    @property
    def few(self) -> bool:
        """Whether more rows might make it known."""
        return abs(self.length_correlation) <= LENGTH and (self.prompts < FEWEST_PROMPTS or self.ess < FLOOR)

    @property
    def unknown(self) -> str:
        """Why it is not known, in words; "" where it is."""
        finite = all(map(math.isfinite, (self.value, self.low, self.high, self.dr, self.ess)))
        faults = {
            f"rewards follow the length (correlation {self.length_correlation:.2f}), and so do ratios": (
                abs(self.length_correlation) > LENGTH
            ),
            f"{self.prompts} held-out prompts, wanted {FEWEST_PROMPTS} or more": self.prompts < FEWEST_PROMPTS,
            f"{self.rows} held-out rows, wanted {FLOOR:.0f} or more": self.rows < FLOOR,
            "ratios or rewards of held-out rows are not finite, or too large to count with": not finite,
            f"{self.ess:.0f} of {self.rows:,} held-out rows carry the weight, wanted {FLOOR:.0f} or more": (
                self.ess < FLOOR
            ),
            f"held-out rows are {self.mass:.2g} times as likely as they were: the policy says other things now, and "
            "what these earn only fresh responses tell (reward=NAME)": self.mass < MASS,
        }
        return next((fault for fault, found in faults.items() if found), "")


def ess(weights: Tensor) -> float:
    """(sum w)^2 / sum w^2, in [1, n]: how many rows carry the weight."""
    return float(weights.sum() ** 2 / weights.square().sum())


def snips(rows: HeldOut, times: Tensor) -> Tensor:
    """(D,) of each of D draws in which row i stands times[d, i] times; so are the others."""
    return _shift(rows.log_ratio, rows.reward, times)


def dr(rows: HeldOut, times: Tensor) -> Tensor:
    return _shift(rows.log_ratio, rows.reward - rows.value, times)


def tempered(rows: HeldOut, times: Tensor, share: float = SHARE) -> Tensor:
    return dr(rows._replace(log_ratio=power(rows.log_ratio, share) * rows.log_ratio), times)


def clipped(rows: HeldOut, times: Tensor) -> Tensor:
    held = (rows.log_ratio - rows.log_ratio.mean()).clamp(-CLIP, CLIP)
    return dr(rows._replace(log_ratio=held), times)


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
    "tempered": tempered,
    "clipped": clipped,
    "slope": slope,
    "pairs": pairs,
}


def gain(rows: HeldOut, seed: int = 0) -> Gain:
    """The tempered estimate, with an interval that covers the bootstrap's middle LEVEL for all shares of SPAN."""
    times = resampled(rows.prompt, seed)
    once = torch.ones(1, len(rows.reward), dtype=torch.float64)
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    reached = torch.stack([torch.quantile(tempered(rows, times, share), ends) for share in SPAN])  # (shares, 2)
    g = power(rows.log_ratio, SHARE)
    return Gain(
        value=float(tempered(rows, once)),
        low=float(reached[:, 0].min()),
        high=float(reached[:, 1].max()),
        dr=float(dr(rows, once)),
        ess=ess(_ratios(g * rows.log_ratio)),
        mass=float((rows.log_ratio.logsumexp(0) - math.log(len(rows.reward))).exp()),
        power=g,
        rows=len(rows.reward),
        prompts=int(rows.prompt.max()) + 1,
        length_correlation=_correlation(rows.reward, rows.words.double()),
    )


def power(log_ratio: Tensor, share: float) -> float:
    """The largest g in [0, 1] for which exp(g lr) has an effective sample size of at least `share` of the rows.

    That size never rises with g: its slope is 2 (mean of lr under exp(g lr) - mean of lr under exp(2 g lr)).
    """
    if ess(_ratios(log_ratio)) >= share * len(log_ratio):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = ess(_ratios(middle * log_ratio)) >= share * len(log_ratio)
        low, high = (middle, high) if enough else (low, middle)
    return low


def resampled(prompt: Tensor, seed: int) -> Tensor:
    """(DRAWS, n) float64: how often each row stands in draws of as many prompts as there are, with replacement."""
    count = int(prompt.max()) + 1
    drawn = torch.randint(count, (DRAWS, count), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(DRAWS, count, dtype=torch.float64)
    return times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))[:, prompt]


def _ratios(log_ratio: Tensor) -> Tensor:
    return torch.exp(log_ratio - log_ratio.max())  # scaled: only shares count


def _shift(log_ratio: Tensor, numbers: Tensor, times: Tensor) -> Tensor:
    """(D,) the mean of `numbers` weighted by the ratios, less their plain mean.

    Each draw is scaled by its own largest ratio: by that of all rows a draw without this row could have only zeros.
    """
    drawn = torch.where(times > 0, log_ratio, -math.inf)  # (D, n)
    weighted = times * torch.exp(drawn - drawn.amax(1, keepdim=True))
    return (weighted @ numbers) / weighted.sum(1) - (times @ numbers) / times.sum(1)


def _correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's; 0 where one of the two does not vary."""
    a, b = one - one.mean(), other - other.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 0 else 0.0
