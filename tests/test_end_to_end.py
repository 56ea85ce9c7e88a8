"""Rows end to end: they give what they give one by one, for models of many kinds and prompts that rows share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pipeline.data.batching import Packing, collate, group
from pipeline.models import attention, router
from pipeline.models.loading import hugging_face
from pipeline.models.policy import Policy, RewardModel
from pipeline.records import Batch, Example, Item, Row
from tests import tiny

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 64}
SMALL = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 64}
KINDS = {
    "llama": SIZES,
    "mistral": SIZES | {"sliding_window": 6},
    "qwen2": SIZES,
    "qwen3": SIZES | {"head_dim": 8},
    "gemma": SIZES | {"head_dim": 8},
    "gemma3_text": SIZES | {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gpt2": SMALL,
    "gpt_neox": SIZES,
    "phi3": SIZES | {"pad_token_id": 0},
    "deepseek_v3": SIZES
    | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16}
    | {"num_key_value_heads": 4},
}


def model_of(kind: str, auto: type = AutoModelForCausalLM, **changes) -> PreTrainedModel:
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **{**ids, **KINDS[kind], **changes})
    return tiny.spread(auto.from_config(config)).eval()


def items() -> list[Item]:
    """Eight rows of four prompts, which have two, two, three and one response."""
    numbers = torch.Generator().manual_seed(3)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 64, (count,), generator=numbers).tolist())

    prompts = [ids(n) for n in (1, 9, 14, 4)]
    lengths = [(0, 3), (0, 8), (1, 1), (2, 12), (2, 2), (2, 7), (3, 5), (1, 9)]
    rows = [Row(prompts[which], ids(length)) for which, length in lengths]
    return [Item(Example(str(i), ""), (row,)) for i, row in enumerate(rows)]


def batch_of(unpadded: bool, whole: bool = False) -> Batch:
    made = items()
    return collate(made, range(len(made)), Packing(99, None, False, 0, whole, unpadded=unpadded, prompts_once=unpadded))


def read(module: Policy | RewardModel, unpadded: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """What the module says, and the gradients of a sum that weighs each number differently."""
    module.unpadded = unpadded
    found = module(batch_of(unpadded))
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found.detach(), gradients


def same(module: Policy | RewardModel) -> None:
    assert module.unpadded
    (ours, ours_back), (theirs, theirs_back) = read(module, True), read(module, False)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert ours_back.keys() == theirs_back.keys()
    for name, gradient in theirs_back.items():
        torch.testing.assert_close(ours_back[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_rows_apart(kind: str) -> None:
    same(Policy(model_of(kind), max_tokens=64))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_scores_and_their_gradients_are_those_of_rows_apart(kind: str) -> None:
    same(RewardModel(model_of(kind, AutoModelForSequenceClassification, num_labels=1)))


def test_each_prompt_is_read_once() -> None:
    """The prompts have 1 + 9 + 14 + 4 tokens, the responses 3 + 8 + 1 + 12 + 2 + 7 + 5 + 9; apart they are 8 rows."""
    policy, read = Policy(model_of("llama"), max_tokens=64), []
    hugging_face(policy.model).model.register_forward_pre_hook(
        lambda *given: read.append(given[2]["input_ids"].shape), with_kwargs=True
    )
    policy(batch_of(True))
    assert read == [(1, 28 + 47)]
    packing = Packing(99, None, False, 0, unpadded=True, prompts_once=True)
    text = 47 + 2 * 1 + 2 * 9 + 3 * 14 + 4  # of items one by one
    assert tiny.padded_tokens(items(), packing) == text + (8 * 26 - text) // 4


@torch.no_grad()
def test_states_of_prompts_are_in_their_places() -> None:
    policy = Policy(model_of("qwen2"), max_tokens=64)
    together, batch = policy(batch_of(True), output="states"), batch_of(False)
    policy.unpadded = False
    apart = policy(batch, output="states")
    torch.testing.assert_close(together[batch.input_mask], apart[batch.input_mask], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_filler_and_rows_without_a_response_are_read() -> None:
    policy = Policy(model_of("llama"), max_tokens=64)
    bare = [replace(item, rows=(replace(item.rows[0], response_ids=()),)) for item in items()]
    packing = Packing(99, None, False, 0, unpadded=True, prompts_once=True)
    states = policy(collate(bare, range(len(bare)), packing), output="states")
    alone = hugging_face(policy.model).model(torch.tensor([bare[3].rows[0].prompt_ids])).last_hidden_state[0]
    torch.testing.assert_close(states[3, :14], alone, rtol=1e-5, atol=1e-5)
    assert not policy(collate(items(), (), packing)).any()


def test_the_router_is_balanced_over_what_is_read() -> None:
    """Over the tokens end to end: each prompt counts once, padding never."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None, "output_router_logits": True}
    KINDS["mixtral"] = SIZES
    lm = model_of("mixtral", **sizes)
    policy = Policy(lm, max_tokens=64)
    _, balance = policy(batch_of(True), balance=True)
    rows = [[*item.rows[0].prompt_ids, *item.rows[0].response_ids] for item in items()]
    starts = [0, 1, 0, 0, 14, 14, 0, 9]
    each = [lm(torch.tensor([row]), output_router_logits=True).router_logits for row in rows]
    cut = [tuple(layer[start:] for layer in logits) for logits, start in zip(each, starts, strict=True)]
    together = [torch.cat(layers) for layers in zip(*cut, strict=True)]
    wanted = router.balance_loss(together, torch.ones(1, len(together[0]), dtype=torch.bool), 2)
    torch.testing.assert_close(balance, wanted, rtol=1e-4, atol=1e-5)


