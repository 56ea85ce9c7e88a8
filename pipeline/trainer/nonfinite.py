"""When a step's loss or gradient is not finite: which rows it was, kept in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.files import write_jsonl
from pipeline.records import Batch, Item
from pipeline.trainer.group import Ranks

SHOWN = 20  # names in a message; the file has all


@dataclass(frozen=True)
class Micro:
    """One micro-batch of the step: the model's output for it, and its loss."""

    batch: Batch
    output: Tensor  # (B, T) or (B,); of several outputs the first
    total: Tensor  # () or (k,)


def trace(directory: Path, ranks: Ranks, items: Sequence[Item], step: int, window: Sequence[Micro], norm: float) -> str:
    """Write this rank's rows to non_finite/step-N-rank-R.jsonl; one line that names what is broken, over all ranks.

    `step`, counted from 1, is the one that is left out.
    """
    rows = [row for micro in window for row in _rows(items, micro)]
    folder = directory / "non_finite"
    write_jsonl(folder / f"step-{step:06d}-rank-{ranks.rank}.jsonl", rows)
    broken = [row["id"] for part in ranks.gather(rows) for row in part if row["broken"]]
    named = ", ".join(broken[:SHOWN]) + (f" and {len(broken) - SHOWN} more" if len(broken) > SHOWN else "")
    where = f"the model's output or the loss is not finite on rows {named}" if broken else "every row's loss is finite"
    return f"step {step}: the gradient norm is {norm}, {where}; the rows are in {folder}"


def _rows(items: Sequence[Item], micro: Micro) -> list[dict]:
    """The rows of a micro-batch. Where no row's output is broken but the loss is, all of them are suspects."""
    count = len(micro.batch.items)
    output = micro.output.detach().float().cpu()
    numbers = [torch.tensor(list(items[index].numbers.values())) for index in micro.batch.items]
    ill = [not bool(output[i::count].isfinite().all() and numbers[i].isfinite().all()) for i in range(count)]
    suspects = not bool(micro.total.isfinite().all()) and not any(ill)
    rows = []
    for index, broken in zip(micro.batch.items, ill, strict=True):
        item = items[index]
        tokens = [{"prompt_ids": list(row.prompt_ids), "response_ids": list(row.response_ids)} for row in item.rows]
        origin = {"id": item.example.id, "source": item.example.source, "broken": broken or suspects}
        rows.append({**origin, "loss": float(micro.total.sum()), **item.numbers, "tokens": tokens})
    return rows
