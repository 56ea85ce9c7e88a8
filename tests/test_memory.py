"""The memory estimate against what autograd really keeps, and what this machine has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from pipeline.config.deepspeed import read_ds_config
from pipeline.config.resolve import resolve
from pipeline.data.batching import Packing, collate
from pipeline.errors import UserError
from pipeline.launch import machine
from pipeline.launch.entry import warn_of_slow_bf16
from pipeline.models import build, memory, plan
from pipeline.models.lora import Base, with_lora
from pipeline.models.policy import Policy
from pipeline.records import Example, Item
from tests import tiny
from tests.documents import DOCUMENTS


def training(**train: Any) -> Any:
    """Settings whose rows are three quarters prompt, as those of `kept_bytes`."""
    settings = tiny.settings("sft", "max_prompt_length=48", "max_response_length=16")
    return settings.model_copy(update={"train": tiny.train_settings(**train)})


def kept_bytes(model: PreTrainedModel | PeftModel) -> int:
    """What a forward over 4 rows of 48 + 16 tokens keeps for backward, weights not counted, logits not made."""
    policy, kept = Policy(model.train(), 64), {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    rows = [Item(Example(str(i), ""), (tiny.row([5] * 48, [6] * 16),)) for i in range(4)]
    batch = collate(rows, range(4), Packing(4, None, policy.encoder_decoder, tiny.PAD_ID))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, or another could be given its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy(batch, output="heads")
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_activations_are_what_autograd_keeps(shape: str) -> None:
    """Within the spread of architectures, whether all is kept or, but for one of four layers, made again."""
    layers = {
        "llama": {"num_hidden_layers": 4},
        "gpt2": {"n_layer": 4},
        "t5": {"num_layers": 4, "num_decoder_layers": 4},
    }
    layers["bart"] = {"encoder_layers": 4, "decoder_layers": 4}
    model = tiny.language_model(shape, **layers[shape])
    whole = kept_bytes(model)
    settings = {again: training(gradient_checkpointing=again) for again in (False, True)}
    build.enable_checkpointing(model, settings[True].train)
    kept = {False: whole, True: kept_bytes(model) + whole / 4}
    for again, found in settings.items():
        size = memory.shape_of(model, found)
        estimated = memory.memory(size, found.train, memory.Load(4 * 64, 0), 1, {"stage": 0}).activations
        assert 0.7 < estimated / kept[again] < 1.4, (again, estimated, kept[again])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_eager_kernel_keeps_how_tokens_attend(precision: str) -> None:
    """4 rows of 64 tokens, 2 layers of 8 heads: 4 x 2 x 8 x 64 x 64 numbers are most of what is kept."""
    model = tiny.language_model("llama", num_attention_heads=8, attn_implementation="eager")
    model = model.to(getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[precision]))
    settings = training(precision=precision)
    eager = settings.model.model_copy(update={"attn_implementation": "eager"})
    size = memory.shape_of(model, settings.model_copy(update={"model": eager}))
    estimated = memory.memory(size, settings.train, memory.Load(4 * 64, 0), 1, {"stage": 0}).activations
    assert 0.7 < estimated / kept_bytes(model) < 1.4


def test_adapters_keep_no_more_but_train_less() -> None:
    """r = 4 on q, k, v, o (32 x 32) and gate, up, down (32 x 64) of 2 layers: 2 (4 x 4 x 64 + 3 x 4 x 96) = 4,352."""
    settings = training()
    lora = settings.model.lora.model_copy(update={"r": 4})
    plain = memory.shape_of(tiny.language_model("llama"), settings)
    adapted = memory.shape_of(with_lora(tiny.language_model("llama"), Base("llama"), lora, "CAUSAL_LM"), settings)
    assert adapted.outputs == plain.outputs == 2 * (4 * 32 + 2 * 64 + 32)
    assert (adapted.trained, adapted.parameters) == (4352, plain.parameters + 4352)


@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_the_cache_is_what_generation_keeps(shape: str) -> None:
    """Of 2 rows of 5 prompt tokens and 7 new ones, of which the last is never read; a decoder keeps its start too."""
    model = tiny.language_model(shape).eval()
    ids, whole = torch.full((2, 5), 5), {"max_new_tokens": 7, "min_new_tokens": 7, "return_dict_in_generate": True}
    with torch.no_grad():
        cache = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **whole).past_key_values
    halves = [cache.self_attention_cache, cache.cross_attention_cache] if model.config.is_encoder_decoder else [cache]
    kept = sum(layer.keys.numel() + layer.values.numel() for half in halves for layer in half.layers)
    tokens = 2 * (5 + 7 - (0 if model.config.is_encoder_decoder else 1))
    assert kept == tokens * memory.shape_of(model, training()).cache


def test_sampling_takes_the_place_of_activations() -> None:
    """8 ranks of 8 weights each in 4 bytes: all 64 are gathered to sample; 3 tokens of 2 numbers are kept."""
    shape = memory.Shape(64.0, 64.0, 1, 1, 0, 0.0, 2.0)
    found = memory.memory(shape, training().train, memory.Load(0, 3), 8, {"stage": 3})
    assert (found.sampling, found.weights) == (3 * 2 * 4 + 64 * 4, 8 * 4)
    learning = found.gathered + found.stepping + found.activations + found.logits
    assert found.needed == sum(found) - min(learning, found.sampling)
    assert found._replace(activations=1e6).needed == sum(found) - found.sampling - found.activations + 1e6
    alone = memory.memory(shape, training().train, memory.Load(0, 3, layers=True), 8, {"stage": 3})
    assert alone.sampling == found.sampling  # all of so small a model are read at once
    words = ("batch_size=16", "max_prompt_length=48", "max_new_tokens=16")
    rows = {
        "rl algo=esrl": 16 * 8,  # prompts of a step, k_max
        "rl algo=nll": 64,  # generation.batch_size of 400 held-out prompts
        "rl algo=alol": 64 * 4,  # of 100 prompts, value.samples_per_prompt
        "rl algo=alol value.targets=data": 64,
    }
    for stage, wanted in rows.items():
        settings = resolve([f"stage={stage.split()[0]}", *stage.split()[1:], *words]).settings
        assert memory.load_of(settings).sampled == wanted * (48 + 16)
    assert memory.load_of(resolve(["stage=sft", *words, "max_response_length=12"]).settings).sampled == 8 * (48 + 12)
    assert memory.load_of(resolve(["stage=plan"]).settings).sampled == 0


# Published configurations: hidden, layers, feed-forward, keys, queries, vocabulary, one matrix for both ends.
PUBLISHED = {
    "SmolLM2-135M": (576, 30, 1536, 192, 576, 49152, True),
    "SmolLM2-360M": (960, 32, 2560, 320, 960, 49152, True),
    "Qwen2.5-0.5B": (896, 24, 4864, 128, 896, 151936, True),
    "Llama-3.2-1B": (2048, 16, 8192, 512, 2048, 128256, True),
    "Qwen3-1.7B": (2048, 28, 6144, 1024, 2048, 151936, True),
    "Llama-3.2-3B": (3072, 28, 8192, 1024, 3072, 128256, True),
    "Qwen2.5-7B": (3584, 28, 18944, 512, 3584, 152064, False),
    "Llama-3.1-8B": (4096, 32, 14336, 1024, 4096, 128256, False),
    "Mistral-Nemo-12B": (5120, 40, 14336, 1024, 4096, 131072, False),
    "Qwen2.5-32B": (5120, 64, 27648, 1024, 5120, 152064, False),
    "Llama-3.1-70B": (8192, 80, 28672, 1024, 8192, 128256, False),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("again", [False, True])
def test_the_plan_by_size_is_near_that_by_configuration(name: str, again: bool, tmp_path: Path) -> None:
    published_model(name, tmp_path)
    words = ["bf16=true", "zero=zero3", "gpus=8", "max_tokens=4096", f"gradient_checkpointing={str(again).lower()}"]
    real = plan.planned_shape(resolve(["stage=plan", f"model={tmp_path}", *words]).settings)
    settings = resolve(["stage=plan", f"parameters={real.parameters}", *words]).settings
    found, wanted = (
        memory.memory(one, settings.train, memory.load_of(settings), 8, {"stage": 3})
        for one in (plan.planned_shape(settings), real)
    )
    assert found.weights == wanted.weights and found.optimizer == wanted.optimizer
    assert 0.8 < found.activations / wanted.activations < 1.21
    assert 0.8 < found.logits / wanted.logits < 1.2
    assert 0.87 < found.needed / wanted.needed < 1.13


def published_model(name: str, folder: Path) -> Path:
    """`folder` with the configuration of that name."""
    hidden, layers, inner, keys, queries, vocabulary, tied = PUBLISHED[name]
    width = keys // max(1, keys // 128) if keys >= 512 else 64
    heads = {"num_attention_heads": queries // width, "num_key_value_heads": keys // width, "head_dim": width}
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": inner, "vocab_size": vocabulary}
    LlamaConfig(**sizes, **heads, tie_word_embeddings=tied).save_pretrained(folder)
    return folder


def test_the_command_of_readme_fits(tmp_path: Path) -> None:
    """On GPUs of 80 GB, a tenth of which is left for what is not estimated."""
    found = re.findall(r"bash run\.sh (.*model=meta-llama/Llama-3\.1-8B.*)", DOCUMENTS["README.md"])
    assert found
    published_model("Llama-3.1-8B", tmp_path)
    for command in found:
        words = command.replace("meta-llama/Llama-3.1-8B", str(tmp_path)).split()
        settings = resolve(words).settings
        world, stage = settings.launch.processes, read_ds_config(settings.train.zero)["zero_optimization"]["stage"]
        needed = memory.memory(
            plan.planned_shape(settings), settings.train, memory.load_of(settings), world, {"stage": stage}
        ).needed
        assert 20e9 < needed < 0.9 * 80e9


def test_experts_count_where_a_token_is_read() -> None:
    """2 of 4 experts of gate and up (2 x 48 out) and down (32 out), beside q, o (32 each), k, v (16 each), a router."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=99, num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2, **sizes)
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    router = 4  # counted like an expert's matrix or not: small beside them
    found = memory.shape_of(model, training()).outputs
    assert found - (2 * 32 + 2 * 16 + 2 * (96 + 32)) in (0, router)


