"""The value of a prompt: the reward to expect of the start model's responses, read off its frozen hidden states.

Source: Baheti et al., "Leftover Lunch" (ICLR 2024, arXiv 2305.14718), attention head. Ours: a range instead of
[0, max], a padding mask, evaluation mode for predictions, and the epoch chosen on held-out prompts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pipeline.config.sections import ValueSettings
from pipeline.data.sampling import epoch_rows
from pipeline.errors import UserError

AllSum = Callable[[Tensor], Tensor]  # the elementwise sum over ranks


class FitReport(NamedTuple):
    """How well the head predicts, in evaluation mode, with the weights of its best held-out epoch."""

    best_epoch: int  # from 1
    held_out_mse: float
    held_out_r2: float  # 1 - mse / variance of the held-out targets; NaN where they are all equal
    fit_mse: float


class ValueHead(nn.Module):
    """One learned query attends to a prompt's hidden states; the pooled state becomes a number in (low, high)."""

    def __init__(self, hidden_size: int, low: float, high: float, heads: int, dropout: float) -> None:
        """`heads` is an upper limit: the largest number of heads that divides hidden_size is taken."""
        super().__init__()
        assert low < high, f"value range is ({low}, {high})"
        self.low, self.high = low, high
        self.heads = max(count for count in range(1, heads + 1) if hidden_size % count == 0)
        self.query = nn.Parameter(torch.randn(hidden_size))
        self.attention = nn.MultiheadAttention(hidden_size, self.heads, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden_size, 1)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """(B,) float32 in (low, high); states (B, S, H) of any float type, mask (B, S) bool with a True in each row.

        What lies under the mask, NaN included, and the number and side of the padding change nothing.
        """
        assert mask.any(1).all(), "mask: a prompt without a token has no value"
        states = self.dropout(torch.where(mask[..., None], states, 0.0).float())
        query = self.query.expand(len(states), 1, -1)  # (B, 1, H)
        pooled, _ = self.attention(query, states, states, key_padding_mask=~mask, need_weights=False)
        logit = self.output(self.dropout(pooled)).flatten()  # (B,)
        return self.low + (self.high - self.low) * logit.sigmoid()


def fit(
    head: ValueHead,
    states: Sequence[Tensor],
    targets: Tensor,
    held_out: Tensor,
    settings: ValueSettings,
    seed: int,
    owned: Sequence[int],
    all_sum: AllSum,
) -> FitReport:
    """Regress the targets on the states in place; the head keeps the weights of its best held-out epoch.

    targets (n,) and held_out (n,) bool are those of ALL rows, the same on every rank; states, one (S_i, H) each, are
    those of the rows this rank owns: `owned` gives their indices in range(n), each owned by exactly one rank. A batch
    is drawn from all rows; a rank adds the gradients of its own, and makes the same calls of all_sum whether it owns
    one or not. So all ranks take the same steps, if their heads start equal. The number of ranks changes the result by
    rounding, and by the noise of dropout. The program's random state is left as it was.

    Every value starts at the mean of the fitted targets. Stops when `patience` epochs in a row bring no better
    held-out error. Raises UserError where either part is empty, or the held-out error is never a number.
    """
    rows, size = _Rows(dict(zip(owned, states, strict=True)), targets, all_sum), settings.batch_size
    kept_out, fitted = held_out.nonzero().flatten().tolist(), (~held_out).nonzero().flatten().tolist()
    if not fitted or not kept_out:
        counts = f"{len(fitted)} prompts to fit and {len(kept_out)} held out"
        raise UserError(f"value fit: {counts}, wanted at least 1 of each: give more validation prompts")
    # from the mean: what is learned is how prompts differ
    _start_at(head, float(targets[~held_out].double().mean()))
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    best_epoch, best_mse, best_weights = 0, math.inf, None
    device = head.query.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for epoch in range(1, settings.epochs + 1):
            order = [fitted[place] for place in epoch_rows(len(fitted), len(fitted), epoch, seed)]
            _train_epoch(head, optimizer, rows, order, size)
            mse = _mse(head, rows, kept_out, size)
            if mse < best_mse:
                best_epoch, best_mse, best_weights = epoch, mse, copy.deepcopy(head.state_dict())
            if epoch - best_epoch >= settings.patience:
                break
    if best_weights is None:
        raise UserError(f"value fit: the held-out error was never a number in {epoch} epochs: lower learning_rate")
    head.load_state_dict(best_weights)
    return FitReport(best_epoch, best_mse, _r2(best_mse, targets[held_out]), _mse(head, rows, fitted, size))


class _Rows(NamedTuple):
    """The rows of a fit as one rank sees them."""

    states: Mapping[int, Tensor]  # those it owns, by index
    targets: Tensor  # (n,) of all rows
    all_sum: AllSum

    def owned(self, indices: Sequence[int]) -> list[int]:
        return [index for index in indices if index in self.states]


def values(head: ValueHead, states: Sequence[Tensor]) -> Tensor:
    """(B,) the head's values of prompts of different lengths."""
    device = head.query.device
    padded = pad_sequence([state.to(device) for state in states], batch_first=True)  # (B, S, H)
    lengths = torch.tensor([len(state) for state in states], device=device)
    return head(padded, torch.arange(padded.shape[1], device=device) < lengths[:, None])


def _squared_error(head: ValueHead, rows: _Rows, indices: Sequence[int]) -> Tensor:
    """() the sum of the squared errors of rows that this rank owns."""
    predicted = values(head, [rows.states[index] for index in indices])
    return (predicted - rows.targets[list(indices)].to(predicted)).square().sum()


def _train_epoch(head: ValueHead, optimizer: torch.optim.Optimizer, rows: _Rows, order: list[int], size: int) -> None:
    """One step per batch of the global order; the gradient is that of the whole batch's mean."""
    head.train()
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        owned = rows.owned(batch)
        optimizer.zero_grad()
        if owned:
            (_squared_error(head, rows, owned) / len(batch)).backward()
        _sum_gradients(head, rows.all_sum)
        optimizer.step()


def _sum_gradients(head: ValueHead, all_sum: AllSum) -> None:
    """Replace each gradient by its sum over ranks, in one call; a rank without rows adds zeros."""
    parameters = list(head.parameters())
    local = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = all_sum(torch.cat([gradient.flatten() for gradient in local]))
    for p, part in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p).clone()


@torch.no_grad()
def _mse(head: ValueHead, rows: _Rows, indices: list[int], batch_size: int) -> float:
    """The mean squared error over rows of all ranks, in evaluation mode; one call of all_sum."""
    head.eval()
    owned = rows.owned(indices)
    total = torch.zeros((), dtype=torch.float64, device=head.query.device)
    for start in range(0, len(owned), batch_size):
        total += _squared_error(head, rows, owned[start : start + batch_size])
    return float(rows.all_sum(total)) / len(indices)


@torch.no_grad()
def _start_at(head: ValueHead, mean: float) -> None:
    """Let every prompt's value be `mean`, kept off the range's ends by 1 %, until something is learned."""
    share = min(max((mean - head.low) / (head.high - head.low), 0.01), 0.99)
    head.output.weight.zero_()
    head.output.bias.fill_(math.log(share / (1 - share)))


def _r2(mse: float, targets: Tensor) -> float:
    """The explained share of the targets' variance; NaN where all are equal."""
    if targets.max() == targets.min():
        return math.nan
    return 1.0 - mse / float(targets.double().var(correction=0))
