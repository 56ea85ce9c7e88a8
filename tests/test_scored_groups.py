"""AGRO, REBEL and NCA against hand arithmetic and one another; how rows of a prompt become groups."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.algorithms import groups
from pipeline.algorithms.stats import reduce
from pipeline.data import convert
from pipeline.data.batching import Packing, collate
from pipeline.data.rows import Rows
from pipeline.errors import UserError
from pipeline.models.policy import Policy
from pipeline.records import Batch, Example, Needs
from pipeline.rl import groups as learning
from tests import tiny

VARIANCE = groups.Settings("variance", group_size=2, beta=0.5, alpha=0.5)
NCA = dataclasses.replace(VARIANCE, objective="nca")
NAN = math.nan

# one group of two rows of up to three tokens: ln ratios of the whole responses +2 (.5 + 1.5) and +1 (one token)
LOGP = [[-1.0, -0.5, NAN], [-1.0, NAN, NAN]]
REF = [[-1.5, -2.0, 0.0], [-2.0, 0.0, 0.0]]
MASK = [[True, True, False], [True, False, False]]


def batch_of(mask, ref, rewards):
    """A batch of rows with `mask` (B, T), first rows first, and of the groups' rewards (groups, K)."""
    mask = torch.tensor(mask)
    ids, lengths = torch.zeros_like(mask, dtype=torch.long), torch.ones(len(mask), dtype=torch.long)
    columns = torch.tensor(rewards, dtype=torch.float64).T
    numbers = {groups.reward_name(i): column for i, column in enumerate(columns)}
    ref = None if ref is None else torch.tensor(ref, dtype=torch.float64)
    return Batch(tuple(range(len(rewards))), ids, torch.ones_like(mask), lengths, ids, mask, numbers, ref)


def value_and_gradient(settings, logp, batch):
    logp = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    total, stats = groups.loss(logp, batch, settings)
    (gradient,) = torch.autograd.grad(total, logp)
    return total.item(), gradient.tolist(), {name: reduce(stat) for name, stat in stats.items()}


@pytest.mark.parametrize(
    ("settings", "loss", "slopes"),
    [
        # d = 1.5 - 1 and 0 - .5, half of their squared gap of 1; d/dlr = -.5 * (.5 + .5), and upwards
        (VARIANCE, 0.5, (-0.5, 0.5)),
        # softmax of 3 and 0: .952574, .047426; m = 1 and .5: ln sigmoid = -.313262 and -.474077, of -m -1.313262 and
        # -.974077: .298405 + .022484 + 1.143669; slopes .5 * (sigmoid(m) / 2 - softmax * sigmoid(-m)):
        # .5 * (.365529 - .256187) and .5 * (.311230 - .017905): either is likelier than its reward asks for
        (NCA, 1.464558, (0.054671, 0.146662)),
    ],
)
def test_golden_group(settings, loss, slopes):
    total, gradient, stats = value_and_gradient(settings, LOGP, batch_of(MASK, REF, [[1.5, 0.0]]))
    assert total == pytest.approx(loss, abs=2e-6)
    assert gradient[0] == pytest.approx([slopes[0], slopes[0], 0.0], abs=2e-6)  # NaN in padding is nothing
    assert gradient[1] == pytest.approx([slopes[1], 0.0, 0.0], abs=2e-6)
    assert stats == pytest.approx(
        {
            "loss": loss,
            "rewards/chosen": 1.0,
            "rewards/rejected": 0.5,
            "rewards/margins": 0.5,
            "rewards/accuracies": 1.0,
            "groups/equal_rewards": 0.0,
            "logged/reward": 0.75,
            "logps/chosen": -1.5,
            "logps/rejected": -1.0,
            "logps/ref_chosen": -3.5,
            "logps/ref_rejected": -2.0,
        },
        abs=2e-6,
    )


def random_groups(k, count=5, seed=0):
    """(ratios, rewards) (count, k), and the batch that they are of."""
    torch.manual_seed(seed)
    ratios, rewards = torch.randn(2, count, k, dtype=torch.float64)
    rows = count * k
    return ratios, rewards, ratios.T.reshape(-1, 1).tolist(), batch_of([[True]] * rows, [[0.0]] * rows, rewards)


def test_two_rows_are_rebel():
    """Half of ((lr1 - lr2) / eta - (r1 - r2))^2 with eta = 1 / beta = 2; value and gradient."""
    ratios, rewards, logp, batch = random_groups(2)
    ratios.requires_grad_()
    rebel = ((ratios[:, 0] - ratios[:, 1]) / 2 - (rewards[:, 0] - rewards[:, 1])).square().sum()
    (wanted,) = torch.autograd.grad(rebel, ratios)
    total, gradient, _ = value_and_gradient(VARIANCE, logp, batch)
    assert total == pytest.approx(rebel.item() / 2)
    torch.testing.assert_close(torch.tensor(gradient)[:, 0].view(2, -1).T, wanted.float() / 2)


