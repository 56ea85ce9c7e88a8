"""Where the time of a semi-offline step goes: the loop's own step, taken apart."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.algorithms import functional
from pipeline.bench.measure import Plan, Result, timed
from pipeline.models.policy import Policy, spread
from pipeline.records import Batch
from pipeline.rl.compositions import Composer
from pipeline.trainer.loop import Job, learning_rate


@dataclass(frozen=True)
class Semi:
    """A job of semi-offline RL, with what its loss is made of."""

    job: Job
    composer: Composer
    settings: Any  # of the algorithm


class Watch:
    """Seconds of each part, by name, in the order of their first call."""

    def __init__(self, clock: str):
        self.clock = clock
        self.seconds: dict[str, float] = {}

    def take(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` returns."""
        found: list[Any] = []
        self.seconds[name] = self.seconds.get(name, 0.0) + timed(lambda: found.append(work()), self.clock)
        return found[0]


def parts_of(semi: Semi, plan: Plan) -> list[Result]:
    """The median seconds of each part over the rounds, and their share in all."""
    watches = [Watch(plan.clock) for _ in range(plan.rounds + 1)]
    for step, watch in enumerate(watches):
        one_step(semi, step, watch)
    names = list(watches[0].seconds)
    medians = {name: statistics.median(watch.seconds[name] for watch in watches[1:]) for name in names}
    whole = sum(medians.values())
    head = f"semi-offline step, n = {semi.settings.samples}"
    return [Result(f"{head}: {name}", "s", seconds, whole, seconds / whole) for name, seconds in medians.items()]


def one_step(semi: Semi, step: int, watch: Watch) -> torch.Tensor:
    """As `loop.one_step`, but for the statistics of the interval; what was minimised, (2,)."""
    work, take = semi.job, watch.take
    window = take("rows and masks", lambda: work.windows.at(step))
    n_terms = work.engine.ranks.all_sum(work.objective.terms(window))
    work.engine.train()
    for place, batch in enumerate(batch.to(work.engine.ranks.device) for batch in window):
        output = forward(work.engine.module, batch, watch)
        drawn = functional.Drawn(*output[2:])
        written = take("decoding to text", lambda drawn=drawn, batch=batch: semi.composer.write(drawn, batch))
        found = take("rewards", lambda written=written, batch=batch: semi.composer.ask(*written, batch)())
        given = (output, batch, semi.settings, found)
        totals, _ = take("loss and statistics", lambda given=given: semi.composer.judged_loss(*given))
        last = place == len(window) - 1
        take("backward", lambda totals=totals, last=last: work.engine.backward(totals, n_terms, last))
    take("optimizer", lambda: work.engine.step(learning_rate(step, work.max_steps, work.optimizer)))
    return totals.detach()


def forward(policy: Policy, batch: Batch, watch: Watch) -> tuple[torch.Tensor, ...]:
    """What the policy says when it is asked for `drawn`."""
    static, mask = batch.static, batch.response_mask
    states, others = watch.take("forward without head", lambda: policy.both_states(batch))

    def draw() -> functional.Drawn:
        hidden = others[static.masked]
        return functional.draw_tokens(hidden, policy.head, static.uniforms, static.suppressed, policy.chunks)

    def likelihood() -> tuple[torch.Tensor, ...]:
        targets = batch.response_ids[mask]
        found = functional.smoothed_logps(states[mask], policy.head, targets, policy.chunks)
        return tuple(spread(values, mask) for values in found)

    drawn = watch.take("drawing", draw)
    return *watch.take("head of the likelihood", likelihood), *drawn
