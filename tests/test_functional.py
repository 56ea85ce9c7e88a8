"""Log-probabilities, masked sums, ratios, estimators and statistics against hand arithmetic."""

import math

import pytest
import torch

from pipeline.algorithms import functional as f
from pipeline.algorithms import stats
from pipeline.algorithms.logits import smoothed_logps, token_entropies, token_logps, token_stats
from pipeline.errors import UserError
from pipeline.records import Batch
from tests import tiny

NAN = math.nan


def make_head(hidden_size=4, vocabulary=7, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(hidden_size, vocabulary)


def value_and_gradients(n, chunks, temperatures=None):
    head = make_head()
    torch.manual_seed(1)
    hidden = torch.randn(n, 4, requires_grad=True)
    targets = torch.arange(n) % 7
    logps = token_logps(hidden, head, targets, chunks, temperatures)
    (logps * torch.arange(1, n + 1)).sum().backward()
    return logps.detach(), hidden.grad, head.weight.grad, head.bias.grad


def test_token_logps_by_hand():
    # logits ln 1, ln 2, ln 5 of total 8: probabilities 1/8, 2/8, 5/8; the hidden state is the logits
    hidden = torch.tensor([[1.0, 2.0, 5.0], [1.0, 2.0, 5.0]]).log()
    logps = token_logps(hidden, lambda x: x, torch.tensor([0, 2]))
    torch.testing.assert_close(logps, torch.tensor([1 / 8, 5 / 8]).log())
    # temperature 1/2 squares the odds: 1, 4, 25 of total 30
    hot = token_logps(hidden, lambda x: x, torch.tensor([0, 2]), temperatures=torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(hot, torch.tensor([1 / 30, 25 / 30]).log())


@pytest.mark.parametrize("n", [10, 3, 2])  # 3 and 2 rows in 4 chunks leave empty slices
def test_chunks_change_neither_value_nor_gradient(n):
    temperatures = torch.linspace(0.7, 1.3, n)
    once, sliced = value_and_gradients(n, 1, temperatures), value_and_gradients(n, 4, temperatures)
    for whole, cut in zip(once, sliced, strict=True):
        tiny.close(cut, whole)


def test_chunked_logits_are_not_kept_for_backward():
    def widths_saved(chunks):
        head, widths = make_head(), []
        hidden = torch.randn(12, 4, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: widths.append(x.shape[-1:]) or x, lambda x: x):
            token_logps(hidden, head, torch.zeros(12, dtype=torch.long), chunks)
        return widths

    assert torch.Size([7]) in widths_saved(1)  # (12, V) kept
    assert torch.Size([7]) not in widths_saved(4)


@pytest.mark.parametrize("n", [0, 2, 9])
def test_every_rank_calls_the_head_equally_often(n):
    head, calls = make_head(), []

    def counting(rows):
        calls.append(len(rows))
        return head(rows)

    hidden = torch.randn(n, 4, requires_grad=True)
    token_logps(hidden, counting, torch.zeros(n, dtype=torch.long), chunks=4).sum().backward()
    assert len(calls) == 8  # four in forward, four recomputed in backward, empty or not
    assert sum(calls) == 2 * n


@pytest.mark.parametrize("chunks", [1, 3])
def test_no_rows_still_reach_backward(chunks):
    head = make_head()
    hidden = torch.zeros(0, 4, requires_grad=True)
    logps = token_logps(hidden, head, torch.zeros(0, dtype=torch.long), chunks)
    assert logps.shape == (0,)
    logps.sum().backward()
    assert hidden.grad.shape == (0, 4)
    assert torch.equal(head.weight.grad, torch.zeros(7, 4))


def test_token_logps_is_float32_of_bfloat16_input():
    hidden = torch.tensor([[0.0, 100.0]], dtype=torch.bfloat16)
    logps = token_logps(hidden, lambda x: x, torch.tensor([0]))
    assert logps.dtype == torch.float32
    assert logps.item() == -100.0  # no inf: logsumexp(0, 100) = 100


@pytest.mark.parametrize("chunks", [1, 3])
def test_token_stats_by_hand(chunks):
    # probabilities 1/8, 2/8, 5/8; at temperature 1/2 they are 1/30, 4/30, 25/30; without the third id 1/3, 2/3
    hidden, ids, levels = torch.tensor([[1.0, 2.0, 5.0]] * 2).log(), torch.tensor([0, 1]), torch.tensor([1.0, 0.5])
    logps, entropies, peaks = token_stats(hidden, lambda x: x, ids, chunks, levels)
    torch.testing.assert_close(logps, torch.tensor([1 / 8, 4 / 30]).log())
    entropy = -sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8))
    torch.testing.assert_close(entropies, torch.tensor([entropy, entropy]))
    torch.testing.assert_close(peaks, torch.tensor([5 / 8, 5 / 8]))
    logps, _, peaks = token_stats(hidden, lambda x: x, ids, chunks, None, torch.tensor([False, False, True]))
    torch.testing.assert_close(logps, torch.tensor([1 / 3, 2 / 3]).log())
    torch.testing.assert_close(peaks, torch.tensor([2 / 3, 2 / 3]))


