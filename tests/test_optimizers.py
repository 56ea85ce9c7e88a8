"""The optimizers that a run may name, held against torch's own, and what they cannot be combined with."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.config import deepspeed, together
from pipeline.config.resolve import resolve
from pipeline.data.batching import Packing
from pipeline.errors import UserError
from pipeline.models import loading
from pipeline.models.policy import Policy, RewardModel
from pipeline.trainer import muon, optimizer
from stages import faults
from tests import experts, tiny

ITEMS, WHOLE = tiny.items(9), Packing(None, 10**6, False, tiny.PAD_ID)
QUARTIC = (3.4445, -4.7750, 2.0315)


def orthogonal(matrix: Tensor) -> Tensor:
    """Five steps of a Newton-Schulz iteration in bfloat16, as Jordan et al. give them."""
    a, b, c = QUARTIC
    wide = matrix.bfloat16() if matrix.shape[0] <= matrix.shape[1] else matrix.bfloat16().T
    wide = wide / wide.norm()
    for _ in range(5):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def test_muon_by_hand() -> None:
    """Two steps: momentum 0.95, looked ahead, made orthogonal, 0.2 sqrt(longer side) as large; decay 0.1."""
    trained = tiny.trainer(Policy(tiny.language_model("llama"), 64), "zero0", "fp32", {"name": "muon"})
    weight = trained.module.model.model.layers[0].mlp.up_proj.weight  # (64, 32)
    wanted, momentum = weight.detach().clone(), torch.zeros_like(weight)
    seen: list[Tensor] = []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.detach().clone()))
    for _ in range(2):
        tiny.step(trained, ITEMS, range(7), WHOLE, rate=0.01)
        gradient = seen.pop()
        momentum = 0.95 * momentum + 0.05 * gradient
        step = orthogonal(0.05 * gradient + 0.95 * momentum)
        wanted = wanted * (1 - 0.01 * 0.1) - 0.01 * 0.2 * math.sqrt(64) * step
        tiny.close(weight.detach(), wanted, of=[wanted, 100 * step.float().abs().max()])
    sizes = torch.linalg.svdvals(step.float())
    assert sizes.min() > 0.4 and sizes.max() < 1.4


def test_muon_steps_hidden_matrices_alone() -> None:
    """Embeddings (the output matrix is tied to them), heads, vectors and fused experts are AdamW's, as alone."""
    made = {one: Policy(tiny.language_model("llama"), 64) for one in ("adamw", "muon")}
    weights = {}
    for name, policy in made.items():
        trained = tiny.trainer(policy, "zero0", "fp32", {"name": name})
        tiny.step(trained, ITEMS, range(7), WHOLE)
        weights[name] = trained.state_dict()
    moved = {n for n, w in weights["adamw"].items() if not torch.equal(w, weights["muon"][n])}
    hidden = {n for n, p in made["muon"].named_parameters() if p.dim() == 2 and "embed" not in n}
    assert moved == hidden and len(hidden) == 2 * 7
    groups = muon.muon_groups(Policy(experts.model("mixtral"), 64), 0.1)
    shapes = [[p.dim() for p in group["params"]] for group in groups]
    assert [group[muon.BY_MUON] for group in groups] == [True, False, False]
    assert {*shapes[0]} == {2} and {*shapes[1]} == {2, 3} and {*shapes[2]} == {1}
    assert len(shapes[1]) == 2 + 2 * 2  # embeddings, head; two layers of two fused matrices
    bart = tiny.language_model("bart")
    apart = muon.muon_groups(RewardModel(bart), 0.1)[1]["params"]
    assert {id(p) for p in apart} == {id(bart.model.shared.weight)} | {
        id(part.embed_positions.weight) for part in (bart.model.encoder, bart.model.decoder)
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_muon_resumes_exactly(tmp_path: Path, precision: str) -> None:
    one = tiny.trainer(Policy(tiny.language_model("llama"), 64), "zero0", precision, {"name": "muon"})
    tiny.two_steps(one, ITEMS)
    one.save(tmp_path / "step-2")
    other = tiny.trainer(Policy(tiny.language_model("llama", seed=1), 64), "zero0", precision, {"name": "muon"})
    other.load(tmp_path / "step-2")
    assert tiny.two_steps(one, ITEMS) == tiny.two_steps(other, ITEMS)
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in one.state_dict().items())


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3"])
def test_adamw_in_8_bits_is_nearly_adamw(tmp_path: Path, zero: str) -> None:
    """Its first step is AdamW's, the later ones have moments of 8 bits; and it resumes exactly."""
    found = {}
    for name in ("adamw", "adamw_8bit"):
        trained = tiny.trainer(Policy(tiny.language_model("llama"), 64), zero, "fp32", {"name": name})
        found[name] = [tiny.step(trained, ITEMS, range(7), WHOLE) for _ in range(3)]
    assert found["adamw_8bit"][:2] == pytest.approx(found["adamw"][:2], rel=1e-5)
    last = [norms[2] for norms in found.values()]
    assert last[0] == pytest.approx(last[1], rel=1e-2) and last[0] != last[1]
    trained.save(tmp_path / "step-3")
    other = tiny.trainer(Policy(tiny.language_model("llama", 1), 64), zero, "fp32", {"name": "adamw_8bit"})
    other.load(tmp_path / "step-3")
    assert tiny.two_steps(trained, ITEMS) == tiny.two_steps(other, ITEMS)


