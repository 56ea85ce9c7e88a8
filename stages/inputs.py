"""What each stage starts from: which model, which rows, which rewards, and their fingerprints. Needs no torch.

A stage's own process asks, and the command line before it starts one: both see the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import plugins
from pipeline.config.generation import GenerationSettings
from pipeline.config.reward_spec import labelled, parse, words_for
from pipeline.config.schema import (
    AuditStage,
    Common,
    EvaluateStage,
    GenerateStage,
    RewardStage,
    RlStage,
    ScoreStage,
    SftStage,
)
from pipeline.config.sections import DataSettings, ModelSettings, Split
from pipeline.config.yaml_layers import load_yaml
from pipeline.data.places import files_of
from pipeline.data.splits import SPLITS, origins, read_from, split_places
from pipeline.errors import UserError
from pipeline.files import fingerprint
from pipeline.launch import going_on, run_dir
from reward_models import _named

Inputs = dict[str, str]  # name -> fingerprint


def of_sft(settings: SftStage) -> Inputs:
    return _model(settings.model) | _data(settings.data)


def of_reward(settings: RewardStage) -> Inputs:
    return _model(run_dir.start_model(settings)) | _data(settings.data)


def of_rl(settings: RlStage) -> Inputs:
    return _model(rl_model(settings)) | _data(rl_data(settings)) | of_rewards(settings, settings.reward)


def of_score(settings: ScoreStage) -> Inputs:
    return _model(settings.model) | _data(score_data(settings)) | of_rewards(settings, settings.reward)


def of_audit(settings: AuditStage) -> Inputs:
    return _data(settings.data)


def of_generate(settings: GenerateStage) -> Inputs:
    model = run_dir.policy_model(settings, settings.policy)
    return _model(model) | _data(settings.data) | of_rewards(settings, settings.reward, own=False)


def of_evaluate(settings: EvaluateStage) -> Inputs:
    places = {name: run_dir.policy_model(settings, place).path for name, place in policies(settings).items()}
    judges = {label: _named.mark(place) for label, place in labelled(settings.monitors).items()}
    marks = _model(settings.model) | _data(settings.data) | of_rewards(settings, settings.reward)
    marks |= {f"policy {name}": fingerprint(path) for name, path in places.items()}
    return marks | {f"monitor {label}": found for label, found in judges.items() if found is not None}


OF: dict[str, Callable[[Any], Inputs]] = {
    "sft": of_sft,
    "reward": of_reward,
    "rl": of_rl,
    "audit": of_audit,
    "score": of_score,
    "generate": of_generate,
    "evaluate": of_evaluate,
}  # the other stages have none: they read what there is


def done(stage: str, settings: Common) -> bool:
    """Whether a stage is finished, which is then logged. Raises UserError where other settings or inputs made it."""
    return stage in OF and going_on.done(run_dir.stage_dir(settings, stage), settings, lambda: OF[stage](settings))


def of_rewards(settings: Common, spec: str | Mapping[str, float] | None, own: bool = True) -> Inputs:
    """The reward models and files that `spec` stands for; without one, if `own`, the run's reward models."""
    trained = run_dir.reward_models(settings)
    names = [name for name, _ in parse(spec)] or (list(trained) if own else [])
    places = {name: trained.get(name, name.split(".py:")[0] + (".py" if ".py:" in name else "")) for name in names}
    return {f"reward {name}": _named.mark(place) or fingerprint(place) for name, place in places.items()}


def no_judge(settings: ScoreStage, brought: Sequence[str] = ()) -> UserError:
    """Of stage=score without a reward, in a run that has trained none; `brought` are those that the rows bring."""
    own = f" or {words_for(brought)}, which the rows bring," if brought else ""
    return UserError(
        f"stage=score: nothing to score with: give reward=NAME (length, rouge, your/file.py ...),{own} "
        f"or train one with bash run.sh stage=reward run={settings.run}"
    )


def train_first(splits: Sequence[str]) -> UserError:
    """Of stage=score, where other rows come before those that say what rewards are standardised by."""
    return UserError(
        f"splits: [{', '.join(splits)}], but rewards.normalise: standardise takes mean and spread from training rows, "
        "wanted train first among the splits, or both as numbers in rewards.normalise"
    )


def evaluate_split(settings: EvaluateStage) -> Split:
    """`split`; validation where that is test, and the data have none, but rows that training watched."""
    if settings.data.task is not None or settings.split != "test":
        return settings.split
    there = split_places(settings.data)
    watched = "validation" in there or ("train" in there and settings.data.validation_fraction > 0)
    return "validation" if "test" not in there and watched else "test"


def not_held_out(settings: EvaluateStage, split: Split) -> Iterator[str]:
    """Why the numbers of an evaluation on `split` may be better than those of new rows."""
    if split == "train":
        yield "split=train: policies may have learned from these rows: their numbers tell little of new ones"
    if split == "validation" and settings.split == "test":
        yield (
            "there is no test split: evaluated on validation, by which training chose its weights (and which it held "
            "out only if its data.* were the same): data.test=FILE is better"
        )
    for name, place in policies(settings).items():
        if learned := _learned_from(run_dir.run_dir(settings) / place / "config.yaml", settings.data, split):
            yield f"policy {name} learned from rows of {learned}: its numbers tell little of new rows"


