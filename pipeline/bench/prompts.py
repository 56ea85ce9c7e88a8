"""Several responses to one prompt: forward and backward with the prompt read once, against rows with padding.

By the tokens of the prompt over those of a response, which all have RESPONSE, and by the number of responses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from pipeline.bench.measure import Result, alternate, compared
from pipeline.bench.setup import Setup, new_policy
from pipeline.data.batching import Packing, collate
from pipeline.models.policy import Policy
from pipeline.records import Batch, Example, Item, Row

RESPONSE = 32  # tokens
PROMPTS, RESPONSES = (1, 4, 12), (1, 2, 8)  # lengths of prompts, in responses; responses to each
ROWS = 8  # of a micro-batch


def measure(setup: Setup) -> list[Result]:
    policy = new_policy(setup).to(setup.ranks.device).train()
    timing = replace(setup.timing, warm=1)
    results = []
    for length in PROMPTS:
        for count in RESPONSES:
            ours, other = (step(policy, batch_of(setup, length, count, shared)) for shared in (True, False))
            name = f"prompt of {length} responses' length, {count} to each: padded rows / end to end"
            rounds = [(theirs, mine) for mine, theirs in alternate(ours, other, timing)]
            results.append(compared(name, "s", rounds, None))
    return results


def batch_of(setup: Setup, length: int, count: int, shared: bool) -> Batch:
    """ROWS rows of random tokens, `count` of them to each prompt."""
    numbers = torch.Generator().manual_seed(0)

    def ids(size: int) -> tuple[int, ...]:
        return tuple(torch.randint(len(setup.encoder.tokenizer), (size,), generator=numbers).tolist())

    prompts = [ids(length * RESPONSE) for _ in range(ROWS // count)]
    items = [Item(Example(str(i), ""), (Row(prompts[i // count], ids(RESPONSE)),)) for i in range(ROWS)]
    packing = Packing(ROWS, None, False, setup.encoder.pad_id, unpadded=shared, prompts_once=shared)
    return collate(items, range(ROWS), packing).to(setup.ranks.device)


def step(policy: Policy, batch: Batch) -> Callable[[int], None]:
    """A function that reads the batch, and back."""

    def work(number: int) -> None:
        policy.unpadded = batch.owners is not None
        policy(batch).sum().backward()
        policy.zero_grad()

    return work
