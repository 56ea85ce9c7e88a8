"""What the estimates are estimates of: every outcome of a tiny policy is gone through, weighed by its probability.

The policy says one token or two, of 0, 1 and EOS: seven responses. Its parameters are the logits of its three contexts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.algorithms import offline, online
from pipeline.records import Batch, Example, Response, SampleStats
from pipeline.rollout.allocation import Allocation
from pipeline.rollout.groups import Group, records_of_others, valued
from tests.test_capability import sampler
from tests.test_online import batch, settings

F64, EOS = torch.float64, 2
RESPONSES = [(EOS,), *((a, b) for a in (0, 1) for b in (0, 1, EOS))]
POLICY = torch.tensor([[0.3, -0.2, 0.1], [1.5, 0.0, -1.0], [0.2, 0.1, 0.0]], dtype=F64)  # after nothing, 0, 1
REFERENCE = torch.tensor([[0.0, 0.5, -0.3], [0.2, 0.8, 0.1], [1.0, -1.0, 0.0]], dtype=F64)
REWARDS = [0.3, 1.0, 0.0, 0.4, 0.9, -0.5, 0.2]


def context(ids: Sequence[int]) -> int:
    """Which row of logits predicts the token after `ids`."""
    return 0 if not ids else 1 + ids[0]


def token_logps(logits: Tensor) -> Tensor:
    """(7, 2), 0 after the end."""
    rows = logits.log_softmax(1)
    none = rows.new_zeros(())
    return torch.stack(
        [torch.stack([*(rows[context(y[:t]), y[t]] for t in range(len(y))), none][:2]) for y in RESPONSES]
    )


def entropy(logits: Tensor, ids: Sequence[int]) -> float:
    """Mean nats per token."""
    each = torch.special.entr(logits.softmax(1)).sum(1)
    return float(sum(each[context(ids[:t])] for t in range(len(ids))) / len(ids))


LOGPS, REF_LOGPS = token_logps(POLICY), token_logps(REFERENCE)
SHARES = LOGPS.sum(1).exp()
ENTROPIES = [entropy(POLICY, y) for y in RESPONSES]


def kl_of(logits: Tensor) -> Tensor:
    """KL(policy, reference) of whole responses."""
    logps = token_logps(logits).sum(1)
    return (logps.exp() * (logps - REF_LOGPS.sum(1))).sum()


def kl_to_policy_of(logits: Tensor, prefixes: Tensor) -> Tensor:
    """KL(reference, policy) of each token, after prefixes of the policy of `prefixes`."""
    rows, ref = logits.log_softmax(1), REFERENCE.log_softmax(1)
    met = torch.cat([torch.ones(1, dtype=F64), prefixes.softmax(1)[0, :2]])  # how often each context comes
    return (met[:, None] * ref.exp() * (ref - rows)).sum()


def mean_reward_of(logits: Tensor) -> Tensor:
    return (token_logps(logits).sum(1).exp() * torch.tensor(REWARDS, dtype=F64)).sum()


def slope(function: Callable[[Tensor], Tensor], at: Tensor = POLICY) -> Tensor:
    """The gradient with respect to the logits."""
    logits = at.clone().requires_grad_()
    function(logits).backward()
    return logits.grad


def group(places: Sequence[int], allocation: Allocation | None = None, rewards: Sequence[float] = REWARDS) -> Group:
    """A prompt whose responses are those at `places`."""
    responses = []
    for i in places:
        ids = RESPONSES[i]
        stats = SampleStats(LOGPS[i, : len(ids)], ENTROPIES[i], 1.0, 1.0, 0)
        responses.append(Response(Example("a", "?"), "?", "", (1,), ids, ids[-1] == EOS, stats))
    raw = tuple(rewards[i] for i in places)
    return Group(Example("a", "?"), (1,), "a", allocation or Allocation(len(places), 1.0, None), tuple(responses), raw)


def outcomes(count: int) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Every way to draw `count` responses, with its probability."""
    for places in itertools.product(range(len(RESPONSES)), repeat=count):
        yield float(SHARES[list(places)].prod()), places


def expected(groups: Sequence[tuple[float, Group]], with_reference: bool = False, **changes: Any) -> Tensor:
    """The mean over these groups, each with its probability, of the gradient of sum_j u_j A_j s_j, as sampled."""
    chosen, factors = settings(**changes), torch.zeros(len(RESPONSES), dtype=F64)
    for probability, one in groups:
        ids = [response.response_ids for response in one.responses]
        refs = [REF_LOGPS[RESPONSES.index(y), : len(y)] for y in ids] if with_reference else []
        (known,) = valued([one], refs, 0.25, chosen)
        for y, advantage, share in zip(ids, known.advantages, known.weights, strict=True):
            factors[RESPONSES.index(y)] += probability * advantage * share
    return slope(lambda logits: (factors * token_logps(logits).sum(1)).sum())


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert float(wanted.abs().max()) > 0.01


