"""Which layers make a stage's settings.

Later layers win: stages/common.yaml < stages/<stage>.yaml < stages/algo/<algo>.yaml < the recipe's `all`
< the recipe's step < the user's config=FILE.yaml < key=value.

A recipe is a mapping of two keys: `all`, settings for every stage that has them, and `steps`, a list of
{stage: sft, name: optional, set: {settings of this step}, scratch: {settings over those where no model is named}}.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from pipeline.config.aliases import ALGORITHM_IDS
from pipeline.config.schema import STAGES
from pipeline.config.validate import SettingPath, describe, known_paths, nearest_path, validated
from pipeline.config.yaml_layers import (
    COMMAND_LINE,
    ROOT,
    WHOLE,
    Layer,
    Leaf,
    label,
    parse_overrides,
    read_layer,
    read_with_lines,
    sub_layer,
)
from pipeline.errors import UserError, did_you_mean

CONTROL = ("stage", "recipe", "config", "dry_run")  # words that choose layers; not settings
EXCLUSIVE = (  # giving one of a pair takes back the other, if only an earlier layer gave it
    (("train", "num_train_epochs"), ("train", "max_steps")),
    (("train", "micro_batch_size"), ("train", "max_tokens")),
)
MODEL = ("model", "path")
DRIVERS = ("compare",)  # stages that start others: settings of other stages are for those
FREE = ("algorithm", "settings")  # its keys are those of the stage's or the algorithm's own YAML


@dataclass(frozen=True)
class Resolved:
    """One stage, ready to be launched. `words` given to `resolve` again make the same."""

    stage: str
    settings: Any  # a STAGES[stage]
    words: tuple[str, ...]


@dataclass(frozen=True)
class House:
    """Where the layers lie and which stages there are; tests build smaller ones."""

    schemas: Mapping[str, type[BaseModel]] = field(default_factory=lambda: STAGES)
    folder: Path = ROOT / "stages"


class Step(NamedTuple):
    stage: str
    name: str | None
    settings: Layer
    scratch: Layer  # over `settings` where no model is named, so that a small new one is made


class Recipe(NamedTuple):
    everywhere: Layer
    steps: list[Step]


def resolve(words: Iterable[str], house: House | None = None) -> Resolved:
    """The settings of the one stage that `words` name. Raises UserError."""
    house = house or House()
    words = tuple(words)
    overrides = parse_overrides(words)
    stage = word(overrides, "stage")
    if stage not in house.schemas:
        found = f"stage={stage}" if stage else "no stage="
        near = did_you_mean(stage or "", house.schemas)
        raise UserError(f"{COMMAND_LINE}: {found}, wanted one of {', '.join(house.schemas)}{near}")
    if stage in DRIVERS:
        overrides = _of_stage(overrides, stage, house)
    else:
        _refuse_foreign(overrides, stage, house)
    base, later = _layers(overrides, stage, house)
    _refuse_values_of_sections(later, house.schemas[stage])
    merged = merge([base, *later])
    _check_free_keys(base, merged)
    places = {path: leaf.place for path, leaf in merged.items()}
    return Resolved(stage, validated(house.schemas[stage], nested(merged), places), words)


def resolve_steps(words: Iterable[str], house: House | None = None) -> list[Resolved]:
    """The steps of a recipe in order, or those of them that are of the stage which `words` name.

    Without stage= and recipe= the recipe is `demo`. A word reaches the steps whose stage has that setting, and must
    reach one. Raises UserError.
    """
    house = house or House()
    words = tuple(words)
    overrides = parse_overrides(words)
    stage, name, recipe = (word(overrides, key) for key in ("stage", "name", "recipe"))
    if stage is None:
        recipe = recipe or "demo"
    own = [step for step in _recipe(recipe, house).steps if stage in (None, step.stage) and name in (None, step.name)]
    if stage is not None and len(own) < 2:
        return [resolve(words, house)]
    if not own:
        raise UserError(f"{COMMAND_LINE}: name={name}, but no step of recipe {recipe} has that name")
    free = [one for one in words if one.split("=")[0] not in ("stage", "recipe", "name", "dry_run")]
    heads = [[f"stage={step.stage}", f"recipe={recipe}", *([f"name={step.name}"] if step.name else [])] for step in own]
    steps = [[*head, *reaching(head, free, house)] for head in heads]
    for one in free:
        if not any(one in step for step in steps):
            _refuse_foreign(parse_overrides([one]), own[-1].stage, house)
            resolve([*heads[-1], one], house)
    return [resolve(step, house) for step in steps]


def reaching(head: list[str], words: list[str], house: House | None = None) -> list[str]:
    """Those of a user's `words` that the step named by `head` (stage=, recipe=, name=) has the settings of."""
    house = house or House()
    stage = head[0].partition("=")[2]
    fields = {*house.schemas[stage].model_fields, *CONTROL}
    base = _layers(parse_overrides([*head, *words]), stage, house)[0]
    return [one for one in words if any(_reaches(path, fields, base) for path in parse_overrides([one]))]


