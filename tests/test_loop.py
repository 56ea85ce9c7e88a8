"""The loop: schedules by hand, what counts, and a training that is stopped and goes on as if it had not been."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from pipeline.algorithms import offline, supervised
from pipeline.algorithms.stats import reduce
from pipeline.data.batching import Packing, Windows, collate
from pipeline.errors import PreemptedError, UserError
from pipeline.models.policy import Policy
from pipeline.records import Example, Item
from pipeline.trainer import evaluation, loop, schedule
from pipeline.trainer.checkpoint import Checkpoints, State
from pipeline.trainer.engine import Engine
from pipeline.trainer.loop import BestMetric, Evaluation
from pipeline.trainer.metrics import Interval, Metrics
from pipeline.trainer.model import Model
from pipeline.trainer.objective import Objective, count_terms
from tests import tiny

PACKING = Packing(None, 40, False, tiny.PAD_ID)
TOKENS = Objective(lambda logp, batch: supervised.loss(logp, batch, supervised.Settings(0.0)), "tokens")


# the learning rate


def rates(kind: str, steps: int, warmup: float, **changes: float | None) -> list[float]:
    settings = tiny.optimizer_settings(learning_rate=1.0, lr_scheduler_type=kind, warmup_ratio=warmup, **changes)
    return [schedule.learning_rate(step, steps, settings) for step in range(steps)]


def test_learning_rates_by_hand() -> None:
    # 2 of 10 steps of warm-up: 1/2, 2/2; then 8 steps from 1 down
    assert rates("linear", 10, 0.2) == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert rates("constant", 10, 0.2) == pytest.approx([0.5] + [1.0] * 9)
    # (1 + cos(pi k / 8)) / 2 for k = 0 .. 7
    falling = [1.0, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060]
    assert rates("cosine", 10, 0.2) == pytest.approx([0.5, 1.0, *falling], abs=1e-6)


def test_learning_rates_with_a_floor_and_a_late_decay() -> None:
    # 0.2 + 0.8 (1 - k / 4)
    assert rates("linear", 4, 0.0, min_lr_ratio=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert rates("cosine", 2, 0.0, min_lr_ratio=0.1) == pytest.approx([1.0, 0.55])  # 0.1 + 0.9 (1 + cos(pi / 2)) / 2
    # 2 steps of warm-up, 4 at the rate, and the last 4 down: 1 - k / 4
    assert rates("warmup_stable_decay", 10, 0.2, decay_ratio=0.4) == pytest.approx(
        [0.5] + [1.0] * 6 + [0.75, 0.5, 0.25]
    )
    down = [1.0, 0.775, 0.55, 0.325]  # 0.1 + 0.9 (1 - k / 4)
    late = rates("warmup_stable_decay", 10, 0.2, decay_ratio=0.4, min_lr_ratio=0.1)
    assert late == pytest.approx([0.5] + [1.0] * 5 + down)
    counted = rates("warmup_stable_decay", 6, None, warmup_steps=2, decay_ratio=1.0)  # all that is left goes down
    assert counted == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    assert rates("constant", 4, None, warmup_steps=8) == [0.125, 0.25, 0.375, 0.5]


@pytest.mark.parametrize("kind", ["cosine", "linear", "warmup_stable_decay"])
def test_learning_rates_are_those_of_transformers(kind: str) -> None:
    """Whose warm-up begins a step earlier, at 0."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    found = rates(kind, 20, None, warmup_steps=4, decay_ratio=0.25, min_lr_ratio=0.0 if kind == "linear" else 0.1)
    if kind == "cosine":
        theirs = transformers.get_cosine_with_min_lr_schedule_with_warmup(optimizer, 4, 20, min_lr_rate=0.1)
    elif kind == "linear":
        theirs = transformers.get_linear_schedule_with_warmup(optimizer, 4, 20)
    else:
        theirs = transformers.get_wsd_schedule(
            optimizer, 4, 5, num_stable_steps=11, decay_type="linear", min_lr_ratio=0.1
        )
    wanted = []
    for _ in range(20):
        wanted.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert found[4:] == pytest.approx(wanted[4:])


