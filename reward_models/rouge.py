"""ROUGE F1 in [0, 1], stemmed, against the reference that fits best: `rouge` is the mean of 1, 2 and L.

`rouge:rouge1`, `rouge:rouge2`, `rouge:rougeL` and `rouge:rougeLsum` (sentences on lines of their own) are one kind
alone. The values are those of the package rouge-score with `use_stemmer=True`.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.text_overlap import rouge

References = list[list[str]] | None


def reward(prompts: list[str], completions: list[str], references: References = None, **columns: list) -> list[float]:
    """The mean of rouge1, rouge2 and rougeL, each with its own best reference."""
    return [sum(scores) / 3 for scores in _scores(("rouge1", "rouge2", "rougeL"), completions, references)]


def rouge1(prompts: list[str], completions: list[str], references: References = None, **columns: list) -> list[float]:
    """F1 of shared words."""
    return [score for (score,) in _scores(("rouge1",), completions, references)]


def rouge2(prompts: list[str], completions: list[str], references: References = None, **columns: list) -> list[float]:
    """F1 of shared pairs of neighbouring words."""
    return [score for (score,) in _scores(("rouge2",), completions, references)]


def rougeL(  # noqa: N802 - the name that everyone uses
    prompts: list[str], completions: list[str], references: References = None, **columns: list
) -> list[float]:
    """F1 of the longest common subsequence of words."""
    return [score for (score,) in _scores(("rougeL",), completions, references)]


def rougeLsum(  # noqa: N802
    prompts: list[str], completions: list[str], references: References = None, **columns: list
) -> list[float]:
    """F1 of the longest common subsequences line by line."""
    return [score for (score,) in _scores(("rougeLsum",), completions, references)]


def _scores(kinds: Sequence[str], completions: list[str], references: References) -> list[list[float]]:
    if references is None:
        raise ValueError(
            "there is no column `references`, which ROUGE compares with: give the data one, or a completion"
        )
    for i, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"references[{i}] is {texts!r:.60}, wanted a list of at least one text")
    return [rouge(kinds, texts, completion) for texts, completion in zip(references, completions, strict=True)]
