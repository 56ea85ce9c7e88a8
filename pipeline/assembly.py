"""The pieces every stage puts together, in the order it needs them: ranks, text, model, engine, rewards."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from pipeline import files, http_reward, plugins, rewards
from pipeline.config.reward_spec import is_address, parse
from pipeline.config.schema import Algorithm, Common, WithModel
from pipeline.config.sections import ModelSettings, RewardSettings
from pipeline.config.validate import one_complaint
from pipeline.data import dataset
from pipeline.data.batching import Packing
from pipeline.data.tokenization import Encoder
from pipeline.engine import Engine, Ranks
from pipeline.errors import UserError
from pipeline.judges import Judges
from pipeline.launch import run_dir
from pipeline.loop import Objective
from pipeline.models import loading
from pipeline.models.build import build_policy, encoder_of, packing
from pipeline.records import Batch, Stat
from pipeline.rewards import Rewards, is_learned, resolve
from reward_models import learned


def objective_of(algorithm: Algorithm) -> tuple[Any, Any, Objective]:
    """The algorithm's module, its settings checked by its own rules, and what it minimises.

    Raises:
        UserError: no such file, or settings it does not take.
    """
    names = plugins.available("pipeline.algorithms", "loss")
    if algorithm.file not in names:
        raise UserError(f"algorithm.file: {algorithm.file!r}, wanted one of {', '.join(names)}")
    module = importlib.import_module(f"pipeline.algorithms.{algorithm.file}")
    settings = checked_settings(module.Settings, algorithm.settings)

    def loss(output: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Stat]]:
        return module.loss(output, batch, settings)

    return module, settings, Objective(loss, module.MEAN_OVER, module.needs(settings).output)


def checked_settings(schema: type, values: dict[str, Any]) -> Any:
    """`values` as the algorithm's own settings record. Raises UserError for a wrong, missing or unknown key."""
    try:
        return _validated(schema, values)
    except ValidationError as error:
        path, complaint = one_complaint(error)
        raise UserError(f"{'.'.join(['algorithm.settings', *path])}: {complaint}") from None


def _validated(schema: type, values: dict[str, Any]) -> Any:
    known = set(schema.__dataclass_fields__)
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError(f"algorithm.settings.{unknown[0]}: no such setting, wanted one of {', '.join(sorted(known))}")
    return TypeAdapter(schema).validate_python(values)


def inputs(settings: WithModel, model: ModelSettings) -> dict[str, str]:
    """Fingerprints of what a stage starts from: model and data."""
    found = {"model": "new" if model.path is None else files.fingerprint(model.path)}
    if settings.data.task is not None:
        source, _ = plugins.split(settings.data.task)
        return {**found, "data": files.fingerprint(source) if source.endswith(".py") else f"task {settings.data.task}"}
    places = dataset.split_places(settings.data)
    return {**found, **{f"data.{split}": files.fingerprint(place) for split, place in places.items()}}


def exporter(engine: Engine, encoder: Encoder, then: Callable[[Path], None] | None = None) -> Callable[[Path], None]:
    """A function, called by all ranks, that writes the engine's model as a Hugging Face (or PEFT) directory."""

    def export(directory: Path) -> None:
        weights = engine.state_dict()
        if engine.ranks.main:
            own = {name.removeprefix("model."): weight for name, weight in weights.items()}
            loading.save(directory, engine.module.model, own, encoder.tokenizer, then)
        engine.ranks.barrier()

    return export


def build_rewards(
    settings: WithModel,
    spec: Any,
    read: RewardSettings,
    device: torch.device,
    monitors: Mapping[str, str] | None = None,
) -> Rewards | None:
    """The rewards that `spec` names; without a spec the run's own reward models, equal weights; None without any.

    Models and servers are called from this process; with `read.workers` all others in worker processes.
    `monitors`, label -> reward, are only watched (weight 0): functions raw, reward models normalised as the others.
    """
    trained = run_dir.reward_models(settings)
    pairs = parse(spec) or [(name, 1.0) for name in trained]

    def load_learned(directory: str) -> Any:
        return learned.load(directory, settings.model, settings.template, read.max_length, read.batch_size, device)

    def ask(address: str) -> Any:
        return http_reward.connect(address, read.http)

    found = [
        rewards.Reward(name, weight, resolve(name, load_learned, ask, trained), read.normalise)
        for name, weight in pairs
    ]
    for label, name in (monitors or {}).items():
        normalise = read.normalise if name in trained or Path(name).is_dir() else "none"
        found.append(rewards.Reward(label, 0.0, resolve(name, load_learned, ask, trained), normalise))
    names = {name: name for name, _ in pairs} | dict(monitors or {})
    apart = {label: name for label, name in names.items() if not (is_address(name) or is_learned(name, trained))}
    judges = Judges(apart, read.workers) if apart and read.workers else None
    return Rewards(found, judges) if found else None


@contextmanager
def inference(settings: Any, model: ModelSettings, ranks: Ranks) -> Iterator[tuple[Engine, Encoder, Packing]]:
    """A policy that only speaks, with its encoder and packing; sharded where train.zero says stage 3."""
    encoder = encoder_of(settings, model, list)
    longest = settings.generation.max_new_tokens
    policy = build_policy(model, encoder, settings.train, longest, settings.seed)
    train = settings.train.model_copy(update={"batch_size": ranks.world * (settings.train.micro_batch_size or 1)})
    yield Engine(policy, ranks, train, None), encoder, packing(train, ranks.world, policy, encoder)


def reward_inputs(settings: Common, spec: Any, own: bool = True) -> dict[str, str]:
    """Fingerprints of the reward models and files that `spec` stands for; without one, if `own`, those of the run."""
    trained = run_dir.reward_models(settings)
    names = [name for name, _ in parse(spec)] or (list(trained) if own else [])
    places = {name: trained.get(name, name.split(".py:")[0] + (".py" if ".py:" in name else "")) for name in names}
    return {f"reward {name}": files.fingerprint(place) for name, place in places.items()}
