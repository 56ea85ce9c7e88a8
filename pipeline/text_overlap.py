"""Word overlap of two texts: F1 of ROUGE-1, -2, -L and -Lsum. Standard library only.

Where a token stands in a text is one integer, a bit per position. Overlap then is arithmetic on a few machine words:
each token of the candidate takes one free position of the reference (clipped counts), and the longest common
subsequence takes an addition per token (Hyyro 2004).

Sources: Lin 2004, as the package rouge-score reads it: the tests hold every value equal to its own, bit for bit.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from itertools import repeat
from string import ascii_lowercase, digits

from pipeline.stemmer import stem

# Every character but these is a space.
_CHARACTERS = defaultdict(lambda: " ", {ord(character): character for character in ascii_lowercase + digits})


class Words:
    """One text as ROUGE sees it. Its other views are worked out once, when first asked for."""

    def __init__(self, text: str, stemmed: bool = True) -> None:
        self.text = text
        self.stemmed = stemmed
        self.tokens = tokens(text, stemmed)

    @cached_property
    def places(self) -> dict[str, int]:
        """Where each token stands in the text."""
        return places(self.tokens)

    @cached_property
    def sentences(self) -> list[list[str]]:
        """The tokens of each line that is not empty."""
        return [tokens(line, self.stemmed) for line in self.text.split("\n") if line]


def rouge(kinds: Sequence[str], references: Sequence[str], candidate: str, stemmed: bool = True) -> list[float]:
    """F1 in [0, 1] per kind (rouge1, rouge2, rougeL, rougeLsum), each against the reference that fits it best.

    Raises KeyError for another kind, ValueError without references.
    """
    found = Words(candidate, stemmed)
    scores = [_f1_of_kinds(kinds, reference_words(reference, stemmed), found) for reference in references]
    return [max(of_kind) for of_kind in zip(*scores, strict=True)] if len(scores) > 1 else scores[0]


@lru_cache(maxsize=4096)
def reference_words(text: str, stemmed: bool = True) -> Words:
    """`Words(text, stemmed)`, kept: a reference is compared with many candidates."""
    return Words(text, stemmed)


def tokens(text: str, stemmed: bool = True) -> list[str]:
    """Runs of [a-z0-9] of the lower-cased text; words longer than three letters are stemmed if wanted."""
    words = text.lower().translate(_CHARACTERS).split()
    return [*map(stem, words)] if stemmed else words


def places(words: Iterable[str]) -> dict[str, int]:
    """For each word an integer whose bit i is set where the i-th word is that word."""
    found: dict[str, int] = {}
    for i, word in enumerate(words):
        found[word] = found.get(word, 0) | 1 << i
    return found


def clipped_matches(masks: Iterable[int], length: int) -> int:
    """How many tokens (or pairs) of a candidate find a position of their own in a reference of `length` tokens.

    `masks` holds the reference positions that would suit each of them.
    """
    free = full = (1 << length) - 1
    for mask in masks:
        suited = free & mask
        free ^= suited & -suited  # takes the lowest
    return (full ^ free).bit_count()


def lcs_length(masks: Iterable[int], length: int) -> int:
    """Tokens in the longest common subsequence of a reference of `length` tokens and a candidate.

    `masks` holds the reference positions of each candidate token. After j of them, bit i of `row` is 0 where the i-th
    reference token makes the subsequence longer: the zeros count its tokens. Bits above `length` are carries.
    """
    row = (1 << length) - 1
    for mask in masks:
        matches = row & mask
        row = (row + matches) | (row - matches)
    return _zeros(row, length)


def lcs_rows(masks: Iterable[int], length: int) -> list[int]:
    """The rows of `lcs_length`, from before the first token: zeros among the lowest i bits count for i tokens."""
    rows = [(1 << length) - 1]
    for mask in masks:
        matches = rows[-1] & mask
        rows.append((rows[-1] + matches) | (rows[-1] - matches))
    return rows


def _f1_of_kinds(kinds: Sequence[str], reference: Words, candidate: Words) -> list[float]:
    masks = [*map(reference.places.get, candidate.tokens, repeat(0))]  # the positions of each candidate token
    return [_F1[kind](reference, candidate, masks) for kind in kinds]


def _rouge1(reference: Words, candidate: Words, masks: list[int]) -> float:
    wanted = len(reference.tokens)
    return _f1(clipped_matches(filter(None, masks), wanted), len(candidate.tokens), wanted)


def _rouge2(reference: Words, candidate: Words, masks: list[int]) -> float:
    wanted = len(reference.tokens)
    neighbours = zip(masks, masks[1:], strict=False)  # noqa: RUF007 - a third faster than pairwise
    pairs = [first << 1 & second for first, second in neighbours if first and second]
    return _f1(clipped_matches(filter(None, pairs), wanted), len(candidate.tokens) - 1, wanted - 1)


def _rouge_l(reference: Words, candidate: Words, masks: list[int]) -> float:
    wanted = len(reference.tokens)
    return _f1(lcs_length(filter(None, masks), wanted), len(candidate.tokens), wanted)


def _rouge_lsum(reference: Words, candidate: Words, masks: list[int]) -> float:
    """Per reference line the union of its subsequences with every candidate line (Lin 2004, section 3.2).

    A token counts no more often than either text holds it.
    """
    gold, found = Counter(), Counter()
    for counts, sentences in ((gold, reference.sentences), (found, candidate.sentences)):
        for sentence in sentences:
            counts.update(sentence)
    hits: Counter[str] = Counter()
    for sentence in reference.sentences:
        union = set().union(*(_lcs_positions(sentence, other) for other in candidate.sentences))
        hits.update(sentence[i] for i in union)
    return _f1((hits & gold & found).total(), found.total(), gold.total())


_F1 = {"rouge1": _rouge1, "rouge2": _rouge2, "rougeL": _rouge_l, "rougeLsum": _rouge_lsum}


def _f1(hits: int, offered: int, wanted: int) -> float:
    if not hits:
        return 0.0
    precision, recall = hits / offered, hits / wanted
    return 2 * precision * recall / (precision + recall)


def _lcs_positions(sentence: list[str], other: list[str]) -> list[int]:
    """Where in `sentence` one longest common subsequence with `other` stands.

    Of several it is the one rouge-score takes: from the end, and where both ways are equal, the sentence is shortened.
    """
    i, j = len(sentence), len(other)
    rows = lcs_rows(map(places(sentence).get, other, repeat(0)), i)
    positions = []
    while i and j:
        if sentence[i - 1] == other[j - 1]:
            i, j = i - 1, j - 1
            positions.append(i)
        elif _zeros(rows[j - 1], i) > _zeros(rows[j], i - 1):
            j -= 1
        else:
            i -= 1
    return positions


def _zeros(row: int, bits: int) -> int:
    return bits - (row & (1 << bits) - 1).bit_count()
