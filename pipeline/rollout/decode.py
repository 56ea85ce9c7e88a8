"""Decoding that stops paying for responses that have ended: their rows leave, and others take their places.

transformers' generate() decodes every row until the longest of the batch ends, and reads a prompt once for each of its
responses. Here a prompt is read once, and what the model remembers of it is then given to each of its rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    SuppressTokensLogitsProcessor,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutput

from pipeline.config.generation import GenerationSettings
from pipeline.data.tokenization import pad
from pipeline.models.loading import hugging_face
from pipeline.models.policy import Policy
from pipeline.records import Request
from pipeline.rollout.drawing import RowSampler

LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)  # that remember keys and values alone
ROOM = 64  # tokens
ENDED = 0.125  # share of rows that have ended from which they are dropped: their memory is copied once for that


def drops_rows(lm: PreTrainedModel, settings: GenerationSettings) -> bool:
    """Whether `decode` does all that `settings` ask for with this model; generate() does where it does not.

    The model must be called as most are, and remember keys and values alone: those of transformers' own code, which do
    not prepare what they read in a way of their own.
    """
    usual = {"num_beams": 1, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "repetition_penalty": 1.0}
    plain = all(getattr(settings, name) == value for name, value in usual.items())
    kind = type(lm)
    known = kind.__module__.startswith("transformers.") and kind._supports_default_dynamic_cache()
    alike = kind.prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
    return plain and known and alike and all(type(layer) in LAYERS for layer in _nothing_read(lm).layers)


def joins_rows(lm: PreTrainedModel) -> bool:
    """Whether rows may be joined by rows that are read later: those that remember all, whose places are their own."""
    return not lm.config.is_encoder_decoder and all(type(layer) is DynamicLayer for layer in _nothing_read(lm).layers)


class Decoding(NamedTuple):
    """How batches are decoded."""

    module: Policy
    config: GenerationConfig
    device: torch.device
    on_some_rank: Callable[[bool], bool] | None  # whether a flag is set on any; None: ranks need not keep step


class Spoken:
    """Requests that are read together, and what their rows have said."""

    def __init__(self, how: Decoding, number: int, requests: Sequence[Request], sampler: RowSampler | None):
        """`sampler` draws for as many rows of each request as it has temperatures; None: the likeliest, for one row."""
        self.number, self.requests, self.sampler = number, requests, sampler
        self.copies = [1 if sampler is None else len(request.temperatures) for request in requests]
        shape = sum(self.copies), how.config.max_new_tokens
        self.ids = torch.full(shape, how.config.pad_token_id, device=how.device)  # what follows an end means nothing
        self.rows = torch.arange(len(self.ids), device=how.device)  # those that go on
        self.steps = 0

    def say(self, scores: Tensor) -> Tensor:
        """(B,): the next token of each row that goes on, by its scores (B, V)."""
        tokens = scores.argmax(-1) if self.sampler is None else self.sampler.draw(scores)
        self.ids[self.rows, self.steps] = tokens
        self.steps += 1
        return tokens

    def keep(self, places: Tensor) -> None:
        """Only the rows at these places, of those that go on, go on."""
        self.rows = self.rows[places]
        if self.sampler is not None:
            self.sampler.keep(places)


@dataclass(frozen=True)
class Remembered:
    """What the model remembers of the rows that go on."""

    mask: Tensor  # (B, L) long, of what was read: of a causal model's prompt and response, or of an encoder's prompt
    states: Tensor | None  # (B, L, H) of an encoder
    cache: DynamicCache | EncoderDecoderCache

    def kept(self, places: Tensor) -> Remembered:
        """Only the rows at these places, one or more times each; the cache is changed in place."""
        self.cache.batch_select_indices(places)
        states = None if self.states is None else self.states[places]
        return Remembered(self.mask[places], states, self.cache)._trimmed()

    def joined(self, other: Remembered) -> Remembered:
        """With the rows of `other` below."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        for layer, new in zip(self.cache.layers, other.cache.layers, strict=True):
            layer.join(new, width)
        mask = torch.cat([pad_left(one.mask, width, dim=1) for one in (self, other)])
        return Remembered(mask, None, self.cache)._trimmed()

    def _trimmed(self) -> Remembered:
        """Without what is padding in all rows, where it can be left off."""
        if self.states is not None or not all(isinstance(layer, RoomyLayer) for layer in self.cache.layers):
            return self
        spare = int(self.mask.any(0).int().argmax()) if len(self.mask) else 0
        for layer in self.cache.layers:
            layer.leave_off(spare)
        return replace(self, mask=self.mask[:, spare:])