def test_learning_rates_at_the_edges() -> None:
    assert rates("linear", 4, 0.0) == [1.0, 0.75, 0.5, 0.25]
    assert rates("linear", 4, 1.0) == [0.25, 0.5, 0.75, 1.0]  # warm-up only
    for kind in ("linear", "cosine", "constant"):
        assert all(min(rates(kind, steps, ratio)) > 0 for steps in range(1, 12) for ratio in (0.0, 0.05, 0.5, 1.0))
    assert rates("constant", 140, 0.05)[:8] == pytest.approx([n / 7 for n in range(1, 8)] + [1.0])
    assert rates("linear", 3, 0.01)[0] == 1.0  # one step of warm-up, rounded up, is at the full rate
    assert rates("cosine", 1, 0.0) == rates("cosine", 1, 0.5) == [1.0]
    assert all(rate > 0 for kind in ("linear", "cosine", "constant") for rate in rates(kind, 7, 0.3))  # no idle step


def test_what_a_longer_training_does_with_its_rate() -> None:
    linear = tiny.optimizer_settings(learning_rate=1.0, lr_scheduler_type="linear", warmup_ratio=0.0)
    assert schedule.lengthened(4, 4, 8, linear) == (  # 1 - 3 / 4, then 1 - 4 / 8
        "8 steps in place of 4: the learning rate follows its schedule over all of them (linear, warmup_ratio=0): "
        "step 4 had 0.25, step 5 has 0.5"
    )
    changes = {"warmup_ratio": None, "warmup_steps": 3, "min_lr_ratio": 0.1, "decay_ratio": 0.25}
    late = tiny.optimizer_settings(learning_rate=1.0, lr_scheduler_type="warmup_stable_decay", **changes)
    said = schedule.lengthened(20, 20, 40, late)  # the last of 5 that went down: 0.1 + 0.9 / 5; then high again
    assert "(warmup_stable_decay, warmup_steps=3, optimizer.decay_ratio=0.25, min_lr_ratio=0.1)" in said
    assert said.endswith("step 20 had 0.28, step 21 has 1")


# counting


def test_terms_of_the_mean() -> None:
    items = tiny.items(3)
    batch = collate(items, range(3), PACKING)
    tokens = sum(len(item.rows[0].response_ids) for item in items)
    assert [count_terms(batch, over) for over in ("tokens", "sequences")] == [tokens, 3]
    filler = collate(items, (), PACKING)
    assert [count_terms(filler, over) for over in ("tokens", "sequences", "pairs")] == [0, 0, 0]
    assert count_terms(collate(tiny.items(3, pairs=True), range(3), PACKING), "pairs") == 3


def test_due() -> None:
    assert [step for step in range(1, 8) if schedule.due(step, 3, 7)] == [3, 6, 7]
    assert [step for step in range(1, 8) if schedule.due(step, None, 7)] == [7]
    assert [step for step in range(1, 8) if schedule.due(step, 3, None)] == [3, 6]


def test_best_metric() -> None:
    up, down = BestMetric("r", True), BestMetric("l", False)
    assert up.better(1.0, None) and up.better(1.0, 0.5) and not up.better(1.0, 1.0)
    assert down.better(0.5, 1.0) and not down.better(1.0, 0.5)
    assert not up.better(math.nan, None) and not down.better(math.nan, 3.0)


def steps(rows: int, kept: float = 1.0, **train) -> int:
    settings = tiny.settings("sft")
    update = {"max_steps": None, "num_train_epochs": None, "batch_size": 8, **train}
    changed = settings.model_copy(update={"train": settings.train.model_copy(update=update)})
    return schedule.steps_for(changed, rows, kept)


def test_steps_for() -> None:
    assert steps(100, max_steps=7) == 7
    assert steps(100, num_train_epochs=2.0) == 25  # 200 / 8
    assert steps(101, num_train_epochs=1.0) == 13  # 12.6, rounded up
    assert steps(3, num_train_epochs=0.1) == 1