def test_the_plan_compares_with_what_there_is(capfd: pytest.CaptureFixture) -> None:
    words = ["model.scratch.hidden_size=96", "model.scratch.vocab_size=1000", "max_tokens=1024"]
    gpu, here = (plan.estimate(tiny.settings("plan", *words, *more)) for more in (["gpu_memory_gb=0.5"], []))
    assert "fits in 0.5 GB, with a tenth to spare: none" in gpu
    assert "a GPU has 0.5 GB for it: too little; lower train.max_tokens" in gpu
    assert f"this machine (no GPU) has {machine.ram() / 1e9:.1f} GB for it" in here and "too little" not in here
    two = plan.estimate(tiny.settings("plan", *words, "gpus=2"))
    assert f"has {machine.ram() / 2e9:.1f} GB for it" in two
    by_size = plan.estimate(resolve(["stage=plan", "parameters=8B", "bf16=true", "zero=3", "gpus=8"]).settings)
    assert "shape: typical of that size, 32 layers of 4,096, vocabulary 128,256\n" in by_size
    with pytest.raises(UserError, match="both model=x and parameters are given, wanted one"):
        resolve(["stage=plan", "parameters=8e9", "model=x"])
    # a training says it before its first step, and only where it matters
    memory.warn_where_short(tiny.language_model("llama"), training(), 1)
    assert not capfd.readouterr().err
    memory.warn_where_short(tiny.language_model("llama"), training(max_tokens=10**9), 1)
    said = capfd.readouterr().err
    assert said.startswith("tiffin: memory: needs about ") and said.count("\n") == 1 and "too little" in said


