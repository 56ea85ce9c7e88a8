"""A step outside forward and backward: which rows, in which micro-batches, as tensors; of many rows and of few.

Rows are of random tokens, 63 on average, in memory as they lie in a run's cache; their texts are those of the setup's
rows, again and again. Always in processor time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pyarrow

from pipeline.bench.measure import Goal, Result, Timing, alternate, compared, timed
from pipeline.bench.setup import Setup, changed
from pipeline.config.resolve import resolve
from pipeline.data.batching import Windows, packing_of
from pipeline.data.encoded import SCHEMA, Items
from pipeline.data.encoding import PART
from pipeline.data.rows import Rows
from pipeline.rl.rows import population

FLAT = Goal(1.1)
FEW, MANY, LONGEST = 10_000, 1_000_000, 62  # rows; tokens of a prompt and of a response
STEPS = 50  # of a round
WAYS = {"every row once": "positive", "priority": "priority"}  # rl's `sampling`, where every advantage is positive


def measure(setup: Setup, many: int = MANY, few: int = FEW) -> list[Result]:
    """A step of `many` rows against one of `few`, by way of drawing them; and what is made once for many."""
    timing = Timing(setup.settings.rounds, STEPS, "cpu", warm=3)
    sets, results = [items_of(setup, count) for count in (many, few)], []
    for (way, word), by_length in product(WAYS.items(), (True, False)):
        ours, other = (windows(setup, items, word, by_length) for items in sets)
        name = f"{way}, by length" if by_length else way
        rounds = [(1e3 * mine, 1e3 * others) for mine, others in alternate(ours.at, other.at, timing)]
        results.append(compared(f"{name}: step of {many:,} rows / of {few:,}", "ms", rounds, FLAT))
        steps = range(timing.total, timing.total + STEPS)  # some of which sort
        drawing = 1e3 * timed(partial(list, map(ours.draw, steps)), "cpu") / STEPS
        results.append(Result(f"{name}: drawing alone, mean of {STEPS} steps", "ms", drawing))
        once = 1e3 * timed(lambda made=(setup, sets[0], word, by_length): windows(*made).draw(0), "cpu")
        results.append(Result(f"{name}: made once of {many:,} rows", "ms", once))
    return results


def windows(setup: Setup, items: Items, word: str, by_length: bool) -> Windows:
    """A-LOL's micro-batches, of the setup's batch."""
    settings = resolve(["stage=rl", "algo=alol", f"sampling={word}"]).settings
    train = {name: getattr(setup.settings.train, name) for name in ("batch_size", "max_tokens", "micro_batch_size")}
    settings = changed(settings, {"train": {**train, "group_by_length": by_length}})
    packing = packing_of(settings.train, 1, False, setup.encoder.pad_id)
    return Windows(items, population(items, packing, "advantage", settings)[0], packing, 0, 1)


def items_of(setup: Setup, count: int) -> Items:
    """`count` rows of up to LONGEST tokens each of prompt and response, with what A-LOL knows of them."""
    random, lists = np.random.default_rng(0), {}
    for name in ("prompt", "response"):
        ends = np.concatenate([[0], random.integers(1, LONGEST, count, endpoint=True).cumsum()])
        ids = random.integers(0, len(setup.encoder.tokenizer), ends[-1], np.int32)
        lists[name] = pyarrow.ListArray.from_arrays(pyarrow.array(ends, pyarrow.int32()), ids)
    none = pyarrow.ListArray.from_arrays(np.zeros(count + 1, np.int32), pyarrow.array([], pyarrow.bool_()))
    table = pyarrow.table({**lists, "learned": none, "flags": np.zeros(count, np.uint8)}, schema=SCHEMA)
    rows = Rows.of(setup.rows).take(np.arange(count) % len(setup.rows))
    items = Items(rows, pyarrow.Table.from_batches(table.to_batches(PART)), 1)
    numbers = {name: random.random(count) + 0.01 for name in ("reward", "value", "advantage")}
    return replace(items, ref_logp=np.zeros(items.ends[-1], np.float32)).with_numbers(**numbers)
