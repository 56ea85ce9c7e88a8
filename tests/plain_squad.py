"""The `squad` reward written as it is defined, without a thought of speed: what the fast one must equal.

ROUGE-L by the table of all prefixes, BLEU-4 by counting every n-gram of every reference again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from reward_models._released import question


def released(references: Sequence[str], completions: Sequence[str]) -> list[float]:
    """One float per completion, all of them with the same references."""
    return scores([text.strip().lower() for text in references], [question(text) for text in completions])


def scores(gold: Sequence[str], found: Sequence[str]) -> list[float]:
    """The same of texts that are prepared."""
    return [rouge_l(gold, text) / 3 + 2 * bleu_4(gold, text) / 3 for text in found]


def rouge_l(references: Sequence[str], text: str) -> float:
    """F of the longest common subsequence, beta 1.2."""
    words, gold = text.split(" "), [reference.split(" ") for reference in references]
    lengths = [common(words, wanted) for wanted in gold]
    precision = max(length / len(words) for length in lengths)
    recall = max(length / len(wanted) for length, wanted in zip(lengths, gold, strict=True))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


def common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if one == other else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def bleu_4(references: Sequence[str], text: str) -> float:
    """Geometric mean of four clipped precisions, times exp(1 - closest reference length / length) if that is less."""
    words, gold = text.split(), [reference.split() for reference in references]
    product = 1.0
    for n in (1, 2, 3, 4):
        most = {gram: max(counted(wanted, n)[gram] for wanted in gold) for gram in counted(words, n)}
        correct = sum(min(times, most[gram]) for gram, times in counted(words, n).items())
        product *= (correct + 1e-15) / (max(len(words) - n + 1, 0) + 1e-9)
    closest = min((abs(len(wanted) - len(words)), len(wanted)) for wanted in gold)[1]
    ratio = (len(words) + 1e-15) / (closest + 1e-9)
    return product**0.25 * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0)


def counted(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
