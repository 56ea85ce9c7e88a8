"""The engine on real DeepSpeed: one exact mean, clipping, generation, checkpoints, export; ZeRO 0-3, 1 and 2 ranks."""

from __future__ import annotations

import json
from itertools import chain
from math import isfinite
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import safe_get_full_fp32_param
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from pipeline.algorithms import supervised
from pipeline.config import deepspeed, together
from pipeline.data.batching import Packing, Windows, collate
from pipeline.errors import UserError
from pipeline.models import loading, plan, writing
from pipeline.models.loading import hugging_face
from pipeline.models.policy import Policy
from pipeline.rollout.generate import _until_end
from pipeline.trainer import engine, optimizer
from tests import tiny, two_ranks

STAGES = ["zero0", "zero1", "zero2", "zero3"]
BUDGET = Packing(None, 40, False, tiny.PAD_ID)
WHOLE = Packing(None, 10**6, False, tiny.PAD_ID)
ITEMS = tiny.items(9)


def policy(shape: str = "llama", seed: int = 0) -> Policy:
    return Policy(tiny.language_model(shape, seed), 64)


def plain_step(
    module: Policy, optimizer: torch.optim.Optimizer, groups: list[list[int]], weight_of=None, clip: float = 0.0
) -> float:
    """One torch step on the mean over all tokens of `groups`; `weight_of` replaces each group's share of the mean."""
    apart = Packing(None, 10**6, module.encoder_decoder, tiny.PAD_ID)
    batches = [collate(ITEMS, group, apart) for group in groups]
    n = sum(int(batch.response_mask.sum()) for batch in batches)
    optimizer.zero_grad()
    for batch in batches:
        total, _ = supervised.loss(module(batch), batch, supervised.Settings(0.0))
        share = 1 / n if weight_of is None else weight_of(batch)
        (total * share).backward()
    norm = nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    if clip:
        nn.utils.clip_grad_norm_(module.parameters(), clip)
    optimizer.step()
    return float(norm)


def plain_adam(module: Policy, **changes) -> torch.optim.Optimizer:
    settings = tiny.optimizer_settings(**{**tiny.PLAIN_STEP, **changes})
    groups = optimizer.parameter_groups(module, settings.weight_decay)
    return torch.optim.AdamW(groups, **{**optimizer.adam_arguments(settings), "lr": settings.learning_rate})


def plain_two_steps(module: Policy) -> list[float]:
    """What tiny.two_steps ought to do: each step one batch, one mean."""
    optimizer = plain_adam(module)
    return [plain_step(module, optimizer, [list(range(7))]), plain_step(module, optimizer, [[8, 1, 8]])]


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours
    tiny.close(ours, {name: weight for name, weight in theirs.items() if name in ours})


@pytest.mark.parametrize("zero", STAGES)
def test_uneven_micro_batches_are_one_mean(zero: str) -> None:
    trained, plain = tiny.trainer(policy(), zero), policy()
    start = {name: weight.clone() for name, weight in plain.state_dict().items()}
    wanted = plain_two_steps(plain)
    assert tiny.two_steps(trained, ITEMS) == pytest.approx(wanted, rel=1e-5)
    found = trained.state_dict()
    close(found, plain.state_dict())
    moved = max(float((found[name] - start[name]).abs().max()) for name in found)
    assert moved > 0.05  # 2,000 times the tolerance


@pytest.mark.parametrize("shape", ["gpt2", "t5", "bart"])
def test_other_architectures_too(shape: str) -> None:
    trained, plain = tiny.trainer(policy(shape), "zero2"), policy(shape)
    assert tiny.two_steps(trained, ITEMS) == pytest.approx(plain_two_steps(plain), rel=1e-5)
    close(trained.state_dict(), plain.state_dict())


def test_a_mean_of_means_would_be_seen() -> None:
    """The tests above could not pass by accident: averaging micro-batches of different length gives another step."""
    groups = [[0, 1], [2], [3, 4, 5, 6]]
    right, naive = policy(), policy()
    plain_step(right, plain_adam(right), groups)
    plain_step(naive, plain_adam(naive), groups, weight_of=lambda batch: 1 / int(batch.response_mask.sum()) / 3)
    ours, theirs = right.state_dict(), naive.state_dict()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) > 1e-3


