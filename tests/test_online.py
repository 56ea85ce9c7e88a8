"""Policy gradients on sampled responses, by hand: baselines, minimum risk, KL, penalties, weights, what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.algorithms import functional, online
from pipeline.algorithms.logits import smoothed_logps, token_logps
from pipeline.algorithms.online import GroupStats
from pipeline.algorithms.stats import reduce
from pipeline.models.policy import token_temperatures
from pipeline.records import Batch
from pipeline.rollout.allocation import Record, Sampler
from tests import tiny

F64 = torch.float64
BANDIT, REWARDS = torch.tensor([0.2, -0.1, 0.4], dtype=F64), torch.tensor([1.0, 0.0, 0.5], dtype=F64)


def settings(**changes: Any) -> online.Settings:
    """Those of algo=reinforce with `changes`."""
    return online.Settings(**{**tiny.settings("rl", "algo=reinforce").algorithm.settings, **changes})


def grouped(
    rewards: Sequence[float], logps: Sequence[float] | None = None, lengths: Sequence[float] | None = None
) -> GroupStats:
    usual = [1.0] * len(rewards)
    return GroupStats(
        *(torch.tensor(list(values), dtype=F64) for values in (rewards, logps or usual, lengths or usual))
    )


def listed(tensors: Sequence[Tensor]) -> list[list[float]]:
    return [tensor.tolist() for tensor in tensors]


def batch(logp: Tensor, lengths: Sequence[int], ref_logp: Tensor | None = None, **numbers: Sequence[float]) -> Batch:
    """A micro-batch of which only masks and numbers matter; a row of length 0 is a filler."""
    rows, width = logp.shape
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    items = tuple(i for i, length in enumerate(lengths) if length)
    usual = {"share": 1.0, "leads": 1.0, "target": 0.0, "behaviour": 0.0, "temperature": 1.0, "reward": 0.0}
    values = {name: [value] * len(items) for name, value in usual.items()} | {"advantage": [0.0] * len(items)} | numbers
    return Batch(
        items,
        torch.zeros(rows, width + 1, dtype=torch.int64),
        torch.ones(rows, width + 1, dtype=torch.bool),
        torch.ones(rows, dtype=torch.int64),
        torch.zeros(rows, width, dtype=torch.int64),
        mask,
        {name: torch.tensor(list(value), dtype=torch.float32) for name, value in values.items()},
        ref_logp,
    )


def loss_of(logp: Tensor, given: Batch, **changes: Any) -> Tensor:
    return online.loss(logp, given, settings(**changes))[0]


def gradient(logp: Tensor, given: Batch, **changes: Any) -> list[list[float]]:
    logp = logp.clone().requires_grad_()
    loss_of(logp, given, **changes).sum().backward()
    return logp.grad.tolist()


# baselines


def test_t11_leave_one_out() -> None:
    """1 - (0 + .5)/2 = .75; 0 - (1 + .5)/2 = -.75; .5 - (1 + 0)/2 = 0."""
    (found,) = online.advantages([grouped(REWARDS.tolist())], 99.0, settings())
    assert found.tolist() == pytest.approx([0.75, -0.75, 0.0])
    assert float(found.sum()) == 0.0


@pytest.mark.parametrize("queue, wanted", [(0.25, [0.75, -0.25]), (None, [0.5, -0.5])])
def test_t11_one_response_alone_is_compared_with_the_queue(queue: float | None, wanted: list[float]) -> None:
    """With an empty queue with the mean of the step, (1 + 0)/2."""
    found = online.advantages([grouped([1.0]), grouped([0.0])], queue, settings())
    assert listed(found) == [[wanted[0]], [wanted[1]]]


@pytest.mark.parametrize(
    "baseline, wanted",
    [
        ("queue", [0.75, -0.25, 0.25]),  # r - .25
        ("mean", [0.5, -0.5, 0.0]),  # r - .5
        ("group", [1.2247449, -1.2247449, 0.0]),  # over sqrt((.25 + .25 + 0)/3) = .4082483
    ],
)
def test_other_baselines(baseline: str, wanted: list[float]) -> None:
    (found,) = online.advantages([grouped(REWARDS.tolist())], 0.25, settings(baseline=baseline))
    assert found.tolist() == pytest.approx(wanted)


def test_t09_the_queue_is_first_in_first_out() -> None:
    """3, 4, 5, 6 are left of 1 .. 6: mean 4.5."""
    planner = Sampler(tiny.settings("rl", "algo=reinforce").sampler, tiny.V, 4)
    assert planner.mean_reward() is None
    planner.learn("a", Record(2.0, 0.0, 1.0), [1.0, 2.0, 3.0])
    before = planner.mean_reward()
    planner.learn("b", Record(5.0, 0.0, 1.0), [4.0, 5.0, 6.0])
    assert before == 2.0  # it was read before the push
    assert list(planner.rewards) == [3.0, 4.0, 5.0, 6.0]
    assert planner.mean_reward() == 4.5


def test_t09_an_empty_queue_is_the_steps_mean() -> None:
    """(1 + 3 + 8)/3 = 4."""
    found = online.advantages([grouped([1.0, 3.0]), grouped([8.0])], None, settings(baseline="queue"))
    assert listed(found) == [[-3.0, -1.0], [4.0]]


@pytest.mark.parametrize("objective", ["reinforce", "mrt"])
@pytest.mark.parametrize("baseline", ["queue", "mean", "leave_one_out", "group"])
def test_t17_equal_rewards_and_no_prompts(objective: str, baseline: str) -> None:
    """Compared with their own group they teach nothing; the queue knows other prompts."""
    chosen = settings(objective=objective, baseline=baseline)
    (found,) = online.advantages([grouped([0.1 + 0.2, 0.3], [-4.0, -9.0])], 0.3, chosen)  # .1 + .2 is a hair above .3
    assert found.tolist() == pytest.approx([0.0, 0.0], abs=1e-15)
    assert online.advantages([], None, chosen) == [] and online.shares([], "tokens") == []


# REINFORCE


@pytest.mark.parametrize("usual", [0.0, 0.5, 10.0])
def test_t10_the_expected_gradient_does_not_depend_on_the_baseline(usual: float) -> None:
    """sum_a p_a (r_a - b) (1[a] - p) = p (r - p . r) for any b: p = (.33759, .25009, .41232), p . r = .54375."""
    chosen, logits = settings(baseline="queue"), BANDIT.clone().requires_grad_()
    logps = logits.log_softmax(0)
    (advantages,) = online.advantages([grouped(REWARDS.tolist())], usual, chosen)
    given = batch(logps[:, None], [1, 1, 1], advantage=advantages.tolist(), share=logps.exp().tolist())
    loss_of(logps[:, None], given, baseline="queue")[0].backward()
    assert (-logits.grad).tolist() == pytest.approx([0.15402, -0.13599, -0.01804], abs=2e-5)


def test_t10_negative_advantages_have_a_gradient() -> None:
    """A = -1, token mean of two tokens: L = (s_1 + s_2)/2."""
    logp = torch.tensor([[-0.5], [-2.0]])
    given = batch(logp, [1, 1], advantage=[-1.0, -1.0], share=[0.5, 0.5])
    assert gradient(logp, given) == [[0.5], [0.5]]
    up = batch(logp, [1, 1], advantage=[1.0, 1.0], share=[0.5, 0.5])
    assert loss_of(logp + 0.1, up)[0] < loss_of(logp, up)[0]


# minimum risk training

CANDIDATES = grouped([0.8, 0.5, 0.2], [-10.0, -12.0, -14.0])


@pytest.mark.parametrize(
    "alpha, wanted",
    [(0.005, [-5.0164e-4, 3.33e-6, 4.9831e-4]), (1.0, [-0.038763, 0.029947, 0.008816])],
)
def test_t12_minimum_risk(alpha: float, wanted: list[float]) -> None:
    """dL/ds_j = - alpha q_j (r_j - sum q r); q = (.336672, .333322, .330006) or (.866813, .117310, .015876)."""
    chosen = settings(objective="mrt", alpha=alpha)
    (advantages,) = online.advantages([CANDIDATES], None, chosen)
    (shares,) = online.shares([CANDIDATES], "prompts")
    assert (-shares * advantages).tolist() == pytest.approx(wanted, rel=2e-4, abs=1e-8)
    tiny.close((shares * advantages).sum(), torch.zeros((), dtype=F64), of=shares * advantages)
    for other in (
        CANDIDATES._replace(rewards=CANDIDATES.rewards + 7.0),
        CANDIDATES._replace(logps=CANDIDATES.logps - 50.0),
    ):
        tiny.close(online.advantages([other], None, chosen)[0], advantages, of=(other.rewards, other.logps))


def test_t12_one_candidate_alone_has_no_gradient() -> None:
    assert listed(online.advantages([grouped([0.8], [-10.0])], 0.1, settings(objective="mrt"))) == [[0.0]]


@pytest.mark.parametrize("alpha", [0.005, 1.0])
def test_t13_minimum_risk_one_candidate_at_a_time(alpha: float) -> None:
    """Coefficients without gradient, then one response after the other: the gradient of - sum q r at once."""
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=F64)
    ids = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 6, 6, 1], [5, 4, 3, 2, 1]])
    rewards = torch.tensor([0.8, 0.5, 0.2], dtype=F64)

    def logps(of: Tensor) -> Tensor:
        return of.log_softmax(-1).gather(-1, ids[..., None])[..., 0]  # (3, 5)

    joint = logits.clone().requires_grad_()
    q = (alpha * logps(joint).sum(1)).softmax(0)
    (-(q * rewards).sum()).backward()

    apart = logits.clone().requires_grad_()
    group = GroupStats(rewards, logps(apart).sum(1).detach(), torch.full((3,), 5.0, dtype=F64))
    (advantages,) = online.advantages([group], None, settings(objective="mrt", alpha=alpha))
    for j in range(3):
        logp = logps(apart)[j : j + 1]
        given = batch(logp, [5], advantage=[0.0], share=[1 / 3])
        numbers = {**given.numbers, "advantage": advantages[j : j + 1], "share": torch.tensor([1 / 3], dtype=F64)}
        object.__setattr__(given, "numbers", numbers)  # float64, for the comparison's sake
        loss_of(logp, given, objective="mrt", alpha=alpha)[0].backward()
    tiny.close(apart.grad, joint.grad)


@pytest.mark.parametrize("objective, baseline", [("reinforce", "queue"), ("reinforce", "mean"), ("mrt", "queue")])
def test_t14_every_response_twice_is_the_same_gradient(objective: str, baseline: str) -> None:
    once, twice = coefficients(objective, baseline)
    assert twice == pytest.approx([*once, *once])


def test_t14_leave_one_out_rescales_the_prompt() -> None:
    """2 (k - 1)/(2k - 1) = 4/5 for k = 3."""
    once, twice = coefficients("reinforce", "leave_one_out")
    assert twice == pytest.approx([0.8 * value for value in (*once, *once)])


def coefficients(objective: str, baseline: str) -> tuple[list[float], list[float]]:
    """What each response's s is weighed by, with k = 3 and with all of them twice, whose weights are doubled."""
    chosen = settings(objective=objective, baseline=baseline, alpha=0.5)
    rewards, logps = [0.9, 0.5, 0.2], [-1.0, -2.0, -3.0]
    found = []
    for times in (1, 2):
        group = grouped(rewards * times, logps * times)
        (advantages,), (shares,) = online.advantages([group], 0.3, chosen), online.shares([group], "prompts")
        found.append((times * shares * advantages).tolist())
    return found[0], found[1]


