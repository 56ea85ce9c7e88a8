"""A real chat model, where one is at hand: SMOLLM2=DIRECTORY with SmolLM2-135M-Instruct as Hugging Face has it.

One run as a user has it (a reward model, answers of the model itself, their scores), then one step of each stage and
each kind of algorithm on these: adapters and all weights, bf16 and fp32, each kind in two cases. 10 to 40 processor
seconds a case.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pipeline.config.resolve import resolve
from pipeline.files import read_metrics

PLACE = os.environ.get("SMOLLM2", "")
pytestmark = pytest.mark.skipif(not Path(PLACE, "config.json").is_file(), reason="SMOLLM2 names no directory of it")
TOKENS = 10  # of an answer, few enough that none of them ends
LIMITS = ["max_prompt_length=96", f"max_response_length={TOKENS}"]
STEP = ["max_steps=1", "train.batch_size=2", "train.logging_steps=1", "train.keep_checkpoint=false"]
STEP += ["eval.max_rows=3", "eval.num_samples=1"]
SAID = [f"generation.max_new_tokens={TOKENS}"]
TASK = ["data.task=assistant", "data.task_size=8"]
WAYS = {"lora": ["lora_r=8"], "full": ["lora_r=0"]}
APART = {"fp32": 1e-3, "bf16": 0.1}  # nats per token between what learns and what it began from: ratio_tolerance
ADDED = ("lora", "score", "token_adapter")  # in the names of what adapters are saved as; the last is the mask's
HI = [{"role": "user", "content": "Hi"}]


def carry_out(runs: Path, *words: str, model: str = PLACE) -> Path:
    """The run after a stage of it."""
    given = [*words, f"runs_dir={runs}", "run=x", *([f"model={model}"] if model else [])]
    found = resolve(given)
    importlib.import_module(f"stages.{found.stage}").main(found.settings, given)
    return runs / "x"


def trained(folder: Path, way: str, precision: str) -> dict[str, float]:
    """What the step logged. Numbers are finite, the template is the model's own, and what was saved is what learned."""
    rows = read_metrics(folder / "metrics.jsonl")
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float)), rows
    (step,) = (row for row in rows if "train/loss" in row)
    assert step["train/grad_norm"] > 0
    ours, theirs = (AutoTokenizer.from_pretrained(place) for place in (folder / "model", PLACE))
    for begun in (True, False):
        assert ours.apply_chat_template(HI, add_generation_prompt=begun) == theirs.apply_chat_template(
            HI, add_generation_prompt=begun
        )
    (file,) = (folder / "model").glob("*.safetensors")
    with safe_open(file, "pt") as saved:
        names = list(saved.keys())
        kinds = {saved.get_tensor(name).dtype for name in names if "score" not in name}
    assert all(any(part in name for part in ADDED) for name in names) == (way == "lora"), names
    assert kinds == {torch.float32 if precision == "fp32" else torch.bfloat16}
    return step


