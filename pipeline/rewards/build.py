"""The rewards that a stage was given: functions, reward models, servers and worker processes, ready to judge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline.config.reward_spec import is_address, parse
from pipeline.config.schema import WithModel
from pipeline.config.sections import RewardSettings
from pipeline.launch import run_dir
from pipeline.rewards import http, rewards
from pipeline.rewards.rewards import Rewards, is_learned, resolve
from pipeline.rewards.workers import Judges
from reward_models import learned


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
        return http.connect(address, read.http)

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