# padding


def test_t04_padding_changes_nothing() -> None:
    """Pads of log-probability -12, and NaN, after one of two candidates with s = -5."""
    short = torch.tensor([[-2.0, -3.0], [-1.0, -4.0]])
    wide = torch.cat([short, torch.tensor([[-12.0, math.nan], [-12.0, -12.0]])], dim=1)
    numbers = {"advantage": [0.5, -0.25], "share": [0.5, 0.5]}
    assert loss_of(short, batch(short, [2, 2], **numbers))[0] == loss_of(wide, batch(wide, [2, 2], **numbers))[0]
    found = gradient(wide, batch(wide, [2, 2], **numbers))
    assert found == [[-0.25, -0.25, 0.0, 0.0], [0.125, 0.125, 0.0, 0.0]]  # - u A, and exactly 0 on pads


def test_t04_shares_of_candidates_do_not_see_pads() -> None:
    """q = (.5, .5), not (.470, .530): s is the sum over the response's own tokens."""
    mask = torch.tensor([[True, True, False, False], [True, True, False, False]])
    wide = torch.tensor([[-2.0, -3.0, -12.0, -12.0], [-1.0, -4.0, 0.0, 0.0]])
    s = functional.sequence_logp(wide, mask)
    assert s.tolist() == [-5.0, -5.0] and (0.005 * s).softmax(0).tolist() == [0.5, 0.5]
    assert (0.005 * wide.sum(1)).softmax(0).tolist() == pytest.approx([0.470, 0.530], abs=5e-4)  # what pads would do


