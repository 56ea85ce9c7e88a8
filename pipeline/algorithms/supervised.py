"""Supervised fine-tuning: the negative log-likelihood of the responses, averaged over tokens.

Unlike `nll` of the offline family, whose mean is over sequences, a long response counts for more here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.algorithms.functional import mean_stat, sequence_logp
from pipeline.records import Batch, Needs, Stat

MEAN_OVER = "tokens"
RESPONSES = "data"


@dataclass(frozen=True)
class Settings:
    """Nothing to choose."""


def needs(settings: Settings) -> Needs:
    """Nothing but the responses themselves."""
    return Needs()


def loss(logp: Tensor, batch: Batch, settings: Settings) -> tuple[Tensor, dict[str, Stat]]:
    """The sum of the response tokens' nll, and its statistics; logp (B, T) aligned to response_ids."""
    mask = batch.response_mask
    assert logp.shape == mask.shape, f"logp: shape is {tuple(logp.shape)}, but response_mask has {tuple(mask.shape)}"
    nll = torch.where(mask, -logp, 0.0)  # (B, T) >= 0
    stats = {
        "loss": mean_stat(nll, mask),
        "logps/policy": mean_stat(sequence_logp(logp, mask), batch.sequence_mask),  # nats per response
    }
    return nll.sum(), stats
