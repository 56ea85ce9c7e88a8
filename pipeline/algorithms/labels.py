"""Learning from labels: a desirable response becomes likelier than a reference point, an undesirable one less likely.

    m = s * (beta * ln(pi / pi_ref) - z),    s = 1 where the response is desirable, else -1; ln of the whole response
    kto   w * (1 - sigmoid(m))      z = max(0, mean of beta * ln(pi / pi_ref) over responses to other prompts)
    bco   w * -ln sigmoid(m)        z = half the sum of the two classes' running means of beta * ln(pi / pi_ref)

w is the weight of the class. z carries no gradient and is the same for all rows of a step; what it is made of says
pipeline/rl/reference_points.py. At pi = pi_ref z is 0, and the losses are w / 2 and w ln 2. kto's gradient fades on
both sides of z, so that rows that are far on the wrong side are given up as mislabelled; bco's is largest there.

Sources: Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization" (ICML 2024, arXiv 2402.01306);
Jung et al., "Binary Classifier Optimization for Large Language Model Alignment" (ACL 2025, arXiv 2404.04656). Read for
both: the source of TRL's trainers (KTOTrainer of 1.16, which takes beta out of the mean of z, where it changes nothing;
BCOTrainer of older versions, without its weights by embeddings of prompts).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.algorithms.functional import check_aligned, item_numbers, masked_sum, sequence_log_ratios
from pipeline.algorithms.stats import mean_stat, right, side_stats
from pipeline.records import Batch, Needs, Stat

MEAN_OVER = "sequences"
RESPONSES = "labels"


@dataclass(frozen=True)
class Settings:
    """Which member of the family, how far the policy may go, and what a row of each class counts."""

    objective: Literal["kto", "bco"]
    beta: float  # > 0; the smaller, the further from the reference
    desirable_weight: float | None  # null: as much as makes both classes weigh the same in all
    undesirable_weight: float
    threshold: float | None  # of the reward from which on a row is desirable; null: the mean over the training rows

    def __post_init__(self) -> None:
        if self.objective not in LOSSES:
            raise ValueError(f"objective: {self.objective!r}, wanted {', '.join(LOSSES)}")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta: {self.beta}, wanted a number > 0")
        if self.desirable_weight is not None and not 0 <= self.desirable_weight < math.inf:
            raise ValueError(f"desirable_weight: {self.desirable_weight}, wanted null or a number >= 0")
        if not 0 <= self.undesirable_weight < math.inf:
            raise ValueError(f"undesirable_weight: {self.undesirable_weight}, wanted a number >= 0")
        if not (self.desirable_weight or self.undesirable_weight):
            raise ValueError("undesirable_weight: 0, and no row of the other class counts either, wanted one above 0")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"threshold: {self.threshold}, wanted null or a number")


def needs(settings: Settings) -> Needs:
    """Rewards, which make the labels, and the reference's log-probabilities."""
    return Needs(rewards=True, ref_logp=True)


def loss(logp: Tensor, batch: Batch, settings: Settings) -> tuple[Tensor, dict[str, Stat]]:
    """The sum of the rows' losses, and its statistics.

    logp (B, T). The batch's numbers are `desirable` (1 or 0), `weight` (of the row's class) and `reference_point` (z).
    What lies under the mask and in fillers has no influence. Raises UserError where one of them, or ref_logp, is
    missing or has another shape.
    """
    check_aligned(logp, batch)
    desirable = item_numbers(batch, "desirable", like=logp) == 1  # (B,)
    implicit = settings.beta * sequence_log_ratios(logp, batch)  # (B,)
    gap = implicit - item_numbers(batch, "reference_point", like=logp)
    m = torch.where(desirable, gap, -gap)
    per_row = item_numbers(batch, "weight", like=logp) * LOSSES[settings.objective](m)
    rows = batch.sequence_mask
    stats = {
        "loss": mean_stat(per_row, rows),
        "rewards/accuracies": mean_stat(right(m, 0.0), rows),  # a row at the reference point is half right
        **side_stats(implicit, logp, batch, lambda of_rows: (of_rows, of_rows), (rows & desirable, rows & ~desirable)),
    }
    return masked_sum(per_row, rows), stats


LOSSES = {"kto": lambda m: torch.sigmoid(-m), "bco": lambda m: -F.logsigmoid(m)}  # 1 - sigmoid(m) = sigmoid(-m)
