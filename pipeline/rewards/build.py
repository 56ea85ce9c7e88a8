"""The rewards that a stage was given: functions, reward models, servers and worker processes, ready to score."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.config.reward_spec import ROWS, check_normalise, is_address, is_judge, labels, parse, refuse_standardise
from pipeline.config.rewards import Reads, RewardSettings, Scale
from pipeline.config.schema import WithModel
from pipeline.launch import run_dir
from pipeline.records import RewardFunction
from pipeline.rewards import http, llm_judge
from pipeline.rewards.rewards import Rewards, WeightedReward, is_learned, is_own, resolve
from pipeline.rewards.workers import RewardWorkers
from reward_models import _named, learned
from reward_models._filled import columns_of

logger = logging.getLogger("tiffin")


def build_rewards(
    settings: WithModel,
    spec: Any,
    read: RewardSettings,
    device: torch.device,
    monitors: Mapping[str, str] | None = None,
    logged: bool = False,
) -> Rewards | None:
    """The rewards that `spec` names; without a spec the run's own reward models, equal weights; None without any.

    Models and servers are called from this process; with `read.workers` all others in worker processes.
    `monitors`, label -> reward, are only watched (weight 0): functions and servers raw, whatever the others are.
    `logged`: rows with their responses are scored, so that their own rewards may be named, and say what to standardise
    by. Raises UserError for a name or a way to normalise that is not there.
    """
    trained = run_dir.reward_models(settings)
    named, short = labelled_names(parse(spec) or [(name, 1.0) for name in trained], monitors or {})
    if named:
        check_normalise(read.normalise, [*short, *(monitors or {})])
        say_labels(short)
    _named.check_reads(read.reads, [name for _, name, _ in named], trained)
    if named and not logged:
        refuse_standardise(read.normalise)
    builder = Builder(settings, read, device, trained, logged)
    built = [builder.built(*one) for one in named]
    apart = {one.name: name for one, (_, name, _) in zip(built, named, strict=True) if in_workers(one, name, trained)}
    workers = RewardWorkers(apart, read.workers) if apart and read.workers else None
    return Rewards(built, workers, trained) if built else None


@dataclass(frozen=True)
class Builder:
    """Makes a reward of a label, a name and a weight."""

    settings: WithModel
    read: RewardSettings
    device: torch.device
    trained: Mapping[str, str]  # the run's own reward models, by name
    logged: bool  # as of `build_rewards`

    def built(self, label: str, name: str, weight: float) -> WeightedReward:
        """The reward, ready to score. Raises UserError for a name that is not there."""
        model = is_learned(name, self.trained)
        score = model and (name in self.trained or _named.label_of(name) is None)  # a label's is a probability
        way = normalisation(self.read, (label, name), weight, score)
        if self.logged and is_own(name, self.trained):
            return WeightedReward(label, weight, None, way, reads_columns=False, own=name.removeprefix(ROWS))
        function = resolve(name, self._learned, self._served, self.trained)
        columns = not model or bool(columns_of(reads(self.read, name)))
        return WeightedReward(label, weight, function, way, reads_columns=columns, given=name)

    def _learned(self, name: str) -> RewardFunction:
        """A reward model, or another classifier."""
        dated = {"date": self.settings.template.date or run_dir.first_day(self.settings)}
        template, read = self.settings.template.model_copy(update=dated), self.read
        how = reads(read, name)
        return learned.load(name, self.settings.model, template, read.max_length, read.batch_size, self.device, how)

    def _served(self, address: str) -> RewardFunction:
        """A server's reward, or a judge's."""
        if is_judge(address):
            cache = run_dir.run_dir(self.settings) / "cache" / "judge"
            return llm_judge.connect(address, self.read.judge, self.read.http, cache)
        return http.connect(address, self.read.http)


def reads(read: RewardSettings, name: str) -> Reads:
    """What the classifier `name` reads."""
    return read.reads.get(name, "auto") if isinstance(read.reads, Mapping) else read.reads


def labelled_names(
    weights: Sequence[tuple[str, float]], monitors: Mapping[str, str]
) -> tuple[list[tuple[str, str, float]], dict[str, str]]:
    """(label, name, weight) of each reward, monitors last with weight 0; and name -> the short label of those that were
    given none."""
    short = labels([*(name for name, _ in weights), *(name for label, name in monitors.items() if label == name)])
    named = [(short[name], name, weight) for name, weight in weights]
    return [*named, *((short.get(label, label), name, 0.0) for label, name in monitors.items())], short


def in_workers(reward: WeightedReward, name: str, trained: Mapping[str, str]) -> bool:
    """Whether worker processes may call a reward: a function that is neither a model nor a server."""
    return reward.own is None and not (is_address(name) or is_learned(name, trained))


def normalisation(read: RewardSettings, names: tuple[str, str], weight: float, model: bool) -> str | Scale:
    """What is done to the values of a reward, by its label or name; `model`: it is a learned one."""
    if isinstance(read.normalise, Mapping):
        way = next((read.normalise[name] for name in names if name in read.normalise), "auto")
    else:
        way = read.normalise if weight or model else "none"
    if way != "auto":
        return way
    return "sigmoid" if model else "none"


def say_labels(short: Mapping[str, str]) -> None:
    """One line of what rewards are called for short, by name."""
    if told := [f"{label} is {name}" for name, label in short.items() if label != name]:
        logger.info(f"rewards: {', '.join(told)}")