@pytest.mark.parametrize("k", [3, 4])
def test_the_variance_is_the_mean_over_all_pairs_of_rebel(k):
    ratios, rewards, logp, batch = random_groups(k)
    gaps = [
        ((ratios[:, i] - ratios[:, j]) / 2 - (rewards[:, i] - rewards[:, j])).square() / 2
        for i in range(k)
        for j in range(i)
    ]
    found = value_and_gradient(dataclasses.replace(VARIANCE, group_size=k), logp, batch)[0]
    assert found == pytest.approx(float(torch.stack(gaps).mean(0).sum()))


def test_nca_of_a_pair_is_as_published():
    """As alpha -> 0 the better row has all of the softmax: - ln s(m1) - ln s(-m1) / 2 - ln s(-m2) / 2."""
    ratios, rewards, logp, batch = random_groups(2)
    best = 0.5 * torch.where(rewards[:, 0] > rewards[:, 1], ratios[:, 0], ratios[:, 1])
    both = F.logsigmoid(-0.5 * ratios).sum(1)
    found = value_and_gradient(dataclasses.replace(NCA, alpha=1e-4), logp, batch)[0]
    assert found == pytest.approx(float((-F.logsigmoid(best) - both / 2).sum()))


@pytest.mark.parametrize(("settings", "loss"), [(VARIANCE, 1.0), (NCA, 2 * math.log(2))])
def test_at_the_start_better_rows_go_up(settings, loss):
    """Of rewards 2, 1 and 0: their variance is 1; all ln sigmoid are -ln 2, of the weights 1 and 1. All pairs tie."""
    three = dataclasses.replace(settings, group_size=3)
    total, gradient, stats = value_and_gradient(three, [[-1.0]] * 3, batch_of([[True]] * 3, [[-1.0]] * 3, [[2, 1, 0]]))
    assert total == pytest.approx(loss) and stats["rewards/accuracies"] == 0.5
    best, middle, worst = (row[0] for row in gradient)
    assert best < middle < worst and best < 0 < worst and best + middle + worst == pytest.approx(0)


@pytest.mark.parametrize("settings", [VARIANCE, NCA])
def test_equal_rewards_teach_nothing_at_the_start_and_say_so(settings):
    _, gradient, stats = value_and_gradient(settings, REF, batch_of(MASK, REF, [[0.7, 0.7]]))
    assert gradient[0][0] == pytest.approx(0) and gradient[1][0] == pytest.approx(0)
    assert stats["groups/equal_rewards"] == 1 and math.isnan(stats["rewards/margins"])


