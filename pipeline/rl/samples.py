"""Rewards of several responses of the reference to each prompt, and what rows are worth beside them.

They are kept as judged, n numbers a prompt, so that quantiles and V* for any temperature come from one file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.data import encoded
from pipeline.data.prompts import UniquePrompts, unique_prompts
from pipeline.data.rows import Rows
from pipeline.errors import UserError
from pipeline.records import Example, Item
from pipeline.rl import values
from pipeline.rl.reference import ReferencePolicy, cached, sampling_key
from pipeline.rl.values import ValueData

NumbersOf = Callable[[Tensor, Tensor], Mapping[str, Tensor]]  # rewards (m,), samples (n,) -> numbers (m,) by name

logger = logging.getLogger("tiffin")


def compared(rows: Sequence[Example], which: str) -> Rows:
    """The rows whose prompt has another row too, where logged rewards are what rows are compared with.

    How many are left out is said. Raises UserError where none is kept.
    """
    rows = Rows.of(rows)
    prompts = UniquePrompts.of(rows, copies=True)  # a copy of a row is no other row
    kept = (np.diff(prompts.ends) > 1)[prompts.of_rows]
    if not kept.any():
        problem = f"data, but each of {len(rows):,} {which} rows is the only one of its prompt"
        cure = "wanted two or more, or reference_samples.targets=policy and a reward="
        raise UserError(f"reference_samples.targets: {problem}: {cure}")
    if left := int((~kept).sum()):
        found = f"{left:,} of {len(rows):,} {which} rows are left out"
        logger.info(f"reference_samples: {found}, each the only one of its prompt")
    return rows.take(kept, "compared")


def with_samples(
    policy: ReferencePolicy,
    parts: Sequence[Sequence[Item]],
    data: ValueData,
    source: Literal["policy", "data"],
    numbers_of: NumbersOf,
) -> list[Sequence[Item]]:
    """The items of each part with the numbers that `numbers_of` makes of their rewards, and of those of the reference's
    responses to their prompt, or of the prompt's own rows in that part. Of `data` what judges is read.
    """
    if source == "data":
        return [by_prompts(items, None, numbers_of) for items in parts]
    whole = Rows.of(encoded.examples_of(parts[0]))
    for items in parts[1:]:
        whole = whole + encoded.examples_of(items)
    prompts = unique_prompts(whole)
    samples = rewards_of_samples(policy, prompts, data)[prompts.of_rows]  # (rows, n)
    ends = np.cumsum([0, *map(len, parts)])
    return [
        by_prompts(items, samples[start : start + len(items)], numbers_of)
        for items, start in zip(parts, ends, strict=False)
    ]


def rewards_of_samples(policy: ReferencePolicy, prompts: Sequence[Example], data: ValueData) -> np.ndarray:
    """(prompts, n) float64, sampled and judged once, and kept. What that costs is said before."""
    settings, model = policy.settings, policy.model
    count = settings.reference_samples.per_prompt
    data = replace(data, prompts=prompts)

    def compute(part: Path | None) -> None:
        logger.info(settings.reference_samples.spoken_cost(len(prompts), settings.generation.max_new_tokens))
        found = values.sampled_rewards(model, settings, prompts, count, data, "reference_samples")
        if part is not None:
            with open(part, "wb") as file:
                np.save(file, found.numpy())

    key = {"count": count, **sampling_key(policy, data, sampled=True)}
    return np.load(cached(policy.cache("samples", ".npy", **key), model.engine, compute))


def by_prompts(items: Sequence[Item], samples: np.ndarray | None, numbers_of: NumbersOf) -> Sequence[Item]:
    """The items with the numbers of `numbers_of`, which is called once for each prompt with the rewards of its rows.

    samples (items, n): rewards of the reference's responses to each item's prompt; None: the rewards of its own rows.
    """
    rewards = torch.from_numpy(encoded.column(items, "reward"))
    _, groups = np.unique(encoded.prompt_keys(items, range(len(items))), return_inverse=True)
    order = np.argsort(groups, kind="stable")
    found: dict[str, Tensor] = {}
    for places in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        beside = rewards[places] if samples is None else torch.from_numpy(samples[places[0]])
        for name, values_found in numbers_of(rewards[places], beside).items():
            found.setdefault(name, torch.empty(len(items), dtype=torch.float64))[places] = values_found
    return encoded.with_numbers(items, **{name: one.numpy() for name, one in found.items()})
