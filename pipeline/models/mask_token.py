"""The [MASK] symbol: which token it is, its embedding, and its suppression.

It stands in the prefix for a masked token (shared with every such token), so it is read and never generated.
Source: Chen et al., ICML 2023, with BART's `<mask>`, T5's `<extra_id_0>` and Pegasus' `<mask_2>`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import UserError
from pipeline.models.scratch import MULTIPLE

MASK = "<mask>"  # what is added where a vocabulary has nothing to spare
HOLES = ("<extra_id_0>", "<mask_2>")  # seen in pretraining as a hole in the text: what was learned stays
RESERVED = (  # kept free by those who made the vocabulary, never seen in pretraining
    "<|reserved_special_token_0|>",
    "<|extra_id_0|>",
    "<|placeholder1|>",
    "<unused0>",
    "[unused0]",
    "[control_8]",
    "<SPECIAL_20>",
)


def with_mask(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with a mask token: its own, else one that its vocabulary has to spare, else a new last one."""
    taken = {tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token}
    if tokenizer.mask_token is not None and tokenizer.mask_token not in taken:
        return tokenizer
    vocabulary = tokenizer.get_vocab()
    spare = (name for name in (*HOLES, *RESERVED, MASK) if name in vocabulary and name not in taken)
    name = next(spare, MASK)
    tokenizer.add_special_tokens({"mask_token": AddedToken(name, special=True, normalized=False)})
    return tokenizer


def give_row(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, known: bool) -> None:
    """Make sure that `model` has an embedding for the mask: the mean of the others where it learned none.

    The matrices grow by the mask alone, to a multiple of 64; a row that is there already, but means nothing, is
    overwritten in the input matrix. All other rows stay as they are. `known`: the checkpoint's own tokenizer has the
    same mask token. Raises UserError where encoder and decoder do not share the embeddings.
    """
    check_shared(model)
    weight, mask = model.get_input_embeddings().weight, tokenizer.mask_token_id
    rows = weight.shape[0]
    others = sorted({*tokenizer.get_vocab().values()} - {mask})
    if others[-1] >= rows:
        return  # another model's tokenizer, whatever the mask: `check_vocabulary` says so
    if mask >= rows:
        grow(model, mask + 1)
    elif not known and tokenizer.mask_token not in HOLES:
        weight.data[mask] = mean_row(weight.data[others])


def lacks_row(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether all that `model` lacks of `tokenizer` is its own mask token, as in BART's checkpoints for summaries."""
    return tokenizer.mask_token_id == model.get_input_embeddings().weight.shape[0] == len(tokenizer) - 1


def grow(model: PreTrainedModel, wanted: int) -> None:
    """Give `model` at least `wanted` embeddings, a multiple of 64; each new one is the mean of the old ones."""
    rows, bias = model.get_input_embeddings().weight.shape[0], logits_bias(model)
    model.resize_token_embeddings(wanted, pad_to_multiple_of=MULTIPLE, mean_resizing=False)
    head = model.get_output_embeddings()  # None of a classifier
    for tensor in (model.get_input_embeddings().weight, *(() if head is None else (head.weight, head.bias))):
        if tensor is not None:
            tensor.data[rows:] = mean_row(tensor.data[:rows])
    if bias is not None:  # resized with zeros, in float32 whatever it was; Marian's not to the multiple
        new = mean_row(bias[0]).expand(head.weight.shape[0] - rows)
        model.final_logits_bias = nn.Buffer(torch.cat([bias[0], new])[None])


def grow_for(model: PreTrainedModel, tokens: Sequence[int]) -> bool:
    """Give `model` embeddings for `tokens`, that adapters were trained with; whether some were lacking."""
    wanted = max((index + 1 for index in tokens), default=0)
    if lacking := wanted > model.get_input_embeddings().weight.shape[0]:
        grow(model, wanted)
    return lacking


def mean_row(rows: Tensor) -> Tensor:
    """The mean over the first dimension, summed in float64, in the type of `rows`."""
    return rows.double().mean(0).to(rows.dtype)


def logits_bias(model: PreTrainedModel) -> Tensor | None:
    """What BART and its kin add to their logits, (1, V)."""
    return dict(model.named_buffers()).get("final_logits_bias")


def check_shared(model: PreTrainedModel) -> None:
    """Raises UserError where encoder and decoder read with other embeddings than `get_input_embeddings` gives."""
    if not model.config.is_encoder_decoder:
        return
    shared = model.get_input_embeddings().weight
    for part in (model.get_encoder(), model.get_decoder()):
        if part.get_input_embeddings().weight is not shared:
            problem = "reads and writes with separate embeddings, wanted shared ones for the mask token"
            raise UserError(f"model.path: {model.name_or_path} {problem}: name another model")


def suppressed_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[int]:
    """The ids that must never be generated where there is a mask token: its own, and rows that belong to no token."""
    if tokenizer.mask_token_id is None:
        return []
    rows = range(model.config.get_text_config().vocab_size)
    return sorted({*rows} - {*tokenizer.get_vocab().values()} | {tokenizer.mask_token_id})
