"""ROUGE F1 in [0, 1], stemmed, against the reference that fits best: `rouge` is the mean of 1, 2 and L.

`rouge:rouge1`, `rouge:rouge2`, `rouge:rougeL` and `rouge:rougeLsum` (sentences on lines of their own) are one kind
alone. Of ASCII texts the values are those of the package rouge-score with `use_stemmer=True`; in other texts, where
it sees ASCII alone, words are those of pipeline/words.py. `rouge:released` counts full stops and commas as words and
sees ASCII alone, as the released code of semi-offline RL (Chen et al. 2023) does. References without any word are
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.records import RewardFunction
from reward_models._references import References, runs
from reward_models._released import punctuated
from reward_models._rouge import Split, all_words, ascii_words, rouge

CHATS = "text"  # chats come as text, too: see reward_models/README.md
MEAN_OF = ("rouge1", "rouge2", "rougeL")


def reward(prompts: list[str], completions: list[str], references: References = None, **columns: list) -> list[float]:
    """The mean of rouge1, rouge2 and rougeL, each with its own best reference."""
    return [sum(scores) / 3 for scores in _scores(MEAN_OF, completions, references)]


def released(prompts: list[str], completions: list[str], references: References = None, **columns: list) -> list[float]:
    """The mean of the three where a full stop is the word `sep` and a comma `sep2`, also inside numbers."""
    return [sum(scores) / 3 for scores in _scores(MEAN_OF, completions, references, punctuated, ascii_words)]


def _alone(kind: str) -> RewardFunction:
    def reward(
        prompts: list[str], completions: list[str], references: References = None, **columns: list
    ) -> list[float]:
        return [score for (score,) in _scores((kind,), completions, references)]

    return reward


rouge1 = _alone("rouge1")  # F1 of shared words
rouge2 = _alone("rouge2")  # F1 of shared pairs of neighbouring words
rougeL = _alone("rougeL")  # noqa: N816 - F1 of the longest common subsequence of words, by the name that everyone uses
rougeLsum = _alone("rougeLsum")  # noqa: N816 - F1 of the longest common subsequences line by line


def _scores(
    kinds: Sequence[str],
    completions: list[str],
    references: References,
    prepare: Callable[[str], str] = str,
    split: Split = all_words,
) -> list[list[float]]:
    values: list[list[float]] = []
    for texts, neighbours in runs(completions, references, "ROUGE"):
        gold = [*map(prepare, texts)]
        if not any(map(split, gold)):
            raise ValueError(
                f"the references {texts!r:.80} hold no word, wanted one to compare with: leave the row out"
            )
        values += rouge(kinds, gold, [*map(prepare, neighbours)], split=split)
    return values
