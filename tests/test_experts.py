"""Models with experts: the loss of their router, and training where ranks' tokens go to different experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from pipeline.data.batching import Packing, collate
from pipeline.errors import UserError
from pipeline.models import router
from pipeline.models.policy import Policy, RewardModel
from pipeline.trainer.objective import balanced, router_coefficient
from tests import experts, tiny
from tests.experts import COEFFICIENT, KINDS, TOKENS

WHOLE = Packing(None, 10**6, False, tiny.PAD_ID)
ROWS = [row for pair in zip(experts.items_of(0), experts.items_of(1), strict=True) for row in pair]


def test_the_balance_by_hand() -> None:
    """Two experts, one chosen: 3 of 4 tokens go to the first, whose mean probability is 0.6: 2 (0.75 x 0.6 + 0.25 x
    0.4) = 1.1; padding, which would go to the second, does not count."""
    likely = torch.tensor([[0.8, 0.7, 0.6, 0.3, 0.01]])
    logits = torch.stack([likely, 1 - likely], dim=-1).log()
    real = torch.tensor([[True, True, True, True, False]])
    assert float(router.balance_loss([logits], real, 1)) == pytest.approx(1.1)
    assert float(router.balance_loss([logits], real & False, 1)) == 0.0
    even = torch.zeros(1, 4, 2)
    assert float(router.balance_loss([even, even], real[:, :4], 2)) == pytest.approx(2.0)  # at best the number chosen


def test_the_balance_is_what_transformers_counts() -> None:
    torch.manual_seed(1)
    logits = [torch.randn(12, 8) for _ in range(3)]
    real = torch.arange(4)[None] < torch.tensor([[4], [2], [1]])
    wanted = load_balancing_loss_func(tuple(logits), 8, 2, real)
    tiny.close(router.balance_loss(logits, real, 2), wanted)
    tiny.close(router.balance_loss(logits, real | True, 2), load_balancing_loss_func(tuple(logits), 8, 2))


def plain_norms(kind: str, groups: list[list[int]]) -> list[float]:
    """The norms of two torch steps on the mean over tokens, plus the loss of the router as transformers counts it."""
    made = experts.model(kind)
    experts.split_experts(made)
    made.train()
    settings = {**tiny.PLAIN_STEP, "lr": tiny.PLAIN_STEP["learning_rate"]}
    matrices = [p for p in made.parameters() if p.dim() > 1]
    vectors = [p for p in made.parameters() if p.dim() <= 1]
    decay = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(decay, lr=settings["lr"], betas=(0.9, 0.95), eps=settings["adam_epsilon"])
    batches = [collate(ROWS, group, WHOLE) for group in groups]
    learned = sum(int(batch.response_mask.sum()) for batch in batches)
    read = sum(int(batch.input_mask.sum()) for batch in batches)
    norms = []
    for _ in range(2):
        adam.zero_grad()
        for batch in batches:
            mask = batch.input_mask.long()
            said = made(batch.input_ids, attention_mask=mask, output_router_logits=True, use_cache=False)
            logps = said.logits.log_softmax(-1)
            total = 0.0
            for row, start in enumerate(batch.prompt_lengths.tolist()):
                count = int(batch.response_mask[row].sum())
                ids = batch.response_ids[row, :count]
                total = total - logps[row, start - 1 : start - 1 + count].gather(1, ids[:, None]).sum()
            share = int(batch.input_mask.sum()) / read
            (total / learned + COEFFICIENT * share * said.aux_loss).backward()
        norms.append(float(nn.utils.get_total_norm([p.grad for p in made.parameters() if p.grad is not None])))
        adam.step()
    return norms


ONE_BY_ONE = [[i] for i in range(6)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2", "qwen3"])
def test_the_router_is_kept_in_balance(kind: str, checkpointing: bool) -> None:
    """Each micro-batch's balance counts by its tokens; gradient checkpointing changes nothing."""
    assert experts.steps(kind, "zero0", checkpointing)[1] == pytest.approx(plain_norms(kind, ONE_BY_ONE), rel=1e-4)


