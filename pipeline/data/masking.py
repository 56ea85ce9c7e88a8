"""Micro-batches whose responses are partly hidden behind [MASK], and what is drawn in the hidden places.

What is hidden, which static response is read, and the throws of its draws are functions of (seed, step, example id):
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
from pipeline.data.vocabulary import Vocabulary
from pipeline.records import Batch, Item, Row, Static


@dataclass(frozen=True)
class Hiding:
    """How the responses of a step are hidden."""

    vocabulary: Vocabulary
    masking: Masking
    seed: int
    spans: bool = False  # words and punctuation count in responses as they do in static responses
    samples: int = 0  # draws for each hidden token of a static response; 0: static responses are not read
    share_prompt: bool = True  # one row of static response, prompt, response for a causal model; else two

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
        read = batch.input_ids if apart else with_shown(batch, shown)
        batch = replace(batch, input_ids=read, shown_ids=shown)
        if not self.samples:
            return batch
        batch = replace(batch, static=self._static(items, throws, len(batch.response_ids), pad_id))
        return batch if apart or self.share_prompt else in_two_rows(batch, pad_id)

    def _hidden(
        self, mask: Tensor, rows: Sequence[Row], throws: Sequence[torch.Generator], spans: bool, share: float
    ) -> Tensor:
        """(B, width of `mask`) bool; a row's first number decides whether it is one of the `share` left as they are."""
        hidden = torch.zeros_like(mask)
        for i, (row, throw) in enumerate(zip(rows, throws, strict=True)):
            plain = float(torch.rand((), generator=throw)) < share
            drawn = draw(row.response_ids, self.vocabulary, self.masking, throw, spans)
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
    for i, (length, end) in enumerate(
        zip(batch.prompt_lengths.tolist(), batch.input_mask.sum(1).tolist(), strict=True)
    ):
        found[i, length:end] = shown[i, : end - length]
    return found


def in_two_rows(batch: Batch, pad_id: int) -> Batch:
    """The same with 2B rows to read: prompt and response, then prompt and static response."""
    prompts = [ids[:n].tolist() for ids, n in zip(batch.input_ids, batch.prompt_lengths.tolist(), strict=True)]
    first = [ids[mask].tolist() for ids, mask in zip(batch.shown_ids, batch.response_mask, strict=True)]
    second = [ids[mask].tolist() for ids, mask in zip(batch.static.shown_ids, batch.static.mask, strict=True)]
    said = [*first, *second]
    ids, mask = pad([prompt + text for prompt, text in zip(prompts * 2, said, strict=True)], pad_id)
    return replace(batch, input_ids=ids, input_mask=mask)


def draw(
    ids: Sequence[int] | Tensor, vocabulary: Vocabulary, settings: Masking, generator: torch.Generator, spans: bool
) -> Tensor:
    """Which of the T tokens of one response are hidden, (T,) bool on the CPU.

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

    A token is hidden where, of the draws and beginnings up to and with itself, the last is a draw.
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