def begins_at_its_start(step: dict[str, float], precision: str) -> None:
    """The policy of the first step is the model that it is compared with."""
    pairs = [("policy", "ref"), ("chosen", "ref_chosen"), ("rejected", "ref_rejected")]
    known = [(f"train/logps/{ours}", f"train/logps/{theirs}") for ours, theirs in pairs]
    found = [step[ours] - step[theirs] for ours, theirs in known if theirs in step]
    assert found and all(abs(gap) <= TOKENS * APART[precision] for gap in found), found


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run `x` is that trained a reward model, let the model answer some prompts and scored its answers."""
    place = tmp_path_factory.mktemp("runs")
    carry_out(place, "stage=reward", *TASK, *LIMITS, *STEP, *WAYS["full"])
    asked = ["splits=[train, validation]", "max_rows=3", "do_sample=true", "num_return_sequences=3"]
    carry_out(place, "stage=generate", *TASK, *SAID, *asked)
    carry_out(place, "stage=score", "of=generate", "splits=[train, validation]", model="")
    return place


def test_the_run_scores_what_the_model_said(runs: Path) -> None:
    """The rewards are those that transformers finds by the reward model's files, through the sigmoid."""
    trained(runs / "x" / "reward" / "preference", "full", "fp32")
    scorer = AutoModelForSequenceClassification.from_pretrained(runs / "x" / "reward" / "preference" / "model")
    tokenizer = AutoTokenizer.from_pretrained(PLACE)
    rows = rows_of(runs / "x" / "score" / "train.jsonl")
    assert len(rows) == 3
    for row in rows:
        assert row["candidate_rewards"] == sorted(row["candidate_rewards"], reverse=True)
        assert set(row["unfinished"]) == set(row["candidates"])
    asked = [{"role": "user", "content": rows[0]["prompt"]}, {"role": "assistant", "content": rows[0]["candidates"][0]}]
    text = tokenizer.apply_chat_template(asked, tokenize=False).removesuffix("<|im_end|>\n")  # cut, as in training
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    with torch.no_grad():
        expected = float(torch.sigmoid(scorer.float().eval()(ids).logits))
    assert rows[0]["candidate_rewards"][0] == pytest.approx(expected, abs=2e-5)


def test_a_reward_model(tmp_path: Path) -> None:
    run = carry_out(tmp_path, "stage=reward", *TASK, *LIMITS, *STEP, *WAYS["lora"], "precision=bf16")
    assert trained(run / "reward" / "preference", "lora", "bf16")["train/loss"] == pytest.approx(math.log(2), abs=0.05)


def test_fine_tuning_all_weights(tmp_path: Path) -> None:
    run = carry_out(tmp_path, "stage=sft", *TASK, *SAID, *LIMITS, *STEP, *WAYS["full"], "precision=bf16")
    trained(run / "sft", "full", "bf16")


def test_an_adapter_beside_its_model_and_its_export(tmp_path: Path) -> None:
    """Merged, it answers as the adapter does, which is further from the model than the two are from one another."""
    words = [*TASK, *LIMITS, *SAID]
    run = carry_out(tmp_path, "stage=sft", *words, *STEP, *WAYS["lora"], "learning_rate=3e-3", "eval.generate=false")
    trained(run / "sft", "lora", "fp32")
    carry_out(tmp_path, "stage=export", "policy=sft", "dtype=float32", model="")
    places = f"policies={{sft: sft, merged: {run / 'export' / 'model'}, start: {PLACE}}}"
    carry_out(tmp_path, "stage=evaluate", *words, places, "max_rows=2", "max_logged=4", "do_sample=true", model="")
    found = json.loads((run / "evaluate" / "results.json").read_text())
    assert abs(found["merged"]["objective/kl"]) < 1e-4 and found["start"]["objective/kl"] > 1e-2
    assert found["merged"]["logged/nll"] == pytest.approx(found["sft"]["logged/nll"], abs=1e-3)
    assert found["start"]["logged/nll"] > found["sft"]["logged/nll"] + 1e-2


OWN = {
    "alol": ["value.targets=data", "value.epochs=1", "reward=length"],  # some row is above V, whatever that learned
    "dro": ["value.targets=data", "value.epochs=1"],
    "qrpo": ["reference_samples.targets=data"],
    "semi_offline": ["algorithm.settings.samples=4", "reward=rouge"],
    "agro": ["algorithm.settings.group_size=3"],
    "esrl_drop": ["algorithm.settings.sft_weight=0.1"],  # its baseline knows no reward yet at the first step
}


