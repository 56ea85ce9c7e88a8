"""Small things for tests: settings as the command line makes them, random models, a tokenizer, items, an engine."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from pipeline.algorithms import supervised
from pipeline.config.deepspeed import DS_CONFIGS
from pipeline.config.resolve import resolve
from pipeline.config.sections import TemplateSettings
from pipeline.data.batching import Extent, Packing, Windows
from pipeline.data.tokenization import Encoder
from pipeline.models import scratch
from pipeline.records import Example, Item, Row
from pipeline.trainer import engine, group

V, H = 352, 32
PAD_ID, EOS_ID = 0, 2
SHAPES = ("llama", "gpt2", "t5", "bart")
PLAIN = TemplateSettings(
    kind="text",
    prompt="{prompt}",
    response=None,
    human="\nHuman: ",
    assistant="\nAssistant: ",
    system=None,
    special_tokens="text",
    date=None,
)
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "far", "away", "from", "this", "old", "big", "dog"]


@cache
def settings(stage: str, *words: str) -> Any:
    """The settings that a user's words give for `stage`."""
    return resolve([f"stage={stage}", *words]).settings


def train_settings(**changes: Any) -> Any:
    return settings("sft").train.model_copy(update={"max_tokens": 4096, "batch_size": 4, **changes})


def optimizer_settings(**changes: Any) -> Any:
    return settings("sft").optimizer.model_copy(update=changes)