def decode(how: Decoding, batches: Iterator[Spoken], room: int) -> Iterator[Spoken]:
    """Each batch when all its rows have ended.

    A batch is read as soon as it finds place among the `room` rows that there may be: see `joins_rows`, and give one
    alone otherwise. So do ranks that keep step: they make as many forwards as that which needs most.
    """
    lm, stops = hugging_face(how.module.model), torch.tensor(how.config.eos_token_id, device=how.device)
    on_some_rank, unspoken = how.on_some_rank or bool, _unspoken(how)
    coming, spoken = next(batches, None), []
    read, logits, ended = None, None, torch.zeros(0, dtype=torch.bool, device=how.device)
    while coming is not None or spoken:
        while coming is not None and (not spoken or len(ended) + len(coming.rows) <= room):
            new, first = _begun(how, coming)
            read, logits = (read.joined(new), torch.cat([logits, first])) if spoken else (new, first)
            ended = torch.cat([ended, torch.zeros_like(coming.rows, dtype=torch.bool)])
            spoken, coming = [*spoken, coming], next(batches, None)
        sizes = [len(one.rows) for one in spoken]
        parts = zip(spoken, unspoken(None, logits).split(sizes), strict=True)
        tokens = torch.cat([one.say(scores) for one, scores in parts])
        ended = ended | torch.isin(tokens, stops)
        full = [one.steps == how.config.max_new_tokens for one in spoken]
        if any(full):
            ended = torch.cat([some | of_it for some, of_it in zip(ended.split(sizes), full, strict=True)])
        left = len(ended) - int(ended.sum())
        if not on_some_rank(left > 0 or coming is not None):
            yield from spoken
            return
        idle = left == 0 and coming is None  # one row stays, to keep step with other ranks
        if len(ended) - left - idle >= ENDED * len(ended) or any(full):
            stay = ~ended
            stay[0] |= idle
            spoken, done = _let_go(spoken, stay)
            yield from done
            tokens, ended = tokens[stay], ended[stay]
            read = read.kept(stay.nonzero()[:, 0]) if spoken else None
        if spoken:
            read, logits = _after(lm, read, tokens)


def _let_go(spoken: Sequence[Spoken], stay: Tensor) -> tuple[list[Spoken], list[Spoken]]:
    """Those of whose rows some stay, where `stay` (B,) is of the rows of all of them; and those that have ended."""
    for one, some in zip(spoken, stay.split([len(one.rows) for one in spoken]), strict=True):
        one.keep(some.nonzero()[:, 0])
    return [one for one in spoken if len(one.rows)], [one for one in spoken if not len(one.rows)]


def _unspoken(how: Decoding) -> LogitsProcessorList:
    """What makes tokens impossible that are never said."""
    suppressed = how.config.suppress_tokens
    made = [SuppressTokensLogitsProcessor(suppressed, device=how.device)] if suppressed else []
    return LogitsProcessorList(made)


def _begun(how: Decoding, batch: Spoken) -> tuple[Remembered, Tensor]:
    """All rows of a batch, and the logits (B, V) of the first token of each; every distinct prompt is read once."""
    module, device = how.module, how.device
    lm, prompts = hugging_face(module.model), list(dict.fromkeys(request.prompt_ids for request in batch.requests))
    side = "right" if module.encoder_decoder else "left"
    ids, mask = (one.to(device) for one in pad(prompts, how.config.pad_token_id, side=side))
    mask, cache, states = mask.long(), _nothing_read(lm), None
    room = min(ROOM, how.config.max_new_tokens)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if module.encoder_decoder:
        states = lm.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        ids = torch.tensor([module.start_ids] * len(prompts), device=device)
        cache = EncoderDecoderCache(cache, _nothing_read(lm))
    read = Remembered(mask, states, cache)
    logits = _logits(lm, read, ids)
    assert cache.get_seq_length() == ids.shape[1], f"{type(lm).__name__} remembers {cache.get_seq_length()} tokens"
    places = {prompt: place for place, prompt in enumerate(prompts)}
    copied = zip(batch.requests, batch.copies, strict=True)
    owners = torch.tensor([places[request.prompt_ids] for request, k in copied for _ in range(k)], device=device)
    return read.kept(owners), logits[owners]


