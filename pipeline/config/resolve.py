"""Which layers make a stage's settings.

Later layers win: stages/common.yaml < stages/<stage>.yaml < stages/algo/<algo>.yaml < the recipe's `all`
< the recipe's step < the user's config=FILE.yaml < key=value. An algorithm's YAML may begin with `like: NAME`: what it
does not say is as in that algorithm's.

Which settings stage=rl has is decided by the algorithm, see `schema.rl_record`.

A recipe is a mapping of two keys: `all`, settings for every stage that has them, and `steps`, a list of
{stage: sft, name: optional, set: {settings of this step}, scratch: {settings over those where no model is named}}.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from pipeline import plugins
from pipeline.config.aliases import ALGORITHM_IDS
from pipeline.config.schema import STAGES, rl_record
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
LIKE = ("like",)  # of an algorithm's YAML: the one that it differs from
FREE = ("algorithm", "settings")  # its keys are those of the stage's or the algorithm's own YAML


@dataclass(frozen=True)
class Resolved:
    """One stage, ready to be launched. `words` given to `resolve` again make the same."""

    stage: str
    settings: Any  # a STAGES[stage]
    words: tuple[str, ...]


@dataclass(frozen=True)
class House:
    """Where the layers lie and which stages there are, each with its records; tests build smaller ones."""

    schemas: Mapping[str, tuple[type[BaseModel], ...]] = field(default_factory=lambda: STAGES)
    folder: Path = ROOT / "stages"

    def names(self, stage: str) -> set[str]:
        """The top-level settings that `stage` has, whatever the algorithm."""
        return {name for record in self.schemas[stage] for name in record.model_fields}

    def owners(self, name: str) -> list[str]:
        """The stages that have the top-level setting `name`."""
        return [stage for stage in self.schemas if name in self.names(stage)]

    def paths(self) -> Iterator[SettingPath]:
        """Every settable path of every stage."""
        return (path for records in self.schemas.values() for record in records for path in known_paths(record))


class Step(NamedTuple):
    stage: str
    name: str | None
    settings: Layer
    scratch: Layer  # over `settings` where no model is named, so that a small new one is made


class Recipe(NamedTuple):
    everywhere: Layer
    steps: list[Step]


class Layers(NamedTuple):
    """What a stage's settings are made of."""

    record: type[BaseModel]  # says which settings there are
    shipped: Layer  # of the stage and its algorithm
    later: list[Layer]


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
        overrides = _without(overrides, _foreign(house.schemas[stage][0], stage, house)[0])
    else:
        _refuse_foreign(overrides, stage, house)
    layers = _layers(overrides, stage, house)
    _refuse_unread(layers, stage, house)
    _refuse_values_of_sections(layers.later, layers.record)
    merged = merge([layers.shipped, *layers.later])
    _check_free_keys(layers.shipped, merged)
    places = {path: leaf.place for path, leaf in merged.items()}
    return Resolved(stage, validated(layers.record, nested(merged), places), words)


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
            path = next(iter(parse_overrides([one])))
            place = next((i for i, step in enumerate(own) if path[0] in house.names(step.stage)), -1)
            _refuse_foreign(parse_overrides([one]), own[place].stage, house)
            resolve([*heads[place], one], house)
    return [resolve(step, house) for step in steps]


def reaching(head: list[str], words: list[str], house: House | None = None) -> list[str]:
    """Those of a user's `words` that the step named by `head` (stage=, recipe=, name=) has the settings of."""
    house = house or House()
    stage = head[0].partition("=")[2]
    record, shipped, _ = _layers(parse_overrides([*head, *words]), stage, house)
    fields = {*record.model_fields, *CONTROL}
    return [one for one in words if any(_reaches(path, fields, shipped) for path in parse_overrides([one]))]


def unread(words: Iterable[str]) -> set[str]:
    """The top-level settings that the stage which `words` name has with other algorithms only."""
    house, overrides = House(), parse_overrides(words)
    stage = str(word(overrides, "stage"))
    return _foreign(_layers(overrides, stage, house).record, stage, house)[1]


def word(overrides: Layer, name: str) -> str | None:
    """The value of a word such as stage= or recipe=, None if it is not there. Raises UserError if it is not text."""
    value = overrides[(name,)].value if (name,) in overrides else None
    if value is not None and not isinstance(value, str):
        raise UserError(f"{overrides[(name,)].place}: {name}={value!r}, wanted a name")
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