def test_few_steps_are_said_with_the_cure(capfd: pytest.CaptureFixture) -> None:
    """Of 20 rows 8 are kept, batches of 64: 80 times 8 are ten batches. What was asked for is not spoken of."""
    assert steps(20, 0.4, num_train_epochs=1.0, batch_size=64) == 1
    said = capfd.readouterr().err
    assert "only 1 optimizer step in all" in said and "(8 rows, num_train_epochs=1, batch_size=64)" in said
    assert "num_train_epochs=80 makes 10 of them" in said and said.count("only") == 1
    assert steps(20, 0.4, num_train_epochs=80.0, batch_size=64) == 10
    assert steps(20, 0.4, max_steps=20) == 8
    assert "set max_steps=25, or more" in capfd.readouterr().err
    assert (steps(20, 0.4, max_steps=25), steps(20, max_steps=2)) == (10, 2)
    assert "only" not in capfd.readouterr().err


# a whole training

USUAL = {"batch_size": 4, "max_tokens": 40, "save_steps": 2, "eval_steps": 3, "logging_steps": 1}


class KilledError(Exception):
    """Stands for a kill."""


@dataclass
class Toy:
    """A training of a few steps in a directory, with dropout, so that its randomness has to be restored."""

    directory: Path
    zero: str = "zero0"
    steps: int = 6
    words: dict[str, object] = field(default_factory=dict)  # settings of `train`
    seed: int = 0  # of the first weights
    dropout: float = 0.1
    at_evaluation: Callable[[int], None] = lambda step: None
    objective: Objective = TOKENS
    larger_is_better: bool = False
    tag: str = "eval/loss"  # what chooses the best weights
    known: dict[int, float] = field(default_factory=dict)  # its value at some steps, where the evaluation has none

    def engine(self) -> Engine:
        rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), self.dropout)
        lm = tiny.language_model("gpt2", self.seed, **rates)
        return tiny.trainer(Policy(lm, 64), self.zero)

    def run(self, items: list[Item] | None = None, prepare: Callable[[], None] = lambda: None) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        items = items or tiny.items(9)
        words = {**USUAL, "max_steps": self.steps, **self.words}
        settings = tiny.settings("sft", *(f"train.{name}={value}" for name, value in words.items()))
        engine = self.engine()
        torch.manual_seed(0)
        trained = Model(engine, tiny.encoder(), PACKING)

        def evaluate(step: int) -> Evaluation:
            self.at_evaluation(step)
            found = evaluation.held_out_loss(engine, self.objective, items, PACKING)
            found |= {self.tag: self.known[step]} if step in self.known else {}
            return Evaluation(found, {"lengths": torch.arange(3.0)}, [{"id": "a", "response": f"at {step}"}])

        draw = schedule.epochs(len(items), settings.train.batch_size, settings.seed)
        trainer = loop.Trainer(
            model=trained,
            settings=settings,
            directory=self.directory,
            windows=Windows(items, draw, PACKING, engine.ranks.rank, engine.ranks.world),
            objective=self.objective,
            max_steps=self.steps,
            evaluate=evaluate,
            best_metric=BestMetric(self.tag, self.larger_is_better),
            prepare=prepare,
        )
        loop.fit(trainer)

    def weights(self, folder: str = "model") -> dict[str, torch.Tensor]:
        return load_file(self.directory / folder / "model.safetensors")

    def rows(self) -> list[dict]:
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        timeless = [
            {k: v for k, v in json.loads(x).items() if k != "time" and not k.startswith("perf/")} for x in lines
        ]
        return timeless

    def checkpoints(self) -> list[str]:
        """But for the scripts that DeepSpeed leaves beside them."""
        return sorted(path.name for path in (self.directory / "checkpoints").iterdir() if path.suffix != ".py")


