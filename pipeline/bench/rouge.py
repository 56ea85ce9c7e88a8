"""ROUGE of 64 candidates of 60 words, stemmed, and the package rouge-score beside it where that is installed."""

from __future__ import annotations

import importlib
import importlib.util
import random

from pipeline.bench.measure import Goal, Result, alternate, compared
from pipeline.bench.setup import Setup
from reward_models._rouge import rouge

FAST = Goal(2.0)  # milliseconds
CANDIDATES, WORDS = 64, 60
KINDS = ("rouge1", "rouge2", "rougeL")
STEMS = ("plant", "water", "garden", "help", "teach", "build", "paint", "answer", "travel", "market", "listen", "carry")
ENDINGS = ("", "s", "ed", "ing", "er", "ly", "ation", "ness", "ment", "ability")


def measure(setup: Setup) -> list[Result]:
    texts_of_step = [texts(seed) for seed in range(setup.timing.total)]  # new ones in each step: nothing is cached
    scorer = None
    if importlib.util.find_spec("rouge_score") is not None:  # it is for development only
        scorer = importlib.import_module("rouge_score.rouge_scorer").RougeScorer(list(KINDS), use_stemmer=True)

    def ours(step: int) -> list[list[float]]:
        return rouge(KINDS, *texts_of_step[step])

    def other(step: int) -> list[list[float]]:
        references, candidates = texts_of_step[step]
        scores = [scorer.score_multi(references, candidate) for candidate in candidates]
        return [[score[kind].fmeasure for kind in KINDS] for score in scores]

    pairs = alternate(ours, other if scorer else ours, setup.timing)
    milliseconds = [(1e3 * mine, 1e3 * others) for mine, others in pairs]
    beside = compared("the same, ours / rouge-score", "ms", milliseconds, None)
    alone = Result(f"ROUGE of {CANDIDATES} candidates of {WORDS} words", "ms", beside.ours, goal=FAST)
    return [alone, beside] if scorer else [alone]


def texts(seed: int) -> tuple[list[str], list[str]]:
    """A reference in a list, and the candidates; others for each seed."""
    rng = random.Random(seed)
    made = [" ".join(rng.choice(STEMS) + rng.choice(ENDINGS) for _ in range(WORDS)) for _ in range(1 + CANDIDATES)]
    return made[:1], made[1:]
