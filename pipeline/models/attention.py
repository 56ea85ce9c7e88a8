"""Rows of a causal model laid end to end: one row of all their tokens, no padding, each prompt once.

What works token by token (matrices, norms, experts) then computes nothing but text, and reads a prompt once however
many responses follow it. A response stands at the places that follow its prompt, sees it and itself, and never the
other responses. Attention alone is computed in blocks: rows with a prompt of their own causally, without a mask where
the layer sees all that is before it and so by the fast kernel; the further responses, as queries alone, over their
prompt and themselves under a mask. What a layer sees (all, a window, a chunk) is the model's own rule, asked at these
places.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_outputs import BaseModelOutputWithPast

from pipeline.models.loading import body

VARLEN = ("flash_attention_2", "flash_attention_3")  # know by places that start anew where a row begins
KINDS = {"full_attention", "sliding_attention", "chunked_attention"}  # layers that read by a mask and places alone


class Laid(NamedTuple):
    """N rows of at most L tokens as one row of T: their own tokens one after the other, shared prompts left out."""

    ids: Tensor  # (1, T) int64
    places: Tensor  # (1, T) int64, of each token within its text
    at: Tensor  # (N, L) int64, where each token of each row is among the T; 0 for padding
    lengths: Tensor  # (N,) int64
    starts: Tensor  # (N,) int64, the first place of a row's own tokens: 0, or where its prompt ends
    own: Tensor  # (N,) bool, whose prompt is their own


class Blocks(NamedTuple):
    """What `attend` is given in a mask's place: which of the T tokens stand together, and what they see."""

    rows: Tensor  # (B, L) int64, of the rows that have their own prompt; 0 for padding
    rows_see: Tensor | None  # (L, L) additive; None: all that is before
    queries: Tensor  # (M, R) int64, of the further responses
    keys: Tensor  # (M, K) int64, their prompt and themselves
    queries_see: Tensor  # (M, 1, R, K) additive
    back: Tensor  # (T,) int64, where each token is among the B L + M R


def reads_end_to_end(lm: PreTrainedModel) -> bool:
    """Whether `lm` can be told of places and blocks: it takes its sdpa from transformers' table, where `attend` is now.

    Or its kernel is one for rows end to end, which shares no prompts. Not where a layer carries a state along, or picks
    keys of its own by the mask (DeepSeek's sparse attention), or counts places by itself. Decided by configuration
    alone, so that all ranks and steps read alike.
    """
    config = lm.config.get_text_config()
    named = config.to_dict()
    kernel = lm.config._attn_implementation
    if lm.config.is_encoder_decoder or kernel not in ("sdpa", *VARLEN) or not lm.is_backend_compatible():
        return False
    if lm._is_stateful or named.get("alibi") or "index_topk" in named or not KINDS.issuperset(kinds_of(named)):
        return False
    if "position_ids" not in inspect.signature(body(lm).forward).parameters:
        return False
    if kernel == "sdpa":
        AttentionInterface.register("sdpa", attend)
    return True


def shares_prompts(lm: PreTrainedModel) -> bool:
    """Whether a model that reads rows end to end can read one prompt for several of them."""
    return lm.config._attn_implementation == "sdpa"


def kinds_of(config: dict[str, Any]) -> set[str]:
    """The kinds of a model's layers; none where all are alike."""
    return set(config.get("layer_types") or ())


def lay(ids: Tensor, mask: Tensor, prompt_lengths: Tensor | None = None, owners: Tensor | None = None) -> Laid:
    """Right-padded rows end to end.

    Args:
        ids: (N, L) int64, prompt and response of each row; mask: (N, L) bool.
        prompt_lengths, owners: (N,) int64; each row's prompt is that of the row which `owners` names: itself, or one
            that names itself. None: each its own.
    """
    rows = torch.arange(len(ids), device=ids.device)
    place = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)  # (N, L)
    lengths = mask.sum(1)
    owners = rows if owners is None else owners
    own = owners == rows
    starts = torch.zeros_like(lengths) if prompt_lengths is None else torch.where(own, 0, prompt_lengths)
    new = mask & (place >= starts[:, None])
    ends = new.sum(1).cumsum(0)
    begins = ends - new.sum(1) - starts  # where a row's place 0 would be
    at = torch.where(place >= starts[:, None], begins[:, None], begins[owners][:, None]) + place
    return Laid(ids[new][None], place[new][None], torch.where(mask, at, 0), lengths, starts, own)


