"""Policy gradients on responses sampled from the policy: one formula, a number for each response and its likelihood.

    L = rl_weight * L_RL + sft_weight * L_MLE
    L_RL  = - (1/N) sum over prompts i, responses j of  u_ij A_ij s_ij,   s = sum over the response of logp_t
    L_MLE =   mean over tokens of the references of  (1 - e) * nll_t + e * (- mean over the vocabulary of logp)

Ids that the sampler never draws have no probability here either, and are no part of the vocabulary. A and u carry no
gradient. N counts prompts that have responses, k_i those of prompt i.

| objective | baseline      | A_ij                                                            |
|-----------|---------------|-----------------------------------------------------------------|
| reinforce | queue         | R_ij - mean of the last rewards of earlier steps                |
| reinforce | mean          | R_ij - mean over the prompt's responses, its own included       |
| reinforce | leave_one_out | R_ij - mean of the others; queue where there is only one        |
| reinforce | group         | as mean, divided by the rewards' standard deviation             |
| mrt       |               | alpha k_i q_ij (R_ij - sum_l q_il R_il), q_i = softmax(alpha s_i) |

| mean_over | u_ij          | so that                                                         |
|-----------|---------------|-----------------------------------------------------------------|
| prompts   | 1 / k_i       | each prompt weighs the same: more samples change the noise only |
| sequences | N / sum of k  | each response weighs the same                                   |
| tokens    | N / tokens    | each token weighs the same                                      |

R = r - kl_beta k1 (kl_in: reward) - length_penalty * tokens - missing_eos_penalty where the response was cut off.

Two estimates of KL(policy, reference) from a sampled response, k1 = s - s_ref and k3 = sum_t e^z - 1 - z with
z = ref_logp - logp, and two places for them. What counts is the mean of the gradient, not of the estimate:

| kl_in  | form | mean of the gradient                                                                      |
|--------|------|-------------------------------------------------------------------------------------------|
| reward | k1   | that of KL(policy, reference), exactly                                                    |
| reward | k3   | that of KL(policy, reference) - KL(reference, policy): no pull near the reference; refused |
| loss   | k3   | that of KL(reference, policy) of each token after the policy's own prefixes               |
| loss   | k1   | zero; refused                                                                             |

k3 in the loss adds kl_beta u_ij k3 to L_RL; it pulls back from both sides, but does not see that a token leads to other
prefixes.

Expectations: L_RL has the gradient of the mean reward with queue and leave_one_out, and (k - 1)/k of it with mean;
group and mrt are other objectives. Where the queue is empty, at the first step, the mean that stands in for it holds
the response's own reward. With `sequences` and `tokens` the divisor is random: this then holds as steps grow.

Where some of a prompt's responses are probes, whose look decides how many more there are, neither what a probe is
compared with nor its weight may depend on that number. A probe is compared with the other probes, and u is 1 / k', k'
the number that the other probes call for; the rest of the prompt's weight belongs to the responses drawn afterwards.

Sources: Williams (1992), REINFORCE; Kool et al. (2019), leave_one_out; Shen et al., "Minimum Risk Training for Neural
Machine Translation" (ACL 2016), mrt, here with its gradient written out, so that micro-batches may part a prompt's
responses; Schulman (2020), k1 and k3. Ours: the weights of probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.algorithms import functional
from pipeline.algorithms.stats import mean_stat, std_stat
from pipeline.records import Batch, Needs, Stat

MEAN_OVER = ("prompts", "targets")  # of L_RL, of L_MLE
RESPONSES = "policy"


@dataclass(frozen=True)
class Settings:
    """Which member of the family."""

    objective: Literal["reinforce", "mrt"]
    baseline: Literal["queue", "mean", "leave_one_out", "group"]
    queue_size: int  # rewards of earlier steps, for the baseline
    alpha: float  # of mrt: how much sharper q is than the policy
    mean_over: Literal["prompts", "sequences", "tokens"]
    rl_weight: float
    sft_weight: float
    label_smoothing: float
    kl_beta: float
    kl_in: Literal["reward", "loss"]
    kl_form: Literal["k1", "k3"] | None  # null: the one that pulls there, k1 in the reward and k3 in the loss
    length_penalty: float  # taken off the reward for each token
    missing_eos_penalty: float  # taken off the reward of a response that was cut off

    def __post_init__(self) -> None:
        for name in ("rl_weight", "sft_weight", "kl_beta"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)}, wanted a number >= 0")
        if self.rl_weight == 0 and self.sft_weight == 0:
            raise ValueError("rl_weight: 0, and sft_weight is 0 too, wanted one above 0: nothing would be learned")
        if self.queue_size < 1:
            raise ValueError(f"queue_size: {self.queue_size}, wanted at least 1")
        if not self.alpha > 0:
            raise ValueError(f"alpha: {self.alpha}, wanted a number > 0")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: {self.label_smoothing}, wanted a number in [0, 1)")
        wanted = {"reward": "k1", "loss": "k3"}[self.kl_in]
        if self.kl_beta > 0 and self.kl_form not in (None, wanted):
            raise ValueError(
                f"kl_form: {self.kl_form} with kl_in: {self.kl_in}, where it has no pull to the reference, wanted "
                f"{wanted} there (or null, which is that)"
            )


def needs(settings: Settings) -> Needs:
    """Reference log-probabilities of the sampled responses where a KL term wants them."""
    smoothed = settings.sft_weight > 0 and settings.label_smoothing > 0
    return Needs(ref_logp=settings.kl_beta > 0, output="smoothed" if smoothed else "logp")


class GroupStats(NamedTuple):
    """Of one prompt's k responses, (k,) float64 each."""

    rewards: Tensor  # R, as `shaped` makes them
    logps: Tensor  # s
    lengths: Tensor  # tokens
    probed: tuple[int, ...] = ()  # of each probe, which come first: how many responses the other probes call for


