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

from torch import Tensor
from torch.nn import functional as F

from pipeline.algorithms.functional import check_aligned, masked_sum, sequence_log_ratios, whole_groups
from pipeline.algorithms.stats import mean_stat, right, side_stats
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
    check_aligned(logp, batch)
    counted = whole_groups(batch, 2)  # (P,)
    implicit = settings.beta * sequence_log_ratios(logp, batch)  # (B,)
    chosen, rejected = implicit.split(len(counted))  # (P,) each
    m, e = chosen - rejected, settings.label_smoothing
    per_pair = -(1 - e) * F.logsigmoid(m) - e * F.logsigmoid(-m)  # (P,)
    stats = {
        "loss": mean_stat(per_pair, counted),
        **side_stats(implicit, logp, batch, lambda of_rows: of_rows.split(len(counted)), (counted, counted)),
        "rewards/margins": mean_stat(m, counted),
        "rewards/accuracies": mean_stat(right(chosen, rejected), counted),
    }
    return masked_sum(per_pair, counted), stats