@pytest.mark.parametrize("chunks", [1, 3])
def test_token_entropies_by_hand(chunks):
    # uniform over 2: ln 2; certain: 0 (0 ln 0 = 0, also for a logit of -inf); 1/4 and 3/4: .25 ln 4 + .75 ln (4/3)
    hidden = torch.tensor([[0.0, 0.0], [0.0, -math.inf], [0.0, math.log(3.0)]], requires_grad=True)
    entropies = token_entropies(hidden, lambda x: x, chunks)
    torch.testing.assert_close(entropies, torch.tensor([0.693147, 0.0, 0.562335]))
    assert not entropies.requires_grad
    assert token_entropies(hidden[:0], lambda x: x, chunks).shape == (0,)


def test_masked_sum_ignores_nan_in_value_and_gradient():
    x = torch.tensor([[1.0, NAN], [math.inf, 4.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [False, True]])
    total = f.masked_sum(x, mask)
    total.backward()
    assert total.item() == 5.0
    assert x.grad.tolist() == [[1, 0], [0, 1]]
    assert f.masked_sum(x, mask, dim=1).tolist() == [1.0, 4.0]


def test_masked_sum_cannot_heal_what_was_computed_from_a_masked_nan():
    x = torch.tensor([1.0, NAN], requires_grad=True)
    mask = torch.tensor([True, False])
    f.masked_sum(x.exp(), mask).backward()
    assert x.grad.isnan().tolist() == [False, True]  # 0 * exp(nan)
    x.grad = None
    torch.where(mask, x, 0.0).exp().sum().backward()  # the documented order: mask first
    assert x.grad.isfinite().all()


def test_sequence_logp_sums_the_response_only():
    logp = torch.tensor([[-1.0, -2.0], [-3.0, NAN]])
    assert f.sequence_logp(logp, torch.tensor([[True, True], [True, False]])).tolist() == [-3.0, -3.0]


def test_clip_ratio_bounds():
    z = torch.tensor([-500.0, math.log(0.01), 0.0, math.log(1.5), math.log(14.88), 500.0])
    clipped = f.clip_ratio(z, 0.9)
    torch.testing.assert_close(clipped, torch.tensor([0.1, 0.1, 1.0, 1.5, 1.9, 1.9]))
    assert clipped[2] == 1.0
    assert f.clip_ratio(z, 0).tolist() == [1.0] * 6
    torch.testing.assert_close(f.clip_ratio(z[1:5], None), torch.tensor([0.01, 1.0, 1.5, 14.88]))


def test_k3_by_hand():
    # z = ln 2: 2 - 1 - ln 2 = .306853; z = -ln 2: 1/2 - 1 + ln 2 = .193147; z = 0: 0; gradient e^z - 1
    z = torch.tensor([math.log(2.0), -math.log(2.0), 0.0], dtype=torch.float64, requires_grad=True)
    value = f.k3(z)
    value.sum().backward()
    torch.testing.assert_close(value, torch.tensor([0.306853, 0.193147, 0.0], dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(z.grad, torch.tensor([1.0, -0.5, 0.0], dtype=torch.float64))
    assert f.k3(torch.tensor([500.0, -500.0])).isfinite().all()


def test_k3_is_unbiased_for_the_divergence_from_the_sampled_distribution():
    q, p = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    estimate = (q * f.k3((p / q).log())).sum()  # the exact expectation over q
    tiny.close(estimate, (q * (q / p).log()).sum())  # KL(q, p)


def make_batch(numbers, items=2):
    ids, mask = torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2, dtype=torch.bool)
    return Batch(tuple(range(items)), ids, mask, torch.zeros(3, dtype=torch.long), ids, mask, numbers)


def test_item_numbers_are_lengthened_for_fillers():
    batch = make_batch({"reward": torch.tensor([0.5, 2.0])})
    assert f.item_numbers(batch, "reward", like=torch.zeros(3, 2)).tolist() == [0.5, 2.0, 0.0]


@pytest.mark.parametrize(
    ("numbers", "items", "message"),
    [
        ({"value": torch.zeros(2)}, 2, r"reward: the batch has no such number \(it has value\)"),
        ({}, 2, r"reward: .* \(it has none\)"),
        ({"reward": torch.zeros(2, 1)}, 2, r"reward: shape is \(2, 1\), wanted \(2,\)"),
        ({"reward": torch.zeros(3)}, 2, r"reward: shape is \(3,\), wanted \(2,\)"),
        ({"reward": torch.zeros(4)}, 4, r"reward: shape is \(4,\), .* at most 3 rows"),
    ],
)
def test_item_numbers_name_what_is_wrong(numbers, items, message):
    with pytest.raises(UserError, match=message):
        f.item_numbers(make_batch(numbers, items), "reward", like=torch.zeros(3, 2))


def test_statistics_by_hand():
    x = torch.tensor([[1.0, 3.0], [NAN, 8.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [False, True]])
    # mean 12/3 = 4; variance (9 + 1 + 16)/3 = 8.6667; share 12^2 / (3 * (1 + 9 + 64)) = 144/222
    assert stats.reduce(stats.mean_stat(x, mask)) == 4.0
    assert stats.reduce(stats.std_stat(x, mask)) == pytest.approx(math.sqrt(26 / 3))
    assert stats.reduce(stats.ess_stat(x, mask)) == pytest.approx(144 / 222)
    assert stats.mean_stat(x, mask).sums.tolist() == [3.0, 12.0, 74.0]
    assert stats.mean_stat(x, mask).sums.dtype == torch.float64
    assert not stats.mean_stat(x, mask).sums.requires_grad


def test_statistics_edges():
    nothing = torch.zeros(0)
    for make in (stats.mean_stat, stats.std_stat, stats.ess_stat):
        assert math.isnan(stats.reduce(make(nothing)))
    assert math.isnan(stats.reduce(stats.ess_stat(torch.zeros(3))))  # weights that are all zero
    assert stats.reduce(stats.ess_stat(torch.full((5,), 0.3))) == pytest.approx(1.0)
    assert stats.reduce(stats.ess_stat(torch.tensor([1.0, 0.0, 0.0, 0.0]))) == 0.25
    assert stats.reduce(stats.std_stat(torch.full((3,), 0.1))) == pytest.approx(0.0, abs=1e-8)
    assert stats.reduce(stats.mean_stat(torch.tensor([True, False]))) == 0.5


@pytest.mark.parametrize("make", [stats.mean_stat, stats.std_stat, stats.ess_stat])
def test_merged_parts_are_the_whole(make):
    x = torch.tensor([0.2, 0.9, 1.5, 0.1, 2.0])
    assert stats.reduce(stats.merge(make(x[:1]), make(x[1:]))) == pytest.approx(stats.reduce(make(x)))


def test_different_statistics_do_not_merge():
    with pytest.raises(AssertionError, match="a mean cannot be merged with a std"):
        stats.merge(stats.mean_stat(torch.ones(1)), stats.std_stat(torch.ones(1)))


@pytest.mark.parametrize("chunks", [1, 2])
def test_suppressed_ids_are_no_part_of_the_vocabulary(chunks):
    """Values and gradients, of label smoothing too, are those of a head without these rows."""
    torch.manual_seed(1)
    hidden, weight, factors = torch.randn(7, 4), torch.randn(9, 4), torch.randn(2, 7)
    targets, suppressed = torch.tensor([0, 1, 2, 3, 4, 6, 0]), torch.tensor([False] * 5 + [True, False, True, True])
    kept = (~suppressed).nonzero()[:, 0]
    places = (targets[:, None] == kept).nonzero()[:, 1]
    found, wanted = [], []
    for seen, rows, ids, never in ((found, weight, targets, suppressed), (wanted, weight[kept], places, None)):
        x = hidden.clone().requires_grad_()
        logps, means = smoothed_logps(x, lambda h, rows=rows: h @ rows.T, ids, chunks, suppressed=never)
        (factors[0] * logps + factors[1] * means).sum().backward()
        alone = token_logps(hidden, lambda h, rows=rows: h @ rows.T, ids, chunks, suppressed=never)
        entropies = token_entropies(hidden, lambda h, rows=rows: h @ rows.T, chunks, never)
        seen += [logps.detach(), means.detach(), x.grad, alone, entropies]
    tiny.close(found, wanted)
