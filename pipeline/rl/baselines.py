"""What rewards are compared with that takes no model: the mean of all rows, or of the rows of the same prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.data import encoded
from pipeline.records import Item

ALIKE = 1e-6  # of the largest: rewards that differ by less are those of one text, judged in another batch
Parts = Sequence[Sequence[Item]]  # the rows to learn from, then held-out ones


def with_advantages(parts: Parts, baseline: str) -> list[Sequence[Item]]:
    """The items of each part with the number `advantage`: their reward less `baseline`.

    rows: the mean reward of the first part; prompt: the mean of the prompt's rows in the same part; group: the same,
    and divided by their population standard deviation. Of the only row of a prompt, and of equal rewards, it is 0.
    """
    if baseline == "rows":
        mean = encoded.column(parts[0], "reward").mean()
        return [encoded.with_numbers(items, advantage=encoded.column(items, "reward") - mean) for items in parts]
    return [encoded.with_numbers(items, advantage=of_prompts(items, baseline == "group")) for items in parts]


def of_prompts(items: Sequence[Item], scaled: bool) -> np.ndarray:
    """(n,) float64: each reward less the mean of its prompt's; `scaled`: in standard deviations of these."""
    rewards = encoded.column(items, "reward")
    _, groups = np.unique(encoded.prompt_keys(items, range(len(items))), return_inverse=True)
    counts = np.bincount(groups)
    centred = rewards - (np.bincount(groups, rewards) / counts)[groups]
    # rewards of one text are alike but for rounding
    spread, largest = np.zeros(len(counts)), np.zeros(len(counts))
    np.maximum.at(spread, groups, np.abs(centred))
    np.maximum.at(largest, groups, np.abs(rewards))
    centred = np.where((spread > ALIKE * largest)[groups], centred, 0.0)
    if not scaled:
        return centred
    deviations = np.sqrt(np.bincount(groups, centred**2) / counts)[groups]
    return np.divide(centred, deviations, out=np.zeros_like(centred), where=deviations > 0)


def with_standard_advantages(parts: Parts) -> list[Sequence[Item]]:
    """The items of each part with the number `standard_advantage`: in standard deviations, over the first part's mean;
    0 where all of these are alike."""
    learned = encoded.column(parts[0], "advantage")
    mean, deviation = learned.mean(), learned.std()
    scale = 1 / deviation if deviation > ALIKE * np.abs(learned).max() else 0.0
    return [
        encoded.with_numbers(items, standard_advantage=(encoded.column(items, "advantage") - mean) * scale)
        for items in parts
    ]
