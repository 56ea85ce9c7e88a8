"""Which layers make a stage's settings.

Later layers win: stages/common.yaml < stages/<stage>.yaml < stages/algo/<algo>.yaml < the recipe's `all`
< the recipe's step < the user's config=FILE.yaml < key=value. Which settings stage=rl has at all is decided by its
algorithm, see `schema.rl_record`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from pipeline.config import hints
from pipeline.config.aliases import ALGORITHM_IDS
from pipeline.config.deepspeed import read_ds_config
from pipeline.config.definitions import FREE, Definitions
from pipeline.config.elsewhere import ADVICE
from pipeline.config.schema import Training
from pipeline.config.validate import SettingPath, describe, known_paths, nearest_path, validated
from pipeline.config.yaml_layers import COMMAND_LINE, Layer, Leaf, merge, nested, parse_overrides, read_layer, word
from pipeline.errors import UserError, did_you_mean

CONTROL = ("stage", "recipe", "config", "dry_run")  # words that choose layers; not settings
MODEL = ("model", "path")
DRIVERS = ("compare",)  # stages that start others: settings of other stages are for those
RATE, RATES = ("optimizer", "learning_rate"), {"full", "lora"}


@dataclass(frozen=True)
class Resolved:
    """One stage, ready to be launched. `words` given to `resolve` again make the same."""

    stage: str
    settings: Any  # one of STAGES[stage]
    words: tuple[str, ...]

    @property
    def title(self) -> str:
        """stage=reward name=helpfulness run=demo"""
        name = f" name={self.settings.name}" if self.settings.name else ""
        return f"stage={self.stage}{name} run={self.settings.run}"


class Layers(NamedTuple):
    """What a stage's settings are made of."""

    record: type[BaseModel]  # says which settings there are
    shipped: Layer  # of the stage and its algorithm
    later: list[Layer]


def resolve(words: Iterable[str], defined: Definitions | None = None) -> Resolved:
    """The settings of the one stage that `words` name. Raises UserError."""
    defined = defined or Definitions()
    words = tuple(words)
    overrides = parse_overrides(words)
    stage = _stage(overrides, defined)
    if stage in DRIVERS:
        if ("algo",) in overrides:
            raise UserError(f"{COMMAND_LINE}: algo: stage={stage} has no such setting; set algos=alol,dpo")
        overrides = _without(overrides, _foreign(defined.records[stage][0], stage, defined)[0])
    else:
        _refuse_foreign(overrides, stage, defined)
    # shipped defaults first, then what the user says; each value knows where it stands
    layers = _layers(overrides, stage, defined)
    _refuse_unread(layers, stage, defined)
    _refuse_values_of_sections(layers.later, layers.record)
    merged = _with_one_rate(merge([layers.shipped, *layers.later]))
    _check_free_keys(layers.shipped, merged, stage, defined)
    places = {path: leaf.place for path, leaf in merged.items()}
    known = defined.paths() if stage in DRIVERS else known_paths(layers.record)
    settings = validated(layers.record, nested(merged), places, known)
    if isinstance(settings, Training):
        read_ds_config(settings.train.zero)  # a mistake in it is found before any row is read
    return Resolved(stage, settings, words)


def _stage(overrides: Layer, defined: Definitions) -> str:
    """The stage that is named. Raises UserError where it is none."""
    stage = word(overrides, "stage")
    if stage in defined.records:
        return stage
    found = f"stage={stage}" if stage else "no stage="
    if said := hints.method(stage or "", "stage"):
        raise UserError(f"{COMMAND_LINE}: {found}: no such stage here{said}")
    near = did_you_mean(stage or "", defined.records)
    raise UserError(f"{COMMAND_LINE}: {found}, wanted one of {', '.join(defined.records)}{near}")


