"""Every stage for real, on a tiny model: what it leaves, what it refuses, that a second start does nothing."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.resolve import resolve
from pipeline.data import readers
from pipeline.errors import UserError
from tests import logged, tiny
from tests.documents import ROOT

TINY = [
    "runs_dir=RUNS",
    "task=assistant",
    "data.task_size=96",
    "model.scratch.hidden_size=32",
    "model.scratch.num_layers=2",
    "model.scratch.num_heads=2",
    "data.max_prompt_length=48",
    "data.max_response_length=48",
]
SMALL_TRAIN = ["batch_size=16", "eval.max_rows=12", "eval.num_samples=2", "train.logging_steps=1"]
SHORT = ["generation.max_new_tokens=12"]


def run(stage: str, runs: Path, *words: str) -> None:
    """One stage in this process, with the settings a user's words would give."""
    mine = [word.replace("RUNS", str(runs)) for word in TINY]
    given = {word.split("=")[0] for word in words}
    resolved = resolve([f"stage={stage}", *(w for w in mine if w.split("=")[0] not in given), *words])
    importlib.import_module(f"stages.{stage}").main(resolved.settings, list(resolved.words))


def train(stage: str, runs: Path, *words: str) -> None:
    run(stage, runs, *SMALL_TRAIN, *words)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with an SFT model and two reward models."""
    folder = tmp_path_factory.mktemp("runs")
    train("sft", folder, "max_steps=4", "learning_rate=1e-3", *SHORT)
    train("reward", folder, "name=helpfulness", "max_steps=3", "learning_rate=1e-3")
    train("reward", folder, "name=harmlessness", "max_steps=3", "learning_rate=1e-3")
    yield folder / "default"


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_sft_leaves_what_the_design_lists(runs: Path) -> None:
    sft = runs / "sft"
    for name in ("config.yaml", "command.txt", "metrics.jsonl", "results.json", "model/config.json"):
        assert (sft / name).is_file(), name
    assert [path.name for path in (sft / "checkpoints").glob("*-*")] == ["step-000004"]  # to train longer from
    assert [row["step"] for row in rows(sft / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert rows(sft / "samples" / "step-000004.jsonl")[0]["prompt"].startswith("\n\nHuman: ")
    for stage in (sft, runs / "reward" / "helpfulness"):
        logged.check(stage)
    results = json.loads((sft / "results.json").read_text())
    assert results["steps"] == 4 and results["eval/loss"] > 0


def test_the_model_is_what_transformers_loads(runs: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(runs / "sft" / "model")
    tokenizer = AutoTokenizer.from_pretrained(runs / "sft" / "model")
    assert model.config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer("\n\nHuman: How do I boil an egg?\n\nAssistant:", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    scorer = AutoModelForSequenceClassification.from_pretrained(runs / "reward" / "helpfulness" / "model")
    assert scorer(ids).logits.shape == (1, 1)


def test_reward_results_stand_beside_the_length_baseline(runs: Path) -> None:
    results = json.loads((runs / "reward" / "helpfulness" / "results.json").read_text())
    assert 0 <= results["eval/accuracy"] <= 1 and 0.5 <= results["eval/length_accuracy"] <= 1


def test_a_second_start_does_nothing(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (runs / "sft").rglob("*") if path.is_file()}
    train("sft", runs.parent, "max_steps=4", "learning_rate=1e-3", *SHORT)
    assert "is done" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (runs / "sft").rglob("*") if path.is_file()}


def test_other_settings_are_refused_and_destroy_nothing(runs: Path) -> None:
    with pytest.raises(UserError, match=r"learning_rate=0\.001, now it is 0\.002.*another run="):
        train("sft", runs.parent, "max_steps=4", "learning_rate=2e-3", *SHORT)
    assert (runs / "sft" / "model" / "config.json").is_file()


def unmoved(line: dict) -> object:
    """A ratio of 1, which is exp of a difference of two sums of log-probabilities."""
    return pytest.approx(1.0, abs=8 * tiny.rounding(line["eval/logps/policy"]))


def rounded(results: dict) -> float:
    """Of a divergence, the difference of two such sums; a new model says each of its 1,400 tokens with about 7 nats."""
    return 8 * tiny.rounding(7.2 * results["completions/mean_length"])


@pytest.mark.parametrize("algo", ["alol", "a_lol_ref_free", "a_lol_seq", "a_lol_kl", "nll", "wbc", "r_gold", "r_lol"])
def test_every_algorithm_trains(runs: Path, algo: str) -> None:
    words = [f"algo={algo}", f"name={algo}", "max_steps=3", "scale_steps=false", "learning_rate=1e-3"]
    values = ["value.targets=data", "value.epochs=2"] if algo.startswith("a") else []
    train("rl", runs.parent, *words, *values, *SHORT)
    lines = rows(runs / "rl" / algo / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(line["train/grad_norm"] > 0 for line in lines[1:])
    logged.check(runs / "rl" / algo)
    if algo in ("alol", "a_lol_seq", "r_lol"):
        assert lines[0]["eval/ratio/mean"] == unmoved(lines[0])  # the policy starts as its reference
        assert lines[0]["eval/ratio/clip_fraction_high"] == 0
        assert lines[3]["ratio/mean"] != unmoved(lines[0])
    if algo.startswith(("alol", "a_lol")):
        assert 0 < lines[0]["advantage/kept_fraction"] < 1
        assert "value/r2" in lines[0]
    if algo == "nll":
        assert lines[0]["advantage/kept_fraction"] == 1


@pytest.mark.parametrize(
    ("algo", "word", "tag"),
    [
        ("topr", "sampling=all", "eval/logps/lowered"),
        ("qrpo", "reference_samples.per_prompt=2", "regression/target"),
    ],
)
def test_rows_are_lowered_or_fitted_to_samples(runs: Path, algo: str, word: str, tag: str) -> None:
    """Of negative weights, and of rewards of the start model's own responses."""
    words = [f"algo={algo}", "reward=length", word, "max_steps=2", "learning_rate=1e-3", "data.task_size=24"]
    train("rl", runs.parent, f"name={algo}", *words, "generation.max_new_tokens=4")
    first, *_, last = rows(runs / "rl" / algo / "metrics.jsonl")
    assert first["eval/logps/policy"] == pytest.approx(first["eval/logps/ref"]) != last["eval/logps/policy"]
    assert last[tag] is not None and last["train/grad_norm"] > 0
    logged.check(runs / "rl" / algo)
    samples = list((runs / "cache").glob("samples-*.npy"))
    assert len(samples) == (algo == "qrpo")
    if algo == "topr":
        assert 0 < first["advantage/raised_fraction"] < 1 == first["advantage/kept_fraction"]
        return
    found = np.load(samples[0])
    assert found.shape[1] == 2 and len(found) > 24  # held-out prompts, too
    assert first["eval/regression/prediction"] == pytest.approx(0.0, abs=1e-5)


