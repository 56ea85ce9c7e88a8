"""Tensor mathematics that the algorithms share: masked sums, ratios, KL estimators, advantages of groups.

Nothing here knows of ranks, files or configuration; everything returns new tensors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import UserError
from pipeline.records import Batch

EQUAL_REWARDS = 1e-12  # below this difference rewards are those of one text, and teach nothing
K3_LARGEST_LOG_RATIO = 20.0  # e^20 = 5e8: beyond it a single token would drown the batch, and float32 overflows at 88


def check_aligned(logp: Tensor, batch: Batch) -> None:
    """Assert that logp is (B, T), indexed as response_ids are."""
    found, wanted = tuple(logp.shape), tuple(batch.response_mask.shape)
    assert found == wanted, f"logp: shape is {found}, but response_mask has {wanted}"


def whole_groups(batch: Batch, k: int) -> Tensor:
    """(G,) bool: which groups of k responses are there; the others are fillers. Two responses are a pair.

    A batch has all first responses of its groups, then all second ones in the same order, and so on: B = k * groups.
    """
    present, groups = batch.sequence_mask, len(batch.response_mask) // k
    assert len(present) == k * groups, f"response_mask: {len(present)} rows, wanted a multiple of {k}"
    of_groups = present.view(k, groups)
    assert torch.equal(of_groups.all(0), of_groups.any(0)), "response_mask: a group lacks a response"
    return of_groups[0]


def smoothed_nll(logp: Tensor, means: Tensor, mask: Tensor, label_smoothing: float) -> Tensor:
    """(B, T): (1 - e) nll + e u, u = - mean over the vocabulary of logp, and 0 where `mask` is False.

    Source of label smoothing: Szegedy et al. (2016).
    """
    return torch.where(mask, (label_smoothing - 1) * logp - label_smoothing * means, 0.0)


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """The sum of x where the mask is True, over `dim` or over everything; the mask broadcasts to x.

    Selected, not multiplied: a NaN or infinity under the mask changes neither the value nor the gradient with respect
    to x, which is exactly 0 there. It does not heal what comes before x: if x was itself computed from a masked NaN by
    a function with a non-constant derivative (exp, square, a ratio), 0 * NaN returns in that function's backward. So
    mask a quantity first and compute with it afterwards.
    """
    return torch.where(mask, x, 0.0).sum(dim)


def sequence_logp(logp: Tensor, mask: Tensor) -> Tensor:
    """(B,) the log-probability of each whole response: the sum of logp (B, T) over its tokens."""
    return masked_sum(logp, mask, dim=1)


def token_log_ratios(logp: Tensor, batch: Batch) -> Tensor:
    """(B, T) ln(pi / pi_ref) of each token, 0 outside the responses.

    Raises UserError where the batch brings no ref_logp, or one of another shape.
    """
    if batch.ref_logp is None:
        raise UserError("ref_logp: the batch has none, wanted the reference's log-probabilities of its responses")
    found, wanted = tuple(batch.ref_logp.shape), tuple(logp.shape)
    if len(found) == 2 and found[0] == wanted[0] and found[1] != wanted[1]:
        cure = "was the cache made with another max_length?"
        raise UserError(f"ref_logp: T is {found[1]}, but logp has T = {wanted[1]} ({cure})")
    if found != wanted:
        raise UserError(f"ref_logp: shape is {found}, but logp has (B, T) = {wanted}")
    return torch.where(batch.response_mask, logp - batch.ref_logp, 0.0)


def sequence_log_ratios(logp: Tensor, batch: Batch) -> Tensor:
    """(B,) ln(pi / pi_ref) of each whole response, 0 for fillers. Raises UserError as `token_log_ratios`."""
    return token_log_ratios(logp, batch).sum(1)


def clip_ratio(log_ratio: Tensor, clip: float | None) -> Tensor:
    """exp(log_ratio) limited to [1 - clip, 1 + clip]; clip in [0, 1), or None for no limit.

    The limit is set before exp, so that log ratios of any size give the bound and neither inf nor NaN. clip = 0 gives
    exactly 1. Without a clip float32 overflows to inf beyond a log ratio of 88.
    """
    if clip is None:
        return log_ratio.exp()
    return log_ratio.clamp(math.log1p(-clip), math.log1p(clip)).exp()


def k3(log_ratio: Tensor) -> Tensor:
    """e^z - 1 - z >= 0 for z = ln p - ln q: unbiased for KL(q, p) where the samples come from q.

    z is limited to 20 from above: the value stays finite, and the gradient is 0 beyond.
    Source: J. Schulman, "Approximating KL divergence" (2020).
    """
    bounded = log_ratio.clamp(max=K3_LARGEST_LOG_RATIO)
    return torch.expm1(bounded) - bounded


def group_advantages(rewards: Tensor, baseline: str) -> Tensor:
    """(B, n) from the rewards (B, n) of n responses to each prompt; each row sums to zero, one of equal rewards is 0.

    baseline mean: R - mean R; leave_one_out: R - mean of the others' R; group: R - mean R, over its standard deviation.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    spread = centred.abs().amax(1, keepdim=True)
    return BASELINES[baseline](torch.where(spread > EQUAL_REWARDS, centred, 0.0))


def _leave_one_out(centred: Tensor) -> Tensor:
    n = centred.shape[1]
    return centred * (n / (n - 1))


def _group(centred: Tensor) -> Tensor:
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    return torch.where(deviation > 0, centred / deviation.clamp(min=1e-30), 0.0)


BASELINES = {"mean": lambda centred: centred, "leave_one_out": _leave_one_out, "group": _group}


def item_numbers(batch: Batch, name: str, like: Tensor) -> Tensor:
    """`batch.numbers[name]`, one per item, lengthened with 0 for the fillers to the shape (B,) and dtype of `like`.

    Raises UserError where the batch has no such number, or not one per item.
    """
    if name not in batch.numbers:
        raise UserError(
            f"{name}: the batch has no such number (it has {', '.join(batch.numbers) or 'none'}), "
            f"wanted one per row: does the data have it?"
        )
    values, found = batch.numbers[name], len(batch.items)
    if values.shape != (found,) or found > len(like):
        raise UserError(
            f"{name}: shape is {tuple(values.shape)}, wanted ({found},), one per item, for at most {len(like)} rows"
        )
    return F.pad(values.to(like.dtype), (0, len(like) - found))