# temperature


def test_t05_tempered_log_probabilities_row_by_row() -> None:
    """Logits (2, 1, 0): 2 - ln(e^2 + e + 1) = -.4076; at temperature .5 4 - ln(e^4 + e^2 + 1) = -.1429."""
    hidden, ids = torch.tensor([[2.0, 1.0, 0.0]]).expand(4, 3), torch.zeros(4, dtype=torch.int64)
    temperatures = torch.tensor([1.0, 0.5, 0.5, 1.0])
    for chunks in (1, 3):
        found = token_logps(hidden, lambda x: x, ids, chunks, temperatures)
        assert found.tolist() == pytest.approx([-0.4076, -0.1429, -0.1429, -0.4076], abs=5e-5)
        logps, means = smoothed_logps(hidden, lambda x: x, ids, chunks, temperatures)
        tiny.close(logps, found)
        assert means[:2].tolist() == pytest.approx([-1.4076, -2.1429], abs=5e-5)  # (2+1+0)/3 - 2.4076; (4+2+0)/3 - ...


def test_t05_each_token_has_the_temperature_of_its_row() -> None:
    given = batch(torch.zeros(3, 2), [2, 1, 0], temperature=[0.5, 2.0])
    assert token_temperatures(given).tolist() == [0.5, 0.5, 2.0]  # the filler has no token