def _layers(overrides: Layer, stage: str, house: House) -> Layers:
    """What ships for the stage (common, stage, algorithm) merged, and the layers over it."""
    everywhere, steps, scratch = _recipe_layers(overrides, stage, house)
    file = word(overrides, "config")
    config = {} if file is None else read_layer(Path(file))
    own = {path: leaf for path, leaf in overrides.items() if path[0] not in CONTROL}
    model = merge([everywhere, *steps, config, own]).get(MODEL)
    steps += [scratch] if model is None or model.value is None else []
    shipped = merge(read_layer(house.folder / f"{name}.yaml") for name in ("common", stage))
    planned, algo = (_algo([shipped, everywhere, *steps, *more], stage, house) for more in ([], [config, own]))
    if algo is not None:
        shipped = merge([shipped, _algorithm(algo.value, f"{algo.place}: algo", house)])
        own[("algo",)] = algo
    another = None not in (planned, algo) and planned.value != algo.value
    if another:  # settings of an algorithm in a recipe are of the one that it runs
        everywhere, *steps = (_without_free(layer) for layer in (everywhere, *steps))

    # each layer without what is not meant for this stage or this algorithm; what nobody has stays, to be complained of
    record = _record(merge([shipped, everywhere, *steps, config, own]), stage, house)
    elsewhere, unread = _foreign(record, stage, house)
    shipped, everywhere = (_without(layer, elsewhere | unread) for layer in (shipped, everywhere))
    steps = [_without(layer, unread) for layer in steps] if another else steps
    return Layers(record, shipped, [everywhere, *steps, _without(config, elsewhere), own])


def _algo(layers: Iterable[Layer], stage: str, house: House) -> Leaf | None:
    """`algo` by the name of its YAML, None where the stage has none."""
    algo = merge(layers).get(("algo",)) if "algo" in house.names(stage) else None
    if algo is None or not isinstance(algo.value, str):
        return None
    return algo._replace(value=ALGORITHM_IDS.get(algo.value, algo.value))


def _algorithm(name: str, place: str, house: House, above: tuple[str, ...] = ()) -> Layer:
    """The YAML of an algorithm over that of the one it is `like`."""
    if name in above:
        raise UserError(f"{place}={name}, which is like {above[-1]} itself")
    layer = read_layer(named_file(name, house.folder / "algo", place))
    like, place = word(layer, "like"), f"{layer[LIKE].place}: like" if LIKE in layer else ""
    layer.pop(LIKE, None)
    return layer if like is None else merge([_algorithm(like, place, house, (*above, name)), layer])


def _record(merged: Layer, stage: str, house: House) -> type[BaseModel]:
    """Which of the stage's records says what settings there are."""
    records, file = house.schemas[stage], merged.get(("algorithm", "file"))
    if len(records) == 1 or file is None:
        return records[0]
    responses = plugins.constant("pipeline.algorithms", str(file.value), "RESPONSES")
    if responses is None:
        names = ", ".join(plugins.available("pipeline.algorithms", "RESPONSES"))
        raise UserError(f"{file.place}: algorithm.file: {describe(file.value)}, wanted one of {names}")
    weight = merged.get((*FREE, "weight"))
    return rl_record(responses, weight and weight.value)


def _foreign(record: type[BaseModel], stage: str, house: House) -> tuple[set[str], set[str]]:
    """The top-level settings that `record` has not: those of other stages, and those of this one's other records."""
    own = set(record.model_fields)
    elsewhere = {name for other in house.schemas if other != stage for name in house.names(other)}
    return elsewhere - own, house.names(stage) - own


def _without(layer: Layer, names: set[str]) -> Layer:
    return {path: leaf for path, leaf in layer.items() if path[0] not in names}


def _recipe_layers(overrides: Layer, stage: str, house: House) -> tuple[Layer, list[Layer], Layer]:
    """The recipe's settings for all stages, those of the one step that `overrides` mean, and its `scratch`."""
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
    return everywhere, [step.settings for step in named], merge(step.scratch for step in named)


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
        if not house.owners(setting[0]):
            near = nearest_path(setting, house.paths())
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


def _refuse_foreign(overrides: Layer, stage: str, house: House) -> None:
    """Raise UserError for a word that is a setting of other stages only."""
    for path in overrides:
        owners = house.owners(path[0])
        if owners and stage not in owners:
            found = f"{'.'.join(path)}: stage={stage} has no such setting"
            raise UserError(f"{COMMAND_LINE}: {found}; it belongs to {', '.join(owners)}")


def _refuse_unread(layers: Layers, stage: str, house: House) -> None:
    """Raise UserError for a setting that the stage has with other algorithms only."""
    names = _foreign(layers.record, stage, house)[1]
    for path, leaf in (entry for layer in layers.later for entry in layer.items()):
        if path[0] in names:
            algo = merge([layers.shipped, *layers.later])[("algo",)].value
            found = f"{'.'.join(path)}: algo={algo} has no such setting"
            raise UserError(f"{leaf.place}: {found}; it belongs to algo={', '.join(_readers(path[0], stage, house))}")


def _readers(name: str, stage: str, house: House) -> list[str]:
    """The algorithms that ship with which `stage` has the top-level setting `name`."""
    algos = sorted(file.stem for file in (house.folder / "algo").glob("*.yaml"))
    records = {algo: _layers({("algo",): Leaf(algo, "")}, stage, house).record for algo in algos}
    return [algo for algo, record in records.items() if name in record.model_fields]


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
