"""The value head: range, padding invariance, fitting on one and two ranks."""

import copy
import math
import threading
from itertools import pairwise

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models import value_head
from pipeline.models.value_head import ValueHead, values
from tests import tiny

H = 16
FITTING = {"learning_rate": 0.01, "epochs": 8, "batch_size": 8, "patience": 8, "seed": 0}


def fit(head, states, targets, held_out, *, seed, owned=None, all_sum=lambda local: local, **changes):
    """All rows, in order, unless this rank owns some of them only."""
    settings = tiny.settings("rl", "algo=alol").value.model_copy(update=changes)
    owned = range(len(targets)) if owned is None else owned
    return value_head.fit(head, states, targets, held_out, settings, seed, owned, all_sum)


@torch.no_grad()
def predict(head, states, batch_size):
    """(n,) float32: the values of n prompts, states one (S_i, H) each, in evaluation mode."""
    head.eval()
    batches = [states[start : start + batch_size] for start in range(0, len(states), batch_size)]
    return torch.cat([torch.empty(0), *(values(head, batch) for batch in batches)])


def make_head(low=0.0, high=1.0, dropout=0.1, hidden_size=H, seed=0):
    torch.manual_seed(seed)
    return ValueHead(hidden_size, low, high, heads=8, dropout=dropout)


def make_states(n=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2 + i % 5, H, generator=generator) for i in range(n)]


def every(n, period):
    return torch.arange(n) % period == 0


def test_parameters_and_heads():
    # query h, attention 4 h^2 + 4 h, output h + 1: 4 h^2 + 6 h + 1
    assert sum(p.numel() for p in make_head().parameters()) == 4 * H * H + 6 * H + 1
    found = {size: ValueHead(size, 0, 1, heads=8, dropout=0.0).heads for size in (16, 12, 10, 7, 11)}
    assert found == {16: 8, 12: 6, 10: 5, 7: 7, 11: 1}


def test_p14_values_lie_in_the_open_range():
    head = make_head(-2.0, 3.0).eval()
    with torch.no_grad():
        head.output.weight.mul_(5)
    values = predict(head, make_states(), 8)
    assert values.min() > -2.0 and values.max() < 3.0
    assert values.max() - values.min() > 1.0


@pytest.mark.parametrize(("low", "high", "middle"), [(0.0, 1.0, 0.5), (0.0, 5.0, 2.5), (-2.0, 3.0, 0.5)])
def test_p14_a_zero_final_layer_gives_the_midpoint(low, high, middle):
    head = make_head(low, high)
    torch.nn.init.zeros_(head.output.weight)
    torch.nn.init.zeros_(head.output.bias)
    assert predict(head, make_states(3), 8).tolist() == [middle] * 3


def test_p18_the_range_is_a_scaled_sigmoid():
    head = make_head(0.0, 1.0).eval()
    torch.nn.init.zeros_(head.output.weight)
    for logit, wanted in ((-1.5441417694, 0.17593399), (0.3059706092, 0.57590143)):
        torch.nn.init.constant_(head.output.bias, logit)
        assert predict(head, make_states(1), 1).item() == pytest.approx(wanted, abs=1e-7)
        head.high = 5.0  # five components in [0, 1]
        assert predict(head, make_states(1), 1).item() == pytest.approx(5 * wanted, abs=1e-6)
        head.high = 1.0


def test_p14_padding_and_batch_mates_change_nothing():
    head, states = make_head().eval(), make_states()
    alone = torch.cat([head(state[None], torch.ones(1, len(state), dtype=torch.bool)) for state in states])
    tiny.close(predict(head, states, 24), alone)
    tiny.close(predict(head, states, 5), alone)
    tiny.close(predict(head, states[::-1], 7).flip(0), alone)
    state, junk = states[3], torch.full((4, H), math.nan)
    no, yes = torch.zeros(4, dtype=torch.bool), torch.ones(len(state), dtype=torch.bool)
    for padded, mask in (
        (torch.cat([junk, state]), torch.cat([no, yes])),
        (torch.cat([state, junk]), torch.cat([yes, no])),
    ):
        tiny.close(head(padded[None], mask[None]), alone[3:4])  # left pads; right pads or a response


def test_masked_nan_leaves_the_gradient_finite():
    head = make_head()
    states = torch.cat([torch.randn(1, 3, H), torch.full((1, 2, H), math.nan)], 1)
    head(states, torch.tensor([[True, True, True, False, False]])).sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_p14_deterministic_in_eval_noisy_in_training():
    head, states = make_head(), make_states(4)
    assert torch.equal(predict(head, states, 4), predict(head, states, 4))
    head.train()
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert not torch.equal(head(states[0][None], mask), head(states[0][None], mask))


def test_half_precision_states_are_read_in_float32():
    head, states = make_head().eval(), make_states(4)
    values = predict(head, [state.bfloat16() for state in states], 4)
    assert values.dtype == torch.float32
    tiny.close(values, predict(head, [state.bfloat16().float() for state in states], 4))


def test_no_prompts_and_empty_prompts():
    assert predict(make_head(), [], 4).shape == (0,)
    with pytest.raises(AssertionError, match="a prompt without a token"):
        make_head()(torch.zeros(2, 3, H), torch.tensor([[True] * 3, [False] * 3]))


