"""Learning from fixed responses: the whole offline family is one weighted negative log-likelihood.

    loss = sum over sequences of  [ sum_t w_t * nll_t  +  kl_beta * kl ],    w_t = row weight * token factor, detached

| method         | weight    | ratio       | otherwise                         |
|----------------|-----------|-------------|-----------------------------------|
| nll            | one       | none        |                                   |
| wbc            | reward    | none        |                                   |
| r_gold         | reward    | probability | probability_floor 0.1             |
| r_lol          | reward    | sequence    | clip 0.9                          |
| a_lol          | advantage | sequence    | clip 0.9                          |
| a_lol_ref_free | advantage | none        |                                   |
| a_lol_seq      | advantage | token       | clip 0.9                          |
| a_lol_kl       | advantage | none        | kl_form released, kl_beta 0.2     |

Row weight: 1, the reward R, or the positive part of the advantage A = R - V(prompt).
Token factor: 1; pi / pi_ref of the whole response, or of the token, clipped; or the token's own probability, floored.
The factor carries no gradient, so the clip is not PPO's: a clipped row still learns, with the bound as its weight.

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

Source: Baheti et al., "Leftover Lunch: Advantage-based Offline Reinforcement Learning for Language Models" (ICLR 2024,
arXiv 2305.14718). Ours: clip 0 makes the ratio exactly 1, clip null removes the clip, A+ is used everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.algorithms.functional import clip_ratio, ess_stat, item_numbers, k3, mean_stat, sequence_logp, std_stat
from pipeline.errors import UserError
from pipeline.records import Batch, Needs, Stat

MEAN_OVER = "sequences"
RESPONSES = "data"

LOGGED_NUMBERS = {  # tags of mean and standard deviation; `reward` is what TRL calls that of the policy's own responses
    "reward": ("logged/reward", "logged/reward_std"),
    "value": ("value/mean", "value/std"),
    "advantage": ("advantage/mean", "advantage/std"),
}


@dataclass(frozen=True)
class Settings:
    """Which member of the family; a value that the chosen `weight`, `ratio` and `kl_form` do not use has no effect."""

    weight: Literal["one", "reward", "advantage"]
    ratio: Literal["none", "sequence", "token", "probability"]
    clip: float | None  # half-width of the ratio's interval around 1; null: no clip; 0: the ratio is 1
    probability_floor: float  # lower bound of the token's probability as a factor
    kl_beta: float
    kl_form: Literal["none", "released", "k3"]

    def __post_init__(self) -> None:
        for name, choices in (("weight", ROW_WEIGHTS), ("ratio", TOKEN_FACTORS), ("kl_form", KL_TERMS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: {getattr(self, name)!r}, wanted {', '.join(choices)}")
        if self.clip is not None and not 0 <= self.clip < 1:
            raise ValueError(f"clip: {self.clip}, wanted null or a number in [0, 1)")
        if not 0 <= self.probability_floor <= 1:
            raise ValueError(f"probability_floor: {self.probability_floor}, wanted a number in [0, 1]")
        if not self.kl_beta >= 0:
            raise ValueError(f"kl_beta: {self.kl_beta}, wanted a number >= 0")
        if self.kl_beta > 0 and self.kl_form == "none":
            raise ValueError(f"kl_beta: {self.kl_beta}, wanted 0 where kl_form is none, or kl_form released or k3")


def needs(settings: Settings) -> Needs:
    """What has to be known of the data before training."""
    return Needs(
        rewards=settings.weight != "one",
        values=settings.weight == "advantage",
        ref_logp=settings.ratio in ("sequence", "token") or settings.kl_form != "none",
    )


def loss(logp: Tensor, batch: Batch, settings: Settings) -> tuple[Tensor, dict[str, Stat]]:
    """The sum of the sequences' losses, and its statistics; logp (B, T) is the policy's, aligned to response_ids.

    What lies under the mask and in filler sequences has no influence. Raises UserError naming the reward, advantage or
    ref_logp that is missing or has a wrong shape.
    """
    mask = batch.response_mask
    assert logp.shape == mask.shape, f"logp: shape is {tuple(logp.shape)}, but response_mask has {tuple(mask.shape)}"
    nll = torch.where(mask, -logp, 0.0)  # (B, T) >= 0
    per_sequence = (weights(logp, batch, settings) * nll).sum(1)  # (B,)
    per_sequence = per_sequence + settings.kl_beta * KL_TERMS[settings.kl_form](logp, batch)
    return per_sequence.sum(), _statistics(logp, batch, settings, per_sequence)


@torch.no_grad()
def weights(logp: Tensor, batch: Batch, settings: Settings) -> Tensor:
    """(B, T) the weight of each token's nll, without gradient: row weight * token factor, 0 outside the responses."""
    row_weight = ROW_WEIGHTS[settings.weight](logp, batch)  # (B,)
    factor = TOKEN_FACTORS[settings.ratio](logp, batch, settings)  # (B, T) or (B, 1)
    # a row without weight has none, whatever its ratio is: unclipped that may be infinite
    return torch.where(batch.response_mask & (row_weight != 0)[:, None], row_weight[:, None] * factor, 0.0)


