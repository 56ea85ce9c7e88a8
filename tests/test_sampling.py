"""Samplers as pure functions of (seed, step), against the specification's golden draws."""

import math
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from pipeline.data import sampling
from pipeline.data.sampling import Chances
from pipeline.errors import UserError

ADVANTAGES = [0.3, -0.2, 0.1, 0.0, 0.6]
CHANCES = Chances.of(ADVANTAGES)


def test_p12_survivors_and_draws():
    assert sampling.survivors(ADVANTAGES).tolist() == [0, 2, 4]
    # cdf .3, .4, 1: the first place whose cdf exceeds u
    assert sampling.draw_by_cdf(CHANCES, [0, 0.1, 0.3, 0.35, 0.4, 0.99]) == [0, 0, 2, 2, 4, 4]
    assert sampling.draw_by_cdf(CHANCES, [1.0]) == [4]  # u rounded up to the total


def test_p12_frequencies():
    rows = Counter(sampling.priority_rows(CHANCES, 100_000, step=0, seed=901))
    assert set(rows) == {0, 2, 4}
    expected = {0: 30_000, 2: 10_000, 4: 60_000}
    chi2 = sum((rows[row] - n) ** 2 / n for row, n in expected.items())
    assert chi2 < 13.8  # 2 degrees of freedom, p = .001


def test_p12_a_draw_depends_on_seed_and_step_only():
    steps = [sampling.priority_rows(CHANCES, 8, step, seed=1) for step in range(6)]
    assert [sampling.priority_rows(CHANCES, 8, step, seed=1) for step in (5, 2)] == [steps[5], steps[2]]
    assert len({tuple(rows) for rows in steps}) == 6
    assert sampling.priority_rows(CHANCES, 8, 0, seed=2) != steps[0]
    state = torch.random.get_rng_state()
    sampling.priority_rows(CHANCES, 8, 0, seed=1)
    sampling.epoch_rows(5, 8, 0, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_p12_rows_repeat_within_a_batch():
    assert sampling.priority_rows(Chances.of([0.0, 1.0]), 3, step=0, seed=0) == [1, 1, 1]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([-0.2, 0.0, -1.0], r"none of 3 rows is positive \(largest 0\), wanted at least one"),
        ([], "none of 0 rows is positive, wanted"),
        ([0.1, math.nan], "row 1 has nan, wanted a finite number"),
        ([math.inf, 0.1], "row 0 has inf, wanted a finite number"),
    ],
)
def test_p12_nothing_to_draw_is_one_clear_line(weights, message):
    for draw in (lambda: sampling.survivors(weights), lambda: Chances.of(weights)):
        with pytest.raises(UserError, match=message) as error:
            draw()
        assert "\n" not in str(error.value)


def test_p13_priority_sampling_squares_the_advantage():
    # A+ = .3, .2, 0: drawn with .6, .4, 0, so E[A+ of each row] = .18, .08, 0; uniformly .1, .0667, 0
    positive = [0.3, 0.2, 0.0]
    n = 100_000
    drawn = Counter(sampling.priority_rows(Chances.of([0.3, 0.2, -0.3]), n, 0, 7))
    assert [drawn[row] / n * positive[row] for row in range(3)] == pytest.approx([0.18, 0.08, 0.0], abs=0.002)
    uniform = Counter(sampling.epoch_rows(3, 99_999, 0, 7))
    assert [uniform[row] / 99_999 * positive[row] for row in range(3)] == pytest.approx([0.1, 0.2 / 3, 0.0])


def test_small_weights_do_not_lose_the_tail():
    # 10^6 equal weights of 1e-8 after one of 1: float32 would lose them, float64 does not
    weights = torch.cat([torch.ones(1, dtype=torch.float64), torch.full((1_000_000,), 1e-8, dtype=torch.float64)])
    assert sampling.draw_by_cdf(Chances.of(weights), [1.0 + 0.5e-2]) == pytest.approx([500_001], abs=1)