def test_p15_a_constant_reward_is_learned():
    states = make_states()
    for constant in (0.2, 0.9):
        head = make_head()
        report = fit(
            head, states, torch.full((24,), constant), every(24, 4), **{**FITTING, "epochs": 40, "patience": 40}
        )
        assert predict(head, states, 8).tolist() == pytest.approx([constant] * 24, abs=0.03)
        assert math.isnan(report.held_out_r2)  # nothing to explain


def test_p15_the_best_held_out_epoch_is_kept():
    # noise targets: the fit error falls on, the held-out error rises from some epoch on
    states, targets, held_out = make_states(), torch.rand(24, generator=torch.Generator().manual_seed(5)), every(24, 3)
    curve = []
    for epochs in range(1, 13):
        head = make_head(dropout=0.0)
        report = fit(head, states, targets, held_out, **{**FITTING, "epochs": epochs, "patience": 99})
        error = predict(head, states, 8) - targets
        assert float(error[held_out].square().mean()) == pytest.approx(report.held_out_mse, rel=1e-4)
        assert float(error[~held_out].square().mean()) == pytest.approx(report.fit_mse, rel=1e-4)
        variance = float(targets[held_out].double().var(correction=0))
        assert report.held_out_r2 == pytest.approx(1 - report.held_out_mse / variance)
        curve.append((report.best_epoch, report.held_out_mse))
    best_epoch = curve[-1][0]
    assert best_epoch < 12
    assert curve[best_epoch - 1 :] == [curve[-1]] * (13 - best_epoch)  # later epochs change nothing
    assert all(late[1] <= early[1] for early, late in pairwise(curve))


def test_early_stopping_ends_the_fit():
    sums = []
    states, targets = make_states(), torch.rand(24, generator=torch.Generator().manual_seed(5))
    settings = {**FITTING, "epochs": 100, "patience": 2}
    report = fit(make_head(), states, targets, every(24, 3), **settings, all_sum=lambda x: sums.append(1) or x)
    # 16 fitted rows in batches of 8: two gradients and one held-out error per epoch, one fit error at the end
    assert len(sums) == 3 * (report.best_epoch + 2) + 1


def test_a_function_of_the_prompt_is_learned():
    states = make_states(200)
    targets = torch.stack([state.mean(0)[0] for state in states]).mul(3).sigmoid()
    report = fit(
        make_head(), states, targets, every(200, 5), **{**FITTING, "epochs": 30, "patience": 10, "batch_size": 16}
    )
    assert report.held_out_r2 > 0.6


def fit_on_ranks(world, states, targets, held_out, dropout):
    """(reports, heads) of `world` threads, each owning every world-th row, that sum through a shared list."""
    barrier, parts, results = threading.Barrier(world, timeout=60), [None] * world, [None] * world

    def rank_of(rank):
        def all_sum(local):
            parts[rank] = local
            barrier.wait()
            total = sum(parts[1:], start=parts[0])
            barrier.wait()
            return total

        head, owned = heads[rank], list(range(rank, len(targets), world))
        mine = [states[index] for index in owned]
        report = fit(head, mine, targets, held_out, **FITTING, owned=owned, all_sum=all_sum)
        results[rank] = report

    heads = [make_head(dropout=dropout) for _ in range(world)]
    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, heads


def test_two_ranks_equal_one():
    states, held_out = make_states(23), every(23, 4)  # ragged: the last batch holds one row, of one rank
    targets = torch.stack([state.mean(0)[0] for state in states]).sigmoid()
    one, (one_head,) = fit_on_ranks(1, states, targets, held_out, dropout=0.0)
    two, two_heads = fit_on_ranks(2, states, targets, held_out, dropout=0.0)
    assert two[0] == two[1]
    assert two[0].best_epoch == one[0].best_epoch
    assert two[0] == pytest.approx(one[0], rel=1e-3)
    for head in two_heads:
        tiny.close(predict(head, states, 8), predict(one_head, states, 8), 1024)  # of many steps
    for name, weight in two_heads[0].state_dict().items():
        assert torch.equal(weight, two_heads[1].state_dict()[name])


def test_ranks_stay_equal_with_dropout():
    states, held_out = make_states(23), every(23, 4)
    reports, heads = fit_on_ranks(2, states, torch.rand(23, generator=torch.Generator().manual_seed(2)), held_out, 0.1)
    assert reports[0] == reports[1]
    for name, weight in heads[0].state_dict().items():
        assert torch.equal(weight, heads[1].state_dict()[name])


def test_a_fit_is_repeatable_and_leaves_the_random_state():
    states, targets, first = make_states(), torch.rand(24, generator=torch.Generator().manual_seed(3)), make_head()
    second = copy.deepcopy(first)
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    one = fit(first, states, targets, every(24, 4), **FITTING)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert fit(second, states, targets, every(24, 4), **FITTING) == one
    assert torch.equal(predict(first, states, 8), predict(second, states, 8))


def test_errors_are_one_line():
    states, targets = make_states(4), torch.rand(4)
    for held_out, counts in (
        (torch.zeros(4, dtype=torch.bool), "4 prompts to fit and 0"),
        (torch.ones(4, dtype=torch.bool), "0 prompts to fit and 4"),
    ):
        with pytest.raises(UserError, match=counts):
            fit(make_head(), states, targets, held_out, **FITTING)
    broken = torch.tensor([0.1, 0.2, 0.3, math.nan])
    with pytest.raises(UserError, match="never a number in 8 epochs: lower learning_rate"):
        fit(make_head(), states, broken, every(4, 3), **FITTING)
