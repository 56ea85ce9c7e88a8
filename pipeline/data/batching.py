"""Items -> seeded, rank-sharded, resumable windows of micro-batches.

A window is what one rank computes in one optimizer step. Every rank plans every window of all ranks from the lengths
alone, which all ranks know, so that ranks agree on the number of micro-batches without a word. What a step draws is
a pure function of (seed, step): resuming needs no other state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.config import together
from pipeline.config.sections import TrainSettings
from pipeline.data.encoded import Items, prompt_keys
from pipeline.data.masking import Masker
from pipeline.data.tokenization import pad
from pipeline.errors import UserError
from pipeline.records import Batch, Item, Stat

CALLS = 16  # a micro-batch more is worth less padding by this part of max_tokens, about what a call costs by itself
ATTENTION = 4  # tokens that only attention knows take the memory of one that all parts of a layer do, or less
AT_ONCE = 16_384  # items among which those of like length are put together, where each is read once

Draw = Callable[[int], list[int]]  # step -> indices of the items of that step, the same on every rank


@dataclass(frozen=True)
class Packing:
    """How items become micro-batches. Exactly one of the two limits is set."""

    micro_batch_size: int | None  # items per call
    max_tokens: int | None  # padded tokens per call
    encoder_decoder: bool  # prompts and responses are padded apart
    pad_id: int
    whole: bool = False  # put prompt + response into input_ids even for an encoder-decoder (reward models)
    masker: Masker | None = None  # of response tokens
    prompts_once: bool = False  # each prompt of a micro-batch is read once, however many responses it has: see `shared`
    unpadded: bool = False  # a causal model reads its rows end to end
    suppressed: Tensor | None = None  # (V,) bool: see Batch

    @property
    def apart(self) -> bool:
        return self.encoder_decoder and not self.whole

    @property
    def shared(self) -> bool:
        """Whether a causal model reads a prompt once; padded rows read it every time."""
        return self.unpadded and self.prompts_once


def packing_of(train: TrainSettings, world: int, encoder_decoder: bool, pad_id: int, whole: bool = False) -> Packing:
    """The packing that `train` asks for. Raises UserError where the batch arithmetic leaves a remainder."""
    together.whole_batches(train, world)
    return Packing(train.micro_batch_size, train.max_tokens, encoder_decoder, pad_id, whole)


class Extent(NamedTuple):
    """The size of some items' rows side by side: how many there are, and the longest of each part, in tokens.

    Of many items, each by itself, the numbers may be arrays, (items,): `tokens` and `lengths` read both.
    """

    rows: int = 0
    text: int = 0  # tokens in all, a prompt that an item's rows share once
    prompt: int = 0
    response: int = 0
    static: int = 0  # of static responses
    single: int = 0  # of prompt + response
    beside: int = 0  # of prompt + static response

    @classmethod
    def of_each(cls, items: Sequence[Item], indices: Sequence[int]) -> list[Extent]:
        """Of each of these items by itself."""
        if not isinstance(items, Items):
            return [cls.of(items[i]) for i in indices]
        sizes = cls.of_items(items, np.asarray(indices, np.int64))  # no row is read
        columns = (one.tolist() if isinstance(one, np.ndarray) else [one] * len(indices) for one in sizes)
        return [cls(*one) for one in zip(*columns, strict=True)]

    @classmethod
    def of_items(cls, items: Items, indices: np.ndarray) -> Extent:
        """Of each of these items by itself, in arrays."""
        prompt, response, single, text = items.sizes(indices)
        return cls(items.rows_each, text, prompt, response, 0, single, 0)

    @classmethod
    def of(cls, item: Item) -> Extent:
        rows, static = item.rows, item.static_rows
        longest = max((len(row.response_ids) for row in static), default=0)
        prompts = {row.prompt_ids for row in rows}
        return cls(
            len(rows),
            sum(map(len, prompts)) + sum(len(row.response_ids) for row in rows) + longest,
            max(len(row.prompt_ids) for row in rows),
            max(len(row.response_ids) for row in rows),
            longest,
            max(map(len, rows)),
            max(map(len, static), default=0),
        )

    def with_item(self, item: Item) -> Extent:
        """The same with one item more."""
        return self.beside_of(Extent.of(item))

    def beside_of(self, other: Extent) -> Extent:
        """Of both side by side."""
        return Extent(self.rows + other.rows, self.text + other.text, *map(max, self[2:], other[2:]))

    def tokens(self, packing: Packing) -> int:
        """Tokens of one micro-batch, with what padding there is.

        Of rows end to end attention alone is padded, and repeats prompts: a part of what such a token costs elsewhere.
        """
        if packing.apart:
            return self.rows * (self.prompt + self.response + self.static)
        padded = 2 * self.rows * max(self.single, self.beside) if self.beside else self.rows * self.single
        return self.text + (padded - self.text) // ATTENTION if packing.shared else padded

    def lengths(self, packing: Packing) -> tuple[int, ...]:
        """Of one item: those who are alike in these need little padding beside one another."""
        if packing.apart:
            return self.prompt, self.response + self.static
        return (self.tokens(packing),)

    @property
    def joined(self) -> int:
        """Tokens of the longest row of prompt + response, after the longest static response."""
        return self.single + self.static


class Place(NamedTuple):
    """An item's place in the order in which micro-batches are filled."""

    item: int
    extent: Extent  # of it alone
    follows: bool  # its prompt is that of the item before, and read with that one


