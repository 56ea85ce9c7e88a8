"""The shape of a model of which only the number of weights is known: a Llama as wide as published models of that size.

The widths lie between those of SmolLM2, Qwen 2.5 and 3, Llama 3, Mistral and their like. Layers are as many as the
weights then make, with a feed-forward of 3.5 widths and keys of a quarter, as in Llama 3.
"""

from __future__ import annotations

import math

from transformers import LlamaConfig

WIDTHS = (  # weights -> hidden size; between two of them a straight line of logarithms
    (1e8, 512),
    (5e8, 960),
    (1.3e9, 1792),
    (3.3e9, 2560),
    (8e9, 4096),
    (1.5e10, 5120),
    (3e10, 5376),
    (7e10, 8192),
    (4e11, 16384),
)
HEAD = 64  # the width of a head; hidden sizes are multiples of two
MOST_KEYS = 1024  # numbers in a key, at any width
SMALL, VOCABULARY = (4e8, 49_152), 128_256  # fewer weights have the smaller vocabulary
TIED = 5e9  # fewer weights use one matrix for the first and the last layer


def typical_config(parameters: float) -> LlamaConfig:
    """A Llama of about `parameters` weights, at least one layer."""
    hidden = _multiple(_width(parameters), 2 * HEAD)
    inner, keys = _multiple(3.5 * hidden, 2 * HEAD), _multiple(min(hidden / 4, MOST_KEYS), HEAD)
    vocabulary, tied = SMALL[1] if parameters < SMALL[0] else VOCABULARY, parameters < TIED
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner  # q, o; k, v; gate, up, down
    layers = (parameters - vocabulary * hidden * (1 if tied else 2)) / layer
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=max(1, round(layers)),
        num_attention_heads=hidden // HEAD,
        num_key_value_heads=keys // HEAD,
        tie_word_embeddings=tied,
    )


def _width(parameters: float) -> float:
    """The hidden size between the two neighbours in WIDTHS, or on the line through the first or the last two."""
    place = sum(parameters >= size for size, _ in WIDTHS[1:-1])
    (low, narrow), (high, wide) = WIDTHS[place : place + 2]
    share = math.log(parameters / low) / math.log(high / low)
    return narrow * (wide / narrow) ** share


def _multiple(number: float, of: int) -> int:
    return max(1, round(number / of)) * of