@pytest.mark.parametrize("zero", STAGES)
def test_p19_any_cut_into_micro_batches_is_the_same_step(zero: str) -> None:
    found = []
    for size in (1, 4):
        trained = tiny.trainer(policy(), zero)
        norm = tiny.step(trained, ITEMS, range(4), Packing(size, None, False, tiny.PAD_ID))
        found.append((norm, trained.state_dict()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    close(found[0][1], found[1][1])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", STAGES)
def test_clipping_is_by_the_global_norm_and_reports_it_unclipped(zero: str, precision: str) -> None:
    plain = policy()
    wanted = plain_step(plain, plain_adam(plain), [list(range(7))], clip=0.25)
    trained = tiny.trainer(policy(), zero, precision, {"max_grad_norm": 0.25})
    norm = tiny.step(trained, ITEMS, range(7), BUDGET)
    assert wanted > 2.5  # clipped tenfold
    assert norm == pytest.approx(wanted, rel=1e-5 if precision == "fp32" else 0.02)
    if precision == "fp32":
        close(trained.state_dict(), plain.state_dict())


@pytest.fixture
def fp16_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs compute in float16 too, slowly: what forbids it there is a check of DeepSpeed's and one of ours."""
    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda _: True)
    monkeypatch.setattr(together, "fp16_on_gpu", lambda *_: None)


def half_steps(trained: engine.Engine, dtype: torch.dtype, scale: float, clip: float) -> None:
    """Two steps, each held against its own by hand: gradients of half weights, AdamW on float32 copies of them."""
    plain = policy()
    for parameter in plain.parameters():
        parameter.data = parameter.data.to(dtype)
    names = dict(plain.named_parameters())
    masters = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(p.detach().float()) for name, p in names.items()})
    optimizer = plain_adam(masters)
    for _ in range(2):
        found = tiny.step(trained, ITEMS, range(7), WHOLE)
        plain.zero_grad()
        batch = Windows(ITEMS, lambda _: list(range(7)), WHOLE, 0, 1).at(0)[0]
        total, _ = supervised.loss(plain(batch), batch, supervised.Settings(0.0))
        (total / int(batch.response_mask.sum()) * scale).backward()
        for name, parameter in names.items():
            masters[name.replace(".", "/")].grad = parameter.grad.float() / scale
        norm = nn.utils.clip_grad_norm_(masters.parameters(), clip or torch.inf)
        assert found == pytest.approx(float(norm), rel=4 * torch.finfo(dtype).eps)
        optimizer.step()
        for name, parameter in trained.module.named_parameters():
            wanted = masters[name.replace(".", "/")].data
            names[name].data.copy_(wanted)
            # the norm is rounded to half precision where clipping divides by it
            tiny.close(master(trained, parameter), wanted, roundings=256 if clip else 2)
    weights = trained.state_dict()
    if not clip:
        assert all(torch.equal(weights[name], weight) for name, weight in names.items())


@pytest.mark.parametrize("clip", [0.0, 0.25])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("zero", STAGES)
def test_half_steps_are_adams_on_float32_masters(zero: str, precision: str, clip: float, fp16_here: None) -> None:
    """From the first one on; in float16 of a loss that is scaled, so that small gradients are not 0, and clipped as
    gradients that are not."""
    trained = tiny.trainer(policy(), zero, precision, {"max_grad_norm": clip})
    half_steps(trained, optimizer.PRECISIONS[precision], 2.0**16 if precision == "fp16" else 1.0, clip)


