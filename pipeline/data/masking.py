"""Micro-batches whose responses are partly masked, and what is drawn in the masked places.

What is masked, which static response is read, and the uniforms of its draws are functions of (seed, step, example id):
they depend on no batch, rank or accumulation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.config.schema import Masking
from pipeline.data.sampling import generator
from pipeline.data.tokenization import pad
from pipeline.data.vocabulary import TokenTables
from pipeline.records import Batch, Item, Row, StaticBatch


@dataclass(frozen=True)
class Masker:
    """How the responses of a step are masked."""

    vocabulary: TokenTables
    masking: Masking
    seed: int
    spans: bool = False  # words and punctuation count in responses as they do in static responses
    samples: int = 0  # draws for each masked token of a static response; 0: static responses are not read

    def mask(self, batch: Batch, items: Sequence[Item], step: int, apart: bool, pad_id: int) -> Batch:
        """`batch`, made of `items` (none for a filler), with its responses as the model shall read them.

        `apart`: prompts and responses are padded apart (an encoder and a decoder read them).
        """
        generators = [generator("mask", self.seed, (step, item.example.id)) for item in items]
        rows = [item.rows[0] for item in items]
        masked = self._masked(batch.response_mask, rows, generators, self.spans, self.masking.plain)
        shown = torch.where(masked, self.vocabulary.mask_id, batch.response_ids)
        read = batch.input_ids if apart else with_shown(batch, shown)
        batch = replace(batch, input_ids=read, shown_ids=shown)
        if not self.samples:
            return batch
        batch = replace(batch, static=self._static(items, generators, len(batch.response_ids), pad_id))
        return batch if apart else in_two_rows(batch, pad_id)

    def _masked(
        self, mask: Tensor, rows: Sequence[Row], generators: Sequence[torch.Generator], spans: bool, share: float
    ) -> Tensor:
        """(B, width of `mask`) bool; a row's first number decides whether it is one of the `share` left as they are."""
        masked = torch.zeros_like(mask)
        for i, (row, numbers) in enumerate(zip(rows, generators, strict=True)):
            plain = float(torch.rand((), generator=numbers)) < share
            positions = masked_positions(row.response_ids, self.vocabulary, self.masking, numbers, spans)
            masked[i, : len(positions)] = positions & (not plain)
        return masked

    def _static(
        self, items: Sequence[Item], generators: Sequence[torch.Generator], size: int, pad_id: int
    ) -> StaticBatch:
        """The static responses of a batch of `size` sequences: of every item, or of a filler."""
        rows = [
            item.static_rows[int(torch.randint(len(item.static_rows), (), generator=numbers))]
            for item, numbers in zip(items, generators, strict=True)
        ]
        # no rows: a filler, which keeps the ranks in step
        ids, mask = pad([row.response_ids for row in rows] or [()] * size, pad_id)
        masked = self._masked(mask, rows, generators, spans=True, share=0.0)
        counts = masked.sum(1).tolist()
        uniforms = [torch.rand(n, self.samples, generator=each) for n, each in zip(counts, generators, strict=False)]
        return StaticBatch(
            ids=ids,
            shown_ids=torch.where(masked, self.vocabulary.mask_id, ids),
            mask=mask,
            masked=masked,
            uniforms=torch.cat([torch.zeros(0, self.samples), *uniforms]),
            suppressed=self.vocabulary.special,
        )


def with_shown(batch: Batch, shown: Tensor) -> Tensor:
    """`input_ids` (B, L) of prompt + response with `shown` (B, T) in the responses' places."""
    masked_ids = batch.input_ids.clone()
    ends = batch.input_mask.sum(1).tolist()
    for row, ids, start, end in zip(masked_ids, shown, batch.prompt_lengths.tolist(), ends, strict=True):
        row[start:end] = ids[: end - start]
    return masked_ids


def in_two_rows(batch: Batch, pad_id: int) -> Batch:
    """The same with 2B rows to read: prompt and response, then prompt and static response, with the same prompt."""
    prompts = [ids[:n].tolist() for ids, n in zip(batch.input_ids, batch.prompt_lengths.tolist(), strict=True)]
    first = [ids[mask].tolist() for ids, mask in zip(batch.shown_ids, batch.response_mask, strict=True)]
    second = [ids[mask].tolist() for ids, mask in zip(batch.static.shown_ids, batch.static.mask, strict=True)]
    rows = [prompt + response for prompt, response in zip(prompts * 2, [*first, *second], strict=True)]
    ids, mask = pad(rows, pad_id)
    owners = None if batch.owners is None else batch.owners.repeat(2)
    lengths = batch.prompt_lengths.repeat(2)
    return replace(batch, input_ids=ids, input_mask=mask, prompt_lengths=lengths, owners=owners)


def masked_positions(
    ids: Sequence[int] | Tensor, vocabulary: TokenTables, settings: Masking, generator: torch.Generator, spans: bool
) -> Tensor:
    """Which of the T tokens of one response are masked, (T,) bool on the CPU.

    Special tokens never are. The generator moves on by T numbers, whatever they decide.

    Args:
        ids: (T,) token ids of a response, EOS among them if it has one.
        generator: of the CPU; the mask is a function of its state, the ids and the settings.
        spans: whether `settings.span` and `settings.after_punctuation` hold (static rows); without them tokens are
            drawn one by one (reference rows).
    """
    ids = torch.as_tensor(ids, dtype=torch.int64)
    ordinary = ~vocabulary.special.take(ids)
    drawable = ordinary.clone()
    if spans and not settings.after_punctuation:
        drawable[1:] &= ~vocabulary.punctuation.take(ids[:-1])
    numbers = torch.rand(len(ids), generator=generator)
    drawn = fixed_count(numbers, drawable, settings.rate) if settings.exact else drawable & (numbers < settings.rate)
    if not spans or settings.span == "token":
        return drawn
    begins = vocabulary.word_start.take(ids) | ~ordinary
    stretch = to_word_ends if settings.span == "word" else to_whole_words
    return stretch(drawn, begins) & ordinary


def fixed_count(numbers: Tensor, drawable: Tensor, rate: float) -> Tensor:
    """The floor(C * rate) of the C drawable positions that have the smallest of `numbers` (T,) in [0, 1)."""
    count = math.floor(int(drawable.sum()) * rate + 1e-9)  # 100 * 0.29 is 28.999999999999996
    drawn = torch.zeros_like(drawable)
    drawn[torch.where(drawable, numbers, 2.0).argsort()[:count]] = True
    return drawn


def to_word_ends(drawn: Tensor, begins: Tensor) -> Tensor:
    """`drawn` with all that follows a drawn token inside its word; (T,) bool each, `begins` True on first tokens.

    A token is masked where, of the draws and beginnings up to and with itself, the last is a draw.
    """
    if not len(drawn):
        return drawn
    last = (torch.arange(len(drawn)) * (drawn | begins)).cummax(0).values  # (T,) where that last one is
    return drawn.take(last)


def to_whole_words(drawn: Tensor, begins: Tensor) -> Tensor:
    """`drawn` with every token of the words that have a drawn one; (T,) bool each, `begins` True on first tokens."""
    word = begins.cumsum(0)  # (T,) number of the word; 0 for tokens before the first mark, which are one word
    hits = torch.zeros(len(drawn) + 1, dtype=torch.int64).index_add_(0, word, drawn.long())
    return hits.take(word) > 0
