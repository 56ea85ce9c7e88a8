"""ROUGE of the candidates of one prompt: 64 of 60 words, stemmed; beside the package rouge-score where it is."""

from __future__ import annotations

import importlib
import importlib.util
import random
from collections.abc import Callable
from dataclasses import replace

from pipeline.bench.bed import Bed
from pipeline.bench.measure import Goal, Result, alternate, compared
from pipeline.text_overlap import rouge

FAST = Goal(2.0)  # milliseconds
CANDIDATES, WORDS = 64, 60
KINDS = ("rouge1", "rouge2", "rougeL")
STEMS = ("plant", "water", "garden", "help", "teach", "build", "paint", "answer", "travel", "market", "listen", "carry")
ENDINGS = ("", "s", "ed", "ing", "er", "ly", "ation", "ness", "ment", "ability")

Scorer = Callable[[str, str], list[float]]  # reference, candidate -> F1 of each of KINDS


def measure(bed: Bed) -> list[Result]:
    theirs = rouge_score() or ours
    asked = [texts(seed) for seed in range(bed.plan.warm + bed.plan.rounds * bed.plan.steps)]
    rounds = alternate(lambda step: of_all(ours, *asked[step]), lambda step: of_all(theirs, *asked[step]), bed.plan)
    milliseconds = [(1e3 * mine, 1e3 * other) for mine, other in rounds]
    found = compared(f"ROUGE of {CANDIDATES} candidates of {WORDS} words", "ms", milliseconds, None)
    alone = Result(found.name, "ms", found.ours, goal=FAST)
    if theirs is ours:
        return [alone]
    equal = of_all(ours, *asked[0]) == of_all(theirs, *asked[0])
    note = "identical values" if equal else "VALUES DIFFER"
    return [alone, replace(found, name="the same, ours / rouge-score", note=note)]


def texts(seed: int) -> tuple[str, list[str]]:
    """A reference and its candidates, new ones for each seed."""
    rng = random.Random(seed)
    made = [" ".join(rng.choice(STEMS) + rng.choice(ENDINGS) for _ in range(WORDS)) for _ in range(CANDIDATES + 1)]
    return made[0], made[1:]


def of_all(score: Scorer, reference: str, candidates: list[str]) -> list[list[float]]:
    return [score(reference, candidate) for candidate in candidates]


def ours(reference: str, candidate: str) -> list[float]:
    return rouge(KINDS, [reference], candidate)


def rouge_score() -> Scorer | None:
    """The package's scorer, None where it is not installed: it is for development only."""
    if importlib.util.find_spec("rouge_score") is None:
        return None
    scorer = importlib.import_module("rouge_score.rouge_scorer").RougeScorer(list(KINDS), use_stemmer=True)

    def score(reference: str, candidate: str) -> list[float]:
        found = scorer.score(reference, candidate)
        return [found[kind].fmeasure for kind in KINDS]

    return score