@pytest.mark.parametrize("zero", STAGES)
def test_fp16_leaves_out_a_step_that_overflows_and_halves_its_scale(zero: str, fp16_here: None, tmp_path: Path) -> None:
    """2^24 times a gradient of 5 is beyond float16's 65,504: no weight and no moment changes, and the next is finer."""
    file = tmp_path / "mine.json"
    shipped = deepspeed.read_ds_config(zero)
    shipped["fp16"] |= {"initial_scale_power": 24, "hysteresis": 1}
    file.write_text(json.dumps(shipped))
    trained = tiny.trainer(policy(), str(file), "fp16")
    kept = trained._engine.optimizer
    scales = kept.loss_scale_config if zero == "zero0" else kept.loss_scaler
    start, norms = trained.state_dict(), []
    while not norms or not isfinite(norms[-1]):
        before = scales.cur_scale
        norms.append(tiny.step(trained, ITEMS, range(7), WHOLE))
        assert isfinite(norms[-1]) or scales.cur_scale == before / 2
        moved = any(not torch.equal(start[name], weight) for name, weight in trained.state_dict().items())
        assert moved == isfinite(norms[-1])
    assert 2 <= len(norms) < 16
    plain = policy()
    wanted = plain_step(plain, plain_adam(plain), [list(range(7))])
    assert norms[-1] == pytest.approx(wanted, rel=2e-3)
    ours = {name: weight.float() for name, weight in trained.state_dict().items()}  # Adam's first step: eps is 1
    theirs = {name: weight for name, weight in plain.state_dict().items() if name in ours}
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=2e-3)


def master(trained: engine.Engine, parameter: nn.Parameter) -> torch.Tensor:
    """DeepSpeed's float32 copy of a weight in half precision."""
    if trained.stage:
        return safe_get_full_fp32_param(parameter)
    kept = trained._engine.optimizer
    pairs = zip(chain(*kept.fp16_groups), chain(*kept.fp32_groups), strict=True)
    return next(copy.detach() for weight, copy in pairs if weight is parameter)


def test_buffers_keep_their_precision() -> None:
    """Rotary frequencies in bfloat16 would turn far positions by whole radians."""
    train = tiny.train_settings(precision="bf16")
    engines = [engine.Engine(policy(), tiny.ranks(), train, choice) for choice in (None, tiny.optimizer_settings())]
    for one in engines:
        assert hugging_face(one.module.model).model.rotary_emb.inv_freq.dtype == torch.float32
        assert next(one.module.parameters()).dtype == torch.bfloat16
    batch = collate(ITEMS, range(4), BUDGET)
    with torch.no_grad():
        tiny.close(engines[0](batch), engines[1](batch))  # evaluation sees what training saw


def test_vectors_do_not_decay() -> None:
    module = policy()
    matrices, vectors = optimizer.parameter_groups(module, 0.1)
    assert matrices["weight_decay"] == 0.1 and vectors["weight_decay"] == 0.0
    assert {p.dim() for p in vectors["params"]} == {1} and {p.dim() for p in matrices["params"]} == {2}
    module.model.model.embed_tokens.weight.requires_grad_(False)
    counted = sum(len(group["params"]) for group in optimizer.parameter_groups(module, 0.1))
    assert counted == sum(p.requires_grad for p in module.parameters())


# export


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", ["llama", "t5"])
def test_export_under_zero_3_is_what_transformers_loads(tmp_path: Path, shape: str, precision: str) -> None:
    trained = tiny.trainer(policy(shape), "zero3", precision)
    tiny.two_steps(trained, ITEMS)
    weights = {name.removeprefix("model."): weight for name, weight in trained.state_dict().items()}
    assert all(weight.numel() for weight in weights.values())
    names = dict(tiny.language_model(shape).named_parameters())
    assert {name: weight.shape for name, weight in weights.items() if name in names} == {
        n: p.shape for n, p in names.items()
    }
    writing.save(tmp_path / "model", trained.module.model, weights, tiny.tokenizer())
    auto = AutoModelForCausalLM if shape == "llama" else AutoModelForSeq2SeqLM
    loaded, report = auto.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert tied  # once in the file, shared in memory
    reopened = Policy(loaded.eval(), 64)
    trained.train(False)
    batch = collate(ITEMS, range(5), Packing(None, 10**6, reopened.encoder_decoder, tiny.PAD_ID))
    with torch.no_grad():
        tiny.close(reopened(batch), trained(batch))


def test_a_save_that_lost_a_weight_is_not_renamed(tmp_path: Path) -> None:
    module = tiny.language_model("llama")
    weights = {**module.state_dict(), "model.norm.weight": torch.empty(0)}
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight"):
        writing.save(tmp_path / "model", module, weights, tiny.tokenizer())
    assert not (tmp_path / "model").exists()


