"""Word overlap of texts with references: F1 of ROUGE-1, -2, -L and -Lsum. Standard library only.

All candidates of one prompt are counted at once (pipeline/lanes.py): ROUGE is a reward, and a step of training asks for
that of many texts.

Sources: Lin 2004, as the package rouge-score reads it: the tests hold every value equal to its own, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import repeat
from string import ascii_lowercase, digits

from pipeline.lanes import Lanes, Places, places, shared, shared_pairs, side_by_side, subsequences
from pipeline.stemmer import stem

# Every byte but those of these characters is a space.
_BYTES = bytes(byte if chr(byte) in ascii_lowercase + digits else ord(" ") for byte in range(256))


class Reference:
    """A text that others are compared with. What ROUGE-Lsum needs is worked out when first asked for."""

    def __init__(self, text: str, stemmed: bool = True) -> None:
        self.text = text
        self.stemmed = stemmed
        self.tokens = tokens(text, stemmed)
        self.places = Places(self.tokens, stem if stemmed else str)

    @cached_property
    def sentences(self) -> list[list[str]]:
        return sentences(self.text, self.stemmed)


@dataclass(frozen=True)
class Compared:
    """Candidates beside one reference."""

    reference: Reference
    texts: Sequence[str]
    lengths: Sequence[int]  # words of each text
    lanes: Lanes


def rouge(
    kinds: Sequence[str], references: Sequence[str], candidates: Sequence[str], stemmed: bool = True
) -> list[list[float]]:
    """F1 in [0, 1] per candidate and kind (rouge1, rouge2, rougeL, rougeLsum), against the reference that fits best.

    Raises KeyError for another kind, ValueError without references.
    """
    words = [tokens(candidate, stemmed=False) for candidate in candidates]
    tables = [_scores(kinds, kept_reference(text, stemmed), candidates, words) for text in references]
    if not tables:
        raise ValueError("there are no references, wanted at least one text")
    if len(tables) == 1:
        return tables[0]
    return [[*map(max, *rows)] for rows in zip(*tables, strict=True)]


@lru_cache(maxsize=512)
def kept_reference(text: str, stemmed: bool = True) -> Reference:
    """`Reference(text, stemmed)`, kept: a reference is compared with many candidates."""
    return Reference(text, stemmed)


def tokens(text: str, stemmed: bool = True) -> list[str]:
    """Runs of [a-z0-9] of the lower-cased text; words longer than three letters are stemmed if wanted."""
    ascii_text = text.lower().encode("ascii", "replace")  # what is not ASCII becomes a question mark
    words = ascii_text.translate(_BYTES).decode("ascii").split()
    return [*map(stem, words)] if stemmed else words


def sentences(text: str, stemmed: bool = True) -> list[list[str]]:
    """The tokens of each line that is not empty."""
    return [tokens(line, stemmed) for line in text.split("\n") if line]


def lcs_rows(masks: Iterable[int], length: int) -> list[int]:
    """What `lanes.subsequences` goes through for one text, from before its first token on.

    Zeros among the lowest i bits count the tokens in common with the first i of the reference; bits above `length`
    are carries.
    """
    rows = [(1 << length) - 1]
    for mask in masks:
        matches = rows[-1] & mask
        rows.append((rows[-1] + matches) | (rows[-1] - matches))
    return rows


def _scores(
    kinds: Sequence[str], reference: Reference, texts: Sequence[str], words: Sequence[list[str]]
) -> list[list[float]]:
    compared = Compared(reference, texts, [*map(len, words)], side_by_side(reference.places, words))
    columns = [_F1[kind](compared) for kind in kinds]
    return [[*row] for row in zip(*columns, strict=True)]


def _rouge1(compared: Compared) -> list[float]:
    return _f1_of_each(shared(compared.lanes), compared, 0)


def _rouge2(compared: Compared) -> list[float]:
    return _f1_of_each(shared_pairs(compared.lanes), compared, 1)


def _rouge_l(compared: Compared) -> list[float]:
    return _f1_of_each(subsequences(compared.lanes), compared, 0)


def _f1_of_each(hits: Sequence[int], compared: Compared, fewer: int) -> list[float]:
    """`fewer`: by how many a text has fewer of what is counted than it has words."""
    wanted = len(compared.reference.tokens) - fewer
    return [_f1(hit, length - fewer, wanted) for hit, length in zip(hits, compared.lengths, strict=True)]


def _rouge_lsum(compared: Compared) -> list[float]:
    gold = compared.reference.sentences
    return [_lsum(gold, sentences(text, compared.reference.stemmed)) for text in compared.texts]


def _lsum(gold: list[list[str]], found: list[list[str]]) -> float:
    """Per reference line the union of its subsequences with every candidate line (Lin 2004, section 3.2).

    A token counts no more often than either text holds it.
    """
    wanted, offered = (Counter(token for line in lines for token in line) for lines in (gold, found))
    hits: Counter[str] = Counter()
    for sentence in gold:
        union = set().union(*(_lcs_positions(sentence, other) for other in found))
        hits.update(sentence[i] for i in union)
    return _f1((hits & wanted & offered).total(), offered.total(), wanted.total())


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
