"""The reward of question generation in semi-offline RL (Chen et al. 2023): ROUGE-L / 3 + 2 * BLEU-4 / 3, in [0, 1].

Both parts are those of the COCO caption evaluation, sentence by sentence and over all references of a row;
`squad:rougeL` and `squad:bleu4` are one of them alone.

As released, only the completion is prepared (`question`), the references are merely lower-cased and stripped: full
stops and commas of a completion become words that no reference has. The brevity penalty always takes the reference
closest in length, of two the shorter; where a call holds one completion only, the released code takes the references'
mean length, by which a score would depend on its batch mates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from operator import truediv

from pipeline.lanes import Places, side_by_side, subsequences
from reward_models._references import References, runs
from reward_models._released import question

LONGEST = 4  # words of the n-grams that BLEU-4 counts
RECALL = 1.2**2  # how much more recall weighs than precision: beta squared
FOUND, OFFERED = 1e-15, 1e-9  # keep BLEU's fractions from 0 / 0
Grams = Iterable[tuple[str, ...]]


def reward(prompts: list[str], completions: list[str], references: References = None, **columns: list) -> list[float]:
    """ROUGE-L / 3 + 2 * BLEU-4 / 3."""
    return [rouge / 3 + 2 * bleu / 3 for rouge, bleu in _parts(completions, references)]


def rougeL(  # noqa: N802 - the name that everyone uses
    prompts: list[str], completions: list[str], references: References = None, **columns: list
) -> list[float]:
    """F of the longest common subsequence, recall weighing 1.44 times precision; each with its own best reference.

    Words stand between single blanks: two blanks have an empty one between them, which counts.
    """
    return [rouge for rouge, _ in _parts(completions, references)]


def bleu4(prompts: list[str], completions: list[str], references: References = None, **columns: list) -> list[float]:
    """Geometric mean of the clipped precisions of 1- to 4-grams, times the brevity penalty.

    It is not smoothed: where one of the four has no match it is next to 0, so for each text of under four words.
    """
    return [bleu for _, bleu in _parts(completions, references)]


class _Gold:
    """The references of a row, as both parts need them."""

    def __init__(self, texts: Sequence[str]) -> None:
        kept = [text.strip().lower() for text in texts]
        self.places = [Places(text.split(" ")) for text in kept]
        words = [text.split() for text in kept]
        self.lengths = [*map(len, words)]
        self.counts = [_most(of_length) for of_length in zip(*map(_grams, words), strict=True)]


@lru_cache(maxsize=512)
def _gold(texts: tuple[str, ...]) -> _Gold:
    """`_Gold(texts)`, kept: the references of a row are compared with many completions."""
    return _Gold(texts)


def _grams(words: Sequence[str]) -> list[Grams]:
    """The n-grams of a text in its order, n from 1 to LONGEST."""
    tails = [words[i:] for i in range(LONGEST)]
    return [zip(*tails[:n], strict=False) for n in range(1, LONGEST + 1)]


def _most(of_texts: Iterable[Grams]) -> dict[tuple[str, ...], int]:
    """How often each n-gram stands in the text that has most of it."""
    most: Counter = Counter()
    for of_text in of_texts:
        most |= Counter(of_text)
    return dict(most)


def _parts(completions: Sequence[str], references: References) -> list[tuple[float, float]]:
    """ROUGE-L and BLEU-4 of each completion."""
    values: list[tuple[float, float]] = []
    for texts, neighbours in runs(completions, references, "squad"):
        kept, questions = _gold(tuple(texts)), [*map(question, neighbours)]
        bleus = [_bleu(text.split(), kept) for text in questions]
        values += zip(_rouges([text.split(" ") for text in questions], kept), bleus, strict=True)
    return values


def _rouges(texts: Sequence[Sequence[str]], kept: _Gold) -> list[float]:
    common = [subsequences(side_by_side(places, texts)) for places in kept.places]  # by reference, then by text
    wanted = [places.length for places in kept.places]
    return [_f(of_text, len(words), wanted) for words, of_text in zip(texts, zip(*common, strict=True), strict=True)]


def _f(common: Sequence[int], length: int, wanted: Sequence[int]) -> float:
    """`common`: length of the longest common subsequence with each reference; `wanted`: the references' lengths."""
    precision = max(common) / length
    recall = max(map(truediv, common, wanted))
    return (1 + RECALL) * precision * recall / (recall + RECALL * precision) if precision else 0.0


def _bleu(words: Sequence[str], kept: _Gold) -> float:
    length = len(words)
    product = 1.0
    for i, (offered, counts) in enumerate(zip(_grams(words), kept.counts, strict=True)):
        product *= (_clipped(offered, counts) + FOUND) / (max(length - i, 0) + OFFERED)
    closest = min(kept.lengths, key=lambda wanted: (abs(wanted - length), wanted))
    ratio = (length + FOUND) / (closest + OFFERED)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return product ** (1 / LONGEST) * penalty


def _clipped(offered: Grams, counts: Mapping[tuple[str, ...], int]) -> int:
    """How many of the n-grams the references have, each no more often than the reference that has most of it."""
    found = [*filter(counts.__contains__, offered)]
    if len(set(found)) == len(found):
        return len(found)
    return sum(min(times, counts[gram]) for gram, times in Counter(found).items())
