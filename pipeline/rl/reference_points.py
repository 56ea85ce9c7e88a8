"""What rows with labels are compared with: one reference point for a step, whatever the step is cut into.

The point z is made before the step's first backward, from all ranks' rows:

kto  z = max(0, mean of beta * ln(pi / pi_ref)) over one mismatched row for each row of the step: its prompt with the
     response to another prompt, read without gradient by the weights of now. Which response that is is drawn once, so
     that the reference's log-probabilities are cached as all others. (The paper, and TRL, turn the responses of a
     micro-batch round by one place, and take that micro-batch's mean.)
bco  z = half the sum of the two classes' means of beta * ln(pi / pi_ref), over all rows of the steps before; 0 at the
     first, as every ratio then is 1; that of one class while no row of the other was seen. Nothing is read for it.
     (TRL takes the mean over the rows of both classes, those of the present micro-batch among them: for classes of one
     size the same, a step later.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.algorithms.stats import mean_stat
from pipeline.data import encoding, sampling
from pipeline.data.batching import Packing, Windows, collate, window
from pipeline.data.encoded import Items
from pipeline.data.prompts import UniquePrompts
from pipeline.data.rows import Rows
from pipeline.errors import UserError
from pipeline.records import Batch, Example, Item, Stat
from pipeline.rl.context import Context
from pipeline.trainer.engine import Engine
from pipeline.trainer.group import Ranks
from pipeline.trainer.model import Model
from pipeline.trainer.objective import Objective, Output, Total

POINT = "reference_point"  # the number of a row, and its tag among the rewards


class ReferencePoint(Protocol):
    """What rows are compared with; every rank calls all of it in the same order."""

    def of_step(self, step: int, drawn: Sequence[int]) -> float:
        """z of the step that draws these rows."""

    def of_held_out(self) -> float:
        """z of held-out rows, by the weights of now."""

    def note(self, stats: Mapping[str, Stat]) -> None:
        """What the loss saw of a micro-batch of the step."""

    def state_dict(self, step: int) -> dict[str, Any]:
        """As `batching.Source`."""

    def load_state_dict(self, memory: Mapping[str, Any]) -> None:
        """As `batching.Source`."""


@dataclass(frozen=True)
class Mismatched:
    """kto's: of prompts with responses to other prompts. It remembers nothing."""

    engine: Engine
    packing: Packing
    beta: float
    items: Sequence[Item]  # one for each training row, with ref_logp
    held_out: Sequence[Item]  # one for each held-out row

    def of_step(self, step: int, drawn: Sequence[int]) -> float:
        return self._point(self.items, drawn)

    def of_held_out(self) -> float:
        return self._point(self.held_out, range(len(self.held_out)))

    def note(self, stats: Mapping[str, Stat]) -> None:
        pass

    def state_dict(self, step: int) -> dict[str, Any]:
        return {}

    def load_state_dict(self, memory: Mapping[str, Any]) -> None:
        pass

    @torch.no_grad()
    def _point(self, items: Sequence[Item], chosen: Sequence[int]) -> float:
        engine, ranks = self.engine, self.engine.ranks
        engine.train(False)
        sums = torch.zeros(2, dtype=torch.float64)  # rows, ln(pi / pi_ref)
        for mine in window(items, chosen, self.packing, ranks.rank, ranks.world):
            batch = collate(items, mine, self.packing)
            gaps = torch.where(batch.response_mask, engine(batch).double().cpu() - batch.ref_logp, 0.0)
            sums += torch.stack([batch.sequence_mask.sum().double(), gaps.sum()])
        count, total = ranks.all_sum(sums).tolist()
        return max(0.0, self.beta * total / count)


@dataclass
class Midpoint:
    """bco's: between the running means of the two classes."""

    ranks: Ranks
    sums: Tensor = field(default_factory=lambda: torch.zeros(2, 2, dtype=torch.float64))  # desirable, undesirable rows:
    # how many, and the sum of their implicit rewards, over all ranks and earlier steps
    seen: list[Tensor] = field(default_factory=list)  # the same of this rank's micro-batches of the step `last`
    last: int | None = None  # the step that `seen` is of, while it is not among the sums

    def of_step(self, step: int, drawn: Sequence[int]) -> float:
        self._learn()
        self.last = step
        return self.of_held_out()

    def of_held_out(self) -> float:
        means = [total / count for count, total in self.sums.tolist() if count]
        return sum(means) / len(means) if means else 0.0

    def note(self, stats: Mapping[str, Stat]) -> None:
        self.seen.append(torch.stack([stats[f"rewards/{name}"].sums[:2] for name in ("chosen", "rejected")]))

    def _learn(self) -> None:
        """Let the sums know of the last step; not of one with numbers that are not finite, which was not taken."""
        if self.last is None:
            return
        found = self.ranks.all_sum(torch.stack(self.seen).sum(0)).cpu()
        self.sums = self.sums + torch.where(found.isfinite().all(), found, 0.0)
        self.seen, self.last = [], None

    def state_dict(self, step: int) -> dict[str, Any]:
        if self.last is not None and self.last < step:
            self._learn()
        return {"implicit_rewards": self.sums.tolist()}

    def load_state_dict(self, memory: Mapping[str, Any]) -> None:
        if memory:
            self.sums = torch.tensor(memory["implicit_rewards"], dtype=torch.float64)