# checkpoints


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", STAGES)
def test_checkpoints_are_exact(tmp_path: Path, zero: str, precision: str) -> None:
    trained = tiny.trainer(policy(), zero, precision)
    tiny.two_steps(trained, ITEMS)
    trained.save(tmp_path / "step-2")
    wanted = tiny.two_steps(trained, ITEMS)
    other = tiny.trainer(policy(seed=1), zero, precision)
    other.load(tmp_path / "step-2")
    assert tiny.two_steps(other, ITEMS) == wanted
    ours, theirs = trained.state_dict(), other.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("zero", "precision"), [("zero0", "fp32"), ("zero1", "bf16"), ("zero2", "fp32"), ("zero3", "fp32")]
)
def test_checkpoints_of_adapters_are_exact_without_what_is_below(tmp_path: Path, zero: str, precision: str) -> None:
    start = tiny.language_model("llama", vocab_size=6400)
    writing.save(tmp_path / "m", start, start.state_dict(), tiny.tokenizer())
    chosen = tiny.settings("sft").model
    chosen = chosen.model_copy(update={"path": str(tmp_path / "m"), "lora": chosen.lora.model_copy(update={"r": 4})})

    def adapters() -> engine.Engine:
        return tiny.trainer(Policy(loading.load_policy(chosen, tiny.tokenizer(), 0), 64), zero, precision)

    one = adapters()
    tiny.two_steps(one, ITEMS)
    one.save(tmp_path / "step-2")
    written = sum(file.stat().st_size for file in (tmp_path / "step-2").iterdir())
    assert written < (tmp_path / "m" / "model.safetensors").stat().st_size / 2
    other = adapters()
    other.load(tmp_path / "step-2")
    assert tiny.two_steps(one, ITEMS) == tiny.two_steps(other, ITEMS)
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in one.state_dict().items())
    if zero == "zero0":  # a trained weight that is not in it is no silent start from nothing
        (file,) = (tmp_path / "step-2").glob("*.pt")
        content = torch.load(file, weights_only=False)
        content["module"].popitem()
        torch.save(content, file)
        with pytest.raises(RuntimeError, match="Missing key"):
            adapters().load(tmp_path / "step-2")


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        tiny.trainer(policy()).load(tmp_path / "step-2")


# generation


@pytest.mark.parametrize("lora", [0, 4])
def test_generation_under_zero_3_leaves_training_as_it_was(tmp_path: Path, lora: int) -> None:
    start = tiny.language_model("llama")
    writing.save(tmp_path / "m", start, start.state_dict(), tiny.tokenizer())
    chosen = tiny.settings("sft").model
    chosen = chosen.model_copy(update={"path": str(tmp_path / "m"), "lora": chosen.lora.model_copy(update={"r": lora})})
    found = []
    for zero, speaks in (("zero0", True), ("zero3", True), ("zero3", False)):
        trained = tiny.trainer(Policy(loading.load_policy(chosen, tiny.tokenizer(), 0), 64), zero)
        norms = tiny.two_steps(trained, ITEMS)
        tokens = two_ranks.speak(trained, do_sample=False) if speaks else None
        norms += tiny.two_steps(trained, ITEMS)
        found.append((norms, tokens, trained.state_dict()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert found[0][1] == found[1][1]
    assert found[1][0] == found[2][0]  # the same training with and without generation, bit for bit
    assert all(torch.equal(found[1][2][name], found[2][2][name]) for name in found[1][2])


# configuration


def test_fp16_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match=r"train\.precision: fp16 needs a GPU"):
        tiny.trainer(policy(), precision="fp16")


CONFIGS = sorted(path.stem for path in deepspeed.DS_CONFIGS.glob("*.json"))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_shipped_config_is_one_deepspeed_reads(name: str, precision: str) -> None:
    train = tiny.train_settings(zero=name, precision=precision)
    full = optimizer.full_config(train, tiny.optimizer_settings(max_grad_norm=0.5))
    read = DeepSpeedConfig(full)
    assert read.zero_optimization_stage == int(name[4]) and read.gradient_clipping == 0.5
    assert read.bfloat16_config.enabled == (precision == "bf16")
    assert read.float16_config.enabled == (precision == "fp16")
    assert ("optimizer" in full) == name.endswith("_offload")


def test_offload_to_none_is_no_offload(tmp_path: Path) -> None:
    """As published files say it: the optimizer is ours, and its memory the GPU's."""
    file, none = tmp_path / "mine.json", {"device": "none", "pin_memory": True}
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": none, "offload_param": none}}))
    full = optimizer.full_config(tiny.train_settings(zero=str(file)), tiny.optimizer_settings())
    assert "optimizer" not in full
    words = ["parameters=8B", "bf16=true", "gpus=8", "gpu_memory_gb=80"]
    plans = [plan.estimate(tiny.settings("plan", *words, f"zero={zero}")) for zero in (file, "zero3")]
    of_stage_3 = [next(line for line in text.splitlines() if line.startswith("ZeRO-3")) for text in plans]
    assert of_stage_3[0] == of_stage_3[1] and "host's memory" not in plans[0]


def test_all_stages_are_there() -> None:
    assert set(STAGES) | {"zero2_offload", "zero3_offload"} <= set(CONFIGS)


@pytest.mark.parametrize("key", ["gradient_clipping", "train_batch_size", "optimizer", "scheduler"])
def test_what_another_setting_owns_is_refused(tmp_path: Path, key: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}, key: 1}))
    with pytest.raises(UserError, match=rf"{key} is set there, but .* decides it: remove it"):
        deepspeed.read_ds_config(str(file))


