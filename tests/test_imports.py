"""The directions of import: what keeps the mathematics free of the machinery."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from pipeline.launch.environment import requirements

ROOT = Path(__file__).resolve().parent.parent
OURS = ("pipeline", "stages", "reward_models", "ds_configs", "tests")
# what may import what: a package (or module) imports itself and what stands on a lower line
LEVELS = [
    ["pipeline/records", "pipeline/errors"],
    ["pipeline/plugins", "pipeline/files", "pipeline/words", "pipeline/algorithms", "pipeline/tasks"],
    ["pipeline/config"],
    ["pipeline/launch", "pipeline/data"],
    ["pipeline/models", "pipeline/report"],
    ["pipeline/trainer", "pipeline/audit", "reward_models"],
    ["pipeline/rewards"],
    ["pipeline/rollout"],
    ["pipeline/rl"],
    ["pipeline/bench"],
    ["stages"],
]
LEVEL = {package: level for level, packages in enumerate(LEVELS) for package in packages}
LIBRARIES_OF_ALGORITHMS = {"torch", "__future__", *sys.stdlib_module_names}
# module -> the files that import it
IMPORTERS = {
    "yaml": ("pipeline/config/yaml_text.py",),
    "deepspeed": ("pipeline/trainer/engine.py", "pipeline/trainer/group.py", "pipeline/trainer/partitions.py"),
    "torch.distributed": ("pipeline/trainer/group.py",),
    "torch.utils.tensorboard": ("pipeline/trainer/board.py",),
    "tensorboard": ("pipeline/trainer/board.py",),
    "nltk": ("reward_models/_rouge.py",),
}
DEVELOPMENT_ONLY = {"pytest", "xdist", "ruff", "rouge_score", "psutil"}
PACKAGE_OF = {
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
}  # module -> package, where the names differ by more than case and "_"
NOT_INSTALLED = {
    "bitsandbytes": "an extra, of which most have no need",
    "comet": "asks for versions that clash with training's: served from an environment of its own",
    "sentence_transformers": "an extra, for one reward",
    "vaderSentiment": "an extra, for studies",
    "trl": "the peer that speed is compared with, in an environment of its own",
}
FILES = sorted(
    path.relative_to(ROOT).as_posix() for folder in OURS if folder != "tests" for path in (ROOT / folder).rglob("*.py")
)

TESTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py"))


@cache
def nodes_of(file: str) -> list[ast.AST]:
    """Those of its code that say something of other files: imports and classes."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef)]


def imports(file: str) -> Iterator[str]:
    """Every module that a file imports, at any depth of its code; `from a import b` gives a.b if that is a module."""
    for node in nodes_of(file):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if is_module(inner) else str(node.module)


def classes(file: str) -> Iterator[str]:
    """The name of every class that a file defines, at any depth of its code."""
    yield from (node.name for node in nodes_of(file) if isinstance(node, ast.ClassDef))


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file() or name in IMPORTERS


def is_or_lies_in(module: str, parent: str) -> bool:
    return module == parent or module.startswith(parent + ".")


def package(place: str) -> str | None:
    """The package (or module of pipeline/) that a file, or a module's name with slashes, belongs to."""
    return next((name for name in LEVEL if f"{place.removesuffix('.py')}/".startswith(f"{name}/")), None)


@pytest.mark.parametrize("file", FILES)
def test_directions(file: str):
    own = package(file)
    assert own or not (ROOT / file).read_text(encoding="utf-8"), f"{file}: lies in no package of LEVELS"
    for module in imports(file):
        if module.split(".")[0] in OURS:
            other = package(module.replace(".", "/"))
            lower = other == own or (other is not None and LEVEL[other] < LEVEL[own])
            assert lower, f"{file} imports {module}: {own} may import what stands below it in LEVELS"


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("pipeline/algorithms/")])
def test_algorithms_import_records_errors_and_shared_mathematics(file: str):
    ours = {module for module in imports(file) if module.split(".")[0] in OURS}
    shared = {f"pipeline.algorithms.{name}" for name in ("functional", "logits", "stats")}
    assert ours <= {"pipeline.errors", "pipeline.records", *shared}


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("pipeline/algorithms/")])
def test_algorithms_know_torch_and_the_standard_library(file: str):
    foreign = {module.split(".")[0] for module in imports(file)} - {"pipeline"} - LIBRARIES_OF_ALGORITHMS
    assert not foreign
    assert not any(is_or_lies_in(module, "torch.distributed") for module in imports(file))


@pytest.mark.parametrize("module", IMPORTERS)
def test_known_importers(module: str):
    importers = {file for file in FILES if any(is_or_lies_in(one, module) for one in imports(file))}
    assert importers <= {*IMPORTERS[module]}


@pytest.mark.parametrize("file", FILES)
def test_development_packages_are_not_imported(file: str):
    assert not {module.split(".")[0] for module in imports(file)} & DEVELOPMENT_ONLY


def test_a_class_name_stands_for_one_class():
    """But for `Settings` of the algorithms, by which training finds them."""
    algorithms = "pipeline/algorithms/"
    homes = [(name, file) for file in FILES for name in classes(file)]
    elsewhere = [name for name, file in homes if (name, file.startswith(algorithms)) != ("Settings", True)]
    assert len(elsewhere) > 100
    assert sorted(name for name in set(elsewhere) if elsewhere.count(name) > 1) == []


def distribution(text: str) -> str:
    """The name of a package as registries compare it: of a module, of a line in setup.py or in constraints.txt."""
    return re.match(r"[\w-]+", PACKAGE_OF.get(text, text))[0].replace("_", "-").lower()


@pytest.mark.parametrize("file", [*FILES, *TESTS])
def test_what_is_imported_is_asked_for(file: str):
    """Whatever another package happens to bring is named too: the next version of that one may bring it no more."""
    foreign = {module.split(".")[0] for module in imports(file)} - {*OURS, *sys.stdlib_module_names, *NOT_INSTALLED}
    asked = {distribution(one) for one in requirements(dev=file in TESTS)}
    assert {distribution(module) for module in foreign} <= asked


def test_what_is_asked_for_is_pinned():
    pinned = {distribution(line) for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()[1:]}
    assert {distribution(one) for one in requirements(dev=True)} <= pinned


def test_the_command_line_starts_without_installed_packages():
    library = {module.split(".")[0] for module in imports("pipeline/launch/environment.py")}
    assert library <= set(sys.stdlib_module_names)
