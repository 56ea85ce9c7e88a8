"""Whatever the architecture, a model is right or refused in one line: loading, generation, saving."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertGenerationConfig,
    BertGenerationDecoder,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    MBartConfig,
    MBartForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from pipeline.data.batching import Packing, collate
from pipeline.errors import UserError
from pipeline.models import build, checks, loading, writing
from pipeline.models.policy import Policy
from pipeline.records import Example
from pipeline.rollout.generate import batches_of, generate
from pipeline.trainer.engine import Engine
from tests import tiny

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
HEADS = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128}
PARTS = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
PARTS |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "bert": (BertLMHeadModel, BertConfig, {**SIZES, "is_decoder": True}),
    "bert-generation": (BertGenerationDecoder, BertGenerationConfig, SIZES),  # not told to be a decoder
    "bloom": (BloomForCausalLM, BloomConfig, {"hidden_size": 32, "n_layer": 1, "n_head": 2}),
    "mbart": (MBartForConditionalGeneration, MBartConfig, PARTS),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {**HEADS, "num_local_experts": 4}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {**HEADS, **EXPERTS}),
    "rwkv": (RwkvForCausalLM, RwkvConfig, {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}),
    "switch": (
        SwitchTransformersForConditionalGeneration,
        SwitchTransformersConfig,
        {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
        | {"num_experts": 2, "decoder_start_token_id": 0},
    ),
    "xlnet": (XLNetLMHeadModel, XLNetConfig, {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32}),
}


def model_of(name: str, **changes: Any) -> PreTrainedModel:
    model, config, more = MODELS[name]
    ids = {"pad_token_id": tiny.PAD_ID, "bos_token_id": 1, "eos_token_id": tiny.EOS_ID, "vocab_size": tiny.V}
    torch.manual_seed(0)
    return tiny.spread(model(config(**ids, **{**more, **changes}))).eval()


def opened(directory: Path, kernel: str = "eager") -> Policy:
    """What a stage makes of a saved model."""
    settings = tiny.settings("sft").model.model_copy(update={"path": str(directory), "attn_implementation": kernel})
    return build.policy_module(settings, tiny.encoder(), tiny.train_settings(precision="fp32"), 64, 0)


def kept(folder: Path, name: str, **changes: Any) -> Path:
    """A directory as transformers leaves it."""
    model_of(name, **changes).save_pretrained(folder / name)
    tiny.tokenizer().save_pretrained(folder / name)
    return folder / name


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@torch.no_grad()
def test_experts_are_saved_and_opened_again(tmp_path: Path, name: str) -> None:
    """transformers holds the experts of a layer as one tensor, and writes them one by one."""
    model = model_of(name)
    weights = dict(model.named_parameters())
    writing.save(tmp_path / name, model, weights, tiny.tokenizer())
    batch = collate(tiny.items(4), range(4), Packing(None, 10**6, False, tiny.PAD_ID))
    assert torch.equal(opened(tmp_path / name, "sdpa")(batch), Policy(model, 64)(batch))

    def lose_an_expert(directory: Path) -> None:
        file = directory / "model.safetensors"
        pieces = load_file(file)
        del pieces[next(name for name in pieces if ".experts.1." in name)]
        save_file(pieces, file)

    with pytest.raises(RuntimeError, match="elements were saved of"):
        writing.save(tmp_path / "less", model, weights, tiny.tokenizer(), then=lose_an_expert)


@torch.no_grad()
def test_adapters_of_experts_upon_adapters(tmp_path: Path) -> None:
    """peft adapts the experts' tensors as such, one wrapper in another: what it merged lies in `lora_base`, by name."""
    settings = tiny.settings("sft").model
    place = kept(tmp_path, "mixtral")
    batch = collate(tiny.items(4), range(4), Packing(None, 10**6, False, tiny.PAD_ID))
    for stage in ("sft", "rl"):
        changes = {"path": str(place), "lora": settings.lora.model_copy(update={"r": 2})}
        policy = loading.load_policy(settings.model_copy(update=changes), tiny.tokenizer(), 0)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        said, place = Policy(policy, 64).eval()(batch), tmp_path / stage / "model"
        writing.save(place, policy, policy.state_dict(), tiny.tokenizer())
        tiny.close(opened(place, "sdpa")(batch), said, 256)
        tiny.close(Policy(AutoPeftModelForCausalLM.from_pretrained(place), 64).eval()(batch), said, 256)
    assert (tmp_path / "rl" / "lora_base").is_dir() and not (tmp_path / "sft" / "lora_base").exists()