# what a response weighs


def test_probes() -> None:
    """Of 4 responses the first 2 are probes, weighed for the 4 and 2 that the other one calls for: 1/4 and 1/2.

    The 2 later ones share the last quarter. Probes are compared with each other, the later ones with all others:
    1 - 0, 0 - 1, .4 - (1 + 0 + .8)/3 = -.2, .8 - (1 + 0 + .4)/3 = .3333.
    """
    group = grouped([1.0, 0.0, 0.4, 0.8])._replace(probed=(4, 2))
    assert online.shares([group], "prompts")[0].tolist() == [0.25, 0.5, 0.125, 0.125]
    (found,) = online.advantages([group], None, settings())
    assert found.tolist() == pytest.approx([1.0, -1.0, -0.2, 1 / 3])
    enough = grouped([1.0, 0.0])._replace(probed=(2, 2))
    assert online.shares([enough], "prompts")[0].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "mean_over, wanted",
    [
        ("prompts", [[0.5, 0.5], [1.0]]),  # 1/k
        ("sequences", [[2 / 3, 2 / 3], [2 / 3]]),  # N / 3 responses
        ("tokens", [[0.2, 0.2], [0.2]]),  # N / (1 + 3 + 6) tokens
    ],
)
def test_shares(mean_over: str, wanted: list[list[float]]) -> None:
    groups = [grouped([0.0, 1.0], lengths=[1.0, 3.0]), grouped([1.0], lengths=[6.0])]
    assert listed(online.shares(groups, mean_over)) == [pytest.approx(row) for row in wanted]


