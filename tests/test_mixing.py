"""data.train as a list, patterns and weights: which files, in which order, with which ids, and how often rows count."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.resolve import resolve
from pipeline.data import dataset, mixing, pairs
from pipeline.data.places import files_of, id_names
from pipeline.data.prompts import unique_prompts
from pipeline.data.rows import Rows
from pipeline.data.splits import split_files
from pipeline.data.stored import copy_of
from pipeline.errors import UserError
from pipeline.launch import going_on
from pipeline.records import Example
from stages import dry_run, faults, inputs


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, prompts: list[str], first: int = 0) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": prompt, "completion": f"{name} {first + i}"} for i, prompt in enumerate(prompts)]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(*words: str):
    return resolve(["stage=sft", *words])


def rows(*words: str, seed: int = 0) -> tuple[list[Example], list[Example]]:
    train, held = dataset.splits(settings(*words).settings.data, seed)
    return train, held


def ids(some: list[Example]) -> list[str]:
    return [row.id for row in some]


def test_a_list_a_pattern_and_weights_name_files_in_their_order() -> None:
    for name in ("logs/b.jsonl", "logs/a.jsonl", "logs/old/c.jsonl", "x[1].jsonl", "x1.jsonl"):
        write(name, ["p"])
    Path("logs/folder.jsonl").mkdir()
    assert [*files_of("data.train", "logs/*.jsonl")] == ["logs/a.jsonl", "logs/b.jsonl"]
    assert [*files_of("data.train", "logs/**/*.jsonl")] == ["logs/a.jsonl", "logs/b.jsonl", "logs/old/c.jsonl"]
    assert [*files_of("data.train", "x[1].jsonl")] == ["x[1].jsonl"]  # a file of that name goes before the pattern
    assert [*files_of("data.train", ["x1.jsonl", "o/n:train", "logs/?.jsonl"])] == [
        *("x1.jsonl", "o/n:train", "logs/a.jsonl", "logs/b.jsonl")
    ]
    assert files_of("data.train", {"logs/*.jsonl": 0.5, "x1.jsonl": 2}) == {
        **{"logs/a.jsonl": 0.5, "logs/b.jsonl": 0.5},
        "x1.jsonl": 2,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("logs/*.csv", r"data.train: logs/\*.csv: no file matches, .*; in logs: a.jsonl, old/$"),
        ("lgos/*.csv", r"lgos/\*.csv: no file matches, .*; lgos is no folder; did you mean 'logs'\?"),
        (["logs/a.jsonl", "logs/*.jsonl"], "data.train: logs/a.jsonl is named twice, wanted each file once"),
        (["logs/a.jsonl", "./logs/a.jsonl"], r"data.train: ./logs/a.jsonl is logs/a.jsonl, which is named too"),
    ],
)
def test_what_names_no_file_or_one_twice(given, message: str) -> None:
    write("logs/a.jsonl", ["p"])
    Path("logs/old").mkdir()
    with pytest.raises(UserError, match=message):
        files_of("data.train", given)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.train=[]"], r"data.train: \[\] names no file"),
        (["data.train=[*.csv]"], r"is not YAML: .*; put quotes around a name that begins with \*"),
        (["data.train={}"], r"data.train: {} names no file"),
        (["data.train=3"], r"data.train: 3, wanted text or a list or a mapping"),
        (["data.train={a.jsonl: -1}"], r"data.train.a.jsonl: -1, wanted more than 0"),
        (["data.validation={a.jsonl: 1}"], r"data.validation: a mapping, but only rows to learn from have weights"),
    ],
)
def test_settings_that_cannot_be(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(*words)


def test_a_later_layer_replaces_the_files_of_an_earlier_one_and_words_come_back() -> None:
    Path("mine.yaml").write_text("data:\n  train: {a.jsonl: 1.0, b.jsonl: 0.5}\n")
    assert settings("config=mine.yaml").settings.data.train == {"a.jsonl": 1.0, "b.jsonl": 0.5}
    step = settings("config=mine.yaml", "data.train={c.jsonl: 2}")
    assert step.settings.data.train == {"c.jsonl": 2}
    assert settings("data.train_files=[o/n:train, '*.jsonl']").settings.data.train == ["o/n:train", "*.jsonl"]
    (shown,) = [line.split("  ")[1].strip("# ") for line in dry_run.changed(step) if "data.train" in line]
    assert settings(shown).settings.data == step.settings.data


def test_ids_take_as_much_of_the_path_as_tells_files_apart() -> None:
    assert id_names(["x/a.jsonl", "x/b.jsonl.gz"]) == {"x/a.jsonl": "a", "x/b.jsonl.gz": "b"}
    assert id_names(["x/a/day.jsonl", "x/b/day.csv", "x/c.txt"]) == {
        **{"x/a/day.jsonl": "a/day", "x/b/day.csv": "b/day"},
        "x/c.txt": "c",
    }
    assert id_names(["x/day.csv", "x/day.tsv"]) == {"x/day.csv": "day.csv", "x/day.tsv": "day.tsv"}


def test_rows_of_two_files_are_cut_over_the_union_and_only_train_is_weighed(capsys) -> None:
    write("a/day.jsonl", [f"p{i // 2}" for i in range(200)])
    write("b/day.csv", [])
    lines = ["question,answer", *(f"p{i},other {i}" for i in range(150))]  # of another format; p0 to p99 are in both
    Path("b/day.csv").write_text("\n".join(lines).replace("question,answer", "prompt,completion") + "\n")
    train, held = rows("data.train=[a/day.jsonl, b/day.csv]", "data.validation_fraction=0.2")
    said = capsys.readouterr().out
    assert ids(train + held).count("a/day/1") == 1 and len({*ids(train + held)}) == 350
    assert not {row.prompt for row in train} & {row.prompt for row in held}
    kept = sum(row.id.startswith("a/") for row in train)
    assert f"train: {len(train)} rows of 2 files: a/day.jsonl {kept}, b/day.csv {len(train) - kept}\n" in said
    assert f"validation: {len(held)} of 350 rows (" in said and "of 150 prompts) are held out of train by" in said
    # by hand: every row of a twice, those of b where the hash of (seed, prompt) lies below 0.3
    heavy, same = rows("data.train={a/day.jsonl: 2, b/day.csv: 0.3}", "data.validation_fraction=0.2", seed=5)
    assert same == held
    light = [row.id for row in train if row.id.startswith("b/") and mixing.place_of((5, row.prompt)) < 0.3]
    assert [one for one in ids(heavy) if one.startswith("b/")] == light and 10 < len(light) < 60
    mine = [row for row in train if row.id.startswith("a/")]
    assert ids(heavy)[:2] == [mine[0].id, f"{mine[0].id}/copy-2"] and len(heavy) == 2 * len(mine) + len(light)
    said = capsys.readouterr().out
    assert f"a/day.jsonl {2 * kept} (weight 2 of {kept}), b/day.csv {len(light)} (weight 0.3 of " in said
    assert "repeat an earlier one" not in said
    short, same = rows("data.train=[a/day.jsonl, b/day.csv]", "data.validation_fraction=0.2", "data.max_rows=100")
    assert same == held and ids(short) == [one for one in ids(train) if one in {f"a/day/{i}" for i in range(1, 101)}]


def test_a_prompt_that_is_text_in_one_file_and_a_message_in_another_is_cut_once(caplog) -> None:
    write("texts.jsonl", [f"p{i}" for i in range(40)])
    turns = [[{"role": "user", "content": f"p{i}"}, {"role": "assistant", "content": "a"}] for i in range(40)]
    Path("chats.jsonl").write_text("".join(json.dumps({"messages": one}) + "\n" for one in turns))
    train, held = rows("data.train=[texts.jsonl, chats.jsonl]", "data.validation_fraction=0.3")
    learned, tested = ({row.id.partition("/")[2] for row in some} for some in (train, held))  # line i + 1 asks p{i}
    assert len(train) + len(held) == 80 and len(learned) + len(tested) == 40 and tested
    rows("data.train=texts.jsonl", "data.validation=chats.jsonl")
    assert "validation: 40 of 40 prompts stand in train too" in caplog.text


def test_a_part_of_a_weight_keeps_rows_of_a_prompt_together() -> None:
    some = [Example(f"f/{i}", f"p{i // 4}", "c") for i in range(400)]
    counts = mixing.weighed(Rows.of(some), [1.5], 0)
    assert {*counts.tolist()} == {1, 2} and all(len({*counts[i : i + 4].tolist()}) == 1 for i in range(0, 400, 4))
    assert 30 <= int((counts[::4] == 2).sum()) <= 70  # 50 wanted, +-4 deviations of 5
    with pytest.raises(UserError, match=r"data.train: its weights leave none of 1 rows"):
        mixing.repeated(Rows.of(some[:1]), np.array([0]))


def test_copies_count_where_rows_of_a_prompt_are_taken_together() -> None:
    given = [Example("f/1", "p", "good", reward=1.0), Example("f/2", "p", "bad", reward=0.0)]
    twice = mixing.repeated(Rows.of(given), np.array([2, 2]))
    assert ids(pairs.of_scored(twice)) == ["f/1", "f/1/copy-2"]
    assert ids(unique_prompts(twice, copies=True)) == ["f/1", "f/1/copy-2"]
    assert ids(unique_prompts(twice)) == ["f/1"]
    side = copy_of(replace(given[1], id="f/1/rejected"), 2)
    assert (side.id, mixing.copy_number(side), mixing.copy_number(given[0])) == ("f/1/copy-2/rejected", 2, 1)


def test_a_tiny_file_is_cut_without_surprise(capsys) -> None:
    write("tiny.jsonl", [f"p{i % 5}" for i in range(20)])
    train, held = rows("data.train=tiny.jsonl")
    assert (len(train), len(held)) == (16, 4) and ids(train + held)[0].startswith("tiny/")
    assert re.search(
        r"validation: 4 of 20 rows \(1 of 5 prompts\) are held out of train by data.validation_fraction=0.05, at least "
        r"one is; data.validation=FILE names others",
        capsys.readouterr().out,
    )


def test_all_shards_of_a_folder_are_read_in_their_order() -> None:
    for i in (1, 0, 2):
        write(f"set/train-{i:05}-of-00003.jsonl", [f"p{i}"])
    assert [Path(file).name[6:11] for file in split_files("set")["train"]] == ["00000", "00001", "00002"]
    train, held = rows("data.path=set")
    assert sorted(ids(train + held)) == [f"train-{i:05}-of-00003/1" for i in range(3)]


def test_another_set_of_files_is_refused_on_resume_and_a_dry_run_shows_them() -> None:
    for name in ("logs/a.jsonl", "logs/b.jsonl"):
        write(name, ["p", "q"])
    step = settings("data.train=logs/*.jsonl", "model=MODEL")
    assert [*dry_run.chosen(step)] == ["# data.train: 2 files: logs/a.jsonl, logs/b.jsonl"]
    before = inputs.OF["sft"](step.settings)
    assert [*before] == ["model", "data.train logs/a.jsonl", "data.train logs/b.jsonl"]
    Path("inputs.json").write_text(json.dumps(before))
    going_on.refuse_other_inputs(Path(), before)
    write("logs/c.jsonl", ["r"])
    with pytest.raises(UserError, match=r"its data.train logs/c.jsonl is new since it was started"):
        going_on.refuse_other_inputs(Path(), inputs.OF["sft"](step.settings))
    Path("logs/c.jsonl").rename("logs/a.jsonl")
    with pytest.raises(UserError, match=r"its data.train logs/a.jsonl has changed since"):
        going_on.refuse_other_inputs(Path(), inputs.OF["sft"](step.settings))
    Path("logs/b.jsonl").unlink()
    with pytest.raises(UserError, match=r"logs/a.jsonl has changed \(and 1 more inputs have\) since"):
        going_on.refuse_other_inputs(Path(), inputs.OF["sft"](step.settings))
    assert [*inputs.OF["sft"](settings("data.train=logs/a.jsonl").settings)] == ["model", "data.train"]


def test_missing_files_are_all_told_before_a_start() -> None:
    write("a.jsonl", ["p"])
    told = faults.of([settings("data.train=[a.jsonl, gone.jsonl, lost.jsonl]")], {})
    assert [line.partition(":")[0] for line in told] == ["gone.jsonl", "lost.jsonl"]
    assert "no file matches" in "".join(faults.of([settings("data.train=*.csv")], {}))
