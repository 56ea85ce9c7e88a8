"""Stages that learn from pairs, scores and conversations, for real, on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests import logged, tiny
from tests.test_stages import SHORT, rows, train


@pytest.fixture(scope="module", params=["llama", "t5"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an SFT model."""
    folder = tmp_path_factory.mktemp(request.param)
    train("sft", folder, f"model.scratch.shape={request.param}", "max_steps=2", "learning_rate=1e-3", *SHORT)
    return folder / "default"


def test_dpo_starts_at_its_reference_and_learns_the_pairs(runs: Path, tmp_path: Path) -> None:
    answers = ("Put {} in hot water.", "Do not ask {} of me.")
    pairs = [
        {"prompt": f"How do I boil egg {i}?", "better_response_id": i % 2}
        | {f"response_{side}": answers[side != i % 2].format(i) for side in (0, 1)}
        for i in range(48)
    ]
    words = [*written(tmp_path, pairs), "algo=dpo", "beta=0.5", *SHORT]
    train("rl", runs.parent, *words, "max_steps=6", "learning_rate=3e-3")
    lines = rows(runs / "rl" / "metrics.jsonl")
    tiny.close(lines[0]["eval/logps/chosen"], lines[0]["eval/logps/ref_chosen"])
    rounded = 16 * tiny.rounding(lines[0]["eval/logps/chosen"])  # margins are differences of such sums
    assert lines[0]["eval/loss"] == pytest.approx(math.log(2), abs=rounded)
    assert lines[0]["eval/rewards/margins"] == pytest.approx(0, abs=rounded)
    assert lines[1]["train/loss"] == pytest.approx(math.log(2), abs=rounded)  # measured before the first step
    assert lines[-1]["train/rewards/margins"] > 0.1 and lines[-1]["eval/rewards/accuracies"] > 0.9
    assert all(line["train/grad_norm"] > 0 for line in lines[1:])
    assert "eval/completions/mean_words" in lines[-1]
    logged.check(runs / "rl")
    before = [path.name for path in (runs / "cache").iterdir()]
    train("rl", runs.parent, *words, "name=again", "max_steps=1")
    assert [path.name for path in (runs / "cache").iterdir()] == before  # the reference is not asked twice


def test_dpo_with_dropout_is_stopped_before_its_first_step(runs: Path) -> None:
    with pytest.raises(UserError, match=r"ratio_tolerance: policy and reference differ .*dropout"):
        train("rl", runs.parent, "algo=dpo", "name=dropped", "model.dropout=0.3", "max_steps=1", *SHORT)


@pytest.mark.parametrize(
    ("algo", "more", "start"),
    [("agro", ["algorithm.settings.group_size=3", "beta=0.05"], 0.25), ("kto", ["threshold=0.4", "beta=0.5"], 1 / 3)],
)
def test_scored_rows_of_a_prompt_and_labels_are_learned(
    runs: Path, tmp_path: Path, algo: str, more: list[str], start: float
) -> None:
    """Rewards 1, .5 and 0 of each prompt: their variance is .25; of kto, two good rows weigh as much as one bad, so
    that of weights 1/2, 1/2 and 1 half is 1/3 each on average. At the end the good rows are the likelier ones."""
    answers = (("Put {} in hot water.", 1.0), ("Boil {} for long.", 0.5), ("Do not ask {} of me.", 0.0))
    lines = [
        {"prompt": f"How do I boil egg {i}?", "completion": text.format(i), "reward": reward}
        for i in range(16)
        for text, reward in answers
    ]
    more = [word.replace("threshold", "algorithm.settings.threshold") for word in more]
    words = [*written(tmp_path, lines), f"algo={algo}", *more, *SHORT, f"name={algo}"]
    train("rl", runs.parent, *words, "max_steps=8", "learning_rate=3e-3")
    found = rows(runs / "rl" / algo / "metrics.jsonl")
    rounded = 16 * tiny.rounding(found[0]["eval/logps/chosen"])
    assert found[0]["eval/loss"] == pytest.approx(start, abs=rounded)
    assert found[1]["train/loss"] == pytest.approx(start, abs=0.1 if algo == "kto" else rounded)  # of the rows drawn
    assert found[-1]["eval/rewards/accuracies"] > 0.8
    assert found[-1]["eval/rewards/chosen"] > found[-1]["eval/rewards/rejected"] + 0.05
    logged.check(runs / "rl" / algo)


def written(folder: Path, lines: list[dict]) -> list[str]:
    """The words that name a file of these rows."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [f"data.train={path}", "data.validation_fraction=0.3", "task=null", "data.task_size=null"]


def annotated(count: int) -> list[dict]:
    """Two answers to each request; the longer, the better."""
    return [
        {"prompt": f"How do I boil egg {i // 2}?", "completion": "In water. " * (1 + i % 2), "reward": float(i % 2)}
        for i in range(count)
    ]


def test_a_reward_model_from_responses_by_themselves(tmp_path: Path) -> None:
    completions = [{"response": row["completion"], "overall_score": row["reward"]} for row in annotated(48)]
    rows_of_two = [
        {"instruction": row["prompt"], "completions": completions[i : i + 2]}
        for i, row in enumerate(annotated(48))
        if i % 2 == 0
    ]
    given = written(tmp_path, rows_of_two)
    train("reward", tmp_path, *given, "name=scores", "objective=regression", "max_steps=12", "learning_rate=1e-2")
    lines = rows(tmp_path / "default" / "reward" / "scores" / "metrics.jsonl")
    assert lines[-1]["eval/mse"] < lines[0]["eval/mse"]
    assert lines[-1]["eval/accuracy"] > 0.9 and lines[-1]["eval/correlation"] > 0.5
    counts = json.loads((tmp_path / "default" / "reward" / "scores" / "data.json").read_text())
    assert counts["train"]["responses"] == counts["train"]["rows"]  # one each
    assert counts["train"]["rows"] % 2 == 0  # both answers to a request


def test_a_reward_model_from_order_and_scores(tmp_path: Path) -> None:
    answers = annotated(48)
    pairs = [
        {
            "prompt": worse["prompt"],
            "chosen": better["completion"],
            "rejected": worse["completion"],
            "chosen_gpt_score": 0.9,
            "rejected_gpt_score": 0.2,
            "gpt_correctness": i % 2,
        }
        for i, (worse, better) in enumerate(zip(answers[::2], answers[1::2], strict=True))
    ]
    given = written(tmp_path, pairs)
    train("reward", tmp_path, *given, "name=mixed", "objective=mixed", "max_steps=8", "learning_rate=1e-2")
    last = rows(tmp_path / "default" / "reward" / "mixed" / "metrics.jsonl")[-1]
    assert last["eval/accuracy"] > 0.9 and last["eval/mse"] < 1


@pytest.mark.parametrize("shape", ["llama", "t5"])
def test_every_turn_of_a_conversation_is_learned(
    tmp_path: Path, shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    talks = [
        {"instruction": f"And egg {i}?", "output": "In water.", "history": [["Can you boil?", "Yes."]]}
        for i in range(30)
    ]
    words = [*written(tmp_path, talks), f"model.scratch.shape={shape}", "train_on=all", "max_steps=1"]
    train("sft", tmp_path, *words, *SHORT)
    counts = json.loads((tmp_path / "default" / "sft" / "data.json").read_text())
    assert counts["train"]["rows"] % 2 == 0  # two turns each
    assert ("turns read in" in capsys.readouterr().out) == (shape == "llama")
    assert rows(tmp_path / "default" / "sft" / "metrics.jsonl")[-1]["train/loss"] > 0
