"""The semi-offline loss: golden numbers, the pairwise form, the closed gradient, its expectation by enumeration."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from pipeline.algorithms import semi_offline
from pipeline.algorithms.functional import group_advantages
from pipeline.algorithms.logits import Drawn, draw_tokens, smoothed_logps
from pipeline.algorithms.stats import reduce as reduced
from pipeline.records import Batch, StaticBatch
from tests import tiny

SETTINGS = semi_offline.Settings(samples=4, rl_weight=1.0, baseline="mean", length_penalty=1.0, label_smoothing=0.0)
LOGITS = ((2.0, 1.0, 0.0, -1.0), (0.0, 0.5, 1.0, 0.0))  # at the two masked tokens
IDS = ((0, 1, 0, 2), (2, 2, 1, 0))
REWARDS = (1.0, 0.5, 0.25, 0.25)  # mean 0.5: advantages (0.5, 0, -0.25, -0.25)


def golden_logits() -> torch.Tensor:
    return torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)


def batch(rewards: torch.Tensor, masked: torch.Tensor, vocabulary: int = 4) -> Batch:
    """Sequences with the masked tokens of `masked` (B, S) and a reference of one token each, of log-probability 0."""
    size, width = masked.shape
    ids = torch.zeros(size, width, dtype=torch.long)
    static = StaticBatch(
        ids=ids,
        shown_ids=ids,
        mask=torch.ones_like(masked),
        masked=masked,
        uniforms=torch.zeros(int(masked.sum()), rewards.shape[1]),
        suppressed=torch.zeros(vocabulary, dtype=torch.bool),
        rewards=rewards,
    )
    one = torch.ones(size, 1, dtype=torch.bool)
    return Batch(tuple(range(size)), ids[:, :1], one, torch.ones(size), ids[:, :1], one, static=static)


GOLDEN = batch(torch.tensor([REWARDS], dtype=torch.float64), torch.tensor([[False, True, True]]))


def rl_loss(logp: torch.Tensor, given: Batch, settings: semi_offline.Settings = SETTINGS) -> torch.Tensor:
    """The first of the two sums; logp (M, n) of the drawn tokens."""
    nothing = torch.zeros(given.response_mask.shape, dtype=torch.float64)
    count = logp.shape[0]
    ids, greedy, entropy = torch.zeros(logp.shape).long(), torch.zeros(count).long(), torch.zeros(count)
    totals, _ = semi_offline.loss((nothing, nothing, logp, ids, greedy, entropy), given, settings)
    return totals[0]


def drawn_logp(logits: torch.Tensor, ids: tuple = IDS) -> torch.Tensor:
    return logits.log_softmax(-1).gather(1, torch.tensor(ids))


@pytest.mark.parametrize(
    ("baseline", "value", "first", "second"),
    [
        ("mean", -0.437500, (-0.125, 0.0, 0.125, 0.0), (0.125, 0.125, -0.25, 0.0)),
        ("leave_one_out", -0.583333, (-1 / 6, 0.0, 1 / 6, 0.0), (1 / 6, 1 / 6, -1 / 3, 0.0)),
    ],
)
def test_golden_loss_and_gradient(baseline: str, value: float, first: tuple, second: tuple) -> None:
    settings = replace(SETTINGS, baseline=baseline)
    for normalised in (True, False):  # every normaliser cancels
        logits = golden_logits()
        logp = drawn_logp(logits) if normalised else logits.gather(1, torch.tensor(IDS))
        loss = rl_loss(logp, GOLDEN, settings)
        loss.backward()
        assert float(loss) == pytest.approx(value, abs=1e-6)
        torch.testing.assert_close(logits.grad, torch.tensor([first, second], dtype=torch.float64), atol=1e-6, rtol=0)


def test_group_advantages() -> None:
    """Deviations (0.5, 0, -0.25, -0.25): variance (0.25 + 0 + 0.0625 + 0.0625) / 4 = 0.09375, root 0.306186."""
    found = group_advantages(torch.tensor([REWARDS]), "group")
    torch.testing.assert_close(found, torch.tensor([[1.632993, 0.0, -0.816497, -0.816497]]))


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "group"])
def test_only_differences_of_rewards_count(baseline: str) -> None:
    rewards = torch.tensor([REWARDS, (3.0, 1.0, 2.0, 0.0)])
    found = group_advantages(rewards, baseline)
    tiny.close(found.sum(1), torch.zeros(2), 8, of=found)
    tiny.close(group_advantages(rewards + 7.0, baseline), found, 8, of=rewards + 7.0)
    assert not group_advantages(torch.full((2, 4), 0.1), baseline).any()
    scaled = group_advantages(rewards * 3.0, baseline)
    tiny.close(scaled, found if baseline == "group" else found * 3.0)


def test_pairwise_form_is_the_closed_form() -> None:
    """Released: -(1/B) sum_b sum_ij c_i (R_i - R_j) with c_i = logp_i / (l n); ours is B times that."""
    generator = torch.Generator().manual_seed(0)
    masked = torch.rand(3, 5, generator=generator) < 0.5
    n, count = 6, int(masked.sum())
    rewards = torch.rand(3, n, generator=generator, dtype=torch.float64)
    logits = torch.randn(count, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(7, (count, n), generator=generator)
    given = batch(rewards, masked)
    settings = replace(SETTINGS, samples=n)
    ours = rl_loss(logits.log_softmax(-1).gather(1, ids), given, settings)
    gradient = torch.autograd.grad(ours, logits)[0]

    logp, first, pairwise = logits.log_softmax(-1).gather(1, ids), 0, 0.0
    for b in range(3):
        length = int(masked[b].sum())
        c = logp[first : first + length].sum(0) / (length * n)
        first += length
        pairwise = pairwise - sum(c[i] * (rewards[b, i] - rewards[b, j]) for i in range(n) for j in range(n))
    tiny.close(ours, pairwise)
    tiny.close(gradient, torch.autograd.grad(pairwise, logits)[0])


@pytest.mark.parametrize(("baseline", "factor"), [("mean", 2.0), ("leave_one_out", 3.0)])
def test_expected_gradient_by_enumeration(baseline: str, factor: float) -> None:
    """V = 2, two masked tokens, n = 3: E[grad L] = -(n-1)/l grad E[R], with leave_one_out -n/l; l = 2."""
    logits = torch.tensor([[0.3, -0.2], [0.1, 0.9]], dtype=torch.float64, requires_grad=True)
    probabilities = logits.softmax(-1)
    texts = list(itertools.product(range(2), repeat=2))
    reward = {text: [0.1, 0.7, 0.4, 1.3][i] for i, text in enumerate(texts)}
    chance = {text: probabilities[0, text[0]] * probabilities[1, text[1]] for text in texts}
    expected_reward = sum(chance[text] * reward[text] for text in texts)
    wanted = -(factor / 2) * torch.autograd.grad(expected_reward, logits, retain_graph=True)[0]

    settings, found = replace(SETTINGS, samples=3, baseline=baseline), torch.zeros_like(logits)
    masked = torch.tensor([[True, True]])
    for draws in itertools.product(texts, repeat=3):
        rewards = torch.tensor([[reward[text] for text in draws]], dtype=torch.float64)
        ids = torch.tensor(draws).T
        loss = rl_loss(logits.log_softmax(-1).gather(1, ids), batch(rewards, masked), settings)
        weight = math.prod(float(chance[text]) for text in draws)
        found += weight * torch.autograd.grad(loss, logits, retain_graph=True)[0]
    tiny.close(found, wanted)


def test_length_penalty_and_weight() -> None:
    """Golden value with l = 2: without the division it is twice as large; rl_weight multiplies."""
    logits = golden_logits()
    whole = rl_loss(drawn_logp(logits), GOLDEN, replace(SETTINGS, length_penalty=0.0))
    assert float(whole) == pytest.approx(-0.875)
    weighted = rl_loss(drawn_logp(logits), GOLDEN, replace(SETTINGS, rl_weight=20.0))
    assert float(weighted) == pytest.approx(-8.75)


def test_one_masked_token_is_divided_by_one() -> None:
    """Logits (2, 1, 0, -1), drawn 0, 1, 0, 2: -(.5 * 2 + 0 * 1 - .25 * 2 - .25 * 0) / 1 = -.5."""
    given = batch(torch.tensor([REWARDS], dtype=torch.float64), torch.tensor([[False, True, False]]))
    logits = golden_logits()[:1]
    assert float(rl_loss(logits.gather(1, torch.tensor(IDS[:1])), given)) == pytest.approx(-0.5)


def test_nothing_masked_gives_nothing() -> None:
    given = batch(torch.tensor([REWARDS, REWARDS]), torch.tensor([[False, False], [True, False]]))
    logits = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    rl_loss(drawn_logp(logits, ((0, 1, 2, 3),)), given).backward()
    alone = batch(torch.tensor([REWARDS]), torch.tensor([[True, False]]))
    gradient, logits.grad = logits.grad, None
    rl_loss(drawn_logp(logits, ((0, 1, 2, 3),)), alone).backward()
    tiny.close(logits.grad, gradient)
    empty = rl_loss(torch.zeros(0, 4), batch(torch.tensor([REWARDS]), torch.zeros(1, 2, dtype=torch.bool)))
    assert float(empty) == 0.0


def test_masked_likelihood_with_smoothing() -> None:
    """Logits (2, 1, 0), target 0: nll .407606, mean nll 1.407606; .9 * .407606 + .1 * 1.407606 = .507606."""
    logps = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64).log_softmax(-1)
    given = batch(torch.tensor([REWARDS]), torch.zeros(1, 2, dtype=torch.bool))
    output = (logps[:1, None], logps.mean()[None, None], torch.zeros(0, 4), *[torch.zeros(0)] * 3)
    output = (*output[:3], torch.zeros(0, 4).long(), *output[4:])
    totals, stats = semi_offline.loss(output, given, replace(SETTINGS, label_smoothing=0.1))
    assert float(totals[1]) == pytest.approx(0.507606, abs=1e-6)
    assert reduced(stats["loss"]) == pytest.approx(0.407606, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"samples": 1}, "samples: 1, wanted at least 2"),
        ({"rl_weight": -1.0}, "rl_weight"),
        ({"baseline": "greedy"}, "baseline: 'greedy', wanted mean, leave_one_out, group"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
    ],
)
def test_settings_out_of_range(change: dict, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        replace(SETTINGS, **change)


# draws


def test_draws_follow_the_distribution() -> None:
    """20,000 draws of one position: shares within 4 standard errors of the renormalised probabilities."""
    logits = torch.tensor([[1.0, 0.0, 2.0, 3.0]])
    suppressed = torch.tensor([False, False, False, True])
    uniforms = torch.rand(1, 20_000, generator=torch.Generator().manual_seed(0))
    found = draw_tokens(logits, lambda x: x, uniforms, suppressed)
    expected = torch.tensor([1.0, 0.0, 2.0]).softmax(0)
    shares = torch.bincount(found.ids[0], minlength=4) / 20_000
    assert shares[3] == 0
    error = (expected * (1 - expected) / 20_000).sqrt()
    assert ((shares[:3] - expected).abs() < 4 * error).all()
    tiny.close(found.logp[0], expected.log()[found.ids[0]])
    assert found.greedy.tolist() == [2]  # the most likely of those allowed
    assert float(found.entropy) == pytest.approx(float(-(expected * expected.log()).sum()), rel=1e-5)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_extreme_uniforms_stay_among_the_allowed(uniform: float) -> None:
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(1)) * 5
    suppressed = torch.zeros(1000, dtype=torch.bool)
    suppressed[[0, 1, 998, 999]] = True
    found = draw_tokens(logits, lambda x: x, torch.full((50, 2), uniform), suppressed)
    assert not suppressed[found.ids].any() and found.logp.isfinite().all()


@pytest.mark.parametrize("chunks", [1, 3])
def test_gradient_touches_the_drawn_logits_alone(chunks: int) -> None:
    """-(1 / l) sum over i with a_it = v of A_i, at most n of a row, each row summing to zero."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(5, 30, generator=generator, requires_grad=True)
    uniforms = torch.rand(5, 4, generator=generator)
    drawn = draw_tokens(logits, lambda x: x, uniforms, torch.zeros(30, dtype=torch.bool), chunks)
    masked = torch.tensor([[True, True, False], [True, True, True]])
    rewards = torch.rand(2, 4, generator=generator)
    rl_loss(drawn.logp, batch(rewards, masked)).backward()
    weights = rewards - rewards.mean(1, keepdim=True)
    wanted = torch.zeros(5, 30)
    for t, (b, length) in enumerate([(0, 2), (0, 2), (1, 3), (1, 3), (1, 3)]):
        for i in range(4):
            wanted[t, drawn.ids[t, i]] -= weights[b, i] / length
    tiny.close(logits.grad, wanted)
    tiny.close(logits.grad.sum(1), torch.zeros(5), 8, of=logits.grad)
    assert Drawn(*drawn).ids.shape == (5, 4)


