"""What A-LOL costs beside one epoch of fine-tuning on the same rows, everything after their scoring.

The reference's pass, which values come out of too, is over all rows; the value head learns from the prompts that
`value` asks for; what is trained on is the half of the rows whose advantage is positive. Values here are learned from
logged rewards: sampling for them is measured by `sampling`, and grows with its prompts, not with the rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline.bench.measure import Goal, Result, Timing, alternate, compared
from pipeline.bench.setup import Setup, alol_trainer, model_of, new_policy, sft_trainer, singles, stepper
from pipeline.config.resolve import resolve
from pipeline.rl import reference, values
from pipeline.rl.values import Targets

KEPT = 0.5  # of the rows have a positive advantage
ALL = Goal(1.0)


def measure(setup: Setup) -> list[Result]:
    """Each part, and all of them, in epochs of fine-tuning."""
    items, model = singles(setup), model_of(setup, new_policy(setup))
    settings = resolve(["stage=rl", "algo=alol"]).settings.value
    prompts = reference.prompts_of(items)[: settings.most_prompts("data")]
    held_out = torch.arange(len(prompts)) % 4 == 0
    targets = Targets(prompts, torch.linspace(0.0, 1.0, len(prompts)), held_out, -1.0, 2.0)
    engine, packing = model.engine, model.packing
    head, _ = values.fit_value(engine, targets, packing, settings, 0)
    steps = -(-len(items) // setup.settings.train.batch_size)
    sft = _epoch(stepper(sft_trainer(setup, items)), steps)
    parts: dict[str, Callable[[int], object]] = {
        "reference and values in one pass": lambda _: [*reference.read_in_parts(engine, items, packing, head)],
        f"value head, of {len(prompts)} prompts": lambda _: values.fit_value(engine, targets, packing, settings, 0),
        f"training on {KEPT:.0%} of the rows": _epoch(stepper(alol_trainer(setup, items)), round(steps * KEPT)),
    }
    timing = Timing(setup.settings.rounds, 1, setup.settings.clock, warm=1)
    measured = {name: alternate(part, sft, timing) for name, part in parts.items()}
    # each part was measured beside an epoch of its own
    whole = [(sum(ours / other for ours, other in turn), 1.0) for turn in zip(*measured.values(), strict=True)]
    each = [compared(f"{name} / SFT epoch", "s", rounds, None) for name, rounds in measured.items()]
    return [*each, compared(f"A-LOL after scoring, {len(items):,} rows", "SFT epochs", whole, ALL)]


def _epoch(step: Callable[[int], None], steps: int) -> Callable[[int], object]:
    """A function that takes the steps of one epoch."""
    return lambda number: [step(number * steps + i) for i in range(steps)]
