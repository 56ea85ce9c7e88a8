"""The tokenizer of a checkpoint, or of a new model, with the special tokens that training needs."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import transformers
from transformers import PreTrainedTokenizerBase

from pipeline.config.sections import ModelSettings
from pipeline.models import mask_token
from pipeline.models.checks import reading
from pipeline.models.place import check_files, reading_options
from pipeline.models.scratch import train_tokenizer
from pipeline.models.trained_input import with_own_chat_template

logger = logging.getLogger("tiffin")

PAD_NAMES = ("<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")


def load_tokenizer(
    settings: ModelSettings, texts: Sequence[str], mask: bool = False, scalar: bool = False
) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, with a pad token chosen if it has none; made from `texts` without a checkpoint.

    `mask`: the tokenizer shall have a mask token; `scalar`: it is a reward model's, see `with_pad_apart`.
    """
    if settings.path is None:
        tokenizer = train_tokenizer(texts, settings.scratch.vocab_size)
    else:
        tokenizer = with_pad(read_tokenizer(settings))
    if scalar:
        with_pad_apart(tokenizer)
    return mask_token.with_mask(tokenizer) if mask else tokenizer


def read_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer as it is."""
    check_files(settings.path)
    with reading(settings.path, "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(settings.path, **reading_options(settings))
    return with_own_chat_template(tokenizer, settings)


def with_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with a pad token that is in its vocabulary already, EOS only if nothing else is."""
    if tokenizer.pad_token_id is None:
        vocabulary = tokenizer.get_vocab()
        spare = (name for name in PAD_NAMES if name in vocabulary and name != tokenizer.eos_token)
        tokenizer.pad_token = next(spare, tokenizer.eos_token)
    return tokenizer


def with_pad_apart(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with a pad token that ends no text: one that its vocabulary has to spare, else a new last one.

    The classifiers of transformers take the last token that is no pad token for the end of a text. They know no
    positions but those from the left, so that it pads on the right.
    """
    tokenizer.padding_side = "right"
    if (old := tokenizer.pad_token) == tokenizer.eos_token:
        vocabulary = tokenizer.get_vocab()
        taken = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.mask_token}
        spare = (name for name in (*PAD_NAMES, *mask_token.RESERVED) if name in vocabulary and name not in taken)
        tokenizer.add_special_tokens({"pad_token": next(spare, PAD_NAMES[0])})
        problem = f"{old} ends texts and pads them, so that other tools would score texts without their end"
        logger.info(f"tokenizer: {problem}: {tokenizer.pad_token} pads")
    return tokenizer
