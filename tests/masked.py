"""Small things for tests of masked tokens: rows of words with static responses, a vocabulary, packings that mask."""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PegasusConfig, PegasusForConditionalGeneration, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from pipeline.config.schema import Masking
from pipeline.data.batching import Packing
from pipeline.data.masking import Masker
from pipeline.data.tokenization import Encoder
from pipeline.data.vocabulary import TokenTables, token_tables
from pipeline.models.mask_token import with_mask
from pipeline.models.policy import Policy
from pipeline.records import Batch, Example, Item, Row
from pipeline.rewards.rewards import Rewards, WeightedReward
from tests import tiny

SHAPES = (*tiny.SHAPES, "qwen2", "pegasus")


@cache
def encoder() -> Encoder:
    """That of `tiny`, with a mask token; rows V - 35 and on of the output matrix belong to no token."""
    return Encoder(with_mask(copy.deepcopy(tiny.tokenizer())), tiny.PLAIN, 64, 64)


@cache
def words() -> TokenTables:
    return token_tables(encoder().tokenizer, tiny.V)


def masking(**changes: Any) -> Masking:
    """Tokens drawn one by one, each with probability 0.4."""
    settings = {"rate": 0.4, "span": "token", "after_punctuation": True, **changes}
    return tiny.settings("rl", "algo=semi_offline").masking.model_copy(update=settings)


def sentence(rng: random.Random, longest: int) -> str:
    """1 to `longest` words, some followed by a mark."""
    return " ".join(rng.choice(tiny.WORDS) + rng.choice(["", "", "", ",", "."]) for _ in range(rng.randint(1, longest)))


def items(count: int, seed: int = 0, choices: int = 1, longest: int = 7) -> list[Item]:
    """Rows of prompts and references of up to `longest` words, each with `choices` static responses."""
    rng, made = random.Random(seed), []
    for i in range(count):
        prompt, reference, *others = (sentence(rng, longest) for _ in range(2 + choices))
        example = Example(f"row {i}", prompt, completion=reference, references=(reference,))
        rows = [encoder().encode(prompt, text) for text in (reference, *others)]
        made.append(Item(example, (rows[0],), static_rows=tuple(rows[1:])))
    return made


def packing(policy: Policy, samples: int, size: int | None = None, seed: int = 5, **changes: Any) -> Packing:
    """Micro-batches of `size` items, or one of all. `changes` are of `masking()`; `unpadded`: where the policy can."""
    policy.unpadded = policy.unpadded and changes.pop("unpadded", True)
    masker = Masker(words(), masking(**changes), seed, samples=samples)
    limit = {"micro_batch_size": size, "max_tokens": None if size else 10**6}
    once = {"encoder_decoder": policy.encoder_decoder, "unpadded": policy.unpadded, "prompts_once": policy.unpadded}
    return Packing(**limit, **once, pad_id=tiny.PAD_ID, masker=masker)


def language_model(shape: str, **changes: Any) -> PreTrainedModel:
    """As `tiny.language_model`, of two more shapes."""
    torch.manual_seed(0)
    if shape in tiny.SHAPES:
        return tiny.language_model(shape, **changes)
    ids = {"pad_token_id": tiny.PAD_ID, "bos_token_id": 1, "eos_token_id": tiny.EOS_ID, "vocab_size": tiny.V}
    if shape == "qwen2":
        sizes = {"hidden_size": tiny.H, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = Qwen2Config(**{**sizes, **ids, "num_key_value_heads": 1, **changes})
        return tiny.spread(Qwen2ForCausalLM(config)).eval()
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": tiny.H, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128}
    start = {"decoder_start_token_id": tiny.PAD_ID, "forced_eos_token_id": None, "dropout": 0.0}
    config = PegasusConfig(**{**layers, **sizes, **start, **ids, **changes})
    return tiny.spread(PegasusForConditionalGeneration(config)).eval()


def policy(shape: str, **changes: Any) -> Policy:
    return Policy(language_model(shape, **changes), max_tokens=64)


def masked_of(batch: Batch) -> Tensor:
    """(B, T) bool, where the reference's inputs are masked."""
    return (batch.shown_ids == words().mask_id) & batch.response_mask


def own_logits(lm: PreTrainedModel, row: Row, masked: Tensor) -> Tensor:
    """(T, V) float32 by the model's own forward on the one row, with [MASK] at `masked` (T,)."""
    prompt = torch.tensor([row.prompt_ids])
    shown = torch.where(masked, words().mask_id, torch.tensor(row.response_ids))[None]
    if lm.config.is_encoder_decoder:
        start = torch.tensor([[lm.config.decoder_start_token_id]])
        return lm(input_ids=prompt, decoder_input_ids=torch.cat([start, shown[:, :-1]], 1)).logits[0].float()
    logits = lm(input_ids=torch.cat([prompt, shown], 1)).logits[0].float()
    return logits[len(row.prompt_ids) - 1 : -1]


def overlap(text: str, reference: str) -> float:
    """Words that the reference has too, over 4, and a little for every letter a."""
    return 0.01 * text.count("a") + len({*text.split()} & {*reference.split()}) / 4


def judge() -> Rewards:
    """`overlap` with the row's first reference as the one reward."""

    def reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
        return [overlap(text, given[0]) for text, given in zip(completions, columns["references"], strict=True)]

    return Rewards([WeightedReward("overlap", 1.0, reward)])