def test_the_balance_of_a_batch_is_not_that_of_its_parts() -> None:
    """The loss is a product of two means: rows of different experts are in balance together, and not apart."""
    made = experts.model("mixtral")
    experts.split_experts(made)
    policy, objective = Policy(made, 64), balanced(TOKENS, COEFFICIENT)
    found = []
    for groups in (ONE_BY_ONE, [list(range(6))]):
        batches = [collate(ROWS, group, WHOLE) for group in groups]
        with torch.no_grad():
            totals = [objective.loss(policy(batch, balance=True), batch) for batch in batches]
        n = objective.terms(batches)
        found.append(sum(total for total, _ in totals) / n)
        stats = [stats["loss/router"].sums for _, stats in totals]
        assert float(sum(s[1] for s in stats) / sum(s[0] for s in stats)) * COEFFICIENT == pytest.approx(
            float(found[-1][1]), rel=1e-5
        )
    assert float(found[0][0]) == pytest.approx(float(found[1][0]), rel=1e-5)
    assert float(found[0][1]) > 1.5 * float(found[1][1])


def test_fillers_and_other_outputs() -> None:
    policy, objective = Policy(experts.model("qwen3"), 64), balanced(TOKENS, COEFFICIENT)
    filler = collate(ROWS, (), WHOLE)
    total, stats = objective.loss(policy(filler, balance=True), filler)
    total.sum().backward()
    assert total.tolist() == [0.0, 0.0] and stats["loss/router"].sums.tolist() == [0.0, 0.0, 0.0]
    batch = collate(ROWS, range(6), WHOLE)
    with torch.no_grad():
        logp, means, balance = policy(batch, output="smoothed", balance=True)
        alone = policy(batch, balance=True)
        tiny.close([logp, means], [*policy(batch, output="smoothed")])
        tiny.close([logp, balance], [*alone])


def test_what_the_loss_is_weighted_by() -> None:
    asked = experts.model("mixtral")
    asked.config.output_router_logits = True
    assert router_coefficient(Policy(asked, 64), None) == 0.001
    assert router_coefficient(Policy(experts.model("mixtral"), 64), None) == 0.0
    assert router_coefficient(Policy(asked, 64), 0.0) == 0.0
    assert router_coefficient(Policy(experts.model("qwen3"), 64), 0.3) == 0.3
    plain = tiny.language_model("llama")
    assert router_coefficient(Policy(plain, 64), None) == 0.0
    with pytest.raises(UserError, match=r"router_aux_loss_coef: LlamaForCausalLM has no router"):
        router_coefficient(Policy(plain, 64), 0.1)
    with pytest.raises(UserError, match="a reward model's router is left as it is"):
        router_coefficient(RewardModel(plain), 0.1)
    assert balanced(TOKENS, 0.0) is TOKENS


# two ranks


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What two processes did under ZeRO-3."""
    return tiny.on_two_processes("tests.experts", tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_whose_tokens_go_to_other_experts_train_as_one(seen: dict, kind: str) -> None:
    trained, norms = experts.steps(kind, "zero0")
    assert seen[kind]["norms"] == pytest.approx(norms, rel=1e-4)
    tiny.close(seen[kind]["weights"], trained.state_dict())
    assert len(seen[kind]["said"]) == 5


def test_the_rows_of_two_ranks_go_to_different_experts() -> None:
    """Or the test above would prove nothing: no expert of the first layer sees tokens of both."""
    made = experts.model("apart")
    experts.split_experts(made)
    used = []
    for parity in (0, 1):
        ids = torch.tensor([experts.items_of(parity)[2].rows[0].prompt_ids])
        (first, *_) = made.model(ids, output_router_logits=True).router_logits
        used.append({*first.topk(2, -1).indices.flatten().tolist()})
    assert used in ([{0, 1}, {2, 3}], [{2, 3}, {0, 1}]), used