def test_what_generates_gathers_layers_where_the_whole_does_not_fit() -> None:
    """No machine has 1,000 TB for each process; and a reference is a second model."""
    words = ["stage=rl", "algo=esrl", "bf16=true", "gpus=8"]
    settings = resolve([*words, "zero=zero3"]).settings
    small, huge = (memory.Shape(n, 0.0, 8, 1, 0, 0.0, 8.0) for n in (1e3, 1e15))
    assert memory.by_layers(settings, huge, 8) and not memory.by_layers(settings, small, 8)
    assert not memory.by_layers(resolve([*words, "zero=zero3", "generation.gather=whole"]).settings, huge, 8)
    assert not memory.by_layers(resolve([*words, "zero=zero2"]).settings, huge, 8)
    whole, layers = (memory.memory(huge, settings.train, memory.Load(0, 9, one), 8, {"stage": 3}) for one in (0, 1))
    assert whole.sampling - layers.sampling == 2 * (1e15 - 1e9)  # stage3_max_live_parameters
    learner = resolve([*words, "zero=zero3", "algorithm.settings.kl_beta=0.1"]).settings
    assert memory.load_of(learner).reference and not memory.load_of(settings).reference
    assert memory.memory(huge, settings.train, memory.Load(0, 0, reference=True), 8, {"stage": 3}).reference == 2.5e14
    silent = resolve(["stage=sft", "eval.generate=false", "data.task=numerals"]).settings
    assert memory.load_of(silent).sampled == 0


