"""Small models and tokenizers made from a task's own text, for when no checkpoint is given."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import BartConfig, LlamaConfig, PretrainedConfig, PreTrainedTokenizerBase, T5Config

from pipeline.config import together
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
    limits = {"vocab_size": learned, "limit_alphabet": learned // 2, "min_frequency": 2}
    trainer = BpeTrainer(**limits, special_tokens=list(SPECIAL), show_progress=False)
    trained.train_from_iterator(texts, trainer)
    # the ids of the learned pieces move up, to make room for the bytes
    model = json.loads(trained.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *BYTES, *pieces[len(SPECIAL) :]])}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token=UNK, byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = word_splitter()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    special = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNK}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def word_splitter() -> pre_tokenizers.PreTokenizer:
    """No piece crosses a blank, a line end or a punctuation mark."""
    lines, marks = pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Punctuation("isolated")
    return pre_tokenizers.Sequence([lines, marks, pre_tokenizers.Metaspace(prepend_scheme="never")])


def small_config(settings: ScratchSettings, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The configuration of a small Llama, T5 or BART for `tokenizer`.

    Raises UserError where the hidden size does not divide into the heads.
    """
    size, heads, layers = settings.hidden_size, settings.num_heads, settings.num_layers
    together.heads(settings)
    vocabulary = {
        "vocab_size": round_up(len(tokenizer), MULTIPLE),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    gated, limit = round_up(size * 8 / 3, 32), settings.max_position_embeddings  # a gated layer has 3 matrices, not 2
    if settings.shape == "llama":
        sizes = {"hidden_size": size, "intermediate_size": gated, "num_hidden_layers": layers}
        sizes |= {"num_attention_heads": heads, "max_position_embeddings": limit}
        return LlamaConfig(**sizes, **vocabulary, tie_word_embeddings=True)
    if settings.shape == "t5":
        sizes = {"d_model": size, "d_ff": gated, "d_kv": size // heads, "num_layers": layers, "num_heads": heads}
        start = tokenizer.pad_token_id
        return T5Config(**sizes, **vocabulary, feed_forward_proj="gated-gelu", decoder_start_token_id=start)
    sizes = {"d_model": size, "max_position_embeddings": limit}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": layers, f"{part}_attention_heads": heads, f"{part}_ffn_dim": 4 * size}
    return BartConfig(**sizes, **vocabulary, decoder_start_token_id=tokenizer.eos_token_id, forced_eos_token_id=None)


def round_up(value: float, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