def blocks_of(laid: Laid, rule: Callable, dtype: torch.dtype) -> Blocks:
    """The blocks under a layer's rule: transformers' mask function of row, head, place of query and of key.

    Padding sees what is before it, so that there is no query without a key.
    """
    rows, (queries, keys, places) = laid.at[laid.own], further(laid)
    every = torch.arange(laid.at.shape[1], device=rows.device)
    zero = every.new_zeros(())
    sees = rule(zero, zero, places[:, :, None], every[: keys.shape[1]])  # (M, R, K)
    rows_see = None if rule is causal_mask_function else rule(zero, zero, every[:, None], every)
    if rows_see is not None and torch.equal(rows_see, torch.ones_like(rows_see).tril()):
        rows_see = None  # a window as long as the rows
    back = rows.new_empty(laid.ids.shape[1])
    spoken = torch.arange(queries.shape[1], device=rows.device) < (laid.lengths - laid.starts)[~laid.own][:, None]
    there = torch.cat([(every < laid.lengths[laid.own][:, None]).flatten(), spoken.flatten()])
    back[torch.cat([rows.flatten(), queries.flatten()])[there]] = there.nonzero()[:, 0]
    seen = None if rows_see is None else additive(rows_see, dtype)
    return Blocks(rows, seen, queries, keys, additive(sees, dtype)[:, None], back)


def further(laid: Laid) -> tuple[Tensor, Tensor, Tensor]:
    """Of the M rows that share another's prompt: where their R own tokens are, where all K are, and the R places."""
    at, starts, lengths = (x[~laid.own] for x in (laid.at, laid.starts, laid.lengths))
    longest, width = (int(x.max()) if len(at) else 0 for x in (lengths - starts, lengths))
    places = starts[:, None] + torch.arange(longest, device=at.device)
    return at.gather(1, places.clamp(max=at.shape[1] - 1)), at[:, :width], places


def read(lm: PreTrainedModel, laid: Laid, **options: Any) -> BaseModelOutputWithPast | None:
    """What the body of `lm` gives for the row: `last_hidden_state` is (1, T, H).

    None where the model makes its attention masks by itself, so that it was never told of the blocks.
    """
    if not shares_prompts(lm):
        return apart(lm, laid, **options)
    with told(laid) as asked:
        # a mask of ones: without one, transformers takes a place that does not follow for another text's beginning
        ones = torch.ones_like(laid.ids)
        read = body(lm)(input_ids=laid.ids, attention_mask=ones, position_ids=laid.places, use_cache=False, **options)
    return read if asked else None


def apart(lm: PreTrainedModel, laid: Laid, **options: Any) -> BaseModelOutputWithPast:
    """As `read`, of rows that share nothing: without a mask, transformers takes place 0 for the beginning of a row."""
    assert bool(laid.own.all()), "a kernel for rows end to end shares no prompts"
    return body(lm)(input_ids=laid.ids, position_ids=laid.places, use_cache=False, **options)


@contextmanager
def told(laid: Laid) -> Iterator[list[Callable]]:
    """While open, the masks that models make for sdpa are blocks of `laid`; yields the rules of those that were."""
    asked: list[Callable] = []

    def mask(*, mask_function: Callable, dtype: torch.dtype, **given: Any) -> Blocks:
        asked.append(mask_function)
        return blocks_of(laid, mask_function, dtype)

    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = mask
    try:
        yield asked
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | Blocks | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa; where it is given blocks instead of a mask, block by block.

    Args:
        query, key, value: (1, heads, T, size each).

    Returns:
        (1, T, heads, size of value), and None for the weights.
    """
    if not isinstance(attention_mask, Blocks):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    blocks = attention_mask
    taken = [together(x, blocks.rows) for x in (query, key, value)]
    rows, _ = sdpa_attention_forward(module, *taken, blocks.rows_see, **kwargs)  # (B, L, heads, size)
    found = [rows.flatten(0, 1)]
    if blocks.queries.numel():
        taken = [together(query, blocks.queries), together(key, blocks.keys), together(value, blocks.keys)]
        others, _ = sdpa_attention_forward(module, *taken, blocks.queries_see, **kwargs)
        found.append(others.flatten(0, 1))
    return torch.cat(found).flatten(1).index_select(0, blocks.back).unflatten(1, rows.shape[2:])[None], None


def together(x: Tensor, at: Tensor) -> Tensor:
    """(B, heads, L, size): of x (1, heads, T, size) the tokens at (B, L)."""
    tokens = x[0].transpose(0, 1).flatten(1)  # (T, heads size), as which they lie in memory
    return tokens.index_select(0, at.flatten()).view(*at.shape, x.shape[1], x.shape[3]).transpose(1, 2)


def additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """`sees`, bool, as what is added to scores: 0 where it is True, else the least number there is."""
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)
