"""The line that ends a stage: what it left, and a next command that the command line accepts."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from pipeline.config.resolve import resolve, resolve_steps
from pipeline.files import write_json
from pipeline.launch import run_dir
from pipeline.launch.closing import LEFT, closing, next_words

TRAINED = {"eval/loss": 1.23456, "eval/margin": 0.5, "model_step": 150, "steps": 200, "seconds": 9.0}
JUDGED_BY_X = {"eval/reward": None, "eval/rewards/x/mean": 1.0}
JUDGED = {"sft": {"reward": 0.5, "reward_std": 1.0}, "rl": {"reward": 0.75}}
RESULTS = {
    "sft": (TRAINED, "/model: eval/loss 1.235 at step 150 of 200"),
    "reward": ({"eval/accuracy": 0.65, **TRAINED}, "/model: eval/accuracy 0.65 at step 150 of 200"),
    "rl": ({**TRAINED, **JUDGED_BY_X}, "/model: eval/reward not finite at step 150 of 200"),
    "score": ({"train": {"rows": 5700}, "test": {"rows": 3}}, ": train 5,700 rows, test 3 rows"),
    "generate": ({"train": {"rows": 7}}, ": train 7 rows"),
    "evaluate": (JUDGED, "/results.json: reward sft 0.5, rl 0.75"),
    "bench": ({"results": [1, 2]}, "/results.json: 2 results"),
}


def left_by_rl(where: Path, **results: float) -> str:
    step = resolve(["stage=rl", f"runs_dir={where}"])
    write_json(run_dir.stage_dir(step.settings, "rl") / "results.json", {**TRAINED, **results})
    return closing(step, last=False).partition("/model: ")[2]


def test_the_reward_of_logged_rows_is_no_result(tmp_path: Path) -> None:
    """It is the same whatever was learned: the loss is said, until a reward judges what the policy says."""
    logged = {"eval/reward": 0.25}
    assert left_by_rl(tmp_path, **logged) == "eval/loss 1.235 at step 150 of 200"
    judged = left_by_rl(tmp_path, **logged, **{"eval/rewards/rouge/mean": 0.25})
    assert judged == "eval/reward 0.25 at step 150 of 200"


def test_weights_that_nothing_later_beat_are_those_it_began_with(tmp_path: Path) -> None:
    assert "these are the weights it began with (train.keep=last" in left_by_rl(tmp_path, model_step=0)
    assert "began with" not in left_by_rl(tmp_path, model_step=1)


def finished(where: Path, stage: str, *words: str, model: bool = False):
    """A step that left its results."""
    step = resolve([f"stage={stage}", *words, f"runs_dir={where}"])
    directory = run_dir.stage_dir(step.settings, stage)
    write_json(directory / "results.json", RESULTS[stage][0])
    if model:
        (directory / "model").mkdir()
    return step


@pytest.mark.parametrize("stage", LEFT)
def test_what_a_stage_left(tmp_path: Path, stage: str) -> None:
    words = ["name=x"] if stage == "reward" else []
    step = finished(tmp_path, stage, *words)
    directory = tmp_path / "default" / stage / "x" if stage == "reward" else tmp_path / "default" / stage
    assert closing(step, last=False) == f"{directory}{RESULTS[stage][1]}"
    line = closing(step, last=True)
    assert line.startswith(closing(step, last=False)) and "\n" not in line
    assert ("; next: bash run.sh stage=" in line) == (stage != "bench")


@pytest.mark.parametrize("stage", ["report", "compare", "plan"])
def test_stages_whose_own_last_line_says_it(stage: str) -> None:
    words = ["recipe=demo"] if stage == "compare" else []
    assert closing(resolve([f"stage={stage}", *words]), last=True) == ""


NEXT = [
    (["stage=sft", "data.train=x.jsonl"], "stage=reward name=NAME data.train=PAIRS"),
    (["stage=sft", "data.path=rows", "mask_rate=0.4", "run=mine"], "stage=generate run=mine data.path=rows"),
    (["stage=reward", "name=a", "task=assistant"], "stage=sft data.task=assistant"),
    (["stage=generate", "data.train=x.jsonl"], "stage=score of=generate reward=NAME"),
    (["stage=generate", "data.train=x", "reward=rouge"], "stage=rl scored=runs/default/generate"),
    (
        ["stage=rl", "model=m", "data.train=x"],
        "stage=evaluate 'policies={sft: m, rl: rl}' reward=NAME data.test=FILE",
    ),
    (["stage=evaluate", "run=a"], "stage=report run=a"),
    (["stage=sft", "recipe=demo", "run=b"], "stage=reward name=helpfulness run=b recipe=demo"),
    (["stage=reward", "recipe=demo", "name=helpfulness"], "stage=reward name=harmlessness recipe=demo"),
    (["stage=evaluate", "recipe=demo"], "stage=report recipe=demo"),
]


@pytest.mark.parametrize(("words", "following"), NEXT, ids=[" ".join(words) for words, _ in NEXT])
def test_what_follows_in_a_run_without_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], following: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = next_words(resolve(words))
    assert shlex.join(found) == following
    assert len(resolve_steps(found)) == 1


def test_what_follows_depends_on_what_there_is(tmp_path: Path) -> None:
    finished(tmp_path, "sft", model=True)
    reward = finished(tmp_path, "reward", "name=a", model=True)
    assert next_words(reward) == ["stage=rl", f"runs_dir={tmp_path}", "data.train=FILE"]
    score = finished(tmp_path, "score")
    assert next_words(score) == ["stage=rl", f"runs_dir={tmp_path}"]
    rl = finished(tmp_path, "rl", "reward=rouge", model=True)
    assert next_words(rl) == ["stage=evaluate", "reward=rouge", f"runs_dir={tmp_path}", "data.test=FILE"]
    second = finished(tmp_path, "rl", "name=b", model=True)
    assert next_words(second)[1] == "policies={sft: sft, rl: rl/b}"
    assert resolve(next_words(second)).settings.policies == {"sft": "sft", "rl": "rl/b"}


def test_a_recipe_that_only_does_with_further_words(tmp_path: Path) -> None:
    """task_size without a task is refused; the words that were given name one."""
    recipe = tmp_path / "own.yaml"
    recipe.write_text("all: {data: {task_size: 50}}\nsteps: [{stage: sft}, {stage: reward, name: a}, {stage: rl}]\n")
    words = [f"recipe={recipe}", "task=assistant", "run=x"]
    after = ["run=x", f"recipe={recipe}", "data.task=assistant"]
    assert next_words(resolve(["stage=sft", *words])) == ["stage=reward", "name=a", *after]
    assert next_words(resolve(["stage=reward", "name=a", *words])) == ["stage=rl", *after]
