"""Rewards that rows bring by name: named, mixed and normalised with others, by hand; what they cannot do; labels."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.config.resolve import resolve
from pipeline.config.reward_spec import labels, possible_labels
from pipeline.config.rewards import Scale
from pipeline.data.batching import Packing
from pipeline.errors import UserError
from pipeline.launch import run_dir
from pipeline.records import Example
from pipeline.rewards import build, own_rewards, scoring
from pipeline.rewards.rewards import Rewards, WeightedReward, bounds
from pipeline.rl import rows
from pipeline.rl.context import Context, required_rewards
from pipeline.rl.offline import best_metric
from pipeline.trainer.evaluation import reward_statistics, sample_rows
from stages import score as score_stage
from tests import tiny

TRAIN = [
    Example("r/1", "p", "one", rewards={"helpful": 4.0, "brief": 1.0}),
    Example("r/2", "q", "one two", rewards={"helpful": 2.0, "brief": 0.5}),
    Example("r/3", "q", "one two three", rewards={"helpful": 0.0, "brief": 0.0}),
]
HELD_OUT = [Example("r/4", "s", "a b c d", rewards={"helpful": 8.0, "brief": 0.25})]
ROOT_8_3 = math.sqrt(8 / 3)  # the population's standard deviation of 4, 2, 0; their mean is 2
ROOT_2_3 = math.sqrt(2 / 3)  # that of 1, 2, 3 words


def context(folder: Path, *words: str, algo: str = "wbc") -> Context:
    """What an RL stage is given for these words, with its rewards built, and nothing else."""
    settings = resolve(["stage=rl", f"algo={algo}", f"runs_dir={folder}", *words]).settings
    device = torch.device("cpu")
    built = build.build_rewards(settings, settings.reward, settings.rewards, device, logged=True)
    return Context(settings, tiny.ranks(), folder, None, None, built, {}, None, None, None)


def earned(given: Context, train=TRAIN, held_out=HELD_OUT) -> tuple[list[float], list[float]]:
    return tuple([row.reward for row in part] for part in rows.with_rewards(given, train, held_out))


def test_one_name_is_the_reward(tmp_path: Path) -> None:
    assert earned(context(tmp_path, "reward=helpful")) == ([4.0, 2.0, 0.0], [8.0])


def test_rows_and_functions_are_added_by_weight(tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO", "tiffin")
    found = earned(context(tmp_path, "reward={helpful: 0.5, length: -1.0}"))
    # .5 * 4 - 1, .5 * 2 - 2, 0 - 3; .5 * 8 - 4
    assert found == ([1.0, -1.0, -3.0], [0.0])
    assert "those that the rows bring are not used (brief)" in caplog.text


def test_many_rows_are_scored_some_at_a_time(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(scoring, "AT_ONCE", 2)
    (tmp_path / "calls.py").write_text(
        "def reward(completions, **columns):\n    return [float(len(completions))] * len(completions)\n"
    )
    given = context(tmp_path, f"reward={{helpful: 0.5, length: -1.0, {tmp_path}/calls.py: 10.0}}")
    # as below, and 10 times the texts of each call: r/1 and r/2, r/3 and r/4
    assert earned(given) == ([21.0, 19.0, 17.0], [20.0])


def test_each_reward_is_normalised_by_its_own_rule(tmp_path: Path) -> None:
    spec = "reward={helpful: 1.0, brief: 2.0, length: 1.0}"
    given = context(tmp_path, spec, "rewards.normalise={helpful: standardise, brief: sigmoid}")
    train, held_out = earned(given)
    wanted = [(h - 2) / ROOT_8_3 + 2 / (1 + math.exp(-b)) + n for h, b, n in ((4, 1, 1), (2, 0.5, 2), (0, 0, 3))]
    assert train == pytest.approx(wanted)
    # a held-out row has no part in mean and spread: (8 - 2) / sqrt(8/3) is far out
    assert held_out == pytest.approx([6 / ROOT_8_3 + 2 / (1 + math.exp(-0.25)) + 4])
    assert json.loads((tmp_path / "normalise.json").read_text()) == {"helpful": {"mean": 2.0, "std": ROOT_8_3}}
    assert bounds(given.rewards.rewards) is None


def test_what_standardises_is_fixed_before_and_kept_for_the_next_start(tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO", "tiffin")
    words = ("reward=length", "rewards.normalise=standardise")
    first = context(tmp_path, *words)
    assert earned(first)[0] == pytest.approx([-1 / ROOT_2_3, 0, 1 / ROOT_2_3])
    told = f"rewards.normalise='{{length: {{mean: 2.0, std: {ROOT_2_3!r}}}}}'"
    assert told in caplog.text
    # a new text has the reward that it would have had among the rows
    assert scoring.score_texts(first.ranks, first.rewards, HELD_OUT, ["a b c"]).total == pytest.approx([1 / ROOT_2_3])
    again = context(tmp_path, *words)
    assert earned(again, TRAIN[:2]) == earned(first, TRAIN[:2])
    # elsewhere the numbers themselves do it
    settings = resolve(["stage=evaluate", f"runs_dir={tmp_path}", "reward=length", told.replace("'", "")]).settings
    there = build.build_rewards(settings, settings.reward, settings.rewards, torch.device("cpu"))
    assert there.rewards[0].normalise == Scale(mean=2.0, std=ROOT_2_3)
    assert there.score(["p"], ["a b c"], {}).total == pytest.approx([1 / ROOT_2_3])


def test_rows_that_are_unlearned_are_counted(caplog) -> None:
    items = tiny.items(4, reward=lambda i: i - 2)  # -2, -1, 0, 1
    for sampling, told in (("all", True), ("positive", False)):
        caplog.clear()
        rows.population(
            items, Packing(None, 99, False, 0), "reward", tiny.settings("rl", "algo=wbc", f"sampling={sampling}")
        )
        assert ("2 of 4 rows have a reward below 0: they are made less likely" in caplog.text) is told


def test_the_single_reward_of_rows_can_be_mixed_too(tmp_path: Path) -> None:
    train = [replace(row, reward=float(i)) for i, row in enumerate(TRAIN)]
    given = context(tmp_path, "reward={reward: 10.0, brief: 1.0}")
    assert earned(given, train, []) == ([1.0, 10.5, 20.0], [])


def test_equal_values_cannot_be_standardised(tmp_path: Path) -> None:
    same = [replace(row, rewards={"flat": 0.1}) for row in TRAIN]
    given = context(tmp_path, "reward=flat", "rewards.normalise=standardise")
    with pytest.raises(UserError, match=r"flat: 0\.1 on each of 3 training rows, wanted values that differ"):
        earned(given, same, [])
    assert not (tmp_path / "normalise.json").exists()


def test_by_default_values_of_rows_and_functions_stay_as_they_are(tmp_path: Path) -> None:
    """No metric trains on sigmoids of F1 between 0.5 and 0.73."""
    row = replace(TRAIN[1], references=("one two three",))
    given = context(tmp_path, "reward={rouge:rouge1: 1.0, brief: 1.0}")
    # 2 of 2 words among 3: F1 = 2 * 1 * 2/3 / (5/3) = .8; brief .5
    assert earned(given, [row], [])[0] == pytest.approx([1.3])


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        (
            "helpfull",
            r"^reward 'helpfull': neither a reward that the rows bring \(helpful, brief\) nor a reward model trained "
            r"in this run \(none\) nor a file in reward_models/ \(.*length.*\); did you mean 'helpful'\?$",
        ),
        ("rows:rouge", r"^reward 'rouge': neither a reward that the rows bring \(helpful, brief\)"),
        ("kind", r"^reward 'kind': row r/9 brings helpful, and 1 more of 3 rows lack it too, wanted a number in each"),
    ],
)
def test_names_that_rows_lack(tmp_path: Path, spec: str, found: str) -> None:
    train = TRAIN
    if spec == "kind":
        train = [
            Example("r/8", "p", "x", rewards={"kind": 1.0}),
            Example("r/9", "p", "x", rewards={"helpful": 1.0}),
            Example("r/10", "p", "x"),
        ]
    with pytest.raises(UserError, match=found):
        earned(context(tmp_path, f"reward={spec}"), train, [])


def test_a_name_means_a_file_before_a_reward_of_the_rows_and_it_is_said(tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO", "tiffin")
    train = [replace(row, rewards={"length": 7.0}) for row in TRAIN]
    assert earned(context(tmp_path, "reward=length"), train, [])[0] == [1.0, 2.0, 3.0]
    assert "reward length: scored anew; reward=rows:length would be that of the rows" in caplog.text
    given = context(tmp_path, "reward={rows:length: 1.0, length: 1.0}")
    assert earned(given, train, [])[0] == [8.0, 9.0, 10.0]
    assert [one.name for one in given.rewards.rewards] == ["rows.length", "length"]


def test_rows_with_rewards_by_name_alone_say_what_to_add(tmp_path: Path) -> None:
    wanted = r"r/1: rewards by name \(helpful, brief\) and no `reward`.*reward='\{helpful: 1\.0, brief: 1\.0\}'"
    with pytest.raises(UserError, match=wanted):
        earned(context(tmp_path))


def test_nothing_judges_new_texts_by_a_sum_that_rows_bring_a_part_of(tmp_path: Path, caplog) -> None:
    given = context(tmp_path, "reward={helpful: 1.0, length: 2.0}")
    assert given.judge is None and context(tmp_path, "reward=length").judge is not None
    scores = scoring.score_texts(given.ranks, given.rewards, HELD_OUT, ["a b"])
    assert (scores.raw, scores.total) == ({"length": [2.0]}, None)
    assert [tag for tag in reward_statistics(scores, ["a b"]) if not tag.startswith("rewards/length/")] == []
    answer = tiny_response(HELD_OUT[0], "a b")
    assert sample_rows([answer], scores, 1) == [
        {"id": "r/4", "prompt": "s", "response": "a b", "rewards": {"length": 2.0}}
    ]
    with pytest.raises(UserError, match="nothing to judge new texts with"):
        required_rewards(given)


def tiny_response(example: Example, text: str):
    from pipeline.records import Response

    return Response(example, example.prompt, text, (3,), (4, 2), True)


@pytest.mark.parametrize(
    ("stage", "words", "found"),
    [
        ("evaluate", ["reward=rows:helpful"], "the rows bring it, so that it judges no new text"),
        ("evaluate", ["reward=length", "monitors=[rows:helpful]"], "the rows bring it, so that it judges no new text"),
        ("evaluate", ["reward=helpful"], "neither a reward model trained in this run"),
        ("generate", ["reward=length", "rewards.normalise=standardise"], "this stage scores no logged rows"),
        (
            "evaluate",
            ["reward=length", "rewards.normalise={lenth: none}"],
            r"'lenth', wanted .*\(length\); did you mean",
        ),
    ],
)
def test_stages_that_judge_new_texts_refuse_what_cannot(
    tmp_path: Path, stage: str, words: list[str], found: str
) -> None:
    settings = resolve([f"stage={stage}", f"runs_dir={tmp_path}", *words]).settings
    watched = {name: name for name in settings.monitors} if stage == "evaluate" else None
    with pytest.raises(UserError, match=found):
        build.build_rewards(settings, settings.reward, settings.rewards, torch.device("cpu"), watched)


def test_the_score_stage_mixes_what_rows_bring_with_functions(tmp_path: Path) -> None:
    given = [
        {"id": row.id, "prompt": row.prompt, "completion": row.completion, "rewards": row.rewards} for row in TRAIN
    ]
    (tmp_path / "mine.py").write_text(
        "def twice(completions, **columns): return [2.0 * len(x.split()) for x in completions]"
    )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in given))
    words = [
        f"runs_dir={tmp_path}",
        f"data.train={tmp_path}/rows.jsonl",
        "data.validation_fraction=0",
        "splits=[train]",
    ]
    words += [f"reward={{helpful: 0.5, {tmp_path}/mine.py: 1.0}}", "rewards.normalise={mine: standardise}"]
    settings = tiny.settings("score", *words)
    score_stage.main(settings, words)
    left = run_dir.run_dir(settings) / "score"
    written = [json.loads(line) for line in (left / "train.jsonl").read_text().splitlines()]
    # 2, 4 and 6: mean 4, population's standard deviation 2 sqrt(2/3)
    assert [one["reward"] for one in written] == pytest.approx([2 - 1 / ROOT_2_3, 1.0, 1 / ROOT_2_3])
    assert written[1]["rewards"] == {"helpful": 2.0, "mine": 0.0}
    with pytest.raises(UserError, match="takes mean and spread from training rows, wanted train first"):
        score_stage.main(tiny.settings("score", *words[:2], *words[4:], "splits=[validation,train]", "run=b"), words)


def test_candidates_are_ranked_by_what_they_bring_by_name() -> None:
    scores = {"helpful": (1.0, 3.0, 2.0), "brief": (5.0, 1.0, None)}
    row = Example("a", "p", candidates=("x", "y", "z"), candidate_rewards=(7.0, 6.0, 5.0), candidate_scores=scores)
    own = Rewards([WeightedReward(name, 0.5, None, own=name) for name in ("helpful", "reward")])
    (found,) = score_stage.candidates.judged(tiny.ranks(), own, [row]).rows
    # half of 1 + 7, 3 + 6, 2 + 5
    assert (found.candidates, found.candidate_rewards) == (("y", "x", "z"), (4.5, 4.0, 3.5))
    assert found.candidate_scores == {"helpful": (3.0, 1.0, 2.0), "reward": (6.0, 7.0, 5.0)}
    with pytest.raises(UserError, match="reward 'brief': row a brings helpful, reward, and 0 more of 3 rows lack it"):
        score_stage.candidates.judged(tiny.ranks(), Rewards([WeightedReward("brief", 1.0, None, own="brief")]), [row])


def test_labels_are_the_last_part_that_means_something() -> None:
    told = {
        "runs/x/reward/helpful/model": "helpful",
        "my/brief.py": "brief",
        "my/brief.py:other": "brief:other",
        "./mine.py:fn": "mine:fn",
        "http://127.0.0.1:8000/score": "score",
        "https://127.0.0.1:8000/v1": "127.0.0.1:8000",
        "owner/reward-model": "reward-model",
        "oracle:harmless": "oracle:harmless",
        "rouge": "rouge",
        "rows:kind": "kind",
    }
    assert labels(told) == told
    assert all(label in possible_labels(name) for name, label in told.items())


def test_labels_of_two_alike_tell_them_apart_in_any_order() -> None:
    names = ["runs/a/reward/kind/model", "runs/b/reward/kind/model", "my/kind.py", "kind"]
    told = dict(zip(names, ["a.reward.kind", "b.reward.kind", "my.kind", "kind"], strict=True))
    assert labels(names) == told
    assert labels(names[::-1]) == told


def test_best_metric_asks_what_judges_the_whole_sum(tmp_path: Path) -> None:
    from pipeline.trainer import loop
    from pipeline.trainer.objective import objective_of

    given = context(tmp_path, "reward={brief: 1.0, length: 1.0}", algo="nll")
    module, algorithm, objective = objective_of(given.settings.algorithm)
    given = replace(given, module=module, algorithm=algorithm, objective=objective)
    assert best_metric(given, tiny.items(2)) == loop.HELD_OUT_LOSS


def test_names_in_the_order_of_the_rows() -> None:
    rated = [Example("a", "p", reward=1.0), Example("b", "p", rewards={"x": 1.0, "y": 2.0})]
    assert own_rewards.names(rated) == ["reward", "x", "y"]
