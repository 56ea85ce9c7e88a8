"""Response log-probabilities at a vocabulary of 128 k, with their gradient: ours against logits kept whole."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from pipeline.algorithms.logits import token_logps
from pipeline.bench.measure import Goal, Result, alternate, compared, times_less
from pipeline.bench.setup import Setup
from pipeline.models.policy import CHUNK_ELEMENTS

LESS = Goal(5.0, at_least=True)


def measure(
    setup: Setup, tokens: int = 2048, width: int = 256, vocabulary: int = 131_072, at_a_time: int = CHUNK_ELEMENTS
) -> list[Result]:
    """Of `tokens` response tokens with `width` hidden states; `at_a_time` logits of ours are alive."""
    device = setup.ranks.device
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False, device=device)
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), device=device)
    chunks = max(1, math.ceil(tokens * vocabulary / at_a_time))

    def ours(step: int = 0) -> None:
        torch.autograd.grad(token_logps(hidden, head, targets, chunks).sum(), [hidden, head.weight])

    def other(step: int = 0) -> None:
        logps = head(hidden).float().log_softmax(-1).gather(1, targets[:, None])  # logits (N, V) are kept whole
        torch.autograd.grad(logps.sum(), [hidden, head.weight])

    less = times_less("logits kept whole / our response log-probs", ours, other, LESS)
    rounds = alternate(ours, other, setup.timing.single)
    time = compared("our response log-probs / logits kept whole, time", "s", rounds, None)
    return [replace(less, note=f"{tokens} tokens, V = {vocabulary:,}, {chunks} slices"), time]
