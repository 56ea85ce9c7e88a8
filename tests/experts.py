"""What test_experts.py runs on two processes: `torchrun --nproc-per-node 2 -m tests.experts FOLDER`.

Rank 0 writes what it saw to FOLDER/seen.pt; ranks that wait for each other fail the launch.
"""

from __future__ import annotations

import faulthandler
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from pipeline.algorithms import supervised
from pipeline.data.batching import Packing, Windows
from pipeline.models.policy import Policy
from pipeline.records import Example, Item
from pipeline.trainer.engine import Engine
from pipeline.trainer.objective import Objective, balanced
from tests import tiny, two_ranks

TOKENS = Objective(lambda logp, batch: supervised.loss(logp, batch, supervised.Settings(0.0)), "tokens")
COEFFICIENT = 0.5
EXPERTS = 4
KINDS = ("mixtral", "qwen2", "qwen3", "apart")


class Apart(nn.Module):
    """Mixtral's experts as modules of their own, of which only those that tokens are sent to compute."""

    def __init__(self, fused: nn.Module):
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleList([_linear(a), _linear(b)]) for a, b in zip(
            fused.gate_up_proj, fused.down_proj, strict=True
        ))  # fmt: skip

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden)
        for one in chosen.unique().tolist():
            up, down = self.experts[one]
            token, place = torch.where(chosen == one)
            gate, value = up(hidden[token]).chunk(2, dim=-1)
            total = total.index_add(0, token, down(nn.functional.silu(gate) * value) * weights[token, place, None])
        return total


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight.data.copy_(weight.data)
    return made


def model(kind: str) -> PreTrainedModel:
    """Two layers of four experts, of which two are chosen; rank 0's rows and rank 1's have different tokens."""
    ids = {"pad_token_id": tiny.PAD_ID, "bos_token_id": 1, "eos_token_id": tiny.EOS_ID, "vocab_size": tiny.V}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    sizes = {"hidden_size": tiny.H, "intermediate_size": 16, "num_experts_per_tok": 2, "max_position_embeddings": 128}
    common, own = {**ids, **heads, **sizes}, {"moe_intermediate_size": 16, "num_experts": EXPERTS}
    torch.manual_seed(0)
    if kind == "qwen2":
        made = Qwen2MoeForCausalLM(Qwen2MoeConfig(**common, **own, shared_expert_intermediate_size=16))
    elif kind == "qwen3":
        made = Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **own, head_dim=16))
    else:
        made = MixtralForCausalLM(MixtralConfig(**common, num_local_experts=EXPERTS))
    tiny.spread(made)
    if kind == "apart":
        for block in made.model.layers:
            block.mlp.experts = Apart(block.mlp.experts)
    return made.eval()


def split_experts(made: PreTrainedModel) -> None:
    """Send tokens of even ids to the first experts and of odd ids to the last, whatever else they are."""
    with torch.no_grad():
        ids = torch.arange(tiny.V)
        made.model.embed_tokens.weight[:, 0] = torch.where(ids % 2 == 0, 30.0, -30.0)
        for block in made.model.layers:
            half = torch.arange(EXPERTS) < EXPERTS // 2
            block.mlp.gate.weight[:, 0] = torch.where(half, 5.0, -5.0)


def items_of(parity: int, count: int = 3) -> list:
    """Rows of even or odd tokens alone."""
    rows = []
    for i in range(count):
        prompt = [4 + parity + 2 * ((7 * i + j) % 150) for j in range(3 + i)]
        response = [4 + parity + 2 * ((11 * i + j) % 150) for j in range(2 + i)]
        rows.append(Item(Example(f"row {i}", ""), (tiny.row(prompt, response),)))
    return rows


def step(trained: Engine, objective: Objective, rows: list, packing: Packing) -> float:
    """One step on all rows, as the loop takes it."""
    group = trained.ranks
    window = Windows(rows, lambda _: list(range(len(rows))), packing, group.rank, group.world).at(0)
    n_terms = group.all_sum(objective.terms(window))
    trained.train()
    for place, batch in enumerate(window):
        total, _ = objective.loss(objective.ask(trained, batch), batch)
        trained.backward(total, n_terms, last=place == len(window) - 1)
    return trained.step(0.2)


def steps(kind: str, zero: str, checkpointing: bool = False) -> tuple[Engine, list[float]]:
    """Two steps on micro-batches of one row, of which rank 0 gets the even and rank 1 the odd ones."""
    made = model(kind)
    split_experts(made)
    if checkpointing:
        made.gradient_checkpointing_enable({"use_reentrant": False})
    trained = tiny.trainer(Policy(made, 64), zero)
    rows = [row for pair in zip(items_of(0), items_of(1), strict=True) for row in pair]
    objective = balanced(TOKENS, COEFFICIENT)
    return trained, [step(trained, objective, rows, Packing(1, None, False, tiny.PAD_ID)) for _ in range(2)]


def main(folder: Path) -> None:
    faulthandler.dump_traceback_later(240, exit=True)
    ranks, seen = tiny.ranks(), {}
    for kind in KINDS:
        trained, norms = steps(kind, "zero3")
        said = two_ranks.speak(trained, do_sample=False)
        seen[kind] = {"norms": norms, "weights": trained.state_dict(), "said": said}
    if ranks.main:
        torch.save(seen, folder / "seen.pt")
    ranks.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
