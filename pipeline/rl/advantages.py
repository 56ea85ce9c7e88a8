"""From scored rows to what offline RL trains on: rewards, reference log-probabilities, values, advantages, a draw.

Everything that the policy's first weights decide is computed before the first step and cached in runs/<run>/cache/.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config.schema import Rl
from pipeline.data import dataset, sampling
from pipeline.data.batching import Draw, Packing
from pipeline.data.convert import CHOSEN, REJECTED
from pipeline.data.tokenization import Encoder
from pipeline.errors import UserError
from pipeline.launch import run_dir
from pipeline.records import Example, Item
from pipeline.rewards import rewards, scoring
from pipeline.rl import reference
from pipeline.rollout.generate import generate
from pipeline.trainer.engine import Engine, Ranks


@dataclass(frozen=True)
class Reference:
    """The frozen start of the policy, as the engine holds it before the first step, and the key of what it says."""

    engine: Engine
    encoder: Encoder
    packing: Packing
    settings: Rl
    weights: str  # fingerprint

    def cache(self, name: str, **parts: object) -> Path:
        """Where a result is kept: the name holds everything it depends on."""
        settings = self.settings
        key = reference.cache_key(
            weights=self.weights,
            precision=settings.train.precision,
            attention=settings.model.attn_implementation,
            dropout=settings.model.dropout,
            device=self.engine.ranks.device.type,
            **parts,
        )
        return run_dir.run_dir(settings) / "cache" / f"{name}-{key}.pt"


def with_rewards(ranks: Ranks, rows: list[Example], judge: rewards.Rewards | None, settings: Rl) -> list[Example]:
    """The rows with their reward: judged if `reward` is set or they bring none, else their own.

    Raises:
        UserError: there is neither a reward column nor anything to judge with.
    """
    own = all(row.reward is not None for row in rows)
    if own and settings.reward is None:
        return rows
    if judge is None:
        missing = next(row for row in rows if row.reward is None)
        raise UserError(
            f"{missing.id}: no reward, and nothing to score it with: add a `reward` column, give reward=, "
            f"or train one with bash run.sh stage=reward run={settings.run}"
        )
    scores = scoring.score_texts(ranks, judge, rows, [row.completion for row in rows])
    return [replace(row, reward=total) for row, total in zip(rows, scores.total, strict=True)]


def chosen_rows(rows: list[Example], which: str) -> list[Example]:
    """The rows to learn from, in their order, by `rows=` of the settings.

    all; chosen, all but the rejected side of pairs; best_half and worst_half of n rows, n / 2 of them rounded up, by
    reward (of equal rewards the first row counts as better). Raises UserError for `chosen` where no row is of a pair.
    """
    if which == "all":
        return rows
    if which == "chosen":
        if not any(row.id.endswith((CHOSEN, REJECTED)) for row in rows):
            raise UserError(
                f"rows=chosen: none of {len(rows)} rows is a side of a pair, wanted ids that end with {CHOSEN} and "
                f"{REJECTED}: score pairs with data.responses=both, or say rows=best_half"
            )
        return [row for row in rows if not row.id.endswith(REJECTED)]
    ranked = sorted(range(len(rows)), key=lambda i: -rows[i].reward)  # stable
    half = math.ceil(len(rows) / 2)
    kept = ranked[:half] if which == "best_half" else ranked[-half:]
    return [rows[i] for i in sorted(kept)]


def with_shuffled_rewards(rows: list[Example], seed: int) -> list[Example]:
    """The rows with one another's rewards: the same numbers, which say nothing of the responses any more."""
    order = sampling.shuffled_rows(len(rows), seed)
    return [replace(row, reward=rows[i].reward) for row, i in zip(rows, order, strict=True)]


def with_ref_logps(ref: Reference, items: list[Item]) -> list[Item]:
    """The items with the reference's log-probabilities."""
    path = ref.cache("ref_logps", rows=reference.rows_digest(items))
    saved = reference.cached(path, ref.engine, lambda: reference.reference_logps(ref.engine, items, ref.packing))
    return reference.with_reference(items, saved)


@dataclass(frozen=True)
class ValueData:
    """What values can be learned from: fresh responses to `prompts`, judged, or the logged rows of training."""

    prompts: list[Example]  # held out
    logged: list[Item]  # with `reward`
    judge: rewards.Rewards | None
    judge_key: object  # names the judge in the cache's key