def test_every_row_comes_once_per_epoch():
    chain = [row for step in range(10) for row in sampling.epoch_rows(7, 3, step, seed=4)]  # 30 rows: 4 epochs and 2
    epochs = [chain[start : start + 7] for start in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_the_chain_does_not_depend_on_the_batch_size(batch_size):
    chain = (row for step in range(100) for row in sampling.epoch_rows(7, batch_size, step, seed=4))
    assert list(islice(chain, 40)) == sampling.epoch_rows(7, 40, 0, seed=4)


def test_neighbouring_seeds_give_other_orders():
    orders = {tuple(sampling.epoch_rows(50, 50, epoch, seed)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9  # (seed 0, epoch 1) is not (seed 1, epoch 0)


def test_no_rows():
    for draw in (
        lambda: sampling.epoch_rows(0, 4, 0, 0),
        lambda: sampling.epochs_by_length(np.empty((0, 1), np.int64), 4, 0),
    ):
        with pytest.raises(UserError, match="data: 0 rows to draw from"):
            draw()


def some_lengths(n: int) -> np.ndarray:
    """(n, 1) from 1 to 99."""
    return np.random.default_rng(n).integers(1, 100, (n, 1))


@pytest.mark.parametrize(("n", "batch_size"), [(1, 1), (1, 4), (7, 3), (7, 20), (64, 8), (100, 7), (1000, 3), (997, 4)])
def test_every_row_comes_once_per_epoch_by_length_too(n, batch_size):
    draw = sampling.epochs_by_length(some_lengths(n), batch_size, seed=4)
    steps = [draw(step) for step in range(-(-4 * n // batch_size))]
    assert all(len(rows) == batch_size for rows in steps)
    chain = [row for rows in steps for row in rows]
    assert all(sorted(chain[start : start + n]) == list(range(n)) for start in range(0, 4 * n, n))
    # whoever asks, in whatever order
    anew = sampling.epochs_by_length(some_lengths(n), batch_size, seed=4)
    places = [len(steps) - 1, 0, len(steps) // 2, 0]
    assert [anew(place) for place in places] == [steps[place] for place in places]


def test_steps_by_length_by_hand():
    # 12 rows in steps of 2 are 6 steps; of the 4 parts that the epoch is sorted in two have one step and two have two:
    # 0 | 1 2 | 3 | 4 5
    assert [sampling._part_of(step, 6) for step in range(6)] == [(0, 1), (1, 3), (1, 3), (3, 4), (4, 6), (4, 6)]
    # 96 rows in steps of 16: of every part each step has 4 rows that follow one another of each quarter of the lengths
    lengths = np.random.default_rng(0).permutation(96)[:, None]
    order = sampling.epoch_rows(96, 96, 0, seed=3)
    draw = sampling.epochs_by_length(lengths, 16, seed=3)
    orders = set()
    for first, stop in ((0, 1), (1, 3), (3, 4), (4, 6)):
        rows = sorted(order[16 * first : 16 * stop], key=lambda row: lengths[row, 0])
        n = 4 * (stop - first)
        for share in range(4):
            quarter = rows[share * n : (share + 1) * n]
            drawn = [tuple(draw(step)[4 * share : 4 * share + 4]) for step in range(first, stop)]
            assert sorted(drawn) == sorted(tuple(quarter[start : start + 4]) for start in range(0, n, 4))
            orders |= {drawn[0] == tuple(quarter[:4])} if n > 4 else set()
    assert orders == {True, False}  # of some quarters the first step has the shorter ones, of others the second


def test_shares_of_sizes_that_four_does_not_divide():
    """6 and 3 rows of 9: of the quarters 1, 2, 1, 2 rows and 0, 1, 1, 1."""
    assert [6 * (i + 1) // 4 - 6 * i // 4 for i in range(4)] == [1, 2, 1, 2]
    lengths = np.arange(9)[:, None]
    for seed in range(5):
        one, two = sampling._by_length(np.arange(9)[::-1], lengths, [6, 3], torch.Generator().manual_seed(seed))
        assert sorted(one + two) == list(range(9)) and one == sorted(one) and two == sorted(two)
        assert one[0] == 0 and {*one[1:3], two[0]} == {1, 2, 3} and {one[3], two[1]} == {4, 5}


def test_parts_of_an_epoch_are_of_like_size():
    for steps in (1, 2, 5, 199, 200, 201, 1000, 12_345):
        bounds = [sampling._part_of(step, steps) for step in range(steps)]
        assert all(first <= step < stop <= first + 50 for step, (first, stop) in enumerate(bounds))
        sizes = [stop - first for first, stop in dict.fromkeys(bounds)]
        assert sum(sizes) == steps and max(sizes) - min(sizes) <= 1 and len(sizes) >= min(steps, 4)


def test_rows_alike_in_both_lengths_come_together():
    # prompts of 0 to 15 tokens, responses 0 1 2 3 0 1 2 3 ...: of 4 steps' quarter two parts by prompt, there and back
    lengths = np.stack([np.arange(16), np.arange(16) % 4], 1)
    found = sampling._by_both(np.arange(16), lengths, 4)
    assert lengths[found, 1].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 2, 2, 1, 1, 0, 0]
    assert found.tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 11, 15, 10, 14, 9, 13, 8, 12]
    n = 6000
    both = np.random.default_rng(1).integers(1, 100, (n, 2))
    draw = sampling.epochs_by_length(both, 20, seed=1)
    steps = [draw(step) for step in range(n // 20)]
    assert sorted(row for rows in steps for row in rows) == list(range(n))
    spread = np.ptp(both[np.array(steps)].reshape(-1, 5, 2), 1).mean(0)
    assert (spread < 25).all()  # of 99 either way; the whole quarter's prompts are within 25, random ones within 66


def test_shares_are_of_like_length_and_steps_of_like_many_tokens():
    lengths = some_lengths(10_000)
    draw = sampling.epochs_by_length(lengths, 20, seed=1)
    steps = np.array([lengths[draw(step), 0] for step in range(500)]).reshape(500, 4, 5)
    assert np.ptp(steps, 2).mean() < 2.5  # of 99: 50 steps share them out
    tokens = steps.sum((1, 2))
    plain = [lengths[sampling.epoch_rows(10_000, 20, step, 1)].sum() for step in range(500)]
    assert tokens.std() < 0.7 * np.std(plain)
    assert abs(np.corrcoef(tokens[:-1], tokens[1:])[0, 1]) < 0.15  # long ones do not come together
    sets = [{tuple(sorted(draw(step))) for step in range(start, start + 500)} for start in (0, 500)]
    assert not sets[0] & sets[1]  # the next epoch puts others together


def test_draws_by_priority_and_length():
    weights = np.random.default_rng(0).random(1000) - 0.5
    chances, lengths = Chances.of(weights.tolist()), some_lengths(1000)
    draw = sampling.priority_by_length(chances, lengths, 8, seed=5)  # some 500 survive: 500 // (4 * 8) = 15 steps
    kept = len(chances.rows)
    together = kept // 32
    drawn = [draw(step) for step in range(2 * together)]
    for part in (0, 1):  # what is drawn is what as many rows at once are
        rows = [row for step in drawn[part * together : (part + 1) * together] for row in step]
        assert Counter(rows) == Counter(sampling.priority_rows(chances, together * 8, part, seed=5))
    shares = lengths[np.array(drawn), 0].reshape(-1, 2)
    assert np.ptp(shares, 1).mean() < 5  # of 99
    assert sampling.priority_by_length(chances, lengths, 8, seed=5)(together + 1) == drawn[together + 1]
    # of 5 rows a step is drawn by itself, or every one of its rows would be the same
    few = sampling.priority_by_length(CHANCES, some_lengths(5), 8, seed=5)
    assert [sorted(few(step)) for step in range(4)] == [
        sorted(sampling.priority_rows(CHANCES, 8, step, seed=5)) for step in range(4)
    ]


def test_p17_step_budget():
    assert sampling.step_budget(9000, 0.677) == 6093  # 9000 * .677 in floating point may be 6092.999...
    assert sampling.step_budget(900, 0.677) == 609
    assert sampling.step_budget(10, 0.55) == 5  # truncated
    assert sampling.step_budget(9000, 1.0) == 9000
    assert sampling.step_budget(10, 0.01) == 1
    assert all(sampling.step_budget(n, k / n) == k for n in range(1, 60) for k in range(1, n + 1))
    with pytest.raises(AssertionError, match="kept_fraction is 0"):
        sampling.step_budget(10, 0.0)
