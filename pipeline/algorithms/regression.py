"""Learning from fixed responses by regression: the log-ratio of a response is to be what its reward says it should be.

    loss = sum over sequences of  scale * (target - beta * lr)^2,  lr = ln pi - ln pi_ref of the response, with gradient

| method    | target            | scale |
|-----------|-------------------|-------|
| dro       | advantage         | 1/2   |
| qrpo      | quantile          | 1     |
| a_star_po | optimal_advantage | 1     |

All three look for the policy that makes E[r] - beta KL(pi, pi_ref) largest, for which beta lr = r - V*(prompt) holds
for every response, whoever wrote it: V*(x) = beta ln E_ref[exp(r / beta)].
- advantage: r - V(x), the expected reward in the place of V*. V* lies above it by about var(r) / (2 beta), so that all
  targets are too high by that, and E_ref[exp(target / beta)] > 1 asks for more probability than there is.
- optimal_advantage: r - V*(x), with V* of the rewards r_j of n responses of the reference to x:
  value_beta ln mean_j exp(r_j / value_beta); value_beta null: beta. With few samples V* is too low on average.
- quantile: q - beta ln Z, q in [0, 1] the share of the reference's n responses to x whose reward is at most r. q is
  uniform under the reference, whatever the reward's scale, so that Z = beta (exp(1 / beta) - 1) is known exactly, where
  rewards never tie and samples are many. Ties and few samples raise q, and all targets with it: at beta = 0.1 by 0.04
  (0.4 nats of the log-ratio) for 8 samples, by 0.10 where the row is one of 4, by 0.16 for rewards of 0 and 1 alone,
  half of each.

The square bounds the method: no row is pushed beyond its target, target / beta nats from the reference. Under Adam
`scale` and the factor beta of the gradient, -2 scale beta (target - beta lr), decide little but where it is clipped.

Sources, and where ours differs:
- dro: Richemond et al. (arXiv 2405.19107), loss 1/2 (r - V - tau lr)^2. Read in code that follows its Algorithm 1, and
  in the documentation of Tinker: A ln pi - tau/2 lr^2 is made large, which is this loss over tau. There V is learned
  jointly, by the same square, and so goes to V* as the policy improves; ours is the cached one of the reference, fixed.
- qrpo: Matrenok et al. (arXiv 2507.08068), and the authors' qrpo/trainers/qrpo.py, transform identity, loss mse. They
  drop the -1 of Z, which changes ln Z by 5e-5 at beta = 0.1 and by 0.15 at 0.5; ours is exact.
- a_star_po: Brantley et al. (arXiv 2505.20686), and the authors' code (ZhaolinGao/A-PO, apo/core_algos.py), which has
  two temperatures, 0.5 for V* and 0.001 in the loss, and learns from one new response per prompt and step. Ours learns
  from logged ones, with one temperature unless value_beta is set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.algorithms.functional import check_aligned, item_numbers, sequence_log_ratios
from pipeline.algorithms.stats import logged_stats, lowered_stats, mean_stat
from pipeline.records import Batch, Needs, Stat

MEAN_OVER = "sequences"
RESPONSES = "data"

NUMBERS = {  # the number of an item that the target is made of
    "advantage": "advantage",
    "optimal_advantage": "advantage",
    "quantile": "quantile",
}


@dataclass(frozen=True)
class Settings:
    """Which member of the family, and how far the policy may go."""

    target: Literal["advantage", "optimal_advantage", "quantile"]
    beta: float  # > 0, of the KL from the reference; the smaller, the further from it
    value_beta: float | None  # of V* in `optimal_advantage`; null: beta
    scale: float

    def __post_init__(self) -> None:
        if self.target not in NUMBERS:
            raise ValueError(f"target: {self.target!r}, wanted {', '.join(NUMBERS)}")
        for name in ("beta", "value_beta", "scale"):
            value = getattr(self, name)
            if not (value is None and name == "value_beta") and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: {value}, wanted a number > 0")


def needs(settings: Settings) -> Needs:
    """What has to be known of the data before training."""
    sampled = settings.target != "advantage"
    return Needs(
        rewards=True,
        values=not sampled,
        ref_logp=True,
        baseline="" if sampled else "value",
        samples=sampled,
    )


def sample_numbers(rewards: Tensor, samples: Tensor, settings: Settings) -> dict[str, Tensor]:
    """(m,) each: the numbers of m rows of one prompt, rewards (m,), by those of the reference's responses, (n,)."""
    if settings.target == "quantile":
        return {"quantile": quantile(rewards, samples)}
    beta = settings.beta if settings.value_beta is None else settings.value_beta
    return {"advantage": rewards - optimal_value(samples, beta)}


def quantile(rewards: Tensor, samples: Tensor) -> Tensor:
    """(m,) in [0, 1]: the share of `samples` (n,) that is at most each of `rewards` (m,)."""
    return (samples <= rewards[:, None]).to(rewards.dtype).mean(1)


def optimal_value(samples: Tensor, beta: float) -> Tensor:
    """() beta ln mean exp(samples / beta) of samples (n,): their mean for large beta, the largest for small."""
    return beta * ((samples / beta).logsumexp(0) - math.log(len(samples)))


def log_partition(beta: float) -> float:
    """ln of Z = beta (exp(1 / beta) - 1), the mean of exp(q / beta) over q uniform in [0, 1]; without overflow."""
    return math.log(beta) + 1 / beta + math.log(-math.expm1(-1 / beta))


def loss(logp: Tensor, batch: Batch, settings: Settings) -> tuple[Tensor, dict[str, Stat]]:
    """The sum of the sequences' losses, and its statistics; logp (B, T) is the policy's, aligned to response_ids.

    What lies under the mask and in fillers has no influence. Raises UserError naming the advantage, quantile
    or ref_logp that is missing or has a wrong shape.
    """
    check_aligned(logp, batch)
    rows = batch.sequence_mask
    target = item_numbers(batch, NUMBERS[settings.target], like=logp)  # (B,)
    if settings.target == "quantile":
        target = target - settings.beta * log_partition(settings.beta)
    implicit = settings.beta * sequence_log_ratios(logp, batch)  # (B,)
    gap = torch.where(rows, target - implicit, 0.0)
    per_sequence = settings.scale * gap.square()
    stats = logged_stats(logp, batch, per_sequence) | lowered_stats(logp, batch, target < 0)
    stats |= {
        "regression/target": mean_stat(target, rows),
        "regression/prediction": mean_stat(implicit, rows),
        "regression/error": mean_stat(gap.square(), rows),
    }
    return per_sequence.sum(), stats