def log_ratio(logp: Tensor, batch: Batch, settings: Settings) -> Tensor:
    """ln(pi / pi_ref): (B, 1) of the whole response for ratio `sequence`, (B, T) of each token otherwise."""
    tokens = _token_log_ratio(logp, batch)
    return tokens.sum(1, keepdim=True) if settings.ratio == "sequence" else tokens


def _token_log_ratio(logp: Tensor, batch: Batch) -> Tensor:
    """(B, T) ln(pi / pi_ref) of each token, 0 outside the responses."""
    if batch.ref_logp is None:
        raise UserError("ref_logp: the batch has none, wanted the reference's log-probabilities of its responses")
    found, wanted = tuple(batch.ref_logp.shape), tuple(logp.shape)
    if len(found) == 2 and found[0] == wanted[0] and found[1] != wanted[1]:
        cure = "was the cache made with another max_length?"
        raise UserError(f"ref_logp: T is {found[1]}, but logp has T = {wanted[1]} ({cure})")
    if found != wanted:
        raise UserError(f"ref_logp: shape is {found}, but logp has (B, T) = {wanted}")
    return torch.where(batch.response_mask, logp - batch.ref_logp, 0.0)


@torch.no_grad()
def _statistics(logp: Tensor, batch: Batch, settings: Settings, per_sequence: Tensor) -> dict[str, Stat]:
    """What is logged. logps/* are nats per response; logged/kl is k3 per response: KL(reference, policy)."""
    rows = batch.sequence_mask
    stats = {
        "loss": mean_stat(per_sequence, rows),
        "logps/policy": mean_stat(sequence_logp(logp, batch.response_mask), rows),
    }
    for name, (mean, std) in LOGGED_NUMBERS.items():
        if name in batch.numbers:
            values = item_numbers(batch, name, like=logp)
            stats |= {mean: mean_stat(values, rows), std: std_stat(values, rows)}
    if batch.ref_logp is not None:
        stats["logged/kl"] = mean_stat(_k3_kl(logp, batch), rows)
        stats["logps/ref"] = mean_stat(sequence_logp(batch.ref_logp, batch.response_mask), rows)
    return stats | RATIO_STATISTICS[settings.ratio](logp, batch, settings)


def _ratio_statistics(logp: Tensor, batch: Batch, settings: Settings) -> dict[str, Stat]:
    """Of the ratio as it enters the weights, after the clip: over responses for `sequence`, over tokens for `token`."""
    log_rho = log_ratio(logp, batch, settings)  # (B, 1) or (B, T)
    counted = batch.sequence_mask[:, None] if settings.ratio == "sequence" else batch.response_mask
    rho = clip_ratio(log_rho, settings.clip)
    stats = {"ratio/mean": mean_stat(rho, counted), "ratio/ess": ess_stat(rho, counted)}
    if settings.clip is not None:
        stats["ratio/clip_fraction_low"] = mean_stat(log_rho < math.log1p(-settings.clip), counted)
        stats["ratio/clip_fraction_high"] = mean_stat(log_rho > math.log1p(settings.clip), counted)
    return stats


def _probability_statistics(logp: Tensor, batch: Batch, settings: Settings) -> dict[str, Stat]:
    probability = logp.exp()
    return {
        "probability/mean": mean_stat(probability, batch.response_mask),
        "probability/floor_fraction": mean_stat(probability < settings.probability_floor, batch.response_mask),
    }


def _clipped_ratio(logp: Tensor, batch: Batch, settings: Settings) -> Tensor:
    return clip_ratio(log_ratio(logp, batch, settings), settings.clip)


def _k3_kl(logp: Tensor, batch: Batch) -> Tensor:
    return k3(_token_log_ratio(logp, batch)).sum(1)


ROW_WEIGHTS = {
    "one": lambda logp, batch: logp.new_ones(len(logp)),
    "reward": lambda logp, batch: item_numbers(batch, "reward", like=logp),
    "advantage": lambda logp, batch: item_numbers(batch, "advantage", like=logp).clamp(min=0.0),
}  # -> (B,)
TOKEN_FACTORS = {
    "none": lambda logp, batch, settings: torch.ones_like(logp),
    "sequence": _clipped_ratio,
    "token": _clipped_ratio,
    "probability": lambda logp, batch, settings: logp.exp().clamp(min=settings.probability_floor),
}  # -> (B, 1) or (B, T)
KL_TERMS = {
    "none": lambda logp, batch: logp.new_zeros(len(logp)),
    "released": lambda logp, batch: _token_log_ratio(logp, batch).sum(1),  # N_ref - N
    "k3": _k3_kl,
}  # -> (B,)
RATIO_STATISTICS = {
    "none": lambda logp, batch, settings: {},
    "sequence": _ratio_statistics,
    "token": _ratio_statistics,
    "probability": _probability_statistics,
}
