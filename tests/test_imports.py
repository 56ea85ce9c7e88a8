"""The directions of import: what keeps the mathematics free of the machinery."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("pipeline", "stages", "reward_models", "ds_configs", "tests")
CONFIG = {
    *("pipeline.records", "pipeline.sections", "pipeline.settings", "pipeline.aliases", "pipeline.spelling"),
    *("pipeline.validation", "pipeline.config"),
}
# file or folder -> the modules of ours it may import (with what lies below them)
ALLOWED = {
    "pipeline/records.py": set(),
    "pipeline/spelling.py": set(),
    "pipeline/ranges.py": set(),
    "pipeline/addresses.py": {"pipeline.records"},
    "pipeline/http_reward.py": {
        "pipeline.addresses",
        "pipeline.records",
        "pipeline.rewards",
        "pipeline.sections",
        "pipeline.settings",
    },
    "pipeline/sections.py": {"pipeline.ranges"},
    "pipeline/settings.py": {"pipeline.addresses", "pipeline.ranges", "pipeline.sections"},
    "pipeline/aliases.py": set(),
    "pipeline/environment.py": set(),
    "pipeline/plugins.py": {"pipeline.records", "pipeline.spelling"},
    "pipeline/faults.py": {"pipeline.records"},
    "pipeline/judges.py": {"pipeline.records"},
    "pipeline/judge_worker.py": {"pipeline.judges", "pipeline.records", "pipeline.rewards"},
    "pipeline/validation.py": {"pipeline.records", "pipeline.spelling"},
    "pipeline/config.py": CONFIG,
    "pipeline/layers.py": CONFIG,
    "pipeline/vocabulary.py": {"pipeline.records"},
    "pipeline/masks.py": {"pipeline.settings", "pipeline.vocabulary"},
    "pipeline/launch.py": {"pipeline.records", "pipeline.sections", "pipeline.settings"},
    "pipeline/algorithms": {"pipeline.records", "pipeline.algorithms.functional"},
    "pipeline/tasks": {"pipeline.records", "pipeline.spelling", "pipeline.tasks"},
    "pipeline/lanes.py": set(),
    "pipeline/history.py": set(),
    "pipeline/sampler.py": {
        "pipeline.algorithms.capability",
        "pipeline.history",
        "pipeline.records",
        "pipeline.sections",
        "pipeline.settings",
    },
    "pipeline/lots.py": {"pipeline.algorithms", "pipeline.history", "pipeline.records", "pipeline.sampler"},
    "pipeline/report": {
        "pipeline.config",
        "pipeline.layers",
        "pipeline.metrics",
        "pipeline.records",
        "pipeline.report",
        "pipeline.runs",
        "pipeline.starts",
    },
    "pipeline/text_overlap.py": {"pipeline.lanes", "pipeline.stemmer"},
    "reward_models/serve.py": {
        "pipeline.addresses",
        "pipeline.plugins",
        "pipeline.records",
        "pipeline.spelling",
        "reward_models._comet",
    },
    "reward_models": {
        "pipeline.lanes",
        "pipeline.model_checks",
        "pipeline.models",
        "pipeline.policy",
        "pipeline.ranges",
        "pipeline.records",
        "pipeline.sections",
        "pipeline.settings",
        "pipeline.tasks",
        "pipeline.text",
        "pipeline.text_overlap",
        "pipeline.validation",
        "reward_models",
    },
}
LIBRARIES_OF_ALGORITHMS = {"torch", "__future__", *sys.stdlib_module_names}
# module -> the one file that imports it
ONE_IMPORTER = {
    "yaml": "pipeline/config.py",
    "deepspeed": "pipeline/engine.py",
    "torch.distributed": "pipeline/engine.py",
    "torch.utils.tensorboard": "pipeline/metrics.py",
    "tensorboard": "pipeline/metrics.py",
}
DEVELOPMENT_ONLY = {"pytest", "ruff", "rouge_score", "nltk"}
FILES = sorted(
    path.relative_to(ROOT).as_posix() for folder in OURS if folder != "tests" for path in (ROOT / folder).rglob("*.py")
)


def imports(file: str) -> Iterator[str]:
    """Every module that a file imports, at any depth of its code; `from a import b` gives a.b if that is a module."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if is_module(inner) else str(node.module)


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file() or name in ONE_IMPORTER


def is_or_lies_in(module: str, parent: str) -> bool:
    return module == parent or module.startswith(parent + ".")


@pytest.mark.parametrize("file", FILES)
def test_directions(file: str):
    allowed = next((names for place, names in ALLOWED.items() if file == place or file.startswith(place + "/")), None)
    ours = [module for module in imports(file) if module.split(".")[0] in OURS]
    for module in ours:
        assert not is_or_lies_in(module, "stages"), f"{file} imports {module}; nothing imports stages"
        if allowed is not None:
            known = any(is_or_lies_in(module, name) for name in allowed)
            assert known, f"{file} imports {module}, may import {sorted(allowed)}"


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("pipeline/algorithms/")])
def test_algorithms_know_torch_and_the_standard_library(file: str):
    foreign = {module.split(".")[0] for module in imports(file)} - {"pipeline"} - LIBRARIES_OF_ALGORITHMS
    assert not foreign
    assert not any(is_or_lies_in(module, "torch.distributed") for module in imports(file))


@pytest.mark.parametrize("module", ONE_IMPORTER)
def test_one_importer(module: str):
    importers = {file for file in FILES if any(is_or_lies_in(one, module) for one in imports(file))}
    assert importers <= {ONE_IMPORTER[module]}


@pytest.mark.parametrize("file", FILES)
def test_development_packages_are_not_imported(file: str):
    assert not {module.split(".")[0] for module in imports(file)} & DEVELOPMENT_ONLY


def test_the_command_line_starts_without_installed_packages():
    library = {module.split(".")[0] for module in imports("pipeline/environment.py")}
    assert library <= set(sys.stdlib_module_names)
