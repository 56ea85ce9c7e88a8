"""The reward of question generation in semi-offline RL (Chen et al. 2023): ROUGE-L / 3 + 2 * BLEU-4 / 3, in [0, 1].

Both parts are those of the COCO caption evaluation, sentence by sentence and over all references of a row; the brevity
penalty takes the reference closest in length, of two the shorter. `squad:rougeL` and `squad:bleu4` are one of them
alone. References and completion are prepared alike: words in lower case, and each mark a word; the names that SQuAD's
references have for brackets and double quotes (-lrb-, ``) count as these.

`squad:released` is the reward of the released code, which prepares the completion alone (`_released.question`) and
merely lower-cases and strips the references. A question may then be worth little against itself: its full stops and
commas become words that no reference has, and a blank goes into each of its hyphened words.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from operator import or_, truediv

from rapidfuzz.distance import LCSseq

from pipeline.words import pieces
from reward_models._references import References, runs
from reward_models._released import BRACKETS, question

CHATS = "text"  # chats come as text, too: see reward_models/README.md
LONGEST = 4  # words of the n-grams that BLEU-4 counts
RECALL = 1.2**2  # how much more recall weighs than precision: beta squared
FOUND, OFFERED = 1e-15, 1e-9  # keep BLEU's fractions from 0 / 0
Grams = Iterable[tuple[str, ...]]
Prepare = Callable[[str], str]
_MARKS = {name: mark for mark, name in BRACKETS.items()} | {"``": '"', "''": '"'}
_NAMED = re.compile("|".join(_MARKS))


def reward(prompts: list[str], completions: list[str], references: References = None, **columns: list) -> list[float]:
    """ROUGE-L / 3 + 2 * BLEU-4 / 3."""
    return [rouge / 3 + 2 * bleu / 3 for rouge, bleu in _parts(completions, references)]


def released(prompts: list[str], completions: list[str], references: References = None, **columns: list) -> list[float]:
    """The same of texts as the released code prepares them, where words stand between single blanks.

    Two blanks have an empty word between them, which counts in ROUGE-L.
    """
    parts = _parts(completions, references, lambda text: text.strip().lower(), question)
    return [rouge / 3 + 2 * bleu / 3 for rouge, bleu in parts]


def rougeL(  # noqa: N802 - the name that everyone uses
    prompts: list[str], completions: list[str], references: References = None, **columns: list
) -> list[float]:
    """F of the longest common subsequence, recall weighing 1.44 times precision; each with its own best reference."""
    return [rouge for rouge, _ in _parts(completions, references)]


def bleu4(prompts: list[str], completions: list[str], references: References = None, **columns: list) -> list[float]:
    """Geometric mean of the clipped precisions of 1- to 4-grams, times the brevity penalty.

    It is not smoothed: where one of the four has no match it is next to 0, so for each text of under four words.
    """
    return [bleu for _, bleu in _parts(completions, references)]


def marked(text: str) -> str:
    """Words and marks of the text with single blanks between."""
    return " ".join(pieces(_NAMED.sub(lambda found: _MARKS[found[0]], text.lower())))


def _parts(
    completions: Sequence[str], references: References, of_reference: Prepare = marked, of_completion: Prepare = marked
) -> list[tuple[float, float]]:
    """ROUGE-L and BLEU-4 of each completion."""
    values: list[tuple[float, float]] = []
    for texts, neighbours in runs(completions, references, "squad"):
        gold, questions = [*map(of_reference, texts)], [*map(of_completion, neighbours)]
        wanted = [*map(_between_blanks, gold)]
        rouges = [_rouge(wanted, _between_blanks(text)) for text in questions]
        values += zip(rouges, _bleus(gold, questions), strict=True)
    return values


def _between_blanks(text: str) -> list[str]:
    """The words; an empty one, which rapidfuzz takes for the character 0, is a blank here."""
    return [word or " " for word in text.split(" ")]


def _rouge(gold: Sequence[Sequence[str]], words: Sequence[str]) -> float:
    common = [LCSseq.similarity(wanted, words) for wanted in gold]
    precision = max(common) / len(words)
    recall = max(map(truediv, common, map(len, gold)))
    return (1 + RECALL) * precision * recall / (recall + RECALL * precision) if precision else 0.0


def _bleus(gold: Sequence[str], texts: Sequence[str]) -> list[float]:
    words = [text.split() for text in gold]
    lengths = [*map(len, words)]
    counts = [reduce(or_, map(Counter, of_length)) for of_length in zip(*map(_grams, words), strict=True)]
    return [_bleu(lengths, counts, text.split()) for text in texts]


def _grams(words: Sequence[str]) -> list[Grams]:
    """The n-grams of a text in its order, n from 1 to LONGEST."""
    tails = [words[i:] for i in range(LONGEST)]
    return [zip(*tails[:n], strict=False) for n in range(1, LONGEST + 1)]


def _bleu(lengths: Sequence[int], counts: Sequence[Counter], words: Sequence[str]) -> float:
    """`lengths` of the references; `counts` of each n-gram in the reference that has most of it, n from 1."""
    length = len(words)
    product = 1.0
    for i, (offered, most) in enumerate(zip(_grams(words), counts, strict=True)):
        clipped = (Counter(filter(most.__contains__, offered)) & most).total()
        product *= (clipped + FOUND) / (max(length - i, 0) + OFFERED)
    closest = min(lengths, key=lambda wanted: (abs(wanted - length), wanted))
    ratio = (length + FOUND) / (closest + OFFERED)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return product ** (1 / LONGEST) * penalty
