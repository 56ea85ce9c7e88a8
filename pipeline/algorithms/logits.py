"""What is read of a model's logits, which are never held all at once: log-probabilities of tokens, draws, entropies.

Nothing here knows of ranks, files or configuration; everything returns new tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]  # hidden states (N, H) -> logits (N, V)


def token_logps(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    chunks: int = 1,
    temperatures: Tensor | None = None,
    suppressed: Tensor | None = None,
) -> Tensor:
    """(N,) float32: the log-probability of each target, without ever holding (N, V) when `chunks` > 1.

    hidden (N, H), targets (N,) int64, temperatures (N,) > 0 or None for 1; suppressed (V,) bool marks ids of
    probability 0, None: there are none. The head is called exactly `chunks` times, on slices that may be empty: under
    ZeRO-3 every rank must call it equally often. With several chunks the logits are recomputed in backward instead of
    being kept. N may be 0; the result hangs on `hidden` all the same, so that backward runs on every rank.
    """

    def slice_logps(rows: Tensor, ids: Tensor, divisors: Tensor | None) -> Tensor:
        return _Logps.apply(_logits(head, rows, divisors, suppressed), ids, False, None)[0]

    return torch.cat(_in_slices(slice_logps, hidden, targets, temperatures, chunks))


def _logits(head: Head, rows: Tensor, temperatures: Tensor | None, suppressed: Tensor | None) -> Tensor:
    """(n, V) float32, -inf where an id is suppressed."""
    logits = head(rows).float()
    if temperatures is not None:
        logits = logits / temperatures[:, None]
    return logits if suppressed is None else logits.masked_fill(suppressed, -torch.inf)


def _in_slices(
    work: Callable[..., Tensor], hidden: Tensor, targets: Tensor, temperatures: Tensor | None, chunks: int
) -> list[Tensor]:
    """What `work` makes of each of `chunks` slices; with several, what it keeps for backward is made again there."""
    assert chunks >= 1, f"chunks is {chunks}"
    divisors = [None] * chunks if temperatures is None else temperatures.tensor_split(chunks)
    slices = zip(hidden.tensor_split(chunks), targets.tensor_split(chunks), divisors, strict=True)
    if chunks > 1 and torch.is_grad_enabled():
        return [checkpoint(work, *parts, use_reentrant=False) for parts in slices]
    return [work(*parts) for parts in slices]


class _Logps(torch.autograd.Function):
    """log_softmax then gather, with one (n, V) tensor kept and one made in backward; autograd's own way makes three.

    With `smooth` the mean over the vocabulary stands beside it, from the same tensor; else None. Suppressed ids, whose
    logits are -inf, are no part of that vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ids: Tensor, smooth: bool, suppressed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        logps = logits.log_softmax(-1)
        ctx.save_for_backward(logps, ids, suppressed)
        return logps.gather(-1, ids[:, None])[:, 0], _vocabulary_mean(logps, suppressed) if smooth else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_mean: Tensor | None) -> tuple[Tensor, None, None, None]:
        """d logp[t] / d logits = one-hot(t) - softmax; d mean / d logits = 1 / V - softmax."""
        logps, ids, suppressed = ctx.saved_tensors
        grad_logits = logps.exp().mul_(-(grad if grad_mean is None else grad + grad_mean)[:, None])
        if grad_mean is not None and suppressed is None:
            grad_logits.add_(grad_mean[:, None] / logps.shape[-1])
        elif grad_mean is not None:
            grad_logits.addcmul_(grad_mean[:, None], (~suppressed).to(grad_mean) / (~suppressed).sum())
        return grad_logits.scatter_add_(-1, ids[:, None], grad[:, None]), None, None, None


def _vocabulary_mean(logps: Tensor, suppressed: Tensor | None) -> Tensor:
    """(n,) the mean of logps (n, V) over the ids that are not suppressed."""
    if suppressed is None:
        return logps.mean(-1)
    return logps.masked_fill(suppressed, 0.0).sum(-1) / (~suppressed).sum()


