"""What a training minimises: an algorithm's loss, what its mean is over, and its settings."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from pipeline import plugins
from pipeline.config.schema import AlgorithmSettings
from pipeline.config.validate import one_complaint
from pipeline.errors import UserError
from pipeline.models import router
from pipeline.models.loading import hugging_face
from pipeline.models.policy import Policy, RewardModel
from pipeline.records import Batch, Needs, Stat
from pipeline.trainer.engine import Engine

Output = Tensor | tuple[Tensor, ...]
Total = tuple[Tensor, dict[str, Stat]]  # what a loss returns: a sum for each name in MEAN_OVER, and its statistics
Loss = Callable[[Output, Batch], Total]
Rest = Callable[[], Total]  # of a loss that has begun


@runtime_checkable
class AlgorithmModule(Protocol):
    """What a file of pipeline/algorithms/ holds; `settings` is always one of its own Settings."""

    MEAN_OVER: str | tuple[str, ...]  # see `Objective`
    Settings: type  # a frozen dataclass that checks itself

    def needs(self, settings: Any) -> Needs:
        """What has to be known before training, and what the model has to compute."""

    def loss(self, output: Output, batch: Batch, settings: Any) -> Total:
        """Of one micro-batch: the model's output on it is (B, T) log-probabilities or what `needs` asks for."""


@runtime_checkable
class RlModule(AlgorithmModule, Protocol):
    """One that stage=rl runs."""

    RESPONSES: str  # where they come from: a key of `schema.RL_KINDS`


@runtime_checkable
class RewardModule(AlgorithmModule, Protocol):
    """One that stage=reward runs; its output is scores (B,)."""

    def columns(self, settings: Any) -> tuple[str, ...]:
        """The numbers that every pair must bring along."""

    def pairs_only(self, settings: Any) -> bool:
        """Whether rows must be pairs; if not, responses with a reward each will do."""


@dataclass(frozen=True)
class Objective:
    """What is minimised: the mean over `mean_over` of a loss that returns a sum; or the sum of several such means.

    With one name in `mean_over` the loss returns a scalar, with k of them (k,), in their order.

    `begin` starts what the loss waits for and returns the rest of it, which is called after the next micro-batch's
    forward: two micro-batches' activations are in memory.
    """

    loss: Loss
    mean_over: str | tuple[str, ...]  # tokens | sequences | pairs | items | prompts | targets | read
    output: str = "logp"  # what the loss wants of the module
    begin: Callable[[Output, Batch], Rest] | None = None
    balance: float = 0.0  # by what the loss of the router is weighted, see `balanced`

    def ask(self, engine: Engine, batch: Batch) -> Output:
        """What the module says of `batch`."""
        options = {} if self.output == "logp" else {"output": self.output}
        return engine(batch, **options, balance=True) if self.balance else engine(batch, **options)

    def terms(self, window: Sequence[Batch]) -> Tensor:
        """What the micro-batches add to the divisors of the means: () float64, or (k,)."""
        one = isinstance(self.mean_over, str)
        names = [self.mean_over] if one else self.mean_over
        counts = torch.tensor([[count_terms(batch, name) for name in names] for batch in window], dtype=torch.float64)
        return counts.sum(0)[0] if one else counts.sum(0)


def router_coefficient(module: Policy | RewardModel, given: float | None) -> float:
    """By what the loss of the router is weighted: `given`, or what the checkpoint itself asks for.

    Raises UserError where it is asked for and `module` has none.
    """
    if isinstance(module, RewardModel):
        if given:
            raise UserError(f"train.router_aux_loss_coef: {given}, but a reward model's router is left as it is: set 0")
        return 0.0
    coefficient = module.router_coefficient if given is None else given
    if coefficient:
        router.chosen_experts(hugging_face(module.model))
    return coefficient


def balanced(objective: Objective, coefficient: float) -> Objective:
    """The objective plus `coefficient` times the loss of the router, see `models.router`.

    That loss is not a sum of tokens' losses. Of a step it is the mean over its micro-batches, on all ranks, each
    weighted by its tokens, prompts included: what each keeps in balance is itself.
    """
    if not coefficient:
        return objective

    def added(total: Total, balance: Tensor, batch: Batch) -> Total:
        tokens = count_terms(batch, "read")
        sums = torch.cat([total[0].reshape(-1), (coefficient * tokens * balance).reshape(1).to(total[0])])
        found = balance.detach().double()
        stat = Stat("mean", tokens * torch.stack([torch.ones_like(found), found, found * found]))
        return sums, total[1] | {"loss/router": stat}

    def loss(output: Output, batch: Batch) -> Total:
        return added(objective.loss(own(output), batch), output[-1], batch)

    def begin(output: Output, batch: Batch) -> Rest:
        rest = objective.begin(own(output), batch)
        return lambda: added(rest(), output[-1], batch)

    def own(output: Output) -> Output:
        return output[0] if len(output) == 2 else output[:-1]

    names = [objective.mean_over] if isinstance(objective.mean_over, str) else objective.mean_over
    begun = None if objective.begin is None else begin
    return Objective(loss, (*names, "read"), objective.output, begun, coefficient)


def count_terms(batch: Batch, mean_over: str) -> int:
    """What this micro-batch adds to the divisor of the mean; fillers add nothing.

    prompts: responses that the number `leads` marks, one per prompt. targets: tokens of rows that `target` marks.
    read: tokens that the model reads, prompts included.
    """
    if mean_over == "tokens":
        return int(batch.response_mask.sum())
    if mean_over == "read":
        return int(batch.input_mask.sum()) if batch.items else 0
    if mean_over == "items":  # pairs, or rows alone
        return len(batch.items)
    if mean_over == "prompts":
        return int(batch.numbers["leads"].sum())
    if mean_over == "targets":
        tokens = batch.response_mask[: len(batch.items)].sum(1)
        return int(tokens[batch.numbers["target"] > 0].sum())
    sequences = int(batch.sequence_mask.sum())
    return sequences // 2 if mean_over == "pairs" else sequences


def objective_of(algorithm: AlgorithmSettings) -> tuple[AlgorithmModule, Any, Objective]:
    """The algorithm's file, its Settings, which check themselves, and its objective.

    Raises UserError for no such file or wrong settings.
    """
    names = plugins.available("pipeline.algorithms", "loss")
    if algorithm.file not in names:
        raise UserError(f"algorithm.file: {algorithm.file!r}, wanted one of {', '.join(names)}")
    module = importlib.import_module(f"pipeline.algorithms.{algorithm.file}")
    settings = checked_settings(module.Settings, algorithm.settings)

    def loss(output: Output, batch: Batch) -> Total:
        return module.loss(output, batch, settings)

    return module, settings, Objective(loss, module.MEAN_OVER, module.needs(settings).output)


def checked_settings(schema: type, values: dict[str, Any]) -> Any:
    """`values` as the algorithm's own settings record. Raises UserError for a wrong, missing or unknown key."""
    known = schema.__dataclass_fields__
    for name in values:
        if name not in known:
            raise UserError(f"algorithm.settings.{name}: no such setting, wanted one of {', '.join(sorted(known))}")
    try:
        return TypeAdapter(schema).validate_python(values)
    except ValidationError as error:
        path, complaint = one_complaint(error)
        raise UserError(f"{'.'.join(['algorithm.settings', *path])}: {complaint}") from None
