"""Scored rows as an audit reads them: one entry for each logged response that has a reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.records import Example, text_of
from pipeline.words import between_blanks

Numbers = NDArray[np.float64]


class Log(NamedTuple):
    """n scored responses, in the order of the file."""

    ids: list[str]
    prompts: list[str]  # chats as "role: content" paragraphs
    owners: NDArray[np.int64]  # (n,) the number of the prompt
    answers: list[str]
    rewards: Numbers  # (n,)
    words: NDArray[np.int64]  # (n,) of the answers

    def of(self, places: Sequence[int]) -> Log:
        """The entries at some places, their prompts numbered anew."""
        chosen = [[column[i] for i in places] for column in (self.ids, self.prompts, self.answers)]
        _, owners = np.unique(self.owners[places], return_inverse=True)
        return Log(*chosen[:2], owners, chosen[2], self.rewards[places], self.words[places])

    @property
    def groups(self) -> list[NDArray[np.int64]]:
        """The places of each prompt's rows."""
        order = np.argsort(self.owners, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(self.owners[order])) + 1)


def log_of(rows: Sequence[Example], rewards: Sequence[float]) -> Log:
    """`rows`, each with its reward."""
    names: dict[object, int] = {}
    owners = np.array([names.setdefault(row.prompt, len(names)) for row in rows], dtype=np.int64)
    answers = [text_of(row.completion) for row in rows]
    words = np.array([len(between_blanks(answer)) for answer in answers], dtype=np.int64)
    prompts = [said(row) for row in rows]
    return Log([row.id for row in rows], prompts, owners, answers, np.asarray(rewards, dtype=np.float64), words)


def said(row: Example) -> str:
    """A prompt as text."""
    if isinstance(row.prompt, str):
        return row.prompt
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in row.prompt)


def of_prompts(log: Log) -> dict[str, float]:
    """rows, prompts, rows per prompt; prompts with 1, 2, 3 or 4, and 5 rows or more."""
    sizes = np.array([len(group) for group in log.groups])
    kinds = {"1": sizes == 1, "2": sizes == 2, "3-4": (sizes > 2) & (sizes < 5), "5+": sizes > 4}
    counts = {f"prompts_with/{name}": float(chosen.sum()) for name, chosen in kinds.items()}
    return {"rows": float(sizes.sum()), "prompts": float(len(sizes)), "rows_per_prompt": float(sizes.mean()), **counts}


def of_rewards(log: Log) -> dict[str, float]:
    """Mean, spread (of the population), quantiles, number of different values, values far out, and `within`.

    within: the share of the variance that lies between rows of one prompt, by a one-way analysis of variance over the
    prompts that have several; only there where two have. outliers: further from the median than 8 times the median
    distance of those that are not at it.
    """
    rewards = log.rewards
    middle = np.median(rewards)
    away = np.abs(rewards - middle)
    usual = np.median(away[away > 0]) if away.any() else 0.0
    found = {"mean": rewards.mean(), "std": rewards.std(), "min": rewards.min(), "max": rewards.max()}
    found |= {name: np.quantile(rewards, q) for name, q in (("q10", 0.1), ("q50", 0.5), ("q90", 0.9))}
    found |= {"levels": len(np.unique(rewards)), "outliers": (away > 8 * usual).sum()}
    within = within_share([rewards[group] for group in log.groups if len(group) > 1])
    return {name: float(value) for name, value in found.items()} | ({} if within is None else {"within": within})


def within_share(groups: Sequence[Numbers]) -> float | None:
    """Variance within groups over the variance within and between them, by the usual unbiased parts; None where there
    are fewer than two groups, or nothing varies."""
    sizes = np.array([len(group) for group in groups], dtype=np.float64)
    n, k = sizes.sum(), len(groups)
    if k < 2:
        return None
    means = np.array([group.mean() for group in groups])
    inside = sum(((group - group.mean()) ** 2).sum() for group in groups) / (n - k)
    outside = (sizes * (means - np.concatenate(groups).mean()) ** 2).sum() / (k - 1)
    between = max(0.0, (outside - inside) / ((n - (sizes**2).sum() / n) / (k - 1)))
    return float(inside / (inside + between)) if inside + between > 0 else None


def of_duplicates(log: Log) -> dict[str, float]:
    """repeated: rows with the prompt, the answer and the reward of an earlier one. conflicting: rows whose prompt and
    answer have more than one reward, and conflict_spread, the mean width of these. stock: rows whose answer is given to
    three prompts or more."""
    known: dict[tuple[int, str], list[float]] = {}
    asked: dict[str, set[int]] = {}
    for owner, answer, reward in zip(log.owners.tolist(), log.answers, log.rewards.tolist(), strict=True):
        known.setdefault((owner, answer), []).append(reward)
        asked.setdefault(answer, set()).add(owner)
    torn = [values for values in known.values() if len({*values}) > 1]
    counts = Counter(log.answers)
    return {
        "repeated": float(sum(len(values) - len({*values}) for values in known.values())),
        "conflicting": float(sum(map(len, torn))),
        "conflict_spread": sum(max(values) - min(values) for values in torn) / len(torn) if torn else 0.0,
        "stock": float(sum(counts[answer] for answer, owners in asked.items() if len(owners) > 2)),
    }