@pytest.mark.skipif(bool(importlib.util.find_spec("bitsandbytes")), reason="bitsandbytes is installed")
def test_8_bits_without_their_package() -> None:
    module, settings = nn.Linear(2, 2), tiny.optimizer_settings(name="adamw_8bit")
    with pytest.raises(UserError, match=r"optimizer\.name: adamw_8bit: the package bitsandbytes is not installed"):
        optimizer.client_optimizer(module, settings)


@pytest.mark.parametrize(
    ("name", "zero", "refused"),
    [
        ("muon", "zero1", True), ("muon", "zero3", True), ("muon", "zero2_offload", True), ("muon", "zero0", False),
        ("adamw_8bit", "zero3_offload", True), ("adamw_8bit", "zero3", False), ("adamw", "zero3_offload", False),
    ],
)  # fmt: skip
def test_what_an_optimizer_cannot_be_sharded_as(name: str, zero: str, refused: bool) -> None:
    chosen, train = tiny.optimizer_settings(name=name), tiny.train_settings(zero=zero)
    config = deepspeed.read_ds_config(zero)["zero_optimization"]
    if not refused:
        together.optimizer_fits(chosen, train, config)
        return
    with pytest.raises(UserError, match=rf"optimizer\.name: {name} with {zero}: .*, wanted "):
        together.optimizer_fits(chosen, train, config)


def test_names_that_others_have() -> None:
    for word, name in {"adamw_torch": "adamw", "adamw_bnb_8bit": "adamw_8bit", "muon": "muon"}.items():
        assert resolve(["stage=sft", f"optim={word}"]).settings.optimizer.name == name
    chosen = resolve(["stage=sft", "lr_scheduler_type=wsd", "warmup_steps=7"]).settings.optimizer
    assert (chosen.lr_scheduler_type, chosen.warmup_steps, chosen.warmup_ratio) == ("warmup_stable_decay", 7, None)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["warmup_steps=7", "warmup_ratio=0.1"], "warmup_ratio and warmup_steps are both given"),
        (["lr_scheduler_type=warmup_stable_decay", "warmup_ratio=0.9"], "0.9 of the steps warm up and 0.2 decay"),
        (["lr_scheduler_type=constant", "min_lr_ratio=0.1"], "a constant rate never falls"),
    ],
)
def test_courses_that_cannot_be(words: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        resolve(["stage=sft", *words])


# DeepSpeed's other keys


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("tensor_parallel", {"autotp_size": 2}, r"tensor_parallel\.autotp_size is 2, so that ranks would share rows"),
        ("sequence_parallel_size", 2, "sequence_parallel_size is 2, so that ranks would share rows"),
        ("pipeline", {"stages": 2}, "ranks would share rows"),
        ("expert_parallel", {"enabled": True}, "ranks would share rows"),
        ("gradient_allreduce_op", "sum", "gradient_allreduce_op is 'sum', which changes what a step is, wanted 'mean'"),
        ("elasticity", {"enabled": True}, "changes what a step is"),
        ("compression_training", {}, "compression_training changes what a step is"),
    ],
)
def test_keys_that_are_refused(tmp_path: Path, key: str, value: object, complaint: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, key: value}))
    with pytest.raises(UserError, match=complaint):
        resolve(["stage=sft", f"zero={file}"])


