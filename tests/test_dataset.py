"""The splits that a stage sees: each file read once, validation cut from train by the prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config.resolve import resolve
from pipeline.data import dataset
from pipeline.data.readers import read
from pipeline.errors import UserError
from pipeline.records import Example

ROWS = [{"id": str(i), "prompt": f"p{i // 2}", "completion": f"c{i}"} for i in range(400)]  # two rows of each prompt


def data(folder: Path, *words: str, **rows: list[dict]):
    """Settings of data with a file for each split, or of a whole folder where none is named."""
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return resolve(["stage=sft", f"data.path={folder}", *words]).settings.data


def splits(*asked) -> list[list[Example]]:
    return list(dataset.splits(*asked))


def ids(rows) -> list[str]:
    return [row.id for row in rows]


def test_validation_is_cut_from_train_by_the_prompt_and_the_file_is_read_once(tmp_path, capsys) -> None:
    settings = data(tmp_path, "data.validation_fraction=0.25", "data.max_bad_rows=1", train=[*ROWS, {"prompt": ""}])
    train, validation = splits(settings, 0)
    read, cut = capsys.readouterr().out.splitlines()  # the bad row is logged once, too
    assert "400 of 401 rows" in read and f"{len(validation)} of 400 rows ({len(validation) // 2} of 200 prompts)" in cut
    assert sorted(ids(train + validation), key=int) == [row["id"] for row in ROWS]
    assert not {row.prompt for row in train} & {row.prompt for row in validation}
    assert 60 < len(validation) < 140  # 100 wanted, +-4 standard deviations of 2 sqrt(200 * 0.25 * 0.75) = 12
    for name, rows in (("train", train), ("validation", validation)):  # the same whatever else is asked for
        assert splits(settings, 1, [name]) == [rows]
    assert splits(settings, 0, ["validation", "train"]) == [validation, train]


def test_max_rows_shorten_train_before_validation_leaves_it(tmp_path) -> None:
    whole, held = splits(data(tmp_path, "data.validation_fraction=0.25", train=ROWS), 0)
    train, validation = splits(data(tmp_path, "data.validation_fraction=0.25", "data.max_rows=100"), 0)
    assert validation == held and ids(train) == [row.id for row in whole if int(row.id) < 100]


def test_a_split_with_a_file_of_its_own_is_read_alone(tmp_path) -> None:
    settings = data(tmp_path, "data.max_rows=3", train=ROWS[:9], validation=ROWS[9:14], test=ROWS[14:16])
    (tmp_path / "train.jsonl").write_text("no JSON\n")
    validation, test = splits(settings, 0, ["validation", "test"])
    assert (ids(validation), ids(test)) == (["9", "10", "11", "12", "13"], ["14", "15"])
    with pytest.raises(UserError, match=r"train\.jsonl:1: no JSON"):
        splits(settings, 0)
    data(tmp_path, train=ROWS[:9])
    assert ids(splits(settings, 0, ["train"])[0]) == ["0", "1", "2"]


def test_splits_that_are_missing_or_empty(tmp_path) -> None:
    settings = data(tmp_path, train=ROWS)
    with pytest.raises(UserError, match=r"no test split, only train: give data\.test="):
        splits(settings, 0, ["train", "test"])
    with pytest.raises(UserError, match=r"no validation split, only train: give data\.validation="):
        splits(data(tmp_path, "data.validation_fraction=0"), 0)
    with pytest.raises(UserError, match=r"the validation split has no rows, .*: one row .* give data\.validation="):
        splits(data(tmp_path, train=ROWS[:1]), 0)


@pytest.mark.parametrize("fraction", [0.0001, 0.05, 0.5, 0.9999])
@pytest.mark.parametrize(
    "rows",
    [
        [{"text": f"text {i}"} for i in range(60)],
        [{"prompt": "Translate.", "completion": f"c{i}"} for i in range(60)],
        [{"prompt": "Translate.", "completion": "c"}] * 2,  # by their ids alone
        ROWS[:60],
        ROWS[1:3],
    ],
)
def test_something_is_held_out_and_something_learned(tmp_path, rows: list[dict], fraction: float) -> None:
    train, held = splits(data(tmp_path, f"data.validation_fraction={fraction}", train=rows), 0)
    assert train and held and sorted(ids([*train, *held])) == sorted(ids(read(str(tmp_path / "train.jsonl")).examples))
    shortened = data(tmp_path, f"data.validation_fraction={fraction}", "data.max_rows=1", train=rows)
    assert [len(train) for train in splits(shortened, 0, ["train"])] == [1] and splits(shortened, 0)[1]


def test_rows_of_one_prompt_are_cut_by_row_which_is_said(tmp_path, capsys) -> None:
    rows = [{"text": f"text {i % 200}"} for i in range(400)]
    train, held = splits(data(tmp_path, "data.validation_fraction=0.25", train=rows), 0)
    assert "validation: all 400 rows have one prompt, or none: cut by row" in capsys.readouterr().out
    assert 60 < len(held) < 140 and not {row.completion for row in train} & {row.completion for row in held}


def test_the_prompt_of_fewest_rows_is_held_out_where_chance_holds_out_none(tmp_path) -> None:
    rows = [{"prompt": "most" if i % 9 else f"p{i}", "completion": f"c{i}"} for i in range(1, 20)]
    (train, held) = splits(data(tmp_path, "data.validation_fraction=0.0001", train=rows), 0)
    assert [row.prompt for row in held] in (["p9"], ["p18"]) and len(train) == 18


def test_a_task_makes_each_split(tmp_path) -> None:
    settings = resolve(["stage=sft", "task=assistant", "data.task_size=8", "data.max_rows=5"]).settings.data
    train, test = splits(settings, 0, ["train", "test"])
    assert (len(train), len(test), train[0].id, test[0].id) == (
        5,
        400,
        "assistant/train/000000",
        "assistant/test/000000",
    )
