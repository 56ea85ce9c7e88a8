"""What the rows of a file bring as rewards, counted while they are read one by one, and said in words."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np

from pipeline.records import Example


@dataclass
class RewardsSeen:
    """Counts over rows that come one by one."""

    names: dict[str, None] = field(default_factory=dict)  # of scores by name, also of candidates
    values: array = field(default_factory=lambda: array("d"))  # rewards, and those of candidates
    only: str | None = ""  # the one name that all `rewards` have; None where they have several, or a row none
    only_values: array = field(default_factory=lambda: array("d"))
    candidates: bool = False  # some row has scored ones
    by_name: bool = False  # some row has `rewards`
    beside: int = 0  # completions without a reward beside scored candidates

    def see(self, row: Example) -> None:
        for name in (*row.rewards, *row.candidate_scores):
            self.names.setdefault(name)
        if row.reward is not None:
            self.values.append(row.reward)
        self.values.extend(row.candidate_rewards)
        self._see_the_only_one(row)
        self.candidates |= bool(row.candidate_rewards)
        self.by_name |= bool(row.rewards)
        self.beside += bool(row.completion) and bool(row.candidate_rewards) and row.reward is None

    def _see_the_only_one(self, row: Example) -> None:
        if self.only is None:
            return
        fits = row.reward is None and row.completion is not None and len(row.rewards) == 1
        if not fits or self.only not in ("", *row.rewards):
            self.only, self.only_values = None, array("d")
            return
        ((self.only, value),) = row.rewards.items()
        self.only_values.append(value)

    @property
    def rewarded(self) -> str:
        """Where no row has a reward, and all have `rewards` of one and the same name alone: that is the reward."""
        return self.only or ""

    def spoken(self, scaled: bool) -> list[str]:
        """What is the reward, on which scale; or what may be named as one."""
        names, values = self.names, np.array(self.values + self.only_values)
        parts = [f"the reward is {self.rewarded}, the only one of `rewards`"] if self.rewarded else []
        first = next(iter(names), "")
        if (scaled or self.rewarded) and len(values):
            parts.append(f"rewards {values.min():g}..{values.max():g}, levels {len(np.unique(values))}")
        if self.candidates:
            parts.append("RL from scores learns from each candidate, fine-tuning from the best")
        beside = 0 if self.rewarded else self.beside  # whose completions then have a reward
        if beside:
            parts.append(f"{beside:,} completions beside scored candidates are references to RL from scores")
        if names and not len(values) and not self.by_name:
            parts.append(
                f"no score, but scores by name ({', '.join(names)}), so that the order given counts: choose with "
                f"data.columns='{{candidate_rewards: candidates.rewards.{first}}}'"
            )
        elif names and not len(values):
            parts.append(
                f"no reward, but scores by name ({', '.join(names)}): choose with reward='{{{first}: 1.0}}' or "
                f"data.columns='{{reward: {first}}}'"
            )
        return parts
