"""Rewards that count words: ROUGE of 64 candidates of 60 words, stemmed; `squad` of 16 and 64 questions of 12 words.

ROUGE beside the package rouge-score where it is, `squad` beside its plain definition.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
from collections.abc import Callable
from dataclasses import replace

from pipeline.bench import plain_squad
from pipeline.bench.bed import Bed
from pipeline.bench.measure import Goal, Result, alternate, compared
from reward_models import squad
from reward_models._rouge import rouge

FAST = Goal(2.0)  # milliseconds
CANDIDATES, WORDS = 64, 60
QUESTIONS, QUESTION_WORDS, REFERENCES = (16, 64), 12, 3
KINDS = ("rouge1", "rouge2", "rougeL")
STEMS = ("plant", "water", "garden", "help", "teach", "build", "paint", "answer", "travel", "market", "listen", "carry")
ENDINGS = ("", "s", "ed", "ing", "er", "ly", "ation", "ness", "ment", "ability")

Asked = tuple[list[str], list[str]]  # references, candidates
Scorer = Callable[[list[str], list[str]], list]  # -> the values of each candidate


def measure(bed: Bed) -> list[Result]:
    theirs = rouge_score()
    name = f"ROUGE of {CANDIDATES} candidates of {WORDS} words"
    found = beside(bed, name, ours, theirs or ours, (1, CANDIDATES, WORDS))
    alone = Result(name, "ms", found.ours, goal=FAST)
    rouges = [alone, replace(found, name="the same, ours / rouge-score")] if theirs else [alone]
    return rouges + [squad_of(bed, count) for count in QUESTIONS]


def squad_of(bed: Bed, count: int) -> Result:
    name = f"squad of {count} questions, ours / as defined"
    return beside(bed, name, our_squad, plain_squad.reward, (REFERENCES, count, QUESTION_WORDS))


def beside(bed: Bed, name: str, mine: Scorer, other: Scorer, sizes: tuple[int, int, int]) -> Result:
    """Milliseconds of both for texts of these `sizes`, new ones in each step, and whether their values are the same."""
    asked = [texts(seed, *sizes) for seed in range(bed.plan.warm + bed.plan.rounds * bed.plan.steps)]
    rounds = alternate(lambda step: mine(*asked[step]), lambda step: other(*asked[step]), bed.plan)
    equal = mine(*asked[0]) == other(*asked[0])
    milliseconds = [(1e3 * first, 1e3 * second) for first, second in rounds]
    return compared(name, "ms", milliseconds, None, "identical values" if equal else "VALUES DIFFER")


def texts(seed: int, references: int, candidates: int, words: int) -> Asked:
    """Texts of so many words, new ones for each seed."""
    rng = random.Random(seed)
    made = [
        " ".join(rng.choice(STEMS) + rng.choice(ENDINGS) for _ in range(words)) for _ in range(references + candidates)
    ]
    return made[:references], made[references:]


def ours(references: list[str], candidates: list[str]) -> list[list[float]]:
    return rouge(KINDS, references, candidates)


def our_squad(references: list[str], candidates: list[str]) -> list[float]:
    count = len(candidates)
    return squad.reward([""] * count, candidates, references=[references] * count)


def rouge_score() -> Scorer | None:
    """The package's scorer, None where it is not installed: it is for development only."""
    if importlib.util.find_spec("rouge_score") is None:
        return None
    scorer = importlib.import_module("rouge_score.rouge_scorer").RougeScorer(list(KINDS), use_stemmer=True)

    def score(references: list[str], candidates: list[str]) -> list[list[float]]:
        found = [scorer.score_multi(references, candidate) for candidate in candidates]
        return [[scores[kind].fmeasure for kind in KINDS] for scores in found]

    return score
