"""What the policy gives before its first step, computed once and cached on disk: log-probabilities, values, advantages.

The reference is the policy before its first step, so the training engine itself computes them: same weights, kernel,
precision and sharding as in training, and never a second model in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from pipeline.config.schema import RlStage
from pipeline.data import dataset
from pipeline.data.batching import Packing, collate, once, window
from pipeline.errors import UserError
from pipeline.launch import going_on, run_dir
from pipeline.records import Item, Needs
from pipeline.rl import values
from pipeline.rl.values import ValueData
from pipeline.trainer.engine import Engine
from pipeline.trainer.model import Model

FORMAT = 4  # raise it when what is computed changes


@dataclass(frozen=True)
class ReferencePolicy:
    """The frozen start of the policy, as the engine holds it before the first step, and the key of what it says."""

    model: Model
    settings: RlStage
    weights: str  # fingerprint

    def cache(self, name: str, **parts: object) -> Path:
        """Where a result is kept: the name holds everything it depends on."""
        settings = self.settings
        content = {
            "format": FORMAT,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "weights": self.weights,
            "template": self.model.encoder.template.model_dump(),
            "precision": settings.train.precision,
            "attention": settings.model.attn_implementation,
            "dropout": settings.model.dropout,
            "device": self.model.ranks.device.type,
            **parts,
        }
        key = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:24]
        return run_dir.run_dir(settings) / "cache" / f"{name}-{key}.pt"


def annotate(
    policy: ReferencePolicy, items: list[Item], needs: Needs, value_data: ValueData | None = None
) -> tuple[list[Item], dict[str, float]]:
    """The items with what the algorithm needs of the reference, and how well the value head fits (value/...).

    Log-probabilities go to `ref_logp`, values to the numbers `value` and `advantage` = reward - value.
    """
    report: dict[str, float] = {}
    if needs.ref_logp:
        items = with_ref_logps(policy, items)
    if needs.values:
        items, report = with_values(policy, items, value_data)
    return items, report


def with_ref_logps(policy: ReferencePolicy, items: list[Item]) -> list[Item]:
    """The items with the reference's log-probabilities."""
    model = policy.model
    path = policy.cache("ref_logps", rows=rows_digest(items))
    return attached(items, cached(path, model.engine, lambda: reference_logps(model.engine, items, model.packing)))


def attached(items: Sequence[Item], saved: dict[str, Tensor]) -> list[Item]:
    """The items with what `reference_logps` gave for them, as views into one tensor."""
    rows = iter(saved["logp"].split(saved["lengths"].tolist()))
    return [replace(item, ref_logp=tuple(next(rows) for _ in item.rows)) for item in items]


def with_values(policy: ReferencePolicy, items: list[Item], data: ValueData) -> tuple[list[Item], dict[str, float]]:
    """The items with `value` and `advantage`, and how well the value head predicts on prompts it did not see.

    Raises UserError as `values.source_of`.
    """
    settings, model = policy.settings, policy.model
    source = values.source_of(settings.value, data.rewards)
    judges = data.rewards.rewards if data.rewards is not None else ()
    began = model.ranks.on_main(lambda: going_on.first_ranks(run_dir.stage_dir(settings, "rl")))
    # all that the values depend on: another judge, seed or number of ranks gives others; other ranks that go on with a
    # stage learn from the values that it began with
    parts = {
        "rows": rows_digest(items),
        "logged": [item.numbers["reward"] for item in data.logged] if source == "data" else None,
        "prompts": [[str(example.prompt), example.references] for example in data.prompts],
        "columns": [example.columns for example in data.prompts] if source == "policy" else None,
        "judge": [data.rewards_key, [[one.name, one.weight, one.normalise] for one in judges]],
        "value": [source, settings.value.model_dump()],
        "generation": settings.generation.model_dump(),
        "seed": settings.seed,
        "world": began or model.ranks.world,
    }

    def compute() -> dict[str, Tensor | dict[str, float]]:
        targets = values.value_targets(model, settings, data, source)
        head, report = values.fit_value(model.engine, targets, model.packing, settings.value, settings.seed)
        prompts = [Item(item.example, (replace(item.rows[0], response_ids=()),)) for item in items]
        predicted = values.values_of(model.engine, head, prompts, model.packing)
        refuse_infinite("values", items, list(predicted))
        return {"values": predicted, "report": report}

    saved = cached(policy.cache("values", **parts), model.engine, compute)
    expected = saved["values"].tolist()
    gains = [item.numbers["reward"] - value for item, value in zip(items, expected, strict=True)]
    return dataset.with_numbers(items, value=expected, advantage=gains), saved["report"]


