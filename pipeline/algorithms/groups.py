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

from pipeline.algorithms.functional import check_aligned, item_numbers, masked_sum, sequence_log_ratios, whole_groups
from pipeline.algorithms.stats import mean_stat, right, side_stats
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
    check_aligned(logp, batch)
    k, counted = settings.group_size, whole_groups(batch, settings.group_size)  # (G,)
    implicit = settings.beta * sequence_log_ratios(logp, batch)  # (B,)
    rewards = torch.stack([item_numbers(batch, reward_name(i), like=logp[: len(counted)]) for i in range(k)], 1)
    per_group = LOSSES[settings.objective](of_groups(implicit, k), rewards, settings)  # (G,)
    stats = {"loss": mean_stat(per_group, counted)} | _statistics(logp, batch, implicit, rewards, counted)
    return masked_sum(per_group, counted), stats


def of_groups(values: Tensor, k: int) -> Tensor:
    """(G, K) of the rows (B,), as a batch has them."""
    return values.view(k, -1).T


def _variance(implicit: Tensor, rewards: Tensor, settings: Settings) -> Tensor:
    return (rewards - implicit).var(1)


def _nca(implicit: Tensor, rewards: Tensor, settings: Settings) -> Tensor:
    told = torch.softmax(rewards / settings.alpha, 1) * F.logsigmoid(implicit)
    return -told.sum(1) - F.logsigmoid(-implicit).mean(1)


@torch.no_grad()
def _statistics(logp: Tensor, batch: Batch, implicit: Tensor, rewards: Tensor, counted: Tensor) -> dict[str, Stat]:
    """Of implicit rewards (B,) by rewards (G, K). Chosen and rejected are the best and the worst row of a group whose
    rewards differ; rewards/accuracies are of all pairs of rows of different reward."""
    k, differ = rewards.shape[1], counted & (rewards.amax(1) > rewards.amin(1))
    rows = of_groups(implicit, k)  # (G, K)

    def sides(of_rows: Tensor) -> tuple[Tensor, Tensor]:
        return best_and_worst(of_groups(of_rows, k), rewards)

    chosen, rejected = sides(implicit)
    better = rewards[:, :, None] > rewards[:, None, :]  # (G, K, K)
    ordered = right(rows[:, :, None], rows[:, None, :])
    return {
        **side_stats(implicit, logp, batch, sides, (differ, differ)),
        "rewards/margins": mean_stat(chosen - rejected, differ),
        "rewards/accuracies": mean_stat(ordered, counted[:, None, None] & better),
        "groups/equal_rewards": mean_stat((~differ).double(), counted),
        "logged/reward": mean_stat(rewards, counted[:, None]),
    }


def best_and_worst(values: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """(G,) each of the values (G, K): those of the rows of highest and of lowest reward, of equals of the first."""
    best, worst = rewards.argmax(1, keepdim=True), rewards.argmin(1, keepdim=True)
    return values.gather(1, best)[:, 0], values.gather(1, worst)[:, 0]


LOSSES = {"variance": _variance, "nca": _nca}
