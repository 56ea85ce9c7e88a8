"""The rewards that a stage was given: functions, reward models, servers and worker processes, ready to score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from pipeline.config.reward_spec import is_address, is_judge, parse
from pipeline.config.schema import WithModel
from pipeline.config.sections import RewardSettings
from pipeline.launch import run_dir
from pipeline.records import RewardFunction
from pipeline.rewards import http, llm_judge
from pipeline.rewards.rewards import Rewards, WeightedReward, is_learned, resolve
from pipeline.rewards.workers import RewardWorkers
from reward_models import _named, learned


def build_rewards(
    settings: WithModel,
    spec: Any,
    read: RewardSettings,
    device: torch.device,
    monitors: Mapping[str, str] | None = None,
) -> Rewards | None:
    """The rewards that `spec` names; without a spec the run's own reward models, equal weights; None without any.

    Models and servers are called from this process; with `read.workers` all others in worker processes.
    `monitors`, label -> reward, are only watched (weight 0): functions and servers raw, whatever the others are.
    """
    trained = run_dir.reward_models(settings)
    weights = parse(spec) or [(name, 1.0) for name in trained]
    named = [(name, name, weight) for name, weight in weights]
    named += [(label, name, 0.0) for label, name in (monitors or {}).items()]

    dated = {"date": settings.template.date or run_dir.first_day(settings)}
    template = settings.template.model_copy(update=dated)

    _named.check_reads(read.reads, [name for _, name, _ in named], trained)

    def load_learned(name: str) -> RewardFunction:
        how = read.reads if isinstance(read.reads, str) else read.reads.get(name, "auto")
        return learned.load(name, settings.model, template, read.max_length, read.batch_size, device, how)

    def served(address: str) -> RewardFunction:
        cache = run_dir.run_dir(settings) / "cache" / "judge"
        return (
            llm_judge.connect(address, read.judge, read.http, cache)
            if is_judge(address)
            else http.connect(address, read.http)
        )

    def build(label: str, name: str, weight: float) -> WeightedReward:
        function = resolve(name, load_learned, served, trained)
        model = is_learned(name, trained)
        score = model and (name in trained or _named.label_of(name) is None)  # a label's is a probability
        return WeightedReward(label, weight, function, normalisation(read, weight, score), reads_columns=not model)

    built = [build(*one) for one in named]
    apart = {label: name for label, name, _ in named if not (is_address(name) or is_learned(name, trained))}
    workers = RewardWorkers(apart, read.workers) if apart and read.workers else None
    return Rewards(built, workers) if built else None


def normalisation(read: RewardSettings, weight: float, model: bool) -> Literal["none", "sigmoid"]:
    """What is done to the values of a reward; `model`: it is a learned score."""
    if read.normalise == "auto":
        return "sigmoid" if model else "none"
    return read.normalise if weight or model else "none"