def stop_at(step: int) -> Callable[[int], None]:
    def check(now: int) -> None:
        if now == step:
            raise KilledError

    return check


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The training that nothing stops."""
    toy = Toy(tmp_path_factory.mktemp("whole") / "sft")
    toy.run()
    return toy


def test_what_a_training_leaves(whole: Toy) -> None:
    rows = whole.rows()
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 3, 6]
    assert all(row["train/grad_norm"] > 0 and row["train/learned_tokens"] > 0 for row in rows[1:])
    assert sorted(path.name for path in (whole.directory / "samples").iterdir()) == [
        "step-000000.jsonl", "step-000003.jsonl", "step-000006.jsonl",
    ]  # fmt: skip
    assert whole.checkpoints() == ["latest", "step-000006"]  # to be trained longer from; the others are gone
    results = json.loads((whole.directory / "results.json").read_text())
    losses = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
    assert results["eval/loss"] == pytest.approx(min(losses.values()), rel=1e-5)
    assert losses[results["model_step"]] == min(losses.values()) and results["steps"] == 6


def test_the_tokens_read_are_counted_from_the_start(whole: Toy) -> None:
    lines = [json.loads(line) for line in (whole.directory / "metrics.jsonl").read_text().splitlines()][1:]
    each = [line["perf/tokens_per_second"] * line["perf/step_seconds"] for line in lines]
    assert [line["train/num_tokens"] for line in lines] == [round(sum(each[: i + 1])) for i in range(6)]
    assert lines[0]["train/num_tokens"] > lines[0]["train/learned_tokens"]  # prompts are read too


def test_padding_is_the_share_of_what_is_read_in_vain() -> None:
    items = [Item(Example(f"{i}", ""), (tiny.row(range(3), range(n)),)) for i, n in enumerate((7, 2, 7))]
    window = Windows(items, lambda _: [0, 1, 2], Packing(2, None, False, 0), 0, 1).at(0)
    # the two of 10 tokens beside each other, that of 5 alone, and a filler of 10: 10 of 35
    stats = loop.step_stats([*window, collate(items, (), PACKING)], PACKING, 1.0, 0.1, tiny.ranks())
    assert reduce(stats["perf/padding_fraction"]) == pytest.approx(10 / 35)
    # 5 beside 10
    stats = loop.step_stats([collate(items, (0, 1), PACKING)], PACKING, 1.0, 0.1, tiny.ranks())
    assert reduce(stats["perf/padding_fraction"]) == pytest.approx(5 / 20)
    # prompts of 3 and 3, responses of 7 and 2: 5 of 6 + 14
    apart = Packing(2, None, True, 0)
    assert loop.padding([collate(items, (0, 1), apart)], apart=True) == (20, 5)
    unpadded = Packing(2, None, False, 0, unpadded=True)
    assert "perf/padding_fraction" not in loop.step_stats(window, unpadded, 1.0, 0.1, tiny.ranks())


def test_each_row_is_the_mean_of_its_steps(tmp_path: Path, whole: Toy) -> None:
    """Rows of three steps are the means, by tokens, of the rows of single steps."""
    toy = Toy(tmp_path / "sft", words={"logging_steps": 3})
    toy.run()
    single, triple = whole.rows()[1:], toy.rows()[1:]
    assert [row["step"] for row in triple] == [3, 6]
    for row, parts in zip(triple, (single[:3], single[3:]), strict=True):
        tokens = sum(part["train/learned_tokens"] for part in parts)
        loss = sum(part["train/loss"] * part["train/learned_tokens"] for part in parts) / tokens
        assert row["train/loss"] == pytest.approx(loss, rel=1e-4)
        assert row["train/learned_tokens"] == pytest.approx(tokens / 3, rel=1e-4)
        assert row["train/num_tokens"] == parts[-1]["train/num_tokens"]
    assert same(toy.weights("last"), whole.weights("last"))  # looking less often trains the same


@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3"])
def test_a_stopped_training_goes_on_bit_for_bit(tmp_path: Path, whole: Toy, zero: str) -> None:
    if zero != "zero0":
        whole = Toy(tmp_path / "whole", zero=zero)
        whole.run()
    toy = Toy(tmp_path / "sft", zero=zero, at_evaluation=stop_at(3))
    with pytest.raises(KilledError):
        toy.run()
    assert toy.checkpoints() == ["latest", "step-000002"]
    prepared = []
    toy.at_evaluation, toy.seed = (
        (lambda step: None),
        5,
    )  # other first weights: only the checkpoint can give the right ones
    toy.run(prepare=lambda: prepared.append(1))
    assert not prepared  # the policy is no longer its reference
    assert toy.rows() == whole.rows()
    assert same(toy.weights("last"), whole.weights("last")) and same(toy.weights(), whole.weights())


def test_stopped_after_the_last_step(tmp_path: Path, whole: Toy, monkeypatch) -> None:
    toy = Toy(tmp_path / "sft")

    def fail(chosen: Path, part: Path) -> None:
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr("pipeline.trainer.keeping.linked", fail)  # the last weights are the best: last/ is made of best/
        toy.run()
    assert not (toy.directory / "results.json").exists()
    toy.run()
    assert toy.rows() == whole.rows() and same(toy.weights(), whole.weights())


def test_without_checkpoints_it_starts_anew(tmp_path: Path, whole: Toy) -> None:
    toy = Toy(tmp_path / "sft", words={"save_steps": "null"}, at_evaluation=stop_at(3))
    prepared = []
    with pytest.raises(KilledError):
        toy.run(prepare=lambda: prepared.append(1))
    toy.at_evaluation = lambda step: None
    toy.run(prepare=lambda: prepared.append(2))
    assert prepared == [1, 2] and toy.rows() == whole.rows() and same(toy.weights(), whole.weights())


def test_keep_chooses_the_weights(tmp_path: Path) -> None:
    """With a watch that likes a large loss the first weights are the best: training only lowers it."""
    found = {}
    for kept in ("best", "last"):
        toy = Toy(tmp_path / kept, words={"keep": kept}, larger_is_better=True)
        toy.run()
        assert same(toy.weights(), toy.weights(kept))
        assert (toy.directory / "best").is_dir() == (kept == "best")  # which would otherwise be of no use
        found[kept] = json.loads((toy.directory / "results.json").read_text())
    assert found["best"]["model_step"] == 0 and found["last"]["model_step"] == 6
    assert found["best"]["eval/loss"] > found["last"]["eval/loss"]


def inode(toy: Toy, folder: str) -> int:
    return (toy.directory / folder / "model.safetensors").stat().st_ino


def test_the_same_weights_are_on_the_disk_once(whole: Toy, tmp_path: Path) -> None:
    assert json.loads((whole.directory / "results.json").read_text())["model_step"] == 6  # the last are the best
    assert inode(whole, "best") == inode(whole, "last") == inode(whole, "model")
    toy = Toy(tmp_path, larger_is_better=True)
    toy.run()
    assert inode(toy, "best") == inode(toy, "model") != inode(toy, "last")


def test_best_steps_bounds_how_often_the_best_weights_are_written(tmp_path: Path, caplog) -> None:
    """Better and better up to step 4; with 3 steps between, those of steps 0 and 3 are written, and the last would be.

    Stopped in between, it knows what it has missed.
    """
    words = {"eval_steps": 1, "best_steps": 3}
    toy = Toy(tmp_path, tag="eval/reward", larger_is_better=True, words=words, at_evaluation=stop_at(5))
    toy.known = {0: 0.0, 1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4, 5: 0.1, 6: 0.35}
    with pytest.raises(KilledError):
        toy.run()
    said = [record.getMessage() for record in caplog.records if "is better than" in record.getMessage()]
    kept = "is better than {}, but best/ stays that of step {} (train.best_steps=3)"
    assert [line.split("eval/reward ")[1] for line in said] == [
        "0.1 " + kept.format("0", 0), "0.2 " + kept.format("0", 0), "0.4 " + kept.format("0.3", 3),
    ]  # fmt: skip
    toy.at_evaluation = lambda step: None
    toy.run()
    assert json.loads((tmp_path / "results.json").read_text())["model_step"] == 6
    assert inode(toy, "best") == inode(toy, "last")
    wanted = (
        "model/ is of step 6, eval/reward 0.35; that of step 4 was better, 0.4, and was not kept (train.best_steps)"
    )
    assert wanted in caplog.text


def test_the_best_weights_that_were_removed_are_missed_before_more_steps_are_taken(tmp_path: Path, whole: Toy) -> None:
    toy = Toy(tmp_path / "sft", steps=8)
    shutil.copytree(whole.directory, toy.directory)
    shutil.rmtree(toy.directory / "best")
    with pytest.raises(UserError, match="best: is gone, and the weights of step 6 in it are the best so far"):
        toy.run()
    shutil.copytree(toy.directory / "model", toy.directory / "best.old.part")  # as a kill leaves them
    toy.run()
    assert (toy.directory / "best" / "config.json").is_file()


def test_where_the_last_weights_are_of_unknown_worth_they_are_kept(tmp_path: Path, caplog) -> None:
    """Those of step 0, which were the best of those known, are not: nothing says that they are better."""
    toy = Toy(tmp_path, tag="eval/gain/estimate", larger_is_better=True, words={"eval_steps": 3})
    toy.known = {0: 0.0, 3: -0.1}
    toy.run()
    assert same(toy.weights(), toy.weights("last")) and not same(toy.weights(), toy.weights("best"))
    assert json.loads((tmp_path / "results.json").read_text())["model_step"] == 6
    assert ["eval/gain/estimate of the last weights is not known" in r.message for r in caplog.records].count(True) == 1


@pytest.mark.parametrize("limit", [1, 2])
def test_old_checkpoints_are_removed(tmp_path: Path, limit: int) -> None:
    seen = {}
    toy = Toy(tmp_path / "sft", steps=8, words={"save_total_limit": limit, "eval_steps": 1})
    toy.at_evaluation = lambda step: seen.update({step: toy.checkpoints() if step > 2 else []})
    toy.run()
    names = ["step-000002", "step-000004", "step-000006"]
    assert seen[5] == ["latest", *names[:2][-limit:]] and seen[7] == ["latest", *names[-limit:]]


def test_torn_checkpoints_are_ignored_and_swept(tmp_path: Path, whole: Toy) -> None:
    toy = Toy(tmp_path / "sft", at_evaluation=stop_at(3))
    with pytest.raises(KilledError):
        toy.run()
    torn = toy.directory / "checkpoints" / "part-step-000004"
    torn.mkdir()
    (torn / "state.json").write_text('{"step": 4')
    toy.at_evaluation = stop_at(6)
    with pytest.raises(KilledError):
        toy.run()
    assert toy.checkpoints() == ["latest", "step-000002", "step-000004"]
    toy.at_evaluation = lambda step: None
    toy.run()
    assert toy.rows() == whole.rows() and same(toy.weights(), whole.weights())


def test_killed_between_the_folder_and_the_pointer(tmp_path: Path, whole: Toy) -> None:
    """A complete folder that `latest` does not name yet is done again, not half used."""
    toy = Toy(tmp_path / "sft", at_evaluation=stop_at(6))
    with pytest.raises(KilledError):
        toy.run()
    (toy.directory / "checkpoints" / "latest").write_text("step-000002\n")
    toy.at_evaluation = lambda step: None
    toy.run()
    assert toy.rows() == whole.rows() and same(toy.weights(), whole.weights())


def test_checkpoints_that_cannot_be_used(tmp_path: Path) -> None:
    trained = tiny.trainer(Policy(tiny.language_model("llama"), 64))
    checkpoints = Checkpoints(tmp_path, trained.ranks, 2)
    assert checkpoints.load(trained) is None
    checkpoints.save(trained, State(step=2, world=1), Interval(Metrics()))
    (tmp_path / "checkpoints" / "latest").write_text("step-000009\n")
    with pytest.raises(UserError, match="names step-000009, which is not there whole"):
        checkpoints.load(trained)


BY_REWARD = offline.Settings("reward", "none", 0.9, 0.1, 0.0, "none", "value", 0.0, 1.0, 20.0, "bound")
REWARDED = Objective(lambda logp, batch: offline.loss(logp, batch, BY_REWARD), "sequences")


@pytest.mark.parametrize("zero", ["zero0", "zero2", "zero3"])
def test_a_loss_that_is_no_number_names_its_row_and_stops(tmp_path: Path, zero: str) -> None:
    """A row first drawn in the second step: the weights of the first are saved, and its row is written down."""
    toy = Toy(tmp_path / "sft", zero=zero, objective=REWARDED)
    drawn = [schedule.epochs(9, 4, tiny.settings("sft").seed)(step) for step in range(2)]
    bad = next(row for row in drawn[1] if row not in drawn[0])
    with pytest.raises(UserError) as error:
        toy.run(tiny.items(9, reward=lambda i: math.inf if i == bad else 1.0))
    assert re.search(rf"step 2: the gradient norm is (inf|nan), .* not finite on rows row {bad};", str(error.value))
    assert "train.non_finite=skip" in str(error.value) and "\n" not in str(error.value)
    saved = [json.loads(line) for line in (tmp_path / "sft/non_finite/step-000002-rank-0.jsonl").open()]
    assert sorted(row["id"] for row in saved) == sorted(f"row {i}" for i in drawn[1])
    assert [row["id"] for row in saved if row["broken"]] == [f"row {bad}"]
    assert (toy.directory / "checkpoints" / "latest").read_text() == "step-000001\n"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_a_step_that_is_not_finite_is_never_taken(zero: str, precision: str) -> None:
    """Weights, and the next good step, are those of a training that never saw the bad one."""
    trained = tiny.trainer(Policy(tiny.language_model("llama"), 64), zero, precision, {"max_grad_norm": 1.0})
    rows = tiny.items(8)
    tiny.step(trained, rows, range(4), PACKING)
    before = trained.state_dict()
    (batch,) = Windows(rows, lambda _: [0], PACKING, 0, 1).at(0)
    for factor, last in ((1.0, False), (math.inf, True)):
        trained.backward(trained(batch).sum() * factor, torch.tensor(1.0), last)
    assert not math.isfinite(trained.step(0.2))
    after = trained.state_dict()
    assert same(before, after)
    tiny.step(trained, rows, range(4, 8), PACKING)
    straight = tiny.trainer(Policy(tiny.language_model("llama"), 64), zero, precision, {"max_grad_norm": 1.0})
    for drawn in (range(4), range(4, 8)):
        tiny.step(straight, rows, drawn, PACKING)
    assert same(trained.state_dict(), straight.state_dict())


def test_steps_that_are_not_finite_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy = Toy(tmp_path / "sft", objective=REWARDED, words={"non_finite": "skip", "logging_steps": 3}, steps=6)
    drawn = [schedule.epochs(9, 4, tiny.settings("sft").seed)(step) for step in range(6)]
    toy.run(tiny.items(9, reward=lambda i: math.nan if i == 2 else 1.0))
    skipped = [2 in rows for rows in drawn]
    shares = [row["train/skipped_fraction"] for row in toy.rows() if "train/skipped_fraction" in row]
    assert shares == pytest.approx([sum(skipped[:3]) / 3, sum(skipped[3:]) / 3], abs=1e-5)
    assert 0 < sum(skipped) < 6 and capsys.readouterr().err.count("left out") == sum(skipped)
    assert all(weight.isfinite().all() for weight in toy.weights("last").values())


def test_sigterm_saves_and_the_next_start_goes_on(tmp_path: Path, whole: Toy) -> None:
    """Also without save_steps; the interval of three steps that it falls into is logged whole."""
    three = Toy(tmp_path / "whole", words={"logging_steps": 3})
    three.run()
    toy = Toy(tmp_path / "sft", words={"logging_steps": 3, "save_steps": "null"})
    toy.at_evaluation = lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 3 else None
    with pytest.raises(PreemptedError, match="stopped by SIGTERM after step 3 of 6, which is saved"):
        toy.run()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    toy.at_evaluation = lambda step: None
    toy.run()
    assert toy.rows() == three.rows() and same(toy.weights(), whole.weights())


def test_a_row_of_the_log_goes_across_a_resume(tmp_path: Path, whole: Toy) -> None:
    """Saved after step 2, stopped in the evaluation after step 3: the row of steps 1 to 4 holds all four."""
    words = {"logging_steps": 4, "eval_steps": 3}
    straight = Toy(tmp_path / "whole", words=words)
    straight.run()
    toy = Toy(tmp_path / "sft", words=words, at_evaluation=stop_at(3))
    with pytest.raises(KilledError):
        toy.run()
    toy.at_evaluation = lambda step: None
    toy.run()
    assert [row["step"] for row in toy.rows()] == [0, 3, 4, 6]
    assert toy.rows() == straight.rows() and same(toy.weights(), whole.weights())


def test_the_logged_rates_are_the_schedules(whole: Toy) -> None:
    settings = tiny.settings("sft").optimizer
    wanted = [schedule.learning_rate(step, 6, settings) for step in range(6)]
    assert [row["train/learning_rate"] for row in whole.rows()[1:]] == pytest.approx(wanted, rel=1e-5)
