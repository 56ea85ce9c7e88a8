"""The lines that end a stage: what it left, and a next command that the command line accepts."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from pipeline.config.resolve import resolve, resolve_steps
from pipeline.errors import UserError
from pipeline.files import write_json, write_text
from pipeline.launch import run_dir
from pipeline.report.closing import closing, next_words
from stages import inputs

ENDED = {"model_step": 150, "steps": 200, "seconds": 9.0}
TRAINED = {"eval/loss": 1.23456, "eval/perplexity": 3.4, **ENDED}
RANKED = {"eval/accuracy": 0.65, "eval/length_accuracy": 0.5, "eval/pairs": 1000.0, **ENDED}
JUDGED = {"eval/reward": 1.5, "eval/rewards/x/mean": 1.5, **ENDED}
SIDE_BY_SIDE = {"sft": {"reward": 0.5, "reward_se": 0.01}, "rl": {"reward": 0.75, "reward_se": 0.01}}
RESULTS = {
    "sft": (TRAINED, "/model: held-out loss 1.23 at step 150 of 200"),
    "reward": (
        RANKED,
        "/model: 0.650 of 1,000 held-out pairs in the right order at step 150 of 200, by length alone 0.500: more than "
        "length",
    ),
    "rl": (JUDGED, "/model: held-out reward 1.50 at step 150 of 200"),
    "score": ({"train": {"rows": 5700}, "test": {"rows": 3}}, ": train 5,700 rows, test 3 rows"),
    "generate": ({"train": {"rows": 7}}, ": train 7 rows"),
    "evaluate": (SIDE_BY_SIDE, "/results.json: reward 0.500 to 0.750 (+0.250, sure)"),
    "bench": ({"results": [1, 2]}, "/results.json: 2 results"),
}


def finished(where: Path, stage: str, *words: str, model: bool = False, **more: float):
    """A step that left its results."""
    step = resolve([f"stage={stage}", *words, f"runs_dir={where}"])
    directory = run_dir.stage_dir(step.settings, stage)
    write_json(directory / "results.json", {**RESULTS[stage][0], **more})
    if stage == "reward":
        write_text(directory / "metrics.jsonl", '{"step": 200, "time": 9.0, "train/accuracy": 0.7}\n')
    if model:
        (directory / "model").mkdir()
    return step


@pytest.mark.parametrize("stage", RESULTS)
def test_what_a_stage_left(tmp_path: Path, stage: str) -> None:
    words = ["name=x"] if stage == "reward" else []
    step = finished(tmp_path, stage, *words)
    directory = tmp_path / "default" / stage / "x" if stage == "reward" else tmp_path / "default" / stage
    assert closing(step, last=False) == [f"{directory}{RESULTS[stage][1]}"]
    first, *following = closing(step, last=True)
    assert [first] == closing(step, last=False) and "\n" not in "".join(following)
    assert len(following) == (stage != "bench")
    assert all(line.startswith("next: bash run.sh stage=") for line in following)


def test_after_what_taught_nothing_comes_what_to_look_at(tmp_path: Path) -> None:
    step = finished(tmp_path, "rl", "run=mine", "task=assistant", model_step=0)
    first, following = closing(step, last=True)
    assert "/rl/model: taught nothing" in first
    assert following == f"next: bash run.sh stage=report run=mine runs_dir={tmp_path}"
    assert len(resolve_steps(shlex.split(following)[3:])) == 1


def test_the_disk_that_a_kept_checkpoint_takes_is_said(tmp_path: Path) -> None:
    step = finished(tmp_path, "rl")
    checkpoints = tmp_path / "default" / "rl" / "checkpoints"
    write_json(checkpoints / "step-000200" / "state.json", {})
    (checkpoints / "step-000200" / "weights").write_bytes(bytes(2_500_000))
    (checkpoints / "latest").write_text("step-000200\n")
    assert closing(step, last=False)[0].endswith(
        "; 2.5 MB of checkpoint to train it longer (train.keep_checkpoint=false drops it)"
    )


def test_after_the_report_comes_how_to_use_the_model(tmp_path: Path) -> None:
    report = resolve(["stage=report", f"runs_dir={tmp_path}"])
    run = tmp_path / "default"
    assert closing(report, last=True) == [f"next: bash run.sh stage=sft runs_dir={tmp_path} data.train=FILE"]
    for stage in ("rl", "sft"):  # the one of rl is what came last
        finished(tmp_path, stage, model=True)
        write_text(run / stage / "model" / "README.md", "# how\n")
    assert closing(report, last=True) == [f"how to call the model: {run / 'rl' / 'model' / 'README.md'}"]


@pytest.mark.parametrize("stage", ["compare", "plan"])
def test_stages_whose_own_last_line_says_it(stage: str) -> None:
    words = ["recipe=demo"] if stage == "compare" else []
    assert closing(resolve([f"stage={stage}", *words]), last=True) == []


NEXT = [
    (["stage=sft", "data.train=x.jsonl"], "stage=reward name=NAME data.train=PAIRS"),
    (["stage=sft", "data.path=rows", "mask_rate=0.4", "run=mine"], "stage=generate run=mine data.path=rows"),
    (["stage=reward", "name=a", "task=assistant"], "stage=sft data.task=assistant"),
    (["stage=generate", "data.train=x.jsonl"], "stage=score of=generate reward=NAME"),
    (["stage=generate", "data.train=x", "reward=rouge"], "stage=rl scored=runs/default/generate"),
    (
        ["stage=rl", "model=m", "data.train=x"],
        "stage=evaluate data.test=FILE",
    ),
    (["stage=evaluate", "run=a", "task=assistant"], "stage=report run=a"),
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


def test_what_rows_bring_judges_no_evaluation(tmp_path: Path) -> None:
    finished(tmp_path, "sft", model=True)
    rl = finished(tmp_path, "rl", "reward={kind: 1.0, length: 0.1}", model=True)
    assert next_words(rl)[1] == "reward={kind: 1.0, length: 0.1}"
    write_json(run_dir.stage_dir(rl.settings, "rl") / "results.json", TRAINED)  # nothing judged its responses
    assert not any(word.startswith("reward=") for word in next_words(rl))


def test_a_recipe_that_only_does_with_further_words(tmp_path: Path) -> None:
    """task_size without a task is refused; the words that were given name one."""
    recipe = tmp_path / "own.yaml"
    recipe.write_text("all: {data: {task_size: 50}}\nsteps: [{stage: sft}, {stage: reward, name: a}, {stage: rl}]\n")
    words = [f"recipe={recipe}", "task=assistant", "run=x"]
    after = ["run=x", f"recipe={recipe}", "data.task=assistant"]
    assert next_words(resolve(["stage=sft", *words])) == ["stage=reward", "name=a", *after]
    assert next_words(resolve(["stage=reward", "name=a", *words])) == ["stage=rl", *after]


def test_an_evaluation_compares_rl_with_the_model_it_started_from(tmp_path: Path) -> None:
    """Where the run has no sft; what is said after RL is then enough, and is refused for another revision."""
    rl = finished(tmp_path, "rl", "model.path=somebody/small", "data.train=x", model=True)
    (tmp_path / "default" / "rl" / "config.yaml").write_text("model: {path: somebody/small, revision: null}\n")
    words = next_words(rl)
    assert not any(word.startswith("policies=") for word in words)
    asked = resolve(words).settings
    assert inputs.policies(asked) == {"start": "somebody/small", "rl": "rl"}
    other = asked.model_copy(update={"model": asked.model.model_copy(update={"revision": "v2"})})
    with pytest.raises(UserError, match=r"model.revision: v2, but .*/rl started from somebody/small at revision None"):
        inputs.policies(other)
    finished(tmp_path, "sft", model=True)
    assert inputs.policies(asked) == {"sft": "sft", "rl": "rl"}
