"""Supervised fine-tuning: the negative log-likelihood of the responses, averaged over tokens.

Unlike `nll` of the offline family, whose mean is over sequences, a long response counts for more here.

    loss = (1 - e) * nll_t + e * u_t,   u_t = - mean over the vocabulary of logp,  e the label smoothing

The vocabulary is every row of the output matrix, those that are never sampled included, as in other trainers.

With masked inputs (`masking.rate`) this is masked fine-tuning, M-FT: all tokens are targets, only inputs are masked.

Source of M-FT: Chen et al., "Semi-Offline Reinforcement Learning for Optimized Text Generation" (ICML 2023); of label
smoothing: Szegedy et al. (2016).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.algorithms.functional import check_aligned, sequence_logp, smoothed_nll
from pipeline.algorithms.stats import mean_stat
from pipeline.records import Batch, Needs, Stat

MEAN_OVER = "tokens"


@dataclass(frozen=True)
class Settings:
    """How the targets are weighted."""

    label_smoothing: float  # e in [0, 1)

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: {self.label_smoothing}, wanted a number in [0, 1)")


def needs(settings: Settings) -> Needs:
    """Nothing but the responses themselves; the mean over the vocabulary only where it counts."""
    return Needs(output="smoothed" if settings.label_smoothing else "logp")


def loss(output: Tensor | tuple[Tensor, Tensor], batch: Batch, settings: Settings) -> tuple[Tensor, dict[str, Stat]]:
    """The sum of the response tokens' losses, and its statistics; `loss` is the plain nll, whatever is minimised.

    output: logp (B, T) aligned to response_ids; with label smoothing also the mean over the vocabulary (B, T).
    """
    logp, means = (output, None) if isinstance(output, Tensor) else output
    check_aligned(logp, batch)
    mask = batch.response_mask
    nll = torch.where(mask, -logp, 0.0)  # (B, T) >= 0
    stats = {
        "loss": mean_stat(nll, mask),
        "logps/policy": mean_stat(sequence_logp(logp, mask), batch.sequence_mask),  # nats per response
    }
    if means is None:
        return nll.sum(), stats
    smoothed = smoothed_nll(logp, means, mask, settings.label_smoothing)
    return smoothed.sum(), stats | {"loss/smoothed": mean_stat(smoothed, mask)}
