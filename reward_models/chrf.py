"""chrF in [0, 1] against the reference that fits best, as the package sacrebleu has it (Popovic 2015).

Its defaults: F of character n-grams up to 6, recall weighing 4 times precision (chrF2), blanks left out. It needs no
words, and so suits any language.
"""

from __future__ import annotations

from sacrebleu.metrics import CHRF

from reward_models._references import References, runs

CHATS = "text"  # chats come as text, too: see reward_models/README.md


def reward(prompts: list[str], completions: list[str], references: References = None, **columns: list) -> list[float]:
    """sacrebleu's sentence score, divided by 100."""
    values: list[float] = []
    for texts, neighbours in runs(completions, references, "chrF"):
        metric = CHRF(references=[[text] for text in texts])  # counts their n-grams once
        scores = [metric.corpus_score([completion], None).score for completion in neighbours]
        values += [min(score / 100, 1.0) for score in scores]
    return values