def word(overrides: Layer, name: str) -> str | None:
    """The value of a word such as stage= or recipe=, None if it is not there. Raises UserError if it is not text."""
    value = overrides[(name,)].value if (name,) in overrides else None
    if value is not None and not isinstance(value, str):
        raise UserError(f"{COMMAND_LINE}: {name}={value!r}, wanted a name")
    return value


def merge(layers: Iterable[Layer]) -> Layer:
    """Later layers over earlier ones, leaf by leaf. None of the arguments is changed."""
    merged: Layer = {}
    for layer in layers:
        for path, leaf in layer.items():
            inside = [other for other in merged if other != path and other[: len(path)] == path]
            if leaf.value == {} and path not in WHOLE and inside:
                continue
            around = [path[:length] for length in range(1, len(path)) if path[:length] in merged]
            for other in (*inside, *around, *([path] if path in merged else [])):
                del merged[other]
            merged[path] = leaf  # at the end: the order is that of the last writers
        for one, other in (*EXCLUSIVE, *(pair[::-1] for pair in EXCLUSIVE)):
            if one in layer and layer[one].value is not None and other in merged and other not in layer:
                merged[other] = Leaf(None, layer[one].place)
    return merged


def nested(layer: Layer) -> dict[str, Any]:
    """A flat layer as nested mappings."""
    tree: dict[str, Any] = {}
    for path, leaf in layer.items():
        here = tree
        for part in path[:-1]:
            here = here.setdefault(part, {})
        here[path[-1]] = leaf.value
    return tree


def named_file(name: str, folder: Path, place: str) -> Path:
    """`name`.yaml of `folder`, or the user's own file when `name` ends in .yaml. Raises UserError."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        wanted = f"wanted one of {', '.join(names)}, or your own .yaml file"
        raise UserError(f"{place}={name}: {wanted}{did_you_mean(name, names)}")
    return folder / f"{name}.yaml"


def _layers(overrides: Layer, stage: str, house: House) -> tuple[Layer, list[Layer]]:
    """What ships for the stage (common, stage, algorithm) merged, and the layers over it."""
    recipe, scratch = _recipe_layers(overrides, stage, house)
    config = word(overrides, "config")
    own = [] if config is None else [_of_stage(read_layer(Path(config)), stage, house)]
    own.append({path: leaf for path, leaf in overrides.items() if path[0] not in CONTROL})
    model = merge([*recipe, *own]).get(MODEL)
    recipe += [scratch] if model is None or model.value is None else []
    common = _of_stage(read_layer(house.folder / "common.yaml"), stage, house)
    shipped = [common, read_layer(house.folder / f"{stage}.yaml")]
    algo, planned = (merge([*shipped, *layers]).get(("algo",)) for layers in ([*recipe, *own], recipe))
    if algo is None or "algo" not in house.schemas[stage].model_fields or not isinstance(algo.value, str):
        return merge(shipped), [*recipe, *own]
    name = ALGORITHM_IDS.get(algo.value, algo.value)
    file = named_file(name, house.folder / "algo", f"{algo.place}: algo")
    if planned is not None and name != ALGORITHM_IDS.get(str(planned.value), planned.value):
        recipe = [_without_free(layer) for layer in recipe]  # they are of the algorithm that the recipe runs
    return merge([*shipped, read_layer(file)]), [*recipe, *own, {("algo",): Leaf(name, algo.place)}]


def _recipe_layers(overrides: Layer, stage: str, house: House) -> tuple[list[Layer], Layer]:
    """The recipe's settings for all stages and those of the one step that `overrides` mean; and its `scratch`."""
    recipe, name = word(overrides, "recipe"), word(overrides, "name")
    everywhere, steps = _recipe(recipe, house)
    steps = [step for step in steps if step.stage == stage]
    named = [step for step in steps if name in (None, step.name)]
    if not named and len(steps) == 1 and steps[0].name is None:
        named = steps
    if steps and len(named) != 1:
        names = [step.name or "(no name)" for step in steps]
        found = f"name={name}" if name else f"stage={stage} alone"
        near = did_you_mean(name or "", names)
        raise UserError(f"{COMMAND_LINE}: {found}: recipe {recipe} has the {stage} steps {', '.join(names)}{near}")
    layers = [_of_stage(everywhere, stage, house), *(step.settings for step in named)]
    return layers, merge(step.scratch for step in named)


