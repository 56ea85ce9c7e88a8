"""Supervised fine-tuning: a sum over tokens, by hand."""

import math

import pytest
import torch

from pipeline.algorithms import offline, supervised
from pipeline.algorithms.stats import reduce
from pipeline.records import Batch, Needs
from tests import tiny

SETTINGS = supervised.Settings(0.0)


def make_batch(mask):
    mask = torch.tensor(mask, dtype=torch.bool)
    ids, ones = torch.zeros_like(mask, dtype=torch.long), torch.ones_like(mask)
    return Batch(tuple(range(len(mask))), ids, ones, torch.ones(len(mask), dtype=torch.long), ids, mask)


def test_value_gradient_and_statistics_by_hand():
    logp = torch.tensor([[-1.0, -0.5, -2.0], [-0.25, math.nan, math.nan]], requires_grad=True)
    batch = make_batch([[1, 1, 1], [1, 0, 0]])
    total, stats = supervised.loss(logp, batch, SETTINGS)
    total.backward()
    assert total.item() == 3.75  # 1 + .5 + 2 + .25
    assert logp.grad.tolist() == [[-1, -1, -1], [-1, 0, 0]]
    assert reduce(stats["loss"]) == 3.75 / 4  # over tokens
    assert reduce(stats["logps/policy"]) == -3.75 / 2  # over sequences


def test_equals_the_offline_nll_in_sum_but_not_in_mean():
    logp = -torch.rand(2, 3, dtype=torch.float64)
    batch = make_batch([[1, 1, 1], [1, 0, 0]])
    nll = offline.Settings("one", "none", None, 0.0, 0.0, "none", "value", 0.0, 1.0, 20.0, "bound")
    assert supervised.loss(logp, batch, SETTINGS)[0] == offline.loss(logp, batch, nll)[0]
    assert (supervised.MEAN_OVER, offline.MEAN_OVER) == ("tokens", "sequences")


def test_micro_batches_add_up_and_fillers_add_nothing():
    logp = -torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    whole, _ = supervised.loss(logp, make_batch([[1, 1], [1, 0], [0, 0]]), SETTINGS)
    parts = [supervised.loss(logp[b : b + 1], make_batch([m]), SETTINGS)[0] for b, m in enumerate([[1, 1], [1, 0]])]
    tiny.close(whole, sum(parts))
    filler, stats = supervised.loss(logp[2:], make_batch([[0, 0]]), SETTINGS)
    assert filler == 0.0
    assert not torch.autograd.grad(filler, logp)[0].any()  # zero, and backward still runs
    assert stats["loss"].sums.tolist() == [0.0, 0.0, 0.0]


def test_declarations_and_wrong_shape():
    assert supervised.needs(SETTINGS) == Needs()
    with pytest.raises(AssertionError, match=r"logp: shape is \(1, 2\), but response_mask has \(1, 3\)"):
        supervised.loss(torch.zeros(1, 2), make_batch([[1, 1, 1]]), SETTINGS)
