"""What a GPU alone can show: `bash run.sh stage=test gpu`. Where there is none, the same at toy size as far as it goes.

On a CPU bfloat16 stands for float16, gloo for NCCL, eager attention for flash attention, and the profiler for the GPU's
own count of memory: what is executed then are these checks themselves.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.algorithms.logits import token_logps
from pipeline.bench import steps
from pipeline.bench.measure import peak_megabytes
from pipeline.bench.setup import prepare
from pipeline.config.resolve import resolve
from pipeline.data.batching import Packing, collate
from pipeline.models import memory
from pipeline.models.policy import CHUNK_ELEMENTS, Policy
from pipeline.records import Item
from pipeline.trainer.engine import Engine
from tests import gpu_ranks, tiny

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")
HALF = "fp16" if GPU else "bf16"
needs_gpu = pytest.mark.skipif(not GPU, reason="no GPU here: bash run.sh stage=test gpu where there is one")


def policy(**changes: Any) -> Policy:
    return Policy(tiny.language_model("llama", **changes), 64)


# float16 and its loss scale


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"] if GPU else ["zero1"])
def test_steps_in_half_precision_are_those_in_float32(zero: str) -> None:
    """Norms to 2 %; weights to four roundings of the largest, of which two steps and the saved type each make some."""
    exact, half = tiny.trainer(policy()), tiny.trainer(policy(), zero, HALF)
    wanted, found = tiny.two_steps(exact, tiny.items(9)), tiny.two_steps(half, tiny.items(9))
    assert found == pytest.approx(wanted, rel=0.02 if GPU else 0.1)
    weights = half.state_dict()
    for name, weight in exact.state_dict().items():
        allowed = 4 * torch.finfo(weights[name].dtype).eps * max(1.0, float(weight.abs().max()))
        assert (weights[name].float() - weight).abs().max() < allowed, name


@needs_gpu
@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_a_loss_that_float16_cannot_hold_takes_no_step_and_lowers_the_scale(zero: str) -> None:
    trained = tiny.trainer(policy(), zero, "fp16")
    batch = collate(tiny.items(4), range(4), Packing(4, None, False, tiny.PAD_ID))
    before, scale = trained.state_dict(), trained._engine.optimizer.loss_scale
    for _ in range(3):  # DeepSpeed forgives the first
        trained.train()
        trained.backward(-trained(batch).sum() * 1e30, torch.tensor(1.0, dtype=torch.float64), last=True)
        assert not math.isfinite(trained.step(0.2))
    assert all(torch.equal(weight, before[name]) for name, weight in trained.state_dict().items())
    assert trained._engine.optimizer.loss_scale < scale
    assert all(map(math.isfinite, tiny.two_steps(trained, tiny.items(9))))
    assert any(not torch.equal(weight, before[name]) for name, weight in trained.state_dict().items())


# ranks


def test_ranks_talk_and_share_a_step_under_every_stage(tmp_path: Path) -> None:
    """Two GPUs where there are two; else one by itself. The step is the same however it is shared."""
    alone = gpu_ranks.norms(DEVICE)
    gpu_ranks.talk(tiny.ranks())
    for zero in gpu_ranks.STAGES:
        assert alone[zero] == pytest.approx(alone["zero0"], rel=1e-4)
    if GPU and torch.cuda.device_count() > 1:
        shared = tiny.on_two_processes("tests.gpu_ranks", tmp_path)
        for zero in gpu_ranks.STAGES:
            assert shared[zero] == pytest.approx(alone["zero0"], rel=1e-4)


# kernels


def test_flash_attention_reads_rows_as_sdpa_does() -> None:
    kernel, dtype, allowed = ("flash_attention_2", torch.bfloat16, 0.1) if GPU else ("eager", torch.float32, 1e-4)
    if GPU and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed here")
    batch = collate(tiny.items(6), range(6), Packing(6, None, False, tiny.PAD_ID)).to(DEVICE)  # of ragged lengths
    found = []
    for name in ("sdpa", kernel):
        module = policy(hidden_size=64, num_attention_heads=2).to(DEVICE, dtype)
        module.model.set_attn_implementation(name)
        logp = module(batch)
        logp.sum().backward()
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        found.append((logp[batch.response_mask].float(), float(nn.utils.get_total_norm(gradients))))
    (logp, norm), (other, other_norm) = found
    assert (logp - other).abs().max() < allowed and other_norm == pytest.approx(norm, rel=allowed)
    assert logp.std() > 10 * allowed or not GPU  # what is compared varies by more than it may differ


# memory


def test_logits_of_a_long_vocabulary_are_never_whole() -> None:
    """At most: a slice's logits, log-probabilities and two gradients; the states and the head, each with gradients."""
    tokens, width, words = (8192, 1024, 131_072) if GPU else (512, 16, 4096)
    most = CHUNK_ELEMENTS if GPU else 1 << 17
    torch.manual_seed(0)
    head = nn.Linear(width, words, bias=False, device=DEVICE)
    hidden = torch.randn(tokens, width, device=DEVICE, requires_grad=True)
    targets = torch.randint(words, (tokens,), device=DEVICE)
    chunks = math.ceil(tokens * words / most)

    def work() -> None:
        torch.autograd.grad(token_logps(hidden, head, targets, chunks).sum(), [hidden, head.weight])

    whole = 4 * tokens * words
    bound = 4 * 4 * most + 3 * 4 * (tokens * width + words * width)
    peak = 1e6 * peak_megabytes(work)
    assert peak < bound < whole, (peak, bound, whole)


