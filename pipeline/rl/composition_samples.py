"""Compositions to look at: what was hidden, what was drawn instead, what the texts earned, whose doing that is.

A row of the table is {"id", "prompt", "reference", "static": {"text", "parts"}, "samples": n, "mean": of their rewards,
"greedy": {"reward", "text", "parts"}, "compositions": some of the n, best first, like greedy, "praised", "blamed": some
of the drawn tokens {"token", "instead_of", "credit"}}. `parts` are a text in pieces, [piece, whether it is hidden].
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pipeline.algorithms.functional import Drawn
from pipeline.data import dataset, vocabulary
from pipeline.data.tokenization import Encoder
from pipeline.records import Batch
from pipeline.rewards import scoring
from pipeline.rl.compositions import Composed, credits

SHOWN = 4  # texts of a row, from the best and from the worst; and tokens of the most and of the least credit
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoding makes of bytes that are no character


def samples_of(encoder: Encoder, batch: Batch, drawn: Drawn, found: Composed, weights: Tensor) -> list[dict[str, Any]]:
    """One row of the sample table for each item of `batch`; weights (B, n) are the advantages."""
    given = batch.static
    told = credits(drawn, weights.to(drawn.ids.device), given.hidden.to(drawn.ids.device)).cpu()  # (M, n)
    counts = given.hidden.sum(1).tolist()
    rows, first = [], 0
    for i, example in enumerate(found.examples):
        here = slice(first, first + counts[i])
        first += counts[i]
        mask = given.mask[i]
        ids, hidden = given.ids[i][mask], given.hidden[i][mask]
        replaced = ids[hidden].tolist()
        rows.append(
            {
                "id": example.id,
                "prompt": scoring.plain_prompt(example),
                "reference": dataset.reference_text(example),
                "static": {"text": encoder.decode(ids.tolist()), "parts": parts(encoder, ids, hidden)},
                **texts(encoder, found, i, hidden),
                **praised(encoder, replaced, drawn.ids[here].cpu(), told[here]),
            }
        )
    return rows


def texts(encoder: Encoder, found: Composed, i: int, hidden: Tensor) -> dict[str, Any]:
    """The greedy composition of item `i`, and those of the highest and lowest reward; hidden (T,) bool."""
    *rewards, greedy = found.rewards[i].tolist()
    order = sorted(range(len(rewards)), key=lambda k: -rewards[k])

    def row(k: int, reward: float) -> dict[str, Any]:
        return {
            "reward": reward,
            "text": found.texts[i][k],
            "parts": parts(encoder, found.ids[i, k, : len(hidden)], hidden),
        }

    return {
        "samples": len(rewards),
        "mean": statistics.fmean(rewards),
        "greedy": row(len(rewards), greedy),
        "compositions": [row(k, rewards[k]) for k in dict.fromkeys([*order[:SHOWN], *order[-SHOWN:]])],
    }


def parts(encoder: Encoder, ids: Tensor, hidden: Tensor) -> list[list[str | bool]]:
    """A response (T,) in pieces, [text, whether it is hidden]: hidden tokens one by one, what stands between together.

    A piece is what its tokens add to the text before them. Of a character of several tokens, the last has it.
    """
    flags, tokens = hidden.tolist(), ids.tolist()
    if not tokens:
        return []
    last = len(flags) - 1
    ends = [i for i, flag in enumerate(flags) if flag or i == last or flags[i + 1]]
    whole = encoder.tokenizer.batch_decode(
        [tokens[: end + 1] for end in ends], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    whole = [text.lstrip() for text in whole]
    told = [text if end == last else text.rstrip(BROKEN) for text, end in zip(whole, ends, strict=True)]
    pieces = [text[len(before) :] for before, text in zip(["", *told], told, strict=False)]
    return [[piece, flags[end]] for piece, end in zip(pieces, ends, strict=True) if piece or flags[end]]


def praised(encoder: Encoder, replaced: Sequence[int], tokens: Tensor, told: Tensor) -> dict[str, list[dict[str, Any]]]:
    """The tokens (m, n) drawn for the m ids `replaced` with the most credit, and with the least.

    told (m, n) are the credits of single draws; those of one id at one place are added up.
    """
    sums: dict[tuple[int, int], float] = {}
    for place, (ids, values) in enumerate(zip(tokens.tolist(), told.tolist(), strict=True)):
        for token, value in zip(ids, values, strict=True):
            sums[place, token] = sums.get((place, token), 0.0) + value
    ranked = sorted(sums, key=lambda key: -sums[key])
    best = [key for key in ranked[:SHOWN] if sums[key] > 0]
    worst = [key for key in ranked[-SHOWN:][::-1] if sums[key] < 0]

    def named(keys: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        drawn = written(encoder, [token for _, token in keys])
        before = written(encoder, [replaced[place] for place, _ in keys])
        credit = [sums[key] for key in keys]
        return [
            {"token": token, "instead_of": other, "credit": value}
            for token, other, value in zip(drawn, before, credit, strict=True)
        ]

    return {"praised": named(best), "blamed": named(worst)}


def written(encoder: Encoder, ids: Sequence[int]) -> list[str]:
    """Each id as the text that it adds to a sentence; as the vocabulary names it where that is no whole character."""
    if not ids:
        return []
    added = vocabulary.texts_after_a_letter(encoder.tokenizer, ids)
    names = encoder.tokenizer.convert_ids_to_tokens(list(ids))
    return [name if BROKEN in text else text for text, name in zip(added, names, strict=True)]
