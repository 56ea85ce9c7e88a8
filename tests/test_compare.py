"""stage=compare: variants and seeds, which words each step gets, the order of the steps, the numbers by hand."""

from __future__ import annotations

import importlib
import json
import signal
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipeline.config.resolve import resolve
from pipeline.errors import UserError
from pipeline.launch import comparison_plan, scheduler
from pipeline.launch.comparison_plan import Task
from pipeline.records import Example
from pipeline.report import comparison, figure
from pipeline.rl import rows as rl_rows

RECIPE = """
all:
  data: {task: assistant, task_size: 48, max_prompt_length: 48, max_response_length: 48}
  model: {scratch: {hidden_size: 32, num_layers: 1, num_heads: 2}}
  train: {max_steps: 2, batch_size: 8, logging_steps: 1}
  eval: {max_rows: 6, num_samples: 1}
  generation: {max_new_tokens: 8}
steps:
  - {stage: sft}
  - {stage: reward, name: helpfulness, set: {optimizer: {learning_rate: 0.02}}}
  - {stage: rl, set: {value: {max_prompts: 8, epochs: 2}}}
  - {stage: evaluate, set: {max_rows: 6, monitors: [oracle:helpfulness]}}
  - {stage: report}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE)
    return str(file)


def planned(*words: str) -> comparison_plan.Study:
    given = ["stage=compare", *words]
    return comparison_plan.plan(resolve(given).settings, given)


# variants and seeds


def test_a_recipe_without_sft_compares_with_the_model_it_names():
    found = planned("recipe=smollm2", "algos=nll,alol", "seeds=1", "model=somewhere")
    assert found.start == "start"
    last = found.tasks[-1].step.settings
    assert last.policies == {"start": "somewhere", "nll": "rl/nll", "alol": "rl/alol"}
    assert planned("recipe=demo", "algos=nll", "seeds=1").start == "sft"


def test_rows_are_scored_only_for_those_who_learn_from_scores():
    """Where a metric compares with the logged text itself, that text has no score."""
    for algos, wanted in (("esrl", False), ("esrl,nll", True)):
        stages = [task.step.stage for task in planned("recipe=numerals", f"algos={algos}", "seeds=1").tasks]
        assert ("score" in stages) == wanted


def test_candidates_are_made_before_they_are_scored_and_learned_from():
    found = planned("recipe=questions", "algos=semi_offline", "seeds=1")
    steps = {task.step.stage: task for task in found.tasks}
    assert list(steps) == ["sft", "generate", "score", "rl", "evaluate"]
    assert steps["generate"].after == {steps["sft"].name}
    assert steps["score"].after == {steps["sft"].name, steps["generate"].name}
    assert steps["score"].step.settings.of == "generate"


def test_a_variant_has_the_settings_of_all_then_its_own():
    words = ["recipe=demo", "algos=nll, alol", "variants={mine: {algo: alol, lr: 0.5, max_steps: 7}}", "rl.max_steps=9"]
    found = planned(*words, "seeds=1", "run=x")
    named = {task.step.settings.name: task.step.settings for task in found.tasks if task.step.stage == "rl"}
    assert list(named) == ["nll", "alol", "mine"]
    assert named["alol"].algo == "alol" and named["alol"].train.max_steps == 9
    mine = named["mine"]
    assert (mine.train.max_steps, mine.optimizer.learning_rate, mine.train.keep) == (7, 0.5, "last")


def test_what_is_said_for_all_variants_reaches_those_whose_algorithm_has_it():
    words = [
        "recipe=questions",
        "algos=semi_offline,alol,esrl",
        "masking.rate=0.3",
        "rl.static=best",
        "rl.value.epochs=3",
    ]
    found = planned(*words, "seeds=1", "run=x")
    named = {task.step.settings.name: task.step.settings for task in found.tasks if task.step.stage == "rl"}
    assert (named["semi_offline"].masking.rate, named["semi_offline"].static) == (0.3, "best")
    assert named["alol"].value.epochs == 3 and not named["alol"].scale_steps
    assert not {"static", "masking", "value", "scale_steps"} & set(named["esrl"].model_dump())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["algos=nll,nll"], "nll is given twice"),
        (["algos=nll", "variants={nll: {algo: alol}}"], "nll is given twice"),
        (["algos=sft"], "not 'sft'"),
        (["variants={a/b: {algo: alol}}"], "'a/b', wanted letters"),
        (["algos=[]"], "no variant"),
        (["variants={x: {algo: alol, leraning_rate: 1}}"], "no such setting"),
        (["variants={x: {algo: alool}}"], "did you mean 'alol'"),
        (["variants={x: {algo: nll, sampler: {k: 2}}}"], "sampler.k: algo=nll has no such setting"),
        (["rl.leraning_rate=1"], "no such setting"),
        (["seeds=1,x"], "wanted different whole numbers"),
        (["seeds=[1, 1]"], "wanted different whole numbers"),
        (["max_stepps=3"], "no such setting"),
    ],
)
def test_mistakes_are_found_before_anything_starts(words: list[str], said: str):
    with pytest.raises(UserError, match=said):
        planned("recipe=demo", *words)


def test_a_recipe_must_be_named():
    with pytest.raises(UserError, match="no recipe="):
        planned("algos=nll")


@pytest.mark.parametrize("given", [3, "3", [3]])
def test_one_seed(given):
    assert comparison_plan.seeds_of(given) == [3]


# which words each step gets


def words_of(plan: comparison_plan.Study, name: str) -> tuple[str, ...]:
    return next(task.step.words for task in plan.tasks if task.name == name)


def test_every_seed_has_its_own_home_and_the_next_ones_judges(recipe: str):
    plan = planned(f"recipe={recipe}", "run=x", "algos=nll,alol", "seeds=1,2", "data.task_size=40", "rl.max_steps=3")
    names = [task.name for task in plan.tasks]
    for seed in (1, 2):
        of_seed = [name for name in names if name.startswith(f"x-seed{seed}/")]
        assert [name.partition("/")[2] for name in of_seed] == [
            *("sft", "reward/helpfulness", "score", "rl/nll", "rl/alol", "evaluate/compare")
        ]
    by_name = {task.name: task.step.settings for task in plan.tasks}
    assert {by_name[name].data.task_size for name in names} == {40}  # a word for all steps
    assert by_name["x-seed1/sft"].train.max_steps == 2 and by_name["x-seed1/rl/nll"].train.max_steps == 3
    assert [by_name[f"x-seed{seed}/rl/alol"].seed for seed in (1, 2)] == [1, 2]
    assert not by_name["x-seed2/rl/alol"].scale_steps
    judged = by_name["x-seed2/evaluate/compare"]
    assert judged.policies == {"sft": "sft", "nll": "rl/nll", "alol": "rl/alol"}
    assert judged.monitors == {
        "oracle:helpfulness": "oracle:helpfulness",
        "second:helpfulness": "runs/x-seed1/reward/helpfulness/model",
    }
    last = next(task for task in plan.tasks if task.name == "x-seed1/evaluate/compare")
    assert {"x-seed1/rl/nll", "x-seed1/rl/alol", "x-seed2/reward/helpfulness"} <= last.after


def test_shared_steps_are_made_once_and_once_more_for_the_judges(recipe: str):
    plan = planned(f"recipe={recipe}", "run=x", "algos=alol", "seeds=1,2,3", "share_before=true")
    names = [task.name for task in plan.tasks]
    assert names[:5] == [
        *("x-seed1/sft", "x-seed1/reward/helpfulness", "x-seed1/score"),
        *("x-seed2/sft", "x-seed2/reward/helpfulness"),
    ]
    assert names[5:7] == ["x-seed1/rl/alol-seed1", "x-seed1/evaluate/compare-seed1"]
    step = {task.name: task.step.settings for task in plan.tasks}["x-seed1/rl/alol-seed3"]
    assert (step.run, step.seed, step.name) == ("x-seed1", 3, "alol-seed3")


def test_rewards_of_the_rows_need_no_scoring(recipe: str):
    file = Path(recipe)
    file.write_text("\n".join(line for line in RECIPE.splitlines() if "stage: reward" not in line))
    plan = planned(f"recipe={recipe}", "run=x", "algos=alol", "seeds=1,2")
    assert not [task for task in plan.tasks if task.step.stage == "score"]
    assert "monitors=" not in " ".join(words_of(plan, "x-seed1/sft"))


# the order of the steps


def tasks_of(spec: dict[str, tuple[str, int]]) -> list[Task]:
    """name: (those it waits for, its lane)."""
    made = []
    for name, (after, lane) in spec.items():
        step = resolve(["stage=report", f"run={name}"])
        made.append(Task(step, frozenset(f"{one}/report" for one in after.split()), lane))
    return made


def test_lanes_advance_side_by_side():
    tasks = tasks_of({"a": ("", 1), "b": ("a", 1), "c": ("a", 1), "d": ("", 2), "e": ("d", 2)})
    order, done, running = [], set(), []
    while task := scheduler.choose(tasks, done, running, {}):
        running.append(task)
        order.append(task.name[0])
        if len(running) == 2:
            done.add(running.pop(0).name)
    assert order == ["a", "d", "b", "e", "c"]
    assert scheduler.choose(tasks, {"a/report"}, [], {"b/report": 1, "c/report": 1, "d/report": 1}) is None


def test_a_step_that_fails_stops_what_waits_for_it_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    words = ["stage=report", f"runs_dir={tmp_path / 'none'}"]
    first = Task(resolve([*words, "run=a"]), frozenset(), 1)
    second = Task(resolve([*words, "run=b"]), frozenset({first.name}), 1)
    before = signal.getsignal(signal.SIGTERM)
    assert scheduler.run_all([first, second], 2, tmp_path / "logs") == {"a/report": 2}
    assert signal.getsignal(signal.SIGTERM) is before
    assert [file.name for file in (tmp_path / "logs").iterdir()] == ["a.report.log"]
    assert "a/report ended with exit code 2: tiffin: " in capfd.readouterr().err


# the numbers


FOUND = {
    1: {"sft": {"reward": 1.0, "objective/kl": 0.0}, "alol": {"reward": 1.5, "objective/kl": 2.0}},
    2: {"sft": {"reward": 2.0, "objective/kl": 0.0}, "alol": {"reward": 2.1, "objective/kl": None}},
}


def test_spread_and_paired_differences_by_hand():
    table = comparison.summary(FOUND, ["sft", "nll"])
    reward = table["alol"]["reward"]
    assert reward["mean"] == pytest.approx(1.8) and (reward["min"], reward["max"]) == (1.5, 2.1)
    assert reward["sd"] == pytest.approx(0.18**0.5)  # (0.3^2 + 0.3^2) / (2 - 1)
    minus = reward["minus"]["sft"]  # 0.5 and 0.1
    assert minus["mean"] == pytest.approx(0.3) and minus["per_seed"] == pytest.approx({1: 0.5, 2: 0.1})
    assert list(reward["minus"]) == ["sft"] and table["sft"]["reward"]["minus"] == {}
    assert table["alol"]["objective/kl"]["per_seed"] == {1: 2.0} and table["alol"]["objective/kl"]["sd"] is None


def test_sums_of_the_second_and_the_oracle():
    tags = {"rewards/second:a/mean": 0.25, "rewards/second:b/mean": 0.5, "rewards/oracle:x/mean": 0.75}
    found = comparison.with_sums(tags, {"a": 2.0})
    assert found["second/mean"] == 1.0  # 2 * 0.25 + 1 * 0.5
    assert found["oracle/mean"] == 0.75
    assert comparison.with_sums({"reward": 1.0}, {}) == {"reward": 1.0}


def test_the_table():
    text = comparison.markdown(comparison.summary(FOUND, ["sft"]), ["sft"], [1, 2])
    assert "| alol | 1.800 (1.500 .. 2.100) | 2.00 |" in text  # the KL of one seed alone
    assert "| alol | +0.300 (+0.100 .. +0.500) |" in text and "Differences to nll" not in text


def test_the_page_has_a_mark_per_seed_and_variant():
    table = comparison.summary(FOUND, ["sft"])
    assert comparison.scatter("reward", table, "x").count("<title>") == 3  # alol has no KL for seed 2
    html = comparison.document("<b>", table, ["sft"], [1, 2])
    assert "&lt;b&gt;" in html and "alol, seed 1" in html


def test_the_picture_of_gains_is_a_file_with_intervals():
    table = comparison.summary(FOUND, ["sft"])
    (alol,) = figure.gained(table, "reward", "sft", "objective/kl")  # the start is at 0 by definition
    assert alol.name == "alol" and alol.distance == (2.0, 2.0, 2.0)
    assert alol.gain == pytest.approx((0.3, 0.1, 0.5))  # of two seeds from the least to the greatest
    drawn = ElementTree.fromstring(comparison.gain_picture(table, "sft"))
    words = [one.text for one in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert "alol" in words and "reward, over sft" in words
    alone = {"sft": {"reward": 1.0, "reward_se": 0.3}, "alol": {"reward": 1.5, "reward_se": 0.4, "objective/kl": 2.0}}
    (alol,) = figure.gained(comparison.summary({1: alone}, ["sft"]), "reward", "sft", "objective/kl")
    assert alol.gain == pytest.approx((0.5, 0.5 - 1.645 * 0.5, 0.5 + 1.645 * 0.5))  # 0.3 and 0.4 make 0.5
    assert comparison.gain_picture(comparison.summary({1: {"sft": {}, "alol": {}}}, ["sft"]), "sft") is None


# settings of rl that controls use


def rows(*rewards: float) -> list[Example]:
    return [Example(f"r{i}", "p", completion=str(i), reward=reward) for i, reward in enumerate(rewards)]


def test_shuffled_rewards_are_the_same_numbers_on_other_rows():
    own = rows(*range(20))
    moved = rl_rows.with_shuffled_rewards(own, seed=1)
    assert Counter(row.reward for row in moved) == Counter(row.reward for row in own)
    assert [row.completion for row in moved] == [row.completion for row in own]
    assert sum(a.reward != b.reward for a, b in zip(moved, own, strict=True)) > 10
    assert moved == rl_rows.with_shuffled_rewards(own, seed=1) != rl_rows.with_shuffled_rewards(own, seed=2)


def test_halves_by_reward():
    own = rows(3, 1, 2, 2, 0)  # ranked: r0, r2, r3, r1, r4; halves of 3
    assert [row.id for row in rl_rows.chosen_rows(own, "best_half")] == ["r0", "r2", "r3"]
    assert [row.id for row in rl_rows.chosen_rows(own, "worst_half")] == ["r1", "r3", "r4"]
    assert rl_rows.chosen_rows(own, "all") == own


def test_the_chosen_sides_of_pairs():
    pair = [Example("7/chosen", "p", completion="a"), Example("7/rejected", "p", completion="b")]
    assert rl_rows.chosen_rows(pair, "chosen") == pair[:1]
    with pytest.raises(UserError, match=r"none of 2 rows is a side of a pair.*rows=best_half"):
        rl_rows.chosen_rows(rows(1, 2), "chosen")


# all of it, small


def test_a_comparison_end_to_end(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Every step in this process, as its words say; then compare finds all of them done and writes its tables."""
    words = ["stage=compare", f"recipe={recipe}", f"runs_dir={tmp_path}", "run=x", "share_before=true", "seeds=1"]
    words += ["algos=nll", "variants={shuffled: {algo: alol, shuffle_rewards: true, rows: best_half}}"]
    words += ["rl.max_steps=2", "rl.eval.max_rows=6"]
    compare = resolve(words)
    for task in comparison_plan.plan(compare.settings, words).tasks:
        importlib.import_module(f"stages.{task.step.stage}").main(task.step.settings, list(task.step.words))
    capsys.readouterr()
    importlib.import_module("stages.compare").main(compare.settings, words)
    assert "8 steps, 8 of them done before" in capsys.readouterr().out
    folder = tmp_path / "x" / "compare"
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == ["sft", "nll", "shuffled"]
    shuffled = results["shuffled"]
    assert {"rewards/second:helpfulness/mean", "second/mean", "oracle/mean", "rl/value_r2"} <= set(shuffled)
    assert shuffled["rewards/second:helpfulness/mean"]["mean"] != shuffled["rewards/helpfulness/mean"]["mean"]
    assert 0 < shuffled["second/mean"]["mean"] < 1  # through the sigmoid, as the first
    assert results["nll"]["rl/kept_fraction"]["mean"] == 1
    assert "| shuffled |" in (folder / "table.md").read_text()
    assert "<svg" in (folder / "compare.html").read_text() and (folder / "gain.svg").is_file()
    assert results["nll"]["rl/cost"]["mean"] == 1 and results["shuffled"]["rl/cost"]["mean"] > 0
    other = resolve([*words, "data.task_size=40"])
    with pytest.raises(UserError, match=r"was started with data\.task_size=48, now it is 40"):
        importlib.import_module("stages.compare").main(other.settings, list(other.words))
