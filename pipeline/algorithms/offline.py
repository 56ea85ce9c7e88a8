"""Learning from fixed responses: the whole offline family is one weighted negative log-likelihood.

    loss = sum over sequences of  [ sum_t w_t * nll_t  +  kl_beta * kl ],    w_t = row weight * token factor, detached

| method         | weight      | baseline | ratio       | otherwise                       |
|----------------|-------------|----------|-------------|---------------------------------|
| nll            | one         |          | none        |                                 |
| rft            | one         |          | none        | rows: best                      |
| dft            | one         |          | probability | probability_floor 0             |
| iw_sft         | one         |          | mean        | rows: best, clip null           |
| wbc            | reward      |          | none        |                                 |
| r_gold         | reward      |          | probability | probability_floor 0.1           |
| r_lol          | reward      |          | sequence    | clip 0.9                        |
| a_lol          | advantage   | value    | sequence    | clip 0.9                        |
| a_lol_ref_free | advantage   | value    | none        |                                 |
| a_lol_seq      | advantage   | value    | token       | clip 0.9                        |
| a_lol_kl       | advantage   | value    | none        | kl_form released, kl_beta 0.2   |
| awr            | exponential | value    | none        | weight_temperature 1            |
| asymre         | signed      | value    | none        | shift 0.1                       |
| topr           | signed      | rows     | tapered     |                                 |
| grpo_offline   | signed      | group    | token       | clip 0.2, stop, kl_form k3      |

Row weight: 1; the reward R; or of the advantage A = R - baseline:
- advantage: its positive part, A+;
- exponential: min(exp(Z / weight_temperature), weight_limit), Z = A less its mean, in standard deviations, both of the
  rows learned from;
- signed: A + shift, which may be negative: such a row is pushed DOWN, see below.
Baseline, computed once before the first step: V(prompt); the mean reward of the prompt's rows; `group`: the same, and A
is divided by their (population) standard deviation; or the mean reward of all rows learned from.
Token factor: 1; pi / pi_ref of the whole response, or of the token, clipped; `mean`, the whole response's to the power
1 / its length, clipped; `tapered`, the whole response's within [0, 1] where the row weight is negative, else 1; or the
token's own probability, floored. The factor carries no gradient, so that a clip alone is not PPO's: a clipped row still
learns, with the bound as its weight. With clip_form `stop` it is: what the row's weight has pushed beyond the bound has
the factor 0 and teaches nothing more (what drifted beyond the other one keeps that bound, where PPO has the ratio).

What bounds a row of negative weight? -w ln pi falls without end as pi -> 0, so the loss alone does not. Its factor does
where that goes to 0 with pi: ratio tapered always, sequence, token and mean with clip null (but those grow without
end on rows of positive weight). A clip below 1 keeps 1 - clip of the push however unlikely the row is, unless it
stops, which ends each token, or row, by itself: what others teach may carry it on. The k3 term
pulls an unlikely token back with kl_beta at most, so it holds a row only where kl_beta >= |weight| * factor, and delays
it elsewhere. A positive shift leaves more weight on raised rows than on lowered ones, so that likelihood has somewhere
to go. The rest is early stopping, by the held-out gain; `logps/lowered` shows what happens.

KL forms, both measured on responses from the data:
- released: ln pi - ln pi_ref of the response. Its gradient pushes every response of the data DOWN by kl_beta, however
  close the policy is to the reference; rows with A+ < kl_beta are unlearned. It is the published form, not a KL: where
  the data follow the reference its mean gradient is that of -KL(reference, policy), away from it.
- k3: sum_t (rho_t - 1 - ln rho_t) with rho_t = pi / pi_ref of token t, never negative. An estimator of this kind is
  unbiased only if its samples come from the divergence's FIRST argument. The responses come from the data, which the
  reference was fitted to, not from the policy: so this one estimates KL(reference, policy), token by token along the
  data's prefixes, and is unbiased as far as the data follow the reference. The other direction would need importance
  weights, rho_t * (1 / rho_t - 1 + ln rho_t); that has the same second order at rho = 1, but its pull
  rho_t * ln rho_t fades as rho_t -> 0, just where a response is being forgotten. The gradient of ours is rho_t - 1: it
  draws the policy back to the reference from both sides.

Sources, and where ours differs:
- a_lol*, wbc, r_lol, r_gold: Baheti et al., "Leftover Lunch: Advantage-based Offline Reinforcement Learning for
  Language Models" (ICLR 2024, arXiv 2305.14718). Ours: clip 0 makes the ratio exactly 1, clip null removes the clip, A+
  is used everywhere.
- rft: RAFT (arXiv 2304.06767), ReST (arXiv 2308.08998): likelihood of the best rows. Here of logged ones, once.
- dft: Wu et al. (arXiv 2508.05629), and the authors' trainer (yongliang-wu/DFT, verl/trainer/fsdp_dft_trainer.py): each
  token's loss times its detached probability. They take the mean over tokens, we the sum per response.
- iw_sft: Qin and Springenberg (arXiv 2507.12856). The bound has the ratio of the whole response; what the authors run
  (emmyqin/iw_sft, bounding_trainers.py, temp 1) is exp of the mean log-ratio of its tokens, limited to [0, 16]. `mean`
  is that; the limit, 2.8 nats per token, is left out. ratio=sequence clip=0.9 is r_lol with rewards of 0 and 1.
- awr: Peng et al. (arXiv 1910.00177), and the authors' code (xbpeng/awr, learning/awr_agent.py), which standardises A,
  temp 1.0, weight_clip 20. Their V is learned from returns of the data; ours as set by `value`.
- asymre: Arnal et al. (arXiv 2506.20520): ascent on E_data[(r - V) ln pi] with V a little below the mean reward; with V
  at or above it the policy collapses. Ours takes off V(prompt) - shift.
- topr: Le Roux et al. (arXiv 2503.14286): positive rewards weigh as they are, negative ones times the ratio of the
  whole response limited to [0, 1]. Its baseline decides how much negative rows count; ours is the mean of all rows.
- grpo_offline: the group's advantages of GRPO (DeepSeekMath, arXiv 2402.03300) on logged rows, its clip of each token,
  its kl_beta and k3. GRPO takes the mean over tokens and new samples each step; TRL divides by the sample standard
  deviation, which for a prompt of k rows is sqrt(k / (k - 1)) of ours. With clip_form bound it runs away: hundreds of
  nats in 100 steps (stages/recipes/RESULTS.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.algorithms.functional import (
    check_aligned,
    clip_ratio,
    item_numbers,
    k3,
    sequence_log_ratios,
    token_log_ratios,
)
from pipeline.algorithms.stats import ess_stat, logged_stats, lowered_stats, mean_stat
from pipeline.records import Batch, Needs, Stat

MEAN_OVER = "sequences"
RESPONSES = "data"

CLIPPED = ("sequence", "token", "mean")
COMPARING = (*CLIPPED, "tapered")  # ratios to the reference


@dataclass(frozen=True)
class Settings:
    """Which member of the family; a value that the chosen `weight`, `ratio` and `kl_form` do not use has no effect."""

    weight: Literal["one", "reward", "advantage", "exponential", "signed"]
    ratio: Literal["none", "sequence", "token", "mean", "tapered", "probability"]
    clip: float | None  # half-width of the ratio's interval around 1; null: no clip; 0: the ratio is 1
    probability_floor: float  # lower bound of the token's probability as a factor
    kl_beta: float
    kl_form: Literal["none", "released", "k3"]
    baseline: Literal["value", "prompt", "group", "rows"]  # what the advantage is over
    shift: float  # added to the advantage of weight `signed`
    weight_temperature: float  # of weight `exponential`, in standard deviations of the advantage
    weight_limit: float  # upper bound of weight `exponential`
    clip_form: Literal["bound", "stop"]  # of what is pushed beyond the clip: keeps that ratio | teaches nothing more

    def __post_init__(self) -> None:
        for name, choices in (
            ("weight", ROW_WEIGHTS),
            ("ratio", TOKEN_FACTORS),
            ("kl_form", KL_TERMS),
            ("baseline", ("value", "prompt", "group", "rows")),
            ("clip_form", ("bound", "stop")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: {getattr(self, name)!r}, wanted {', '.join(choices)}")
        if self.clip is not None and not 0 <= self.clip < 1:
            raise ValueError(f"clip: {self.clip}, wanted null or a number in [0, 1)")
        if self.clip_form == "stop" and (self.clip is None or self.ratio not in CLIPPED):
            raise ValueError(f"clip_form: stop, wanted a clip and ratio {', '.join(CLIPPED)}: nothing else is clipped")
        if not 0 <= self.probability_floor <= 1:
            raise ValueError(f"probability_floor: {self.probability_floor}, wanted a number in [0, 1]")
        if not self.kl_beta >= 0:
            raise ValueError(f"kl_beta: {self.kl_beta}, wanted a number >= 0")
        if self.kl_beta > 0 and self.kl_form == "none":
            raise ValueError(f"kl_beta: {self.kl_beta}, wanted 0 where kl_form is none, or kl_form released or k3")
        if not math.isfinite(self.shift):
            raise ValueError(f"shift: {self.shift}, wanted a finite number")
        if self.shift and self.baseline in ("prompt", "group"):
            problem = f"shift: {self.shift} with baseline {self.baseline}"
            raise ValueError(f"{problem}, wanted 0: rows that compare with nothing would be learned from")
        for name in ("weight_temperature", "weight_limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)}, wanted a number > 0")
        if self.ratio == "tapered" and self.weight != "signed":
            raise ValueError(f"ratio: tapered with weight {self.weight}, wanted weight signed: no other is below 0")


def needs(settings: Settings) -> Needs:
    """What has to be known of the data before training."""
    number = WEIGHED_BY[settings.weight]
    baseline = settings.baseline if number in ("advantage", "standard_advantage") else ""
    return Needs(
        rewards=settings.weight != "one",
        values=baseline == "value",
        ref_logp=settings.ratio in COMPARING or settings.kl_form != "none",
        baseline=baseline,
        weighed_by=number,
    )


def row_weights(numbers: Tensor, settings: Settings) -> Tensor:
    """(n,) the rows' weights, of what they are weighed by: `Needs.weighed_by`."""
    return ROW_WEIGHTS[settings.weight](numbers, settings)


