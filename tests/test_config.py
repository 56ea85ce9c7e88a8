"""YAML, key=value words, layers and the one-line errors of settings."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field

from pipeline.config.aliases import ALGORITHM_IDS, ALIASES, SWITCHES
from pipeline.config.definitions import Definitions
from pipeline.config.resolve import resolve, resolve_steps
from pipeline.config.schema import RL_KINDS, STAGES
from pipeline.config.yaml_layers import ROOT, Leaf, as_word, load_yaml, merge, nested, parse_overrides, read_layer
from pipeline.config.yaml_text import dump_yaml
from pipeline.errors import UserError
from pipeline.trainer.objective import objective_of


def values(*words: str) -> dict:
    return nested(parse_overrides(words))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),  # PyYAML alone reads this as text
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-3", -3),
        ("10", 10),
        ("010", "010"),  # not octal
        ("1:30", "1:30"),  # not sexagesimal
        ("2024-01-01", "2024-01-01"),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("null", None),
        ("", None),
        ("a: b # c", "a: b # c"),  # one scalar, whatever it contains
        ("*x", "*x"),
        ("[1, 2]", [1, 2]),
        ("'1'", "1"),
        ("k=v", "k=v"),
    ],
)
def test_values(text: str, value: object):
    found = values(f"seed={text}")["seed"]
    assert found == value and type(found) is type(value)


def test_overrides_reach_into_sections_and_keep_dots_of_inner_keys():
    assert values("optimizer.learning_rate=1e-5", "data.train=hh.jsonl", "x.y.z=null") == {
        "optimizer": {"learning_rate": 1e-5},
        "data": {"train": "hh.jsonl"},
        "x": {"y": {"z": None}},
    }
    assert values("reward={helpfulness: 1.0, my/brief.py: 0.2}") == {"reward": {"helpfulness": 1.0, "my/brief.py": 0.2}}


def test_aliases_and_switches():
    assert values("model=gpt2", "lr=0.1", "gpus=8", "bf16=true") == {
        "model": {"path": "gpt2"},
        "optimizer": {"learning_rate": 0.1},
        "launch": {"processes": 8},
        "train": {"precision": "bf16"},
    }
    assert values("model={revision: main}") == {"model": {"revision": "main"}}  # a mapping is the section itself


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sft"], "command line: 'sft', wanted key=value; did you mean 'stage=sft'?"),
        (["alol"], "command line: 'alol', wanted key=value; did you mean 'algo=alol'?"),
        (["--lr", "1"], "without dashes"),
        (["=1"], "wanted key=value"),
        (["lr=1", "learning_rate=2"], "command line: optimizer.learning_rate is given twice"),
        (["optimizer={learning_rate: 1}", "lr=2"], "optimizer.learning_rate is given twice"),
        (["reward={a: "], "command line: reward: '{a: ' is not YAML"),
        (["reward={a: 1, a: 2}"], "a is given twice"),
        (["reward={[a]: 1}"], "a key is a list or a mapping, wanted text"),
        (["reward=[!!int x]"], "is not YAML: invalid literal"),
        (["reward=" + "[" * 1500], "is not YAML"),
        (["reward=[\x01]"], "is not YAML: unacceptable character #x0001"),
        (["reward=\udcff"], "command line: 'reward=\\udcff' is not UTF-8"),
        (["reward=['\\ud800']", 'template.prompt="\\ud800"'], "is not UTF-8, wanted text that is"),
        (["bf16=false"], "bf16: False, wanted true; set train.precision="),
        (["gradient_accumulation_steps=2"], "is derived from other settings: set train.batch_size"),
    ],
)
def test_bad_words(words: list[str], message: str):
    with pytest.raises(UserError) as error:
        parse_overrides(words)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[INST] {prompt} [/INST]", "[INST] {prompt} [/INST]"),
        ("{prompt}", "{prompt}"),
        ("{{prompt}}", "{{prompt}}"),
        ("2024", "2024"),
        ("true", "true"),
        ('"\\n{prompt}"', "\n{prompt}"),  # whole quotes are YAML's
        ('"Yes," he said to {prompt}', '"Yes," he said to {prompt}'),
        ("'quoted'", "quoted"),
        ("", None),  # nothing given
        ("null", None),
        ("\x1b\x85\u2028\t", "\x1b\x85\u2028\t"),
    ],
)
def test_text_arrives_as_it_stands(text: str, value: str | None, tmp_path: Path) -> None:
    word = f"template.prompt={text}"
    assert values(word)["template"]["prompt"] == value
    again = as_word("template.prompt", value)  # as a comparison passes it on
    assert values(again)["template"]["prompt"] == value
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml({"prompt": value}))
    assert load_yaml(file) == {"prompt": value}


def test_any_value_is_read_back_from_its_word_and_its_file(tmp_path: Path) -> None:
    """Random values of the signs that YAML gives a meaning, under settings of every kind; the order of keys too."""
    rng = random.Random(0)
    signs = [
        *"[]{}'\"\\:,#&*!|>%@`-?~= \n\t.019ae",
        "\0",
        "\x01",
        "\x85",
        "\u2028",
        "\ufeff",
        "😀",
        "null",
        "!!int ",
        "---",
    ]
    text = lambda: "".join(rng.choices(signs, k=rng.randrange(9)))  # noqa: E731
    file = tmp_path / "any.yaml"
    for _ in range(150):
        for name, value in (
            ("template.prompt", text()),
            ("model", text()),
            ("reward", text()),
            ("reward", {text(): rng.uniform(-9, 9), "z": 1e-05, "a": None}),
            ("algos", [text(), -3, True, [text()]]),
        ):
            found = next(iter(parse_overrides([as_word(name, value)]).values())).value
            assert found == value and "\0" not in as_word(name, value)
            assert not isinstance(value, dict) or list(found) == list(value)
            file.write_text(dump_yaml({"x": value}))
            assert load_yaml(file) == {"x": value}
        for line in (f"reward={text()}", f"seed={text()}"):
            with contextlib.suppress(UserError):
                parse_overrides([line])
        file.write_text(text())
        with contextlib.suppress(UserError):
            load_yaml(file)


def test_bad_yaml_names_file_and_line(tmp_path: Path):
    file = tmp_path / "bad.yaml"
    file.write_text("a: 1\nb: [1,\nc: 2\n")
    with pytest.raises(UserError, match=r"bad\.yaml:\d: not YAML"):
        load_yaml(file)
    file.write_text("a: 1\nb: 2\na: 3\n")
    with pytest.raises(UserError, match=r"bad\.yaml:3: not YAML: a is given twice"):
        load_yaml(file)


def test_dump_reads_back(tmp_path: Path):
    mapping = {"rate": 1e-5, "texts": ["1e-5", "yes", "true", "null", "", "010", "12", "\n\nHuman: {x}"], "n": None}
    file = tmp_path / "x.yaml"
    file.write_text(dump_yaml(mapping))
    assert load_yaml(file) == mapping


# Small definitions: three stages, two algorithms, one recipe.


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Optimizer(Section):
    learning_rate: float = Field(gt=0)


class Train(Section):
    num_train_epochs: float | None
    max_steps: int | None


class Algorithm(Section):
    file: str
    settings: dict[str, float]


class Base(Section):
    run: str
    name: str | None


class Learn(Base):
    optimizer: Optimizer
    train: Train


class Improve(Learn):
    algo: str
    algorithm: Algorithm
    reward: str | dict[str, float] | None


class Show(Base):
    colour: str


FILES = {
    "common.yaml": "run: default\nname: null\noptimizer:\n  learning_rate: 1.0e-4\n"
    "train: {num_train_epochs: 1.0, max_steps: null}\n",
    "learn.yaml": "{}\n",
    "improve.yaml": "algo: alol\nreward: {a: 1.0}\noptimizer: {learning_rate: 1.0e-5}\n",
    "show.yaml": "colour: red\n",
    "algo/alol.yaml": "algorithm:\n  file: offline\n  settings: {clip: 0.9}\n",
    "algo/nll.yaml": "algorithm:\n  file: offline\n  settings: {}\n",
    "recipes/demo.yaml": "all:\n  run: demo\n  colour: blue\n"
    "steps:\n  - stage: learn\n  - stage: improve\n    name: one\n"
    "    set: {optimizer: {learning_rate: 0.5}}\n  - {stage: improve, name: two}\n  - stage: show\n",
}


@pytest.fixture
def defined(tmp_path: Path) -> Definitions:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return Definitions({"learn": (Learn,), "improve": (Improve,), "show": (Show,)}, tmp_path)


def test_later_layers_win(defined: Definitions, tmp_path: Path):
    rate = lambda *words: resolve(["stage=improve", *words], defined).settings.optimizer.learning_rate  # noqa: E731
    config = tmp_path / "mine.yaml"
    config.write_text("lr: 0.7\n")
    assert resolve(["stage=learn"], defined).settings.optimizer.learning_rate == 1e-4  # common
    assert rate() == 1e-5  # the stage
    assert rate("recipe=demo", "name=two") == 1e-5  # a step that does not say
    assert rate("recipe=demo", "name=one") == 0.5  # a step that does
    assert rate("recipe=demo", "name=one", f"config={config}") == 0.7
    assert rate("recipe=demo", "name=one", f"config={config}", "lr=0.9") == 0.9


def test_published_names_and_settings_of_algorithms(defined: Definitions):
    settings = resolve(["stage=improve", "algo=a_lol", "clip=0.5"], defined).settings
    assert (settings.algo, settings.algorithm.settings) == ("alol", {"clip": 0.5})
    assert resolve(["stage=improve", "algo=nll"], defined).settings.algorithm.settings == {}


def test_mappings_merge_except_whole_ones(defined: Definitions):
    assert resolve(["stage=improve", "reward={b: 2.0}"], defined).settings.reward == {"b": 2.0}
    one = {("a", "x"): Leaf(1, "p"), ("a", "y"): Leaf(2, "p")}
    assert nested(merge([one, {("a", "y"): Leaf(3, "q")}])) == {"a": {"x": 1, "y": 3}}
    assert nested(merge([one, {("a",): Leaf(None, "q")}])) == {"a": None}
    assert nested(merge([one, {("a",): Leaf({}, "q")}])) == {"a": {"x": 1, "y": 2}}
    assert nested(merge([{("a",): Leaf(None, "q")}, one])) == {"a": {"x": 1, "y": 2}}


def test_max_steps_takes_back_the_default_of_num_train_epochs(defined: Definitions):
    assert resolve(["stage=learn", "max_steps=5"], defined).settings.train == Train(num_train_epochs=None, max_steps=5)
    both = resolve(["stage=learn", "max_steps=5", "num_train_epochs=2.0"], defined).settings.train
    assert both == Train(num_train_epochs=2.0, max_steps=5)  # said together: the real schema complains


def test_steps_of_a_recipe(defined: Definitions):
    steps = resolve_steps(["lr=0.9", "clip=0.2", "colour=green"], defined)
    assert [step.words for step in steps] == [
        ("stage=learn", "recipe=demo", "lr=0.9"),
        ("stage=improve", "recipe=demo", "name=one", "lr=0.9", "clip=0.2"),
        ("stage=improve", "recipe=demo", "name=two", "lr=0.9", "clip=0.2"),
        ("stage=show", "recipe=demo", "colour=green"),
    ]
    assert [step.settings.run for step in steps] == ["demo"] * 4
    assert [step.settings.name for step in steps] == [None, "one", "two", None]
    assert all(resolve(step.words, defined) == step for step in steps)
    assert len(resolve_steps(["stage=improve", "recipe=demo"], defined)) == 2
    assert len(resolve_steps(["stage=improve", "recipe=demo", "name=two"], defined)) == 1
    assert len(resolve_steps(["stage=learn"], defined)) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage=learn", "lr=abc"], "command line: optimizer.learning_rate: 'abc' is text, wanted a number"),
        (["stage=learn", "lr=0"], "command line: optimizer.learning_rate: 0, wanted more than 0"),
        (["stage=learn", "lr=true"], "command line: optimizer.learning_rate: true, wanted a number"),
        (["stage=learn", "optimizer=3"], "command line: optimizer: 3, wanted a mapping"),
        (["stage=learn", "learning_rte=1"], "learning_rte: no such setting; did you mean 'learning_rate'?"),
        (["stage=learn", "optimizer.rate=1"], "command line: optimizer.rate: no such setting"),
        (["stage=learn", "lr=x", "max_steps=y"], "(and 1 more)"),
        (["stage=learn", "colour=red"], "command line: colour: stage=learn has no such setting; it belongs to show"),
        (["stage=improve", "reward={a: b}"], "command line: reward.a: 'b' is text, wanted a number"),
        (["stage=improve", "algo=alo"], "command line: algo=alo: wanted one of alol, nll, or your own .yaml file; did"),
        (["stage=improve", "algorithm.settings.clp=1"], "algorithm offline has the settings: clip; did you mean"),
        (
            ["stage=improve", "algo=nll", "clip=1"],
            "clip: algo=nll has no such setting; it belongs to stage=rl algo=alol",
        ),
        (["stage=lern"], "command line: stage=lern, wanted one of learn, improve, show; did you mean 'learn'?"),
        (["stage=learn", "recipe=dem"], "command line: recipe=dem: wanted one of demo"),
        (["stage=improve", "recipe=demo", "name=on"], "has the improve steps one, two; did you mean 'one'?"),
        (["name=three"], "command line: name=three, but no step of recipe demo has that name"),
        (["nonsense=1"], "command line: nonsense: no such setting"),
        (["stage=learn", "config=nix.yaml"], "nix.yaml: cannot be read"),
        (["stage=3"], "command line: stage=3, wanted a name"),
    ],
)
def test_mistakes_are_one_line_with_place_and_cure(defined: Definitions, words: list[str], message: str):
    with pytest.raises(UserError) as error:
        resolve_steps(words, defined)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1\noptimizer:\n  learning_rate: x\n", "mine.yaml:2: optimizer.learning_rate is given twice"),
        ("train:\n  max_steps: 1.5\n", "mine.yaml:2: train.max_steps: 1.5, wanted a whole number"),
        ("\nlearnin_rate: 3\n", "mine.yaml:2: learnin_rate: no such setting; did you mean 'learning_rate'?"),
        ("- 1\n", "mine.yaml: the file is [1], wanted a mapping"),
    ],
)
def test_mistakes_in_files_name_the_line(defined: Definitions, tmp_path: Path, text: str, message: str):
    config = tmp_path / "mine.yaml"
    config.write_text(text)
    with pytest.raises(UserError) as error:
        resolve(["stage=learn", f"config={config}"], defined)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps:\n  - stage: lern\n", r"demo\.yaml:2: stage: 'lern', wanted one of .* did you mean 'learn'\?"),
        ("steps:\n  - learn\n", r"demo\.yaml:2: 'learn', wanted \{stage: NAME"),
        ("step: []\n", r"demo\.yaml: wanted a mapping of `steps`"),
        ("all:\n  rnu: x\nsteps: [{stage: learn}]\n", r"demo\.yaml:2: rnu: no such setting; did you mean 'run'\?"),
        ("steps:\n  - stage: learn\n    set:\n      lr: x\n", r"demo\.yaml:4: optimizer\.learning_rate: 'x' is text"),
    ],
)
def test_mistakes_in_recipes_name_the_line(defined: Definitions, tmp_path: Path, text: str, message: str):
    (tmp_path / "recipes/demo.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        resolve_steps(["stage=learn", "recipe=demo"], defined)


# What ships.


def test_aliases_lead_to_settings():
    free = {".".join(path) for file in (ROOT / "stages").glob("**/*.yaml") for path in read_layer(file)}
    targets = {*ALIASES.values(), *(setting for setting, _ in SWITCHES.values())}
    assert targets <= {".".join(path) for path in Definitions().paths()} | free
    assert {f"{name}.yaml" for name in ALGORITHM_IDS.values()} <= {p.name for p in (ROOT / "stages/algo").iterdir()}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_resolves_with_its_defaults(stage: str):
    settings = resolve([f"stage={stage}"]).settings
    assert type(settings) in STAGES[stage]
    with pytest.raises(ValueError, match="frozen"):
        settings.run = "other"


@pytest.mark.parametrize("file", sorted((ROOT / "stages/algo").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_algorithm_resolves(file: Path):
    assert resolve(["stage=rl", f"algo={file.stem}"]).settings.algorithm.file


@pytest.mark.parametrize("file", sorted((ROOT / "stages/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_resolves(file: Path):
    assert resolve_steps([f"recipe={file.stem}"])


def test_a_resolved_configuration_resolves_to_itself(tmp_path: Path):
    settings = resolve(["stage=rl", "algo=r_gold", "lr=3e-6", "reward={x: 1.0}"]).settings
    file = tmp_path / "config.yaml"
    file.write_text(dump_yaml(settings.model_dump()))
    assert resolve(["stage=rl", f"config={file}"]).settings == settings


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        ([], 2e-3),  # demo's `scratch`: a small new model
        (["model=some/checkpoint"], 2e-5),  # sft.yaml's own, for a trained one
        (["learning_rate=3e-4"], 3e-4),  # the user's word wins over both
        (["model=null"], 2e-3),
    ],
)
def test_what_a_recipe_says_of_new_models_is_for_new_models(words: list[str], rate: float):
    assert resolve(["stage=sft", "recipe=demo", *words]).settings.optimizer.learning_rate == rate


def test_what_a_recipe_says_of_its_algorithm_is_for_its_algorithm():
    """A comparison runs a recipe with other algorithms, which have other settings."""
    own = resolve(["stage=rl", "recipe=questions"]).settings.algorithm.settings
    other = resolve(["stage=rl", "recipe=questions", "algo=reinforce", "algorithm.settings.alpha=2"]).settings
    assert own["rl_weight"] == 4.0
    found = other.algorithm.settings
    assert (found["alpha"], found["rl_weight"]) == (2, 1.0) and "samples" not in found
    assert not {"static", "masking"} & set(type(other).model_fields) and other.sampler.mode == "static"


# Which settings stage=rl has.


@pytest.mark.parametrize("file", sorted((ROOT / "stages/algo").glob("*.yaml")), ids=lambda path: path.stem)
def test_an_algorithm_has_the_settings_that_it_reads(file: Path):
    settings = resolve(["stage=rl", f"algo={file.stem}"]).settings
    module, algorithm, _ = objective_of(settings.algorithm)
    assert module.RESPONSES in RL_KINDS and isinstance(settings, RL_KINDS[module.RESPONSES])
    needs, found = module.needs(algorithm), settings.model_dump()
    assert ("value" in found) == needs.values
    assert ("reference_samples" in found) == needs.samples
    assert ("ratio_tolerance" in found) == needs.ref_logp


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["algo=alol", "sampler.k=4"],
            "sampler.k: algo=alol has no such setting; it belongs to algo=esrl, esrl_drop, ",
        ),
        (["algo=nll", "value.epochs=2"], "it belongs to algo=a_lol_kl, a_lol_ref_free, a_lol_seq, alol"),
        (["algo=a_lol", "mask_rate=0.2"], "masking.rate: algo=alol has no such setting; it belongs to algo=semi_offl"),
        (
            ["algo=esrl", "algorithm.file=supervised"],
            "file: 'supervised', wanted one of dpo, groups, labels, offline, online, regr",
        ),
        (["recipe=demo", "sampler.k=4"], "command line: sampler.k: algo=alol has no such setting"),
    ],
)
def test_settings_of_other_algorithms_are_refused(words: list[str], message: str):
    with pytest.raises(UserError) as error:
        resolve_steps(words if "recipe=demo" in words else ["stage=rl", *words])
    assert message in str(error.value)


def test_settings_of_other_algorithms_in_files(tmp_path: Path):
    """What another stage has is meant for that one; a step of a recipe is checked against its own algorithm."""
    file = tmp_path / "mine.yaml"
    file.write_text("masking: {rate: 0.3}\n")
    words = ["stage=rl", "algo=alol", f"config={file}"]
    assert not hasattr(resolve(words).settings, "masking")
    assert resolve([*words[:1], "algo=semi_offline", *words[2:]]).settings.masking.rate == 0.3
    file.write_text("lr: 0.1\nsampler: {k: 4}\n")
    with pytest.raises(UserError, match=r"mine\.yaml:2: sampler\.k: algo=alol has no such setting"):
        resolve(words)
    file.write_text("all: {masking: {rate: 0.3}}\nsteps:\n- stage: rl\n  set:\n    sampler: {k: 4}\n")
    recipe = ["stage=rl", f"recipe={file}"]
    with pytest.raises(UserError, match=r"mine\.yaml:5: sampler\.k: algo=alol has no such setting"):
        resolve(recipe)
    assert resolve([*recipe, "algo=dpo"]).settings.algo == "dpo"
    assert resolve([*recipe, "algo=semi_offline"]).settings.masking.rate == 0.3


def test_the_weight_decides_whether_there_are_values():
    assert resolve(["stage=rl", "algo=nll", "algorithm.settings.weight=advantage"]).settings.value.epochs == 40


def test_an_algorithm_is_like_another(defined: Definitions, tmp_path: Path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("like: alol\nlr: 0.3\n")
    settings = resolve(["stage=improve", f"algo={mine}"], defined).settings
    assert (settings.algorithm.settings, settings.optimizer.learning_rate) == ({"clip": 0.9}, 0.3)
    for text, message in (
        (f"like: {mine}\n", "which is like"),
        ("like: allol\n", "mine.yaml:1: like=allol: wanted one"),
    ):
        mine.write_text(text)
        with pytest.raises(UserError, match=message):
            resolve(["stage=improve", f"algo={mine}"], defined)
