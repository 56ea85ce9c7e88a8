"""What plain sampling would know of responses that were drawn elsewhere: one pass of the policy over their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from pipeline.algorithms import capability
from pipeline.data.batching import Packing, once
from pipeline.errors import UserError
from pipeline.records import Item, Request, Response, Row, SampleStats
from pipeline.trainer.engine import Engine


@torch.no_grad()
def with_stats(
    engine: Engine, packing: Packing, requests: Sequence[Request], groups: Sequence[Sequence[Response]]
) -> list[list[Response]]:
    """The responses to each request with the `SampleStats` that drawing.py would have noted; `drop` is not known.

    Raises UserError, on all ranks, where one has a token that the policy cannot draw.
    """
    engine.train(False)
    asked = zip(requests, groups, strict=True)
    levels = [level for request, group in asked for level, _ in zip(request.temperatures, group, strict=True)]
    responses = [response for group in groups for response in group]
    tempered = any(level != 1.0 for level in levels)
    items = [
        Item(one.example, (Row(one.prompt_ids, one.response_ids),), {"temperature": level} if tempered else {})
        for one, level in zip(responses, levels, strict=True)
    ]
    ends = np.cumsum([0, *(len(one.response_ids) for one in responses)])
    found = torch.zeros(3, int(ends[-1]))  # of all tokens: log-probability, entropy, largest probability
    for batch in once(items, packing, engine.ranks.rank, engine.ranks.world):
        said = torch.stack(engine(batch, output="draws")).float().cpu()  # (3, B, T)
        for row, index in enumerate(batch.items):
            found[:, ends[index] : ends[index + 1]] = said[:, row, batch.response_mask[row]]
    found = engine.ranks.all_sum(found)  # one rank has each
    stats = iter([_stats(found[:, start:end]) for start, end in pairwise(ends.tolist())])
    if ill := [
        one.example.id
        for one, (start, end) in zip(responses, pairwise(ends.tolist()), strict=True)
        if not found[:, start:end].isfinite().all()
    ]:
        raise UserError(
            f"generation.engine: row {ill[0]}: the server wrote a token that the policy never says (of {len(ill):,} "
            "responses), wanted tokens of the same model: does it serve these weights, and with them their generation "
            "configuration?"
        )
    return [[replace(one, stats=next(stats)) for one in group] for group in groups]


def _stats(known: torch.Tensor) -> SampleStats:
    """Of one response; `known` (3, T)."""
    logps, entropies, peaks = known
    entropy = float(entropies.double().mean())
    return SampleStats(logps.clone(), entropy, capability.confidence(peaks), float("nan"), 0)