def in_order(items: Sequence[Item], indices: Sequence[int], packing: Packing) -> list[Place]:
    """Longest first; where a prompt is read once, items of one prompt follow each other."""
    alone = dict(zip(indices, Extent.of_each(items, indices), strict=True))
    if not packing.shared:
        order = sorted(indices, key=lambda i: (*(-length for length in alone[i].lengths(packing)), i))
        return [Place(i, alone[i], False) for i in order]
    prompts = dict(zip(indices, prompt_keys(items, indices), strict=True))
    leaders: dict[int, tuple[int, int]] = {}
    for i in indices:
        leaders[prompts[i]] = min(leaders.get(prompts[i], (1, 0)), (-alone[i].joined, i))
    order = sorted(indices, key=lambda i: (leaders[prompts[i]], -alone[i].joined, i))
    before = [None, *(prompts[i] for i in order)]
    return [Place(i, alone[i], prompts[i] == last) for i, last in zip(order, before, strict=False)]


def group(items: Sequence[Item], indices: Sequence[int], packing: Packing, world: int) -> list[list[int]]:
    """Cut `indices` into micro-batches of like length, a multiple of `world` of them.

    Longest first, so that the micro-batches at one place of every rank's window are alike.
    Raises UserError where one item alone is over max_tokens.
    """
    order = in_order(items, indices, packing)
    if packing.micro_batch_size is not None:
        size = packing.micro_batch_size
        groups = [[one.item for one in order[start : start + size]] for start in range(0, len(order), size)]
    else:
        groups = by_budget(items, order, packing)
    if not groups:
        return [[] for _ in range(world)]  # a step of fillers alone
    while len(groups) % world:
        largest = max(range(len(groups)), key=lambda g: len(groups[g]))
        if len(groups[largest]) < 2:
            groups.append([])  # a filler keeps the ranks in step
            continue
        half = len(groups[largest]) // 2
        groups[largest : largest + 1] = [groups[largest][:half], groups[largest][half:]]
    return groups