def loss(logp: Tensor, batch: Batch, settings: Settings) -> tuple[Tensor, dict[str, Stat]]:
    """The sum of the sequences' losses, and its statistics; logp (B, T) is the policy's, aligned to response_ids.

    What lies under the mask and in fillers has no influence. Raises UserError naming the number of `WEIGHED_BY`, or the
    ref_logp, that is missing or has a wrong shape.
    """
    check_aligned(logp, batch)
    mask = batch.response_mask
    nll = torch.where(mask, -logp, 0.0)  # (B, T) >= 0
    per_sequence = (weights(logp, batch, settings) * nll).sum(1)  # (B,)
    per_sequence = per_sequence + settings.kl_beta * KL_TERMS[settings.kl_form](logp, batch)
    return per_sequence.sum(), _statistics(logp, batch, settings, per_sequence)


@torch.no_grad()
def weights(logp: Tensor, batch: Batch, settings: Settings) -> Tensor:
    """(B, T) the weight of each token's nll, without gradient: row weight * token factor, 0 outside the responses."""
    row_weight = _row_weight(logp, batch, settings)  # (B,)
    factor = TOKEN_FACTORS[settings.ratio](logp, batch, settings)  # (B, T) or (B, 1)
    # a row without weight has none, whatever its ratio is: unclipped that may be infinite
    return torch.where(batch.response_mask & (row_weight != 0)[:, None], row_weight[:, None] * factor, 0.0)