@pytest.mark.parametrize("settings", [VARIANCE, NCA])
def test_the_optimum_is_that_of_the_reward_less_the_divergence(settings):
    """Of three responses under a uniform reference pi* ~ exp(r / beta); of nca exp(r / (alpha beta))."""
    rewards, three = [1.0, 0.2, -0.5], dataclasses.replace(settings, group_size=3)
    batch = batch_of([[True]] * 3, [[-math.log(3)]] * 3, [rewards])
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def closure():
        optimizer.zero_grad()
        # nca's ln ratios are free of the sum to one: its own constant of the prompt takes its place
        logp = logits.log_softmax(0) if settings is VARIANCE else logits - math.log(3)
        total = groups.loss(logp[:, None], batch, three)[0]
        total.backward()
        return total

    optimizer.step(closure)
    scale = 0.5 if settings is VARIANCE else 0.5 * 0.5
    wanted = torch.softmax(torch.tensor(rewards, dtype=torch.float64) / scale, 0)
    torch.testing.assert_close(logits.detach().softmax(0), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", [VARIANCE, NCA])
def test_fillers_contribute_nothing(settings):
    total, gradient, stats = value_and_gradient(settings, LOGP, batch_of(MASK, REF, [[1.5, 0.0]]))
    empty, zero = [False] * 3, [0.0] * 3
    padded = batch_of([MASK[0], empty, MASK[1], empty], [REF[0], zero, REF[1], zero], [[1.5, 0.0]])
    found = value_and_gradient(settings, [LOGP[0], [NAN] * 3, LOGP[1], [NAN] * 3], padded)
    assert found == (total, [gradient[0], zero, gradient[1], zero], stats)
    filler = dataclasses.replace(batch_of([empty] * 2, [zero] * 2, [[0.0, 0.0]]), items=())
    filler = dataclasses.replace(filler, numbers={name: values[:0] for name, values in filler.numbers.items()})
    assert value_and_gradient(settings, [[NAN] * 3] * 2, filler)[:2] == (0.0, [zero, zero])


def test_wrong_settings_and_batches_are_named():
    assert groups.needs(NCA) == Needs(rewards=True, ref_logp=True)
    for changes, message in (
        ({"objective": "mse"}, "objective: 'mse', wanted variance, nca"),
        ({"group_size": 1}, "group_size: 1, wanted at least 2"),
        ({"beta": 0.0}, "beta: 0.0, wanted a number > 0"),
        ({"alpha": NAN}, "alpha: nan, wanted a number > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(VARIANCE, **changes)
    logp = torch.zeros(2, 3)
    with pytest.raises(UserError, match="reward_2: the batch has no such number"):
        groups.loss(logp, batch_of(MASK, REF, [[1.0]]), VARIANCE)
    with pytest.raises(AssertionError, match="a group lacks a response"):
        groups.loss(logp, batch_of([MASK[0], [False] * 3], REF, [[1.0, 0.0]]), VARIANCE)


# how groups are made


def rows_of(prompts, reward=float):
    rows = [Example(str(i), prompt, completion=f"said {i}", reward=reward(i)) for i, prompt in enumerate(prompts)]
    return Rows.of(rows)


def test_groups_hold_every_row_of_prompts_with_enough(caplog):
    """a has 4 rows, b 3, c 1: two groups of a, two of b of which one row comes twice, none of c."""
    caplog.set_level("INFO", "tiffin")
    rows = rows_of("abcababa")
    found = learning.groups_of(rows, 2, 7, "train")
    prompts = [{rows[int(i)].prompt for i in group} for group in found]
    assert prompts == [{"a"}, {"a"}, {"b"}, {"b"}] and all(len({*group}) == 2 for group in found.tolist())
    times = np.bincount(found.ravel(), minlength=8)
    assert times[[0, 3, 5, 7]].tolist() == [1] * 4 and sorted(times[[1, 4, 6]]) == [1, 1, 2] and times[2] == 0
    assert "4 of 2 rows each, of 2 prompts; 1 rows come twice to fill groups up; 1 rows of prompts with" in caplog.text
    assert (found == learning.groups_of(rows, 2, 7, "train")).all()  # the same each time; another by another seed
    assert any((found != learning.groups_of(rows, 2, seed, "train")).any() for seed in range(4))
    assert "equal" not in caplog.text
    learning.groups_of(rows_of("aabb", lambda i: i // 2), 2, 7, "train")
    assert "the rewards of each are equal" in caplog.text


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (
            "aabbc",
            "group_size: 3, but no prompt of train has .* 2, of 3 prompts.*: set algorithm.settings.group_size=2",
        ),
        ("abc", "the most have 1, of 3 prompts.*: set algo=alol"),
    ],
)
def test_where_no_prompt_has_enough_rows_it_is_refused(prompts, message):
    with pytest.raises(UserError, match=message):
        learning.groups_of(rows_of(prompts), 3, 7, "train")


def test_items_of_groups():
    rows = tiny.items(5, reward=lambda i: i / 8)
    rows = [dataclasses.replace(row, ref_logp=(torch.full((len(row.rows[0].response_ids),), -1.0),)) for row in rows]
    made = learning.GroupedItems(rows, np.array([[3, 1], [4, 0], [2, 3]]))
    assert len(made) == 3 and made[0].rows == (rows[3].rows[0], rows[1].rows[0])
    assert made[1].numbers == {"reward_1": 0.5, "reward_2": 0.0} and made[1].example == rows[4].example
    assert [len(logp) for logp in made[2].ref_logp] == [len(row.response_ids) for row in made[2].rows]
    assert [item.rows for item in made[1:]] == [made[1].rows, made[2].rows]


def test_a_group_reads_its_prompt_once():
    """Two groups of three rows: the same loss and gradients as of rows one below the other with padding."""
    rows = [
        dataclasses.replace(row, rows=(dataclasses.replace(row.rows[0], prompt_ids=(5, 6, 7, 8 + i // 3)),))
        for i, row in enumerate(tiny.items(6, reward=lambda i: i * 5 % 7 / 6))
    ]
    rows = [dataclasses.replace(row, ref_logp=(torch.full((len(row.rows[0].response_ids),), -5.0),)) for row in rows]
    made, three = learning.GroupedItems(rows, np.arange(6).reshape(2, 3)), dataclasses.replace(NCA, group_size=3)
    found = []
    for once in (False, True):
        policy = Policy(tiny.language_model("llama", num_hidden_layers=1), 64)
        assert policy.unpadded
        policy.unpadded = once
        batch = collate(made, [0, 1], Packing(9, None, False, tiny.PAD_ID, unpadded=once, prompts_once=once))
        total, _ = groups.loss(policy(batch), batch, three)
        total.backward()
        found.append((total.detach(), {name: p.grad for name, p in policy.named_parameters()}))
    assert batch.owners.tolist() == [0, 1] * 3 and total > 0
    tiny.close(found[1][0], found[0][0])
    tiny.close(found[1][1], found[0][1])


def test_a_pair_beside_a_completion_is_two_rows_more():
    row = Example("x", "p", completion="so", reward=0.3, chosen="good", rejected="bad", chosen_reward=0.9)
    found = convert.to_scored(convert.parted([row]), "both")
    assert [(one.id, one.completion, one.reward) for one in found] == [
        ("x", "so", 0.3),
        ("x/chosen", "good", 0.9),
        ("x/rejected", "bad", None),
    ]
    alone = [Example("y", "p", completion="so"), Example("z", "p", chosen="good", rejected="bad")]
    assert convert.parted(alone) == alone
