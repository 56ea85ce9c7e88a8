"""Reward-model losses: which of two responses is better (Bradley-Terry), how good each one is (regression), or both.

    bradley_terry:  -ln sigmoid(s_c - s_r - margin) + center_coef * (s_c + s_r)^2
    regression:     ((s_c - chosen_reward)^2 + (s_r - rejected_reward)^2) / 2; of a response alone (s - reward)^2
    mixed:          regression where the pair's `correctness` is 1, -ln sigmoid(s_c - s_r) / 2 where it is not

Bradley-Terry leaves the scores' origin open; a small center_coef keeps them around 0. The scores of a regression are
raw: on the annotations' own scale. Mixed is for annotated pairs of which some contradict the order that people chose;
as in its source both kinds of pairs are divided by the number of responses, so that a ranked one weighs half of what it
weighs in Bradley-Terry.
Sources: Bradley and Terry (1952); margin: Touvron et al., arXiv 2307.09288; centring: Eisenstein et al., arXiv
2312.09244; regression and mixed: the code released with ESRL (Wang et al., arXiv 2308.02223).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.algorithms.functional import item_numbers, masked_sum, whole_groups
from pipeline.algorithms.stats import mean_stat, right, std_stat
from pipeline.records import Batch, Needs, Stat

MEAN_OVER = "items"


@dataclass(frozen=True)
class Settings:
    """How scores are compared with the data."""

    objective: Literal["bradley_terry", "regression", "mixed"]
    use_margin: bool  # bradley_terry: ask for s_c - s_r > margin, from the data's column `margin`
    center_coef: float  # bradley_terry: weight of (s_c + s_r)^2; 0: off

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective: {self.objective!r}, wanted {', '.join(OBJECTIVES)}")
        if not self.center_coef >= 0:
            raise ValueError(f"center_coef: {self.center_coef}, wanted a number >= 0")
        if self.objective != "bradley_terry" and self.center_coef > 0:
            raise ValueError(f"center_coef: {self.center_coef}, wanted 0 where objective is {self.objective}")
        if self.objective != "bradley_terry" and self.use_margin:
            raise ValueError(f"use_margin: true, wanted false where objective is {self.objective}")


def needs(settings: Settings) -> Needs:
    """Nothing beforehand: margins and rewards of pairs are columns of the data."""
    return Needs()


def columns(settings: Settings) -> tuple[str, ...]:
    """The numbers that every pair must bring along."""
    if settings.objective == "bradley_terry":
        return ("margin",) if settings.use_margin else ()
    annotated = ("chosen_reward", "rejected_reward")
    return annotated if settings.objective == "regression" else (*annotated, "correctness")


def pairs_only(settings: Settings) -> bool:
    """Whether rows must be pairs; if not, responses with a `reward` each will do."""
    return settings.objective != "regression"


def loss(scores: Tensor, batch: Batch, settings: Settings) -> tuple[Tensor, dict[str, Stat]]:
    """The sum of the items' losses, and its statistics.

    scores (B,): all chosen responses, then all rejected ones in the same order, B = 2 * pairs with fillers; under
    `regression` also one response per item. A tie counts as half right in `accuracy`. Raises UserError naming the
    margin, reward or correctness that the batch lacks.
    """
    present = batch.sequence_mask  # (B,)
    assert scores.shape == present.shape, f"scores: shape is {tuple(scores.shape)}, wanted {tuple(present.shape)}"
    scores = torch.where(present, scores, 0.0)
    if not pairs_only(settings) and "reward" in batch.numbers and "chosen_reward" not in batch.numbers:
        return _alone(scores, batch)
    counted = whole_groups(batch, 2)  # (P,)
    chosen, rejected = scores.split(len(counted))  # (P,) each
    per_pair = OBJECTIVES[settings.objective](chosen, rejected, batch, settings)  # (P,)
    stats = _statistics(chosen, rejected, counted, per_pair)
    if settings.objective != "bradley_terry":
        trusted = counted if settings.objective == "regression" else counted & _correct(batch, chosen)
        stats["mse"] = mean_stat(_regression(chosen, rejected, batch, settings), trusted)
    return masked_sum(per_pair, counted), stats


def _alone(scores: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Stat]]:
    present = batch.sequence_mask
    squares = (scores - item_numbers(batch, "reward", like=scores)).square()  # (B,)
    stats = {
        "loss": mean_stat(squares, present),
        "mse": mean_stat(squares, present),
        "scores/mean": mean_stat(scores, present),
        "scores/std": std_stat(scores, present),
    }
    return masked_sum(squares, present), stats


def _bradley_terry(chosen: Tensor, rejected: Tensor, batch: Batch, settings: Settings) -> Tensor:
    gap = chosen - rejected
    if settings.use_margin:
        gap = gap - item_numbers(batch, "margin", like=chosen)
    return settings.center_coef * (chosen + rejected).square() - F.logsigmoid(gap)


def _regression(chosen: Tensor, rejected: Tensor, batch: Batch, settings: Settings) -> Tensor:
    chosen_error = chosen - item_numbers(batch, "chosen_reward", like=chosen)
    rejected_error = rejected - item_numbers(batch, "rejected_reward", like=rejected)
    return (chosen_error.square() + rejected_error.square()) / 2


def _mixed(chosen: Tensor, rejected: Tensor, batch: Batch, settings: Settings) -> Tensor:
    ranked = -F.logsigmoid(chosen - rejected) / 2
    return torch.where(_correct(batch, chosen), _regression(chosen, rejected, batch, settings), ranked)


def _correct(batch: Batch, like: Tensor) -> Tensor:
    """(P,) bool: the annotated scores of this pair can be trusted."""
    return item_numbers(batch, "correctness", like=like) == 1


def _statistics(chosen: Tensor, rejected: Tensor, counted: Tensor, per_pair: Tensor) -> dict[str, Stat]:
    return {
        "loss": mean_stat(per_pair, counted),
        "accuracy": mean_stat(right(chosen, rejected), counted),
        "margin": mean_stat(chosen - rejected, counted),
        "scores/chosen/mean": mean_stat(chosen, counted),
        "scores/chosen/std": std_stat(chosen, counted),
        "scores/rejected/mean": mean_stat(rejected, counted),
        "scores/rejected/std": std_stat(rejected, counted),
    }


OBJECTIVES = {"bradley_terry": _bradley_terry, "regression": _regression, "mixed": _mixed}
