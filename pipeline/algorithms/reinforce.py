"""REINFORCE on responses sampled from the policy: the likelihood of each, weighted by how it compares with the others.

    loss = - sum over sequences of A * sum_t logp_t,   A = R - baseline

| baseline      | of the n responses to one prompt        |
|---------------|-----------------------------------------|
| mean          | the mean reward, its own included       |
| leave_one_out | the mean of the others' rewards         |
| group         | as mean, divided by the rewards' spread |

Source: Williams (1992); leave_one_out: Kool et al. (2019). The baseline against which cheaper ways are measured: every
step decodes n responses token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.algorithms.functional import BASELINES, item_numbers, mean_stat, sequence_logp, std_stat
from pipeline.records import Batch, Needs, Stat

MEAN_OVER = "sequences"
RESPONSES = "policy"


@dataclass(frozen=True)
class Settings:
    """How many responses, and what each is compared with."""

    samples: int  # n >= 2 responses to each prompt
    baseline: Literal["mean", "leave_one_out", "group"]

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ValueError(
                f"samples: {self.samples}, wanted at least 2: one response has nothing to be compared with"
            )
        if self.baseline not in BASELINES:
            raise ValueError(f"baseline: {self.baseline!r}, wanted {', '.join(BASELINES)}")


def needs(settings: Settings) -> Needs:
    """Nothing beforehand: responses are sampled and judged step by step."""
    return Needs()


def loss(logp: Tensor, batch: Batch, settings: Settings) -> tuple[Tensor, dict[str, Stat]]:
    """The sum of the sequences' losses, and its statistics; logp (B, T), `batch.numbers` hold advantage and reward."""
    mask, present = batch.response_mask, batch.sequence_mask
    weights = item_numbers(batch, "advantage", like=logp)  # (B,)
    whole = sequence_logp(logp, mask)
    per_sequence = -weights * whole
    rewards = item_numbers(batch, "reward", like=logp)
    stats = {
        "loss": mean_stat(per_sequence, present),
        "logps/policy": mean_stat(whole, present),
        "advantage/std": std_stat(weights, present),
        "reward/mean": mean_stat(rewards, present),
        "reward/std": std_stat(rewards, present),
        "completions/mean_tokens": mean_stat(mask.sum(1).double(), present),
    }
    return torch.where(present, per_sequence, 0.0).sum(), stats