def smoothed_logps(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    chunks: int = 1,
    temperatures: Tensor | None = None,
    suppressed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(N,) float32 each: the log-probability of each target, and the mean log-probability over the vocabulary.

    Arguments, slices and calls of the head as in `token_logps`.
    """

    def slice_logps(rows: Tensor, ids: Tensor, divisors: Tensor | None) -> Tensor:
        return torch.stack(_Logps.apply(_logits(head, rows, divisors, suppressed), ids, True, suppressed))  # (2, n)

    logps, means = torch.cat(_in_slices(slice_logps, hidden, targets, temperatures, chunks), dim=1)
    return logps, means


class Drawn(NamedTuple):
    """Tokens drawn at M masked positions, n for each, and what their distributions were."""

    logp: Tensor  # (M, n) float32; its gradient is that of the raw logits: see `draw_tokens`
    ids: Tensor  # (M, n) int64
    greedy: Tensor  # (M,) int64, the most likely id
    entropy: Tensor  # (M,) float32, nats


def draw_tokens(hidden: Tensor, head: Head, uniforms: Tensor, suppressed: Tensor, chunks: int = 1) -> Drawn:
    """n independent draws from each position's distribution, all from one set of logits.

    hidden (M, H); uniforms (M, n) float32 in [0, 1) decide the draws, so that the same uniforms give the same tokens;
    suppressed (V,) bool marks ids of probability 0. Slices and calls of the head as in `token_logps`.

    The normaliser of `logp` carries no gradient: each token's gradient is its raw logit's. Where the weights of one
    position's draws sum to zero, as advantages do, every normaliser cancels, and at most n logits of a row have a
    gradient. Where they do not sum to zero this is not the gradient of the log-probability.
    """
    assert chunks >= 1, f"chunks is {chunks}"
    parts = []
    for rows, numbers in zip(hidden.tensor_split(chunks), uniforms.tensor_split(chunks), strict=True):
        if chunks > 1 and torch.is_grad_enabled():
            with torch.no_grad():
                drawn = _draw(head(rows), numbers, suppressed)
            logits = checkpoint(_gathered, rows, head, drawn.ids, use_reentrant=False)
            parts.append(drawn._replace(logp=drawn.logp + (logits - logits.detach())))
        else:
            parts.append(_draw(head(rows), numbers, suppressed))
    return Drawn(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _gathered(rows: Tensor, head: Head, ids: Tensor) -> Tensor:
    return head(rows).float().gather(1, ids)


def _draw(logits: Tensor, uniforms: Tensor, suppressed: Tensor) -> Drawn:
    """By inverting each row's distribution function at its uniforms (m, n); logits (m, V)."""
    logits = logits.float()
    with torch.no_grad():
        allowed = logits.masked_fill(suppressed, -torch.inf)
        logps = allowed.log_softmax(-1)
        shares = logps.exp()
        sums = shares.cumsum(-1)
        last = sums[:, -1:]
        points = torch.minimum(uniforms * last, torch.nextafter(last, torch.zeros_like(last)))
        ids = torch.searchsorted(sums, points, right=True)  # the first id whose sum exceeds the point
        greedy = allowed.argmax(-1)
        ids = torch.where(suppressed[ids], greedy[:, None], ids)  # sums of a GPU may fall by a rounding
        normaliser = logits.gather(1, ids) - logps.gather(1, ids)
        entropy = -torch.where(suppressed, 0.0, shares * logps).sum(-1)
    return Drawn(logits.gather(1, ids) - normaliser, ids, greedy, entropy)


@torch.no_grad()
def token_entropies(hidden: Tensor, head: Head, chunks: int = 1, suppressed: Tensor | None = None) -> Tensor:
    """(N,) float32: the entropy in nats of each position's distribution, in [0, ln V], without gradient.

    hidden (N, H); suppressed ids, slices and calls of the head as in `token_logps`.
    """
    assert chunks >= 1, f"chunks is {chunks}"
    logits = (_logits(head, rows, None, suppressed) for rows in hidden.tensor_split(chunks))
    return torch.cat([torch.special.entr(one.softmax(-1)).sum(-1) for one in logits])  # entr(p) = -p ln p, 0 for p = 0


@torch.no_grad()
def token_stats(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    chunks: int = 1,
    temperatures: Tensor | None = None,
    suppressed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Three (N,) float32 without gradient: what is known of each target as a draw.

    The log-probability that `token_logps` gives; of the untempered distribution the entropy in nats, and the largest
    probability. Arguments and calls of the head as in `token_logps`.
    """

    def slice_stats(rows: Tensor, ids: Tensor, divisors: Tensor | None) -> Tensor:
        logps = _logits(head, rows, None, suppressed).log_softmax(-1)
        drawn = logps if divisors is None else (logps / divisors[:, None]).log_softmax(-1)
        entropies = torch.special.entr(logps.exp()).sum(-1)
        return torch.stack([drawn.gather(1, ids[:, None])[:, 0], entropies, logps.amax(-1).exp()])  # (3, n)

    return tuple(torch.cat(_in_slices(slice_stats, hidden, targets, temperatures, chunks), dim=1))