@needs_gpu
def test_offloaded_steps_are_the_same_and_take_less_of_the_gpu() -> None:
    norms, held = {}, {}
    for zero in ("zero2", "zero2_offload", "zero3", "zero3_offload"):
        before = torch.cuda.memory_allocated()
        trained = tiny.trainer(policy(hidden_size=256, intermediate_size=1024, num_attention_heads=4), zero, "bf16")
        norms[zero] = tiny.two_steps(trained, tiny.items(9))
        held[zero] = torch.cuda.memory_allocated() - before
        del trained
    for zero, found in norms.items():
        assert found == pytest.approx(norms["zero2"], rel=0.02), zero
    assert held["zero2_offload"] < 0.7 * held["zero2"]  # of 16 bytes a weight, 12 are the optimizer's
    assert held["zero3_offload"] < held["zero2_offload"]


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"] if GPU else ["zero0"])
def test_the_plan_is_what_a_step_takes(zero: str) -> None:
    """To a tenth on a GPU, where layers are large; to a factor of two of toy size."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 8, "num_attention_heads": 8}
    sizes = sizes if GPU else {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4}
    sizes = {"num_attention_heads": 4, **sizes, "vocab_size": 32_000 if GPU else 400}
    rows, length = (16, 256) if GPU else (8, 32)
    items = [Item(None, (tiny.row([5] * length, [6] * length),)) for _ in range(rows)]
    packing = Packing(rows, None, False, tiny.PAD_ID)
    train = tiny.train_settings(zero=zero, precision="bf16" if GPU else "fp32", batch_size=rows)
    settings = tiny.settings("sft").model_copy(update={"train": train})
    settings = settings.model_copy(
        update={"data": settings.data.model_copy(update={"max_prompt_length": length, "max_response_length": length})}
    )
    seen: list[memory.Shape] = []

    def work() -> None:
        lm = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=2 * length))
        module = Policy(lm.to(torch.bfloat16) if GPU else lm, rows * length)
        seen.append(memory.shape_of(lm, settings))
        trained = Engine(module, tiny.ranks(), train, tiny.optimizer_settings())
        for _ in range(2):
            tiny.step(trained, items, range(rows), packing)

    measured = 1e6 * peak_megabytes(work)
    load = memory.Load(tokens=rows * 2 * length, sampled=0, buffers=GPU)
    planned = memory.memory(seen[0], train, load, 1, memory.zero_of(settings))
    ratio = (planned.needed - planned.program) / measured
    assert (0.9 if GPU else 0.5) < ratio < (1.1 if GPU else 2.0), (ratio, planned, measured)


# speed


@needs_gpu
def test_the_bench_says_what_share_of_the_gpu_a_step_uses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    room = torch.cuda.get_device_properties(0).total_memory
    words = [] if room > 60e9 else ["gpu.hidden_size=1024", "gpu.num_layers=12", "gpu.num_heads=8"]
    settings = resolve(["stage=bench", "rounds=3", "steps=2", *words]).settings
    results = steps.against_bare(prepare(settings, tiny.ranks(), tmp_path, tmp_path))
    with capsys.disabled():
        print("\n", *(f"{one.name}: {one.ours:.4g} {one.unit} {one.note}" for one in results), sep="\n")
    assert results[1].mfu is None or 0.05 < results[1].mfu < 1.0
