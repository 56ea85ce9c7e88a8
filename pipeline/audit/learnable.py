"""What a policy could learn from a log, told from words alone: V, advantages, and the gain of following them.

A ridge regression on words (pipeline/models/text_regression.py) predicts the reward from the prompt, which stands for
V(x), then the advantage A = r - V from the answer, always by rows of other prompts. The predicted gain is that of the
policy that tilts the log towards what is predicted of A, as far as half of the rows can carry: weights exp(g Â), g the
largest that leaves an effective sample size of half of the rows, gain = sum w A / sum w - mean A, with a bootstrap over
prompts. A language model sees more than words, and may move further: the number says whether there is anything to
learn, and its order of size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from pipeline.algorithms import estimates
from pipeline.audit.log import Log, Numbers
from pipeline.models import text_regression

MOST_ROWS = 5000  # that are fitted
CARRIED = 0.5  # of the rows, that a tilt leaves in effect
STEEP = 20.0  # standard deviations of what is predicted, at which a tilt leaves a handful of rows
SURE = 0.99  # of a bootstrap's draws, that find a gain where there is something to learn
FEWEST_ROWS, FEWEST_PROMPTS = 100, 20  # below them nothing is said
LEARN, NOTHING, FEW = "something to learn", "nothing to learn", "too few rows to tell"


def sampled(log: Log, seed: int) -> Log:
    """All rows, or those of a random choice of prompts, about MOST_ROWS of them."""
    if len(log.ids) <= MOST_ROWS:
        return log
    groups = log.groups
    order = np.random.default_rng(seed).permutation(len(groups))
    ends = np.cumsum([len(groups[i]) for i in order])
    chosen = order[: max(1, int(np.searchsorted(ends, MOST_ROWS, side="right")))]
    return log.of(sorted(int(place) for i in chosen for place in groups[i]))


def of_learning(log: Log, seed: int) -> tuple[dict[str, float], Numbers]:
    """(numbers, (n,) advantages). value_r2 and advantage_r2 (out of fold, 0 where the mean is the better guess, not
    there where nothing varies), kept, effective, gain/..., length/...

    kept: share of rows with A > 0; effective: (sum w)^2 / (rows sum w^2) of w = A where that is positive, how many rows
    the draw in proportion to A amounts to. gain is in units of the reward; length is the gain of a tilt by the number
    of words alone, whichever way pays, and the correlation of that number with the reward.
    """
    owners = log.owners.tolist()
    value = text_regression.out_of_fold(log.prompts, log.rewards, owners)
    advantage = log.rewards - value
    told = text_regression.out_of_fold(log.answers, advantage, owners)
    kept = np.maximum(advantage, 0.0)
    r2 = {
        "value_r2": text_regression.r2(log.rewards, value),
        "advantage_r2": text_regression.r2(advantage, told),
    }
    found = {name: number for name, number in r2.items() if not math.isnan(number)} | {
        "kept": float((advantage > 0).mean()),
        "effective": float(kept.sum() ** 2 / (len(kept) * (kept**2).sum())) if kept.any() else 0.0,
    }
    length = correlation(log.words, log.rewards)
    by_length = tilted(log, advantage, log.words * (1.0 if length >= 0 else -1.0), seed)
    found |= {"length/correlation": length, "length/gain": by_length["estimate"]}
    gain = {f"gain/{name}": number for name, number in tilted(log, advantage, told, seed).items()}
    gain["gain/sure"] = min(gain["gain/sure"], sure_within(log, advantage, seed))
    return found | gain, advantage


def sure_within(log: Log, advantage: Numbers, seed: int) -> float:
    """What the gain passes SURE of the time by differences within prompts alone; infinite where too few can tell.

    An answer that betrays its prompt tells of what V missed of the prompt, and that is nothing to learn.
    """
    several = [group for group in log.groups if len(group) > 1]
    if len(several) < FEWEST_PROMPTS:
        return math.inf
    places = np.concatenate(several)
    centred = np.concatenate([advantage[group] - advantage[group].mean() for group in several])
    some = log.of(places.tolist())
    told = text_regression.out_of_fold(some.answers, centred, some.owners.tolist())
    return tilted(some, centred, told, seed)["sure"]


def tilted(log: Log, advantage: Numbers, told: Numbers, seed: int) -> dict[str, float]:
    """estimate, low and high (the middle 90 %) of the gain of weights exp(g `told`), and what it passes SURE of the
    time."""
    spread = told.std()
    if spread <= 1e-9 * max(1.0, float(np.abs(told).max(initial=0.0))):
        return {"estimate": 0.0, "low": 0.0, "high": 0.0, "sure": 0.0}
    steep = torch.from_numpy((told - told.mean()) / spread * STEEP)
    ratio = estimates.power(steep, CARRIED) * steep
    numbers = torch.from_numpy(advantage)
    rows = estimates.HeldOut(
        ratio, numbers, torch.zeros_like(numbers), torch.from_numpy(log.owners), torch.from_numpy(log.words)
    )
    once = torch.ones(1, len(advantage), dtype=torch.float64)
    drawn = estimates.dr(rows, estimates.resampled(rows.prompt, seed))
    ends = torch.tensor([(1 - estimates.LEVEL) / 2, (1 + estimates.LEVEL) / 2, 1 - SURE], dtype=torch.float64)
    low, high, sure = torch.quantile(drawn, ends).tolist()
    return {"estimate": float(estimates.dr(rows, once)), "low": low, "high": high, "sure": sure}


def verdict(rows: float, prompts: float, sure: float) -> str:
    """LEARN where the gain is SURE to be one."""
    if rows < FEWEST_ROWS or prompts < FEWEST_PROMPTS:
        return FEW
    return LEARN if sure > 0 else NOTHING


def correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Pearson's; 0 where one of the two does not vary."""
    a, b = (np.asarray(values, dtype=np.float64) - np.mean(values) for values in (one, other))
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size > 0 else 0.0