def resolve_steps(words: Iterable[str], defined: Definitions | None = None) -> list[Resolved]:
    """The steps of a recipe in order, or those of them that are of the stage which `words` name.

    Without stage= and recipe= the recipe is `demo`. A word reaches the steps whose stage has that setting, and must
    reach one. Raises UserError.
    """
    defined = defined or Definitions()
    words = tuple(words)
    overrides = parse_overrides(words)
    stage, name, recipe = (word(overrides, key) for key in ("stage", "name", "recipe"))
    if stage is None:
        recipe = recipe or "demo"
    own = [step for step in defined.recipe(recipe).steps if stage in (None, step.stage) and name in (None, step.name)]
    if stage is not None and len(own) < 2:
        return [resolve(words, defined)]
    if not own:
        raise UserError(f"{COMMAND_LINE}: name={name}, but no step of recipe {recipe} has that name")
    free = [one for one in words if one.split("=")[0] not in ("stage", "recipe", "name", "dry_run")]
    heads = [[f"stage={step.stage}", f"recipe={recipe}", *([f"name={step.name}"] if step.name else [])] for step in own]
    steps = [[*head, *reaching(head, free, defined)] for head in heads]
    # a word that no step of the recipe knows is a mistake: let its likeliest owner say so
    for one in free:
        if not any(one in step for step in steps):
            owners = defined.owners(next(iter(parse_overrides([one])))[0])
            head = next((head for head, step in zip(heads, own, strict=True) if step.stage in owners), heads[-1])
            resolve([*head, one], defined)
    return [resolve(step, defined) for step in steps]


def reaching(head: list[str], words: list[str], defined: Definitions | None = None) -> list[str]:
    """Those of a user's `words` that the step named by `head` (stage=, recipe=, name=) has the settings of."""
    defined = defined or Definitions()
    stage = head[0].partition("=")[2]
    record, shipped, _ = _layers(parse_overrides([*head, *words]), stage, defined)
    fields = {*record.model_fields, *CONTROL}
    has = lambda path: path in shipped if _is_free(path) else path[0] in fields  # noqa: E731
    return [one for one in words if any(has(path) for path in parse_overrides([one]))]


def unread(words: Iterable[str]) -> set[str]:
    """The top-level settings that the stage which `words` name has with other algorithms only."""
    defined, overrides = Definitions(), parse_overrides(words)
    stage = str(word(overrides, "stage"))
    return _foreign(_layers(overrides, stage, defined).record, stage, defined)[1]


def _layers(overrides: Layer, stage: str, defined: Definitions) -> Layers:
    """What ships for the stage (common, stage, algorithm) merged, and the layers over it."""
    everywhere, steps, scratch = _recipe_layers(overrides, stage, defined)
    file = word(overrides, "config")
    config = {} if file is None else read_layer(Path(file))
    own = {path: leaf for path, leaf in overrides.items() if path[0] not in CONTROL}
    model = merge([everywhere, *steps, config, own]).get(MODEL)
    steps += [scratch] if model is None or model.value is None else []
    shipped = defined.shipped(stage)
    planned, algo = (_algo([shipped, everywhere, *steps, *more], stage, defined) for more in ([], [config, own]))
    if algo is not None:
        shipped = merge([shipped, defined.algorithm(algo.value, f"{algo.place}: algo")])
        own[("algo",)] = algo
    another = None not in (planned, algo) and planned.value != algo.value
    if another:  # settings of an algorithm in a recipe are of the one that it runs
        everywhere, *steps = (
            {p: leaf for p, leaf in layer.items() if not _is_free(p)} for layer in (everywhere, *steps)
        )

    # each layer without what is not meant for this stage or this algorithm; what nobody has stays, to be complained of
    record = defined.record(stage, merge([shipped, everywhere, *steps, config, own]))
    elsewhere, unread = _foreign(record, stage, defined)
    shipped, everywhere = (_without(layer, elsewhere | unread) for layer in (shipped, everywhere))
    steps = [_without(layer, unread) for layer in steps] if another else steps
    return Layers(record, shipped, [everywhere, *steps, _without(config, elsewhere), own])


def _algo(layers: Iterable[Layer], stage: str, defined: Definitions) -> Leaf | None:
    """`algo` by the name of its YAML, None where the stage has none."""
    algo = merge(layers).get(("algo",)) if "algo" in defined.names([stage]) else None
    if algo is None or not isinstance(algo.value, str):
        return None
    return algo._replace(value=ALGORITHM_IDS.get(algo.value, algo.value))


def _foreign(record: type[BaseModel], stage: str, defined: Definitions) -> tuple[set[str], set[str]]:
    """The top-level settings that `record` has not: those of other stages, and those of this one's other records."""
    own = set(record.model_fields)
    elsewhere = defined.names(other for other in defined.records if other != stage)
    return elsewhere - own, defined.names([stage]) - own


def _without(layer: Layer, names: set[str]) -> Layer:
    return {path: leaf for path, leaf in layer.items() if path[0] not in names}


def _recipe_layers(overrides: Layer, stage: str, defined: Definitions) -> tuple[Layer, list[Layer], Layer]:
    """The recipe's settings for all stages, those of the one step that `overrides` mean, and its `scratch`."""
    recipe, name = word(overrides, "recipe"), word(overrides, "name")
    everywhere, steps = defined.recipe(recipe)
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