ON_POLICY = {
    "reinforce": ["sampler.k=2"],
    "mrt": ["sampler.k=2", "algorithm.settings.alpha=0.1"],
    "esrl": ["sampler.k_max=3", "sampler.k=3", "algorithm.settings.kl_beta=0.05", "algorithm.settings.sft_weight=0.1"],
    "esrl_drop": ["generation.batch_size=4"],
}
ON_POLICY_TAGS = {f"train/{name}" for name in ("loss", "reward", "reward_std", "entropy", "logps/policy")}
ON_POLICY_TAGS |= {"advantage/std"}
ON_POLICY_TAGS |= {f"rollout/{name}" for name in ("generated_tokens", "equal_groups", "logp_gap")}
ON_POLICY_TAGS |= {f"esrl/{name}" for name in ("samples_per_prompt", "at_k_min", "left_out", "tokens_saved", "known")}


@pytest.mark.parametrize("algo, words", ON_POLICY.items())
def test_every_on_policy_algorithm_trains(runs: Path, algo: str, words: list[str]) -> None:
    own_words = [f"algo={algo}", f"name={algo}", "max_steps=2", "batch_size=8", "learning_rate=1e-3", *words]
    given = {word.split("=")[0] for word in own_words}
    run("rl", runs.parent, *(word for word in SMALL_TRAIN if word.split("=")[0] not in given), *own_words, *SHORT)
    lines = rows(runs / "rl" / algo / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines[1:]:
        assert line.keys() >= ON_POLICY_TAGS and line["train/grad_norm"] >= 0
        assert line["rollout/logp_gap"] < 16 * tiny.rounding(line["train/entropy"])  # both stages say the same
        assert ("objective/kl" in line) == (algo == "esrl") and ("loss/mle" in line) == (algo == "esrl")
    logged.check(runs / "rl" / algo)
    table = rows(runs / "rl" / algo / "samples" / "step-000002.jsonl")
    groups = [row for row in table if row.get("kind") == "rollout"]
    assert groups and all(row["k"] >= 1 and row["tokens"] >= 1 for row in groups)


def test_the_step_budget_counts_kept_rows(runs: Path) -> None:
    words = ["reward=length", "rewards.normalise=none", "generation.max_new_tokens=40", "name=budget", "max_steps=10"]
    train("rl", runs.parent, *words, "value.max_prompts=24", "value.epochs=2")
    lines = rows(runs / "rl" / "budget" / "metrics.jsonl")
    assert lines[-1]["step"] == max(1, int(10 * lines[0]["advantage/kept_fraction"] + 1e-9))


def test_score_rows_are_what_rl_reads(runs: Path, tmp_path: Path) -> None:
    run("score", runs.parent, "splits=[train, validation]", "data.task_size=20", "name=rows")  # named: rl passes it by
    read = readers.read(str(runs / "score" / "rows" / "train.jsonl"))
    assert read.format == "scored" and len(read.examples) == 20
    assert set(read.examples[0].rewards) == {"helpfulness", "harmlessness"}
    total = sum(read.examples[0].rewards.values())
    tiny.close(read.examples[0].reward, total, 8)  # weights 1 and 1
    results = json.loads((runs / "score" / "rows" / "results.json").read_text())
    assert results["train"]["rows"] == 20


def test_rl_from_scored_rows_alone(runs: Path, tmp_path: Path, capsys) -> None:
    """Rows with a reward column, no reward model; values are learned from the logged rewards."""
    lines = [
        {"prompt": f"How do I boil egg {i % 10}?", "completion": "Put it in water." * (1 + i % 3), "reward": i % 4 / 4}
        | {"rewards": {"brief": -float(i % 3)}}
        for i in range(40)
    ]
    (tmp_path / "logs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [f"runs_dir={tmp_path}", f"model={runs / 'sft' / 'model'}", "task=null", "data.task_size=null"]
    words += [f"data.train={tmp_path / 'logs.jsonl'}", "data.validation_fraction=0.3"]
    train("rl", tmp_path, *words, "value.targets=data", "max_steps=2", "value.epochs=2", *SHORT)
    assert (tmp_path / "default" / "rl" / "model" / "config.json").is_file()
    (row, *_) = rows(tmp_path / "default" / "rl" / "samples" / "step-000001.jsonl")
    assert set(row) == {"id", "prompt", "response"}  # to be read, though nothing judges them
    replaced = "those that the rows bring are not used"
    assert replaced not in capsys.readouterr().out
    # half of it is what the rows bring: the other half alone judges new responses, and neither chooses a step
    judged = ["name=judged", "reward={length: 0.1, brief: 1.0}", "rewards.normalise={brief: standardise}"]
    train("rl", tmp_path, *words, *judged, "value.targets=data", "max_steps=1", "value.epochs=1", *SHORT)
    said = capsys.readouterr().out
    assert f"{replaced} (reward)" in said and "the rows bring brief, so that nothing judges new responses" in said
    left = tmp_path / "default" / "rl" / "judged"
    (scale,) = json.loads((left / "normalise.json").read_text()).values()
    assert 0.7 < scale["std"] < 0.9  # 0, -1 and -2, about as often: sqrt(2/3)
    assert "eval/rewards/length/mean" in (last := rows(left / "metrics.jsonl")[-1]) and "eval/reward" not in last
    assert set(rows(left / "samples" / "step-000001.jsonl")[0]) == {"id", "prompt", "response", "rewards"}
    with pytest.raises(UserError, match="nothing can score new responses"):
        train("rl", tmp_path, *words, "name=two", "value.targets=policy", "max_steps=2", *SHORT)


def test_a_reward_of_ones_own(runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "brief.py"
    file.write_text("def reward(prompts, completions, **columns):\n    return [-float(len(c)) for c in completions]\n")
    words = [
        f"reward={{helpfulness: 1.0, {file}: 0.01}}",
        "rewards.normalise=none",
        "name=brief",
        "max_steps=2",
        "scale_steps=false",
    ]
    train("rl", runs.parent, *words, "value.targets=data", "value.epochs=2", *SHORT)
    row = rows(runs / "rl" / "brief" / "samples" / "step-000002.jsonl")[0]
    assert set(row["rewards"]) == {"helpfulness", "brief"}


def test_generate_ranks_candidates(runs: Path) -> None:
    words = ["num_return_sequences=3", "do_sample=true", "max_rows=4", "reward=length", "policy=sft"]
    run("generate", runs.parent, *words, *SHORT)
    lines = rows(runs / "generate" / "test.jsonl")
    assert len(lines) == 4
    for line in lines:
        scores = line["candidate_rewards"]
        assert line["completion"] and len(set(line["candidates"])) == len(line["candidates"])
        assert scores == sorted(scores, reverse=True)
        assert scores == [len(text.split()) for text in line["candidates"]]


def test_generated_candidates_are_scored_and_ranked(runs: Path) -> None:
    """generate leaves candidates of two splits as they were drawn; score ranks them and keeps all else."""
    words = ["num_return_sequences=4", "do_sample=true", "temperatures=[0.2, 2.0]", "splits=[train, validation]"]
    run("generate", runs.parent, "run=ranked", f"policy={runs / 'sft' / 'model'}", *words, "max_rows=5", *SHORT)
    ranked = runs.parent / "ranked"
    run("score", runs.parent, "run=ranked", "of=generate", "reward=length", "rewards.normalise=none")
    results = json.loads((ranked / "generate" / "results.json").read_text())
    for split in ("train", "validation"):
        files = [str(ranked / stage / f"{split}.jsonl") for stage in ("generate", "score")]
        drawn, judged = (readers.read(file).examples for file in files)
        assert len(drawn) == len(judged) == results[split]["rows"] == 5
        left_out = results[split]["empty_responses"] + results[split]["repeated_responses"]
        assert sum(len(row.candidates) for row in drawn) == results[split]["candidates"] == 20 - left_out
        for before, after in zip(drawn, judged, strict=True):
            assert (after.id, after.prompt, after.completion) == (before.id, before.prompt, before.completion)
            assert before.completion and before.references == after.references and not before.candidate_rewards
            assert sorted(before.candidates) == sorted(after.candidates)
            assert after.candidate_rewards == tuple(float(len(text.split())) for text in after.candidates)
            assert list(after.candidate_rewards) == sorted(after.candidate_rewards, reverse=True)
    assert not (ranked / "score" / "test.jsonl").exists()


def test_evaluate_and_report(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["max_steps=3", "learning_rate=1e-3", "train.keep=last", "value.targets=data", "value.epochs=2"]
    train("rl", runs.parent, *short, *SHORT)
    words = ["max_rows=10", "num_samples=3", "monitors=[oracle:helpfulness]"]
    run("evaluate", runs.parent, *words, *SHORT)
    results = json.loads((runs / "evaluate" / "results.json").read_text())
    assert list(results) == ["sft", "rl"]
    assert results["sft"]["objective/kl"] == pytest.approx(0.0, abs=rounded(results["sft"]))  # against itself
    assert results["rl"]["objective/kl"] > 0
    assert "rewards/oracle:helpfulness/mean" in results["rl"]
    total = sum(results["rl"][f"rewards/{name}/mean"] for name in ("helpfulness", "harmlessness"))
    tiny.close(results["rl"]["reward"], total, 8)  # monitors have no weight
    assert "oracle:helpfulness" in capsys.readouterr().out
    # of every response the reward is kept, of the first three the text too
    kept, shown = (rows(runs / "evaluate" / name) for name in ("rewards.jsonl", "samples/policies.jsonl"))
    assert [row["policy"] for row in kept] == 10 * ["sft"] + 10 * ["rl"] and len(shown) == 2 * 3
    tiny.close(results["rl"]["reward"], sum(row["reward"] for row in kept[10:]) / 10, 8)
    report = resolve(["stage=report", f"runs_dir={runs.parent}"])
    importlib.import_module("stages.report").main(report.settings, [])
    page = (runs / "report.html").read_text(encoding="utf-8")
    assert "helpfulness" in page and "of 10 prompts are answered better by rl than by sft" in page


def test_the_three_commands_of_the_readme(runs: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """On the rows that it shows, by its words, with a model of ours: what is known is little, and said."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line.strip() for line in readme.splitlines() if line.startswith('    {"prompt"')]
    commands = [shlex.split(line, comments=True)[2:] for line in readme.splitlines() if "=rows.jsonl" in line][:3]
    assert len(lines) == 20 and [words[0] for words in commands] == ["stage=audit", "stage=rl", "stage=evaluate"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    ours = {"model=my-chat-model": f"model={runs / 'sft' / 'model'}"}
    for words in commands:
        resolved = resolve([*(ours.get(word, word) for word in words), *([] if "audit" in words[0] else SHORT)])
        importlib.import_module(f"stages.{resolved.stage}").main(resolved.settings, list(resolved.words))
    left = tmp_path / "runs" / "default"
    assert json.loads((left / "audit" / "results.json").read_text())["verdict"] == "too few rows to tell"
    results = json.loads((left / "evaluate" / "results.json").read_text())
    assert list(results) == ["start", "rl"] and results["rl"]["gain/known"] == 0.0
    assert "not known" in capsys.readouterr().out and (left / "rl" / "model" / "README.md").is_file()


def test_rl_in_an_empty_place_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model to start from: make one with bash run\.sh stage=sft"):
        train("rl", tmp_path, "max_steps=2")


@pytest.mark.parametrize("shape", ["t5", "bart"])
def test_encoder_decoders_go_the_whole_way(tmp_path: Path, shape: str) -> None:
    new = [f"model.scratch.shape={shape}", "model.scratch.num_layers=1"]
    train("sft", tmp_path, *new, "max_steps=2", "learning_rate=1e-3", *SHORT)
    words = ["reward=length", "rewards.normalise=none", "max_steps=2", "value.targets=data", "value.epochs=2"]
    train("rl", tmp_path, *new, *words, *SHORT)
    lines = rows(tmp_path / "default" / "rl" / "metrics.jsonl")
    assert lines[0]["eval/ratio/mean"] == unmoved(lines[0])


def test_lora_saves_adapters_only(runs: Path, tmp_path: Path) -> None:
    words = [f"model={runs / 'sft' / 'model'}", "lora_r=4", f"runs_dir={tmp_path}", "max_steps=2", "learning_rate=1e-2"]
    train("sft", tmp_path, *words, "gradient_checkpointing=true", *SHORT)
    model = tmp_path / "default" / "sft" / "model"
    assert (model / "adapter_config.json").is_file() and not (model / "model.safetensors").exists()
    from safetensors.torch import load_file

    weights = load_file(model / "adapter_model.safetensors")
    assert all("lora_" in name for name in weights)
    moved = [name for name, weight in weights.items() if "lora_B" in name and weight.abs().max() > 0]
    assert moved  # B starts at zero


def test_two_ranks_make_the_model_of_one(tmp_path: Path) -> None:
    """ZeRO-2 on two ranks, as a user starts them, against ZeRO-0 on one: the same losses, the same weights."""
    common = [*SMALL_TRAIN, "max_steps=3", "learning_rate=1e-3", *SHORT]
    run("sft", tmp_path, *common, "run=one")
    words = ["stage=sft", *(word.replace("RUNS", str(tmp_path)) for word in TINY), *common, "run=two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    made = subprocess.run(
        [sys.executable, "-m", "stages", *words, "gpus=2", "zero=zero2"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    one, two = (rows(tmp_path / name / "sft" / "metrics.jsonl") for name in ("one", "two"))
    for first, second in zip(one, two, strict=True):
        for tag in ("train/loss", "eval/loss", "train/grad_norm"):
            if tag in first:
                assert second[tag] == pytest.approx(first[tag], rel=2e-5), (first["step"], tag)
    assert [line.get("train/learned_tokens") for line in one] == [line.get("train/learned_tokens") for line in two]


def test_a_named_model_and_another_sft_model_are_not_mixed_up(runs: Path) -> None:
    """The run's SFT model was made from scratch; naming a base model for RL contradicts that, unless one says so."""
    other = runs / "reward" / "helpfulness" / "model"
    with pytest.raises(UserError, match=r"was made of a new model: set start_from=model"):
        train("rl", runs.parent, "name=mixed", f"model={other}", "max_steps=2")


def test_zero_3_evaluates_what_zero_0_trained(runs: Path) -> None:
    words = ["max_rows=6", "num_samples=1", "reward=length", "policies={sft: sft}", "name=sharded", "zero=zero3"]
    run("evaluate", runs.parent, *words, *SHORT)
    run("evaluate", runs.parent, *words[:-2], "name=whole", *SHORT)
    sharded, whole = (json.loads((runs / "evaluate" / n / "results.json").read_text()) for n in ("sharded", "whole"))
    assert sharded["sft"] == pytest.approx(whole["sft"], abs=rounded(whole["sft"]), nan_ok=True)