@pytest.mark.parametrize(
    ("algo", "way", "precision"),
    [
        ("alol", "lora", "bf16"),
        ("alol", "full", "fp32"),
        ("dro", "full", "bf16"),
        ("qrpo", "lora", "fp32"),
        ("dpo", "lora", "fp32"),
        ("dpo", "full", "bf16"),
        ("kto", "lora", "bf16"),
        ("kto", "full", "fp32"),
        ("rebel", "lora", "fp32"),
        ("agro", "full", "bf16"),
        ("semi_offline", "lora", "bf16"),
        ("semi_offline", "full", "fp32"),
    ],
)
def test_learning_from_scored_answers(runs: Path, algo: str, way: str, precision: str) -> None:
    words = ["stage=rl", f"name={algo}_{way}", f"algo={algo}", *OWN.get(algo, []), *LIMITS, *SAID, *STEP, *WAYS[way]]
    words += [] if algo == "semi_offline" else ["eval.generate=false"]
    run = carry_out(runs, *words, f"precision={precision}")
    step = trained(run / "rl" / f"{algo}_{way}", way, precision)
    counts = json.loads((run / "rl" / f"{algo}_{way}" / "data.json").read_text())["train"]
    if algo == "semi_offline":  # which learns the task's references
        assert step["train/logps/policy"] < 0 and counts["unfinished_responses"] == 0
        return
    assert counts["unfinished_responses"] == counts["responses"] and not counts["cut_responses"]
    begins_at_its_start(step, precision)


@pytest.mark.parametrize(
    ("algo", "way", "precision"),
    [("esrl", "lora", "bf16"), ("mrt", "full", "fp32"), ("esrl_drop", "full", "bf16"), ("reinforce", "lora", "fp32")],
)
def test_learning_from_new_answers(runs: Path, algo: str, way: str, precision: str) -> None:
    words = ["stage=rl", f"name={algo}", f"algo={algo}", *OWN.get(algo, []), *TASK, *LIMITS, *SAID, *STEP, *WAYS[way]]
    run = carry_out(runs, *words, "sampler.k=2", f"precision={precision}", "kl_beta=0.1")
    step = trained(run / "rl" / algo, way, precision)
    assert step["rollout/logp_gap"] < APART[precision] and 0 <= step["objective/kl"] < TOKENS * APART[precision] ** 2


def test_rows_with_a_system_message(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """It stands where the template's own would."""
    said = [{"role": "system", "content": "Talk like a pirate."}, *HI]
    rows = [{"prompt": said, "completion": text, "reward": i} for i, text in enumerate(["Arr!", "Ahoy!", "Hello."])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["algo=grpo_offline", f"data.train={tmp_path}/rows.jsonl", f"data.validation={tmp_path}/rows.jsonl"]
    run = carry_out(tmp_path, "stage=rl", *words, *LIMITS, *STEP, *WAYS["lora"], "eval.generate=false")
    assert trained(run / "rl", "lora", "fp32")["ratio/mean"] == pytest.approx(1, abs=0.01)
    told = capfd.readouterr().out
    assert "<|im_start|>system\nTalk like a pirate.<|im_end|>\n<|im_start|>user\nHi<|im_end|>" in told
    assert "trained by Hugging Face" not in told


def test_what_needs_no_training(runs: Path, capfd: pytest.CaptureFixture) -> None:
    """What the rows can teach, and the memory of it."""
    carry_out(runs, "stage=audit", f"data.train={runs}/x/score/train.jsonl", model="")
    found = json.loads((runs / "x" / "audit" / "results.json").read_text())
    assert (found["prompts/rows"], found["prompts/prompts"], found["rewards/levels"]) == (9, 3, 9)
    capfd.readouterr()
    carry_out(runs, "stage=plan", *TASK, *LIMITS)
    assert (
        "134.5 M weights, 134.5 M trained, fp32\nshape: 30 layers of 576, vocabulary 49,152" in capfd.readouterr().out
    )


def test_it_answers_in_its_own_template(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": [{"role": "user", "content": "What is the capital of France?"}]}) + "\n")
    run = carry_out(tmp_path, "stage=generate", f"data.test={rows}", "generation.max_new_tokens=24")
    (row,) = rows_of(run / "generate" / "test.jsonl")
    assert "Paris" in row["completion"] and "unfinished" not in row
