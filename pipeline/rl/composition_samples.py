"""Compositions to read: masked and drawn tokens, the rewards of the texts, and the credit of tokens.

A row of the table is {"id", "prompt", "reference", "static": {"text", "parts"}, "samples": n, "mean": of their rewards,
"greedy": {"reward", "text", "parts"}, "compositions": some of the n, best first, like greedy, "praised", "blamed": some
of the drawn tokens {"token", "instead_of", "credit"}}. `parts` are a text in pieces, [piece, whether it is masked].
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pipeline.algorithms.logits import Drawn
from pipeline.data import vocabulary
from pipeline.data.prompts import reference_text
from pipeline.data.template import Prompt
from pipeline.data.tokenization import Encoder
from pipeline.records import Batch, text_of
from pipeline.rewards import scoring
from pipeline.rl.compositions import Compositions, token_credit

SHOWN = 4  # texts of a row, from the best and from the worst; and tokens of the most and of the least credit
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoding makes of bytes that are no character


def samples_of(
    encoder: Encoder, batch: Batch, drawn: Drawn, compositions: Compositions, weights: Tensor
) -> list[dict[str, Any]]:
    """One row of the sample table for each item of `batch`; weights (B, n) are the advantages."""
    static = batch.static
    counts = static.masked.sum(1).tolist()
    tokens = drawn.ids.cpu().split(counts)  # (m, n) for each sequence
    credit = token_credit(weights.cpu(), static.masked.cpu()).split(counts)
    rows = []
    for i, example in enumerate(compositions.examples):
        ids, masked = static.ids[i][static.mask[i]], static.masked[i][static.mask[i]]
        rows.append(
            {
                "id": example.id,
                "prompt": scoring.plain_prompt(example),
                "reference": text_of(reference_text(example)),
                "static": {
                    "text": encoder.decode(ids.tolist(), example.prompt),
                    "parts": parts(encoder, ids, masked, example.prompt),
                },
                **texts(encoder, compositions, i, masked),
                **by_credit(encoder, ids[masked].tolist(), tokens[i], credit[i]),
            }
        )
    return rows


def texts(encoder: Encoder, compositions: Compositions, i: int, masked: Tensor) -> dict[str, Any]:
    """The greedy composition of item `i`, and those of the highest and lowest reward; masked (T,) bool."""
    *rewards, greedy = compositions.rewards[i].tolist()
    order, prompt = sorted(range(len(rewards)), key=lambda k: -rewards[k]), compositions.examples[i].prompt

    def row(k: int, reward: float) -> dict[str, Any]:
        ids = compositions.ids[i, k, : len(masked)]
        return {"reward": reward, "text": compositions.texts[i][k], "parts": parts(encoder, ids, masked, prompt)}

    return {
        "samples": len(rewards),
        "mean": statistics.fmean(rewards),
        "greedy": row(len(rewards), greedy),
        "compositions": [row(k, rewards[k]) for k in dict.fromkeys([*order[:SHOWN], *order[-SHOWN:]])],
    }


def parts(encoder: Encoder, ids: Tensor, masked: Tensor, prompt: Prompt) -> list[list[str | bool]]:
    """A response (T,) in pieces, [text, whether it is masked]: masked tokens one by one, what stands between together.

    A piece is what its tokens add to the text before them. Of a character of several tokens, the last has it.
    """
    flags, tokens = masked.tolist(), ids.tolist()
    if not tokens:
        return []
    last = len(flags) - 1
    ends = [i for i, flag in enumerate(flags) if flag or i == last or flags[i + 1]]
    *whole, said = encoder.decode_all([tokens[: end + 1] for end in ends], [prompt] * len(ends))
    # a character that only later tokens complete belongs to the piece of the last of them
    begun = [text.rstrip(BROKEN) for text in whole]
    begun = [*(text if said.startswith(text) else "" for text in begun), said]  # the template's words in part: no text
    pieces = [text[len(before) :] for before, text in zip(["", *begun], begun, strict=False)]
    return [[piece, flags[end]] for piece, end in zip(pieces, ends, strict=True) if piece or flags[end]]


def by_credit(
    encoder: Encoder, replaced: Sequence[int], tokens: Tensor, credit: Tensor
) -> dict[str, list[dict[str, Any]]]:
    """The tokens (m, n) drawn for the m ids `replaced` with the most credit, and with the least.

    credit (m, n) is that of single draws; those of one id at one place are added up.
    """
    sums: Counter[tuple[int, int]] = Counter()
    for place, (ids, values) in enumerate(zip(tokens.tolist(), credit.tolist(), strict=True)):
        for token, value in zip(ids, values, strict=True):
            sums[place, token] += value
    ranked = sorted(sums, key=lambda key: -sums[key])

    def named(keys: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        drawn = written(encoder, [token for _, token in keys])
        before = written(encoder, [replaced[place] for place, _ in keys])
        return [
            {"token": token, "instead_of": other, "credit": sums[key]}
            for token, other, key in zip(drawn, before, keys, strict=True)
        ]

    return {
        "praised": named([key for key in ranked[:SHOWN] if sums[key] > 0]),
        "blamed": named([key for key in ranked[-SHOWN:][::-1] if sums[key] < 0]),
    }


def written(encoder: Encoder, ids: Sequence[int]) -> list[str]:
    """Each id as the text that it adds to a sentence; as the vocabulary names it where that is no whole character."""
    if not ids:
        return []
    added = vocabulary.texts_after_a_letter(encoder.tokenizer, ids)
    names = encoder.tokenizer.convert_ids_to_tokens(list(ids))
    return [name if BROKEN in text else text for text, name in zip(added, names, strict=True)]
