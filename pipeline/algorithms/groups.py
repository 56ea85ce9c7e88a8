"""Learning from groups: of K scored responses to one prompt, those of higher reward become likelier than the others.

    lr = ln(pi / pi_ref) of the whole response, r its reward, per group of K rows:
    variance   1 / (K - 1) * sum_i (d_i - mean d)^2,   d = r - beta * lr
    nca        - sum_i softmax(r / alpha)_i ln sigmoid(beta * lr_i) - 1 / K * sum_i ln sigmoid(-beta * lr_i)

variance is AGRO's: under the optimum of E[r] - beta KL(pi, pi_ref) d is the same for all responses to a prompt, its
value, which then needs no model. Written as the mean over the pairs of rows of (d_i - d_j)^2 / 2, K = 2 is REBEL, which
regresses the difference of two rewards on that of the log-ratios: with eta = 1 / beta exactly one half of its loss
((lr_1 - lr_2) / eta - (r_1 - r_2))^2, for every pair of rows. The other half is a matter of the learning rate, and of
where `max_grad_norm` clips. Rows whose rewards are equal are drawn together; a constant added to the rewards of a
prompt changes nothing.

nca tells responses of higher reward from responses of the reference, each for itself, so that the likelihood of the
best one need not fall; its optimum is beta * lr = r / alpha + a constant of the prompt. At pi = pi_ref its gradient is
beta / 2 * (1 / K - softmax): rows that are worse than the rest fall.

Sources: Gao et al., "REBEL: Reinforcement Learning via Regressing Relative Rewards" (NeurIPS 2024, arXiv 2404.16767),
read: the authors' code, which has eta on the other side, (lr_1 - lr_2 - eta (r_1 - r_2))^2; Tang et al.,
"RL-Finetuning LLMs From On- and Off-Policy Data With a Single Algorithm" (AISTATS 2026, arXiv 2503.19612), read:
abstract, introduction and others' summaries of its theorem, so that the scale of the variance is ours; Chen et al.,
"Noise Contrastive Alignment of Language Models with Explicit Rewards" (NeurIPS 2024, arXiv 2402.05369), read: the
authors' code, without the 0.01 that it adds to the first response's reward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.algorithms.functional import item_numbers, log_ratios, masked_sum, sequence_logp
from pipeline.algorithms.stats import mean_stat
from pipeline.records import Batch, Needs, Stat

MEAN_OVER = "items"
RESPONSES = "groups"


@dataclass(frozen=True)
class Settings:
    """Which loss, of how many rows, and how far the policy may go."""

    objective: Literal["variance", "nca"]
    group_size: int  # K
    beta: float  # > 0; the smaller, the further from the reference
    alpha: float  # > 0, of nca: the smaller, the more the best row counts

    def __post_init__(self) -> None:
        if self.objective not in LOSSES:
            raise ValueError(f"objective: {self.objective!r}, wanted {', '.join(LOSSES)}")
        if self.group_size < 2:
            raise ValueError(
                f"group_size: {self.group_size}, wanted at least 2: one row has nothing to be compared with"
            )
        for name in ("beta", "alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)}, wanted a number > 0")


def needs(settings: Settings) -> Needs:
    """Rewards, and the reference's log-probabilities of all rows."""
    return Needs(rewards=True, ref_logp=True)


def reward_name(place: int) -> str:
    """The number of a group that is the reward of its row at `place`, from 0."""
    return f"reward_{place + 1}"


def loss(logp: Tensor, batch: Batch, settings: Settings) -> tuple[Tensor, dict[str, Stat]]:
    """The sum of the groups' losses, and its statistics.

    logp (B, T): all first rows of the groups, then all second ones in the same order ..., B = K * groups with fillers.
    What lies under the mask and in fillers has no influence. Raises UserError where a reward or ref_logp is missing or
    has another shape.
    """
    present, mask, k = batch.sequence_mask, batch.response_mask, settings.group_size
    assert logp.shape == mask.shape, f"logp: shape is {tuple(logp.shape)}, but response_mask has {tuple(mask.shape)}"
    assert len(logp) % k == 0, f"logp: {len(logp)} rows, wanted a multiple of {k}, the rows of a group"
    counted = present.view(k, -1).all(0)  # (G,)
    assert torch.equal(counted, present.view(k, -1).any(0)), "response_mask: a group lacks a response"
    implicit = settings.beta * of_groups(log_ratios(logp, batch), k)  # (G, K)
    rewards = torch.stack([item_numbers(batch, reward_name(i), like=logp[: len(counted)]) for i in range(k)], 1)
    per_group = LOSSES[settings.objective](implicit, rewards, settings)  # (G,)
    stats = {"loss": mean_stat(per_group, counted)} | _statistics(implicit, rewards, counted)
    return masked_sum(per_group, counted), stats | _likelihoods(logp, batch, rewards, counted)


def of_groups(values: Tensor, k: int) -> Tensor:
    """(G, K) of the rows (B,), as a batch has them."""
    return values.view(k, -1).T


def _variance(implicit: Tensor, rewards: Tensor, settings: Settings) -> Tensor:
    return (rewards - implicit).var(1)


def _nca(implicit: Tensor, rewards: Tensor, settings: Settings) -> Tensor:
    told = torch.softmax(rewards / settings.alpha, 1) * F.logsigmoid(implicit)
    return -told.sum(1) - F.logsigmoid(-implicit).mean(1)


@torch.no_grad()
def _statistics(implicit: Tensor, rewards: Tensor, counted: Tensor) -> dict[str, Stat]:
    """Of the implicit rewards beta * lr: chosen and rejected are the best and the worst row of a group whose rewards
    differ. A tie in a pair of rows of different reward counts as half right."""
    differ = counted & (rewards.amax(1) > rewards.amin(1))
    chosen, rejected = best_and_worst(implicit, rewards)
    better = rewards[:, :, None] > rewards[:, None, :]  # (G, K, K)
    gaps = implicit[:, :, None] - implicit[:, None, :]
    right = (gaps > 0).double() + 0.5 * (gaps == 0).double()
    return {
        "rewards/chosen": mean_stat(chosen, differ),
        "rewards/rejected": mean_stat(rejected, differ),
        "rewards/margins": mean_stat(chosen - rejected, differ),
        "rewards/accuracies": mean_stat(right, counted[:, None, None] & better),
        "groups/equal_rewards": mean_stat((~differ).double(), counted),
        "logged/reward": mean_stat(rewards, counted[:, None]),
    }


@torch.no_grad()
def _likelihoods(logp: Tensor, batch: Batch, rewards: Tensor, counted: Tensor) -> dict[str, Stat]:
    """Nats per response. Where logps/chosen falls too, the policy moves away from both, to what nobody has seen."""
    differ = counted & (rewards.amax(1) > rewards.amin(1))
    stats = {}
    for prefix, values in (("", logp), ("ref_", batch.ref_logp)):
        of_rows = of_groups(sequence_logp(values, batch.response_mask), rewards.shape[1])
        chosen, rejected = best_and_worst(of_rows, rewards)
        stats[f"logps/{prefix}chosen"] = mean_stat(chosen, differ)
        stats[f"logps/{prefix}rejected"] = mean_stat(rejected, differ)
    return stats


def best_and_worst(values: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """(G,) each of the values (G, K): those of the rows of highest and of lowest reward, of equals of the first."""
    best, worst = rewards.argmax(1, keepdim=True), rewards.argmin(1, keepdim=True)
    return values.gather(1, best)[:, 0], values.gather(1, worst)[:, 0]


LOSSES = {"variance": _variance, "nca": _nca}
