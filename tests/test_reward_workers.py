"""Worker processes that score: the same values, messages and weights as without them, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest

from pipeline.data.batching import Packing
from pipeline.errors import UserError
from pipeline.rewards.rewards import Rewards, WeightedReward, loaded
from pipeline.rewards.workers import Question, RewardWorkers, cuts, lost
from pipeline.rl.compositions import Composer
from pipeline.trainer.loop import Trainer
from pipeline.trainer.objective import objective_of
from tests import masked, same_step, tiny

# texts are numbers; `overlap` is that of tests/masked.py
REWARDS = """
import os, sys, time
from pathlib import Path

def number(prompts, completions, **columns):
    return [float(text) + 1000 * len(prompt) for text, prompt in zip(completions, prompts)]

def process(prompts, completions, **columns):
    return [os.getpid()] * len(completions)

def torch_is_loaded(prompts, completions, **columns):
    return ["torch" in sys.modules] * len(completions)

def second_fails(prompts, completions, **columns):
    return [1 / (float(text) - 6) for text in completions]

def second_is_nan(prompts, completions, **columns):
    return [float("nan") if text == "5" else 0.0 for text in completions]

def nothing(prompts, completions, **columns):
    return None

def lambdas(prompts, completions, **columns):
    return [lambda: 1.0 for _ in completions]

def column(prompts, completions, place, **columns):
    return [float(value) for value in place]

def leaves(prompts, completions, **columns):
    os._exit(3)

def sleeps(prompts, completions, **columns):
    Path(__file__).with_name(f"asleep-{os.getpid()}").touch()
    time.sleep(600)

def overlap(prompts, completions, **columns):
    def one(text, reference):
        return 0.01 * text.count("a") + len({*text.split()} & {*reference.split()}) / 4
    return [one(text, given[0]) for text, given in zip(completions, columns["references"])]
"""
NAMES = (
    *("number", "process", "torch_is_loaded", "second_fails", "second_is_nan", "nothing"),
    *("lambdas", "column", "overlap"),
)
TEXTS = [str(i) for i in range(7)]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("rewards") / "mine.py"
    made.write_text(REWARDS)
    return made


@pytest.fixture(scope="module")
def workers(file: Path) -> RewardWorkers:
    return RewardWorkers({name: f"{file}:{name}" for name in NAMES}, 3)


def rewards(file: Path, names: list[str], workers: RewardWorkers | None) -> Rewards:
    places = {name: f"{file}:{name}" for name in names}
    return Rewards([WeightedReward(name, 2.0, loaded(place), given=place) for name, place in places.items()], workers)


def score(scorer: Rewards, texts: list[str]):
    return scorer.score(["p" * len(text) for text in texts], texts, {"place": [10 * i for i in range(len(texts))]})


def test_cuts_by_hand() -> None:
    assert cuts(7, 3) == [(0, 2), (2, 4), (4, 7)]
    assert cuts(1, 3) == [(0, 0), (0, 0), (0, 1)]
    assert cuts(0, 2) == [(0, 0), (0, 0)]


def test_values_in_order(file: Path, workers: RewardWorkers) -> None:
    there = rewards(file, ["number", "column"], workers)
    found = score(there, TEXTS)
    assert found.raw["number"] == [1000.0, 1001.0, 1002.0, 1003.0, 1004.0, 1005.0, 1006.0]
    assert found.raw["column"] == [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0]
    assert found.total[6] == 2 * 1006 + 2 * 60
    assert found == score(rewards(file, ["number", "column"], None), TEXTS)
    assert score(there, ["4"]).total == [2 * 1004.0 + 0.0]
    assert score(there, []).total == []
    columns = {"place": [1, 2, 3, 4]}
    waiting = [there.begin([""] * 4, TEXTS[start : start + 4], columns) for start in (0, 1, 2)]  # at once
    assert [one().raw["number"][0] for one in reversed(waiting)] == [2.0, 1.0, 0.0]


def test_each_part_in_a_process_of_its_own(file: Path, workers: RewardWorkers) -> None:
    first, second, third = found = score(rewards(file, ["process"], workers), TEXTS).raw["process"][0:7:3]
    assert len({*found}) == 3 and os.getpid() not in found
    again = score(rewards(file, ["process"], workers), TEXTS).raw["process"]
    assert again == [first] * 2 + [second] * 2 + [third] * 3  # each is asked for the same part again


def test_workers_load_no_torch(file: Path, workers: RewardWorkers) -> None:
    found = [
        score(rewards(file, ["torch_is_loaded"], known), ["1"]).raw["torch_is_loaded"] for known in (workers, None)
    ]
    assert found == [[0.0], [1.0]]


def test_what_workers_do_not_know_is_called_here(file: Path, workers: RewardWorkers) -> None:
    here = WeightedReward("model", 1.0, lambda completions, **columns: [os.getpid()] * len(completions))
    found = score(Rewards([here, WeightedReward("process", 1.0, loaded(f"{file}:process"))], workers), TEXTS)
    assert found.raw["model"] == [os.getpid()] * 7 and os.getpid() not in found.raw["process"]


@pytest.mark.parametrize("name", ["second_fails", "second_is_nan", "nothing", "lambdas"])
def test_the_same_message(file: Path, workers: RewardWorkers, name: str) -> None:
    said = []
    for known in (None, workers):
        with pytest.raises(UserError) as raised:
            score(rewards(file, [name], known), [*TEXTS[:6], "7", "6"] if name == "second_fails" else TEXTS)
        said.append(str(raised.value))
    assert said[0] == said[1] and "\n" not in said[0]


def test_a_worker_that_dies(file: Path) -> None:
    scorer = rewards(file, ["leaves"], RewardWorkers({"leaves": f"{file}:leaves"}, 1))
    said = "rewards.workers: a worker process ended with exit code 3 while it scored completions 0 to 6 by leaves,"
    for _ in range(2):  # and again when it is asked once more
        with pytest.raises(UserError, match=said):
            score(scorer, TEXTS)
    killed = lost(-9, Question(["a", "b"], 4, ["p"] * 2, ["x", "y"], {}))
    assert "a worker process was killed by SIGKILL while it scored completions 4 to 5 by a, b, wanted" in killed


def test_a_reward_that_does_not_load(file: Path) -> None:
    broken = file.with_name("broken.py")
    broken.write_text("x = 1 / 0\n")
    scorer = Rewards([WeightedReward("broken", 1.0, lambda **columns: [])], RewardWorkers({"broken": str(broken)}, 1))
    with pytest.raises(UserError, match=r"broken\.py does not load: ZeroDivisionError: division by zero"):
        score(scorer, TEXTS)


def ended(pids: set[int], seconds: float = 20.0) -> bool:
    """Whether all of them end within `seconds`; a zombie has ended."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_workers_end_when_they_are_forgotten(file: Path) -> None:
    scorer = rewards(file, ["process"], RewardWorkers({"process": f"{file}:process"}, 1))
    mine = {int(pid) for pid in score(scorer, TEXTS).raw["process"]}
    assert not ended(mine, 0.1)
    del scorer
    assert ended(mine)