def test_config_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.zero: 'zero5' is no file, wanted one of zero0, zero1"):
        deepspeed.read_ds_config("zero5")
    file = tmp_path / "torn.json"
    file.write_text('{\n  "zero_optimization": {,\n}')
    with pytest.raises(UserError, match=r"torn\.json:2: "):
        deepspeed.read_ds_config(str(file))
    file.write_text('{"zero_optimization": {"stage": 1}}')
    assert deepspeed.read_ds_config(str(file)) == {"zero_optimization": {"stage": 1}}


# two ranks


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What two processes saw, all stages in one launch."""
    return tiny.on_two_processes("tests.two_ranks", tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("zero", STAGES)
def test_two_ranks_are_one(seen: dict, zero: str) -> None:
    plain = policy()
    assert seen[zero]["norms"] == pytest.approx(plain_two_steps(plain), rel=1e-5)
    close(seen[zero]["weights"], plain.state_dict())


def test_two_ranks_in_bf16(seen: dict) -> None:
    assert seen["bf16"]["norms"] == pytest.approx(seen["zero3"]["norms"], rel=0.1)
    assert all(weight.isfinite().all() for weight in seen["bf16"]["weights"].values())


@pytest.mark.parametrize("zero", ["zero0", "zero3"])
def test_what_two_ranks_say_is_what_the_saved_weights_say(seen: dict, zero: str) -> None:
    module = policy()
    module.load_state_dict({**module.state_dict(), **seen[zero]["weights"]})
    module.model.tie_weights()
    speaker = engine.Engine(module, tiny.ranks(), tiny.train_settings(), None)
    for place, example in enumerate(two_ranks.PROMPTS):
        prompt = torch.tensor([tiny.encoder().encode_prompt(example.prompt)[0]])
        out = module.model.generate(prompt, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(prompt))
        ids = _until_end(out[0, prompt.shape[1] :].tolist(), [tiny.EOS_ID])
        assert seen[zero]["greedy"][place] == tuple(ids)
    assert seen[zero]["sampled"] == two_ranks.speak(speaker, do_sample=True)  # whatever the number of ranks


def test_generation_does_not_disturb_training_on_two_ranks(seen: dict) -> None:
    assert seen["zero0"]["after"] == pytest.approx(seen["zero3"]["after"], rel=1e-4)


@pytest.mark.parametrize("zero", ["zero0", "zero3"])
def test_reference_logps_of_two_ranks_are_in_order(seen: dict, zero: str) -> None:
    module = policy()
    module.load_state_dict({**module.state_dict(), **seen[zero]["weights"]})
    with torch.no_grad():
        rows = [module(collate(ITEMS, [i], BUDGET))[0] for i in range(9)]
    assert [*map(len, seen[zero]["reference"])] == [len(row) for row in rows]
    tiny.close(torch.cat(seen[zero]["reference"]), torch.cat(rows))