def with_values(ref: Reference, items: list[Item], source: ValueData) -> tuple[list[Item], dict[str, float]]:
    """The items with `value` and `advantage`, and how well the value head predicts on prompts it did not see.

    Raises:
        UserError: targets are to come from the policy, but nothing can judge its responses.
    """
    settings = ref.settings
    if settings.value.targets == "policy" and source.judge is None:
        raise UserError(
            "value.targets: policy, but nothing can score new responses: give reward=, or value.targets=data"
        )
    parts = {
        "rows": reference.rows_digest(items),
        "logged": [item.numbers["reward"] for item in source.logged] if settings.value.targets == "data" else None,
        "prompts": [str(example.prompt) for example in source.prompts],
        "judge": source.judge_key,
        "value": settings.value.model_dump(),
        "generation": settings.generation.model_dump(),
        "seed": settings.seed,
        "world": ref.engine.ranks.world,
    }

    def compute() -> dict[str, Tensor | dict[str, float]]:
        targets = value_targets(ref, source)
        head, report = reference.fit_value(ref.engine, targets, ref.packing, settings.value, settings.seed)
        prompts = [Item(item.example, (replace(item.rows[0], response_ids=()),)) for item in items]
        return {"values": reference.values_of(ref.engine, head, prompts, ref.packing), "report": report}

    saved = reference.cached(ref.cache("values", **parts), ref.engine, compute)
    values = saved["values"].tolist()
    gains = [item.numbers["reward"] - v for item, v in zip(items, values, strict=True)]
    return dataset.with_numbers(items, value=values, advantage=gains), saved["report"]


def value_targets(ref: Reference, source: ValueData) -> reference.Targets:
    """Prompts with the reward to expect: of fresh responses of the reference, or of the logged ones."""
    settings = ref.settings.value
    if settings.targets == "policy":
        prompts = dataset.unique_prompts(source.prompts)[: settings.max_prompts]
        generation = ref.settings.generation.model_copy(
            update={"do_sample": True, "num_beams": 1, "num_return_sequences": settings.samples_per_prompt}
        )
        answers = generate(ref.engine, ref.encoder, prompts, generation, ref.settings.seed)
        totals = scoring.score_responses(ref.engine.ranks, source.judge, answers).total
        n = settings.samples_per_prompt
        expected = [statistics.fmean(totals[i * n : (i + 1) * n]) for i in range(len(prompts))]
    else:
        logged: dict[object, list[float]] = {}
        for item in source.logged:
            logged.setdefault(item.example.prompt, []).append(item.numbers["reward"])
        prompts = dataset.unique_prompts([item.example for item in source.logged])[: settings.max_prompts]
        expected = [statistics.fmean(logged[example.prompt]) for example in prompts]
    encoded = dataset.encode(prompts, ref.encoder, dataset.prompt_rows).items
    low, high = value_range(source.judge, expected)
    order = sampling.epoch_rows(len(prompts), len(prompts), 0, ref.settings.seed)
    mask = torch.zeros(len(prompts), dtype=torch.bool)
    mask[order[: max(1, round(len(prompts) * settings.held_out_fraction))]] = True
    return reference.Targets(encoded, torch.tensor(expected), mask, low, high)


def value_range(judge: rewards.Rewards | None, targets: Sequence[float]) -> tuple[float, float]:
    """What the value head can say: the rewards' own bounds, else the targets' range and a tenth of it on each side."""
    bounds = None if judge is None else rewards.bounds([r for r in judge.rewards if r.weight])
    if bounds is not None and bounds[0] <= min(targets) and max(targets) <= bounds[1]:
        return bounds
    margin = 0.1 * (max(targets) - min(targets)) or 1.0
    return min(targets) - margin, max(targets) + margin


@dataclass(frozen=True)
class Population:
    """Which rows are drawn, how, and for how many steps of those asked for."""

    draw: Draw
    kept_fraction: float  # rows of positive weight over all rows


def population(items: Sequence[Item], weight: str, settings: Rl) -> Population:
    """The draw that `sampling` asks for, by the row weight of the algorithm.

    Args:
        weight: the number that weighs a row: reward or advantage; "one" weighs all alike.

    Raises:
        UserError: no row has a positive weight.
    """
    size, seed, n = settings.train.batch_size, settings.seed, len(items)
    weights = [1.0 if weight == "one" else item.numbers[weight] for item in items]
    kept = [i for i in range(n) if weights[i] > 0] if settings.sampling == "all" else sampling.survivors(weights)
    if not kept:
        raise UserError(
            f"sampling: all, but none of {n} rows has a positive {weight} (largest {max(weights):.4g}), wanted one to "
            "learn from: raise the rewards above 0, or say algo=alol, which subtracts what was to be expected"
        )
    if settings.sampling == "priority":
        return Population(lambda step: sampling.priority_rows(weights, size, step, seed), len(kept) / n)
    pool = list(range(n)) if settings.sampling == "all" else kept

    def draw(step: int) -> list[int]:
        return [pool[i] for i in sampling.epoch_rows(len(pool), size, step, seed)]

    return Population(draw, len(kept) / n)
