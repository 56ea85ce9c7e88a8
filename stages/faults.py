"""What a start would refuse, of all its steps, told before any begins. Needs no torch.

A start raises the first of it, dry_run=true shows all. Of a later step it is what no earlier one makes: its rows, its
rewards by name, the settings that do not go together. What needs torch, the network or all rows is found by the stages
themselves, as what user's code does: none of it is run here.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from pathlib import Path

from pipeline import errors, plugins
from pipeline.config import together
from pipeline.config.deepspeed import read_ds_config
from pipeline.config.resolve import Resolved
from pipeline.config.reward_spec import (
    ROWS,
    check_normalise,
    is_judge,
    labelled,
    labels,
    no_judge_of_new_texts,
    no_targets_of_policy,
    parse,
    refuse_standardise,
)
from pipeline.config.schema import (
    AuditStage,
    CompareStage,
    EvaluateStage,
    GenerateStage,
    RewardStage,
    RlAdvantage,
    RlMasked,
    RlOffline,
    RlPairs,
    RlPolicy,
    RlStage,
    ScoreStage,
    SftStage,
    Training,
    WithModel,
)
from pipeline.config.sections import DataSettings, ModelSettings
from pipeline.data import convert, hub, readers
from pipeline.data.files import raw_rows
from pipeline.data.splits import origins
from pipeline.errors import UserError
from pipeline.launch import comparison_plan, extensions, launcher, machine, run_dir
from pipeline.models import place
from pipeline.records import Example
from pipeline.rewards import llm_judge, own_rewards, rewards
from reward_models import _named
from stages import inputs

Rows = tuple[DataSettings, Sequence[str]]  # where they lie, and the splits that a stage reads
FirstRows = tuple[list[Example], list[str]]  # and why there are no more
WHOLE_MB = 20  # files that can only be read whole, and are larger, are left to the stage
READ_WHOLE = (".json", ".parquet")
MOST_HEADS = 20  # of more files than these only the first are looked into


@dataclass(frozen=True)
class Ahead:
    """What will be there when a step starts, though it is not yet."""

    made: Collection[Path]  # the directories of the steps before it
    environ: Mapping[str, str]
    scored: Collection[str] = ()  # the rewards that rows bring which the steps before it score

    def makes(self, settings: WithModel, stage: str) -> bool:
        """Whether an earlier step is the run's `stage`, or stage/name."""
        return run_dir.run_dir(settings) / stage in self.made

    def holds(self, place: str | None) -> bool:
        """Whether a path lies in what an earlier step makes."""
        return place is not None and any(Path(place).is_relative_to(directory) for directory in self.made)

    def reward_models(self, settings: WithModel) -> list[str]:
        """Those of the run by name, and those that it will have."""
        folder = run_dir.run_dir(settings) / "reward"
        return [*run_dir.reward_models(settings), *(path.name for path in self.made if path.parent == folder)]


def of(steps: Sequence[Resolved], environ: Mapping[str, str]) -> list[str]:
    """The lines of all faults, each once. None of a rank of someone's launcher: ranks find out together."""
    if launcher.is_rank(environ):
        return []
    made: list[Path] = []
    lines: list[str] = []
    scored: list[str] = []
    for step in steps:
        lines += of_step(step, Ahead(made, environ, scored))
        made.append(run_dir.stage_dir(step.settings, step.stage))
        scored += labels(name for name, _ in parse(step.settings.reward)).values() if step.stage == "score" else []
    return [*dict.fromkeys(lines)]


def refuse(steps: Sequence[Resolved], environ: Mapping[str, str]) -> None:
    """Raises UserError with the first fault, and how many more there are."""
    if lines := of(steps, environ):
        more = f" (and {len(lines) - 1} more: dry_run=true shows them)" if len(lines) > 1 else ""
        raise UserError(lines[0] + more)


def notes(steps: Sequence[Resolved], environ: Mapping[str, str]) -> list[str]:
    """What is allowed, and perhaps not meant."""
    many = [step.settings.launch.processes for step in steps if step.stage in launcher.DISTRIBUTED]
    if machine.gpus(environ) == 0 and max(many, default=1) > 1:
        return [f"launch.processes: no GPU is seen here, so that gpus={max(many)} means so many CPU processes"]
    return []