def rows_digest(items: Sequence[Item]) -> str:
    """sha256 of all token ids: it changes with data, template, tokenizer and truncation."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr([(row.prompt_ids, row.response_ids) for row in item.rows]).encode())
    return digest.hexdigest()


def cached(path: Path, engine: Engine, compute: Callable[[], Any]) -> Any:
    """The content of `path`; computed by all ranks and written by rank 0 (complete or absent) where it is missing."""
    ranks = engine.ranks
    path.parent.mkdir(parents=True, exist_ok=True)
    with run_dir.waiting(path.parent) if ranks.main else nullcontext():
        if not ranks.from_main(path.is_file()):
            content = compute()
            if ranks.main:
                part = path.with_suffix(".part")
                torch.save(content, part)
                part.replace(path)
            ranks.barrier()
    if not path.is_file():
        raise UserError(f"{path}: this machine does not see it, wanted runs_dir on a file system all machines share")
    return torch.load(path, weights_only=True, mmap=True)


@torch.no_grad()
def reference_logps(engine: Engine, items: Sequence[Item], packing: Packing) -> dict[str, Tensor]:
    """Log-probabilities of all response tokens. Raises UserError, which names the rows, where some are not finite.

    `logp`: (tokens,) float32, all rows of all items one after another; `lengths`: (rows,) int64.
    """
    engine.train(False)
    mine: dict[int, list[Tensor]] = {}
    for batch in once(items, packing, engine.ranks.rank, engine.ranks.world):
        logp = engine(batch).float().cpu()  # (B, T)
        n = len(batch.items)
        for place, index in enumerate(batch.items):
            rows = range(place, len(logp), n)
            mine[index] = [logp[row][batch.response_mask[row]] for row in rows]
    merged = {index: rows for part in engine.ranks.gather(mine) for index, rows in part.items()}
    refuse_infinite("reference log-probabilities", items, [torch.cat(merged[index]) for index in range(len(items))])
    flat = [row for index in range(len(items)) for row in merged[index]]
    return {"logp": torch.cat(flat), "lengths": torch.tensor([len(row) for row in flat])}


def refuse_infinite(what: str, items: Sequence[Item], tensors: Sequence[Tensor]) -> None:
    """Raises UserError naming the items for which `tensors`, a tensor for each, is NaN or infinite."""
    ill = [item.example.id for item, values in zip(items, tensors, strict=True) if not values.isfinite().all()]
    if ill:
        names = ", ".join(ill[:5]) + (f" and {len(ill) - 5} more" if len(ill) > 5 else "")
        raise UserError(f"{what}: not finite on rows {names}, wanted numbers: is the model whole? try precision=fp32")


@torch.no_grad()
def check_ratio(
    engine: Engine, items: Sequence[Item], indices: Sequence[int], packing: Packing, tolerance: float
) -> float:
    """The mean |logp - ref_logp| per token over `indices` before the first step, which must be about 0.

    Raises UserError where it is over `tolerance`.
    """
    engine.train()
    sums = torch.zeros(2, dtype=torch.float64)
    for mine in window(items, indices, packing, engine.ranks.rank, engine.ranks.world):
        batch = collate(items, mine, packing)
        logp = engine(batch).float().cpu()
        gap = torch.where(batch.response_mask, (logp - batch.ref_logp).abs(), 0.0)
        sums += torch.tensor([float(gap.double().sum()), float(batch.response_mask.sum())], dtype=torch.float64)
    total, count = engine.ranks.all_sum(sums).tolist()
    if not total / count <= tolerance:
        raise UserError(
            f"ratio_tolerance: policy and reference differ by {total / count:.2g} nats per token before the first "
            f"step, wanted <= {tolerance}: is dropout on (model.dropout=0.0), or the cache of another kernel "
            "(remove the run's cache/)?"
        )
    return total / count
