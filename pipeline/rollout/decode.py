"""Decoding that stops paying for responses that have ended: their rows leave the batch.

transformers' generate() decodes every row until the longest of the batch ends, and reads a prompt once for each of its
responses. Here a prompt is read once, and what the model remembers of it is then given to each of its rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
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

from pipeline.config.sections import GenerationSettings
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


@dataclass(frozen=True)
class Going:
    """The rows that go on, and what the model remembers of them."""

    rows: Tensor  # (B,) which they are, of all
    mask: Tensor  # (B, P + T) long, of a causal model's prompt and responses; (B, P) of an encoder's prompt
    positions: Tensor  # as `mask`; read by causal models
    states: Tensor | None  # (B, P, H) of an encoder
    cache: DynamicCache | EncoderDecoderCache

    def kept(self, places: Tensor) -> Going:
        """Only the rows at these places, one or more times each; the cache is changed in place."""
        self.cache.batch_select_indices(places)
        states = None if self.states is None else self.states[places]
        return Going(self.rows[places], self.mask[places], self.positions[places], states, self.cache)


class Decoding(NamedTuple):
    """How batches are decoded."""

    module: Policy
    config: GenerationConfig
    device: torch.device
    on_some_rank: Callable[[bool], bool] | None  # whether a flag is set on any; None: ranks need not keep step


def decode(how: Decoding, requests: Sequence[Request], copies: Sequence[int], sampler: RowSampler | None) -> Tensor:
    """(B, T) ids of `copies` responses to each request, by `sampler`, or greedily; what follows an end means nothing.

    Ranks that keep step make as many forwards as that which needs most.
    """
    lm, config, device = hugging_face(how.module.model), how.config, how.device
    on_some_rank = how.on_some_rank or bool
    unspoken = LogitsProcessorList()
    if config.suppress_tokens:
        unspoken.append(SuppressTokensLogitsProcessor(config.suppress_tokens, device=device))
    stops = torch.tensor(config.eos_token_id, device=device)
    going, logits = _begun(how, requests, copies)
    said = torch.full((len(going.rows), config.max_new_tokens), config.pad_token_id, device=device)
    ended = torch.zeros(len(said), dtype=torch.bool, device=device)
    for step in range(config.max_new_tokens):
        scores = unspoken(None, logits)
        tokens = scores.argmax(-1) if sampler is None else sampler.draw(scores)
        said[going.rows, step] = tokens
        ended = ended | torch.isin(tokens, stops)
        left = len(ended) - int(ended.sum())
        if step + 1 == config.max_new_tokens or not on_some_rank(left > 0):
            break
        if len(ended) - max(1, left) >= ENDED * len(ended):  # one stays, to keep step with other ranks
            places = (~ended).nonzero()[:, 0] if left else ended.nonzero()[:1, 0]
            going, tokens, ended = going.kept(places), tokens[places], ended[places]
            if sampler is not None:
                sampler.keep(places)
        logits = _logits(lm, going, tokens[:, None])
    return said


def _begun(how: Decoding, requests: Sequence[Request], copies: Sequence[int]) -> tuple[Going, Tensor]:
    """All rows, and the logits (B, V) of the first token of each; every distinct prompt is read once."""
    module, config, device = how.module, how.config, how.device
    lm, prompts = hugging_face(module.model), list(dict.fromkeys(request.prompt_ids for request in requests))
    side = "right" if module.encoder_decoder else "left"
    ids, mask = (one.to(device) for one in pad(prompts, config.pad_token_id, side=side))
    mask, cache, states = mask.long(), _nothing_read(lm), None
    most = config.max_new_tokens + (len(module.start_ids) if module.encoder_decoder else ids.shape[1])
    cache.layers = [RoomyLayer(most) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if module.encoder_decoder:
        states = lm.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        ids = torch.tensor([module.start_ids] * len(prompts), device=device)
        cache = EncoderDecoderCache(cache, _nothing_read(lm))
    else:
        mask = torch.cat([mask, mask.new_ones(len(prompts), config.max_new_tokens)], dim=1)
    once = torch.arange(len(prompts), device=device)
    going = Going(once, mask, (mask.cumsum(1) - 1).clamp(min=0), states, cache)
    logits = _logits(lm, going, ids)
    assert cache.get_seq_length() == ids.shape[1], f"{type(lm).__name__} remembers {cache.get_seq_length()} tokens"
    places = {prompt: place for place, prompt in enumerate(prompts)}
    owners = [places[request.prompt_ids] for request, k in zip(requests, copies, strict=True) for _ in range(k)]
    each = torch.tensor(owners, device=device)
    rows = torch.arange(len(owners), device=device)
    return replace(going.kept(each), rows=rows), logits[each]


def _logits(lm: PreTrainedModel, going: Going, ids: Tensor) -> Tensor:
    """(B, V) float32: what follows `ids` (B, n), which follow what was read before."""
    asked = inspect.signature(lm.forward).parameters
    inputs = {"logits_to_keep": 1} if "logits_to_keep" in asked else {}
    if going.states is not None:
        encoded = BaseModelOutput(last_hidden_state=going.states)
        inputs |= {"decoder_input_ids": ids, "encoder_outputs": encoded, "attention_mask": going.mask}
    else:
        start = going.cache.get_seq_length()
        end = start + ids.shape[1]
        inputs |= {"input_ids": ids, "attention_mask": going.mask[:, :end]}
        if "position_ids" in asked:
            inputs["position_ids"] = going.positions[:, start:end]
    return lm(**inputs, past_key_values=going.cache, use_cache=True, return_dict=True).logits[:, -1].float()


def _nothing_read(lm: PreTrainedModel) -> DynamicCache:
    """Where the layers of a decoder will keep keys and values."""
    return DynamicCache(config=lm.config.get_text_config(decoder=True))


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer in memory that has room for some tokens more: they are not copied for every one."""

    whole: tuple[Tensor, Tensor]  # (B, heads, T, D) each; `keys` and `values` are the first places of them

    def __init__(self, most: int):
        """`most`: tokens that there may be."""
        super().__init__()
        self.most = most

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
        more = max(end, min(end + ROOM, self.most)) - self.get_seq_length()
        self.whole = tuple(
            torch.cat([one, one.new_empty(*one.shape[:2], more, one.shape[3])], dim=2)
            for one in (self.keys, self.values)
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the rows at `indices`, one or more times each."""
        end = self.get_seq_length()
        self.whole = tuple(one.index_select(0, indices) for one in self.whole)
        self.keys, self.values = (whole[:, :, :end] for whole in self.whole)
