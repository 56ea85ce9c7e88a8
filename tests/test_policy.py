"""Log-probabilities, states and scores: those of the model itself, whatever the padding, the mates and the slices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MptConfig,
    MptForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from pipeline.algorithms import supervised
from pipeline.data.batching import Packing, collate
from pipeline.errors import UserError
from pipeline.models import loading
from pipeline.models.policy import Policy, RewardModel
from pipeline.models.start_check import check_head, own_logps
from pipeline.records import Batch, Item
from tests import tiny

SHAPES = tiny.SHAPES


def batch_of(policy: Policy | RewardModel, items: list[Item], *indices: int) -> Batch:
    whole = isinstance(policy, RewardModel)
    packing = Packing(None, 10**6, policy.encoder_decoder, tiny.PAD_ID, whole)
    return collate(items, indices or range(len(items)), packing)


def policy_of(shape: str, **changes) -> Policy:
    return Policy(tiny.language_model(shape, **changes), max_tokens=64)


def full_logits(policy: Policy, item: Item) -> torch.Tensor:
    """(T, V) float32 by the model's own forward on the row alone, without padding."""
    lm, row = policy.model, item.rows[0]
    prompt, response = torch.tensor([row.prompt_ids]), torch.tensor([row.response_ids])
    if policy.encoder_decoder:
        start = torch.tensor([[lm.config.decoder_start_token_id]])
        return lm(input_ids=prompt, decoder_input_ids=torch.cat([start, response[:, :-1]], 1)).logits[0].float()
    logits = lm(input_ids=torch.cat([prompt, response], 1)).logits[0].float()
    return logits[len(row.prompt_ids) - 1 : -1]


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logps_and_entropies_are_the_models_own(shape: str) -> None:
    policy, items = policy_of(shape), tiny.items(6)
    batch = batch_of(policy, items)
    logp, entropy = policy(batch), policy(batch, output="entropy")
    assert logp.shape == batch.response_ids.shape and logp.dtype == torch.float32
    for place, item in enumerate(items):
        expected = full_logits(policy, item).log_softmax(-1)
        ids = torch.tensor(item.rows[0].response_ids)
        mask = batch.response_mask[place]
        tiny.close(logp[place][mask], expected.gather(1, ids[:, None])[:, 0])
        by_hand = -(expected.exp() * expected).sum(-1)
        tiny.close(entropy[place][mask], by_hand)
        assert (logp[place][~mask] == 0).all() and (entropy[place][~mask] == 0).all()
    assert logp.min() < -8  # the test would see a wrong place: these models are far from uniform (ln 352 = 5.9)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_mates_padding_and_masked_ids_change_nothing(shape: str) -> None:
    policy, items = policy_of(shape), tiny.items(6)
    together = batch_of(policy, items)
    logp = policy(together)
    for i in range(6):
        alone = policy(batch_of(policy, items, i))[0]
        tiny.close(logp[i, : len(alone)], alone)
    tiny.close(policy(noisy(together)), logp)


@pytest.mark.parametrize("shape", ["llama", "t5"])
def test_p8_eos_counts(shape: str) -> None:
    policy, items = policy_of(shape), tiny.items(4)
    logp = policy(batch_of(policy, items))
    lengths = [len(item.rows[0].response_ids) for item in items]
    assert all(
        logp[i, n - 1] != 0 and items[i].rows[0].response_ids[n - 1] == tiny.EOS_ID for i, n in enumerate(lengths)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_slices_change_neither_values_nor_gradients(shape: str) -> None:
    policy, items = policy_of(shape), tiny.items(4)
    batch, found = batch_of(policy, items), {}
    for chunks in (1, 4, 50):  # 50: more slices than tokens, some are empty
        policy.chunks = chunks
        policy.zero_grad()
        logp = policy(batch)
        logp.sum().backward()
        gradients = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
        found[chunks] = [logp.detach(), *gradients]
    for chunks in (4, 50):
        tiny.close(found[chunks][0], found[1][0])
        tiny.close(found[chunks][1:], found[1][1:])


def test_the_number_of_slices_bounds_the_logits() -> None:
    # 2^25 elements at a time: 352 tokens of vocabulary times 953,250 response tokens are just over ten of them
    assert Policy(tiny.language_model("llama"), 953_250).chunks == 10
    assert Policy(tiny.language_model("llama"), 953_251).chunks == 11
    assert Policy(tiny.language_model("llama"), 1).chunks == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_filler_has_a_gradient_of_zero(shape: str) -> None:
    policy, items = policy_of(shape), tiny.items(2)
    filler = collate(items, (), Packing(None, 99, policy.encoder_decoder, tiny.PAD_ID))
    loss, stats = supervised.loss(policy(filler), filler, supervised.Settings(0.0))
    loss.backward()
    assert loss == 0 and stats["loss"].sums[0] == 0
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())
    assert any(p.grad is not None for p in policy.parameters())


