"""What a comparison of methods runs: variants, seeds, and every step with its words and what it waits for.

The steps before rl make a *home*: SFT model, reward models, scored rows. Each seed has a home of its own; with
share_before all seeds live in the first, and a second one is made for its reward models alone. A policy is judged by
the reward models of its home, and by those of the next home (after the last comes the first), which it never met.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.resolve import Resolved, reaching, resolve, resolve_steps, unread
from pipeline.config.reward_spec import labelled, labels, parse
from pipeline.config.schema import CompareStage, RlMasked, RlPolicy
from pipeline.config.yaml_layers import WHOLE, Layer, Leaf, as_word, merge, parse_overrides
from pipeline.errors import UserError
from pipeline.launch import run_dir

SECOND = "second:"  # what the labels of the next home's reward models begin with
STARTS = ("sft", "start")  # the policy all variants start from: the run's own, or, of a recipe without sft, its model
PLACE = "stage=compare"
NOT_BEFORE = ("rl", "evaluate", "report")  # a recipe's steps that make no home
OWN = {*CompareStage.model_fields, "stage", "dry_run"} - {"launch", "runs_dir"}  # words that are not passed on


class Home(NamedTuple):
    """A run in which the steps before rl are made, and their seed."""

    run: str
    seed: int


@dataclass(frozen=True)
class Task:
    """One step. It waits for the tasks called `after`; tasks of one `lane` (a seed) are better not run at once."""

    step: Resolved
    after: frozenset[str]
    lane: int

    @property
    def directory(self) -> Path:
        return run_dir.stage_dir(self.step.settings, self.step.stage)

    @property
    def name(self) -> str:
        return str(self.directory.relative_to(self.step.settings.runs_dir))


@dataclass(frozen=True)
class Results:
    """Where the numbers of one seed will be: its evaluation, and the rl directory of each variant."""

    evaluation: Path
    variants: Mapping[str, Path]


@dataclass(frozen=True)
class Study:
    """The tasks, none before those it waits for; where each seed's results will be; the rewards' weights."""

    tasks: list[Task]
    start: str  # the name of the policy that all variants start from
    results: Mapping[int, Results]
    weights: Mapping[str, float]  # of the rewards that `reward=` names; the others weigh 1


def plan(settings: CompareStage, words: Sequence[str]) -> Study:
    """Every step of a comparison, checked before any is started. Raises UserError."""
    variants, everyone, seeds = variants_of(settings), layer_of(settings.rl), seeds_of(settings.seeds)
    common = passed_on(words)
    homes = homes_of(settings, seeds)
    rl = _recipe_steps(homes[0], common)[1]
    scored = any(reads_scores(variant_step(rl, everyone, own, name)) for name, own in variants.items())
    before = {home: _home_tasks(home, common, settings.share_before and home != homes[0], scored) for home in homes}
    tasks = [task for made in before.values() for task in made]
    results, weights = {}, {}
    for seed in seeds:
        home = homes[0] if settings.share_before else homes[seeds.index(seed)]
        other = homes[(homes.index(home) + 1) % len(homes)]
        # reward models of another seed, which nothing here was trained against
        judges = [] if other == home else [task for task in before[other] if task.step.stage == "reward"]
        ending = f"-seed{seed}" if settings.share_before else ""
        # one RL run per variant from the same start, then one evaluation of all
        rl, evaluation = _recipe_steps(Home(home.run, seed), common)[1:]
        waits = _names(before[home])
        learned = {name: variant_step(rl, everyone, own, name + ending) for name, own in variants.items()}
        made = {name: Task(step, waits, seed) for name, step in learned.items()}
        start, place = _start(rl, before[home])
        policies = {start: place, **{name: f"rl/{name}{ending}" for name in made}}
        judged = _evaluation_step(settings, evaluation, ending, policies, judges)
        last = Task(judged, waits | _names([*made.values(), *judges]), seed)
        tasks += [*made.values(), last]
        results[seed] = Results(last.directory, {name: task.directory for name, task in made.items()})
        weighed = dict(parse(judged.settings.reward))
        weights = {label: weighed[name] for name, label in labels(weighed).items()}
    return Study(tasks, start, results, weights)


def variants_of(settings: CompareStage) -> dict[str, Layer]:
    """Name -> its own settings of the rl stage. Raises UserError for a name that will not do."""
    algos = settings.algos.split(",") if isinstance(settings.algos, str) else settings.algos
    algos = [name.strip() for name in algos if name.strip()]
    named = [*((name, {"algo": name}) for name in algos), *settings.variants.items()]
    for place, (name, _) in enumerate(named):
        if not re.fullmatch(r"[\w.-]+", name) or name in STARTS:
            wanted = f"letters, digits, '_', '-' or '.', and not {' or '.join(map(repr, STARTS))}"
            raise UserError(f"{PLACE}: variant {name!r}, wanted {wanted}")
        if name in [other for other, _ in named[:place]]:
            raise UserError(f"{PLACE}: variant {name} is given twice; give it once in algos= and variants=")
    if not named:
        raise UserError(f"{PLACE}: no variant, wanted at least one in algos= or variants=")
    return {name: layer_of(own) for name, own in named}


def seeds_of(given: int | str | Sequence[int]) -> list[int]:
    """1 or "1,2,3" or [1, 2, 3] as a list. Raises UserError."""
    texts = given.split(",") if isinstance(given, str) else [given] if isinstance(given, int) else given
    texts = [str(text).strip() for text in texts]
    if not texts or not all(text.isdecimal() for text in texts) or len({*texts}) < len(texts):
        raise UserError(f"{PLACE}: seeds={given!r}, wanted different whole numbers: seeds=1,2,3")
    return [int(text) for text in texts]


def homes_of(settings: CompareStage, seeds: Sequence[int]) -> list[Home]:
    """One per seed; with share_before the first seed's, and that of the next seed."""
    if settings.share_before:
        seeds = [seeds[0], seeds[1] if len(seeds) > 1 else seeds[0] + 1]
    return [Home(f"{settings.run}-seed{seed}", seed) for seed in seeds]