@dataclass
class LabelledWindows:
    """The micro-batches of each step, every row with the step's reference point."""

    windows: Windows
    point: ReferencePoint
    ranks: Ranks
    stats: Mapping[str, Stat] = field(default_factory=dict)

    @property
    def items(self) -> Sequence[Item]:
        return self.windows.items

    def at(self, step: int) -> list[Batch]:
        """As `Windows.at`."""
        point = self.point.of_step(step, self.windows.draw(step))
        self.stats = {
            f"rewards/{POINT}": mean_stat(torch.tensor([point], dtype=torch.float64, device=self.ranks.device))
        }
        return [with_point(batch, point) for batch in self.windows.at(step)]

    def state_dict(self, step: int) -> dict[str, Any]:
        """As `batching.Source`."""
        return self.point.state_dict(step)

    def load_state_dict(self, memory: Mapping[str, Any]) -> None:
        """As `batching.Source`."""
        self.point.load_state_dict(memory)


def with_point(batch: Batch, point: float) -> Batch:
    return replace(batch, numbers={**batch.numbers, POINT: torch.full((len(batch.items),), point)})


def noted(objective: Objective, point: ReferencePoint) -> Objective:
    """The objective, which tells `point` what it sees."""

    def loss(output: Output, batch: Batch) -> Total:
        total, stats = objective.loss(output, batch)
        point.note(stats)
        return total, stats

    return replace(objective, loss=loss)


def mismatched_items(context: Context, policy: Model, train: Rows, held_out: Rows) -> tuple[Items, Items]:
    """For each row its prompt with a response of training to another prompt, which the seed decides."""
    order = sampling.generator("mismatched", context.settings.seed, 0)
    apart = of_other_prompts(train, order)
    anywhere = of_any_prompt(train, held_out, order)
    parts = {"train": (train, apart), "validation": (held_out, anywhere)}
    found = []
    for split, (some, places) in parts.items():
        name = f"mismatched {context.settings.seed} {'' if train.cache is None else train.key}"
        made = some.made(name, partial(_with_responses, of=train, places=places))
        user = f"{context.directory}/mismatched {split}"
        found.append(encoding.encode(made, policy.encoder, encoding.completion_rows, user))
    return found[0], found[1]


def of_any_prompt(train: Rows, held_out: Rows, order: torch.Generator) -> np.ndarray:
    """(n,) for each held-out row the place of a row of training of another prompt; there are two prompts at least."""
    own, prompts = held_out.column("prompt"), train.column("prompt")
    places = torch.randint(len(train), (len(held_out),), generator=order).numpy()
    while (same := own == prompts[places]).any():
        places = np.where(same, (places + 1) % len(train), places)
    return places


def _with_responses(rows: Rows, of: Rows, places: np.ndarray) -> Iterator[Example]:
    for row, place in zip(rows, places.tolist(), strict=True):
        other = of[place]
        yield replace(row, completion=other.completion, unfinished=other.unfinished)


def of_other_prompts(rows: Rows, order: torch.Generator) -> np.ndarray:
    """(n,) for each row the place of one of another prompt, drawn evenly from all such. Raises UserError for one prompt
    alone."""
    prompts = UniquePrompts.of(rows, copies=False)
    if len(prompts) < 2:
        raise UserError(
            f"kto: all {len(rows):,} rows have one prompt, wanted responses to others to measure the policy's distance "
            "from the start by: add rows of other prompts, or set algo=bco"
        )
    n, sizes = len(rows), np.diff(prompts.ends)
    behind = np.repeat(prompts.ends[1:], sizes)  # the rows of a prompt stand together: begin behind them
    steps = torch.rand(n, generator=order, dtype=torch.float64).numpy() * (n - np.repeat(sizes, sizes))
    found = np.empty(n, np.int64)
    found[prompts.places] = prompts.places[(behind + steps.astype(np.int64)) % n]
    return found