def test_workers_end_with_the_process_that_asks(tmp_path: Path) -> None:
    """Whatever ends it, and in the middle of a reward."""
    code = "import sys; from pipeline.rewards.workers import RewardWorkers; "
    code += "RewardWorkers({'mine': sys.argv[1]}, 1).ask(['mine'], [''], ['a'], {})()"
    endings = (signal.SIGINT, signal.SIGKILL)
    folders = [tmp_path / number.name for number in endings]
    parents = []
    for folder in folders:
        folder.mkdir()
        (folder / "mine.py").write_text(REWARDS)
        words = [sys.executable, "-c", code, f"{folder / 'mine.py'}:sleeps"]
        parents.append(subprocess.Popen(words, stderr=subprocess.DEVNULL))
    for number, folder, parent in zip(endings, folders, parents, strict=True):
        limit = time.monotonic() + 60
        while not (asleep := [*folder.glob("asleep-*")]):
            assert time.monotonic() < limit and parent.poll() is None
            time.sleep(0.05)
        parent.send_signal(number)
        parent.wait(20)
        assert ended({int(path.name.split("-")[1]) for path in asleep}), number.name


DRAWN = tiny.settings("rl", "algo=semi_offline", "algorithm.settings.samples=5").algorithm
CASE = same_step.Case(DRAWN, masked=True)
ROWS = Packing(1, None, False, tiny.PAD_ID)  # micro-batches of one row


def trainer_of(scorer: Rewards, zero: str, folder: Path, watch: Callable[[str], None] | None) -> Trainer:
    """Semi-offline steps with `scorer`; where there is a `watch`, with forwards ahead, and it hears of both halves."""
    trained = tiny.trainer(same_step.module(CASE), zero, optimizer=same_step.OPTIMIZER)
    items = same_step.items_of(CASE)
    trainer = same_step.trainer_of(CASE, trained, items, ROWS, folder)
    module, settings, objective = objective_of(CASE.algorithm)
    composer = Composer(trained.ranks, masked.encoder(), scorer, items, module)

    def begin(output, batch):
        watch(f"begin {batch.items}")
        rest = composer.begin(output, batch, settings)

        def ending():
            watch(f"rest {batch.items}")
            return rest()

        return ending

    whole = partial(composer.loss, settings=settings)
    return replace(trainer, objective=replace(objective, loss=whole, begin=begin if watch else None))


@pytest.fixture(scope="module")
def at_once(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """Three steps with rewards called here."""
    yield same_step.run(
        CASE, trainer_of(rewards(file, ["overlap"], None), "zero0", tmp_path_factory.mktemp("here"), None)
    )


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2"])
def test_the_same_steps(file: Path, workers: RewardWorkers, at_once: dict, zero: str, tmp_path: Path) -> None:
    """Each micro-batch's loss is taken after the next one's forward; ZeRO changes no bit on one process."""
    heard: list[str] = []
    found = same_step.run(CASE, trainer_of(rewards(file, ["overlap"], workers), zero, tmp_path, heard.append))
    # rows 0 to 4; then 8, 1, 8; then 4
    assert heard[:6] == ["begin (0,)", "begin (2,)", "rest (0,)", "begin (1,)", "rest (2,)", "begin (3,)"]
    assert heard[6:10] == ["rest (1,)", "begin (4,)", "rest (3,)", "rest (4,)"]
    assert heard[-2:] == ["begin (4,)", "rest (4,)"]
    for name in ("loss", "grad_norm", "weights"):
        tiny.close(found[name], at_once[name], roundings=0 if zero == "zero0" else 128)
