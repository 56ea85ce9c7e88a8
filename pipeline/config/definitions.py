"""What ships in stages/: the settings of each stage, the YAML of stages and algorithms, the recipes.

A recipe is a mapping of two keys: `all`, settings for every stage that has them, and `steps`, a list of
{stage: sft, name: optional, set: {settings of this step}, scratch: {settings over those where no model is named}}.
An algorithm's YAML may begin with `like: NAME`: what it does not say is as in that algorithm's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from pipeline import plugins
from pipeline.config import hints, yaml_layers
from pipeline.config.schema import STAGES, rl_record
from pipeline.config.validate import SettingPath, describe, known_paths, nearest_path
from pipeline.config.yaml_layers import COMMAND_LINE, ROOT, Layer, Leaf, label, merge, read_layer, sub_layer
from pipeline.errors import UserError, did_you_mean

LIKE = ("like",)
FREE = ("algorithm", "settings")  # its keys are those of the stage's or the algorithm's own YAML


class Step(NamedTuple):
    stage: str
    name: str | None
    settings: Layer
    scratch: Layer  # over `settings` where no model is named, so that a small new one is made


class Recipe(NamedTuple):
    everywhere: Layer
    steps: list[Step]


@dataclass(frozen=True)
class Definitions:
    """The stages, each with its records, and the folder of their YAML; tests make smaller ones."""

    records: Mapping[str, tuple[type[BaseModel], ...]] = field(default_factory=lambda: STAGES)
    folder: Path = ROOT / "stages"

    def names(self, stages: Iterable[str]) -> set[str]:
        """The top-level settings of these stages, whatever the algorithm."""
        return {name for stage in stages for record in self.records[stage] for name in record.model_fields}

    def owners(self, name: str) -> list[str]:
        """The stages that have the top-level setting `name`."""
        return [stage for stage in self.records if name in self.names([stage])]

    def paths(self) -> Iterator[SettingPath]:
        """Every settable path of every stage."""
        return (path for records in self.records.values() for record in records for path in known_paths(record))

    def record(self, stage: str, settings: Layer) -> type[BaseModel]:
        """The record of the stage that says which settings there are: of several the one for their algorithm."""
        records, file = self.records[stage], settings.get(("algorithm", "file"))
        if len(records) == 1 or file is None:
            return records[0]
        responses = plugins.constant("pipeline.algorithms", str(file.value), "RESPONSES")
        if responses is None:
            names = ", ".join(plugins.available("pipeline.algorithms", "RESPONSES"))
            raise UserError(f"{file.place}: algorithm.file: {describe(file.value)}, wanted one of {names}")
        own = {path[-1]: leaf.value for path, leaf in settings.items() if path[:-1] == FREE}
        return rl_record(responses, own)

    def shipped(self, stage: str) -> Layer:
        """The defaults of a stage; among them some that only other stages have."""
        return merge(read_layer(self.folder / f"{name}.yaml") for name in ("common", stage))

    def algorithms(self) -> list[str]:
        return sorted(path.stem for path in (self.folder / "algo").glob("*.yaml"))

    def algorithm(self, name: str, place: str, above: tuple[str, ...] = ()) -> Layer:
        """The YAML of an algorithm over that of the one it is like. Raises UserError; `place` is where it is named."""
        if name in above:
            raise UserError(f"{place}={name}, which is like {above[-1]} itself")
        if said := hints.method(name, "algo"):
            raise UserError(f"{place}={name}: no such algorithm here{said}")
        layer = read_layer(_named_file(name, self.folder / "algo", place))
        like = yaml_layers.word(layer, "like")
        if like is None:
            return layer
        base = self.algorithm(like, f"{layer.pop(LIKE).place}: like", (*above, name))
        return merge([base, layer])

    def recipe(self, name: str | None) -> Recipe:
        """A recipe file read and checked; None is the recipe that says nothing. Raises UserError."""
        if name is None:
            return Recipe({}, [])
        path = _named_file(name, self.folder / "recipes", f"{COMMAND_LINE}: recipe")
        data, lines = yaml_layers.read_with_lines(path)
        if not isinstance(data, dict) or not set(data) <= {"all", "steps"} or not isinstance(data.get("steps"), list):
            raise UserError(f"{label(path)}: wanted a mapping of `steps`, a list, and if you like `all`, settings")
        everywhere = sub_layer(path, data.get("all"), lines, ("all",))
        for setting, leaf in everywhere.items():
            if not self.owners(setting[0]):
                near = nearest_path(setting, self.paths())
                raise UserError(f"{leaf.place}: {'.'.join(setting)}: no such setting{near}")
        return Recipe(everywhere, [self._step(path, lines, index, step) for index, step in enumerate(data["steps"])])

    def _step(self, path: Path, lines: Mapping[SettingPath, int], index: int, step: Any) -> Step:
        place = f"{label(path)}:{lines[('steps', str(index))]}"
        if not isinstance(step, dict) or not {"stage"} <= set(step) <= {"stage", "name", "set", "scratch"}:
            wanted = "{stage: NAME, name: optional, set: optional settings, scratch: those of a small new model}"
            raise UserError(f"{place}: {step!r}, wanted {wanted}")
        if step["stage"] not in self.records:
            near = did_you_mean(str(step["stage"]), self.records)
            raise UserError(f"{place}: stage: {step['stage']!r}, wanted one of {', '.join(self.records)}{near}")
        layer, scratch = (
            sub_layer(path, step.get(key), lines, ("steps", str(index), key)) for key in ("set", "scratch")
        )
        name = {("name",): Leaf(step["name"], place)} if "name" in step else {}
        return Step(step["stage"], step.get("name"), {**name, **layer}, scratch)


def _named_file(name: str, folder: Path, place: str) -> Path:
    """`name`.yaml of `folder`, or the user's own file when `name` ends in .yaml. Raises UserError."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        wanted = f"wanted one of {', '.join(names)}, or your own .yaml file"
        raise UserError(f"{place}={name}: {wanted}{did_you_mean(name, names)}")
    return folder / f"{name}.yaml"
