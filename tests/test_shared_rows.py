"""One row for two responses: whatever a layer sees of it, it stays so; and what cannot be right is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from pipeline.data.batching import Extent
from pipeline.errors import UserError
from pipeline.models.loading import hugging_face
from pipeline.models.policy import Policy
from pipeline.models.start_check import check_end_to_end
from pipeline.records import Item
from pipeline.rl.semi_offline import check_shared
from pipeline.trainer.engine import Engine
from tests import masked, tiny
from tests.test_semi_forward import one_pass_is_two

# what a layer sees of what is before it: five tokens, or chunks of six
SEEN = {
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 5}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16},
    ),
    "llama4": (
        Llama4ForCausalLM,
        Llama4TextConfig,
        {"attention_chunk_size": 6, "layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]}
        | {"intermediate_size_mlp": 32, "num_local_experts": 2, "moe_layers": [0]},
    ),
}


def windowed(name: str, **changes) -> Policy:
    model, config, more = SEEN[name]
    sizes = {"hidden_size": tiny.H, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": tiny.V, "max_position_embeddings": 128}
    ids = {"pad_token_id": tiny.PAD_ID, "bos_token_id": 1, "eos_token_id": tiny.EOS_ID}
    torch.manual_seed(0)
    return Policy(tiny.spread(model(config(**sizes, **ids, **{**more, **changes})), 0.15).eval(), max_tokens=64)


@pytest.mark.parametrize(("name", "kernel"), [*((name, "sdpa") for name in SEEN), ("gemma3", "eager")])
def test_windows_and_chunks_are_kept_in_one_row(name: str, kernel: str) -> None:
    one_pass_is_two(windowed(name, attn_implementation=kernel), True, 128)


def sharing(policy: Policy, rows: list[Item]) -> None:
    """What semi-offline RL checks before its first step."""
    engine = Engine(policy, tiny.ranks(), tiny.train_settings(precision="fp32"), None)
    check_shared(engine, rows, masked.packing(policy, 6), 1e-3)


def test_the_longest_row_is_checked() -> None:
    """A model that reads only long rows otherwise; the first is short, as is every response alone."""
    rows = sorted(masked.items(8), key=lambda item: Extent().with_item(item).joined)
    policy = masked.policy("llama")
    sharing(policy, rows)
    longer = max(len(row) for item in rows for row in (*item.rows, *item.static_rows))
    assert Extent().with_item(rows[0]).text < longer
    layer = hugging_face(policy.model).model.layers[0]
    layer.register_forward_hook(lambda *given: given[2] + (given[2].shape[1] > longer) * given[2].cumsum(1))
    sharing(policy, rows[:1])
    with pytest.raises(UserError, match=r"differ by .* set padding_free=false$"):
        sharing(policy, rows)


OTHERS = {
    "bloom": (BloomForCausalLM, BloomConfig, {"n_layer": 1, "n_head": 2}),
    "mamba": (MambaForCausalLM, MambaConfig, {"num_hidden_layers": 1, "state_size": 4}),
    "falcon": (FalconForCausalLM, FalconConfig, {"num_hidden_layers": 1, "num_attention_heads": 2, "alibi": True}),
    "lfm2": (
        Lfm2ForCausalLM,
        Lfm2Config,
        {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
        | {"layer_types": ["conv", "full_attention"]},
    ),
    "gpt_neo": (
        GPTNeoForCausalLM,
        GPTNeoConfig,
        {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 256},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_read_rows_with_padding(name: str) -> None:
    model, config, more = OTHERS[name]
    policy = Policy(tiny.spread(model(config(vocab_size=tiny.V, hidden_size=tiny.H, **more))).eval(), max_tokens=64)
    assert not policy.unpadded
    one_pass_is_two(policy, True, 128)


def test_other_kernels_read_rows_with_padding() -> None:
    assert not masked.policy("llama", attn_implementation="eager").unpadded


def test_a_model_that_only_seems_to_read_end_to_end_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    """One whose layer adds what the token before says, whatever row that is in; and one that asks for another mask."""
    policy = masked.policy("llama")
    check_end_to_end(policy, 40)
    assert policy.unpadded and not caplog.text
    layer = hugging_face(policy.model).model.layers[0]
    mixes = layer.register_forward_hook(lambda *given: given[2] + given[2].roll(1, 1))
    check_end_to_end(policy, 40)
    mixes.remove()
    assert not policy.unpadded and "takes rows with padding, not end to end: it then reads otherwise" in caplog.text
    policy.unpadded = True
    layer.register_forward_pre_hook(lambda *given: given[2]["attention_mask"].shape and None, with_kwargs=True)
    check_end_to_end(policy, 40)
    assert not policy.unpadded and "it asks for a mask of another form ('Blocks' object has no" in caplog.text