def _after(lm: PreTrainedModel, read: Remembered, tokens: Tensor) -> tuple[Remembered, Tensor]:
    """`read` with `tokens` (B,), and the logits (B, V) of what follows them."""
    if read.states is None:
        read = replace(read, mask=torch.cat([read.mask, read.mask.new_ones(len(tokens), 1)], dim=1))
    return read, _logits(lm, read, tokens[:, None])


def _logits(lm: PreTrainedModel, read: Remembered, ids: Tensor) -> Tensor:
    """(B, V) float32: what follows `ids` (B, n), the last that `read` masks, which the cache does not know yet."""
    asked = inspect.signature(lm.forward).parameters
    inputs = {"logits_to_keep": 1} if "logits_to_keep" in asked else {}
    if read.states is not None:
        encoded = BaseModelOutput(last_hidden_state=read.states)
        inputs |= {"decoder_input_ids": ids, "encoder_outputs": encoded}
    else:
        inputs["input_ids"] = ids
        if "position_ids" in asked:
            inputs["position_ids"] = (read.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    out = lm(**inputs, attention_mask=read.mask, past_key_values=read.cache, use_cache=True, return_dict=True)
    return out.logits[:, -1].float()


def _nothing_read(lm: PreTrainedModel) -> DynamicCache:
    """Where the layers of a decoder will keep keys and values."""
    return DynamicCache(config=lm.config.get_text_config(decoder=True))


def pad_left(x: Tensor, width: int, dim: int) -> Tensor:
    """`x` with zeros before it, `width` long in `dim`."""
    shape = list(x.shape)
    shape[dim] = width - x.shape[dim]
    return torch.cat([x.new_zeros(shape), x], dim=dim)


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer in memory that has room for some tokens more: they are not copied for every one."""

    whole: tuple[Tensor, Tensor]  # (B, heads, T, D) each; `keys` and `values` are the first places of them

    def __init__(self, room: int):
        """`room`: for how many tokens at a time."""
        super().__init__()
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, with those of the new tokens."""
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.whole = key_states, value_states  # a prompt's, which its rows will copy
        elif end > self.whole[0].shape[2]:
            self._give_room(end)
        if start > 0:
            for whole, new in zip(self.whole, (key_states, value_states), strict=True):
                whole[:, :, start:end] = new
        self.keys, self.values = (whole[:, :, :end] for whole in self.whole)
        return self.keys, self.values

    def _give_room(self, end: int) -> None:
        more = end + self.room - self.get_seq_length()
        self.whole = tuple(
            torch.cat([one, one.new_empty(*one.shape[:2], more, one.shape[3])], dim=2)
            for one in (self.keys, self.values)
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the rows at `indices`, one or more times each."""
        end = self.get_seq_length()
        self.whole = tuple(one.index_select(0, indices) for one in self.whole)
        self.keys, self.values = (whole[:, :, :end] for whole in self.whole)

    def join(self, other: RoomyLayer, width: int) -> None:
        """Put the rows of `other` below, all `width` tokens long."""
        both = zip((self.keys, self.values), (other.keys, other.values), strict=True)
        self.whole = self.keys, self.values = tuple(torch.cat([pad_left(x, width, 2) for x in pair]) for pair in both)

    def leave_off(self, spare: int) -> None:
        """Forget the first `spare` tokens of all rows."""
        self.whole = tuple(one[:, :, spare:] for one in self.whole)
        self.keys, self.values = self.keys[:, :, spare:], self.values[:, :, spare:]
