"""Adapters as products of two matrices per layer: read from peft's layers, added up.

The sum of two products is one whose ranks add up: B1 A1 + B2 A2 = [B1 B2] [A1; A2].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

Factors = dict[str, tuple[Tensor, Tensor]]  # layer -> A (r, in) and B (out, r), which holds the scale; float32


def factors_of(model: PeftModel, state: Mapping[str, Tensor], adapter: str) -> Factors:
    """The matrices of an adapter, by the names of their layers in `model`; `state` holds the weights."""
    found: Factors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter in layer.scaling:
            kind, end = ("lora_embedding_", "") if adapter in layer.lora_embedding_A else ("lora_", ".weight")
            down, up = (state[f"{name}.{kind}{side}.{adapter}{end}"].detach().float() for side in "AB")
            found[name] = down, up * layer.scaling[adapter]
    return found


def joined(first: Factors, second: Factors) -> Factors:
    """The sum of both, as products of matrices whose ranks add up."""
    both = {name: (first[name], second[name]) for name in first.keys() & second.keys()}
    sums = {name: (torch.cat([a1, a2]), torch.cat([b1, b2], dim=1)) for name, ((a1, b1), (a2, b2)) in both.items()}
    return {**first, **second, **sums}


def uniform(factors: Factors) -> Factors:
    """The same products at the largest of their ranks, filled up with zeros: every loader of adapters reads these."""
    rank = max((len(down) for down, _ in factors.values()), default=0)
    room = {name: rank - len(down) for name, (down, _) in factors.items()}
    pad = nn.functional.pad
    return {name: (pad(a, (0, 0, 0, room[name])), pad(b, (0, room[name]))) for name, (a, b) in factors.items()}


def placed(factors: Factors, model: PreTrainedModel) -> Factors:
    """`factors` by the full names of their layers in `model`; a language model's head has no place in a classifier."""
    modules = {name for name, _ in model.named_modules()}
    full = {name: f"{model.base_model_prefix}.{name}" for name in factors}
    full = {name: long if long in modules else name for name, long in full.items()}
    return {full[name]: pair for name, pair in factors.items() if full[name] in modules}
