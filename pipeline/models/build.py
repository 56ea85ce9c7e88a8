"""The parts of a model: its tokenizer behind template and limits, and the policy or reward model as a module."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from pipeline.config.deepspeed import read_ds_config
from pipeline.config.schema import Training, WithModel
from pipeline.config.sections import ModelSettings, TrainSettings
from pipeline.data.batching import Packing, collate
from pipeline.data.tokenization import Encoder
from pipeline.errors import UserError
from pipeline.models import checks, loading, tokenizers
from pipeline.models.late import Late
from pipeline.models.policy import Policy, RewardModel
from pipeline.models.start_check import check_config, check_end_to_end, check_policy
from pipeline.models.trained_input import template_for
from pipeline.records import Item, Row

logger = logging.getLogger("tiffin")

CHECKED = ("a", "some of the words that a model reads")  # of different lengths, so that one is padded


def encoder_of(
    settings: WithModel,
    model: ModelSettings,
    texts: Callable[[], list[str]],
    mask: bool = False,
    scalar: bool = False,
) -> Encoder:
    """The tokenizer of `model`, or one made from `texts()` for a new one, behind its template and the stage's limits.

    `mask`: with a mask token, one that the vocabulary has to spare, or a new one; `scalar`: with a pad token that ends
    no text.
    """
    tokenizer = tokenizers.load_tokenizer(model, texts() if model.path is None else [], mask, scalar)
    data, encoder_decoder = settings.data, loading.load_config(model, tokenizer).is_encoder_decoder
    lengths = data.max_prompt_length, data.max_response_length
    return Encoder(tokenizer, template_for(settings, model, tokenizer), *lengths, data.keep_of_prompt, encoder_decoder)


def policy_module(
    model: ModelSettings,
    encoder: Encoder,
    train: TrainSettings,
    max_response: int,
    seed: int,
    mask: bool = False,
    frozen: bool = False,
) -> Policy:
    """The policy as a module, checked once against the model's own forward; under ZeRO-3 by whoever has cut it.

    `mask`: it reads the mask token; `frozen`: it is not trained.
    """
    late = late_of(train)
    lm = loading.load_policy(model, encoder.tokenizer, seed, weight_type(train), mask, frozen, late)
    checks.check_positions(loading.hugging_face(lm), encoder.max_prompt_length, max_response, whole=False)
    limit = train.max_tokens if train.max_tokens is not None else train.micro_batch_size * max_response
    policy = Policy(lm, limit, late)
    choose_reading(policy, train)
    check_config(loading.hugging_face(lm))
    if late is None:
        start_check(policy, encoder, max_response)
    enable_checkpointing(lm, train)
    return policy


def start_check(policy: Policy, encoder: Encoder, max_response: int) -> None:
    """Hold the policy against the model's own forward, see `check_policy`. All ranks make the same calls."""
    prompts = [tuple(encoder.encode_prompt(text)[0]) for text in CHECKED]
    response = (*prompts[-1][-2:], encoder.eos_id)[-max_response:]
    apart = Packing(len(prompts), None, policy.encoder_decoder, encoder.pad_id)
    items = [Item(None, (Row(ids, response),)) for ids in prompts]
    check_end_to_end(policy, encoder.max_prompt_length + max_response)
    check_policy(policy, collate(items, range(len(items)), apart), encoder.pad_id)


def reward_module(model: ModelSettings, encoder: Encoder, train: TrainSettings, seed: int) -> RewardModel:
    """A reward model to train; a checkpoint without a scalar head gets a fresh one."""
    late = late_of(train)
    scalar = loading.load_scalar(model, encoder.tokenizer, seed, new_head=True, dtype=weight_type(train), late=late)
    lm = loading.hugging_face(scalar)
    checks.check_positions(lm, encoder.max_prompt_length, encoder.max_response_length, whole=True)
    scorer = RewardModel(scalar, late)
    choose_reading(scorer, train)
    if late is None:
        check_end_to_end(scorer, encoder.max_prompt_length + encoder.max_response_length)
    enable_checkpointing(scalar, train)
    return scorer


def choose_reading(module: Policy | RewardModel, train: TrainSettings) -> None:
    """Rows end to end, where `train` and the model allow it; says so where the model does not."""
    lm = loading.hugging_face(module.model)
    causal = isinstance(module, Policy) and not module.encoder_decoder
    if train.padding_free and causal and not module.unpadded:
        why = f"its layers, or attn_implementation={lm.config._attn_implementation}, ask for it"
        logger.info(f"{type(lm).__name__} reads rows with padding: {why}")
    module.unpadded = module.unpadded and train.padding_free


def late_of(train: TrainSettings) -> Late | None:
    """Under ZeRO-3, what is to be done to weights when they are cut."""
    stage = read_ds_config(train.zero)["zero_optimization"]["stage"]
    return Late(weight_type(train)) if stage == 3 else None


def weight_type(train: TrainSettings) -> torch.dtype:
    """The type weights are read in: half the memory under bf16; DeepSpeed keeps the float32 master it trains."""
    return torch.bfloat16 if train.precision == "bf16" else torch.float32


def saved_type(settings: Training, start: ModelSettings, encoder: Encoder) -> torch.dtype | None:
    """The type that all weights are saved in, where it is not that of training, after a word on what it costs."""
    if start.lora.r:
        return None
    if start.save_dtype is not None:
        dtype = getattr(torch, start.save_dtype)
        lost = f"less than {torch.finfo(dtype).eps / 2:.2%} of a weight may be rounded away in what is saved"
        logger.info(f"model.save_dtype: {start.save_dtype}: changes of {lost}, and whoever opens it reads that")
        return dtype
    came = None if start.path is None else loading.load_config(start, encoder.tokenizer).dtype
    if weight_type(settings.train) == torch.float32 and came in (torch.bfloat16, torch.float16):
        kind = str(came).removeprefix("torch.")
        cure = f"model.save_dtype={kind} halves that, and rounds small changes away"
        logger.info(f"model: comes in {kind}, trained and saved in float32, twice the bytes: {cure}")
    return None


def enable_checkpointing(model: Any, train: TrainSettings) -> None:
    """Recompute activations in backward if requested; under LoRA the inputs must carry gradients for it."""
    if train.gradient_checkpointing:
        if not loading.hugging_face(model).supports_gradient_checkpointing:
            problem = f"{type(loading.hugging_face(model)).__name__} has none, wanted false"
            raise UserError(f"train.gradient_checkpointing: {problem}")
        loading.hugging_face(model).gradient_checkpointing_enable({"use_reentrant": False})
        loading.hugging_face(model).enable_input_require_grads()