def _recipe(name: str | None, house: House) -> Recipe:
    """A recipe file read and checked; None is the recipe that says nothing."""
    if name is None:
        return Recipe({}, [])
    path = named_file(name, house.folder / "recipes", f"{COMMAND_LINE}: recipe")
    data, lines = read_with_lines(path)
    if not isinstance(data, dict) or not set(data) <= {"all", "steps"} or not isinstance(data.get("steps"), list):
        raise UserError(f"{label(path)}: wanted a mapping of `steps`, a list, and if you like `all`, settings")
    everywhere = sub_layer(path, data.get("all"), lines, ("all",))
    for setting, leaf in everywhere.items():
        if not any(setting[0] in schema.model_fields for schema in house.schemas.values()):
            near = nearest_path(setting, (path for schema in house.schemas.values() for path in known_paths(schema)))
            raise UserError(f"{leaf.place}: {'.'.join(setting)}: no such setting{near}")
    return Recipe(everywhere, [_step(path, lines, index, step, house) for index, step in enumerate(data["steps"])])


def _step(path: Path, lines: Mapping[SettingPath, int], index: int, step: Any, house: House) -> Step:
    place = f"{label(path)}:{lines[('steps', str(index))]}"
    if not isinstance(step, dict) or not {"stage"} <= set(step) <= {"stage", "name", "set", "scratch"}:
        wanted = "{stage: NAME, name: optional, set: optional settings, scratch: those of a small new model}"
        raise UserError(f"{place}: {step!r}, wanted {wanted}")
    if step["stage"] not in house.schemas:
        near = did_you_mean(str(step["stage"]), house.schemas)
        raise UserError(f"{place}: stage: {step['stage']!r}, wanted one of {', '.join(house.schemas)}{near}")
    layer, scratch = (sub_layer(path, step.get(key), lines, ("steps", str(index), key)) for key in ("set", "scratch"))
    name = {("name",): Leaf(step["name"], place)} if "name" in step else {}
    return Step(step["stage"], step.get("name"), {**name, **layer}, scratch)


def _of_stage(layer: Layer, stage: str, house: House) -> Layer:
    """`layer` without the settings that only other stages have; what no stage has stays, to be complained of."""
    own = house.schemas[stage].model_fields
    others = {name for schema in house.schemas.values() for name in schema.model_fields} - set(own)
    return {path: leaf for path, leaf in layer.items() if path[0] not in others}


def _refuse_foreign(overrides: Layer, stage: str, house: House) -> None:
    """Raise UserError for a word that is a setting of other stages only."""
    for path in overrides:
        owners = [name for name, schema in house.schemas.items() if path[0] in schema.model_fields]
        if owners and stage not in owners:
            found = f"{'.'.join(path)}: stage={stage} has no such setting"
            raise UserError(f"{COMMAND_LINE}: {found}; it belongs to {', '.join(owners)}")


def _refuse_values_of_sections(layers: Iterable[Layer], schema: type[BaseModel]) -> None:
    """Raise UserError for `train: 7`: a section holds settings and is none."""
    inside = {path[:-1]: ".".join(path) for path in known_paths(schema)}
    for path, leaf in (entry for layer in layers for entry in layer.items()):
        if path in inside and leaf.value != {}:
            wanted = f"wanted a mapping of settings such as {inside[path]}"
            raise UserError(f"{leaf.place}: {'.'.join(path)}: {describe(leaf.value)}, {wanted}")


def _reaches(path: SettingPath, fields: set[str], base: Layer) -> bool:
    """Whether a stage with these `fields`, and the shipped settings `base`, has the setting `path`."""
    return path in base if path[: len(FREE)] == FREE and len(path) > len(FREE) else path[0] in fields


def _without_free(layer: Layer) -> Layer:
    """`layer` without the settings of an algorithm."""
    return {path: leaf for path, leaf in layer.items() if path[: len(FREE)] != FREE}


def _check_free_keys(base: Layer, merged: Layer) -> None:
    """The algorithm's own settings must be among those that ship with it."""
    known = [path for path in base if path[: len(FREE)] == FREE and len(path) > len(FREE)]
    for path, leaf in merged.items():
        if path[: len(FREE)] == FREE and len(path) > len(FREE) and path not in known:
            file = base[("algorithm", "file")].value if ("algorithm", "file") in base else "this one"
            names = ", ".join(".".join(one[len(FREE) :]) for one in known) or "none"
            near = nearest_path(path, known)
            raise UserError(f"{leaf.place}: {'.'.join(path)}: algorithm {file} has the settings: {names}{near}")
