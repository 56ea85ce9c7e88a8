"""What a stage trains: tokenizer with limits, policy or reward model, how its rows are packed. Built once per stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pipeline.config.schema import Rl, Sft, WithModel
from pipeline.config.sections import ModelSettings, TrainSettings
from pipeline.data import vocabulary
from pipeline.data.batching import Packing, collate, packing_of
from pipeline.data.masking import Masker
from pipeline.data.tokenization import Encoder
from pipeline.models import checks, loading
from pipeline.models.policy import Policy, RewardModel, check_head
from pipeline.records import Item, Row


def encoder_of(
    settings: WithModel, model: ModelSettings, texts: Callable[[], list[str]], mask: bool = False
) -> Encoder:
    """The tokenizer of `model`, or one made from `texts()` for a new model, behind the stage's template and limits.

    `mask`: with a mask token, one that the vocabulary has to spare, or a new one.
    """
    tokenizer = loading.load_tokenizer(model, texts() if model.path is None else [], mask)
    data = settings.data
    return Encoder(tokenizer, settings.template, data.max_prompt_length, data.max_response_length, data.keep_of_prompt)


def build_policy(
    model: ModelSettings, encoder: Encoder, train: TrainSettings, max_response: int, seed: int, mask: bool = False
) -> Policy:
    """The policy as a module, checked once against the model's own forward; `mask`: it reads the mask token."""
    lm = loading.load_policy(model, encoder.tokenizer, seed, weight_type(train), mask)
    checks.check_positions(loading.hugging_face(lm).config, encoder.max_prompt_length, max_response, whole=False)
    limit = train.max_tokens if train.max_tokens is not None else train.micro_batch_size * max_response
    policy = Policy(lm, limit)
    row = Row(tuple(encoder.encode_prompt("a")[0]), (encoder.eos_id, encoder.eos_id))
    apart = Packing(1, None, policy.encoder_decoder, encoder.pad_id)
    check_head(policy, collate([Item(None, (row,))], [0], apart))
    enable_checkpointing(lm, train)
    return policy


def build_scalar(model: ModelSettings, encoder: Encoder, train: TrainSettings, seed: int) -> RewardModel:
    """A reward model to train; a checkpoint without a scalar head gets a fresh one."""
    scalar = loading.load_scalar(model, encoder.tokenizer, seed, new_head=True, dtype=weight_type(train))
    config = loading.hugging_face(scalar).config
    checks.check_positions(config, encoder.max_prompt_length, encoder.max_response_length, whole=True)
    enable_checkpointing(scalar, train)
    return RewardModel(scalar)


def weight_type(train: TrainSettings) -> torch.dtype:
    """The type weights are read in: half the memory under bf16; DeepSpeed keeps the float32 master it trains."""
    return torch.bfloat16 if train.precision == "bf16" else torch.float32


def enable_checkpointing(model: Any, train: TrainSettings) -> None:
    """Recompute activations in backward if asked for; under LoRA the inputs must carry gradients for it."""
    if train.gradient_checkpointing:
        loading.hugging_face(model).gradient_checkpointing_enable({"use_reentrant": False})
        loading.hugging_face(model).enable_input_require_grads()


def packing(train: TrainSettings, world: int, policy: Policy, encoder: Encoder) -> Packing:
    return packing_of(train, world, policy.encoder_decoder, encoder.pad_id)


def masked_packing(packing: Packing, encoder: Encoder, policy: Policy, settings: Sft | Rl, **more: Any) -> Packing:
    """`packing` for batches whose responses are partly masked, as `settings.masking` says; `more` is of `Masker`."""
    words = vocabulary.token_tables(encoder.tokenizer, policy.vocab_size)
    if settings.masking.span != "token":
        words.require_words()
    return replace(packing, masker=Masker(words, settings.masking, settings.seed, **more))
