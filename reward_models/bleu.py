"""Sentence BLEU in [0, 1] over all references of a row, as the package sacrebleu has it (Post 2018).

Its defaults: 4-grams, tokenizer 13a, exponential smoothing; and effective order, so that texts of under four words
are scored by the n-grams they have. Where words have no blanks between them (pipeline/words.py), each character is one,
as with sacrebleu's tokenizer for Chinese; 13a alone would take a sentence for one word.
"""

from __future__ import annotations

from sacrebleu.metrics import BLEU

from pipeline.words import set_apart
from reward_models._references import References, runs

CHATS = "text"  # chats come as text, too: see reward_models/README.md


def reward(prompts: list[str], completions: list[str], references: References = None, **columns: list) -> list[float]:
    """sacrebleu's sentence score, divided by 100."""
    values: list[float] = []
    for texts, neighbours in runs(completions, references, "BLEU"):
        gold = [[set_apart(text)] for text in texts]
        metric = BLEU(effective_order=True, references=gold)  # counts their n-grams once
        scores = [metric.corpus_score([set_apart(completion)], None).score for completion in neighbours]
        values += [min(score / 100, 1.0) for score in scores]  # of equal texts it is a rounding error above 1
    return values
