"""KTO and BCO against hand arithmetic and TRL's formula; labels, class weights, mismatched rows, the midpoint."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.algorithms import labels
from pipeline.algorithms.stats import mean_stat, reduce
from pipeline.data import convert
from pipeline.data.rows import Rows
from pipeline.errors import UserError
from pipeline.records import Batch, Example, Needs
from pipeline.rl import labels as learning
from pipeline.rl import reference_points, scored
from tests import tiny

KTO = labels.Settings("kto", beta=0.1, desirable_weight=None, undesirable_weight=1.0, threshold=None)
BCO = dataclasses.replace(KTO, objective="bco")
NAN = math.nan

# two rows of up to three tokens: ln ratios of the whole responses +2 (.5 + 1.5) and +1 (one token)
LOGP = [[-1.0, -0.5, NAN], [-1.0, NAN, NAN]]
REF = [[-1.5, -2.0, 0.0], [-2.0, 0.0, 0.0]]
MASK = [[True, True, False], [True, False, False]]


def batch_of(mask, ref, desirable, point, weight=None):
    """A batch of rows with `mask` (B, T), whose numbers are those of the rows that are no fillers."""
    mask = torch.tensor(mask)
    ids, lengths = torch.zeros_like(mask, dtype=torch.long), torch.ones(len(mask), dtype=torch.long)
    rows = len(desirable)
    numbers = {"desirable": desirable, "weight": weight or [1.0] * rows, "reference_point": [point] * rows}
    numbers = {name: torch.tensor(values, dtype=torch.float64) for name, values in numbers.items()}
    ref = None if ref is None else torch.tensor(ref, dtype=torch.float64)
    return Batch(tuple(range(rows)), ids, torch.ones_like(mask), lengths, ids, mask, numbers, ref)


def value_and_gradient(settings, logp, batch):
    logp = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    total, stats = labels.loss(logp, batch, settings)
    (gradient,) = torch.autograd.grad(total, logp)
    return total.item(), gradient.tolist(), {name: reduce(stat) for name, stat in stats.items()}


@pytest.mark.parametrize(
    ("settings", "loss", "slopes"),
    [
        # z = .05: m = .2 - .05 = .15 and -(.1 - .05) = -.05; 1 - sigmoid = .462570 and .512497, the second twice;
        # slopes beta * sigmoid (1 - sigmoid): -.1 * .248599, and upwards .1 * 2 * .249844
        (KTO, 0.462570 + 2 * 0.512497, (-0.0248599, 0.0499688)),
        # ln(1 + e^-.15) = .620957, ln(1 + e^.05) = .718460; slopes -.1 * .462570 and .1 * 2 * .512497
        (BCO, 0.620957 + 2 * 0.718460, (-0.0462570, 0.1024995)),
    ],
)
def test_golden_rows(settings, loss, slopes):
    """Descent raises the desirable row and lowers the other; NaN in padding is nothing."""
    total, gradient, stats = value_and_gradient(settings, LOGP, batch_of(MASK, REF, [1.0, 0.0], 0.05, [1.0, 2.0]))
    assert total == pytest.approx(loss, abs=2e-6)
    assert gradient[0] == pytest.approx([slopes[0], slopes[0], 0.0], abs=1e-6)
    assert gradient[1] == pytest.approx([slopes[1], 0.0, 0.0], abs=1e-6)
    assert stats == pytest.approx(
        {
            "loss": loss / 2,
            "rewards/accuracies": 0.5,  # the undesirable row lies above the point
            "rewards/chosen": 0.2,
            "rewards/rejected": 0.1,
            "logps/chosen": -1.5,
            "logps/rejected": -1.0,
            "logps/ref_chosen": -3.5,
            "logps/ref_rejected": -2.0,
        },
        abs=1e-6,
    )


def test_kto_is_trls_formula():
    """beta outside of both, on ln ratios and their mean: 1 - sigmoid(beta (lr - kl)), and with the sign turned."""
    torch.manual_seed(0)
    ratios, kl = torch.randn(6, dtype=torch.float64) * 5, 1.7
    good = torch.tensor([True, False, True, True, False, False])
    wanted = 1.5 * (1 - F.sigmoid(0.1 * (ratios[good] - kl))).sum() + (1 - F.sigmoid(0.1 * (kl - ratios[~good]))).sum()
    batch = batch_of([[True]] * 6, [[0.0]] * 6, good.double().tolist(), 0.1 * kl, (good * 0.5 + 1.0).tolist())
    assert value_and_gradient(KTO, ratios[:, None].tolist(), batch)[0] == pytest.approx(wanted.item())


@pytest.mark.parametrize(("settings", "loss"), [(KTO, 0.5), (BCO, math.log(2))])
def test_at_the_start_both_labels_cost_the_same_and_are_half_right(settings, loss):
    total, gradient, stats = value_and_gradient(settings, REF, batch_of(MASK, REF, [1.0, 0.0], 0.0))
    assert total == pytest.approx(2 * loss) and stats["rewards/accuracies"] == 0.5
    assert gradient[0][0] == -gradient[1][0] < 0


def test_rows_far_on_the_wrong_side_are_given_up_by_kto_alone():
    batch = batch_of([[True]] * 2, [[0.0]] * 2, [1.0, 0.0], 0.0)
    far = [[-1e4], [1e4]]  # m = -1000
    total, gradient, _ = value_and_gradient(KTO, far, batch)
    assert total == 2.0 and gradient == [[0.0], [0.0]]
    total, gradient, _ = value_and_gradient(BCO, far, batch)
    assert total == pytest.approx(2000.0) and gradient == [[pytest.approx(-0.1)], [pytest.approx(0.1)]]


def test_fillers_contribute_nothing():
    known = value_and_gradient(KTO, LOGP, batch_of(MASK, REF, [1.0, 0.0], 0.05))
    padded = batch_of([*MASK, [False] * 3], [*REF, [0.0] * 3], [1.0, 0.0], 0.05)
    total, gradient, stats = value_and_gradient(KTO, [*LOGP, [NAN] * 3], padded)
    assert (total, gradient, stats) == (known[0], [*known[1], [0.0] * 3], known[2])
    total, gradient, stats = value_and_gradient(KTO, [[NAN] * 3], batch_of([[False] * 3], [[0.0] * 3], [], 0.0))
    assert (total, gradient) == (0.0, [[0.0] * 3]) and math.isnan(stats["loss"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"objective": "dpo"}, "objective: 'dpo', wanted kto, bco"),
        ({"beta": 0.0}, "beta: 0.0, wanted a number > 0"),
        ({"desirable_weight": -1.0}, "desirable_weight: -1.0, wanted null or a number >= 0"),
        ({"undesirable_weight": NAN}, "undesirable_weight: nan, wanted a number >= 0"),
        ({"undesirable_weight": 0.0, "desirable_weight": None}, "undesirable_weight: 0, and no row of the other class"),
        ({"threshold": NAN}, "threshold: nan, wanted null or a number"),
    ],
)
def test_settings_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(KTO, **wrong)


def test_what_is_missing_is_named():
    assert labels.needs(KTO) == Needs(rewards=True, ref_logp=True)
    with pytest.raises(UserError, match="ref_logp: the batch has none"):
        labels.loss(torch.zeros(2, 3), batch_of(MASK, None, [1.0, 0.0], 0.0), KTO)
    batch = dataclasses.replace(batch_of(MASK, REF, [1.0, 0.0], 0.0), numbers={})
    with pytest.raises(UserError, match="desirable: the batch has no such number"):
        labels.loss(torch.zeros(2, 3), batch, KTO)


# which rows are desirable, and what they count


def encoded(rewards):
    """Items of rows with these rewards; nothing else is read of them."""
    from pipeline.data.encoded import Items

    return Items([], None, 1, {"reward": np.array(rewards)})


@pytest.mark.parametrize(
    ("rewards", "changes", "desirable", "weight"),
    [
        # thumbs: the mean .25 lies between; one good row of four counts three times
        ([1.0, 0.0, 0.0, 0.0], {}, [1, 0, 0, 0], [3, 1, 1, 1]),
        # stars: mean 3.5
        ([5.0, 1.0, 4.0, 4.0], {"undesirable_weight": 2.0}, [1, 0, 1, 1], [2 / 3, 2, 2 / 3, 2 / 3]),
        ([5.0, 1.0, 4.0, 4.0], {"threshold": 5.0}, [1, 0, 0, 0], [3, 1, 1, 1]),
        ([5.0, 1.0, 4.0, 4.0], {"desirable_weight": 1.5}, [1, 0, 1, 1], [1.5, 1, 1.5, 1.5]),
        ([0.1] * 3, {"threshold": 0.1}, [1, 1, 1], [1, 1, 1]),  # nothing to weigh against
    ],
)
def test_labels_and_weights_by_hand(rewards, changes, desirable, weight):
    held_out = encoded(rewards[:1])
    items, tested, facts = learning.with_labels(encoded(rewards), held_out, dataclasses.replace(KTO, **changes))
    assert items.numbers["desirable"].tolist() == desirable
    assert items.numbers["weight"].tolist() == pytest.approx(weight)
    assert tested.numbers["weight"].tolist() == pytest.approx(weight[:1])  # by training's threshold and counts
    assert facts["labels/desirable"] == sum(desirable) / len(rewards)


def test_equal_rewards_are_refused_without_a_threshold_and_one_label_is_told(caplog):
    with pytest.raises(UserError, match=r"threshold: null, but all 3 rows have the reward 0\.1"):
        learning.with_labels(encoded([0.1] * 3), encoded([0.1]), KTO)  # of which the mean is a hair above
    learning.with_labels(encoded([0.1] * 3), encoded([0.1]), dataclasses.replace(KTO, threshold=1.0))
    assert "all rows have one label" in caplog.text


def test_sides_of_pairs_are_labels_where_nothing_has_a_reward():
    pairs = [Example(f"{i}", "p", chosen="good", rejected="bad") for i in range(2)]
    rows = convert.with_sides(convert.to_scored(pairs, "both"))
    assert [(row.completion, row.reward) for row in rows] == [("good", 1.0), ("bad", 0.0)] * 2
    mixed = [*pairs, Example("c", "p", completion="so", reward=0.5)]
    rows = convert.with_sides(convert.to_scored(mixed, "both"))
    assert [row.reward for row in rows] == [None] * 4 + [0.5]
    others = convert.to_scored(pairs[:1], "both")  # held out: one row's reward decides for both
    assert [row.reward for part in scored.by_sides(rows, others) for row in part] == [None] * 4 + [0.5, None, None]
    sided = scored.by_sides(others, others)
    assert [row.reward for part in sided for row in part] == [1.0, 0.0] * 2
    alone = [*pairs, Example("c", "p", completion="so")]
    assert all(row.reward is None for row in convert.with_sides(convert.to_scored(alone, "both")))


# reference points


def test_mismatched_rows_are_of_other_prompts_and_every_such_row_may_come():
    rows = Rows.of([Example(str(i), "abbcbb"[i], completion=f"said {i}") for i in range(6)])
    found = [reference_points.of_other_prompts(rows, torch.Generator().manual_seed(seed)) for seed in range(60)]
    met = {(i, int(j)) for places in found for i, j in enumerate(places)}
    assert met == {(i, j) for i in range(6) for j in range(6) if "abbcbb"[i] != "abbcbb"[j]}
    with pytest.raises(UserError, match=r"all 4 rows have one prompt.*algo=bco"):
        reference_points.of_other_prompts(rows.take(np.array([1, 2, 4, 5])), torch.Generator())


def test_held_out_rows_meet_responses_to_other_prompts_too():
    train = Rows.of([Example(str(i), "abb"[i], completion="said") for i in range(3)])
    held_out = Rows.of([Example(str(i), "abc"[i % 3], completion="said") for i in range(60)])
    found = reference_points.of_any_prompt(train, held_out, torch.Generator().manual_seed(1))
    assert all("abb"[place] != "abc"[i % 3] for i, place in enumerate(found))


def stats_of(chosen, rejected):
    return {
        f"rewards/{name}": mean_stat(torch.tensor(values, dtype=torch.float64))
        for name, values in (("chosen", chosen), ("rejected", rejected))
    }


def test_the_midpoint_is_that_of_the_steps_before():
    """Of +.4 and +.2, -.1: means .4 and .05 -> .225; then of .4, 0 and .2, -.1, -.3, -.2: .2 and -.1 -> .05."""
    point = reference_points.Midpoint(tiny.ranks())
    assert point.of_step(0, []) == 0.0
    point.note(stats_of([0.4], [0.2]))
    point.note(stats_of([], [-0.1]))  # another micro-batch
    assert point.of_step(1, []) == pytest.approx(0.225)
    before = point.state_dict(1)  # asked for where step 1 is not taken: what it saw does not count
    point.note(stats_of([0.0], [-0.3, -0.2]))
    assert point.state_dict(1) == before
    memory = json.loads(json.dumps(point.state_dict(2)))
    again = reference_points.Midpoint(tiny.ranks())
    again.load_state_dict(memory)
    assert again.of_step(2, []) == point.of_step(2, []) == pytest.approx(0.05)
    point.note(stats_of([NAN], [0.0]))  # of a step that is skipped
    assert point.of_step(3, []) == again.of_held_out()


def test_of_one_class_alone_the_midpoint_is_its_mean():
    point = reference_points.Midpoint(tiny.ranks())
    point.of_step(0, [])
    point.note(stats_of([0.4, 0.2], []))
    assert point.of_step(1, []) == pytest.approx(0.3)
