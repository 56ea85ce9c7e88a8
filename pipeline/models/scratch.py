"""Small models and tokenizers made from a task's own text, for when no checkpoint is given."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    BartConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
)

from pipeline.config.sections import ScratchSettings
from pipeline.errors import UserError

SPECIAL = PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
MULTIPLE = 64  # vocabulary sizes that tensor cores and tensor parallelism like


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-pair vocabulary of `texts` in SentencePiece's manner: a blank opens its word, bytes spell what is rare.

    No text is normalised: decoding gives back every character. `vocab_size` is an upper limit.
    """
    if not texts:
        raise UserError("data: no text to make a vocabulary from, wanted training rows")
    learned = vocab_size - len(BYTES)
    if learned <= len(SPECIAL):
        raise UserError(f"model.scratch.vocab_size: {vocab_size}, wanted over {len(BYTES) + len(SPECIAL)}, for bytes")
    trained = Tokenizer(BPE(unk_token=UNK))
    trained.pre_tokenizer = word_splitter()
    trainer = BpeTrainer(
        vocab_size=learned,
        special_tokens=list(SPECIAL),
        limit_alphabet=learned // 2,
        min_frequency=2,
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *BYTES, *pieces[len(SPECIAL) :]])}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=UNK, byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = word_splitter()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK
    )


def word_splitter() -> pre_tokenizers.PreTokenizer:
    """No piece crosses a blank, a line end or a punctuation mark."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="never"),
        ]
    )


def small_config(settings: ScratchSettings, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The configuration of a small Llama, T5 or BART for `tokenizer`.

    Raises:
        UserError: the hidden size does not divide into the heads.
    """
    hidden, heads, layers = settings.hidden_size, settings.num_heads, settings.num_layers
    if hidden % (2 * heads):
        raise UserError(f"model.scratch: hidden_size {hidden} is no multiple of twice num_heads {heads}: change one")
    shared = {
        "vocab_size": math.ceil(len(tokenizer) / MULTIPLE) * MULTIPLE,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if settings.shape == "llama":
        return LlamaConfig(
            hidden_size=hidden,
            intermediate_size=round_up(hidden * 8 / 3, 32),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=settings.max_position_embeddings,
            tie_word_embeddings=True,
            **shared,
        )
    if settings.shape == "t5":
        return T5Config(
            d_model=hidden,
            d_ff=round_up(hidden * 8 / 3, 32),
            d_kv=hidden // heads,
            num_layers=layers,
            num_heads=heads,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=tokenizer.pad_token_id,
            **shared,
        )
    return BartConfig(
        d_model=hidden,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * hidden,
        decoder_ffn_dim=4 * hidden,
        max_position_embeddings=settings.max_position_embeddings,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=None,
        **shared,
    )


def round_up(value: float, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