def _refuse_foreign(overrides: Layer, stage: str, defined: Definitions) -> None:
    """Raise UserError for a word that is a setting of other stages only."""
    for path in overrides:
        owners = defined.owners(path[0])
        if owners and stage not in owners and owners != ["bench"]:  # whose names nobody means elsewhere
            found = f"{'.'.join(path)}: stage={stage} has no such setting"
            meant = f"; {ADVICE[path[0]]}" if path[0] in ADVICE else ""
            raise UserError(f"{COMMAND_LINE}: {found}; it belongs to {', '.join(owners)}{meant}")


def _refuse_unread(layers: Layers, stage: str, defined: Definitions) -> None:
    """Raise UserError for a setting that the stage has with other algorithms only."""
    names = _foreign(layers.record, stage, defined)[1]
    for path, leaf in (entry for layer in layers.later for entry in layer.items()):
        if path[0] in names:
            algo = merge([layers.shipped, *layers.later])[("algo",)].value
            found = f"{'.'.join(path)}: algo={algo} has no such setting"
            raise UserError(f"{leaf.place}: {found}; it belongs to algo={', '.join(_readers(path[0], stage, defined))}")


def _readers(name: str, stage: str, defined: Definitions) -> list[str]:
    """The algorithms that ship with which `stage` has the top-level setting `name`."""
    records = {algo: _layers({("algo",): Leaf(algo, "")}, stage, defined).record for algo in defined.algorithms()}
    return [algo for algo, record in records.items() if name in record.model_fields]


def _refuse_values_of_sections(layers: Iterable[Layer], schema: type[BaseModel]) -> None:
    """Raise UserError for `train: 7`: a section holds settings and is none."""
    inside = {path[:-1]: ".".join(path) for path in known_paths(schema)}
    for path, leaf in (entry for layer in layers for entry in layer.items()):
        if path in inside and leaf.value != {}:
            wanted = f"wanted a mapping of settings such as {inside[path]}"
            raise UserError(f"{leaf.place}: {'.'.join(path)}: {describe(leaf.value)}, {wanted}")


def _with_one_rate(merged: Layer) -> Layer:
    """`learning_rate: {full: 2e-5, lora: 2e-4}` as one number: that of what is trained, all weights or adapters."""
    rates = {path[-1]: leaf for path, leaf in merged.items() if path[:-1] == RATE}
    if not rates:
        return merged
    if set(rates) != RATES:
        found = f"{'.'.join(RATE)}: with {', '.join(rates)}"
        raise UserError(f"{next(iter(rates.values())).place}: {found}, wanted one number, or both of full and lora")
    kind = "full" if merged[("model", "lora", "r")].value == 0 else "lora"
    others = {path for path in merged if path[:-1] == RATE and path[-1] != kind}
    return {RATE if path[:-1] == RATE else path: leaf for path, leaf in merged.items() if path not in others}


def _is_free(path: SettingPath) -> bool:
    """Whether it is a setting of an algorithm."""
    return path[: len(FREE)] == FREE and len(path) > len(FREE)


def _check_free_keys(base: Layer, merged: Layer, stage: str, defined: Definitions) -> None:
    """The algorithm's own settings must be among those that ship with it."""
    known = [path for path in base if _is_free(path)]
    for path, leaf in merged.items():
        if _is_free(path) and path not in known:
            place = f"{leaf.place}: {'.'.join(path)}"
            if owners := _free_owners(path, stage, defined):
                one = f"algo={merged[('algo',)].value}" if ("algo",) in merged else f"stage={stage}"
                raise UserError(f"{place}: {one} has no such setting; it belongs to {', '.join(owners)}")
            file = base[("algorithm", "file")].value if ("algorithm", "file") in base else "this one"
            names = ", ".join(".".join(one[len(FREE) :]) for one in known) or "none"
            raise UserError(f"{place}: algorithm {file} has the settings: {names}{nearest_path(path, known)}")


def _free_owners(path: SettingPath, stage: str, defined: Definitions) -> list[str]:
    """The other stages and the algorithms that have this setting of an algorithm."""
    stages = [f"stage={one}" for one in defined.records if one != stage and path in defined.shipped(one)]
    algos = [name for name in defined.algorithms() if path in defined.algorithm(name, "algo")]
    return stages + ([f"stage=rl algo={', '.join(algos)}"] if algos else [])