# baselines


@pytest.mark.parametrize("baseline, factor", [("queue", 1.0), ("leave_one_out", 1.0), ("mean", 2 / 3)])
def test_the_gradient_of_the_mean_reward(baseline: str, factor: float) -> None:
    """With the mean of three, the response's own reward included, 2/3 of it."""
    groups = [(p, group(places)) for p, places in outcomes(3)]
    same(expected(groups, baseline=baseline), factor * slope(mean_reward_of))


# probes


def probed() -> list[tuple[float, Group]]:
    """Two probes; then as many more as they call for, 0 to 2: their entropies are .88, 1.08 or 1.09 nats."""
    planner, found = sampler(k_min=2, k_max=4, k=4, probe=2, entropy_range=[0.87, 1.08]), []
    for p, places in outcomes(2):
        first = group(places)
        allocation = planner.after_probe(records_of_others(first))
        for q, more in outcomes(allocation.k - 2):
            found.append((p * q, group((*places, *more), allocation)))
    assert {one.allocation.k for _, one in found} == {2, 3, 4}
    return found


@pytest.mark.parametrize("baseline", ["queue", "leave_one_out"])
def test_probes_do_not_bias_the_gradient(baseline: str) -> None:
    same(expected(probed(), baseline=baseline), slope(mean_reward_of))


def test_weighing_all_responses_alike_after_a_probe_would_be_seen() -> None:
    """What is unsure comes with more others, and would weigh less for it."""
    alike = [(p, replace(one, allocation=one.allocation._replace(probed=()))) for p, one in probed()]
    wanted = slope(mean_reward_of)
    assert float((expected(alike) - wanted).norm() / wanted.norm()) > 0.05


# KL


def responses_of(logps: Tensor, shares: Tensor) -> Batch:
    """All responses, each with its probability as its share."""
    lengths = [len(y) for y in RESPONSES]
    return batch(logps, lengths, REF_LOGPS.to(logps), share=shares.tolist(), advantage=[0.0] * 7)


def test_k1_in_the_reward_pulls_to_the_reference() -> None:
    """Exactly - beta times the gradient of KL(policy, reference); every raw reward is 0, and compared with another."""
    groups = [(p, group(places, rewards=[0.0] * 7)) for p, places in outcomes(2)]
    same(expected(groups, with_reference=True, kl_beta=0.5, kl_in="reward"), -0.5 * slope(kl_of))


def test_k3_in_the_loss_pulls_to_the_reference_token_by_token() -> None:
    def loss(logits: Tensor) -> Tensor:
        logps = token_logps(logits)
        return online.loss(logps, responses_of(logps, SHARES), settings(kl_beta=0.5))[0][0]

    same(slope(loss), 0.5 * slope(lambda logits: kl_to_policy_of(logits, POLICY)))


def test_what_is_refused_has_no_pull() -> None:
    """k1 in the loss: zero. k3 in the reward: that of a difference of two KL, which fades near the reference."""
    k1 = slope(lambda logits: (SHARES * (token_logps(logits) - REF_LOGPS).sum(1)).sum())
    assert float(k1.abs().max()) < 1e-12
    near = REFERENCE + 0.05 * (POLICY - REFERENCE)
    logps = token_logps(near)
    gap = REF_LOGPS - logps
    k3 = (gap.exp() - 1 - gap).sum(1)
    pulled = slope(lambda logits: (logps.sum(1).exp() * k3 * token_logps(logits).sum(1)).sum(), near)
    wanted = slope(kl_of, near)
    assert float((pulled * wanted).sum() / wanted.square().sum()) < 0.05


@pytest.mark.parametrize("form, sign", [("k3", 1.0), ("released", -1.0)])
def test_kl_on_logged_responses(form: str, sign: float) -> None:
    """Of the reference itself: k3 pulls the policy to it along its prefixes; the released form pushes it away."""
    chosen = offline.Settings("one", "none", None, 0.0, 0.5, form, "value", 0.0, 1.0, 20.0, "bound")
    ref_shares = REF_LOGPS.sum(1).exp()

    def loss(logits: Tensor) -> Tensor:
        logps = token_logps(logits)
        given = responses_of(logps, SHARES)
        per_response = offline.KL_TERMS[chosen.kl_form](logps, given)
        return chosen.kl_beta * (ref_shares * per_response).sum()

    same(slope(loss), sign * 0.5 * slope(lambda logits: kl_to_policy_of(logits, REFERENCE)))
