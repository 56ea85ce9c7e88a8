"""Micro-batches whose responses are partly hidden behind [MASK], and what is drawn in the hidden places.

What is hidden, which static response is read, and the throws of its draws are functions of (seed, step, example id):
they depend on no batch, rank or accumulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline import masks
from pipeline.records import Batch, Item, Row, Static
from pipeline.sampling import generator
from pipeline.settings import Masking
from pipeline.text import pad
from pipeline.vocabulary import Vocabulary


@dataclass(frozen=True)
class Hiding:
    """How the responses of a step are hidden."""

    vocabulary: Vocabulary
    masking: Masking
    seed: int
    spans: bool = False  # words and punctuation count in responses as they do in static responses
    samples: int = 0  # draws for each hidden token of a static response; 0: static responses are not read
    share_prompt: bool = True  # one row of prompt, response, static response for a causal model; else two

    def hide(self, batch: Batch, items: Sequence[Item], step: int, apart: bool, pad_id: int) -> Batch:
        """`batch`, made of `items` (none for a filler), with its responses as the model shall read them.

        Args:
            apart: prompts and responses are padded apart (an encoder and a decoder read them).
        """
        throws = [generator("mask", self.seed, (step, item.example.id)) for item in items]
        hidden = self._hidden(
            batch.response_mask, [item.rows[0] for item in items], throws, self.spans, self.masking.plain
        )
        shown = torch.where(hidden, self.vocabulary.mask_id, batch.response_ids)
        if not self.samples:
            if not apart:
                batch = replace(batch, input_ids=with_shown(batch, shown))
            return replace(batch, shown_ids=shown)
        static = self._static(items, throws, len(batch.response_ids), pad_id)
        batch = replace(batch, shown_ids=shown, static=static)
        return batch if apart else in_rows(batch, pad_id, self.share_prompt)

    def _hidden(
        self, mask: Tensor, rows: Sequence[Row], throws: Sequence[torch.Generator], spans: bool, share: float
    ) -> Tensor:
        """(B, width of `mask`) bool; a row's first number decides whether it is one of the `share` left as they are."""
        hidden = torch.zeros_like(mask)
        for i, (row, throw) in enumerate(zip(rows, throws, strict=True)):
            plain = float(torch.rand((), generator=throw)) < share
            drawn = masks.draw(row.response_ids, self.vocabulary, self.masking, throw, spans)
            hidden[i, : len(drawn)] = drawn & (not plain)
        return hidden

    def _static(self, items: Sequence[Item], throws: Sequence[torch.Generator], size: int, pad_id: int) -> Static:
        """The static responses of a batch of `size` sequences: of every item, or of a filler."""
        places = [int(torch.randint(len(i.statics), (), generator=t)) for i, t in zip(items, throws, strict=True)]
        rows = [item.statics[place] for item, place in zip(items, places, strict=True)]
        ids, mask = pad([row.response_ids for row in rows] or [()] * size, pad_id)
        hidden = self._hidden(mask, rows, throws, spans=True, share=0.0)
        counts = hidden.sum(1).tolist()
        uniforms = [torch.rand(count, self.samples, generator=t) for count, t in zip(counts, throws, strict=False)]
        return Static(
            ids=ids,
            shown_ids=torch.where(hidden, self.vocabulary.mask_id, ids),
            mask=mask,
            hidden=hidden,
            uniforms=torch.cat([torch.zeros(0, self.samples), *uniforms]),
            forbidden=self.vocabulary.special,
        )


def with_shown(batch: Batch, shown: Tensor) -> Tensor:
    """`input_ids` (B, L) of prompt + response with `shown` (B, T) in the responses' places."""
    found = batch.input_ids.clone()
    counts = batch.response_mask.sum(1).tolist()
    for i, (length, count) in enumerate(zip(batch.prompt_lengths.tolist(), counts, strict=True)):
        found[i, length : length + count] = shown[i, :count]
    return found


def in_rows(batch: Batch, pad_id: int, share_prompt: bool) -> Batch:
    """What a causal model reads: prompt, response, static response in one row each; or all first, then all second."""
    prompts = [ids[:n].tolist() for ids, n in zip(batch.input_ids, batch.prompt_lengths.tolist(), strict=True)]
    first = [ids[mask].tolist() for ids, mask in zip(batch.shown_ids, batch.response_mask, strict=True)]
    second = [ids[mask].tolist() for ids, mask in zip(batch.static.shown_ids, batch.static.mask, strict=True)]
    parts = list(zip(prompts, first, second, strict=True))
    if not share_prompt:
        ids, mask = pad([p + f for p, f, _ in parts] + [p + s for p, _, s in parts], pad_id)
        return replace(batch, input_ids=ids, input_mask=mask)
    ids, mask = pad([p + f + s for p, f, s in parts], pad_id)
    segments, _ = pad([[0] * len(p) + [1] * len(f) + [2] * len(s) for p, f, s in parts], -1)
    return replace(batch, input_ids=ids, input_mask=mask, segments=segments)
