"""What the frozen reference says of fixed data: log-probabilities and values, computed once, kept on disk.

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

from pipeline.config.sections import ValueSettings
from pipeline.data.batching import Packing, collate, once, window
from pipeline.errors import UserError
from pipeline.launch import run_dir
from pipeline.models import value_head
from pipeline.records import Item
from pipeline.trainer.engine import Engine

FORMAT = 2  # raise it when what is computed changes


def cache_key(**parts: Any) -> str:
    """A name that changes with anything the content depends on."""
    text = json.dumps(
        {"format": FORMAT, "torch": torch.__version__, "transformers": transformers.__version__, **parts},
        sort_keys=True,
        default=str,
    )
    return hashlib.sha256(text.encode()).hexdigest()[:24]


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
    """Log-probabilities of all response tokens.

    Returns:
        `logp`: (tokens,) float32, all rows of all items one after another; `lengths`: (rows,) int64.

    Raises:
        UserError: some are not finite; names the rows.
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


def refuse_infinite(what: str, items: Sequence[Item], found: Sequence[Tensor]) -> None:
    """Raises UserError naming the items for which `found`, a tensor for each, is NaN or infinite."""
    ill = [item.example.id for item, values in zip(items, found, strict=True) if not values.isfinite().all()]
    if ill:
        names = ", ".join(ill[:5]) + (f" and {len(ill) - 5} more" if len(ill) > 5 else "")
        raise UserError(f"{what}: not finite on rows {names}, wanted numbers: is the model whole? try precision=fp32")


def with_reference(items: Sequence[Item], saved: dict[str, Tensor]) -> list[Item]:
    """The items with their reference log-probabilities, views into one tensor."""
    rows = iter(saved["logp"].split(saved["lengths"].tolist()))
    return [replace(item, ref_logp=tuple(next(rows) for _ in item.rows)) for item in items]


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


@dataclass(frozen=True)
class Targets:
    """What the value head learns from: prompts, the reward to expect for each, and which choose the best epoch."""

    items: list[Item]  # prompts only
    rewards: Tensor  # (n,)
    held_out: Tensor  # (n,) bool
    low: float
    high: float


def fit_value(
    engine: Engine, targets: Targets, packing: Packing, settings: ValueSettings, seed: int
) -> tuple[value_head.ValueHead, dict[str, float]]:
    """A value head over the frozen reference, fitted by all ranks together; the same on all of them."""
    states = prompt_states(engine, targets.items, packing)
    hidden = engine.ranks.from_main(next(iter(states.values())).shape[1] if states else None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = value_head.ValueHead(hidden, targets.low, targets.high, settings.num_heads, settings.dropout)
    owned = sorted(states)
    report = value_head.fit(
        head.to(engine.ranks.device),
        [states[i] for i in owned],
        targets.rewards,
        targets.held_out,
        learning_rate=settings.learning_rate,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        patience=settings.patience,
        seed=seed,
        owned=owned,
        all_sum=engine.ranks.all_sum,
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
    head.eval()
    ranks, mine = engine.ranks, {}
    plan = window(items, range(len(items)), packing, ranks.rank, ranks.world)
    for indices in plan:
        batch = collate(items, indices, packing)
        states = engine(batch, output="states")
        steps = torch.arange(states.shape[1], device=states.device)
        predicted = head(states, steps < batch.prompt_lengths.to(states.device)[:, None]).cpu()
        mine |= {index: float(predicted[place]) for place, index in enumerate(batch.items)}
    merged = {index: number for part in ranks.gather(mine) for index, number in part.items()}
    values = torch.tensor([merged[i] for i in range(len(items))])
    refuse_infinite("values", items, list(values))
    return values


@torch.no_grad()
def check_ratio(
    engine: Engine, items: Sequence[Item], indices: Sequence[int], packing: Packing, tolerance: float
) -> float:
    """The mean |logp - ref_logp| per token over `indices` before the first step, which must be about 0.

    Raises:
        UserError: it is over `tolerance`.
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