def language_model(shape: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of V tokens, H hidden and 2 layers; its weights are large enough that every token counts."""
    ids = {"pad_token_id": PAD_ID, "bos_token_id": 1, "eos_token_id": EOS_ID, "vocab_size": V}
    torch.manual_seed(seed)
    if shape == "llama":
        sizes = {"hidden_size": H, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(**{**sizes, **ids, "max_position_embeddings": 128, "tie_word_embeddings": True, **changes})
        model = LlamaForCausalLM(config)
    elif shape == "gpt2":
        sizes = {"n_embd": H, "n_layer": 2, "n_head": 2, "n_positions": 128}
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(**{**sizes, **off, **ids, **changes}))
    elif shape == "t5":
        sizes = {"d_model": H, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
        config = T5Config(**{**sizes, **ids, "decoder_start_token_id": PAD_ID, **changes})
        model = T5ForConditionalGeneration(config)
    else:
        layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        sizes = {"d_model": H, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128}
        start = {"decoder_start_token_id": EOS_ID, "forced_eos_token_id": None, "dropout": 0.0}
        model = BartForConditionalGeneration(BartConfig(**{**layers, **sizes, **start, **ids, **changes}))
    spread(model)
    if shape == "t5" and config.tie_word_embeddings:
        model.shared.weight.data *= H**0.5  # undoes the scale before its output matrix
    return model.eval()


def spread(model: nn.Module, scale: float = 0.25) -> Any:
    """Random weights of a size at which a changed token or position changes the outputs visibly."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape) * scale
            is_norm = parameter.dim() == 1 and not name.endswith("bias")
            parameter.copy_(1.0 + 0.2 * noise if is_norm else noise)
    return model


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """A scratch tokenizer of a few words, whose ids all lie below V."""
    return scratch.train_tokenizer([" ".join(WORDS)] * 4, V)


def encoder(prompt_limit: int = 64, response_limit: int = 64, **template: Any) -> Encoder:
    return Encoder(tokenizer(), PLAIN.model_copy(update=template), prompt_limit, response_limit)


def cut_whole(folder: Path) -> str:
    """A configuration of ZeRO-3 that keeps no small weight whole: what only large models meet otherwise."""
    config = json.loads((DS_CONFIGS / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "cut_whole.json").write_text(json.dumps(config))
    return str(folder / "cut_whole.json")


def row(prompt: Sequence[int], response: Sequence[int]) -> Row:
    return Row(tuple(prompt), tuple(response))


def items(count: int, seed: int = 0, longest: int = 9, pairs: bool = False, **numbers: Any) -> list[Item]:
    """Random rows of ragged lengths, EOS at the end of the responses; `numbers` are functions of the index."""
    rng = random.Random(seed)

    def ids(least: int) -> list[int]:
        return [rng.randrange(3, V) for _ in range(rng.randint(least, longest))]

    made = []
    for i in range(count):
        prompt = ids(1)
        rows = tuple(row(prompt, [*ids(0), EOS_ID]) for _ in range(2 if pairs else 1))
        example = Example(f"row {i}", f"prompt {i}")
        made.append(Item(example, rows, {name: float(number(i)) for name, number in numbers.items()}))
    return made


def padded_tokens(rows: Sequence[Item], packing: Packing) -> int:
    """Tokens, padding included, of one micro-batch made of `rows`."""
    extent = Extent()
    for one in rows:
        extent = extent.with_item(one)
    return extent.tokens(packing)


def ranks() -> group.Ranks:
    """This process alone, or one of torchrun's. What a lone process says of itself does not reach later launches."""
    before = dict(os.environ)
    alone = group.start(600)
    if "RANK" not in before:
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # DeepSpeed goes on reading LOCAL_RANK
            os.environ.pop(name, None)
    return alone


def on_two_processes(module: str, folder: Path) -> Any:
    """What rank 0 of `torchrun --nproc-per-node 2 -m MODULE FOLDER` writes to FOLDER/seen.pt."""
    root = Path(__file__).parents[1]
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    made = subprocess.run(
        [*command, "-m", module, str(folder)],
        cwd=root,
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert made.returncode == 0, made.stderr[-3000:]
    return torch.load(folder / "seen.pt", weights_only=True)


def rounding(numbers: Any) -> float:
    """What one rounding may change in the largest of `numbers`: its size times its type's eps. Python's are float32."""
    if isinstance(numbers, Mapping):
        numbers = list(numbers.values())
    if isinstance(numbers, list | tuple):
        return max(map(rounding, numbers), default=0.0)
    tensor = torch.as_tensor(numbers)
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    return torch.finfo(tensor.dtype).eps * float(tensor.abs().max())


def close(found: Any, wanted: Any, roundings: float = 128, of: Any = None) -> None:
    """That two ways to compute the same numbers differ by the order of their sums alone: by so many `roundings`.

    A sum of n terms is rounded n times, each time by at most eps of its size. These models have two layers, whose
    longest sums have 64 terms; the shorter ones fit in, since few errors have one sign. 128 roundings are 1.5e-5 of the
    largest number in float32, 3e-14 in float64. Where numbers are small differences of large ones, `of` names the large
    ones. Tensors, Python's numbers, lists and dicts of them; where these differ much in size, call it for each.
    """
    allowed = roundings * rounding(wanted if of is None else of)
    assert math.isfinite(allowed), f"nothing is close to {allowed}"
    torch.testing.assert_close(found, wanted, atol=allowed, rtol=0)


# what training tests share: large epsilon makes Adam's step depend on the size of the gradient, not on its sign alone
PLAIN_STEP = {"learning_rate": 0.2, "adam_epsilon": 1.0, "weight_decay": 0.1, "max_grad_norm": 0.0}


def trainer(
    module: nn.Module, zero: str = "zero0", precision: str = "fp32", optimizer: dict | None = None, **train: Any
) -> engine.Engine:
    """An engine around `module` that takes the steps of PLAIN_STEP, changed by `optimizer`."""
    chosen = optimizer_settings(**{**PLAIN_STEP, **(optimizer or {})})
    return engine.Engine(module, ranks(), train_settings(zero=zero, precision=precision, **train), chosen)


def step(trained: engine.Engine, rows: list[Item], drawn: Sequence[int], packing: Packing, rate: float = 0.2) -> float:
    """One SFT step on `drawn` rows over all ranks; the gradient norm."""
    group, settings = trained.ranks, supervised.Settings(0.0)
    window = Windows(rows, lambda _: list(drawn), packing, group.rank, group.world).at(0)
    n_terms = group.all_sum(torch.tensor(float(sum(int(batch.response_mask.sum()) for batch in window))))
    trained.train()
    for place, batch in enumerate(window):
        total, _ = supervised.loss(trained(batch), batch.to(group.device), settings)
        trained.backward(total, n_terms, last=place == len(window) - 1)
    return trained.step(rate)


def two_steps(trained: engine.Engine, rows: list[Item], budget: int = 40) -> list[float]:
    """Steps of differently many micro-batches; the second leaves fillers on two ranks. The gradient norms."""
    encoder_decoder = trained.module.encoder_decoder
    return [
        step(trained, rows, range(7), Packing(None, budget, encoder_decoder, PAD_ID)),
        step(trained, rows, [8, 1, 8], Packing(1, None, encoder_decoder, PAD_ID)),
    ]
