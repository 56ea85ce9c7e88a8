"""Peak memory of the response log-probabilities, forward and backward, at a vocabulary of 128 k: ours against logits
kept whole in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.algorithms.functional import token_logps
from pipeline.bench.bed import Bed
from pipeline.bench.measure import Goal, Result, peak_megabytes, timed
from pipeline.models.policy import CHUNK_ELEMENTS

LESS = Goal(5.0, at_least=True)


class Sizes(NamedTuple):
    """Response tokens of a micro-batch, hidden states, vocabulary, and the logits alive at a time."""

    tokens: int
    hidden: int
    vocabulary: int
    at_a_time: int


LARGE = Sizes(2048, 256, 131_072, CHUNK_ELEMENTS)
Logps = Callable[[Tensor, nn.Module, Tensor], Tensor]  # hidden (N, H), head, targets (N,) -> (N,)


def measure(bed: Bed, sizes: Sizes = LARGE) -> list[Result]:
    device, clock = bed.ranks.device, bed.settings.clock
    tokens, width, vocabulary, at_a_time = sizes
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False, device=device)
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), device=device)
    chunks = max(1, math.ceil(tokens * vocabulary / at_a_time))

    def run(logps: Logps) -> None:
        logps(hidden, head, targets).sum().backward()
        hidden.grad = head.weight.grad = None

    def chunked(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
        return token_logps(hidden, head, targets, chunks)

    found = {}
    for name, logps in (("ours", chunked), ("naive", naive)):
        seconds: list[float] = []
        peak = peak_megabytes(lambda logps=logps, seconds=seconds: seconds.append(timed(partial(run, logps), clock)))
        found[name] = peak, seconds[0]
    (peak, seconds), (naive_peak, naive_seconds) = found["ours"], found["naive"]
    note = f"{tokens} tokens, V = {vocabulary:,}, {chunks} slices"
    less = Result("naive / our response log-probs, peak memory", "MB", peak, naive_peak, naive_peak / peak, goal=LESS)
    time = Result("our / naive response log-probs, time", "s", seconds, naive_seconds, seconds / naive_seconds)
    return [replace(less, note=note), time]


def naive(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """(N,) log-probabilities from logits (N, V) that are kept whole."""
    return head(hidden).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