def of_step(step: Resolved, ahead: Ahead) -> list[str]:
    """The faults of one step; of one that is done only whether it may be so."""
    settings, stage = step.settings, step.stage
    if isinstance(settings, CompareStage):
        return of_comparison(settings, step.words, ahead.environ)
    if stage not in inputs.OF:
        return []
    directory = run_dir.stage_dir(settings, stage)
    found = _told(partial(run_dir.standing, directory, settings))
    if run_dir.finished(directory) and (found or run_dir.ended(directory, settings)):
        return found
    found += _told(partial(run_dir.refuse_taken, directory))
    if not found and run_dir.begun(directory):
        ranks = partial(launcher.world, settings.launch, stage, ahead.environ)
        found += _told(lambda: run_dir.refuse_other_ranks(directory, ranks()))
    if isinstance(settings, AuditStage):  # it opens no model, and judges nothing
        return [*found, *of_rows(settings, ahead, lambda rows: None)]
    checks = (of_launch(settings, stage, ahead.environ), of_models(settings, ahead), of_rewards(settings, ahead))
    rows = of_rows(settings, ahead, partial(suits, settings=settings, ahead=ahead))
    return [*found, *(line for lines in checks for line in lines), *rows]


def of_comparison(settings: CompareStage, words: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Those of its steps."""
    try:
        plan = comparison_plan.plan(settings, words)
    except UserError as error:
        return [str(error)]
    return of([task.step for task in plan.tasks], environ)


def of_launch(settings: WithModel, stage: str, environ: Mapping[str, str]) -> Iterator[str]:
    """What the machine lacks, if it is this one that computes, or the settings do not agree about."""
    yield from _told(lambda: launcher.command(settings.launch, stage, (), environ))
    unknown = _told(partial(launcher.choose, settings.launch, stage, environ))
    here = bool(unknown) or launcher.is_here(settings.launch, stage, environ)
    if isinstance(settings, SftStage | RewardStage | RlStage):
        yield from _told(
            lambda: together.whole_batches(settings.train, launcher.world(settings.launch, stage, environ))
        )
    gpus, wanted = machine.gpus(environ), settings.launch.processes
    if here and gpus and wanted > gpus and stage in launcher.DISTRIBUTED:
        yield f"launch.processes: gpus={wanted}, but this machine has {gpus} for it: wanted gpus={gpus} at most"
    if here and isinstance(settings, Training | GenerateStage | EvaluateStage):
        yield from _told(lambda: together.fp16_on_gpu(settings.train, machine.has_gpu()))
    if isinstance(settings, Training):
        zero = read_ds_config(settings.train.zero)["zero_optimization"]
        yield from _told(lambda: together.fp16_scaled(settings.train, zero["stage"]))
        if here and "offload_optimizer" in zero and not can_offload(environ):
            yield (
                f"train.zero: {settings.train.zero} offloads the optimizer, for which DeepSpeed compiles code, and "
                f"there is no C++ compiler ({environ.get('CXX', 'c++')}): install one, or wanted a file without offload"
            )


def can_offload(environ: Mapping[str, str]) -> bool:
    """Whether DeepSpeed's CPU Adam is compiled, or can be."""
    deepspeed = Path(str(importlib.util.find_spec("deepspeed").origin)).parent
    built = (deepspeed / "git_version_info_installed.py").is_file()  # with it perhaps: then it knows better
    compiler = shutil.which(environ.get("CXX", "c++").split()[0])
    return built or bool(compiler) or (extensions.directory(environ) / "cpu_adam/cpu_adam.so").is_file()


def of_models(settings: WithModel, ahead: Ahead) -> Iterator[str]:
    """Models that are not there; and settings of new ones that cannot be."""
    for given in models_of(settings, ahead):
        try:
            model = given()
        except UserError as error:
            yield str(error)
            continue
        if ahead.holds(model.path):
            continue
        if model.path is not None:
            yield from _told(partial(place.check, model.path))
        else:
            yield from _told(partial(together.heads, model.scratch))
            yield from _told(partial(together.adapters, model))
        missing = not any(importlib.util.find_spec(name) for name in ("flash_attn", "kernels"))
        if model.attn_implementation == "flash_attention_2" and missing:
            problem = "flash_attention_2 is of the package flash-attn, which is not installed here"
            yield f"model.attn_implementation: {problem}: install it, or set sdpa"


Given = Callable[[], ModelSettings]  # may raise UserError


def _start(settings: RewardStage | RlStage, ahead: Ahead) -> list[Given]:
    if settings.start_from == "sft" and ahead.makes(settings, "sft"):
        return []
    find = inputs.rl_model if isinstance(settings, RlStage) else run_dir.start_model
    return [partial(find, settings)]


def _policies(settings: GenerateStage | EvaluateStage, ahead: Ahead) -> list[Given]:
    if isinstance(settings, EvaluateStage):
        try:
            places = _compared(settings, ahead)
        except UserError as error:
            return [partial(_refuse, str(error))]
    else:
        places = [settings.policy]
    made = {
        one: any(ahead.makes(settings, name) for name in (["rl", "sft"] if one is None else [one])) for one in places
    }
    return [partial(run_dir.policy_model, settings, one) for one in places if not (made[one] or ahead.holds(one))]


def _compared(settings: EvaluateStage, ahead: Ahead) -> Sequence[str]:
    """Where the policies of an evaluation are; where RL is ahead without sft, what it starts from is checked there."""
    own = ahead.makes(settings, "sft") or run_dir.model_of(settings, "sft") is not None
    if settings.policies is None and ahead.makes(settings, "rl"):
        return ["sft", "rl"] if own else ["rl"]
    return [*inputs.policies(settings).values()]


def _refuse(line: str) -> ModelSettings:
    raise UserError(line)


def models_of(settings: WithModel, ahead: Ahead) -> list[Given]:
    """What gives the models that a stage opens and no earlier step makes."""
    if isinstance(settings, SftStage):
        return [lambda: settings.model]
    if isinstance(settings, RewardStage | RlStage):
        return _start(settings, ahead)
    return _policies(settings, ahead) if isinstance(settings, GenerateStage | EvaluateStage) else []


def of_rewards(settings: WithModel, ahead: Ahead) -> Iterator[str]:
    """Rewards that are not there, or lack what they import; and where there is none and one is needed."""
    if isinstance(settings, SftStage | RewardStage):
        return
    known, first = ahead.reward_models(settings), cache(partial(first_rows, settings, ahead))
    names = [name for name, _ in parse(settings.reward)]
    if not names and not known and isinstance(settings, ScoreStage):
        brought = dict.fromkeys(name for row in first()[0] for name in row.rewards)
        yield str(inputs.no_judge(settings, [*brought]))
    watched = labelled(settings.monitors) if isinstance(settings, EvaluateStage) else {}
    if used := names or ([] if isinstance(settings, GenerateStage) else known):
        yield from _told(lambda: check_normalise(settings.rewards.normalise, [*used, *watched]))
        if not scores_logged(settings):
            yield from _told(partial(refuse_standardise, settings.rewards.normalise))
    if not names and not known and isinstance(settings, RlMasked | RlPolicy):
        yield str(no_judge_of_new_texts(settings.algo, settings.run))
    yield from _told(partial(_named.check_reads, settings.rewards.reads, [*names, *watched.values()], known))
    for name in [*names, *watched.values()]:
        if is_judge(name):
            yield from _told(partial(llm_judge.check, name, settings.rewards.judge, ahead.environ))
        if ahead.holds(name):
            continue
        if not rewards.is_own(name, known):
            yield from _told(partial(rewards.check, name, known))
        elif found := of_own_reward(name, settings, ahead, first):
            yield from found
        elif isinstance(settings, RlAdvantage) and settings.value.targets == "policy":
            yield str(no_targets_of_policy())


def scores_logged(settings: WithModel) -> bool:
    """Whether a stage scores responses that rows hold, so that these may bring a part of the reward."""
    return isinstance(settings, ScoreStage | RlOffline)


def of_own_reward(name: str, settings: WithModel, ahead: Ahead, first: Callable[[], FirstRows]) -> list[str]:
    """What is wrong with the name of a reward that can only be one that rows bring, as far as the first rows tell."""
    logged, known = scores_logged(settings), ahead.reward_models(settings)
    rows, unread = first()
    if rows and logged:
        single = [row for row in rows if not row.candidates]
        return _told(lambda: own_rewards.values(name, convert.to_scored(single, settings.data.responses), known))
    if name.removeprefix(ROWS) in (own_rewards.names(rows) if rows else ahead.scored):
        return [] if logged else [str(own_rewards.no_judge_of_new_texts(name))]
    if logged and (unread or may_bring_rewards(settings, ahead)):
        return []
    return _told(partial(rewards.check, name, known))


def first_rows(settings: WithModel, ahead: Ahead) -> FirstRows:
    """The first rows of each file that a stage reads, as far as there are some; and why there are no more."""
    rows: list[Example] = []
    return rows, [*of_rows(settings, ahead, rows.extend)]


def may_bring_rewards(settings: WithModel, ahead: Ahead) -> bool:
    """Whether rows that cannot be seen yet may bring rewards: those of the hub, of large files, of a user's task."""
    found = rows_of(settings, ahead)
    return found is not None and (found[0].task is None or ".py" in found[0].task)


def of_rows(settings: WithModel, ahead: Ahead, use: Callable[[list[Example]], object]) -> Iterator[str]:
    """Files and splits that are not there; rows, of each file the first, that are none or that `use` refuses."""
    try:
        found = rows_of(settings, ahead)
        if found is None:  # an earlier step makes them
            return
        data, names = found
        if data.task is not None:
            plugins.check(data.task, "pipeline.tasks", "data.task", "examples")
            return
        if data.path is not None and hub.is_hub_name(data.path):  # the stage asks the hub
            return
        files = dict.fromkeys(chain.from_iterable(origins(data, names).values()))
    except UserError as error:
        yield str(error)
        return
    filters = readers.Filters(data.exclude, data.drop_abrupt, data.sources)
    for number, file in enumerate(files):
        path = Path(file)
        whole = path.name.removesuffix(".gz").endswith(READ_WHOLE)
        if hub.is_hub_name(file) or (whole and path.is_file() and path.stat().st_size > WHOLE_MB * 1e6):
            continue
        try:
            if number < MOST_HEADS:
                use(readers.head(file, data.format, filters, data.max_bad_rows, data.columns))
            else:
                raw_rows(file)
        except UserError as error:
            yield str(error)


def rows_of(settings: WithModel, ahead: Ahead) -> Rows | None:
    """The rows that a stage reads; None where an earlier step makes them. Raises UserError."""
    if isinstance(settings, ScoreStage):
        if settings.of == "generate" and ahead.makes(settings, "generate"):
            return None
        data = inputs.score_data(settings)
        hub_set = data.path is not None and hub.is_hub_name(data.path)
        return data, [] if hub_set else inputs.score_splits(settings, data)
    if isinstance(settings, RlStage):
        made = ahead.holds(settings.scored) if settings.scored else ahead.makes(settings, "score")
        return None if made else (inputs.rl_data(settings), ("train", "validation"))
    if isinstance(settings, GenerateStage):
        return settings.data, settings.splits
    if isinstance(settings, EvaluateStage):
        return settings.data, [inputs.evaluate_split(settings)]
    return settings.data, ("train",) if isinstance(settings, AuditStage) else ("train", "validation")


def suits(examples: Sequence[Example], settings: WithModel, ahead: Ahead) -> None:
    """Raises UserError, as the stage would, for a row of the first ones that it cannot use."""
    if isinstance(settings, SftStage):
        convert.to_supervised(examples)
    elif isinstance(settings, RewardStage | RlPairs):
        for one in [] if all(map(convert.is_pair, examples)) else examples:
            for row in [] if convert.is_pair(one) else convert.each_candidate(one):
                convert.with_score(row)
    elif isinstance(settings, ScoreStage | RlOffline):
        rows = [one for one in examples if isinstance(settings, RlOffline) or not one.candidates]
        rows = convert.to_scored(rows, settings.data.responses)
        if isinstance(settings, RlOffline) and needs_rewards(settings) and not ahead.reward_models(settings):
            convert.judged(rows, settings.run)


def needs_rewards(settings: RlOffline) -> bool:
    """Whether rows must bring rewards, unless a model of the run judges them."""
    weighed = settings.algorithm.settings["weight"] != "one" or settings.rows != "all" or settings.shuffle_rewards
    return weighed and settings.reward is None


def _told(check: Callable[[], object]) -> list[str]:
    """The line of the UserError that `check` raises, or of what the machine refuses; nothing where it raises none."""
    try:
        check()
    except UserError as error:
        return [str(error)]
    except OSError as error:
        mistake = errors.as_user_error(error)
        if mistake is None:
            raise
        return [str(mistake)]
    return []
