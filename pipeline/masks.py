"""Which tokens of a response are hidden behind [MASK]: Bernoulli draws, stretched to words.

Source: "Semi-Offline Reinforcement Learning for Optimized Text Generation" (ICML 2023) and its released code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.config.schema import Masking
from pipeline.vocabulary import Vocabulary


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
