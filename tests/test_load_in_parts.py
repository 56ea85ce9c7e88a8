"""Loading under ZeRO-3, tensor by tensor, gives what loading whole gives; and holds no more than its parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from pipeline.config.sections import ModelSettings
from pipeline.data.tokenization import Encoder
from pipeline.models import build, loading, tokenizers, writing
from pipeline.models.late import Late
from pipeline.records import Example
from pipeline.rollout.generate import generate
from pipeline.trainer import model
from pipeline.trainer.engine import Engine
from tests import tiny

ROWS = len(tiny.tokenizer())
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., ModelSettings]:
    """Saves a random model of a shape in a type, without a row to spare; and adapters upon it, if `r` says so."""

    def make(shape: str, kept: str, r: int = 0, tokens: bool = False, rows: int = ROWS) -> ModelSettings:
        model = tiny.spread(tiny.language_model(shape, vocab_size=rows))
        settings = tiny.settings("sft").model
        at = tmp_path / f"{shape}-{kept}"
        if not at.exists():
            writing.save(at, model, model.state_dict(), tiny.tokenizer(), dtype=TYPES[kept])
        settings = settings.model_copy(update={"path": str(at)})
        if not r:
            return settings
        tokenizer = tokenizers.load_tokenizer(settings, [], tokens)
        adapted = loading.load_policy(with_r(settings, r), tokenizer, 1, mask=tokens)
        torch.manual_seed(3)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        writing.save(tmp_path / "sft", adapted, adapted.state_dict(), tokenizer)
        return settings.model_copy(update={"path": str(tmp_path / "sft")})

    return make


def with_r(settings: ModelSettings, r: int) -> ModelSettings:
    return settings.model_copy(update={"lora": settings.lora.model_copy(update={"r": r})})


def engine_of(settings: ModelSettings, zero: str, precision: str, kind: str) -> Engine:
    """The engine as a stage makes it; kind: policy, masked, read (only) or scalar."""
    train = tiny.train_settings(zero=zero, precision=precision)
    tokenizer = tokenizers.load_tokenizer(settings, [], kind == "masked", kind == "scalar")
    encoder = tiny.encoder()
    encoder = encoder.__class__(tokenizer, encoder.template, 64, 64, "end", encoder.encoder_decoder)
    if kind == "scalar":
        module = build.reward_module(settings, encoder, train, 0)
    else:
        module = build.policy_module(settings, encoder, train, 64, 0, kind == "masked", kind == "read")
    return Engine(module, tiny.ranks(), train, None if kind == "read" else tiny.optimizer_settings(**tiny.PLAIN_STEP))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert weight.dtype == other[name].dtype, name
        assert torch.equal(weight, other[name]), name


@pytest.mark.parametrize(
    ("shape", "kept", "precision"),
    [("llama", "bf16", "fp32"), ("gpt2", "fp32", "bf16"), ("t5", "bf16", "fp32"), ("bart", "bf16", "fp32")],
)
def test_weights_are_those_of_loading_whole(start: Callable, shape: str, kept: str, precision: str) -> None:
    plain = start(shape, kept)
    cases = [(plain, "masked"), (with_r(plain, 4), "policy"), (with_r(plain, 4), "masked")]
    cases += [(plain, "read"), (with_r(plain, 4), "scalar")] if shape != "t5" else []
    for settings, kind in cases:
        whole, parts = (engine_of(settings, zero, precision, kind).state_dict() for zero in ("zero0", "zero3"))
        same(parts, whole)


@pytest.mark.parametrize(
    ("shape", "kept", "precision", "tokens"),
    [("llama", "bf16", "fp32", True), ("gpt2", "bf16", "fp32", False), ("t5", "fp32", "bf16", True)],
)
def test_adapters_are_added_as_to_whole_weights(
    start: Callable, shape: str, kept: str, precision: str, tokens: bool
) -> None:
    on = start(shape, kept, r=2, tokens=tokens)
    policy = "masked" if tokens else "policy"
    for settings, kind in [(with_r(on, 0), policy), (with_r(on, 4), policy), (on, "scalar")]:
        if (shape, kind) != ("t5", "scalar"):
            whole, parts = (engine_of(settings, zero, precision, kind).state_dict() for zero in ("zero0", "zero3"))
            same(parts, whole)


@pytest.mark.parametrize("shape", ["llama", "bart"])
def test_first_steps_are_those_of_loading_whole(start: Callable, shape: str, tmp_path: Path) -> None:
    for settings in (start(shape, "bf16", rows=tiny.V), with_r(start(shape, "bf16", r=2), 4)):
        whole, parts = (engine_of(settings, zero, "fp32", "policy") for zero in ("zero0", tiny.cut_whole(tmp_path)))
        build.start_check(parts.module, tiny.encoder(), 64)  # which leaves nothing behind
        norms = [tiny.two_steps(one, tiny.items(9)) for one in (whole, parts)]
        tiny.close(norms[1], norms[0])
        weights = [one.state_dict() for one in (whole, parts)]
        for name in weights[0]:
            tiny.close(weights[1][name], weights[0][name])


def test_what_no_file_holds_is_made_in_the_type_of_training(tmp_path: Path) -> None:
    """The scale of Gemma's embeddings is the root of their width: 5.656854, which bfloat16 rounds to 5.65625."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3TextConfig(**sizes, vocab_size=ROWS, num_key_value_heads=1, head_dim=16)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    settings = tiny.settings("sft").model.model_copy(update={"path": str(tmp_path)})
    opened = loading.load_policy(settings, tiny.tokenizer(), 0, torch.float32, late=Late(torch.float32))
    buffers = {name: (float(one.max()), one.dtype) for name, one in opened.named_buffers() if "scale" in name}
    assert buffers == {"model.embed_tokens.embed_scale": (pytest.approx(32**0.5, abs=1e-6), torch.float32)}


