"""Masked fine-tuning and semi-offline RL for real, on tiny models: what is logged and kept, that it resumes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pipeline.errors import PreemptedError
from tests import logged, tiny
from tests.test_stages import SHORT, SMALL_TRAIN, TINY, rows, run, train

SHAPES = ("llama", "t5")
SFT = ["masking.rate=0.4", "masking.plain=0.1", "max_steps=2", "learning_rate=1e-3"]
RL = ["algo=semi_offline", "static=reference", "algorithm.settings.samples=4", "rewards.normalise=none"]
RL += ["learning_rate=1e-3", "batch_size=8", "eval.max_rows=4", *SHORT]
# the reward's file ends the training where a file beside it says: after so many calls
REWARD = """
import os, signal
from pathlib import Path

def reward(prompts, completions, **columns):
    left = Path(__file__).with_name("calls_left")
    if left.exists():
        left.write_text(str(int(left.read_text()) - 1))
        if left.read_text() == "0":
            os.kill(os.getpid(), signal.SIGTERM)
    given = [set(texts[0].split()) for texts in columns["references"]]
    return [len(set(text.split()) & words) / len(words) for text, words in zip(completions, given)]
"""
TAGS = {"train/loss", "loss/mle", "loss/rl", "advantage/std"}
TAGS |= {
    f"semi_offline/{name}"
    for name in ("reward", "reward_std", "entropy", "mask_rate", "hidden_tokens", "nothing_hidden", "equal_rewards")
}
TAGS |= {f"semi_offline/{name}" for name in ("reward_spread", "own_tokens", "different_texts", "greedy_reward")}


@pytest.fixture(scope="module", params=SHAPES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run's M-FT model, and a reward; t5 has one layer."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "overlap.py").write_text(REWARD)
    layers = [] if request.param == "llama" else ["model.scratch.num_layers=1"]
    train("sft", folder, f"model.scratch.shape={request.param}", *layers, *SFT, *SHORT)
    return folder


def words(base: Path, name: str, *more: str) -> list[str]:
    said = dict(
        word.split("=", 1) for word in [*SMALL_TRAIN, *RL, f"reward={base / 'overlap.py'}", f"name={name}", *more]
    )
    return [f"{key}={value}" for key, value in said.items()]


def learn(base: Path, name: str, *more: str) -> list[dict]:
    """The metrics of one RL stage."""
    run("rl", base, *words(base, name, *more))
    return rows(base / "default" / "rl" / name / "metrics.jsonl")


def numbers(lines: list[dict]) -> list[dict]:
    """What is the same in every run: all but times."""
    return [{tag: value for tag, value in line.items() if not tag.startswith(("perf/", "time"))} for line in lines]


def test_masked_fine_tuning(base: Path) -> None:
    lines = rows(base / "default" / "sft" / "metrics.jsonl")
    assert lines[0]["eval/loss"] != lines[0]["eval/masked_loss"]
    assert lines[-1]["eval/masked_loss"] < lines[0]["eval/masked_loss"]
    tokenizer = json.loads((base / "default" / "sft" / "model" / "tokenizer_config.json").read_text())
    assert tokenizer["mask_token"] == "<mask>"


def test_semi_offline_rl(base: Path) -> None:
    lines = learn(base, "plain", "max_steps=2")
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines[1:]:
        assert line.keys() >= TAGS
        assert line["train/grad_norm"] > 0 and line["loss/mle"] == pytest.approx(line["train/loss"])  # not smoothed
        assert 0.2 < line["semi_offline/mask_rate"] < 0.7
        assert 0 < line["semi_offline/reward"] < 1  # kept words are the reference's
        assert line["semi_offline/reward_std"] > 0
    sft = rows(base / "default" / "sft" / "metrics.jsonl")[-1]
    for line in (lines[0], lines[-1]):
        assert line.keys() >= {"eval/loss", "eval/masked_loss", "eval/reward"}
        assert line["eval/loss"] == pytest.approx(sft["eval/loss"], rel=0.2)
    table = rows(base / "default" / "rl" / "plain" / "samples" / "step-000002.jsonl")
    found = [row for row in table if "static" in row]
    assert len(found) == 2
    for row in found:
        rewards = [one["reward"] for one in row["compositions"]]
        assert len(rewards) <= 4 and rewards == sorted(rewards, reverse=True)
        assert row["greedy"]["text"] and isinstance(row["praised"], list) and isinstance(row["blamed"], list)
        assert any(there for _, there in row["static"]["parts"])
    logged.check(base / "default" / "rl" / "plain")
    results = json.loads((base / "default" / "rl" / "plain" / "results.json").read_text())
    assert results["steps"] == 2 and "eval/reward" in results


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_sampling_after_masked_fine_tuning(base: Path) -> None:
    """[MASK] is never sampled: it has no probability in the pass with gradient either, nor under the reference."""
    said = ["algo=reinforce", "static", "algorithm.settings.samples", "max_steps=1", "sampler.k=2", "kl_beta=0.1"]
    given = {word.split("=")[0]: word for word in [*words(base, "sampled"), *said]}
    run("rl", base, *(word for word in given.values() if "=" in word))
    line = rows(base / "default" / "rl" / "sampled" / "metrics.jsonl")[-1]
    assert line["rollout/logp_gap"] < 1e-5 and abs(line["objective/kl"]) < 1e-6


def test_stopped_and_started_again(base: Path) -> None:
    """Four steps, and two and two: SIGTERM comes from the reward, in the third step's one call."""
    whole = learn(base, "whole", "max_steps=4", "save_steps=4", "shuffle_rewards=true", "train.keep=last")
    left = base / "calls_left"
    # the trial, three in the first evaluation (responses, two rows composed), one in each step
    left.write_text(str(1 + 3 + 3))
    with pytest.raises(PreemptedError, match="after step 3 of 4"):
        learn(base, "parts", "max_steps=4", "save_steps=4", "shuffle_rewards=true", "train.keep=last")
    left.unlink()
    parts = learn(base, "parts", "max_steps=4", "save_steps=4", "shuffle_rewards=true", "train.keep=last")
    assert numbers(parts) == numbers(whole)
    weights = [load_file(base / "default" / "rl" / name / "model" / "model.safetensors") for name in ("whole", "parts")]
    assert weights[0].keys() == weights[1].keys()
    assert all((tensor == weights[1][name]).all() for name, tensor in weights[0].items())


