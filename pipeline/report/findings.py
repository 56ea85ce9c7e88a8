"""All verdicts on a run: of the policies that an evaluation compares, and of each stage. A quantity has one.

Tables, charts and checks of the page show these and no others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from pipeline.report.checks import Verdict, of_policies
from pipeline.report.spec import LEVELS
from pipeline.report.stages import Stage, verdicts
from pipeline.report.tables import anchor, columns_of

EVALUATE = "evaluate"
Compared = Mapping[str, Mapping[str, Verdict]]  # policy -> tag -> verdict


class Verdicts(NamedTuple):
    """The verdicts on a run."""

    policies: Mapping[str, Compared]  # evaluation -> policy -> tag -> verdict
    stages: Mapping[str, Mapping[str, Verdict]]  # stage -> quantity -> verdict


class Found(NamedTuple):
    """A verdict with where it was found, in words and for links."""

    place: str
    anchor: str
    verdict: Verdict


def evaluations(stages: Sequence[Stage]) -> list[Stage]:
    """The evaluations that have ended."""
    return [stage for stage in stages if stage.kind == EVALUATE and columns_of(stage.results)]


def judge_run(stages: Sequence[Stage]) -> Verdicts:
    """Every verdict on the stages of a run."""
    policies = {stage.name: _of_policies(stage) for stage in evaluations(stages)}
    known: dict[str, set[str]] = {}  # stage -> the names of what an evaluation judges of its policy
    for evaluation in evaluations(stages):
        places = evaluation.settings.get("policies") or {}
        for policy, found in policies[evaluation.name].items():
            known.setdefault(places.get(policy, policy), set()).update(verdict.name for verdict in found.values())
    return Verdicts(policies, {stage.name: _of_stage(stage, known.get(stage.name, ())) for stage in stages})


def findings(stages: Sequence[Stage], judged: Verdicts) -> list[Found]:
    """All verdicts in one list, the most serious first."""
    every = []
    for evaluation in evaluations(stages):
        first = next(iter(columns_of(evaluation.results)))
        _, _, name = evaluation.title.partition(": ")
        for other, found in judged.policies[evaluation.name].items():
            place = f"{other} against {first}" + (f", {name}" if name else "")
            every += [Found(place, anchor(evaluation.name, other, tag), verdict) for tag, verdict in found.items()]
    for stage in stages:
        own = judged.stages[stage.name]
        every += [Found(stage.title, anchor(stage.name, of), verdict) for of, verdict in own.items()]
    return sorted(every, key=lambda one: LEVELS.index(one.verdict.level))  # stable: within a level as above


def _of_policies(evaluation: Stage) -> Compared:
    """The verdicts on every policy beside the first: policy -> tag -> verdict."""
    policies = columns_of(evaluation.results)
    monitors = list(evaluation.settings.get("monitors") or [])  # names, or the keys of a mapping
    first, *others = policies
    return {other: of_policies(policies[first], policies[other], monitors) for other in others}


def _of_stage(stage: Stage, known: Collection[str]) -> dict[str, Verdict]:
    """The verdicts on a stage; of RL without what an evaluation judges of the same policy, and on more prompts."""
    return {of: verdict for of, verdict in verdicts(stage).items() if stage.kind != "rl" or verdict.name not in known}