def test_keys_that_round_are_said(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    zero = {"stage": 3, "zero_hpz_partition_size": 2, "zero_quantized_weights": True}
    shared = {"sequence_parallel_size": 1, "tensor_parallel": {"autotp_size": 0}}
    file.write_text(json.dumps({"zero_optimization": zero, **shared, "communication_data_type": "bf16"}))
    lines = deepspeed.rounded(str(file))
    assert [line.split(": ")[2].split(" ")[0] for line in lines] == [
        "zero_optimization.zero_quantized_weights",
        "communication_data_type",
    ]
    offload = {"device": "cpu", "super_offload": True}
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": offload, "zenflow": {}}}))
    assert [line.rsplit(": ", 1)[1] for line in deepspeed.rounded(str(file))] == ["not tested here"]
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}))
    assert "zenflow steps most weights later" in deepspeed.rounded(str(file))[0]
    assert not any(deepspeed.rounded(path.stem) for path in deepspeed.DS_CONFIGS.glob("*.json"))


# weights of 4 bits: reading and training them has not been run


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "a new model is read from no checkpoint: give model="),
        (("model=somewhere",), "weights of 4 bits are not trained themselves: set lora_r=16"),
        (("model=somewhere", "lora_r=8", "zero=zero3", "bf16=true"), "zero3 would cut them in parts"),
        (("model=somewhere", "lora_r=8"), "no finer than bfloat16: set bf16=true"),
        (("model=somewhere", "lora_r=8", "bf16=true"), "needs a GPU, and there is none here"),
    ],
)
def test_models_that_cannot_be_read_in_4_bits(words: tuple[str, ...], complaint: str) -> None:
    chosen = resolve(["stage=sft", "load_in_4bit=true", *words])
    with pytest.raises(UserError, match=rf"model\.load_in_4bit: .*{complaint}"):
        stage = deepspeed.read_ds_config(chosen.settings.train.zero)["zero_optimization"]["stage"]
        together.four_bits(chosen.settings.model, chosen.settings.train, stage, gpu=False)
    told = [*faults.of_four_bits(chosen.settings, stage)]
    assert complaint in told[0] or torch.cuda.is_available()


def test_what_bitsandbytes_is_told_of_4_bits() -> None:
    """And nothing where it is not asked for, or where a GPU has all it needs."""
    ready = resolve(
        ["stage=sft", "load_in_4bit=true", "model=somewhere", "lora_r=8", "bf16=true", "zero=zero2"]
    ).settings
    together.four_bits(ready.model, ready.train, 2, gpu=True)
    plain = resolve(["stage=sft"]).settings
    together.four_bits(plain.model, plain.train, 3, gpu=False)
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(UserError, match=r"model\.load_in_4bit: the package bitsandbytes is not installed"):
            loading.four_bits(torch.bfloat16)
        return
    told = loading.four_bits(torch.bfloat16)
    assert told.load_in_4bit and told.bnb_4bit_quant_type == "nf4" and told.bnb_4bit_use_double_quant
    assert told.bnb_4bit_compute_dtype == torch.bfloat16
