"""ROUGE-1, -2, -L and -Lsum of many texts (Lin 2004): of ASCII texts rouge-score's values, bit for bit.

That package sees ASCII alone: no word of other scripts, and of "caf\u00e9" three letters. Here words are those of
pipeline/words.py, unless its own are requested, as `ascii_words`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, pairwise
from string import ascii_lowercase, digits
from typing import NamedTuple

from nltk.stem.porter import PorterStemmer
from rapidfuzz.distance import LCSseq

from pipeline.words import words

# Every byte but those of these characters is a space.
_BYTES = bytes(byte if chr(byte) in ascii_lowercase + digits else ord(" ") for byte in range(256))
_PORTER = PorterStemmer()
Split = Callable[[str], list[str]]  # a text -> its words, in lower case


class Text(NamedTuple):
    """The tokens of a text, and those of each of its lines."""

    tokens: list[str]
    lines: list[list[str]]


def ascii_words(text: str) -> list[str]:
    """Runs of [a-z0-9] of the lower-cased text."""
    ascii_text = text.lower().encode("ascii", "replace")  # what is not ASCII becomes a question mark
    return ascii_text.translate(_BYTES).decode("ascii").split()


def all_words(text: str) -> list[str]:
    """Words of any script; those of rouge-score where the text is ASCII."""
    return ascii_words(text) if text.isascii() else words(text)


def rouge(
    kinds: Sequence[str],
    references: Sequence[str],
    candidates: Sequence[str],
    stemmed: bool = True,
    split: Split = all_words,
) -> list[list[float]]:
    """F1 in [0, 1] per candidate and kind (rouge1, rouge2, rougeL, rougeLsum), against the reference that fits best.

    Raises KeyError for another kind, ValueError without references.
    """
    if not references:
        raise ValueError("there are no references, wanted at least one text")
    gold, texts = ([_read(text, stemmed, split) for text in group] for group in (references, candidates))
    columns = []
    for kind in kinds:
        by_reference = [_f1_scores(kind, reference, texts) for reference in gold]
        columns.append([max(scores) for scores in zip(*by_reference, strict=True)])
    return [[*row] for row in zip(*columns, strict=True)]


@lru_cache(maxsize=1 << 17)
def stem(word: str) -> str:
    """What Porter's stemmer, which is for English, leaves of a lower-case word of more than three ASCII letters."""
    return _PORTER.stem(word, to_lowercase=False) if len(word) > 3 and word.isascii() else word


def _read(text: str, stemmed: bool, split: Split) -> Text:
    found = [split(line) for line in text.split("\n")]
    lines = [[*map(stem, line)] for line in found] if stemmed else found
    return Text([*chain.from_iterable(lines)], lines)


def _f1_scores(kind: str, gold: Text, texts: Sequence[Text]) -> list[float]:
    """The F1 of each text: of what is in common, pairs of words for rouge2, and words for the others."""
    fewer = int(kind == "rouge2")  # by how many a text has fewer pairs than words
    wanted, counts = len(gold.tokens) - fewer, _IN_COMMON[kind](gold, texts)
    return [_f1(hits, len(text.tokens) - fewer, wanted) for hits, text in zip(counts, texts, strict=True)]


def _shared(gold: Iterable[Hashable], texts: Iterable[Iterable[Hashable]]) -> list[int]:
    """How many items of each text find an equal of their own in `gold`: the subsequence common to both once sorted."""
    wanted = sorted(gold)
    known = {*wanted}.__contains__
    return [LCSseq.similarity(wanted, sorted(filter(known, grams))) for grams in texts]


def _union(gold: Text, text: Text) -> int:
    """Per reference line the union of its subsequences with every candidate line (Lin 2004, section 3.2).

    A token counts no more often than the candidate holds it.
    """
    hits: Counter[str] = Counter()
    for line in gold.lines:
        union = set().union(*(lcs_positions(line, other) for other in text.lines))
        hits.update(line[i] for i in union)
    return (hits & Counter(text.tokens)).total()


_IN_COMMON: dict[str, Callable[[Text, Sequence[Text]], list[int]]] = {
    "rouge1": lambda gold, texts: _shared(gold.tokens, [text.tokens for text in texts]),
    "rouge2": lambda gold, texts: _shared(pairwise(gold.tokens), [pairwise(text.tokens) for text in texts]),
    "rougeL": lambda gold, texts: [LCSseq.similarity(gold.tokens, text.tokens) for text in texts],
    "rougeLsum": lambda gold, texts: [_union(gold, text) for text in texts],
}


def _f1(hits: int, offered: int, wanted: int) -> float:
    if not hits:
        return 0.0
    precision, recall = hits / offered, hits / wanted
    return 2 * precision * recall / (precision + recall)


def lcs_positions(line: Sequence[str], other: Sequence[str]) -> Iterator[int]:
    """Where in `line` one longest common subsequence with `other` stands, the last first.

    Of several it is the one that rouge-score takes, which rapidfuzz's is not: read from the end, and where the last
    tokens differ and either can go, that of `line` goes. In rows[j] bit i is 0 where line[i] adds one to what line[:i]
    and other[:j] have in common.

    Source: Hyyro 2004, "Bit-parallel LCS-length computation revisited".
    """
    places: defaultdict[str, int] = defaultdict(int)
    for i, token in enumerate(line):
        places[token] |= 1 << i
    # Hyyro's bit rows: bit i of a row is 0 where the LCS grows at token i
    rows = [(1 << len(line)) - 1]
    for token in other:
        matches = rows[-1] & places[token]
        rows.append(rows[-1] + matches | rows[-1] - matches)
    # back through the table, at ties as rouge-score goes
    i, j = len(line), len(other)
    while i and j:
        if line[i - 1] == other[j - 1]:
            i, j = i - 1, j - 1
            yield i
        elif rows[j] >> i - 1 & 1:
            i -= 1
        else:
            j -= 1
