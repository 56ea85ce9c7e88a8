"""Windows of micro-batches: everything once, ranks in step, budgets kept, padding and fillers without meaning."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from pipeline.data import encoding
from pipeline.data.batching import Extent, Packing, Windows, collate, group, lengths, once, packing_of, window
from pipeline.errors import UserError
from pipeline.records import Example, Item
from pipeline.trainer.schedule import epochs
from tests import tiny

BUDGET = Packing(None, 60, False, 0)
BY_COUNT = Packing(3, None, False, 0)
APART = Packing(None, 60, True, 0)
WHOLE = Packing(None, 60, True, 0, whole=True)
WORLDS = (1, 2, 3, 4)
PARTS = ("prompt_ids", "response_ids")


def plans(items, indices, packing, world):
    return [window(items, indices, packing, rank, world) for rank in range(world)]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("packing", [BUDGET, BY_COUNT, APART, WHOLE])
@pytest.mark.parametrize("count", [1, 2, 5, 23])
def test_every_item_once_and_ranks_in_step(world: int, packing: Packing, count: int) -> None:
    items = tiny.items(30, pairs=packing is WHOLE)
    drawn = [(7 * i) % 30 for i in range(count)]
    ranks = plans(items, drawn, packing, world)
    assert len({len(plan) for plan in ranks}) == 1  # the same number of micro-batches
    assert Counter(i for plan in ranks for indices in plan for i in indices) == Counter(drawn)


def test_items_drawn_twice_come_twice() -> None:
    items = tiny.items(4)
    ranks = plans(items, [2, 2, 2, 1], BUDGET, 2)
    assert Counter(i for plan in ranks for indices in plan for i in indices) == {2: 3, 1: 1}


@pytest.mark.parametrize("packing", [BUDGET, APART, WHOLE])
@pytest.mark.parametrize("seed", range(5))
def test_the_budget_holds_with_padding(packing: Packing, seed: int) -> None:
    items = tiny.items(40, seed=seed, pairs=packing is WHOLE)
    for indices in group(items, range(40), packing, 3):
        batch = collate(items, indices, packing)
        read = batch.input_ids.numel() + (batch.response_ids.numel() if packing.apart else 0)
        assert not indices or read == tiny.padded_tokens([items[i] for i in indices], packing) <= 60


def test_a_budget_is_used() -> None:
    # 4 rows of 10 tokens in 20: two and two
    items = [Item(Example(str(i), ""), (tiny.row(range(5), range(5)),)) for i in range(4)]
    assert [len(g) for g in group(items, range(4), Packing(None, 20, False, 0), 1)] == [2, 2]
    assert [len(g) for g in group(items, range(4), Packing(None, 40, False, 0), 1)] == [4]


def test_a_call_more_is_worth_much_padding() -> None:
    # in 160 tokens, where a call is worth a 16th, 10: beside three rows of 20 there is room for one of 18 and all that
    # follow it (4 x 2 = 8 tokens of padding); not for one of 17 (4 x 3 = 12), with as many to follow
    def cut(length: int, count: int) -> list[int]:
        rows = [tiny.row(range(10), range(n - 10)) for n in [20] * 3 + [length] * count]
        items = [Item(Example(str(i), ""), (row,)) for i, row in enumerate(rows)]
        return [len(g) for g in group(items, range(len(items)), Packing(None, 160, False, 0), 1)]

    assert cut(18, 4) == [7] and cut(17, 4) == [3, 4]
    assert cut(17, 3) == [6]  # 3 x 3 = 9


def test_micro_batch_size_counts_items() -> None:
    items = tiny.items(7, pairs=True)
    groups = group(items, range(7), BY_COUNT, 1)
    assert sorted(len(g) for g in groups) == [1, 3, 3]
    assert len(collate(items, groups[0], BY_COUNT).input_ids) == 6  # 3 pairs are 6 sequences


@pytest.mark.parametrize("packing", [BUDGET, APART, WHOLE])
def test_lengths_are_the_tokens_of_each_item_alone(packing: Packing) -> None:
    pairs = [Example(f"{i}", "the cat " * (i % 3), chosen="a mat " * i, rejected="dog") for i in range(6)]
    table = encoding.encode(pairs, tiny.encoder(), encoding.pair_rows)
    wanted = [[tiny.padded_tokens([item], packing)] for item in table]
    if packing.apart:
        wanted = [[max(len(getattr(row, part)) for row in item.rows) for part in PARTS] for item in table]
    assert lengths(table, packing).tolist() == lengths([*table], packing).tolist() == wanted
    assert Extent.of_each(table, [4, 0, 4]) == Extent.of_each([*table], [4, 0, 4])
    assert lengths(table[:0], packing).tolist() == lengths([], packing).tolist() == []


def test_micro_batches_hold_like_lengths() -> None:
    items = tiny.items(24, longest=20)
    groups = group(items, range(24), BY_COUNT, 1)
    found = [[len(items[i].rows[0]) for i in g] for g in groups]
    assert all(min(longer) >= max(shorter) for longer, shorter in pairwise(found))


def test_too_long_a_row_is_named() -> None:
    items = [Item(Example("the long one", ""), (tiny.row(range(50), range(11)),))]
    with pytest.raises(UserError, match=r"max_tokens: 60, but row the long one alone has 61 tokens"):
        window(items, [0], BUDGET, 0, 1)
    assert window([replace(items[0], rows=(tiny.row(range(50), range(10)),))], [0], BUDGET, 0, 1) == [(0,)]


def test_batch_arithmetic() -> None:
    train = tiny.train_settings(batch_size=12, micro_batch_size=2, max_tokens=None)
    assert packing_of(train, 3, False, 0) == Packing(2, None, False, 0)
    with pytest.raises(UserError, match=r"batch_size: 12 is no multiple of processes 5 x micro_batch_size 2"):
        packing_of(train, 5, False, 0)
    by_budget = tiny.train_settings(batch_size=12, max_tokens=100)
    assert packing_of(by_budget, 4, True, 7, whole=True) == Packing(None, 100, True, 7, True)
    with pytest.raises(UserError, match=r"batch_size: 12 is no multiple of processes 5, wanted"):
        packing_of(by_budget, 5, False, 0)


def test_fillers_mean_nothing() -> None:
    items = tiny.items(3, reward=lambda i: i)
    items = [replace(item, ref_logp=(torch.ones(len(item.rows[0].response_ids)),)) for item in items]
    filler = collate(items, (), BUDGET)
    assert filler.items == () and len(filler.input_ids) == 1
    assert not filler.response_mask.any() and not filler.sequence_mask.any()
    assert filler.numbers["reward"].shape == (0,)
    assert filler.ref_logp.shape == filler.response_ids.shape
    assert len(plans(items, [1], BUDGET, 4)[3][0]) == 0  # one row for four ranks: three fillers


def test_collate_by_hand() -> None:
    items = [
        Item(Example("a", ""), (tiny.row([5, 6], [7, 2]),), {"reward": 0.5}),
        Item(Example("b", ""), (tiny.row([8], [9, 10, 2]),), {"reward": -1.0}),
        Item(Example("c", ""), (tiny.row([3, 4, 5], [2]),), {"reward": 2.0}),
    ]
    batch = collate(items, (0, 2), Packing(3, None, False, 99))
    assert batch.input_ids.tolist() == [[5, 6, 7, 2], [3, 4, 5, 2]]
    assert batch.response_ids.tolist() == [[7, 2], [2, 99]]
    assert batch.response_mask.tolist() == [[True, True], [True, False]]
    assert batch.prompt_lengths.tolist() == [2, 3]
    assert batch.numbers["reward"].tolist() == [0.5, 2.0] and batch.items == (0, 2)
    apart = collate(items, (0, 1), Packing(3, None, True, 99))
    assert apart.input_ids.tolist() == [[5, 6], [8, 99]]
    assert apart.input_mask.tolist() == [[True, True], [True, False]]
    assert apart.response_ids.tolist() == [[7, 2, 99], [9, 10, 2]]
    assert apart.ref_logp is None


def test_pairs_are_first_rows_then_second_rows() -> None:
    items = tiny.items(3, pairs=True)
    batch = collate(items, (2, 0), BY_COUNT)
    rows = [
        items[2].rows[0],
        items[0].rows[0],
        items[2].rows[1],
        items[0].rows[1],
    ]  # chosen, chosen, rejected, rejected
    for place, row in enumerate(rows):
        assert batch.response_ids[place][batch.response_mask[place]].tolist() == list(row.response_ids)
        whole = [*row.prompt_ids, *row.response_ids]
        assert batch.input_ids[place][batch.input_mask[place]].tolist() == whole


def test_reference_logps_are_padded_with_zero() -> None:
    first, second = tiny.items(2, pairs=True)[:2]

    def known(item: Item, start: float) -> Item:
        return replace(
            item, ref_logp=tuple(torch.full((len(row.response_ids),), start - i) for i, row in enumerate(item.rows))
        )

    batch = collate([known(first, -1.0), known(second, -5.0)], (0, 1), BY_COUNT)
    for place, value in enumerate([-1.0, -5.0, -2.0, -6.0]):
        expected = torch.where(batch.response_mask[place], value, 0.0)
        assert torch.equal(batch.ref_logp[place], expected)


def test_windows_are_functions_of_seed_and_step() -> None:
    items = tiny.items(10)

    def drawn(seed: int, step: int) -> list:
        windows = Windows(items, epochs(10, 4, seed), BUDGET, 0, 1)
        return [batch.items for batch in windows.at(step)]

    assert drawn(3, 7) == drawn(3, 7)
    assert drawn(3, 7) != drawn(4, 7)
    wins = Windows(items, epochs(10, 4, 3), BUDGET, 0, 1)
    backwards = [wins.at(step)[0].input_ids for step in (9, 2, 5)]
    assert torch.equal(backwards[1], Windows(items, epochs(10, 4, 3), BUDGET, 0, 1).at(2)[0].input_ids)


def test_epochs_are_shuffled_and_have_no_gap() -> None:
    draw = epochs(10, 5, seed=1)
    first, second = draw(0) + draw(1), draw(2) + draw(3)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    spanning = epochs(6, 4, seed=1)
    stream = [i for step in range(3) for i in spanning(step)]  # 12 draws are two epochs of 6
    assert sorted(stream[:6]) == sorted(stream[6:]) == list(range(6))


@pytest.mark.parametrize("world", WORLDS)
def test_once_covers_all(world: int) -> None:
    items = tiny.items(11)
    batches = [[*once(items, BUDGET, rank, world)] for rank in range(world)]
    assert len({len(mine) for mine in batches}) == 1
    assert sorted(i for mine in batches for batch in mine for i in batch.items) == list(range(11))