def shaped(rewards: Tensor, lengths: Tensor, finished: Tensor, kl: Tensor, settings: Settings) -> Tensor:
    """R (k,) from raw rewards r, tokens, whether EOS came (bool), and the responses' k1, which is 0 where unknown."""
    cut = settings.missing_eos_penalty * (~finished).double()
    taken = settings.kl_beta * kl if settings.kl_in == "reward" else torch.zeros_like(rewards)
    return rewards - taken - settings.length_penalty * lengths - cut


def advantages(groups: Sequence[GroupStats], queue_mean: float | None, settings: Settings) -> list[Tensor]:
    """A, (k_i,) float64 for each prompt; queue_mean is None before anything was pushed: this step's mean stands in."""
    if not groups:
        return []
    usual = queue_mean if queue_mean is not None else float(torch.cat([group.rewards for group in groups]).mean())
    if settings.objective == "mrt":
        return [_minimum_risk(group, settings.alpha) for group in groups]
    return [_compared(group, settings.baseline, usual) for group in groups]


def _compared(group: GroupStats, baseline: str, usual: float) -> Tensor:
    rewards, probes = group.rewards, len(group.probed)
    alone = len(rewards) == 1 and baseline == "leave_one_out"
    if baseline == "queue" or alone:
        return rewards - usual
    compared = functional.group_advantages(rewards[None], baseline)[0]
    if not probes:
        return compared
    return torch.cat([functional.group_advantages(rewards[None, :probes], baseline)[0], compared[probes:]])


def _minimum_risk(group: GroupStats, alpha: float) -> Tensor:
    """alpha k q (R - sum q R): with u = 1/k the gradient of - sum q R, for any k; 0 for k = 1 and for equal rewards."""
    shares = (alpha * group.logps).softmax(0)
    centred = group.rewards - (shares * group.rewards).sum()
    spread = group.rewards.max() - group.rewards.min()
    return torch.where(spread > functional.EQUAL_REWARDS, alpha * len(shares) * shares * centred, 0.0)