def _row_weight(logp: Tensor, batch: Batch, settings: Settings) -> Tensor:
    """(B,) the rows' weights; what fillers have means nothing."""
    number = WEIGHED_BY[settings.weight]
    known = logp.new_zeros(len(logp)) if number is None else item_numbers(batch, number, like=logp)
    return row_weights(known, settings)


def _log_rho(logp: Tensor, batch: Batch, settings: Settings) -> Tensor:
    """ln(pi / pi_ref): (B, T) of each token for ratio `token`, else (B, 1), of the whole response or their mean."""
    tokens = token_log_ratios(logp, batch)
    if settings.ratio == "token":
        return tokens
    whole = tokens.sum(1, keepdim=True)
    return whole / batch.response_mask.sum(1, keepdim=True).clamp(min=1) if settings.ratio == "mean" else whole


@torch.no_grad()
def _statistics(logp: Tensor, batch: Batch, settings: Settings, per_sequence: Tensor) -> dict[str, Stat]:
    stats = logged_stats(logp, batch, per_sequence)
    if settings.weight == "signed":
        stats |= lowered_stats(logp, batch, _row_weight(logp, batch, settings) < 0)
    return stats | RATIO_STATISTICS[settings.ratio](logp, batch, settings)


def _ratio_statistics(logp: Tensor, batch: Batch, settings: Settings) -> dict[str, Stat]:
    """Of the ratio as it enters the weights, after the clip: over tokens for `token`, else over responses."""
    log_rho = _log_rho(logp, batch, settings)  # (B, 1) or (B, T)
    counted = batch.response_mask if settings.ratio == "token" else batch.sequence_mask[:, None]
    rho = clip_ratio(log_rho, settings.clip)
    stats = {"ratio/mean": mean_stat(rho, counted), "ratio/ess": ess_stat(rho, counted)}
    if settings.clip is not None:
        stats["ratio/clip_fraction_low"] = mean_stat(log_rho < math.log1p(-settings.clip), counted)
        stats["ratio/clip_fraction_high"] = mean_stat(log_rho > math.log1p(settings.clip), counted)
    if settings.clip_form == "stop":
        stats["ratio/stopped_fraction"] = mean_stat(_stopped(logp, batch, settings), counted)
    return stats


