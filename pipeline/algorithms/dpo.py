"""DPO: of two responses to one prompt, the better one becomes likelier against the reference, the worse one less so.

    m = beta * [ ln(pi / pi_ref)(chosen) - ln(pi / pi_ref)(rejected) ],   each ln a sum over the response and its EOS
    loss = -(1 - e) * ln sigmoid(m) - e * ln sigmoid(-m),                 e the label smoothing: a label's chance to err

beta * ln(pi / pi_ref) is the reward that the policy is the optimum of, with beta as the coefficient of the KL from the
reference; no other model judges. Tokens before the two responses part have one value in both, so they cancel in m:
leaving them out would change no step.

Sources: Rafailov et al., "Direct Preference Optimization" (NeurIPS 2023, arXiv 2305.18290); label smoothing: Mitchell,
"A note on DPO with noisy preferences" (2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.algorithms.functional import log_ratios, masked_sum, sequence_logp
from pipeline.algorithms.stats import mean_stat
from pipeline.records import Batch, Needs, Stat

MEAN_OVER = "pairs"
RESPONSES = "pairs"


@dataclass(frozen=True)
class Settings:
    """How far the policy may go, and how far the labels are trusted."""

    beta: float  # > 0; the smaller, the further from the reference
    label_smoothing: float  # e in [0, 0.5)

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta: {self.beta}, wanted a number > 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing: {self.label_smoothing}, wanted a number in [0, 0.5)")


def needs(settings: Settings) -> Needs:
    """The reference's log-probabilities of both responses."""
    return Needs(ref_logp=True)


def loss(logp: Tensor, batch: Batch, settings: Settings) -> tuple[Tensor, dict[str, Stat]]:
    """The sum of the pairs' losses, and its statistics.

    logp (B, T): all chosen responses, then all rejected ones in the same order, B = 2 * pairs with fillers. What lies
    under the mask and in fillers has no influence. Raises UserError where ref_logp is missing or has another shape.
    """
    present, mask = batch.sequence_mask, batch.response_mask  # (B,), (B, T)
    assert logp.shape == mask.shape, f"logp: shape is {tuple(logp.shape)}, but response_mask has {tuple(mask.shape)}"
    assert len(logp) % 2 == 0, f"logp: {len(logp)} rows, wanted an even number, chosen then rejected"
    pairs = len(logp) // 2
    assert torch.equal(present[:pairs], present[pairs:]), "response_mask: a pair has only one response"
    chosen, rejected = (settings.beta * log_ratios(logp, batch)).split(pairs)  # (P,) each
    m, e, counted = chosen - rejected, settings.label_smoothing, present[:pairs]
    per_pair = -(1 - e) * F.logsigmoid(m) - e * F.logsigmoid(-m)  # (P,)
    stats = _statistics(chosen, rejected, counted, per_pair) | _likelihoods(logp, batch, counted)
    return masked_sum(per_pair, counted), stats


@torch.no_grad()
def _statistics(chosen: Tensor, rejected: Tensor, counted: Tensor, per_pair: Tensor) -> dict[str, Stat]:
    """Of the implicit rewards beta * ln(pi / pi_ref). A tie, as at the start, counts as half right in the accuracy."""
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    return {
        "loss": mean_stat(per_pair, counted),
        "rewards/chosen": mean_stat(chosen, counted),
        "rewards/rejected": mean_stat(rejected, counted),
        "rewards/margins": mean_stat(chosen - rejected, counted),
        "rewards/accuracies": mean_stat(right, counted),
    }


@torch.no_grad()
def _likelihoods(logp: Tensor, batch: Batch, counted: Tensor) -> dict[str, Stat]:
    """Nats per response. Where logps/chosen falls too, the policy moves away from both, to what nobody has seen."""
    chosen, rejected = sequence_logp(logp, batch.response_mask).split(len(counted))
    ref = sequence_logp(batch.ref_logp, batch.response_mask).split(len(counted))
    return {
        "logps/chosen": mean_stat(chosen, counted),
        "logps/rejected": mean_stat(rejected, counted),
        "logps/ref_chosen": mean_stat(ref[0], counted),
        "logps/ref_rejected": mean_stat(ref[1], counted),
    }
