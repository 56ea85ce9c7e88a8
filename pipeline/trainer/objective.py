"""What a training minimises: an algorithm's loss, what its mean is over, and its settings."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from pipeline import plugins
from pipeline.config.schema import Algorithm
from pipeline.config.validate import one_complaint
from pipeline.errors import UserError
from pipeline.records import Batch, Stat
from pipeline.trainer.engine import Engine

Output = Tensor | tuple[Tensor, ...]
Loss = Callable[[Output, Batch], tuple[Tensor, dict[str, Stat]]]
Rest = Callable[[], tuple[Tensor, dict[str, Stat]]]  # of a loss that has begun


@dataclass(frozen=True)
class Objective:
    """What is minimised: the mean over `mean_over` of a loss that returns a sum; or the sum of several such means.

    With one name in `mean_over` the loss returns a scalar, with k of them (k,), in their order.

    `begin` starts what the loss waits for and returns the rest of it, which is called after the next micro-batch's
    forward: two micro-batches' activations are in memory.
    """

    loss: Loss
    mean_over: str | tuple[str, ...]  # tokens | sequences | pairs | items | prompts | targets
    output: str = "logp"  # what the loss wants of the module
    begin: Callable[[Output, Batch], Rest] | None = None

    def ask(self, engine: Engine, batch: Batch) -> Output:
        """What the module says of `batch`."""
        return engine(batch) if self.output == "logp" else engine(batch, output=self.output)

    def terms(self, window: Sequence[Batch]) -> Tensor:
        """What the micro-batches add to the divisors of the means: () float64, or (k,)."""

        def count(name: str) -> int:
            return sum(count_terms(batch, name) for batch in window)

        one = isinstance(self.mean_over, str)
        return torch.tensor(
            count(self.mean_over) if one else [count(name) for name in self.mean_over], dtype=torch.float64
        )


def count_terms(batch: Batch, mean_over: str) -> int:
    """What this micro-batch adds to the divisor of the mean; fillers add nothing.

    prompts: responses that the number `leads` marks, one per prompt. targets: tokens of rows that `target` marks.
    """
    if mean_over == "tokens":
        return int(batch.response_mask.sum())
    if mean_over == "items":  # pairs, or rows alone
        return len(batch.items)
    if mean_over == "prompts":
        return int(batch.numbers["leads"].sum())
    if mean_over == "targets":
        tokens = batch.response_mask[: len(batch.items)].sum(1)
        return int(tokens[batch.numbers["target"] > 0].sum())
    sequences = int(batch.sequence_mask.sum())
    return sequences // 2 if mean_over == "pairs" else sequences


def objective_of(algorithm: Algorithm) -> tuple[Any, Any, Objective]:
    """The algorithm's module, its settings checked by its own rules, and what it minimises.

    Raises:
        UserError: no such file, or settings it does not take.
    """
    names = plugins.available("pipeline.algorithms", "loss")
    if algorithm.file not in names:
        raise UserError(f"algorithm.file: {algorithm.file!r}, wanted one of {', '.join(names)}")
    module = importlib.import_module(f"pipeline.algorithms.{algorithm.file}")
    settings = checked_settings(module.Settings, algorithm.settings)

    def loss(output: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Stat]]:
        return module.loss(output, batch, settings)

    return module, settings, Objective(loss, module.MEAN_OVER, module.needs(settings).output)


def checked_settings(schema: type, values: dict[str, Any]) -> Any:
    """`values` as the algorithm's own settings record. Raises UserError for a wrong, missing or unknown key."""
    try:
        return _validated(schema, values)
    except ValidationError as error:
        path, complaint = one_complaint(error)
        raise UserError(f"{'.'.join(['algorithm.settings', *path])}: {complaint}") from None


def _validated(schema: type, values: dict[str, Any]) -> Any:
    known = set(schema.__dataclass_fields__)
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError(f"algorithm.settings.{unknown[0]}: no such setting, wanted one of {', '.join(sorted(known))}")
    return TypeAdapter(schema).validate_python(values)
