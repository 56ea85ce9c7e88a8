"""Compositions to look at: what was hidden, what was drawn instead, what the texts earned, whose doing that is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pipeline.algorithms.functional import Drawn
from pipeline.compositions import Composed, credits
from pipeline.records import Batch
from pipeline.text import Encoder

SHOWN = 4  # texts of a row, from the best and from the worst; and tokens of the most and of the least credit


def samples_of(encoder: Encoder, batch: Batch, drawn: Drawn, found: Composed, weights: Tensor) -> list[dict[str, Any]]:
    """One row of the sample table for each item of `batch`; weights (B, n) are the advantages."""
    told = credits(drawn, weights.to(drawn.ids.device), batch.static.hidden.to(drawn.ids.device)).cpu()
    counts = batch.static.hidden.sum(1).tolist()
    rows, first = [], 0
    for i, count in enumerate(counts[: len(found.texts)]):
        tokens = drawn.ids[first : first + count].cpu()
        rewards = found.rewards[i].tolist()
        order = sorted(range(len(rewards) - 1), key=lambda k: -rewards[k])
        shown = list(dict.fromkeys([*order[:SHOWN], *order[-SHOWN:]]))
        rows.append(
            {
                "static": encoder.decode(batch.static.ids[i][batch.static.mask[i]].tolist()),
                "hidden": marked(encoder, batch, i),
                "compositions": [{"reward": rewards[k], "text": found.texts[i][k]} for k in shown],
                "greedy": {"reward": rewards[-1], "text": found.texts[i][-1]},
                **praised(encoder, tokens, told[first : first + count]),
            }
        )
        first += count
    return rows


def marked(encoder: Encoder, batch: Batch, i: int) -> str:
    """The static response's tokens, hidden ones as [MASK]."""
    given = batch.static
    ids, hidden = given.ids[i][given.mask[i]].tolist(), given.hidden[i][given.mask[i]].tolist()
    pieces = encoder.tokenizer.convert_ids_to_tokens(ids)
    return " ".join("[MASK]" if secret else piece for piece, secret in zip(pieces, hidden, strict=True))


def praised(encoder: Encoder, tokens: Tensor, told: Tensor) -> dict[str, list[str]]:
    """The drawn tokens (m, n) of the highest and of the lowest credit, each id's credits at a position added up."""
    sums: dict[tuple[int, int], float] = {}
    for place, (ids, values) in enumerate(zip(tokens.tolist(), told.tolist(), strict=True)):
        for token, value in zip(ids, values, strict=True):
            sums[place, token] = sums.get((place, token), 0.0) + value
    ranked = sorted(sums, key=lambda key: -sums[key])

    def named(keys: list[tuple[int, int]]) -> list[str]:
        return [f"{encoder.tokenizer.convert_ids_to_tokens(token)} {sums[place, token]:+.3f}" for place, token in keys]

    return {"praised": named(ranked[:SHOWN]), "blamed": named(ranked[-SHOWN:][::-1])}
