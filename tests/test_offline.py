"""The offline family against the specification's golden vectors, hand arithmetic and limiting cases."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch

from pipeline.algorithms import offline
from pipeline.algorithms.stats import merge, reduce
from pipeline.config.sections import BestRows
from pipeline.data.batching import Packing
from pipeline.errors import UserError
from pipeline.records import Batch, Example, Needs
from pipeline.rewards.rewards import Rewards, WeightedReward
from pipeline.rl import baselines, rows
from pipeline.rl.context import Context
from pipeline.rl.offline import best_metric, spoken
from pipeline.trainer import loop
from pipeline.trainer.objective import objective_of
from tests import tiny

Settings = offline.Settings
NAN = math.nan
F64 = torch.float64

NLL = Settings(
    weight="one",
    ratio="none",
    clip=None,
    clip_form="bound",
    probability_floor=0.0,
    kl_beta=0.0,
    kl_form="none",
    baseline="value",
    shift=0.0,
    weight_temperature=1.0,
    weight_limit=20.0,
)
WBC = dataclasses.replace(NLL, weight="reward")
R_GOLD = dataclasses.replace(WBC, ratio="probability", probability_floor=0.1)
R_LOL = dataclasses.replace(WBC, ratio="sequence", clip=0.9)
A_LOL = dataclasses.replace(R_LOL, weight="advantage")
REF_FREE = dataclasses.replace(A_LOL, ratio="none")
SEQ = dataclasses.replace(A_LOL, ratio="token")
KL = dataclasses.replace(REF_FREE, kl_beta=0.2, kl_form="released")
K3 = dataclasses.replace(KL, kl_form="k3")
DFT = dataclasses.replace(NLL, ratio="probability")
IW_SFT = dataclasses.replace(NLL, ratio="mean")
AWR = dataclasses.replace(NLL, weight="exponential")
ASYMRE = dataclasses.replace(NLL, weight="signed", shift=0.1)
TOPR = dataclasses.replace(NLL, weight="signed", baseline="rows", ratio="tapered")
GROUPED = dataclasses.replace(TOPR, baseline="group", ratio="token", clip=0.2, clip_form="stop")
GROUPED = dataclasses.replace(GROUPED, kl_beta=0.04, kl_form="k3")
BOUND = dataclasses.replace(GROUPED, clip_form="bound")
ALL = {
    "nll": NLL,
    "wbc": WBC,
    "r_gold": R_GOLD,
    "r_lol": R_LOL,
    "a_lol": A_LOL,
    "a_lol_ref_free": REF_FREE,
    "a_lol_seq": SEQ,
    "a_lol_kl": KL,
    "k3": K3,
    "dft": DFT,
    "iw_sft": IW_SFT,
    "awr": AWR,
    "asymre": ASYMRE,
    "topr": TOPR,
    "grpo_offline": GROUPED,
}

LOGP = [[-1.0, -0.5, -2.0], [-0.2, -3.0, -9.9], [-0.1, -0.4, -0.3]]
REF = [[-1.2, -0.5, -1.0], [-0.4, -1.0, -0.1], [-2.0, -0.6, -0.9]]
MASK = [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
REWARD, VALUE = [0.8, 0.3, 0.3], [0.5, 0.1, 0.6]


def make_batch(mask=MASK, ref=REF, reward=REWARD, value=VALUE, items=None):
    mask = torch.tensor(mask, dtype=torch.bool)
    reward, value = torch.tensor(reward, dtype=F64), torch.tensor(value, dtype=F64)
    return Batch(
        items=tuple(range(len(reward) if items is None else items)),
        input_ids=torch.zeros_like(mask, dtype=torch.long),
        input_mask=torch.ones_like(mask),
        prompt_lengths=torch.ones(len(mask), dtype=torch.long),
        response_ids=torch.zeros_like(mask, dtype=torch.long),
        response_mask=mask,
        numbers={"reward": reward, "value": value, "advantage": reward - value, "standard_advantage": reward - value},
        ref_logp=None if ref is None else torch.tensor(ref, dtype=F64),
    )


def make_logp(values=LOGP):
    return torch.tensor(values, dtype=F64, requires_grad=True)


def value_and_gradient(settings, batch, logp_values=LOGP):
    logp = make_logp(logp_values)
    total, _ = offline.loss(logp, batch, settings)
    (gradient,) = torch.autograd.grad(total, logp)
    return total.detach(), gradient


def close(found, wanted, atol=5e-7):
    wanted = torch.as_tensor(wanted, dtype=F64)
    torch.testing.assert_close(torch.as_tensor(found, dtype=F64), wanted, atol=atol, rtol=0)


def same(found, wanted, of=None):
    """Two computations in float64, as `close` is for what was written down."""
    tiny.close(torch.as_tensor(found, dtype=F64), torch.as_tensor(wanted, dtype=F64), of=of)


# name: mean loss, per-row losses, d mean loss / d logp
GOLDEN = {
    "nll": (2.5, [3.5, 3.2, 0.8], [[-0.333333] * 3, [-0.333333, -0.333333, 0], [-0.333333] * 3]),
    "wbc": (1.333333, [2.8, 0.96, 0.24], [[-0.266667] * 3, [-0.1, -0.1, 0], [-0.1] * 3]),
    "r_gold": (
        0.355611,
        [0.753452, 0.139124, 0.174257],
        [[-0.098101, -0.161742, -0.036089], [-0.081873, -0.01, 0], [-0.090484, -0.067032, -0.074082]],
    ),
    "r_lol": (0.624269, [1.258121, 0.158687, 0.456], [[-0.119821] * 3, [-0.016530, -0.016530, 0], [-0.19] * 3]),
    "a_lol": (0.192529, [0.471795, 0.105791, 0], [[-0.044933] * 3, [-0.011020, -0.011020, 0], [0] * 3]),
    "a_lol_ref_free": (0.563333, [1.05, 0.64, 0], [[-0.1] * 3, [-0.066667, -0.066667, 0], [0] * 3]),
    "a_lol_seq": (
        0.289069,
        [0.737148, 0.130057, 0],
        [[-0.122140, -0.1, -0.036788], [-0.081427, -0.009022, 0], [0] * 3],
    ),
    "a_lol_kl": (0.57, [0.89, 0.28, 0.54], [[-0.033333] * 3, [0] * 3, [0.066667] * 3]),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vectors(name):
    mean, rows, gradient = GOLDEN[name]
    total, found = value_and_gradient(ALL[name], make_batch())
    close(total / 3, mean)
    close(found / 3, gradient)
    for row, wanted in enumerate(rows):
        cut = slice(row, row + 1)
        batch = make_batch(MASK[cut], REF[cut], REWARD[cut], VALUE[cut])
        close(value_and_gradient(ALL[name], batch, LOGP[cut])[0], wanted)


def loop_loss(settings, batch, logp):
    """The formula of the specification, one number at a time, and d loss / d logp."""
    total, gradient = 0.0, [[0.0] * len(row) for row in logp]
    for b, row in enumerate(logp):
        tokens = [t for t in range(len(row)) if batch.response_mask[b, t]]
        ref = batch.ref_logp[b].tolist()
        gain = float(batch.numbers["advantage"][b])
        row_weight = {
            "one": 1.0,
            "reward": float(batch.numbers["reward"][b]),
            "advantage": max(gain, 0.0),
            "exponential": min(math.exp(gain / settings.weight_temperature), settings.weight_limit),
            "signed": gain + settings.shift,
        }[settings.weight]
        bounds = (0.0, math.inf) if settings.clip is None else (1 - settings.clip, 1 + settings.clip)

        def clipped(ratio, bounds=bounds, row_weight=row_weight):
            gone = ratio < bounds[0] if row_weight < 0 else ratio > bounds[1]
            return 0.0 if gone and settings.clip_form == "stop" else min(max(ratio, bounds[0]), bounds[1])

        of_sequence = math.exp(sum(row[t] - ref[t] for t in tokens))
        for t in tokens:
            of_token = math.exp(row[t] - ref[t])
            factor = {
                "none": 1.0,
                "sequence": clipped(of_sequence),
                "token": clipped(of_token),
                "mean": clipped(of_sequence ** (1 / len(tokens))),
                "tapered": min(of_sequence, 1.0) if row_weight < 0 else 1.0,
                "probability": max(math.exp(row[t]), settings.probability_floor),
            }[settings.ratio]
            kl = {"none": 0.0, "released": row[t] - ref[t], "k3": of_token - 1 - (row[t] - ref[t])}
            kl_slope = {"none": 0.0, "released": 1.0, "k3": of_token - 1}
            total += row_weight * factor * -row[t] + settings.kl_beta * kl[settings.kl_form]
            gradient[b][t] = -row_weight * factor + settings.kl_beta * kl_slope[settings.kl_form]
    return total, gradient


def unclipped(settings):
    return dataclasses.replace(settings, clip=None, clip_form="bound")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("clip", [None, 0.0, 0.2, 0.9])
def test_equals_the_loop_over_numbers(name, clip):
    torch.manual_seed(3)
    logp, ref = (-3 * torch.rand(5, 4, dtype=F64)).tolist(), (-3 * torch.rand(5, 4, dtype=F64)).tolist()
    mask = [[True] * (1 + b % 4) + [False] * (3 - b % 4) for b in range(5)]
    batch = make_batch(mask, ref, [0.9, 0.1, 0.5, 0.7, 0.2], [0.5, 0.5, 0.1, 0.0, 0.9])
    settings = unclipped(ALL[name]) if clip is None else dataclasses.replace(ALL[name], clip=clip)
    total, gradient = value_and_gradient(settings, batch, logp)
    wanted_total, wanted_gradient = loop_loss(settings, batch, logp)
    same(total, wanted_total)
    same(gradient, wanted_gradient)


def test_p1_policy_equal_to_reference():
    batch = make_batch(ref=LOGP)
    weights = {name: offline.weights(make_logp(), batch, ALL[name]) for name in ALL}
    assert torch.equal(weights["a_lol"], weights["a_lol_ref_free"])  # every ratio exactly 1
    assert torch.equal(weights["a_lol"], weights["a_lol_seq"])
    assert torch.equal(weights["r_lol"], weights["wbc"])
    for one, other in [("a_lol", "a_lol_ref_free"), ("a_lol", "a_lol_seq"), ("r_lol", "wbc")]:
        for x, y in zip(value_and_gradient(ALL[one], batch), value_and_gradient(ALL[other], batch), strict=True):
            assert torch.equal(x, y)
    free, free_gradient = value_and_gradient(REF_FREE, batch)
    released, released_gradient = value_and_gradient(KL, batch)
    assert released == free  # the term is 0, its gradient is not
    close(released_gradient - free_gradient, 0.2 * torch.tensor(MASK))
    for x, y in zip(value_and_gradient(K3, batch), (free, free_gradient), strict=True):
        close(x, y)  # ours rests at the reference


def test_p2_clip_limits_the_weight_and_keeps_the_gradient():
    # one token each, A = .3: log ratio ln 14.88 -> 1.9, ln .01 -> .1
    batch = make_batch([[1], [1]], [[-3.0], [-0.1]], [0.8, 0.8], [0.5, 0.5])
    logp = [[-3.0 + math.log(14.88)], [-0.1 + math.log(0.01)]]
    _, gradient = value_and_gradient(A_LOL, batch, logp)
    close(gradient, [[-0.3 * 1.9], [-0.3 * 0.1]])
    for settings in (A_LOL, SEQ):
        unclipped = dataclasses.replace(settings, clip=None)
        close(value_and_gradient(unclipped, batch, logp)[1], [[-0.3 * 14.88], [-0.3 * 0.01]])
        no_ratio = dataclasses.replace(settings, clip=0)
        for x, y in zip(
            value_and_gradient(no_ratio, batch, logp), value_and_gradient(REF_FREE, batch, logp), strict=True
        ):
            assert torch.equal(x, y)  # clip 0: reference-free


@pytest.mark.parametrize("name", ["r_gold", "r_lol", "a_lol", "a_lol_seq"])
def test_p3_the_gradient_holds_the_weights_fixed(name):
    settings, step = unclipped(ALL[name]), 1e-6
    batch, logp = make_batch(), make_logp().detach()
    total, gradient = value_and_gradient(settings, batch)
    fixed = offline.weights(logp, batch, settings)
    assert not offline.weights(make_logp(), batch, settings).requires_grad

    def slope(loss_of):
        up, down = logp.clone(), logp.clone()
        up[0, 0] += step
        down[0, 0] -= step
        return float(loss_of(up) - loss_of(down)) / (2 * step)

    mask, rounded = batch.response_mask, 64 * tiny.rounding(total) / step
    wanted = float(gradient[0, 0])
    assert slope(lambda x: (fixed * torch.where(mask, -x, 0.0)).sum()) == pytest.approx(wanted, abs=rounded)
    assert slope(lambda x: offline.loss(x, batch, settings)[0]) != pytest.approx(wanted, abs=1e-2)


def test_unclipped_a_lol_is_the_gradient_of_the_expected_advantage():
    # rho * grad ln pi = grad rho: the detached form equals d(-A * rho), section 1.1
    settings, batch, logp = dataclasses.replace(A_LOL, clip=None), make_batch(), make_logp()
    _, gradient = value_and_gradient(settings, batch)
    log_rho = torch.where(batch.response_mask, logp - batch.ref_logp, 0.0).sum(1)
    (wanted,) = torch.autograd.grad(-(batch.numbers["advantage"].clamp(min=0) * log_rho.exp()).sum(), logp)
    same(gradient, wanted)


def test_p4_token_and_sequence_ratio_agree_for_one_token_only():
    one = make_batch([[1], [1]], [[-1.2], [-0.4]], [0.8, 0.3], [0.5, 0.1])
    values = [[-1.0], [-0.2]]
    for x, y in zip(value_and_gradient(A_LOL, one, values), value_and_gradient(SEQ, one, values), strict=True):
        same(x, y)
    long = make_batch()
    assert abs(value_and_gradient(A_LOL, long)[0] - value_and_gradient(SEQ, long)[0]) / 3 > 0.09  # .193, .289


def test_p5_each_token_is_clipped_by_itself():
    batch = make_batch(value=[0.0, 0.0, 0.0])  # A = R = .3 in row 3
    weights = offline.weights(make_logp(), batch, SEQ)[2] / 0.3
    close(weights, [1.9, 1.221403, 1.822119])  # 6.685894 -> 1.9, the others as they are


def test_p6_rows_without_advantage():
    batch = make_batch(value=[0.9, 0.3, 0.6])  # A = -.1, 0, -.3
    for settings in (A_LOL, REF_FREE, SEQ):
        total, gradient = value_and_gradient(settings, batch)
        assert total == 0.0
        assert not gradient.any()
    _, gradient = value_and_gradient(KL, batch)
    same(gradient, 0.2 * torch.tensor(MASK, dtype=F64))


def test_p7_the_released_kl_shifts_the_advantage():
    batch, logp = make_batch(), make_logp()
    total, gradient = value_and_gradient(KL, batch)
    shifted = batch.numbers["advantage"].clamp(min=0.0) - 0.2  # [.1, 0, -.2], not clamped again
    nll = torch.where(batch.response_mask, -logp, 0.0).sum(1)
    (wanted,) = torch.autograd.grad((shifted * nll).sum(), logp, retain_graph=True)
    same(gradient, wanted)
    same(gradient[1], [0.0] * 3, of=gradient)  # A+ = beta
    n_ref = torch.tensor([2.7, 1.4, 3.5], dtype=F64)
    same(total, float((shifted * nll).sum() + 0.2 * n_ref.sum()))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("garbage", [NAN, math.inf, -math.inf, 1e30])
def test_p8_nothing_under_the_mask_matters(name, garbage):
    clean = value_and_gradient(ALL[name], make_batch())
    logp, ref = [list(row) for row in LOGP], [list(row) for row in REF]
    logp[1][2] = ref[1][2] = garbage
    for x, y in zip(value_and_gradient(ALL[name], make_batch(ref=ref), logp), clean, strict=True):
        assert torch.equal(x, y)
    _, stats = offline.loss(make_logp(logp), make_batch(ref=ref), ALL[name])
    assert all(stat.sums.isfinite().all() for stat in stats.values())


def test_p8_the_last_token_of_a_response_counts():
    shorter = make_batch([[1, 1, 0], [1, 1, 0], [1, 1, 1]])
    assert value_and_gradient(NLL, make_batch())[0] - value_and_gradient(NLL, shorter)[0] == 2.0


@pytest.mark.parametrize("name", ["nll", "wbc", "a_lol_ref_free"])
def test_p9_sums_over_tokens(name):
    short = make_batch([[1]], [[-1.0]], [0.8], [0.5])
    long = make_batch([[1] * 5], [[-1.0] * 5], [0.8], [0.5])
    one, five = (value_and_gradient(ALL[name], b, [[-0.7] * t])[0] for b, t in ((short, 1), (long, 5)))
    same(five, 5 * one)


@pytest.mark.parametrize("name", ["a_lol", "a_lol_ref_free", "a_lol_seq", "a_lol_kl"])
def test_p10_scaling_the_advantages_scales_the_loss(name):
    batch, settings = make_batch(), ALL[name]
    scaled = dataclasses.replace(batch, numbers={"advantage": 3 * batch.numbers["advantage"]})
    total, gradient = value_and_gradient(settings, batch)
    times3 = value_and_gradient(dataclasses.replace(settings, kl_beta=3 * settings.kl_beta), scaled)
    same(times3[0], 3 * total)
    same(times3[1], 3 * gradient)


def test_p11_probability_floor():
    batch = make_batch(reward=[1.0, 1.0, 1.0])
    # e^-3 = .0498 -> .1; e^-.2 = .8187 stays
    close(offline.weights(make_logp(), batch, R_GOLD)[1], [0.818731, 0.1, 0.0])
    one = dataclasses.replace(R_GOLD, probability_floor=1.0)
    for x, y in zip(value_and_gradient(one, batch), value_and_gradient(WBC, batch), strict=True):
        assert torch.equal(x, y)
    zero = dataclasses.replace(R_GOLD, probability_floor=0.0)
    close(offline.weights(make_logp(), batch, zero)[1], [0.818731, 0.049787, 0.0])


@pytest.mark.parametrize("name", ALL)
def test_p19_any_cut_into_micro_batches_gives_the_same_sum(name):
    total, gradient = value_and_gradient(ALL[name], make_batch())
    _, stats = offline.loss(make_logp(), make_batch(), ALL[name])
    for cuts in ([0, 1, 3], [0, 2, 3], [0, 1, 2, 3]):
        parts, gradients, merged = [], [], {}
        for start, stop in pairwise(cuts):
            cut = slice(start, stop)
            batch = make_batch(MASK[cut], REF[cut], REWARD[cut], VALUE[cut])
            part, part_gradient = value_and_gradient(ALL[name], batch, LOGP[cut])
            parts.append(part)
            gradients.append(part_gradient)
            for key, stat in offline.loss(make_logp(LOGP[cut]), batch, ALL[name])[1].items():
                merged[key] = merge(merged[key], stat) if key in merged else stat
        same(sum(parts), total)
        assert torch.equal(torch.cat(gradients), gradient)
        assert {key: reduce(stat) for key, stat in merged.items()} == pytest.approx(
            {key: reduce(stat) for key, stat in stats.items()}
        )


@pytest.mark.parametrize("name", ALL)
def test_fillers_contribute_nothing(name):
    total, gradient = value_and_gradient(ALL[name], make_batch())
    _, stats = offline.loss(make_logp(), make_batch(), ALL[name])
    padded = make_batch([*MASK, [0, 0, 0]], [*REF, [NAN] * 3], items=3)
    found, found_gradient = value_and_gradient(ALL[name], padded, [*LOGP, [NAN] * 3])
    _, found_stats = offline.loss(make_logp([*LOGP, [NAN] * 3]), padded, ALL[name])
    assert found == total
    assert torch.equal(found_gradient, torch.cat([gradient, torch.zeros(1, 3, dtype=F64)]))
    assert {k: reduce(s) for k, s in found_stats.items()} == {k: reduce(s) for k, s in stats.items()}
    only_fillers = make_batch([[0, 0]], [[0.0, 0.0]], [], [])
    nothing, no_gradient = value_and_gradient(ALL[name], only_fillers, [[NAN, NAN]])
    assert nothing == 0.0
    assert not no_gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_p20_extreme_log_ratios_reach_the_bounds(dtype):
    # N_ref - N = +500, -500 with A = .3
    batch = make_batch([[1], [1]], [[-500.0], [0.0]], [0.8, 0.8], [0.5, 0.5])
    batch = dataclasses.replace(batch, ref_logp=batch.ref_logp.to(dtype))
    logp = torch.tensor([[0.0], [-500.0]], dtype=dtype, requires_grad=True)
    for settings in (A_LOL, SEQ, R_LOL, K3):
        total, stats = offline.loss(logp, batch, settings)
        assert total.isfinite() and torch.autograd.grad(total, logp)[0].isfinite().all()
        assert all(stat.sums.isfinite().all() for stat in stats.values())
    for settings in (A_LOL, SEQ):
        close(offline.weights(logp, batch, settings) / 0.3, [[1.9], [0.1]], atol=1e-6)


def test_a_fit_without_r2_is_said_in_words():
    facts = {"value/mse": 0.25, "value/r2": math.nan, "advantage/kept_fraction": 0.5}
    words = "value/mse 0.25, R2 unknown (all held-out prompts expect the same reward), advantage/kept_fraction 0.5"
    assert spoken(facts) == words and spoken(facts | {"value/r2": 0.5}).split(", ")[1] == "value/r2 0.5"


def test_a_row_without_weight_has_none_whatever_its_ratio():
    """An unclipped ratio of e^500, of a row that did worse than expected: 0, and not 0 * inf."""
    batch = make_batch([[1], [1]], [[-500.0], [0.0]], [0.3, 0.8], [0.5, 0.5])
    weights = offline.weights(torch.tensor([[0.0], [0.0]]), batch, dataclasses.replace(A_LOL, clip=None))
    close(weights, [[0.0], [0.3]], atol=1e-6)


# what chooses the weights


@pytest.mark.parametrize(
    ("algo", "rewarded", "wanted"),
    [
        ("alol", True, loop.GAIN),
        ("a_lol_ref_free", True, loop.GAIN),
        ("wbc", True, loop.GAIN),
        ("nll", True, loop.GAIN),
        ("nll", False, loop.HELD_OUT_LOSS),
    ],
)
def test_a_weighted_loss_never_chooses_the_weights(algo, rewarded, wanted):
    settings = tiny.settings("rl", f"algo={algo}")
    module, algorithm, objective = objective_of(settings.algorithm)
    context = Context(settings, None, None, None, None, None, None, module, algorithm, objective)
    held_out = tiny.items(2, **({"reward": lambda i: 1.0} if rewarded else {}))
    assert best_metric(context, held_out) == wanted
    judged = dataclasses.replace(context, rewards=Rewards([WeightedReward("length", 1.0, None)]))
    assert best_metric(judged, held_out) == loop.REWARD


@pytest.mark.parametrize(("algo", "cure"), [("alol", "did better than expected"), ("wbc", "raise the rewards above 0")])
def test_no_row_to_learn_from(algo, cure):
    settings = tiny.settings("rl", f"algo={algo}", "sampling=all")
    items = tiny.items(3, reward=lambda i: -i, advantage=lambda i: -i)
    with pytest.raises(UserError, match=cure):
        rows.population(items, Packing(None, 99, False, 0), settings.algorithm.settings["weight"], settings)


# P21: three actions chosen with frequency f, V = f . R = .43, so A = (-.23, .07, .47)
@pytest.mark.parametrize(
    ("settings", "policy", "reward"),
    [
        (REF_FREE, [0.0, 0.1826, 0.8174], 0.8270),  # f A+ = (0, .021, .094) / .115
        (WBC, [0.2326, 0.3488, 0.4186], 0.5977),  # f R = (.1, .15, .18) / .43
        (NLL, [0.5, 0.3, 0.2], 0.43),
    ],
)
def test_p21_bandit_converges_where_the_formula_says(settings, policy, reward):
    actions = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    rewards = torch.tensor([0.2, 0.5, 0.9], dtype=F64)
    batch = make_batch([[1]] * 10, [[-1.0]] * 10, rewards[actions].tolist(), [0.43] * 10)
    logits = torch.zeros(3, dtype=F64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(600):
        total, _ = offline.loss(logits.log_softmax(0)[actions][:, None], batch, settings)
        optimizer.zero_grad()
        (total / 10).backward()
        optimizer.step()
    found = logits.detach().softmax(0)
    close(found, policy, atol=1e-3)
    close((found * rewards).sum(), reward, atol=1e-3)


def test_the_better_response_goes_up_unless_rewards_are_shuffled():
    def gain(rewards):
        batch = make_batch([[1]] * 3, [[-1.0986]] * 3, rewards, [0.43] * 3)
        logits = torch.zeros(3, dtype=F64, requires_grad=True)
        for _ in range(50):
            total, _ = offline.loss(logits.log_softmax(0)[:, None], batch, A_LOL)
            (gradient,) = torch.autograd.grad(total, logits)
            logits = (logits - gradient).detach().requires_grad_()
        return float(logits.softmax(0) @ torch.tensor([0.2, 0.5, 0.9], dtype=F64)) - 1.6 / 3

    assert gain([0.2, 0.5, 0.9]) > 0.2
    assert gain([0.9, 0.2, 0.5]) < 0.0


def test_k3_draws_the_policy_back_from_both_sides():
    # A = 0 in every row; gradient beta * (rho - 1): rho = e^.2, 1, e^-1 in row 1
    _, gradient = value_and_gradient(K3, make_batch(value=REWARD))
    close(gradient[0], [0.2 * 0.221403, 0.0, 0.2 * (0.367879 - 1)])
    # value .2 * sum(rho - 1 - ln rho) = .2 * (.221403 - .2 + 0 + .367879 - 1 + 1)
    one = make_batch(MASK[:1], REF[:1], [0.5], [0.5])
    close(value_and_gradient(K3, one, LOGP[:1])[0], 0.2 * (0.021403 + 0.367879))


def test_statistics_of_the_golden_batch():
    _, stats = offline.loss(make_logp(), make_batch(), A_LOL)
    found = {name: reduce(stat) for name, stat in stats.items()}
    rho = [math.exp(-0.8), math.exp(-1.8), 1.9]  # N_ref - N = -.8, -1.8, 2.7
    assert found == pytest.approx(
        {
            "loss": 0.192529,
            "logps/policy": -2.5,
            "logps/ref": -7.6 / 3,
            "logged/reward": 1.4 / 3,
            "logged/reward_std": math.sqrt((0.64 + 0.09 + 0.09) / 3 - (1.4 / 3) ** 2),
            "value/mean": 0.4,
            "value/std": math.sqrt((0.25 + 0.01 + 0.36) / 3 - 0.16),
            "advantage/mean": 0.2 / 3,
            "advantage/std": math.sqrt((0.09 + 0.04 + 0.09) / 3 - (0.2 / 3) ** 2),
            # rows: sum(rho_t) - T - ln rho = 2.589282 - 3 + .8; 1.356738 - 2 + 1.8; 9.729416 - 3 - 2.7
            "logged/kl": (0.389282 + 1.156738 + 7.029416 - 3.0) / 3,
            "ratio/mean": sum(rho) / 3,
            "ratio/ess": sum(rho) ** 2 / (3 * sum(r * r for r in rho)),
            "ratio/clip_fraction_low": 0.0,
            "ratio/clip_fraction_high": 1 / 3,
        },
        abs=2e-6,
    )


def test_statistics_follow_the_settings():
    def found(settings, **changes):
        _, stats = offline.loss(make_logp(), make_batch(**changes), settings)
        return {name: reduce(stat) for name, stat in stats.items()}

    assert found(SEQ)["ratio/clip_fraction_high"] == 1 / 8  # 6.69 among 8 tokens
    assert found(dataclasses.replace(SEQ, clip=0.2))["ratio/clip_fraction_low"] == 2 / 8  # .3679, .1353
    assert "ratio/clip_fraction_low" not in found(dataclasses.replace(SEQ, clip=None))
    # A = .3, .2, -.3: .2 of the first and of the second row are raised beyond .18, none of the last lowered
    stopped = found(dataclasses.replace(SEQ, weight="signed", clip=0.2, clip_form="stop"))
    assert stopped["ratio/stopped_fraction"] == 2 / 8
    assert found(R_GOLD)["probability/floor_fraction"] == 1 / 8  # e^-3
    assert "ratio/mean" not in found(REF_FREE)
    assert "logged/kl" not in found(REF_FREE, ref=None)


def test_needs():
    assert offline.needs(NLL) == Needs()
    rewarded = Needs(rewards=True, weighed_by="reward")
    assert offline.needs(WBC) == offline.needs(R_GOLD) == rewarded
    assert offline.needs(R_LOL) == rewarded._replace(ref_logp=True)
    valued = Needs(rewards=True, values=True, baseline="value", weighed_by="advantage")
    assert offline.needs(REF_FREE) == offline.needs(ASYMRE) == valued
    assert offline.needs(AWR) == valued._replace(weighed_by="standard_advantage")
    for settings in (A_LOL, SEQ, KL, K3):
        assert offline.needs(settings) == valued._replace(ref_logp=True)
    assert offline.needs(TOPR) == valued._replace(values=False, ref_logp=True, baseline="rows")
    assert offline.needs(IW_SFT) == Needs(ref_logp=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip": 1.5}, r"clip: 1.5, wanted null or a number in \[0, 1\)"),
        ({"clip": 1.0}, "clip: 1.0, wanted"),
        ({"clip": -0.1}, "clip: -0.1, wanted"),
        ({"clip": NAN}, "clip: nan, wanted"),
        ({"clip_form": "ppo"}, "clip_form: 'ppo', wanted bound, stop"),
        ({"clip_form": "stop", "clip": None}, "clip_form: stop, wanted a clip and ratio sequence, token, mean"),
        ({"clip_form": "stop", "ratio": "none"}, "clip_form: stop, wanted a clip and ratio"),
        ({"probability_floor": 1.1}, r"probability_floor: 1.1, wanted a number in \[0, 1\]"),
        ({"kl_beta": -1.0}, "kl_beta: -1.0, wanted a number >= 0"),
        ({"kl_beta": 0.2}, "kl_beta: 0.2, wanted 0 where kl_form is none"),
        ({"weight": "advantages"}, "weight: 'advantages', wanted one, reward, advantage, exponential, signed"),
        ({"ratio": "row"}, "ratio: 'row', wanted none, sequence, token, mean, tapered, probability"),
        ({"baseline": "mean"}, "baseline: 'mean', wanted value, prompt, group, rows"),
        ({"shift": NAN}, "shift: nan, wanted a finite number"),
        ({"weight_temperature": 0.0}, "weight_temperature: 0.0, wanted a number > 0"),
        ({"weight_limit": NAN}, "weight_limit: nan, wanted a number > 0"),
        ({"ratio": "tapered"}, "ratio: tapered with weight advantage, wanted weight signed"),
        ({"baseline": "group", "shift": 0.1}, "shift: 0.1 with baseline group, wanted 0"),
        ({"kl_form": "k1"}, "kl_form: 'k1', wanted none, released, k3"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(A_LOL, **change)


def test_wrong_shapes_name_the_tensor():
    batch = make_batch()
    with pytest.raises(
        UserError, match=r"ref_logp: T is 2, but logp has T = 3 \(was the cache made with another max_length\?\)"
    ):
        offline.loss(make_logp(), dataclasses.replace(batch, ref_logp=torch.zeros(3, 2)), A_LOL)
    with pytest.raises(UserError, match=r"ref_logp: shape is \(2, 3\), but logp has \(B, T\) = \(3, 3\)"):
        offline.loss(make_logp(), dataclasses.replace(batch, ref_logp=torch.zeros(2, 3)), A_LOL)
    with pytest.raises(UserError, match="ref_logp: the batch has none"):
        offline.loss(make_logp(), dataclasses.replace(batch, ref_logp=None), A_LOL)
    with pytest.raises(UserError, match="reward: the batch has no such number"):
        offline.loss(make_logp(), dataclasses.replace(batch, numbers={}), WBC)
    with pytest.raises(UserError, match=r"advantage: shape is \(2,\), wanted \(3,\)"):
        offline.loss(make_logp(), dataclasses.replace(batch, numbers={"advantage": torch.zeros(2)}), A_LOL)
    with pytest.raises(AssertionError, match=r"logp: shape is \(1, 3\), but response_mask has \(3, 3\)"):
        offline.loss(make_logp(LOGP[:1]), batch, NLL)


# rows that are chosen, raised and lowered: N = 3.5, 3.2, .8, A = .3, .2, -.3, ln rho = -.8, -1.8, 2.7
BY_HAND = {
    "awr": (AWR, [1.349859 * 3.5, 1.221403 * 3.2, 0.740818 * 0.8]),  # e^A
    "awr_limited": (dataclasses.replace(AWR, weight_limit=1.25), [1.25 * 3.5, 1.221403 * 3.2, 0.740818 * 0.8]),
    "awr_sharper": (
        dataclasses.replace(AWR, weight_temperature=0.1),
        [20 * 3.5, 7.389056 * 3.2, 0.049787 * 0.8],
    ),  # e^3 > 20
    "asymre": (ASYMRE, [0.4 * 3.5, 0.3 * 3.2, -0.2 * 0.8]),
    "topr": (TOPR, [0.3 * 3.5, 0.2 * 3.2, -0.3 * 0.8]),  # rho = 14.9 of the last -> 1
    "iw_sft": (IW_SFT, [0.765928 * 3.5, 0.406570 * 3.2, 2.459603 * 0.8]),  # e^(-.8/3), e^(-1.8/2), e^(2.7/3)
    # p * nll of each token: .367879 + .303265 + .270671; .163746 + .149361; .090484 + .268128 + .222245
    "dft": (DFT, [0.941815, 0.313107, 0.580857]),
    # ln rho of the tokens .2, 0, -1; .2, -2; 1.9, .2, .6, between ln .8 = -.22 and ln 1.2 = .18: raised beyond it, .2
    # stops. k3 as in the golden statistics: .389282, 1.156738, 7.029416 - 3
    "grpo_offline": (
        GROUPED,
        [
            0.3 * (0 * 1 + 1 * 0.5 + 0.8 * 2) + 0.04 * 0.389282,
            0.2 * (0 * 0.2 + 0.8 * 3) + 0.04 * 1.156738,
            -0.3 * 1.2 * 0.8 + 0.04 * 4.029416,
        ],
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_more_weights_by_hand(name):
    settings, wanted = BY_HAND[name]
    for row in range(3):
        cut = slice(row, row + 1)
        batch = make_batch(MASK[cut], REF[cut], REWARD[cut], VALUE[cut])
        found, gradient = value_and_gradient(settings, batch, LOGP[cut])
        close(found, wanted[row], atol=3e-6)
        if name in ("awr", "asymre", "topr", "iw_sft"):  # a weight for all tokens
            close(gradient.sum() / sum(MASK[row]), -wanted[row] / [3.5, 3.2, 0.8][row], atol=3e-6)


def test_reductions_to_known_methods():
    ones, zero_or_one = make_batch(reward=[1.0, 1.0, 1.0]), make_batch(reward=[1.0, 0.0, 1.0])
    positive = make_batch(reward=[0.8, 0.3, 0.3], value=[0.5, 0.1, 0.1])  # A = .3, .2, .2
    by_gain = make_batch(reward=[0.3, 0.2, 0.2])
    kept = make_batch([MASK[0], MASK[2]], [REF[0], REF[2]], [1.0, 1.0], [0.0, 0.0])
    pairs = [
        ((dataclasses.replace(AWR, weight_temperature=1e12), make_batch()), (NLL, make_batch())),
        ((DFT, ones), (dataclasses.replace(R_GOLD, probability_floor=0.0), ones)),
        ((TOPR, positive), (WBC, by_gain)),
        ((dataclasses.replace(ASYMRE, shift=0.0), positive), (REF_FREE, positive)),
        ((dataclasses.replace(AWR, weight_limit=1e-9, weight_temperature=1e9), make_batch()), None),
    ]
    for (settings, batch), other in pairs:
        found = value_and_gradient(settings, batch)
        wanted = (0.0, torch.zeros_like(found[1])) if other is None else value_and_gradient(*other)
        close(found[0], wanted[0], atol=1e-8)
        close(found[1], wanted[1], atol=1e-8)
    # iw-SFT with the ratio of the bound: R-LOL on rewards of 0 and 1, of which the rows of 0 were left out
    whole = dataclasses.replace(IW_SFT, ratio="sequence", clip=0.9)
    left = value_and_gradient(whole, kept, [LOGP[0], LOGP[2]])
    right = value_and_gradient(R_LOL, zero_or_one)
    same(left[0], right[0])
    same(left[1], right[1][[0, 2]])


@pytest.mark.parametrize(
    ("settings", "push"),
    [
        (TOPR, 0.3 * math.exp(-50)),  # fades with the response
        (GROUPED, -0.04),  # the push has stopped, and k3 pulls the row back
        (BOUND, 0.3 * 0.8 - 0.04),  # the clip keeps .8 of it, of which k3 takes .04
        (dataclasses.replace(BOUND, kl_beta=0.24), 0.0),  # kl_beta = |weight| * factor holds the row
        (ASYMRE, 0.2),
    ],
)
def test_what_bounds_a_row_that_is_lowered(settings, push):
    """d loss / d ln pi of a response of one token, A = -.3, that is e^50 times less likely than it was."""
    _, gradient = value_and_gradient(settings, make_batch([[1]], [[-1.0]], [0.0], [0.3]), [[-51.0]])
    close(gradient, [[push]], atol=1e-12)


@pytest.mark.parametrize("settings", [ASYMRE, TOPR, GROUPED])
def test_the_worse_row_goes_down_and_the_better_one_up(settings):
    batch = make_batch(ref=LOGP, reward=[0.8, 0.3, 0.3], value=[0.5, 0.1, 0.8])
    _, gradient = value_and_gradient(settings, batch)
    assert (gradient[0] < 0).all() and (gradient[2] > 0).all()
    lowered = offline.loss(make_logp(), batch, settings)[1]["logps/lowered"]
    assert reduce(lowered) == pytest.approx(-0.8)  # the last row's alone


# what the advantage is over


def grouped(*rewards, prompts):
    made = tiny.items(len(rewards), reward=lambda i: rewards[i])
    return [
        dataclasses.replace(item, rows=(dataclasses.replace(item.rows[0], prompt_ids=(prompt,)),))
        for item, prompt in zip(made, prompts, strict=True)
    ]


def test_advantages_over_means():
    learned = grouped(1.0, 3.0, 0.5, 2.0, 2.0, 2.0, 5.0, prompts=[7, 7, 8, 9, 9, 9, 7])  # mean 15.5 / 7
    held_out = grouped(1.0, 2.0, prompts=[7, 7])

    def advantages(baseline):
        parts = baselines.with_advantages((learned, held_out), baseline)
        return [[item.numbers["advantage"] for item in part] for part in parts]

    assert advantages("rows")[1] == pytest.approx([1 - 15.5 / 7, 2 - 15.5 / 7])  # that of the rows learned from
    assert advantages("prompt") == [[-2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0], [-0.5, 0.5]]
    scaled = 2 / math.sqrt(8 / 3)  # of 1, 3, 5
    assert advantages("group")[0] == pytest.approx([-scaled, 0, 0, 0, 0, 0, scaled])
    assert advantages("group")[1] == pytest.approx([-1.0, 1.0])


def test_rewards_that_differ_by_rounding_alone_are_one():
    items = grouped(1e5 + 0.1, 1e5 + 0.1, 1e5 + 0.1, 0.73, 0.7300001, prompts=[7, 7, 7, 8, 8])
    (found,) = baselines.with_advantages([items], "group")
    assert [item.numbers["advantage"] for item in found] == [0.0] * 5


def test_advantages_in_standard_deviations():
    parts = [tiny.items(2, advantage=lambda i: 4.0 * i), tiny.items(1, advantage=lambda i: 6.0)]  # 2 +- 2
    found = baselines.with_standard_advantages(parts)
    assert [item.numbers["standard_advantage"] for part in found for item in part] == [-1.0, 1.0, 2.0]
    alike = baselines.with_standard_advantages([tiny.items(2, advantage=lambda i: 0.1)])
    assert [item.numbers["standard_advantage"] for item in alike[0]] == [0.0, 0.0]  # all weigh 1


def drawn_rows(algo, *words, **numbers):
    settings = tiny.settings("rl", f"algo={algo}", *words)
    items = tiny.items(6, **numbers)
    weights = torch.tensor([item.numbers["advantage"] for item in items])
    draw, kept = rows.population(items, Packing(None, 99, False, 0), "advantage", settings, weights)
    return {i for step in range(8) for i in draw(step)}, kept


def test_rows_of_negative_weight_are_drawn(caplog):
    numbers = {"advantage": lambda i: [0.5, 0.0, -0.5, 0.0, 1.0, -1.0][i]}
    assert drawn_rows("grpo_offline", **numbers) == ({0, 2, 4, 5}, 4 / 6)
    assert "2 of 6 rows teach nothing and are left out: each is the only row of its prompt" in caplog.text
    assert drawn_rows("topr", "sampling=positive", **numbers) == ({0, 4}, 2 / 6)
    with pytest.raises(UserError, match=r"none of 6 rows has a weight: each is the only row.*baseline=value"):
        drawn_rows("grpo_offline", advantage=lambda i: 0.0)
    with pytest.raises(UserError, match=r"sampling is priority, but weights of algo=topr may be negative"):
        tiny.settings("rl", "algo=topr", "sampling=priority")


def test_the_best_rows_of_each_prompt(caplog):
    made = [
        Example(f"r{i}", prompt, completion=str(i), reward=reward)
        for i, (prompt, reward) in enumerate([("p", 1.0), ("q", 3.0), ("p", 2.0), ("p", 2.0), ("q", 0.0), ("s", -1.0)])
    ]

    def best(of_prompt, at_least):
        chosen = rows.chosen_rows(made, "best", BestRows(of_prompt=of_prompt, at_least=at_least))
        return [row.id for row in chosen]

    assert best(1, None) == ["r1", "r2", "r5"]  # of equal ones the first
    assert "rows=best: 3 of 6 rows, of 3 prompts (the 1 best of each prompt)" in caplog.text
    assert best(2, None) == ["r1", "r2", "r3", "r4", "r5"]
    assert best(None, 1.0) == ["r0", "r1", "r2", "r3"] and best(1, 1.0) == ["r1", "r2"]
    caplog.clear()
    assert len(best(9, None)) == 6 and "rows=best leaves no row out" in caplog.text
    with pytest.raises(UserError, match=r"best.at_least: none of 6 rows has a reward of 4 \(the highest: 3\)"):
        best(1, 4.0)
    shuffled = rows.learned_rows(made, tiny.settings("rl", "algo=rft", "shuffle_rewards=true"))
    assert [row.id for row in shuffled] != ["r1", "r2", "r5"]  # a control: they are no better than others
    assert [row.id for row in rows.learned_rows(made, tiny.settings("rl", "algo=rft"))] == ["r1", "r2", "r5"]
    with pytest.raises(UserError, match="of_prompt and at_least are both null"):
        tiny.settings("rl", "algo=rft", "best.of_prompt=null")