def by_budget(items: Sequence[Item], order: Sequence[Place], packing: Packing) -> list[list[int]]:
    """Fill micro-batches greedily up to max_tokens, padding included.

    One ends sooner where rows like the next, as many as there is room for, would be padded by more than a call costs;
    not where prompts and responses are padded apart, as the next ones would not be like one another.
    """
    groups: list[list[int]] = []
    most, extent, tokens = packing.max_tokens, Extent(), 0
    for place, (i, own, follows) in enumerate(order):
        alone = own.tokens(packing)
        longer = extent.beside_of(own._replace(text=own.text - own.prompt) if follows else own)
        added = longer.tokens(packing) - tokens
        if groups and tokens + added <= most:
            room = min((most - tokens) // max(1, added), len(order) - place)
            if packing.apart or room * (added - alone) * CALLS <= most:
                groups[-1].append(i)
                extent, tokens = longer, tokens + added
                continue
        # a new micro-batch, which this row alone must fit into
        groups.append([i])
        extent, tokens = own, alone
        if tokens > most:
            which = "row" if own.rows == 1 else f"{own.rows} rows of"
            raise UserError(
                f"train.max_tokens: {packing.max_tokens}, but {which} {items[i].example.id} alone has {tokens} tokens: "
                "raise it, or lower data.max_prompt_length or data.max_response_length"
            )
    return groups


def lengths(items: Sequence[Item], packing: Packing) -> np.ndarray:
    """(items, 1 or 2) int32, those of each item: the same on every rank, however steps are cut."""
    parts = [np.empty((0, 1 + packing.apart), np.int32)]
    if not isinstance(items, Items):
        each = [Extent.of(item).lengths(packing) for item in items]
        return np.array(each, np.int32).reshape(-1, 1 + packing.apart)
    for start in range(0, len(items), AT_ONCE):
        some = Extent.of_items(items, np.arange(start, min(start + AT_ONCE, len(items))))
        parts.append(np.stack(some.lengths(packing), 1).astype(np.int32))
    return np.concatenate(parts)


def window(
    items: Sequence[Item], indices: Sequence[int], packing: Packing, rank: int, world: int
) -> list[tuple[int, ...]]:
    """This rank's micro-batches, as item indices, of the step that draws `indices`. Ranks have equally many."""
    groups = group(items, indices, packing, world)
    return [tuple(groups[place + rank]) for place in range(0, len(groups), world)]


def collate(items: Sequence[Item], indices: Sequence[int], packing: Packing, step: int = 0) -> Batch:
    """One micro-batch; without indices one filler made from the first item, with all-False masks.

    `step` is that of the optimizer, which decides with the seed what is masked, where anything is.
    """
    chosen = [items[i] for i in indices] or [items[0]]
    filler = not indices
    rows = [item.rows[place] for place in range(len(chosen[0].rows)) for item in chosen]
    response_ids, response_mask = pad([row.response_ids for row in rows], packing.pad_id)
    # turns of a conversation that are read, not learned
    if any(row.learned for row in rows):
        response_mask &= pad([row.learned or (1,) * len(row.response_ids) for row in rows], 0)[0].bool()
    read = [row.prompt_ids if packing.apart else row.prompt_ids + row.response_ids for row in rows]
    owners = None
    if packing.prompts_once and packing.apart:
        # the encoder then works once per prompt, not once per response
        places = {ids: place for place, ids in enumerate(dict.fromkeys(read))}
        owners, read = torch.tensor([places[ids] for ids in read]), list(places)
    elif packing.shared:
        first: dict[tuple[int, ...], int] = {}
        owners = torch.tensor([first.setdefault(row.prompt_ids, place) for place, row in enumerate(rows)])
    input_ids, input_mask = pad(read, packing.pad_id)
    logps = [item.ref_logp[place] for place in range(len(chosen[0].ref_logp)) for item in chosen]
    # a filler's numbers are empty: it counts for nothing
    values = {name: [] if filler else [item.numbers[name] for item in chosen] for name in chosen[0].numbers}
    batch = Batch(
        items=tuple(indices),
        input_ids=input_ids,
        input_mask=input_mask,
        prompt_lengths=torch.tensor([len(row.prompt_ids) for row in rows]),
        response_ids=response_ids,
        response_mask=response_mask & (not filler),
        numbers={name: torch.tensor(column, dtype=torch.float32) for name, column in values.items()},
        ref_logp=pad_sequence(logps, batch_first=True) if logps else None,
        owners=owners,
        suppressed=packing.suppressed,
    )
    if packing.masker is None:
        return batch
    return packing.masker.mask(batch, [] if filler else chosen, step, packing.apart, packing.pad_id)


class Source(Protocol):
    """Where the micro-batches of a step come from; `items` and `stats` are those of the last step requested."""

    items: Sequence[Item]
    stats: Mapping[str, Stat]  # of how they were made; the same on every rank

    def at(self, step: int) -> list[Batch]:
        """This rank's window of `step`, counted from 0; equally many micro-batches on every rank."""

    def state_dict(self, step: int) -> dict[str, Any]:
        """What `at(step)` needs to know of earlier steps, for JSON; the same on every rank.

        Asked after `at(step - 1)` or, where that step was not taken, after `at(step)`.
        """

    def load_state_dict(self, memory: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; from nothing, where it is empty."""


class Windows:
    """The micro-batches of each step on this rank, from rows that are there."""

    def __init__(self, items: Sequence[Item], draw: Draw, packing: Packing, rank: int, world: int):
        self.items, self.draw, self.packing, self.rank, self.world = items, draw, packing, rank, world
        self.stats: Mapping[str, Stat] = {}

    def at(self, step: int) -> list[Batch]:
        """The window of `step`, counted from 0."""
        plan = window(self.items, self.draw(step), self.packing, self.rank, self.world)
        return [collate(self.items, indices, self.packing, step) for indices in plan]

    def state_dict(self, step: int) -> dict[str, Any]:
        """Nothing: what is drawn is a function of the step."""
        return {}

    def load_state_dict(self, memory: Mapping[str, Any]) -> None:
        """Nothing to go on from."""


def once(items: Sequence[Item], packing: Packing, rank: int, world: int) -> Iterator[Batch]:
    """Every item exactly once over all ranks, for evaluation and scoring; equally many micro-batches per rank.

    Of many items some thousand at a time, in their order, are put into micro-batches of like length.
    """
    for start in range(0, len(items), AT_ONCE):
        plan = window(items, range(start, min(start + AT_ONCE, len(items))), packing, rank, world)
        for indices in plan:
            yield collate(items, indices, packing)