@pytest.mark.parametrize("chunks", [1, 3, 8])  # 8: more slices than rows
def test_smoothed_logps(chunks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(4, 11)
    hidden = torch.randn(5, 4, generator=generator, requires_grad=True)
    targets = torch.randint(11, (5,), generator=generator)
    weights, others = torch.randn(5, generator=generator), torch.randn(5, generator=generator)
    logps, means = smoothed_logps(hidden, head, targets, chunks)
    found = torch.autograd.grad((weights * logps + others * means).sum(), [hidden, *head.parameters()])
    every = torch.log(head(hidden).exp() / head(hidden).exp().sum(1, keepdim=True))
    naive, mean = every[range(5), targets], every.sum(1) / 11
    tiny.close(logps, naive)
    tiny.close(means, mean)
    wanted = torch.autograd.grad((weights * naive + others * mean).sum(), [hidden, *head.parameters()])
    for ours, theirs in zip(found, wanted, strict=True):
        tiny.close(ours, theirs)


@pytest.mark.parametrize("chunks", [3, 8])
def test_slices_change_no_draw(chunks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    head, suppressed = torch.nn.Linear(4, 50), torch.arange(50) < 3
    hidden = torch.randn(5, 4, generator=generator, requires_grad=True)
    uniforms, weights = torch.rand(5, 7, generator=generator), torch.randn(5, 7, generator=generator)
    found = [draw_tokens(hidden, head, uniforms, suppressed, count) for count in (1, chunks)]
    for ours, theirs in zip(*found, strict=True):
        tiny.close(ours, theirs)
    parameters = [hidden, *head.parameters()]
    both = [torch.autograd.grad((weights * drawn.logp).sum(), parameters) for drawn in found]
    for ours, theirs in zip(*both, strict=True):
        tiny.close(ours, theirs)