def test_the_cure_of_a_kernel_that_is_not_there(tmp_path: Path) -> None:
    directory = kept(tmp_path, "bloom")
    with pytest.raises(UserError, match=r"^model\.attn_implementation: .*/bloom .* set it to eager$"):
        opened(directory, "sdpa")
    assert opened(directory, "eager").reads_padding


def test_an_architecture_without_a_classifier(tmp_path: Path) -> None:
    settings = tiny.settings("reward").model.model_copy(update={"path": str(kept(tmp_path, "rwkv"))})
    with pytest.raises(UserError, match="is a Rwkv, of which transformers has no AutoModelForSequenceClassification, "):
        loading.load_scalar(settings, tiny.tokenizer(), 0, new_head=True)


REFUSED = {
    "bert": "changes its logits",  # by layers between its body and its matrix
    "bert-generation": "or reads a padded batch",  # both ways, as this does
    "xlnet": "or reads a padded batch",
    "switch": "experts take 64 tokens at a time",
    "mbart": "no decoder_start_token_id",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"^model\.path: .*{REFUSED[name]}") as found:
        opened(kept(tmp_path, name))
    assert "\n" not in str(found.value)


def test_prompts_of_one_length_where_padding_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """RWKV takes padding for text: what is sampled has the probability that the text alone gives it."""
    with caplog.at_level(logging.INFO, logger="tiffin"):
        policy = opened(kept(tmp_path, "rwkv"))
    assert not policy.reads_padding and "RwkvForCausalLM takes padding for text" in caplog.text
    engine = Engine(policy, tiny.ranks(), tiny.train_settings(precision="fp32"), None)
    sampling = tiny.settings("rl").generation.model_copy(update={"max_new_tokens": 5, "do_sample": True})
    examples = [Example(str(i), text) for i, text in enumerate(["the cat", "a dog ran far away", "big dog"])]
    for response in generate(engine, tiny.encoder(), examples, sampling, 1):
        ids = torch.tensor([[*response.prompt_ids, *response.response_ids]])
        with torch.no_grad():
            logps = policy.model(ids).logits[0, len(response.prompt_ids) - 1 : -1].log_softmax(-1)
        own = logps.gather(1, torch.tensor(response.response_ids)[:, None])[:, 0]
        tiny.close(response.stats.logps, own)


def test_batches() -> None:
    lengths = [1, 1, 1, 2, 5, 5]
    assert [list(places) for places in batches_of(lengths, 4, padded=True)] == [[0, 1, 2, 3], [4, 5]]
    assert [list(places) for places in batches_of(lengths, 2, padded=False)] == [[0, 1], [2], [3], [4, 5]]
    assert batches_of([], 2, padded=False) == []


def test_a_routers_loss_is_added_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tiffin"):
        policy = opened(kept(tmp_path, "mixtral", output_router_logits=True, router_aux_loss_coef=0.02))
    assert caplog.text.count("output_router_logits, router_aux_loss_coef 0.02): training of this model adds it") == 1
    assert policy.router_coefficient == 0.02


@torch.no_grad()
def test_rows_that_would_turn_others_are_refused() -> None:
    """Phi-3 with longrope was trained on 16 places: with 17 in its batch a row of five is read otherwise."""
    turns = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    turns["original_max_position_embeddings"] = 16
    config = Phi3Config(
        **HEADS, vocab_size=tiny.V, pad_token_id=tiny.PAD_ID, rope_parameters=turns, original_max_position_embeddings=16
    )
    model = tiny.spread(Phi3ForCausalLM(config)).eval()
    short, fitting, long = (torch.randint(3, tiny.V, (1, length)) for length in (5, 16, 17))
    read = [model(torch.cat([nn.functional.pad(short, (0, other.shape[1] - 5)), other])) for other in (fitting, long)]
    alone = model(short).logits[0]
    tiny.close(read[0].logits[0, :5], alone)
    assert float((read[1].logits[0, :5] - alone).abs().max()) > 0.1
    checks.check_positions(model, 10, 6, whole=False)
    with pytest.raises(UserError, match="the model has 16 positions, beyond which its longrope"):
        checks.check_positions(model, 10, 7, whole=False)


def test_checkpointing_that_is_not_there() -> None:
    model = model_of("mixtral")
    type(model).supports_gradient_checkpointing, before = False, type(model).supports_gradient_checkpointing
    try:
        with pytest.raises(UserError, match=r"^train\.gradient_checkpointing: MixtralForCausalLM has none"):
            build.enable_checkpointing(model, tiny.train_settings(gradient_checkpointing=True))
    finally:
        type(model).supports_gradient_checkpointing = before
