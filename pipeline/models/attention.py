"""Two responses to one prompt in one row of a causal model: static response | prompt | response.

Both responses stand at the places that follow the prompt, and are blind to each other. What a layer sees of what is
before it (all, a window, a chunk) is the model's own rule, asked at these places.

Prompt and response are the end of the row, static response and prompt its beginning. Where the model takes
transformers' sdpa, layers that see all that is before them attend to these two pieces apart, the first without a mask
and so by the fast causal kernel. Others get one mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from pipeline.errors import UserError
from pipeline.models.loading import body

KERNELS = ("sdpa", "eager")  # whose masks may be any


def attends_apart(lm: PreTrainedModel) -> bool:
    """Whether `lm` understands the narrow mask: it takes its sdpa from transformers' table, where `attend` stands now.

    A layer that picks keys of its own by the mask (DeepSeek's sparse attention) does not.
    Decided by configuration alone, so that all ranks and steps read alike.
    """
    if lm.config.is_encoder_decoder or lm.config._attn_implementation != "sdpa" or not lm.is_backend_compatible():
        return False
    if "index_topk" in lm.config.get_text_config().to_dict():
        return False
    AttentionInterface.register("sdpa", attend)
    return True


def check_shareable(lm: PreTrainedModel) -> None:
    """Raises UserError where `lm` has no way to be told of places and masks, or reads by more than these."""
    kernel, cure = lm.config._attn_implementation, "set share_prompt=false"
    if lm._is_stateful or lm.config.to_dict().get("alibi"):
        what = "a state of all that is before it" if lm._is_stateful else "ALiBi, which counts places by itself"
        raise UserError(f"share_prompt: {type(lm).__name__} reads by {what}, wanted attention by position_ids: {cure}")
    if "position_ids" not in inspect.signature(body(lm).forward).parameters:
        raise UserError(f"share_prompt: {type(lm).__name__} counts places by itself, wanted position_ids: {cure}")
    if kernel not in KERNELS:
        problem = f"attn_implementation={kernel} has no mask for two responses in one row"
        raise UserError(f"share_prompt: {problem}, wanted one of {', '.join(KERNELS)}: set it, or {cure}")


@contextmanager
def blind(lm: PreTrainedModel, prompt_lengths: Tensor, places: Tensor, width: int, apart: bool) -> Iterator[None]:
    """While open, the masks that `lm` makes for a row are those of two responses that are blind to each other.

    Args:
        places: (B, S + L), what `places` gives; width: S.
        apart: whether `attend` stands in the layers, so that the narrow mask will do where all is seen.

    Raises UserError where the model cannot be told of places and masks, or makes its masks by itself.
    """
    check_shareable(lm)
    kernel, prompts = lm.config._attn_implementation, int(prompt_lengths.max())
    own, asked = ALL_MASK_ATTENTION_FUNCTIONS[kernel], []
    sees = all_see(prompt_lengths, width, places.shape[1] - width)

    def mask(*, mask_function: Callable, dtype: torch.dtype, **given: Any) -> Tensor:
        asked.append(mask_function)
        if apart and mask_function is causal_mask_function:
            return additive(static_sees(prompt_lengths, width, prompts), dtype)

        def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            rule = mask_function(row, head, places[row, query], places[row, key])
            return rule & sees[row, query, key]

        return own(mask_function=seen, dtype=dtype, **{**given, "allow_is_causal_skip": False})

    ALL_MASK_ATTENTION_FUNCTIONS[kernel] = mask
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS[kernel]
    if not asked:
        problem = f"{type(lm).__name__} makes its attention masks by itself, wanted transformers' own"
        raise UserError(f"share_prompt: {problem}: set share_prompt=false")


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa; but with a mask of fewer keys than there are, which is no mask else, the two pieces apart.

    Args:
        query, key, value: (B, heads, S + L, head size).
        attention_mask: (B, 1, S, S + P) additive, of the first S queries and the first S + P keys, P < L: those of
            the static responses. The last L queries see the last L keys causally. Any other mask is sdpa's own.

    Returns:
        (B, S + L, heads, head size), and None for the weights.
    """
    if attention_mask is None or attention_mask.shape[-1] >= key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    first, seen = attention_mask.shape[-2:]
    static_queries, others = query.split([first, query.shape[2] - first], dim=2)
    (near_keys, keys), (near_values, values) = (Overlapping.apply(x, first, seen) for x in (key, value))
    static, _ = sdpa_attention_forward(module, static_queries, near_keys, near_values, attention_mask, **kwargs)
    response, _ = sdpa_attention_forward(module, others, keys, values, None, **kwargs)
    return torch.cat([static, response], dim=1), None


class Overlapping(torch.autograd.Function):
    """x (B, heads, N, size) -> its first `seen` and all after its first `first` tokens, which overlap.

    As two slices are, whose gradients would each be spread over N zeros and then added.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, first: int, seen: int) -> tuple[Tensor, Tensor]:
        ctx.sizes = first, seen
        return x[:, :, :seen], x[:, :, first:]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, beginning: Tensor, end: Tensor) -> tuple[Tensor, None, None]:
        first, seen = ctx.sizes
        gradient = torch.cat([beginning[:, :, :first], end], dim=2)
        gradient[:, :, first:seen] += beginning[:, :, first:]
        return gradient, None, None


def static_sees(prompt_lengths: Tensor, width: int, prompts: int) -> Tensor:
    """(B, width, width + prompts) bool: what each place of a static response sees, of its own and of the prompt.

    Padding sees what is before it, so that there is no row without a key.
    """
    device, count = prompt_lengths.device, len(prompt_lengths)
    own = torch.ones(width, width, dtype=torch.bool, device=device).tril().expand(count, -1, -1)
    prompt = torch.arange(prompts, device=device) < prompt_lengths[:, None]  # (B, prompts)
    return torch.cat([own, prompt[:, None].expand(-1, width, -1)], dim=2)


def all_see(prompt_lengths: Tensor, width: int, length: int) -> Tensor:
    """(B, width + length, width + length) bool: the same for the whole row, of which the last `length` are causal."""
    device, count = prompt_lengths.device, len(prompt_lengths)
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    others = torch.cat([causal.new_zeros(length, width), causal], dim=1).expand(count, -1, -1)
    return torch.cat([static_sees(prompt_lengths, width, length), others], dim=1)


def additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, Q, K) of `dtype`: 0 where `sees` (B, Q, K), else the least number there is."""
    mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    return mask.masked_fill(~sees, torch.finfo(dtype).min)[:, None]


def places(prompt_lengths: Tensor, static_mask: Tensor, length: int) -> Tensor:
    """(B, S + length) int64: the place of each token, were the responses read apart; 0 in the padding of the first.

    static_mask (B, S); a padded place could lie beyond the last one that a model has learned.
    """
    steps = torch.arange(max(static_mask.shape[1], length), device=static_mask.device)
    after = torch.where(static_mask, prompt_lengths[:, None] + steps[: static_mask.shape[1]], 0)
    return torch.cat([after, steps[:length].expand(len(after), -1)], dim=1)