def passed_on(words: Sequence[str]) -> list[str]:
    """The words that are for the steps. Raises UserError where they name no recipe."""
    common = [word for word in words if any(path[0] not in OWN for path in parse_overrides([word]))]
    if not any(word.startswith("recipe=") for word in common):
        raise UserError(f"{PLACE}: no recipe=, wanted the one whose steps to compare on: recipe=demo")
    return common


def layer_of(settings: Mapping[str, Any]) -> Layer:
    """Settings of a stage, nested or by dotted or short names, later ones over earlier ones."""
    return merge(parse_overrides([word]) for word in _words_of(settings))


def _names(tasks: Sequence[Task]) -> frozenset[str]:
    return frozenset(task.name for task in tasks)


def variant_step(rl: Resolved, everyone: Layer, own: Layer, name: str) -> Resolved:
    """The recipe's rl step with the settings of all variants, those that its algorithm has, and with its own."""
    merged = merge([parse_overrides(rl.words), everyone, own])
    foreign = unread(_as_words(merged))
    kept = {path: leaf for path, leaf in merged.items() if path in own or path[0] not in foreign}
    return resolve(_as_words({**kept, ("name",): Leaf(name, PLACE)}))


def _start(rl: Resolved, before: Sequence[Task]) -> tuple[str, str]:
    """What the policy that all variants start from is called, and where it is. Raises UserError where it is nowhere."""
    if any(task.step.stage == "sft" for task in before):
        return STARTS[0], "sft"
    if rl.settings.model.path is None:
        raise UserError(f"{PLACE}: the recipe has no sft step and names no model, wanted one to start from: set model=")
    return STARTS[1], rl.settings.model.path


def _evaluation_step(
    settings: CompareStage, step: Resolved, ending: str, policies: Mapping[str, str], judges: Sequence[Task]
) -> Resolved:
    """The recipe's evaluation of all policies, watched by the reward models of another home too."""
    name = (settings.name or "compare") + ending
    asked = _changed(step, layer_of(settings.evaluate), layer_of({"name": name}))
    seconds = {f"{SECOND}{task.step.settings.name}": str(task.directory / "model") for task in judges}
    monitors = {**labelled(asked.settings.monitors), **seconds}
    return _changed(asked, layer_of({"policies": policies, "monitors": monitors or []}))


def reads_scores(rl: Resolved) -> bool:
    """Whether this step learns from logged rows, or pairs, by their scores."""
    return not isinstance(rl.settings, RlPolicy | RlMasked)


def _home_tasks(home: Home, common: Sequence[str], rewards_only: bool, scored: bool) -> list[Task]:
    """The steps before rl, in order; reward models wait for what is no reward model, the others for all before them.

    Logged rows are scored once where a variant learns from that; candidates where the recipe says so.
    """
    steps, rl, _ = _recipe_steps(home, common)
    if rewards_only:
        steps = [step for step in steps if step.stage in ("sft", "reward")]
        steps = steps if any(step.stage == "reward" for step in steps) else []
    elif scored and (any(step.stage == "reward" for step in steps) or rl.settings.reward is not None):
        steps = [*(step for step in steps if step.stage != "score"), _score_step(steps, home, common)]
    tasks: list[Task] = []
    for step in steps:
        before = [task for task in tasks if step.stage != "reward" or task.step.stage != "reward"]
        tasks.append(Task(step, _names(before), home.seed))
    return tasks


def _recipe_steps(home: Home, common: Sequence[str]) -> tuple[list[Resolved], Resolved, Resolved]:
    """(the steps before rl, rl, evaluate) of the recipe in a home. Raises UserError where one of the two is missing."""
    steps = resolve_steps([*common, f"run={home.run}", f"seed={home.seed}"])
    by_stage = {step.stage: step for step in steps}
    for stage in ("rl", "evaluate"):
        if stage not in by_stage:
            raise UserError(f"{PLACE}: the recipe has no {stage} step, wanted one to take the variants' settings from")
    before = steps[: steps.index(by_stage["rl"])]
    return [step for step in before if step.stage not in NOT_BEFORE], by_stage["rl"], by_stage["evaluate"]


def _score_step(steps: Sequence[Resolved], home: Home, common: Sequence[str]) -> Resolved:
    """The recipe's scoring, or one that its other words make: rewards are computed once, for all variants."""
    own = next((step for step in steps if step.stage == "score"), None)
    if own is None:
        head = ["stage=score", next(word for word in common if word.startswith("recipe="))]
        free = [*(word for word in common if word not in head), f"run={home.run}", f"seed={home.seed}"]
        own = resolve([*head, *reaching(head, free)])
    return _changed(own, layer_of({"splits": [split for split in own.settings.splits if split != "test"]}))


def _changed(step: Resolved, *layers: Layer) -> Resolved:
    """The step with further settings over its own words."""
    return resolve(_as_words(merge([parse_overrides(step.words), *layers])))


def _as_words(layer: Layer) -> list[str]:
    """A layer as key=value words."""
    return [as_word(".".join(path), leaf.value) for path, leaf in layer.items()]


def _words_of(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Nested settings as key=value words."""
    words: list[str] = []
    for key, value in settings.items():
        inner = isinstance(value, Mapping) and value and (key,) not in WHOLE
        words += _words_of(value, f"{prefix}{key}.") if inner else [as_word(f"{prefix}{key}", value)]
    return words
