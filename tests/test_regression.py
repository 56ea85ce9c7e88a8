"""Regression of the log-ratio: hand arithmetic, limits, cuts, and the optimum that all of it aims at."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from pipeline.algorithms import regression
from pipeline.algorithms.stats import merge, reduce
from pipeline.errors import UserError
from pipeline.records import Batch, Example, Needs
from pipeline.rl import samples
from tests import tiny

F64 = torch.float64
NAN = math.nan
Settings = regression.Settings
DRO = Settings(target="advantage", beta=0.5, value_beta=None, scale=0.5)
QRPO = Settings(target="quantile", beta=0.5, value_beta=None, scale=1.0)
A_STAR = Settings(target="optimal_advantage", beta=0.5, value_beta=None, scale=1.0)
ALL = {"dro": DRO, "qrpo": QRPO, "a_star_po": A_STAR}

LOGP = [[-1.0, -0.5, -2.0], [-0.2, -3.0, -9.9]]
REF = [[-1.2, -0.5, -1.0], [-0.4, -1.0, -0.1]]
MASK = [[1, 1, 1], [1, 1, 0]]  # lr = -.8, -1.8
ADVANTAGE, QUANTILE = [0.3, -0.2], [0.75, 0.25]


def make_batch(mask=MASK, ref=REF, advantage=ADVANTAGE, quantile=QUANTILE):
    mask = torch.tensor(mask, dtype=torch.bool)
    numbers = {"advantage": advantage, "quantile": quantile}
    return Batch(
        items=tuple(range(len(advantage))),
        input_ids=torch.zeros_like(mask, dtype=torch.long),
        input_mask=torch.ones_like(mask),
        prompt_lengths=torch.ones(len(mask), dtype=torch.long),
        response_ids=torch.zeros_like(mask, dtype=torch.long),
        response_mask=mask,
        numbers={name: torch.tensor(values, dtype=F64) for name, values in numbers.items()},
        ref_logp=torch.tensor(ref, dtype=F64),
    )


def value_and_gradient(settings, batch, logp=LOGP):
    logp = torch.tensor(logp, dtype=F64, requires_grad=True)
    total, stats = regression.loss(logp, batch, settings)
    return total.detach(), torch.autograd.grad(total, logp)[0], stats


def close(found, wanted, atol=5e-7):
    torch.testing.assert_close(torch.as_tensor(found, dtype=F64), torch.as_tensor(wanted, dtype=F64), atol=atol, rtol=0)


# gap = target - .5 lr, with .5 ln Z = .5 ln(.5 (e^2 - 1)) = .580720 taken off the quantile
GAPS = {"dro": [0.7, 0.7], "qrpo": [0.569280, 0.569280], "a_star_po": [0.7, 0.7]}


@pytest.mark.parametrize("name", ALL)
def test_values_and_gradients_by_hand(name):
    gaps, settings = GAPS[name], ALL[name]
    total, gradient, stats = value_and_gradient(settings, make_batch())
    close(total, settings.scale * sum(gap**2 for gap in gaps), atol=1e-6)
    slopes = [-2 * settings.scale * 0.5 * gap for gap in gaps]  # for every token of the response
    close(gradient, [[slopes[0]] * 3, [slopes[1]] * 2 + [0.0]], atol=1e-6)
    found = {name: reduce(stat) for name, stat in stats.items()}
    assert found["regression/prediction"] == pytest.approx(0.5 * (-0.8 - 1.8) / 2)
    assert found["regression/error"] == pytest.approx(sum(gap**2 for gap in gaps) / 2, abs=1e-6)
    assert found["logps/ref"] == pytest.approx((-2.7 - 1.4) / 2)
    lowered = {"dro": -3.2, "a_star_po": -3.2, "qrpo": -3.2}[name]  # .75 - .58 > 0 > .25 - .58
    assert found["logps/lowered"] == pytest.approx(lowered)


@pytest.mark.parametrize("name", ALL)
def test_at_the_reference_the_target_is_all(name):
    """The loss is scale * target^2; the better row goes up, the worse one down."""
    total, gradient, stats = value_and_gradient(ALL[name], make_batch(ref=LOGP))
    targets = {"qrpo": [0.169280, -0.330720]}.get(name, ADVANTAGE)
    close(total, ALL[name].scale * sum(one**2 for one in targets), atol=1e-6)
    assert (gradient[0] < 0).all() and (gradient[1][:2] > 0).all()
    assert reduce(stats["regression/prediction"]) == 0.0


@pytest.mark.parametrize("name", ALL)
def test_cuts_fillers_and_what_lies_under_the_mask_change_nothing(name):
    total, gradient, stats = value_and_gradient(ALL[name], make_batch())
    parts, merged = [], {}
    for start, stop in pairwise([0, 1, 2]):
        cut = slice(start, stop)
        parts.append(
            value_and_gradient(ALL[name], make_batch(MASK[cut], REF[cut], ADVANTAGE[cut], QUANTILE[cut]), LOGP[cut])
        )
        for key, stat in parts[-1][2].items():
            merged[key] = merge(merged[key], stat) if key in merged else stat
    tiny.close(sum(part[0] for part in parts), total)
    assert torch.equal(torch.cat([part[1] for part in parts]), gradient)
    assert {key: reduce(one) for key, one in merged.items()} == pytest.approx({k: reduce(s) for k, s in stats.items()})
    # a filler, and NaN where no token is
    ill_logp, ill_ref = [[*LOGP[0]], [*LOGP[1][:2], NAN], [NAN] * 3], [REF[0], [*REF[1][:2], NAN], [NAN] * 3]
    batch = make_batch([*MASK, [0, 0, 0]], ill_ref)
    found, found_gradient, found_stats = value_and_gradient(ALL[name], batch, ill_logp)
    assert found == total and torch.equal(found_gradient[:2], gradient) and not found_gradient[2].any()
    assert {k: reduce(s) for k, s in found_stats.items()} == {k: reduce(s) for k, s in stats.items()}


def test_statistics_of_samples():
    rewards, drawn = torch.tensor([0.5, 0.1, 2.0], dtype=F64), torch.tensor([0.5, 0.2, 0.9, 0.5], dtype=F64)
    close(regression.quantile(rewards, drawn), [0.75, 0.0, 1.0])  # those equal to it count
    close(regression.sample_numbers(rewards, drawn, QRPO)["quantile"], [0.75, 0.0, 1.0])
    # .5 ln((e^1 + e^.4 + e^1.8 + e^1) / 4) = .5 ln 3.244509
    close(regression.optimal_value(drawn, 0.5), 0.5 * math.log(3.244509), atol=1e-6)
    close(regression.sample_numbers(rewards, drawn, A_STAR)["advantage"], rewards - 0.5 * math.log(3.244509), atol=1e-6)
    other = dataclasses.replace(A_STAR, value_beta=2.0)
    close(regression.sample_numbers(rewards, drawn, other)["advantage"], rewards - regression.optimal_value(drawn, 2.0))


def test_limits_of_beta():
    drawn = torch.tensor([0.5, 0.2, 0.9, 0.5], dtype=F64)
    close(regression.optimal_value(drawn, 1e9), 0.525, atol=1e-6)  # the mean
    close(regression.optimal_value(drawn, 1e-9), 0.9, atol=1e-6)  # the largest, without overflow
    close(regression.optimal_value(torch.full((3,), 0.3, dtype=F64), 0.1), 0.3)  # equal rewards: no advantage
    close(1e4 * regression.log_partition(1e4), 0.5, atol=1e-4)  # the mean of q
    close(1e-3 * regression.log_partition(1e-3), 1 + 1e-3 * math.log(1e-3), atol=1e-12)  # e^1000 would overflow
    q = (torch.arange(100_000, dtype=F64) + 0.5) / 100_000
    close(regression.log_partition(0.3), (q / 0.3).exp().mean().log(), atol=1e-6)  # what Z is the mean of


# the policy all of them aim at: pi* proportional to pi_ref exp(r / beta), where beta lr = r - V*


def fitted(reference, target_of, beta, free=False):
    """The policy over len(reference) responses of one token that has the least loss on rows as the reference says them;
    with `free` a value, taken off the targets, is learned jointly."""
    settings = Settings(target="advantage", beta=beta, value_beta=None, scale=0.5)
    count = len(reference)
    logits, value = reference.log().clone().requires_grad_(), torch.zeros((), dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits, value], max_iter=400, tolerance_grad=1e-12, tolerance_change=1e-16)
    batch = make_batch([[1]] * count, reference.log()[:, None].tolist(), [0.0] * count, [0.0] * count)

    def closure():
        optimizer.zero_grad()
        targets = target_of - value if free else target_of
        logp = logits.log_softmax(0)
        rows = [
            regression.loss(
                logp[i : i + 1, None],
                dataclasses.replace(
                    batch,
                    items=(0,),
                    response_mask=batch.response_mask[:1],
                    ref_logp=batch.ref_logp[i : i + 1],
                    numbers={"advantage": targets[i : i + 1]},
                ),
                settings,
            )[0]
            for i in range(count)
        ]
        total = (reference * torch.stack(rows)).sum()
        total.backward()
        return total

    optimizer.step(closure)
    return logits.detach().softmax(0), float(value.detach())


REFERENCE, REWARDS = torch.tensor([0.5, 0.3, 0.2], dtype=F64), torch.tensor([0.2, 0.5, 0.9], dtype=F64)


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_the_minimiser_is_the_optimum_under_the_kl(beta):
    optimum = (REFERENCE.log() + REWARDS / beta).softmax(0)
    # the reference's responses in their exact shares, so that V* of samples is V*
    drawn = REWARDS[torch.tensor([0] * 5 + [1] * 3 + [2] * 2)]
    settings = dataclasses.replace(A_STAR, beta=beta)
    targets = regression.sample_numbers(REWARDS, drawn, settings)["advantage"]
    close(fitted(REFERENCE, targets, beta)[0], optimum, atol=1e-5)
    # dro as published, V learned jointly: it finds V* too
    joint, value = fitted(REFERENCE, REWARDS, beta, free=True)
    close(joint, optimum, atol=1e-5)
    close(value, regression.optimal_value(drawn, beta), atol=1e-5)
    # with the reference's own V, which is lower, the same way but not there; the nearer, the larger beta
    cached = fitted(REFERENCE, REWARDS - (REFERENCE * REWARDS).sum(), beta)[0]
    gap = float((cached - optimum).abs().max())
    assert (cached - REFERENCE)[2] > 0 and 1e-4 < gap < {0.2: 0.21, 1.0: 0.02}[beta]


def test_the_minimiser_of_quantiles_is_their_optimum():
    """Of many equally likely responses, as q is then uniform; of few the known Z is not theirs."""
    count, beta = 40, 0.5
    reference = torch.full((count,), 1 / count, dtype=F64)
    rewards = torch.arange(count, dtype=F64) ** 3  # their scale does not matter
    quantiles = regression.sample_numbers(rewards, rewards, QRPO)["quantile"]
    found, _ = fitted(reference, quantiles - beta * regression.log_partition(beta), beta)
    close(found, (quantiles / beta).softmax(0), atol=2e-3)
    assert float(found[-1] / found[0]) == pytest.approx(math.exp(2 * 39 / 40), rel=0.1)


# rows and their samples


def grouped(*rewards, prompts):
    made = tiny.items(len(rewards), reward=lambda i: rewards[i])
    return [
        dataclasses.replace(item, rows=(dataclasses.replace(item.rows[0], prompt_ids=(prompt,)),))
        for item, prompt in zip(made, prompts, strict=True)
    ]


def test_numbers_go_to_the_rows_of_their_prompts():
    items = grouped(1.0, 5.0, 3.0, 4.0, prompts=[7, 8, 7, 8])

    def numbers_of(rewards, beside):
        return regression.sample_numbers(rewards, beside, QRPO)

    own = samples.by_prompts(items, None, numbers_of)
    assert [item.numbers["quantile"] for item in own] == [0.5, 1.0, 1.0, 0.5]
    drawn = torch.tensor([[0.0, 2.0], [9.0, 4.5], [0.0, 2.0], [9.0, 4.5]], dtype=F64).numpy()  # of each row's prompt
    sampled = samples.by_prompts(items, drawn, numbers_of)
    assert [item.numbers["quantile"] for item in sampled] == [0.5, 0.5, 1.0, 0.0]


def test_rows_alone_cannot_be_compared(caplog):
    rows = [Example(f"r{i}", prompt, completion="a", reward=1.0) for i, prompt in enumerate("pqpr")]
    assert [row.id for row in samples.compared(rows, "training")] == ["r0", "r2"]
    assert "2 of 4 training rows are left out, each the only one of its prompt" in caplog.text
    copies = [dataclasses.replace(rows[1], id=name) for name in ("r1", "r1/copy-2")]  # as weights of files make them
    assert [row.id for row in samples.compared([rows[0], rows[2], *copies], "training")] == ["r0", "r2"]
    with pytest.raises(UserError, match="each of 2 held-out rows is the only one of its prompt: wanted two or more"):
        samples.compared(rows[1:3], "held-out")


def test_needs():
    assert regression.needs(DRO) == Needs(rewards=True, values=True, ref_logp=True, baseline="value")
    assert regression.needs(QRPO) == regression.needs(A_STAR) == Needs(rewards=True, ref_logp=True, samples=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "reward"}, "target: 'reward', wanted advantage, optimal_advantage, quantile"),
        ({"beta": 0.0}, "beta: 0.0, wanted a number > 0"),
        ({"value_beta": -1.0}, "value_beta: -1.0, wanted a number > 0"),
        ({"scale": math.inf}, "scale: inf, wanted a number > 0"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DRO, **change)


def test_wrong_shapes_name_the_tensor():
    logp = torch.tensor(LOGP, dtype=F64)
    with pytest.raises(UserError, match="ref_logp: the batch has none"):
        regression.loss(logp, dataclasses.replace(make_batch(), ref_logp=None), DRO)
    with pytest.raises(UserError, match="quantile: the batch has no such number"):
        regression.loss(logp, dataclasses.replace(make_batch(), numbers={}), QRPO)
    with pytest.raises(AssertionError, match="logp: shape is"):
        regression.loss(logp[:1], make_batch(), DRO)
