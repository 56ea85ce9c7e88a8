"""DPO against hand arithmetic, a plain loop, and pairs that say nothing."""

import dataclasses
import math

import pytest
import torch

from pipeline.algorithms import dpo
from pipeline.algorithms.stats import reduce
from pipeline.errors import UserError
from pipeline.records import Batch, Example, Needs
from pipeline.rl.dpo import with_shuffled_sides

PLAIN = dpo.Settings(beta=0.1, label_smoothing=0.0)
SMOOTHED = dataclasses.replace(PLAIN, label_smoothing=0.1)
NAN = math.nan


def batch_of(mask, ref):
    """A batch of rows with `mask` (B, T) and the reference's log-probabilities."""
    mask = torch.tensor(mask)
    ids, lengths = torch.zeros_like(mask, dtype=torch.long), torch.ones(len(mask), dtype=torch.long)
    ref = None if ref is None else torch.tensor(ref, dtype=torch.float64)
    pairs = int(mask.any(1).sum()) // 2
    return Batch(tuple(range(pairs)), ids, torch.ones_like(mask), lengths, ids, mask, ref_logp=ref)


def value_and_gradient(settings, logp, batch):
    logp = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    total, stats = dpo.loss(logp, batch, settings)
    (gradient,) = torch.autograd.grad(total, logp)
    return total.item(), gradient.tolist(), {name: reduce(stat) for name, stat in stats.items()}


# one pair: ln ratios of the whole responses +2 (.5 + 1.5) and -1 (one token)
LOGP = [[-1.0, -0.5], [-3.0, NAN]]
REF = [[-1.5, -2.0], [-2.0, 0.0]]
MASK = [[True, True], [True, False]]


@pytest.mark.parametrize(
    ("settings", "loss", "slope"),
    [
        # m = .1 * (2 + 1) = .3: ln(1 + e^-.3) = .554355; slope .1 * sigmoid(-.3) = .1 * .425557
        (PLAIN, 0.554355, 0.0425557),
        # .9 * .554355 + .1 * .854355 = .584355; .1 * (.9 * .425557 - .1 * .574443) = .1 * .325557
        (SMOOTHED, 0.584355, 0.0325557),
    ],
)
def test_golden_pair(settings, loss, slope):
    total, gradient, _ = value_and_gradient(settings, LOGP, batch_of(MASK, REF))
    assert total == pytest.approx(loss, abs=1e-6)
    assert gradient[0] == pytest.approx([-slope, -slope], abs=1e-7)  # descent raises the chosen response
    assert gradient[1] == pytest.approx([slope, 0.0], abs=1e-7)  # lowers the rejected one; NaN in padding is nothing


def test_statistics_by_hand():
    _, _, stats = value_and_gradient(PLAIN, LOGP, batch_of(MASK, REF))
    assert stats == pytest.approx(
        {
            "loss": 0.554355,
            "rewards/chosen": 0.2,
            "rewards/rejected": -0.1,
            "rewards/margins": 0.3,
            "rewards/accuracies": 1.0,
            "logps/chosen": -1.5,
            "logps/rejected": -3.0,
            "logps/ref_chosen": -3.5,
            "logps/ref_rejected": -2.0,
        },
        abs=1e-6,
    )


def test_at_the_start_the_loss_is_ln_2_and_half_of_the_pairs_are_right():
    total, _, stats = value_and_gradient(PLAIN, REF, batch_of(MASK, REF))
    assert total == pytest.approx(math.log(2)) and stats["rewards/accuracies"] == 0.5 and stats["rewards/margins"] == 0


def naive(settings, logp, ref, mask):
    """Pair by pair, in plain numbers."""
    pairs, total = len(logp) // 2, 0.0
    for i in range(pairs):
        ratio = [sum(p - r for p, r, m in zip(logp[j], ref[j], mask[j], strict=True) if m) for j in (i, i + pairs)]
        m = settings.beta * (ratio[0] - ratio[1])
        e = settings.label_smoothing
        total += (1 - e) * math.log1p(math.exp(-m)) + e * math.log1p(math.exp(m))
    return total


@pytest.mark.parametrize("settings", [PLAIN, SMOOTHED, dataclasses.replace(SMOOTHED, beta=2.0)])
def test_a_plain_loop_says_the_same(settings):
    torch.manual_seed(0)
    logp, ref = -torch.rand(6, 5).mul(3), -torch.rand(6, 5).mul(3)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2, 4, 5])[:, None]
    found = value_and_gradient(settings, logp.tolist(), batch_of(mask.tolist(), ref.tolist()))[0]
    assert found == pytest.approx(naive(settings, logp.tolist(), ref.tolist(), mask.tolist()), rel=1e-6)