def test_adapters_bring_a_scalar_head_as_exact_as_it_is(start: Callable, tmp_path: Path) -> None:
    """Also to a reward model whose own head is in bfloat16."""
    tokenizer, plain = tiny.tokenizer(), start("llama", "bf16")

    def at(place: Path, r: int = 0) -> ModelSettings:
        return with_r(plain.model_copy(update={"path": str(place)}), r)

    below = tiny.spread(loading.load_scalar(plain, tokenizer, 0, new_head=True))
    writing.save(tmp_path / "below", below, below.state_dict(), tokenizer, dtype=torch.bfloat16)
    adapted = tiny.spread(loading.load_scalar(at(tmp_path / "below", r=2), tokenizer, 0, new_head=True))
    writing.save(tmp_path / "adapters", adapted, adapted.state_dict(), tokenizer)
    opened = loading.load_scalar(at(tmp_path / "adapters"), tokenizer, 0, new_head=True, late=Late(torch.float32))
    assert torch.equal(opened.score.weight, adapted.get_base_model().score.modules_to_save.default.weight)


def test_trained_tokens_are_read_where_no_weight_is_whole(start: Callable, tmp_path: Path) -> None:
    """peft's layer of them reads the weight of another: in the check of a start, and token by token."""
    train = tiny.train_settings(zero=tiny.cut_whole(tmp_path))
    settings, encoder = with_r(start("llama", "bf16"), 4), tiny.encoder()
    masked = Encoder(tokenizers.load_tokenizer(settings, [], mask=True), encoder.template, 64, 64)
    policy = build.policy_module(settings, masked, train, 64, 0, mask=True)
    trained = model.engine_of(policy, masked, 64, tiny.ranks(), train, tiny.optimizer_settings())
    said = tiny.settings("rl").generation.model_copy(update={"max_new_tokens": 3, "do_sample": False})
    layers, whole = (
        generate(trained, masked, [Example("a", "the old cat")], said.model_copy(update={"gather": gather}), seed=0)
        for gather in ("layers", "whole")
    )
    assert layers == whole
