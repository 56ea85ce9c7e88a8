"""Semi-offline RL: mask tokens of a fixed response, draw n tokens for each from one forward, learn from their rewards.

    L = rl_weight * L_RL + L_MLE
    L_RL  = - mean over sequences of  (1 / l^g) sum_i A_i sum_{t masked} logp(a_it)
    L_MLE =   mean over tokens of  (1 - e) * nll_t + e * u_t,   u_t = - mean over the vocabulary of logp

with l the masked tokens of a sequence, g the length penalty, e the label smoothing. i runs over the n compositions: the
static response with the drawn tokens in the masked places, each with one reward R_i. L_MLE is taken on the reference
text, whose inputs are masked as well, but all of whose tokens are targets.

| baseline      | A_i                               |
|---------------|-----------------------------------|
| mean          | R_i - mean R, the published form  |
| leave_one_out | R_i - mean of the others' R       |
| group         | (R_i - mean R) / std R            |

All three sum to zero over i. The normaliser of logp therefore cancels, and the gradient of L_RL with respect to the
logits is -(1 / l^g) sum_{i: a_it = v} A_i: at most n ids of a masked position have one. The compositions are summed
over, not averaged: rl_weight belongs to a number of samples. E[grad L_RL] = -((n-1)/l) grad E[R] under the factorised
policy, and -(n/l) grad E[R] with leave_one_out. Equal rewards, and no masked token, give no gradient.

Source: Chen et al., "Semi-Offline Reinforcement Learning for Optimized Text Generation" (ICML 2023, arXiv 2306.09712),
and its released code, whose pairwise loss this is in closed form. Ours: the baselines but the mean; special ids are
never drawn, so that no position has to be taken back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.algorithms import functional
from pipeline.algorithms.logits import Drawn
from pipeline.algorithms.stats import mean_stat, std_stat
from pipeline.records import Batch, Needs, Stat, StaticBatch

MEAN_OVER = ("sequences", "tokens")  # of L_RL, of L_MLE
RESPONSES = "masked data"


@dataclass(frozen=True)
class Settings:
    """Which member of the family."""

    samples: int  # n, drawn for each masked token
    rl_weight: float
    baseline: Literal["mean", "leave_one_out", "group"]
    length_penalty: float  # g; 0: the sum over masked tokens, 1: their mean
    label_smoothing: float  # e

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ValueError(f"samples: {self.samples}, wanted at least 2: one sample has nothing to be compared with")
        if not self.rl_weight >= 0:
            raise ValueError(f"rl_weight: {self.rl_weight}, wanted a number >= 0")
        if self.baseline not in functional.BASELINES:
            raise ValueError(f"baseline: {self.baseline!r}, wanted {', '.join(functional.BASELINES)}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: {self.label_smoothing}, wanted a number in [0, 1)")


def needs(settings: Settings) -> Needs:
    """Nothing beforehand: rewards are those of the compositions."""
    return Needs(output="drawn")


def loss(output: tuple[Tensor, ...], batch: Batch, settings: Settings) -> tuple[Tensor, dict[str, Stat]]:
    """(2,): the sums of rl_weight * L_RL over sequences and of L_MLE over tokens; and their statistics.

    output: logp (B, T), the mean log-probability over the vocabulary (B, T), then the four of `logits.Drawn`.
    `batch.static.rewards` (B, n) are those of the compositions.
    """
    logp, means, drawn = output[0], output[1], Drawn(*output[2:])
    static, mask = batch.static, batch.response_mask
    assert static.rewards.shape == (len(mask), settings.samples), f"rewards: {tuple(static.rewards.shape)}"
    weights = functional.group_advantages(static.rewards, settings.baseline)  # (B, n)
    per_sequence = -(weights * masked_logp(drawn.logp, static.masked, settings.length_penalty)).sum(1)  # (B,)
    nll = torch.where(mask, -logp, 0.0)
    smoothed = functional.smoothed_nll(logp, means, mask, settings.label_smoothing)
    totals = torch.stack([settings.rl_weight * per_sequence.sum(), smoothed.sum()])
    stats = {"loss/mle": mean_stat(smoothed, mask), "loss": mean_stat(nll, mask)}
    stats["logps/policy"] = mean_stat(functional.sequence_logp(logp, mask), batch.sequence_mask)
    stats["loss/rl"] = mean_stat(per_sequence, batch.sequence_mask)
    return totals, stats | _statistics(drawn, static, weights, batch.sequence_mask)


def masked_logp(logp: Tensor, masked: Tensor, length_penalty: float) -> Tensor:
    """(B, n): sum over a sequence's masked tokens of logp (M, n), over their number to the power `length_penalty`.

    masked (B, S) bool has M True places, in row-major order; a sequence without one has 0.
    """
    sequences = masked.nonzero()[:, 0]  # (M,)
    sums = logp.new_zeros(len(masked), logp.shape[1]).index_add(0, sequences, logp)
    return sums / masked.sum(1, keepdim=True).clamp(min=1) ** length_penalty


@torch.no_grad()
def _statistics(drawn: Drawn, static: StaticBatch, weights: Tensor, present: Tensor) -> dict[str, Stat]:
    """Of masked tokens, compositions and groups."""
    counts = static.masked.sum(1).double()  # (B,)
    deviations = static.rewards.std(1, unbiased=False)
    return {
        "semi_offline/mask_rate": mean_stat(static.masked, static.mask),
        "semi_offline/hidden_tokens": mean_stat(counts, present),
        "semi_offline/nothing_hidden": mean_stat((counts == 0).double(), present),
        "semi_offline/equal_rewards": mean_stat((weights == 0).all(1).double(), present),
        "semi_offline/reward_spread": mean_stat(deviations, present),
        "semi_offline/own_tokens": mean_stat((drawn.ids == static.ids[static.masked][:, None]).double()),
        "advantage/std": std_stat(weights, present[:, None]),
        "semi_offline/reward": mean_stat(static.rewards, present[:, None]),
        "semi_offline/reward_std": std_stat(static.rewards, present[:, None]),
        "semi_offline/entropy": mean_stat(drawn.entropy),
    }