def shares(groups: Sequence[GroupStats], mean_over: str) -> list[Tensor]:
    """u, (k_i,) float64 for each prompt."""
    counts = [len(group.rewards) for group in groups]
    if mean_over == "prompts":
        return [_of_one(k, group.probed) for k, group in zip(counts, groups, strict=True)]
    total = sum(counts) if mean_over == "sequences" else float(sum(group.lengths.sum() for group in groups))
    return [torch.full((k,), len(groups) / total, dtype=torch.float64) for k in counts]


def _of_one(k: int, probed: tuple[int, ...]) -> Tensor:
    """(k,) shares of one prompt, which sum to 1."""
    probes, later = 1.0 / torch.tensor(probed, dtype=torch.float64), k - len(probed)
    return torch.cat([probes, ((1.0 - probes.sum()) / max(later, 1)).expand(later)])


def loss(output: Tensor | tuple[Tensor, Tensor], batch: Batch, settings: Settings) -> tuple[Tensor, dict[str, Stat]]:
    """(2,): the sums of rl_weight * L_RL over prompts and of sft_weight * L_MLE over tokens; and their statistics.

    output: logp (B, T); with label smoothing the mean log-probability over the vocabulary (B, T) beside it.
    `batch.numbers`: advantage A, share u, reward R; leads, 1 for a prompt's first response; behaviour, the s that the
    sampler saw; target, 1 for a reference that is learned by likelihood, whose other numbers are 0.
    """
    logp, means = output if isinstance(output, tuple) else (output, None)
    mask, present = batch.response_mask, batch.sequence_mask
    number = {name: functional.item_numbers(batch, name, like=logp) for name in batch.numbers}  # (B,) each
    sampled = present & (number["target"] == 0)  # the others are references
    whole = functional.sequence_logp(logp, mask)
    per_sequence = -number["share"] * number["advantage"] * whole
    known = {}
    if batch.ref_logp is not None:
        divergences = torch.where(mask, functional.k3(batch.ref_logp - torch.where(mask, logp, 0.0)), 0.0).sum(1)
        known["objective/kl"] = mean_stat(divergences, sampled)
        if settings.kl_in == "loss":
            per_sequence = per_sequence + settings.kl_beta * number["share"] * divergences
    learned = mask & (present & (number["target"] > 0))[:, None]
    smoothed = functional.smoothed_nll(logp, logp if means is None else means, learned, settings.label_smoothing)
    rl, mle = torch.where(sampled, per_sequence, 0.0).sum(), smoothed.sum()
    if settings.sft_weight > 0:
        known["loss/mle"] = mean_stat(smoothed, learned)
    stats = {"loss": _over(rl, number["leads"].sum()), **known, **_statistics(whole, number, mask, sampled)}
    return torch.stack([settings.rl_weight * rl, settings.sft_weight * mle]), stats


def _over(total: Tensor, count: Tensor) -> Stat:
    """The mean of a sum over `count` terms, as an additive record."""
    return Stat("mean", torch.stack([count.double(), total.detach().double(), torch.zeros_like(count).double()]))


def _statistics(whole: Tensor, number: dict[str, Tensor], mask: Tensor, sampled: Tensor) -> dict[str, Stat]:
    """Of the sampled sequences. rollout/logp_gap: nats per token between the sampler and the pass with gradient."""
    lengths = mask.sum(1)
    gap = (whole.detach() - number["behaviour"]).abs() / lengths.clamp(min=1)
    return {
        "logps/policy": mean_stat(whole, sampled),
        "rollout/logp_gap": mean_stat(gap, sampled),
        "advantage/std": std_stat(number["advantage"], sampled),
        "reward": mean_stat(number["reward"], sampled),
        "reward_std": std_stat(number["reward"], sampled),
        "completions/mean_length": mean_stat(lengths.double(), sampled),
    }