def test_micro_batches_keep_a_prompt_together() -> None:
    """The rows have 1 + 3, 1 + 8, 9 + 1, 14 + 12, 14 + 2, 14 + 7, 4 + 5, 9 + 9 tokens; 40 are read at once.

    26 + 7, as the second response brings no prompt, and a quarter of 2 x 26 - 33, which attention alone adds: 37. 16 +
    18 + 1, and a quarter of 3 x 18 - 35: 39. 9 + 3 + 9, and a quarter of 3 x 9 - 21.
    """
    packing = Packing(None, 40, False, 0, unpadded=True, prompts_once=True)
    assert group(items(), range(8), packing, 1) == [[3, 5], [4, 7, 2], [1, 0, 6]]
    assert group(items(), range(8), Packing(None, 40, False, 0), 1) == [[3], [5], [7, 4], [2], [1, 6], [0]]


@torch.no_grad()
@pytest.mark.parametrize("unpadded", [True, False])
def test_log_probabilities_and_states_of_one_pass(unpadded: bool) -> None:
    policy = Policy(model_of("llama"), max_tokens=64)
    policy.unpadded, batch = unpadded, batch_of(unpadded)
    logps, states = policy(batch, output="logp_states")
    assert torch.equal(logps, policy(batch))
    for row, (found, length) in enumerate(zip(states, batch.prompt_lengths.tolist(), strict=True)):
        alone = hugging_face(policy.model).model(batch.input_ids[row : row + 1, :length]).last_hidden_state[0]
        torch.testing.assert_close(found[:length], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_rows_for_a_kernel_that_shares_no_prompts(kind: str) -> None:
    """Where places start anew transformers lets no row see another: so flash attention's varlen is told, and sdpa."""
    policy = Policy(model_of(kind), max_tokens=64)
    apart = batch_of(False)
    laid = attention.lay(apart.input_ids, apart.input_mask)
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    found = attention.apart(hugging_face(policy.model), laid).last_hidden_state[0]
    padded = hugging_face(policy.model).base_model(apart.input_ids).last_hidden_state
    torch.testing.assert_close(found[laid.at][apart.input_mask], padded[apart.input_mask], rtol=1e-5, atol=1e-5)


def test_a_micro_batch_of_rows_that_share_no_prompts_is_not_overfull() -> None:
    packing = Packing(None, 34, False, 0, unpadded=True)
    assert group(items(), range(8), packing, 1) == group(items(), range(8), replace(packing, unpadded=False), 1)
    assert collate(items(), range(8), packing).owners is None