def test_the_plan_counts_what_is_meant(tmp_path: Path) -> None:
    """Ranks of all machines; offload only where there are two memories; as cures, settings that are not set yet."""
    (tmp_path / "hosts").write_text("a slots=8\nb slots=8\n")
    planned = lambda *words: plan.estimate(resolve(["stage=plan", "parameters=8B", *words]).settings)  # noqa: E731
    many = planned("zero=zero3_offload", "bf16=true", "gpu_memory_gb=9", f"hostfile={tmp_path / 'hosts'}")
    assert "over 16 processes" in many and "the optimizer's 6.00 GB per process are in the host's memory" in many
    assert many.split("or set ")[1].startswith("gradient_checkpointing=true, lora_r=16\n")
    one = planned("zero=zero2_offload", "lora_r=16")
    if not torch.cuda.is_available():
        assert "host's memory" not in one and "or set bf16=true, gradient_checkpointing=true\n" in one


def test_reward_models_count_with_what_is_below_their_adapters(tmp_path: Path) -> None:
    """12 bytes of adapters lie on 1,000 of a model; a pair is two rows of prompt and response."""
    for name, size in (("below", 1000), ("judge", 12)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(size))
    (tmp_path / "judge" / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{tmp_path / "below"}"}}')
    words = [f"reward={tmp_path / 'judge'}", f"runs_dir={tmp_path}", "micro_batch_size=3", "max_tokens=null"]
    words += ["max_prompt_length=48", "max_response_length=16"]
    alone = memory.load_of(resolve(["stage=rl", "algo=nll", *words]).settings)
    assert (alone.judges, alone.tokens) == (1012, 3 * 64)
    assert memory.load_of(resolve(["stage=rl", "algo=dpo", *words[1:]]).settings).tokens == 3 * 2 * 64


def system(folder: Path, **files: str) -> Path:
    """A machine's files; a name's double underscores are its folders."""
    for name, text in {"proc__meminfo": "MemTotal:       1000 kB\nMemFree: 10 kB\n", **files}.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_ram_is_what_the_control_groups_allow(tmp_path: Path) -> None:
    assert machine.ram(system(tmp_path / "none")) == 1_024_000
    group = system(tmp_path / "two", proc__self__cgroup="0::/job/step\n")
    inner, outer = group / "sys/fs/cgroup/job/step/memory.max", group / "sys/fs/cgroup/job/memory.max"
    inner.parent.mkdir(parents=True)
    inner.write_text("max\n")
    outer.write_text("5000\n")
    assert machine.ram(group) == 5000  # of the group around it
    outer.write_text("max\n")
    assert machine.ram(group) == 1_024_000
    first = system(tmp_path / "one", proc__self__cgroup="3:cpu:/x\n2:blkio,memory:/box\n1:name=systemd:/\n")
    limit = first / "sys/fs/cgroup/memory/box/memory.limit_in_bytes"
    limit.parent.mkdir(parents=True)
    limit.write_text("7000\n")
    assert machine.ram(first) == 7000


def test_slow_bf16_is_told(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    lines = {
        "old": "flags\t\t: fpu avx2",
        "new": "flags : avx2 avx512_bf16",
        "arm": "Features\t: fp bf16",
        "other": "cpu : POWER9",
    }
    here = {name: system(tmp_path / name, proc__cpuinfo=f"processor : 0\n{line}\n") for name, line in lines.items()}
    assert [machine.computes_bf16(place) for place in here.values()] == [False, True, True, None]
    for place in [*here.values(), system(tmp_path / "gpu", proc__cpuinfo="flags : fpu\n", dev__nvidia0="")]:
        warn_of_slow_bf16("bf16", place)
    warn_of_slow_bf16("fp32", here["old"])
    assert capfd.readouterr().err.count("bf16 on a CPU without bf16 instructions") == 1