def noisy(batch: Batch) -> Batch:
    """The batch with other ids under the masks."""
    return replace(
        batch,
        input_ids=torch.where(batch.input_mask, batch.input_ids, 77),
        response_ids=torch.where(batch.response_mask, batch.response_ids, 78),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_p8_masked_ids_have_no_gradient(shape: str) -> None:
    policy, items = policy_of(shape), tiny.items(3)
    batch, found = batch_of(policy, items), []
    for one in (batch, noisy(batch)):
        policy.zero_grad()
        policy(one).sum().backward()
        found.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
    tiny.close(found[1], found[0])


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_prompt_states_know_nothing_of_mates_and_responses(shape: str) -> None:
    policy, items = policy_of(shape), tiny.items(5)
    together = policy(batch_of(policy, items), output="states")
    for i, item in enumerate(items):
        bare = replace(item, rows=(replace(item.rows[0], response_ids=()),))
        alone = policy(batch_of(policy, [bare]), output="states")[0]
        n = len(item.rows[0].prompt_ids)
        assert alone.shape == (n, tiny.H)
        tiny.close(together[i, :n], alone)


@pytest.mark.parametrize(("shape", "changes"), [*((s, {}) for s in SHAPES), ("t5", {"tie_word_embeddings": False})])
def test_check_head_passes(shape: str, changes: dict) -> None:
    policy = policy_of(shape, **changes)
    check_head(policy, batch_of(policy, tiny.items(3), 1))


def test_check_head_knows_barts_bias() -> None:
    policy = policy_of("bart")
    policy.model.final_logits_bias.copy_(torch.randn(1, tiny.V) * 3)
    check_head(policy, batch_of(policy, tiny.items(3), 1))


def test_in_half_precision_one_token_may_be_off_by_rounding_and_a_text_may_not() -> None:
    policy = policy_of("llama")
    batch = batch_of(policy, tiny.items(3), 0)
    policy.model.to(torch.bfloat16)
    rows = own_logps(policy, batch)
    one = [torch.cat([row[:-1], row[-1:] - 0.4]) if len(row) > 2 else row for row in rows]
    assert any(len(row) > 2 for row in rows)
    check_head(policy, batch, one)
    with pytest.raises(UserError, match="changes its logits, or reads a padded batch"):
        check_head(policy, batch, [row - 0.4 for row in rows])


def test_in_half_precision_a_sure_models_numbers_round_by_more() -> None:
    """Of 22 nats bfloat16 has no better than a twelfth, in each of the sums that lead to them."""
    policy = policy_of("llama")
    batch = batch_of(policy, tiny.items(3), 0)
    policy.model.lm_head.weight.data.mul_(30)
    policy.model.to(torch.bfloat16)
    rows = own_logps(policy, batch)
    assert min(float(row.abs().median()) for row in rows) > 20
    check_head(policy, batch, [row * 1.015 for row in rows])
    with pytest.raises(UserError, match="changes its logits, or reads a padded batch"):
        check_head(policy, batch, [row * 1.1 for row in rows])


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 352,
}
SIZES |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KIN = {
    "soft cap": (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 16, "final_logit_softcapping": 2.0}),
    "scaled": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.25}),
    "divided": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 8.0}),
    "multiplied": (
        FalconH1ForCausalLM,
        FalconH1Config,
        {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8},
    ),
    "another cap": (
        RecurrentGemmaForCausalLM,
        RecurrentGemmaConfig,
        {"logits_soft_cap": 2.0, "lru_width": 32, "block_types": ["recurrent"]},
    ),
    "scaled before": (
        UMT5ForConditionalGeneration,
        UMT5Config,
        {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
    ),
}


@pytest.mark.parametrize("kind", KIN)
def test_check_head_knows_what_others_do_to_logits(kind: str) -> None:
    model, config, more = KIN[kind]
    policy = Policy(tiny.spread(model(config(**SIZES, **more))).eval(), 64)
    batch = batch_of(policy, tiny.items(3), 1)
    check_head(policy, batch)
    with pytest.raises(UserError):  # and it would notice if we did not
        object.__setattr__(policy, "head", policy.head.output)
        check_head(policy, batch)


def test_a_scale_that_the_model_does_not_read_is_not_applied() -> None:
    config = MptConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=352, logit_scale="inv_sqrt_d_model")
    policy = Policy(tiny.spread(MptForCausalLM(config)).eval(), 64)
    check_head(policy, batch_of(policy, tiny.items(3)))


def test_check_head_refuses_what_it_does_not_know() -> None:
    class Altered(type(tiny.language_model("llama"))):
        def forward(self, *args, **options):
            found = super().forward(*args, **options)
            found.logits = found.logits * 1.5
            return found

    model = tiny.language_model("llama")
    model.__class__ = Altered
    policy = Policy(model, 64)
    with pytest.raises(UserError, match="Altered changes its logits"):
        check_head(policy, batch_of(policy, tiny.items(3), 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_dropout_has_one_owner(shape: str) -> None:
    policy, items = policy_of(shape), tiny.items(3)
    batch = batch_of(policy, items)
    loading.set_dropout(policy.model, 0.5)
    policy.train()
    assert not torch.allclose(policy(batch), policy(batch))
    loading.set_dropout(policy.model, 0.0)
    assert torch.equal(policy(batch), policy(batch))


@pytest.mark.parametrize("shape", ["t5", "bart"])
def test_prompts_that_are_read_once(shape: str) -> None:
    """Five responses to two prompts: the encoder reads two rows; values and gradients are those of five."""
    rows = tiny.items(5)
    prompts = [rows[i % 2].rows[0].prompt_ids for i in range(5)]
    items = [Item(x.example, (replace(x.rows[0], prompt_ids=ids),)) for x, ids in zip(rows, prompts, strict=True)]
    policy, found = policy_of(shape), {}
    for once in (False, True):
        batch = collate(items, range(5), Packing(None, 10**6, True, tiny.PAD_ID, prompts_once=once))
        assert len(batch.input_ids) == (2 if once else 5)
        policy.zero_grad()
        logp = policy(batch)
        (logp * torch.arange(1, 6)[:, None]).sum().backward()
        found[once] = [logp.detach(), *(p.grad.clone() for p in policy.parameters() if p.grad is not None)]
    tiny.close(found[True][0], found[False][0])
    # of all parameters together: some, such as the keys' biases, have a gradient of 0 but for rounding
    tiny.close(found[True][1:], found[False][1:])
