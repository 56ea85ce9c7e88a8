"""What plain sampling would know of responses that were drawn elsewhere: one pass of the policy over their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.algorithms import capability
from pipeline.data.batching import Packing, once
from pipeline.errors import UserError
from pipeline.records import Item, Request, Response, Row, SampleStats
from pipeline.trainer.engine import Engine

STRANGE = 6.0  # standard errors, which chance reaches once in a billion steps


class Surprise(NamedTuple):
    """How much less likely than expected the tokens are that were drawn at temperature 1; NaN where none were."""

    mean: float  # nats per token
    errors: float  # the same in standard errors


@torch.no_grad()
def with_stats(
    engine: Engine, packing: Packing, requests: Sequence[Request], groups: Sequence[Sequence[Response]]
) -> tuple[list[list[Response]], Surprise]:
    """The responses to each request with the `SampleStats` that drawing.py would have noted; `drop` is not known.

    Raises UserError, on all ranks, where one has a token that the policy cannot draw.
    """
    engine.train(False)
    levels = [level for request in requests for level in request.temperatures]
    responses = [response for group in groups for response in group]
    tempered = any(level != 1.0 for level in levels)
    items = [
        Item(one.example, (Row(one.prompt_ids, one.response_ids),), {"temperature": level} if tempered else {})
        for one, level in zip(responses, levels, strict=True)
    ]
    lengths = [len(one.response_ids) for one in responses]
    ends = np.cumsum([0, *lengths])
    found = torch.zeros(3, int(ends[-1]))  # of all tokens, what `logits.token_stats` says
    for batch in once(items, packing, engine.ranks.rank, engine.ranks.world):
        said = torch.stack(engine(batch, output="draws")).float().cpu()  # (3, B, T)
        for row, index in enumerate(batch.items):
            found[:, ends[index] : ends[index + 1]] = said[:, row, batch.response_mask[row]]
    found = engine.ranks.all_sum(found)  # one rank has each
    each = [found[:, start:end] for start, end in pairwise(ends.tolist())]
    _refuse_impossible(responses, each)
    stats = iter(map(_stats, each))
    plain = torch.repeat_interleave(torch.tensor(levels) == 1.0, torch.tensor(lengths))  # (tokens,)
    with_them = [[replace(one, stats=next(stats)) for one in group] for group in groups]
    return with_them, surprise(found[0, plain], found[1, plain])


def surprise(logps: Tensor, entropies: Tensor) -> Surprise:
    """By the log-probabilities of drawn tokens and the entropies of their distributions, both (N,).

    -log p of a token drawn from p has the entropy as its mean, whatever was drawn before: the sum of the differences
    over its root sum of squares is about a standard normal number.
    """
    gaps = -logps.double() - entropies.double()
    spread = float(gaps.square().sum().sqrt())
    return Surprise(float(gaps.mean()), float(gaps.sum()) / spread if spread > 0 else float("nan"))


def _stats(known: Tensor) -> SampleStats:
    """Of one response; `known` (3, T)."""
    logps, entropies, peaks = known
    entropy = float(entropies.double().mean())
    return SampleStats(logps.clone(), entropy, capability.confidence(peaks), float("nan"), 0)


def _refuse_impossible(responses: Sequence[Response], each: Sequence[Tensor]) -> None:
    """Raises UserError where a response has a token of probability 0; `each` (3, T)."""
    ill = [one.example.id for one, known in zip(responses, each, strict=True) if not known.isfinite().all()]
    if ill:
        raise UserError(
            f"generation.engine: row {ill[0]}: the server wrote a token that the policy never says (in {len(ill):,} of "
            f"{len(responses):,} responses), wanted those of the same model: does it serve these weights?"
        )