def test_rewards_are_shaped() -> None:
    """r - .5 k1 - .01 tokens - 2 where cut: 1 - .1 - .03 = .87; 1 + .2 - .05 - 2 = -.85."""
    chosen = settings(kl_beta=0.5, kl_in="reward", length_penalty=0.01, missing_eos_penalty=2.0)
    rewards, lengths = torch.tensor([1.0, 1.0], dtype=F64), torch.tensor([3.0, 5.0], dtype=F64)
    finished, kl = torch.tensor([True, False]), torch.tensor([0.2, -0.4], dtype=F64)
    assert online.shaped(rewards, lengths, finished, kl, chosen).tolist() == pytest.approx([0.87, -0.85])
    in_loss = settings(kl_beta=0.5, kl_in="loss")
    assert online.shaped(rewards, lengths, finished, kl, in_loss).tolist() == [1.0, 1.0]


# KL


def test_kl_in_the_loss() -> None:
    """A = 0, beta = .5, u = 1: .5 k3, z = ref - logp = -.2, -.4: e^-.2 - 1 + .2 = .018731, e^-.4 - 1 + .4 = .070320;
    d k3 / d logp = 1 - e^z; pads count nothing.
    """
    logp, ref = torch.tensor([[-0.5, -1.0, -9.0]]), torch.tensor([[-0.7, -1.4, 0.0]])
    given = batch(logp, [2], ref, advantage=[0.0])
    total, stats = online.loss(logp, given, settings(kl_beta=0.5))
    assert total.tolist() == pytest.approx([0.5 * 0.089051, 0.0], abs=1e-6)
    assert reduce(stats["objective/kl"]) == pytest.approx(0.089051, abs=1e-6)
    found = gradient(logp, given, kl_beta=0.5)
    assert found == [pytest.approx([0.5 * 0.181269, 0.5 * 0.329680, 0.0], abs=1e-6)]


def test_kl_in_the_reward_is_not_in_the_loss() -> None:
    logp, ref = torch.tensor([[-0.5, -1.0]]), torch.tensor([[-0.7, -1.4]])
    given = batch(logp, [2], ref, advantage=[0.0])
    assert loss_of(logp, given, kl_beta=0.5, kl_in="reward").tolist() == [0.0, 0.0]


def test_t16_the_kl_of_identical_policies_is_0_and_an_unknown_one_is_not_logged() -> None:
    logp = torch.tensor([[-0.5, -1.0]])
    stats = online.loss(logp, batch(logp, [2], logp.clone()), settings(kl_beta=0.1))[1]
    assert reduce(stats["objective/kl"]) == 0.0
    assert "objective/kl" not in online.loss(logp, batch(logp, [2]), settings())[1]


# references that are learned too


def test_the_likelihood_of_references_is_a_mean_of_its_own() -> None:
    """Row 0 is sampled, A u = .5; rows 1 and 2 are references of 2 and 1 tokens: L_MLE sums 1 + 2 + 3 = 6 over 3."""
    logp = torch.tensor([[-4.0, -5.0], [-1.0, -2.0], [-3.0, -7.0]])
    numbers = {"advantage": [0.5, 0.0, 0.0], "share": [1.0, 0.0, 0.0], "leads": [1.0, 0.0, 0.0]}
    given = batch(logp, [2, 2, 1], **numbers, target=[0.0, 1.0, 1.0])
    total, stats = online.loss(logp, given, settings(rl_weight=0.7, sft_weight=0.3))
    assert total.tolist() == pytest.approx([0.7 * 4.5, 0.3 * 6.0])  # - .5 * -9
    assert reduce(stats["loss"]) == pytest.approx(4.5) and reduce(stats["loss/mle"]) == pytest.approx(2.0)
    assert reduce(stats["logps/policy"]) == -9.0  # of what was sampled alone
    found = gradient(logp, given, rl_weight=0.7, sft_weight=0.3)
    assert found == [pytest.approx([-0.35, -0.35]), pytest.approx([-0.3, -0.3]), pytest.approx([-0.3, 0.0])]


