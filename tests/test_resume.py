"""Runs that are killed and started again: the same as if nobody had killed them, or refused with what has changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.yaml_layers import ROOT
from pipeline.errors import UserError
from pipeline.launch import run_dir
from pipeline.models.policy import Policy
from pipeline.trainer.checkpoint import Checkpoints, State
from pipeline.trainer.metrics import Interval, Metrics
from tests import sameness, tiny
from tests.test_stages import SHORT, SMALL_TRAIN, rows, run, train

KILLS = [
    ["stage=sft", "processes=2", "kills=2", "seed=4", "refuse=", "zero=zero2"],
    ["stage=sft,reward,rl", "processes=1", "kills=2", "seed=1", "refuse=sft"],
]


@pytest.mark.parametrize("words", KILLS, ids=["two ranks", "every stage"])
def test_killed_at_random_moments_it_ends_the_same(tmp_path: Path, words: list[str]) -> None:
    """A few kills; python -m tests.kill_and_resume makes as many as one likes."""
    argv = [sys.executable, "-m", "tests.kill_and_resume", *words, "signals=mixed", f"folder={tmp_path}"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "all identical" in done.stdout


def test_a_checkpoint_is_not_written_over_itself(tmp_path: Path) -> None:
    """Killed while the one that `latest` names is replaced, a run would have none: SIGTERM right after a save asks."""
    trained = tiny.trainer(Policy(tiny.language_model("llama"), 64))
    checkpoints = Checkpoints(tmp_path, trained.ranks, limit=2)
    checkpoints.save(trained, State(step=2, world=1), Interval(Metrics()))
    folder = tmp_path / "checkpoints" / "step-000002"
    before = folder.stat().st_ino
    checkpoints.save(trained, State(step=2, world=1), Interval(Metrics()))
    assert folder.stat().st_ino == before


# trained longer

CONSTANT = ["lr_scheduler_type=constant", "warmup_ratio=0", "learning_rate=1e-3", "eval_steps=2", "save_steps=3"]
VALUES = ["value.max_prompts=16", "value.samples_per_prompt=2", "value.epochs=2", "scale_steps=false"]
LABELS = ["algo=bco", "name=bco", *CONSTANT, *SHORT]
LONGER = {"sft": [*CONSTANT, *SHORT], "rl": ["algo=alol", *CONSTANT, *SHORT, *VALUES]}


def unlike(one: Path, two: Path) -> list[str]:
    """What differs of two runs in two places, which their settings name."""
    names = ("config.yaml", "command.txt")
    return [line for line in sameness.differences(one, two) if not line.split(" ")[0].endswith(names)]


def test_trained_longer_it_is_as_if_it_had_been_so_from_the_start(tmp_path: Path, capsys) -> None:
    """Under a constant rate every byte, with the log; where the old end is also a step that is logged and evaluated."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    train("sft", once, *LONGER["sft"], "max_steps=4")
    train("sft", twice, *LONGER["sft"], "max_steps=2")
    train("sft", twice, *LONGER["sft"], "max_steps=4")
    assert "4 steps in place of 2: the learning rate follows its schedule" in capsys.readouterr().out
    assert unlike(once, twice) == []
    assert sameness.leftovers(twice) == []

    train("reward", once, "name=helpfulness", "max_steps=1")
    for stage in ("sft", "reward"):
        shutil.copytree(once / "default" / stage, tmp_path / "longer" / "default" / stage)
    longer = tmp_path / "longer"
    shutil.copy(once / "default" / run_dir.DAY, longer / "default")
    train("rl", once, *LONGER["rl"], "max_steps=4")
    train("rl", longer, *LONGER["rl"], "max_steps=2")
    train("rl", longer, *LONGER["rl"], "max_steps=4")
    assert unlike(once / "default" / "rl", longer / "default" / "rl") == []

    # whose reference point is made of all steps before
    train("rl", once, *LABELS, "max_steps=4")
    train("rl", longer, *LABELS, "max_steps=2")
    train("rl", longer, *LABELS, "max_steps=4")
    assert unlike(once / "default" / "rl" / "bco", longer / "default" / "rl" / "bco") == []
    points = [row.get("train/rewards/reference_point") for row in rows(longer / "default/rl/bco/metrics.jsonl")]
    assert 0.0 not in points[-2:]


# what has changed


# name -> stage and its words
STAGES = {
    "rows": ("sft", ["model=FOLDER/model", "task=null", "data.task_size=null", "data.train=FOLDER/train.jsonl"]),
    "task": ("sft", ["task=FOLDER/task.py", "data.task_size=null"]),
    "rl": ("rl", ["algo=nll", "model=FOLDER/model", "reward=FOLDER/brief.py", "scale_steps=false"]),
}
STAGES["rows"][1].append("data.validation=FOLDER/validation.jsonl")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, rows, a task and a reward of one's own, and unfinished stages that started from them."""
    folder = tmp_path_factory.mktemp("begun")
    train("sft", folder / "first", "max_steps=1", *SHORT)
    shutil.copytree(folder / "first" / "default" / "sft" / "model", folder / "model")
    rows = [{"prompt": f"How do I boil egg {i}?", "completion": "In water.", "reward": i / 40} for i in range(40)]
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "brief.py").write_text("def reward(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n")
    (folder / "task.py").write_text(
        "from pipeline.records import Example\n\n\ndef examples(split, seed, size):\n"
        '    return [Example(str(i), f"egg {i}", completion="In water.") for i in range(40)]\n'
    )
    for stage in STAGES:
        start(folder, stage)
        next((folder / stage).rglob("results.json")).unlink()
    return folder


def start(folder: Path, name: str, *more: str) -> None:
    stage, words = STAGES[name]
    own = [word.replace("FOLDER", str(folder)) for word in words]
    said = dict(word.split("=", 1) for word in [*SMALL_TRAIN, *SHORT, "max_steps=1", *own, *more])
    run(stage, folder / name, *(f"{key}={value}" for key, value in said.items()))


@pytest.mark.parametrize(
    "name, file, more, wanted",
    [
        ("rows", "train.jsonl", '{"prompt": "a", "completion": "b"}\n', "its data.train has changed"),
        ("rows", "validation.jsonl", '{"prompt": "a", "completion": "b"}\n', "its data.validation has changed"),
        ("rows", "model/model.safetensors", "\0", "its model has changed"),
        ("rows", "model/tokenizer.json", " ", "its model has changed"),
        ("task", "task.py", "# more\n", "its data has changed"),
        ("rl", "brief.py", "# more\n", r"its reward .*brief\.py has changed"),
        ("rl", "model/model.safetensors", "\0", "its model has changed"),
    ],
)
def test_a_changed_input_is_refused(begun: Path, name: str, file: str, more: str, wanted: str) -> None:
    before = (begun / file).read_bytes()
    (begun / file).write_bytes(before + more.encode())
    with pytest.raises(UserError, match=wanted) as error:
        start(begun, name)
    (begun / file).write_bytes(before)
    assert "\n" not in str(error.value) and "choose another run=" in str(error.value)


@pytest.mark.parametrize(
    "word, wanted",
    [
        ("batch_size=8", "started with train.batch_size=16, now it is 8"),
        ("template.human=You: ", "started with template.human="),
        ("data.max_prompt_length=40", "started with data.max_prompt_length=48, now it is 40"),
    ],
)
def test_changed_settings_are_refused(begun: Path, word: str, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        start(begun, "rows", word)
