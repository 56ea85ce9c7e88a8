"""What is masked, drawn and read of static responses: functions of seed, step and row, of nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.data.batching import Packing, collate
from pipeline.data.masking import Masker
from pipeline.records import Batch, Item
from tests import masked, tiny
from tests.masked import masked_of


def packing(seed: int = 5, **changes) -> Packing:
    """Micro-batches of any size for a causal model; `changes` are of `masked.masking()`."""
    masker = Masker(masked.words(), masked.masking(**changes), seed, samples=6)
    return Packing(None, 10**6, False, tiny.PAD_ID, masker=masker)


def whole(rows: list[Item], step: int = 0, seed: int = 5, **changes) -> Batch:
    """All rows in one micro-batch."""
    return collate(rows, range(len(rows)), packing(seed, **changes), step)


@pytest.mark.parametrize("choices", [1, 3])
def test_what_is_masked_depends_on_no_batch(choices: int) -> None:
    rows = masked.items(6, choices=choices)
    together = whole(rows, step=3)
    first = 0
    for i in range(6):
        one = collate(rows, [i], packing(), step=3)
        width, length = one.response_ids.shape[1], one.static.ids.shape[1]
        assert torch.equal(one.shown_ids[0], together.shown_ids[i, :width])
        assert torch.equal(one.static.ids[0], together.static.ids[i, :length])
        assert torch.equal(one.static.masked[0], together.static.masked[i, :length])
        count = int(one.static.masked.sum())
        assert torch.equal(one.static.uniforms, together.static.uniforms[first : first + count])
        first += count
    assert first == len(together.static.uniforms)


def test_what_is_masked_depends_on_step_and_seed() -> None:
    rows = masked.items(6)

    def found(step: int, seed: int) -> list[Tensor]:
        batch = whole(rows, step, seed)
        return [batch.static.masked, masked_of(batch), batch.static.uniforms[:2]]

    for ours, theirs in zip(found(3, 5), found(3, 5), strict=True):
        assert torch.equal(ours, theirs)
    for other in (found(4, 5), found(3, 6)):
        assert not any(torch.equal(ours, theirs) for ours, theirs in zip(found(3, 5), other, strict=True))
    assert not torch.equal(found(3, 5)[0], found(3, 5)[1])  # references and static responses are drawn apart


def test_plain_rows() -> None:
    """A share of `plain` is left as it is: of 600, 0.25 +- 4 standard errors of 0.0177; all, none."""
    rows = [item for item in masked.items(30) if len(item.rows[0].response_ids) > 3]
    steps = range(600 // len(rows))
    found = [masked_of(whole(rows, step, rate=1.0, plain=0.25)).any(1) for step in steps]
    assert float(torch.cat(found).float().mean()) == pytest.approx(0.75, abs=4 * 0.0177)
    assert not masked_of(whole(rows, rate=1.0, plain=1.0)).any()
    assert masked_of(whole(rows, rate=1.0, plain=0.0)).any(1).all()


def test_random_static_responses() -> None:
    """One of three in each of 300 cases: each 100 times +- 4 * 8.2."""
    rows = masked.items(10, choices=3)
    counts = torch.zeros(3)
    for step in range(30):
        batch = whole(rows, step)
        for i, item in enumerate(rows):
            ids = tuple(batch.static.ids[i][batch.static.mask[i]].tolist())
            counts[[row.response_ids for row in item.static_rows].index(ids)] += 1
    assert counts.sum() == 300 and ((counts - 100).abs() < 33).all()
