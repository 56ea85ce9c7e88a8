"""Every algorithm is what the stages take it for: each file of pipeline/algorithms that has a loss."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import pytest

from pipeline import plugins
from pipeline.config.schema import RL_KINDS
from pipeline.trainer.objective import AlgorithmModule, RewardModule, RlModule

FILES = plugins.available("pipeline.algorithms", "loss")
DIVISORS = {"tokens", "sequences", "pairs", "items", "prompts", "targets"}  # of trainer.objective.count_terms


def parameters(function) -> list[str]:
    """The names of what it takes; the first of a loss, the model's output, has a name of its own in each file."""
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    return ["output", *names[1:]] if function.__name__ == "loss" else names


@pytest.mark.parametrize("file", FILES)
def test_an_algorithm_has_what_the_protocol_says(file: str):
    module = importlib.import_module(f"pipeline.algorithms.{file}")
    kinds = [kind for kind in (RlModule, RewardModule) if isinstance(module, kind)]
    assert isinstance(module, AlgorithmModule) and len(kinds) <= 1
    for kind in (AlgorithmModule, *kinds):
        for name, wanted in inspect.getmembers(kind, inspect.isfunction):
            if not name.startswith("_"):
                assert parameters(getattr(module, name)) == parameters(wanted), name
    assert dataclasses.is_dataclass(module.Settings) and module.Settings.__dataclass_params__.frozen
    mean_over = module.MEAN_OVER
    assert {mean_over} <= DIVISORS if isinstance(mean_over, str) else set(mean_over) <= DIVISORS


def test_the_kinds_are_those_of_the_stages():
    modules = {file: importlib.import_module(f"pipeline.algorithms.{file}") for file in FILES}
    assert {module.RESPONSES for module in modules.values() if isinstance(module, RlModule)} == set(RL_KINDS)
    assert [file for file, module in modules.items() if isinstance(module, RewardModule)] == ["preference"]
    read = {file: plugins.constant("pipeline.algorithms", file, "RESPONSES") for file in FILES}
    assert read == {file: getattr(module, "RESPONSES", None) for file, module in modules.items()}
    assert plugins.constant("pipeline.algorithms", "nix", "RESPONSES") is None