@pytest.mark.parametrize("base", ["llama"], indirect=True)
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_worker_processes(base: Path, zero: str) -> None:
    """Micro-batches of two rows whose rewards are computed here, and in two processes, while the next one runs."""
    said = ["max_steps=2", "micro_batch_size=2", "max_tokens=null", "train.keep=last", f"zero={zero}"]
    here, there = (learn(base, f"{zero}-{n}", *said, f"rewards.workers={n}") for n in (0, 2))
    assert numbers(there) == numbers(here)
    weights = [load_file(base / "default" / "rl" / f"{zero}-{n}" / "model" / "model.safetensors") for n in (0, 2)]
    assert all((tensor == weights[1][name]).all() for name, tensor in weights[0].items())


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_two_ranks_learn_as_one(base: Path) -> None:
    one = learn(base, "one", "max_steps=2", "max_tokens=300")
    mine = [word.replace("RUNS", str(base)) for word in TINY]
    command = [sys.executable, "-m", "stages", "stage=rl", *mine, *words(base, "two", "max_steps=2", "max_tokens=300")]
    command += ["gpus=2", "zero=zero2", "launch.launcher=torchrun"]
    made = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, timeout=300
    )
    assert made.returncode == 0, made.stderr[-2000:]
    two = rows(base / "default" / "rl" / "two" / "metrics.jsonl")
    for first, second in zip(one, two, strict=True):
        assert second.keys() == first.keys()
        tags = ("train/loss", "loss/rl", "semi_offline/reward", "train/grad_norm", "eval/loss", "eval/masked_loss")
        wanted = {tag: first[tag] for tag in tags if tag in first}
        # loss/rl is a small difference of terms as large as the others
        assert {tag: second[tag] for tag in wanted} == pytest.approx(wanted, rel=5e-5, abs=tiny.rounding(wanted))