def _tapered_statistics(logp: Tensor, batch: Batch, settings: Settings) -> dict[str, Stat]:
    """Of the factor of the rows that are lowered."""
    lowered = batch.sequence_mask & (_row_weight(logp, batch, settings) < 0)
    return {"ratio/mean": mean_stat(_tapered(logp, batch, settings), lowered[:, None])}


def _probability_statistics(logp: Tensor, batch: Batch, settings: Settings) -> dict[str, Stat]:
    probability = logp.exp()
    return {
        "probability/mean": mean_stat(probability, batch.response_mask),
        "probability/floor_fraction": mean_stat(probability < settings.probability_floor, batch.response_mask),
    }


def _clipped_ratio(logp: Tensor, batch: Batch, settings: Settings) -> Tensor:
    rho = clip_ratio(_log_rho(logp, batch, settings), settings.clip)
    return rho if settings.clip_form == "bound" else rho.masked_fill(_stopped(logp, batch, settings), 0.0)


def _stopped(logp: Tensor, batch: Batch, settings: Settings) -> Tensor:
    """Where the row's weight has pushed the ratio beyond the clip; shaped as the ratio."""
    assert settings.clip is not None
    log_rho, weight = _log_rho(logp, batch, settings), _row_weight(logp, batch, settings)[:, None]
    beyond = (log_rho < math.log1p(-settings.clip), log_rho > math.log1p(settings.clip))
    return torch.where(weight < 0, *beyond)


def _tapered(logp: Tensor, batch: Batch, settings: Settings) -> Tensor:
    """(B, 1) the ratio of the response, 1 at most, where the row weight is negative; else 1."""
    lowered = (_row_weight(logp, batch, settings) < 0)[:, None]
    return torch.where(lowered, _log_rho(logp, batch, settings).clamp(max=0.0).exp(), 1.0)


WEIGHED_BY = {  # the number of an item that its weight is made of
    "one": None,
    "reward": "reward",
    "advantage": "advantage",
    "exponential": "standard_advantage",
    "signed": "advantage",
}
ROW_WEIGHTS = {
    "one": lambda known, settings: torch.ones_like(known),
    "reward": lambda known, settings: known,
    "advantage": lambda known, settings: known.clamp(min=0.0),
    "exponential": lambda known, settings: (
        (known / settings.weight_temperature).clamp(max=math.log(settings.weight_limit)).exp()
    ),
    "signed": lambda known, settings: known + settings.shift,
}  # (n,) -> (n,)
TOKEN_FACTORS = {
    "none": lambda logp, batch, settings: torch.ones_like(logp),
    "sequence": _clipped_ratio,
    "token": _clipped_ratio,
    "mean": _clipped_ratio,
    "tapered": _tapered,
    "probability": lambda logp, batch, settings: logp.exp().clamp(min=settings.probability_floor),
}  # -> (B, 1) or (B, T)
KL_TERMS = {
    "none": lambda logp, batch: logp.new_zeros(len(logp)),
    "released": sequence_log_ratios,
    "k3": lambda logp, batch: k3(token_log_ratios(logp, batch)).sum(1),
}  # -> (B,)
RATIO_STATISTICS = {
    "none": lambda logp, batch, settings: {},
    "sequence": _ratio_statistics,
    "token": _ratio_statistics,
    "mean": _ratio_statistics,
    "tapered": _tapered_statistics,
    "probability": _probability_statistics,
}
