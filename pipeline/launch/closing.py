"""The line that ends a stage: what it left, and what to run next. Needs no torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.config.definitions import Definitions
from pipeline.config.resolve import Resolved
from pipeline.config.schema import GenerateStage, RlStage
from pipeline.config.yaml_layers import Layer, as_word, parse_overrides
from pipeline.launch import run_dir

SOURCES = (("recipe",), ("data", "task"), ("data", "path"))  # settings that say where the rows of all stages come from
CARRIED = (("run",), ("runs_dir",), *SOURCES)  # from a stage's words to those of the next
HEADLINES = ("eval/reward", "eval/rewards/accuracies", "eval/accuracy", "eval/loss")  # the first that is there
UNTRAINED = ", as no later evaluation was better: these are the weights it began with (train.keep=last keeps the last)"
ROWS = {  # what a stage reads, where neither a task nor a directory nor a recipe says so
    "sft": "data.train=FILE",
    "reward": "data.train=PAIRS",
    "rl": "data.train=FILE",
    "generate": "data.train=FILE",
    "evaluate": "data.test=FILE",
}


def closing(step: Resolved, last: bool) -> str:
    """What a finished step left and, of the `last` one, what to run next; empty where its own last line says it."""
    if step.stage not in LEFT:
        return ""
    directory = run_dir.stage_dir(step.settings, step.stage)
    line = LEFT[step.stage](str(directory), json.loads((directory / "results.json").read_text("utf-8")))
    return f"{line}; next: bash run.sh {shlex.join(next_words(step))}" if last and step.stage in FOLLOWS else line


def next_words(step: Resolved) -> list[str]:
    """The words of the stage that usually follows; names that only the user knows are in capitals."""
    given = parse_overrides(step.words)
    head = _next_in_recipe(step, given) or FOLLOWS[step.stage](step.settings)
    carried = [as_word(".".join(path), given[path].value) for path in CARRIED if path in given]
    stage = head[0].partition("=")[2]
    scored = stage == "rl" and (len(head) > 1 or run_dir.finished(run_dir.run_dir(step.settings) / "score"))
    rows = [ROWS[stage]] if stage in ROWS and not scored and not {*SOURCES} & {*given} else []
    return [*head, *carried, *rows]


def _next_in_recipe(step: Resolved, given: Layer) -> list[str]:
    """stage= and name= of the step after this one, where a recipe was named and has one."""
    if ("recipe",) not in given:
        return []
    steps = Definitions().recipe(given[("recipe",)].value).steps  # as they are: alone, without words, they may not do
    mine = [one.stage == step.stage and one.name in (None, step.settings.name) for one in steps[:-1]]
    if True not in mine:
        return []
    following = steps[mine.index(True) + 1]
    return [f"stage={following.stage}", *([f"name={following.name}"] if following.name else [])]


def _after_generate(settings: GenerateStage) -> list[str]:
    if settings.reward is None:
        return ["stage=score", "of=generate", "reward=NAME"]
    return ["stage=rl", f"scored={run_dir.stage_dir(settings, 'generate')}"]


def _after_rl(settings: RlStage) -> list[str]:
    """An evaluation of this model beside the one that it was made of, by the same reward."""
    start = "sft" if run_dir.model_of(settings, "sft") and settings.start_from == "sft" else settings.model.path
    policies = {"sft": start, "rl": "rl" if settings.name is None else f"rl/{settings.name}"}
    words = [] if policies == {"sft": "sft", "rl": "rl"} else [as_word("policies", policies)]
    if settings.reward is not None:
        return ["stage=evaluate", *words, as_word("reward", settings.reward)]
    return ["stage=evaluate", *words, *([] if run_dir.reward_models(settings) else ["reward=NAME"])]


FOLLOWS: dict[str, Callable[[Any], list[str]]] = {
    "sft": lambda settings: ["stage=generate"] if settings.masking.rate > 0 else ["stage=reward", "name=NAME"],
    "reward": lambda settings: ["stage=rl"] if run_dir.model_of(settings, "sft") else ["stage=sft"],
    "generate": _after_generate,
    "score": lambda settings: ["stage=rl"],
    "rl": _after_rl,
    "evaluate": lambda settings: ["stage=report"],
}


def _trained(directory: str, results: Mapping[str, Any]) -> str:
    judged = any(tag.startswith("eval/rewards/") and tag.endswith("/mean") for tag in results)
    # without a reward that judges responses, eval/reward is that of the logged rows, whatever the model says
    tags = HEADLINES if judged or "eval/loss" not in results else HEADLINES[1:]
    tag = next((tag for tag in tags if tag in results), None)
    number = f"{tag} {_number(results[tag])} " if tag else ""
    untrained = "" if results["model_step"] > 0 else UNTRAINED
    return f"{directory}/model: {number}at step {results['model_step']} of {results['steps']}{untrained}"


def _rows(directory: str, results: Mapping[str, Any]) -> str:
    return f"{directory}: " + ", ".join(f"{split} {counts['rows']:,} rows" for split, counts in results.items())


def _judged(directory: str, results: Mapping[str, Any]) -> str:
    rewards = [f"{policy} {_number(numbers['reward'])}" for policy, numbers in results.items()]
    return f"{directory}/results.json: reward {', '.join(rewards)}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


LEFT: dict[str, Callable[[str, Mapping[str, Any]], str]] = {
    **dict.fromkeys(("sft", "reward", "rl"), _trained),
    **dict.fromkeys(("score", "generate"), _rows),
    "evaluate": _judged,
    "bench": lambda directory, results: f"{directory}/results.json: {len(results['results'])} results",
}
