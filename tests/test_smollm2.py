"""A real chat model, where one is at hand: SMOLLM2=DIRECTORY with SmolLM2-135M-Instruct as Hugging Face has it.

One step of each stage and each kind of algorithm, adapters and all weights, bf16 and fp32: a minute or two each.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from pathlib import Path

import pytest

from pipeline.config.resolve import resolve
from pipeline.files import read_metrics

PLACE = os.environ.get("SMOLLM2", "")
pytestmark = pytest.mark.skipif(not Path(PLACE, "config.json").is_file(), reason="SMOLLM2 names no directory of it")
SMALL = ["data.task_size=60", "max_steps=1", "train.batch_size=4", "train.logging_steps=1", "eval.max_rows=2"]
SMALL += ["generation.max_new_tokens=8", "max_prompt_length=96", "max_response_length=32", "eval.num_samples=1"]
WAYS = {"lora": ["lora_r=8"], "full": ["lora_r=0"]}


def carry_out(tmp_path: Path, *words: str) -> Path:
    given = [*words, f"runs_dir={tmp_path}", "run=x", f"model={PLACE}", "data.task=assistant"]
    found = resolve(given)
    importlib.import_module(f"stages.{found.stage}").main(found.settings, given)
    return tmp_path / "x"


def trained(folder: Path, settings: str) -> None:
    """It took its step, every number is finite, and the template is the model's own."""
    rows = read_metrics(folder / "metrics.jsonl")
    assert any("train/loss" in row for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float)), settings
    assert "<|im_end|>" in (folder / "model" / "chat_template.jinja").read_text() or (folder / "model").is_dir()


@pytest.mark.parametrize(("way", "precision"), [("lora", "bf16"), ("full", "fp32")])
def test_fine_tuning(way: str, precision: str, tmp_path: Path) -> None:
    run = carry_out(tmp_path, "stage=sft", *SMALL, *WAYS[way], f"precision={precision}")
    trained(run / "sft", f"{way} {precision}")


@pytest.mark.parametrize(("way", "precision"), [("lora", "fp32"), ("full", "bf16")])
def test_a_reward_model(way: str, precision: str, tmp_path: Path) -> None:
    words = [word for word in SMALL if not word.startswith("generation")]
    run = carry_out(tmp_path, "stage=reward", *words, *WAYS[way], f"precision={precision}")
    trained(run / "reward" / "preference", f"{way} {precision}")


@pytest.mark.parametrize(
    ("algo", "way", "precision"),
    [
        ("alol", "lora", "bf16"),
        ("alol", "full", "fp32"),
        ("dpo", "lora", "fp32"),
        ("semi_offline", "lora", "bf16"),
        ("esrl", "lora", "bf16"),
        ("mrt", "full", "fp32"),
    ],
)
def test_reinforcement_learning(algo: str, way: str, precision: str, tmp_path: Path) -> None:
    own = {"alol": ["value.max_prompts=4", "value.epochs=1"], "esrl": ["sampler.k=2"], "mrt": ["sampler.k=2"]}
    own["semi_offline"] = ["static=reference"]
    words = [f"algo={algo}", *own.get(algo, []), *SMALL, *WAYS[way], f"precision={precision}", "start_from=model"]
    run = carry_out(tmp_path, "stage=rl", *words, "reward=length" if algo != "semi_offline" else "reward=rouge")
    trained(run / "rl", f"{algo} {way} {precision}")


def test_it_answers_in_its_own_template(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": [{"role": "user", "content": "What is the capital of France?"}]}) + "\n")
    words = ["stage=generate", f"data.test={rows}", "generation.max_new_tokens=24", f"model={PLACE}"]
    given = [*words, "data.task=null", f"runs_dir={tmp_path}", "run=y", "splits=[test]", "reward=null"]
    importlib.import_module("stages.generate").main(resolve(given).settings, given)
    (file,) = (tmp_path / "y" / "generate").glob("test.jsonl*")
    assert "Paris" in file.read_text()
