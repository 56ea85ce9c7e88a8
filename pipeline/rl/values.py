"""V(x), the reward to expect of a prompt under the reference: targets, a head fitted on frozen states, predictions."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.config.reward_spec import no_targets_of_policy
from pipeline.config.schema import RlStage
from pipeline.config.sections import ValueSettings
from pipeline.data import dataset, encoded, encoding, sampling
from pipeline.data.batching import Packing, once
from pipeline.data.prompts import unique_prompts
from pipeline.models import value_head
from pipeline.records import Batch, Example, Item
from pipeline.rewards import rewards as reward_functions
from pipeline.rewards import scoring
from pipeline.rewards.rewards import Rewards
from pipeline.rollout.generate import generate
from pipeline.rollout.handing import HandOver
from pipeline.trainer.engine import Engine
from pipeline.trainer.model import Model

logger = logging.getLogger("tiffin")


@dataclass(frozen=True)
class ValueData:
    """What values can be learned from: fresh responses to `prompts`, judged, or the logged rows of training."""

    prompts: Sequence[Example]  # held out
    logged: Sequence[Item]  # with `reward`
    rewards: Rewards | None
    rewards_key: object  # names the rewards in the cache's key
    hand_over: HandOver | None = None  # to the server that writes the responses, where one does


@dataclass(frozen=True)
class Targets:
    """What the value head learns from: prompts, the reward to expect for each, and which choose the best epoch."""

    items: Sequence[Item]  # prompts only
    rewards: Tensor  # (n,)
    held_out: Tensor  # (n,) bool
    low: float
    high: float


def source_of(
    targets: Literal["auto", "policy", "data"], rewards: Rewards | None, section: str = "value"
) -> Literal["policy", "data"]:
    """Which responses V learns from: fresh ones where `rewards` can judge them, else logged ones, which is said.

    With another `section` of the settings than `value`: which rewards are compared with. Raises UserError where fresh
    ones are wanted, but nothing can judge them.
    """
    if targets == "policy" and rewards is None:
        raise no_targets_of_policy(section)
    if targets == "auto" and rewards is None:
        what = "values: V is learned from" if section == "value" else f"{section}: they are"
        logger.info(f"{what} the logged rewards, as nothing judges new responses ({section}.targets)")
    if targets == "auto":
        return "data" if rewards is None else "policy"
    return targets


def sampled_rewards(
    model: Model, rl: RlStage, prompts: Sequence[Example], count: int, data: ValueData, use: str
) -> Tensor:
    """(prompts, count) float64: the rewards of `count` fresh responses to each prompt; `use` says what for."""
    generation = rl.generation.model_copy(update={"do_sample": True, "num_beams": 1, "num_return_sequences": count})
    server = None if data.hand_over is None else data.hand_over.to_server(model)
    answers = generate(model.engine, model.encoder, prompts, generation, rl.seed, server)
    cut = sum(not answer.finished for answer in answers)
    limit = f"generation.max_new_tokens={generation.max_new_tokens}"
    dataset.warn_of_cuts(cut, len(answers), limit, f"sampled for {use}, which are judged without their end")
    totals = scoring.score_responses(model.ranks, data.rewards, answers).total
    return torch.tensor(totals, dtype=torch.float64).view(len(prompts), count)


def value_targets(model: Model, rl: RlStage, data: ValueData, source: Literal["policy", "data"]) -> Targets:
    """Prompts with the reward to expect: of fresh responses of the reference, or of the logged ones."""
    settings = rl.value
    most = settings.most_prompts(source)
    if source == "policy":
        prompts = unique_prompts(data.prompts)[:most]
        logger.info(settings.spoken_cost(len(prompts), rl.generation.max_new_tokens))
        found = sampled_rewards(model, rl, prompts, settings.samples_per_prompt, data, "V")
        expected = [statistics.fmean(one) for one in found.tolist()]
    else:
        unique = unique_prompts(encoded.examples_of(data.logged))
        rewards = encoded.column(data.logged, "reward")
        prompts = unique[:most]
        expected = [statistics.fmean(rewards[unique.group(i)].tolist()) for i in range(len(prompts))]
    # a share of the prompts chooses the best epoch and is never fitted
    items = encoding.encode(prompts, model.encoder, encoding.prompt_rows)
    low, high = value_range(data.rewards, expected)
    order = sampling.epoch_rows(len(prompts), len(prompts), 0, rl.seed)
    mask = torch.zeros(len(prompts), dtype=torch.bool)
    mask[order[: max(1, round(len(prompts) * settings.held_out_fraction))]] = True
    return Targets(items, torch.tensor(expected), mask, low, high)


def value_range(rewards: Rewards | None, targets: Sequence[float]) -> tuple[float, float]:
    """What the value head can say: the rewards' own bounds, else the targets' range and a tenth of it on each side."""
    bounds = None if rewards is None else reward_functions.bounds([r for r in rewards.rewards if r.weight])
    if bounds is not None and bounds[0] <= min(targets) and max(targets) <= bounds[1]:
        return bounds
    margin = 0.1 * (max(targets) - min(targets)) or 1.0
    return min(targets) - margin, max(targets) + margin


@torch.no_grad()
def prompt_states(engine: Engine, items: Sequence[Item], packing: Packing) -> dict[int, Tensor]:
    """This rank's share of the items: index -> (P, H) last hidden states of the prompt, on the CPU."""
    engine.train(False)
    states = {}
    for batch in once(items, packing, engine.ranks.rank, engine.ranks.world):
        hidden = engine(batch, output="states").cpu()  # (B, P, H)
        for place, index in enumerate(batch.items):
            states[index] = hidden[place, : batch.prompt_lengths[place]].clone()
    return states


def fit_value(
    engine: Engine, targets: Targets, packing: Packing, settings: ValueSettings, seed: int
) -> tuple[value_head.ValueHead, dict[str, float]]:
    """A value head over the frozen reference, fitted by all ranks together; the same on all of them."""
    states = prompt_states(engine, targets.items, packing)
    hidden = engine.ranks.from_main(next(iter(states.values())).shape[1] if states else None)
    # the head's first weights are the same on every rank, and cost the training no random number
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = value_head.ValueHead(hidden, targets.low, targets.high, settings.num_heads, settings.dropout)
    owned = sorted(states)
    mine, ranks = [states[i] for i in owned], engine.ranks
    report = value_head.fit(
        head.to(ranks.device), mine, targets.rewards, targets.held_out, settings, seed, owned, ranks.all_sum
    )
    return head, {
        "value/mse": report.held_out_mse,
        "value/r2": report.held_out_r2,
        "value/fit_mse": report.fit_mse,
        "value/best_epoch": float(report.best_epoch),
    }


@torch.no_grad()
def values_of(engine: Engine, head: value_head.ValueHead, items: Sequence[Item], packing: Packing) -> Tensor:
    """(n,) float32: V of each item's prompt; states live for one micro-batch only."""
    engine.train(False)
    ranks, found = engine.ranks, torch.zeros(len(items))
    for batch in once(items, packing, ranks.rank, ranks.world):
        found[list(batch.items)] = of_states(head, engine(batch, output="states"), batch)
    return ranks.all_sum(found)  # one rank has each


def of_states(head: value_head.ValueHead, states: Tensor, batch: Batch) -> Tensor:
    """(items,) float32 on the CPU: V by the states (B, P, H) of each item's first prompt."""
    head.eval()
    steps = torch.arange(states.shape[1], device=states.device)
    predicted = head(states, steps < batch.prompt_lengths.to(states.device)[:, None]).cpu()
    return predicted[: len(batch.items)].float()