def test_fillers_contribute_nothing():
    total, gradient, stats = value_and_gradient(PLAIN, LOGP, batch_of(MASK, REF))
    empty, zero = [False, False], [0.0, 0.0]
    logp = [LOGP[0], [NAN, NAN], LOGP[1], [NAN, NAN]]
    padded = batch_of([MASK[0], empty, MASK[1], empty], [REF[0], zero, REF[1], zero])
    assert value_and_gradient(PLAIN, logp, padded) == (total, [gradient[0], zero, gradient[1], zero], stats)
    nothing = value_and_gradient(PLAIN, [[NAN, NAN]] * 2, batch_of([empty, empty], [zero, zero]))
    assert nothing[:2] == (0.0, [zero, zero])


def test_a_shared_beginning_changes_no_loss():
    """Both responses begin with the same token, of one log-probability in both: with it or without, the same."""
    shared = [[-0.3, *row] for row in LOGP]
    batch = batch_of([[True, *row] for row in MASK], [[-2.9, *row] for row in REF])
    assert value_and_gradient(PLAIN, shared, batch)[0] == pytest.approx(0.554355, abs=1e-6)


def test_large_margins_stay_finite():
    mask, ref = [[True], [True]], [[0.0], [0.0]]
    total, gradient, _ = value_and_gradient(PLAIN, [[-1e5], [0.0]], batch_of(mask, ref))
    assert total == pytest.approx(1e4)  # m = -1e4
    assert gradient == [[pytest.approx(-0.1)], [pytest.approx(0.1)]]


def test_descent_prefers_the_chosen_and_learns_nothing_from_turned_pairs():
    def learned(flip):
        """The last margin of ten tokens, of which lower ids are better; a table of logits is the policy."""
        torch.manual_seed(0)
        ids = torch.stack([torch.randperm(10)[:2].sort().values for _ in range(400)])  # (P, 2) chosen, rejected
        turned = torch.rand(400) < 0.5
        ids = torch.where(turned[:, None] & torch.tensor(flip), ids.flip(1), ids)
        logits = torch.zeros(10, requires_grad=True)
        mask = [[True]] * 800
        for _ in range(20):
            logp = logits.log_softmax(-1)[ids.T.reshape(-1, 1)]
            total, _ = dpo.loss(logp, batch_of(mask, [[-math.log(10)]] * 800), PLAIN)
            logits = (logits - torch.autograd.grad(total, logits)[0] / 4).detach().requires_grad_()
        return float(logits[:5].mean() - logits[5:].mean())

    assert learned(flip=False) > 5
    assert abs(learned(flip=True)) < 1


def test_turned_pairs_are_about_half_and_the_same_every_time():
    pairs = [Example(f"{i}", "p", chosen="good", rejected="bad") for i in range(200)]
    turned = with_shuffled_sides(pairs, seed=3)
    assert turned == with_shuffled_sides(pairs, seed=3) != with_shuffled_sides(pairs, seed=4)
    assert 70 < sum(pair.chosen == "bad" for pair in turned) < 130  # 4 standard deviations of 7 around 100
    assert all({pair.chosen, pair.rejected} == {"good", "bad"} for pair in turned)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beta": 0.0}, "beta: 0.0, wanted a number > 0"),
        ({"beta": NAN}, "beta: nan, wanted a number > 0"),
        ({"label_smoothing": 0.5}, r"label_smoothing: 0.5, wanted a number in \[0, 0.5\)"),
    ],
)
def test_settings_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **wrong)


def test_what_is_missing_or_misshapen_is_named():
    assert dpo.needs(PLAIN) == Needs(ref_logp=True)
    logp = torch.zeros(2, 2)
    with pytest.raises(UserError, match="ref_logp: the batch has none"):
        dpo.loss(logp, batch_of(MASK, None), PLAIN)
    with pytest.raises(UserError, match="ref_logp: T is 1, but logp has T = 2"):
        dpo.loss(logp, batch_of(MASK, [[0.0], [0.0]]), PLAIN)
    with pytest.raises(AssertionError, match="a group lacks a response"):
        dpo.loss(logp, batch_of([[True, True], [False, False]], REF), PLAIN)