def test_references_with_label_smoothing() -> None:
    """(1 - e) nll + e u with e = .1, u = - mean logp over the vocabulary = 2 and 3: .9 + .2 + 1.8 + .3 = 3.2."""
    logp, means = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -3.0]])
    given = batch(logp, [2], advantage=[0.0], share=[0.0], leads=[0.0], target=[1.0])
    chosen = settings(sft_weight=1.0, label_smoothing=0.1)
    assert online.needs(chosen).output == "smoothed"
    total, _ = online.loss((logp, means), given, chosen)
    assert total.tolist() == pytest.approx([0.0, 3.2])
    plain = online.loss(logp, given, settings(sft_weight=1.0))[0]
    assert plain.tolist() == [0.0, 3.0] and online.needs(settings(sft_weight=1.0)).output == "logp"


def test_a_filler_adds_nothing_and_backward_runs() -> None:
    logp = torch.tensor([[-1.0, math.nan]], requires_grad=True)
    given = batch(logp, [0])
    total, stats = online.loss(logp, given, settings(sft_weight=0.5))
    total.sum().backward()
    assert total.tolist() == [0.0, 0.0] and logp.grad.tolist() == [[0.0, 0.0]]
    assert all(float(stat.sums[0]) == 0 for stat in stats.values())


def test_the_gap_between_sampler_and_policy() -> None:
    """|s - behaviour| per token: |-4 + 3|/2 and |-3 + 3|/1, mean .25."""
    logp = torch.tensor([[-1.0, -3.0], [-3.0, 0.0]])
    stats = online.loss(logp, batch(logp, [2, 1], behaviour=[-3.0, -3.0]), settings())[1]
    assert reduce(stats["rollout/logp_gap"]) == pytest.approx(0.25)


# what is refused


@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({"rl_weight": 0.0, "sft_weight": 0.0}, "nothing would be learned"),
        ({"rl_weight": -1.0}, "rl_weight: -1.0, wanted a number >= 0"),
        ({"sft_weight": math.nan}, "sft_weight: nan, wanted"),
        ({"kl_beta": -0.1}, "kl_beta: -0.1"),
        ({"kl_beta": 0.1, "kl_form": "k1"}, "kl_form: k1 with kl_in: loss, .* wanted k3 there"),
        ({"kl_beta": 0.1, "kl_form": "k3", "kl_in": "reward"}, "kl_form: k3 with kl_in: reward, .* wanted k1 there"),
        ({"queue_size": 0}, "queue_size: 0, wanted at least 1"),
        ({"alpha": 0.0}, "alpha: 0.0, wanted a number > 0"),
        ({"label_smoothing": 1.0}, "label_smoothing: 1.0"),
    ],
)
def test_t18_settings_that_mean_nothing_are_refused(changes: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        settings(**changes)


def test_t18_what_needs_a_reference() -> None:
    assert not online.needs(settings()).ref_logp and online.needs(settings(kl_beta=0.1)).ref_logp


def test_a_missing_number_is_named() -> None:
    logp = torch.zeros(1, 1)
    given = batch(logp, [1])
    object.__setattr__(given, "numbers", {"share": torch.ones(1), "target": torch.zeros(1)})
    with pytest.raises(KeyError, match="advantage"):
        online.loss(logp, given, settings())
