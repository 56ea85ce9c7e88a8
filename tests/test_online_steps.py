"""On-policy RL by the real loop: two ranks are one, odd steps do no harm, a resume goes on as if never left."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.trainer.checkpoint import Checkpoints, State
from pipeline.trainer.metrics import Interval, Metrics
from tests import rolling, tiny
from tests.rolling import CASES, STAGES, STEPS


@pytest.fixture(scope="module", autouse=True)
def short_collections() -> Iterator[None]:
    """Every start of ZeRO-3 collects garbage, which takes 0.3 s over all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What one process did under ZeRO-0."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: rolling.steps_of(case, "zero0", folder) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What two processes did, in one launch."""
    return tiny.on_two_processes("tests.rolling", tmp_path_factory.mktemp("together"))


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_t15_two_ranks_are_one(alone: dict, together: dict, name: str, zero: str) -> None:
    """Plans and responses are the same; T-08, T-17: whatever is odd about the step, and with a rank without rows."""
    one, two = alone[name], together[zero][name]
    for ours, theirs in zip(one["steps"], two["steps"], strict=True):
        assert theirs["ids"] == ours["ids"]
        for (key, k, temperature), (other, other_k, other_temperature) in zip(
            ours["plan"], theirs["plan"], strict=True
        ):
            assert (other, other_k) == (key, k)
            tiny.close(other_temperature, temperature, 8)
        tiny.close(theirs["advantages"], ours["advantages"])
    tiny.close(two["weights"], one["weights"])


@pytest.mark.parametrize("name", CASES)
def test_t17_everything_stays_finite(alone: dict, name: str) -> None:
    found = alone[name]
    assert all(weight.isfinite().all() for weight in found["weights"].values())
    assert math.isfinite(found["memory"]["queue"][-1])
    for step in found["steps"]:
        assert math.isfinite(step["logged"]["train/grad_norm"])
        gap, nats = (step["logged"][name] for name in ("rollout/logp_gap", "train/entropy"))
        assert gap < 16 * tiny.rounding(nats) or math.isnan(gap)  # both stages say the same; NaN where nothing was said


def norms(alone: dict, name: str) -> list[float]:
    return [step["logged"]["train/grad_norm"] for step in alone[name]["steps"]]


@pytest.mark.parametrize("name", ["equal rewards", "empty, all equal"])
def test_t17_where_nothing_differs_nothing_is_learned(alone: dict, name: str) -> None:
    assert norms(alone, name) == [0.0] * STEPS
    assert all(step["stats"]["rollout/equal_groups"] == 1.0 for step in alone[name]["steps"])


def test_t17_all_are_left_out(alone: dict) -> None:
    """Prompts 0 .. 3 of a permutation, 4, 5 and two again, and then none that is new: only references are learned."""
    counts = [[len(ids) for ids in step["ids"]] for step in alone["left out"]["steps"]]
    assert counts == [[4, 4, 4, 4], [4, 4, 0, 0], [0, 0, 0, 0]]
    assert norms(alone, "left out")[2] == 0.0 and norms(alone, "left out, references")[2] > 0.1
    last = alone["left out"]["steps"][2]
    assert last["stats"]["esrl/left_out"] == 1.0 and last["stats"]["rollout/generated_tokens"] == 0.0


def test_what_is_drawn_differs_from_step_to_step_and_from_case_to_case(alone: dict) -> None:
    """So the comparisons above could fail: sizes and temperatures follow the history."""
    sizes = {k for step in alone["esrl"]["steps"] for _, k, _ in step["plan"]}
    assert len(sizes) > 1
    planned = [share for step in alone["temperatures and a budget"]["steps"] for share in step["plan"]]
    assert len({temperature for _, _, temperature in planned}) > 2
    assert all(sum(k for _, k, _ in step["plan"]) <= 12 for step in alone["temperatures and a budget"]["steps"])
    probed = {len(ids) for step in alone["probes"]["steps"] for ids in step["ids"]}
    assert len(probed) > 1


def test_dropping_keeps_half_of_batches_of_two(alone: dict) -> None:
    """ceil(.3 * 2) = 1 of each; of all four at once ceil(1.2) = 2, those of the largest confidence."""
    for name in ("drop", "drop_fixed"):
        assert [sum(map(len, step["ids"])) for step in alone[name]["steps"]] == [2, 2, 2]
    step = alone["drop"]["steps"][0]
    assert step["stats"]["esrl/left_out"] == 0.5
    assert step["stats"]["rollout/generated_tokens"] > sum(
        len(ids) for group in step["ids"] for ids in group
    )  # all paid for


@pytest.mark.parametrize("name", ["esrl", "references and KL"])
def test_t08_a_resume_is_as_if_never_left(tmp_path: Path, alone: dict, name: str) -> None:
    """Saved after two steps and loaded into other weights: history, plans, responses and weights, bit for bit."""
    trainer = rolling.trainer_of(CASES[name], "zero0", tmp_path)
    rolling.run(trainer, 0, 2)
    checkpoints = Checkpoints(tmp_path, trainer.engine.ranks, 1)
    checkpoints.save(trainer.engine, State(step=2, world=1), Interval(Metrics()), trainer.windows.state_dict(2))
    other = rolling.trainer_of(CASES[name], "zero0", tmp_path)
    state, _, memory = checkpoints.load(other.engine)
    other.windows.load_state_dict(memory)
    (last,) = rolling.run(other, state.step, STEPS)
    assert last["ids"] == alone[name]["steps"][2]["ids"] and last["plan"] == alone[name]["steps"][2]["plan"]
    assert other.windows.state_dict(STEPS) == json.loads(json.dumps(alone[name]["memory"]))
    tiny.close(other.engine.state_dict(), alone[name]["weights"], roundings=0)


def test_t08_a_step_that_was_not_taken_is_not_remembered(tmp_path: Path) -> None:
    """Where a step's gradient is not finite the state before it is saved, and the step is made again as it was."""
    trainer = rolling.trainer_of(CASES["esrl"], "zero0", tmp_path)
    rolling.run(trainer, 0, 1)
    before = trainer.windows.state_dict(1)
    trainer.windows.at(1)
    assert trainer.windows.state_dict(1) == before


def test_a_prompt_that_comes_twice_in_a_step_has_other_responses(tmp_path: Path) -> None:
    """Two prompts, four places: each turn has random numbers of its own, so no sample is paid for twice."""
    trainer = rolling.trainer_of(rolling.Case(("algo=reinforce",), prompts=2, per_step=4), "zero0", tmp_path)
    trainer.windows.at(0)
    said: dict[str, list] = {}
    for group in trainer.windows.groups:
        said.setdefault(group.key, []).append([response.response_ids for response in group.responses])
    assert [len(turns) for turns in said.values()] == [2, 2]
    assert all(first != second for first, second in said.values())


@pytest.mark.parametrize(("name", "told"), [("reinforce", True), ("drop", False), ("empty, all equal", False)])
def test_many_cut_samples_are_told_once(tmp_path: Path, capfd: pytest.CaptureFixture, name: str, told: bool) -> None:
    """A random model does not end within six tokens; `drop` samples past the end; who says nothing ends at once."""
    rolling.steps_of(CASES[name], "zero0", tmp_path)
    said = capfd.readouterr().err
    assert said.count("generation.max_new_tokens=6 cuts") == told
    assert ("of 12 responses sampled for step 0, which are judged without their end: raise it" in said) == told