def _learned_from(config: Path, data: DataSettings, split: Split) -> str | None:
    """The files of `split` that a stage of this configuration was trained on, and did not hold these rows out."""
    if data.task is not None or not config.is_file():
        return None
    theirs = load_yaml(config).get("data") or {}
    read = {Path(file).resolve() for file in origins(data, [split])[split]}
    try:
        trained = [] if theirs.get("train") is None else files_of("data.train", theirs["train"])
    except UserError:  # what it learned from is no longer there
        return None
    learned = [file for file in trained if Path(file).resolve() in read]
    cut_alike = all(theirs.get(key) == getattr(data, key) for key in ("validation", "validation_fraction", "max_rows"))
    held_out = split == "validation" and data.validation is None and cut_alike
    return None if held_out or not learned else ", ".join(learned)


def policies(settings: EvaluateStage) -> dict[str, str]:
    """`policies`; where it is null the run's sft and rl, or the model that RL started from where there is no sft.

    Raises UserError where that model is another revision than the one that would be read.
    """
    if settings.policies is not None:
        return settings.policies
    if run_dir.model_of(settings, "sft") is not None or run_dir.model_of(settings, "rl") is None:
        return {"sft": "sft", "rl": "rl"}
    left = run_dir.run_dir(settings) / "rl"
    start = load_yaml(left / going_on.CONFIG)["model"]
    if start["revision"] != settings.model.revision:
        raise UserError(
            f"model.revision: {settings.model.revision}, but {left} started from {start['path']} at revision "
            f"{start['revision']}, wanted the same: give model.revision={start['revision']}, or policies="
        )
    return {"start": start["path"], "rl": "rl"}


def spoken(settings: EvaluateStage, policy: str) -> GenerationSettings:
    """How responses of `policy` are made. Raises UserError where nothing says which model of a server it is."""
    generation, names = settings.generation, policies(settings)
    served = generation.served_model
    if not generation.by_server or (not isinstance(served, dict) and len(names) == 1):
        return generation
    if isinstance(served, dict) and policy in served:
        return generation.model_copy(update={"served_model": served[policy]})
    cure = f"generation.served_model='{{{', '.join(f'{name}: NAME' for name in names)}}}'"
    problem = f"{served or 'null'}, but policies are {', '.join(names)}, wanted what the server calls each"
    raise UserError(f"generation.served_model: {problem}: set {cure}, or policies= of one")


def rl_model(settings: RlStage) -> ModelSettings:
    """The model that RL starts from. Raises UserError where there is none: RL does not begin with a new one."""
    model = run_dir.start_model(settings)
    if model.path is None:
        raise UserError(
            f"stage=rl: {run_dir.run_dir(settings)}/sft holds no model to start from: make one with "
            f"bash run.sh stage=sft run={settings.run} data.train=FILE, or give model="
        )
    return model


def rl_data(settings: RlStage) -> DataSettings:
    """Where the rows of RL come from: `scored`, else the run's score stage, else data.*."""
    left = run_dir.run_dir(settings) / "score"
    place = settings.scored or (str(left) if going_on.finished(left) else None)
    return settings.data if place is None else read_from(settings.data, path=place)


def score_data(settings: ScoreStage) -> DataSettings:
    """Where the rows to score come from: data.*, or the run's generate stage. Raises UserError where it left none."""
    if settings.of == "data":
        return settings.data
    left = run_dir.run_dir(settings) / "generate"
    if not going_on.finished(left):
        raise UserError(
            f"of=generate: {left} holds no finished rows, wanted responses or candidates to score: make them with "
            f"bash run.sh stage=generate run={settings.run} splits=[train,validation]"
        )
    files = {split: left / f"{split}.jsonl" for split in SPLITS}
    return read_from(settings.data, **{split: str(file) for split, file in files.items() if file.is_file()})


def score_splits(settings: ScoreStage, data: DataSettings) -> list[str]:
    """The wanted splits that the data have; validation is cut from train where it has no file of its own."""
    if data.task is not None:
        return list(settings.splits)
    there = {*split_places(data)}
    return [split for split in settings.splits if split in there or (split == "validation" and "train" in there)]


def _model(model: ModelSettings) -> Inputs:
    return {"model": "new" if model.path is None else fingerprint(model.path)}


def _data(data: DataSettings) -> Inputs:
    """The files of the rows, each by its name where it is not the one that is given; or the task: its name, or file."""
    if data.task is None:
        marks: Inputs = {}
        for split, files in split_places(data).items():
            alone = [*files] == [getattr(data, split)] or (getattr(data, split) is None and len(files) == 1)
            marks |= {f"data.{split}" + ("" if alone else f" {file}"): fingerprint(file) for file in files}
        return marks
    source, _ = plugins.split(data.task)
    return {"data": fingerprint(source) if source.endswith(".py") else f"task {data.task}"}
