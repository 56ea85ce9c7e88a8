"""The two lines that end a stage: what it left and what came of it, and what to run next. Needs no torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config.definitions import Definitions
from pipeline.config.resolve import Resolved
from pipeline.config.schema import AuditStage, GenerateStage, RlStage
from pipeline.config.yaml_layers import Layer, as_word, parse_overrides
from pipeline.files import CARD
from pipeline.launch import going_on, run_dir
from pipeline.report.headline import OF_KIND, headline
from pipeline.report.spec import TROUBLE
from pipeline.report.stages import read_stage, stages_of
from pipeline.report.usage import model_of

SOURCES = (("recipe",), ("data", "task"), ("data", "path"))  # settings that say where the rows of all stages come from
CARRIED = (("run",), ("runs_dir",), *SOURCES)  # from a stage's words to those of the next
LEFT = {**dict.fromkeys(("sft", "reward", "rl"), "model"), "evaluate": "results.json"}  # else the directory itself
ROWS = {  # what a stage reads, where neither a task nor a directory nor a recipe says so
    "sft": "data.train=FILE",
    "reward": "data.train=PAIRS",
    "rl": "data.train=FILE",
    "generate": "data.train=FILE",
    "evaluate": "data.test=FILE",
}


def closing(step: Resolved, last: bool) -> list[str]:
    """What a finished step left, with the number that matters; and, of the `last` one, what to run next."""
    settings, directory = step.settings, run_dir.stage_dir(step.settings, step.stage)
    if step.stage == "report":  # its own last line is the first
        return [_use(run_dir.run_dir(settings)) or _next(next_words(step))]
    if step.stage == "bench":
        results = json.loads((directory / "results.json").read_text("utf-8"))
        return [f"{directory}/results.json: {len(results['results'])} results"]
    if step.stage == "audit":
        said = json.loads((directory / "results.json").read_text("utf-8"))["headline"]
        first = f"{directory}/audit.html: {said['text']}"
        return [first, _next(next_words(step))] if last and said["level"] != TROUBLE else [first]
    if step.stage not in OF_KIND:
        return []
    said = headline(read_stage(run_dir.run_dir(settings), directory, step.stage))
    first = f"{directory / LEFT.get(step.stage, '')}: {said.text}{_kept(directory)}"
    if not last:
        return [first]
    look = said.level == TROUBLE and step.stage in ("sft", "reward", "rl")
    return [first, _next(_words(step, ["stage=report"]) if look else next_words(step))]


def next_words(step: Resolved) -> list[str]:
    """The words of the stage that usually follows; names that only the user knows are in capitals."""
    head = _next_in_recipe(step, parse_overrides(step.words)) or FOLLOWS[step.stage](step.settings)
    return _words(step, head)


def _words(step: Resolved, head: list[str]) -> list[str]:
    """`head`, with what it needs of the words of `step`: which run, and which rows where nothing else says so."""
    given = parse_overrides(step.words)
    stage = head[0].partition("=")[2]
    known = [path for path in CARRIED if path in given and (stage, path[0]) != ("report", "data")]  # it reads no rows
    carried = [as_word(".".join(path), given[path].value) for path in known]
    scored = stage == "rl" and (len(head) > 1 or going_on.finished(run_dir.run_dir(step.settings) / "score"))
    rows = [ROWS[stage]] if stage in ROWS and not scored and not {*SOURCES} & {*given} else []
    return [*head, *carried, *rows]


def _next(words: list[str]) -> str:
    return f"next: bash run.sh {shlex.join(words)}"


def _kept(directory: Path) -> str:
    """The disk that is taken by the checkpoint of a finished stage."""
    newest = going_on.checkpoint(directory)
    if newest is None:
        return ""
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    return f"; {size / 1e6:,.1f} MB of checkpoint to train it longer (train.keep_checkpoint=false drops it)"


def _use(run: Path) -> str:
    """Where it is said how to call the policy that a run left last; empty where it left none with a card."""
    left = model_of(stages_of(run))
    return f"how to call the model: {left.path / CARD}" if left and (left.path / CARD).is_file() else ""


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


def _after_audit(settings: AuditStage) -> list[str]:
    """Training on the rows that were looked at; from a model that only the user knows, where the run has none."""
    model = [] if run_dir.model_of(settings, "sft") else ["model=MODEL"]
    rows = [
        as_word(f"data.{name}", given) for name in ("train", "validation") if (given := getattr(settings.data, name))
    ]
    reward = [] if settings.reward is None else [as_word("reward", settings.reward)]
    return ["stage=rl", "algo=alol", *model, *rows, *reward]


def _after_rl(settings: RlStage) -> list[str]:
    """An evaluation of this model beside the one that it was made of, by the same reward, if there was one."""
    own = run_dir.model_of(settings, "sft") and settings.start_from == "sft"
    policies = {"sft": "sft"} if own else {"start": settings.model.path}
    policies["rl"] = "rl" if settings.name is None else f"rl/{settings.name}"
    found = settings.name is None and (own or run_dir.model_of(settings, "sft") is None)  # by an evaluation itself
    words = [] if found else [as_word("policies", policies)]
    if settings.reward is not None and not _unjudged(run_dir.stage_dir(settings, "rl") / going_on.RESULTS):
        return ["stage=evaluate", *words, as_word("reward", settings.reward)]
    return ["stage=evaluate", *words]


def _unjudged(results: Path) -> bool:
    """Whether nothing judged the model's responses, as where rows bring a part of its reward."""
    left = json.loads(results.read_text("utf-8")) if results.is_file() else {}
    return "eval/loss" in left and "eval/reward" not in left


FOLLOWS: dict[str, Callable[[Any], list[str]]] = {
    "sft": lambda settings: ["stage=generate"] if settings.masking.rate > 0 else ["stage=reward", "name=NAME"],
    "reward": lambda settings: ["stage=rl"] if run_dir.model_of(settings, "sft") else ["stage=sft"],
    "generate": _after_generate,
    "score": lambda settings: ["stage=rl"],
    "audit": _after_audit,
    "rl": _after_rl,
    "evaluate": lambda settings: ["stage=report"],
    "report": lambda settings: ["stage=rl"] if run_dir.reward_models(settings) else ["stage=sft"],
}
