"""Columns that no format uses: they travel with the row to rewards and written files, or it is said why not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from datetime import date
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from pipeline.data import convert, dataset, pairs, readers
from pipeline.data.prompts import unique_prompts
from pipeline.data.write import write_rows
from pipeline.errors import UserError
from pipeline.records import Example, Response
from pipeline.rewards import candidates, scoring
from tests import tiny

KEPT = {"ground_truth": "7", "tests": ["a", {"in": 1, "out": None}], "level": 2.5, "hard": True, "hint": None}
ROW = Example("a", "the cat", "sat", ("sat",), columns=KEPT)


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data(**changes: object):
    return tiny.settings("score").data.model_copy(update={"task": None, **changes})


def test_a_row_keeps_them_where_they_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = [{"prompt": "p", "completion": "c", "answer": "7"}, {"prompt": "q", "completion": "d", **KEPT}]
    path = write(tmp_path / "rows.jsonl", *given)
    assert [row.columns for row in readers.read(path, carry=True).examples] == [{"answer": "7"}, KEPT]
    assert [row.columns for row in readers.read(path).examples] == [{}, {}]
    names = "answer, ground_truth, tests, level, hard, hint"  # also those that the first row has not
    start = f"{path}: 2 of 2 rows, format supervised; columns"
    assert capsys.readouterr().out == f"{start} carried along: {names}\n{start} not used: {names}\n"


def test_those_that_cannot_travel_are_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [{"prompt": "p", "prompts": "x", "day": None, "level": 1.0, "raw": b"", "task": "t"}]
    rows.append({"prompt": "q", "prompts": "y", "day": date(2020, 1, 2), "level": math.nan, "raw": b"a", "task": "u"})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = readers.read(str(tmp_path / "rows.parquet"), carry=True)
    assert [row.columns for row in read.examples] == [{"task": "t"}, {"task": "u"}]
    no = "(JSON cannot hold it)"
    assert capsys.readouterr().out.endswith(
        "format prompts; columns carried along: task; columns not used: prompts (its name means something else to "
        f"rewards), day {no}, level {no}, raw {no}\n"
    )


def test_every_row_of_every_split_has_them(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", {"prompt": "p", "task": "maths"}, {"prompt": "q", "answer": 7})
    held = write(tmp_path / "validation.jsonl", {"prompt": "r"})
    found = [*dataset.splits(data(train=train, validation=held), 0, carry=True)]
    nothing = {"task": None, "answer": None}
    assert [[row.columns for row in rows] for rows in found] == [
        [{**nothing, "task": "maths"}, {**nothing, "answer": 7}],
        [nothing],
    ]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            "{'completions': 7}",
            "column 'completions': its name means something else to rewards, wanted a name of its",
        ),
        ("{'reward': 7}", "column 'reward': its name means something else"),
        ("{'answer': {1}}", "column 'answer': JSON cannot hold it, wanted a name of its own, and text, numbers"),
    ],
)
def test_rows_that_a_task_makes(tmp_path: Path, columns: str, said: str) -> None:
    for name, given in (("good", "{'answer': 7}"), ("odd", columns)):
        made = f"[Example('i', 'p', columns={given})]"
        code = f"from pipeline.records import Example\ndef examples(split, seed, size):\n    return {made}\n"
        (tmp_path / f"{name}.py").write_text(code)
    (rows,) = dataset.splits(data(task=f"{tmp_path}/good.py"), 0, ["train"])
    assert rows[0].columns == {"answer": 7}
    with pytest.raises(UserError, match=f"row i, {said}"):
        next(dataset.splits(data(task=f"{tmp_path}/odd.py"), 0, ["train"]))


ODD = {"score": 3, "response": "r", "messages": ["m"], "text": "t", "article": "a", "highlights": "h", "prefix": 1}


@pytest.mark.parametrize(
    ("row", "format"),
    [
        (ROW, "supervised"),
        (replace(ROW, columns=KEPT | ODD), "supervised"),
        (replace(ROW, completion=None, references=(), columns=ODD), "prompts"),
        (replace(ROW, reward=0.5, columns=ODD), "scored"),
        (replace(ROW, candidates=("x", "y"), columns=ODD), "candidates"),
        (Example("a", "p", chosen="c", rejected="r", references=("c",), columns=ODD), "preference"),
    ],
)
def test_what_is_written_is_read_back(tmp_path: Path, row: Example, format: str) -> None:
    write_rows(tmp_path / "rows.jsonl", [row])
    read = readers.read(str(tmp_path / "rows.jsonl"), carry=True)
    assert (read.examples, read.format) == ([row], format)


def test_conversions_keep_them(capsys: pytest.CaptureFixture) -> None:
    pair = Example("i", "p", chosen="c", rejected="r", chosen_reward=2.0, rejected_reward=1.0, columns=KEPT)
    two = convert.to_scored([pair], "both")
    assert [row.columns for row in (*two, *convert.to_supervised([pair]), *pairs.of_scored(two))] == [KEPT] * 4
    answers = [Response(ROW, "the cat", text, (3,), (4, 2), True) for text in ("x", "y")]
    assert [candidates.gathered(answers, n).rows[0].columns for n in (1, 2)] == [KEPT, KEPT]
    capsys.readouterr()
    first = unique_prompts([ROW, replace(ROW, columns={}), replace(ROW, prompt="q")])
    assert [row.columns for row in first] == [KEPT, KEPT]
    said = "1 of 2 prompts have rows of different columns: the first row's count\n"
    assert capsys.readouterr().out == said


def test_rewards_are_given_one_entry_per_row() -> None:
    found = scoring.reward_columns([ROW, Example("b", "q", source="s", columns={"hint": "h", "level": 1})])
    assert found == {
        "ground_truth": ["7", None],
        "tests": [KEPT["tests"], None],
        "level": [2.5, 1],
        "hard": [True, None],
        "hint": [None, "h"],
        "id": ["a", "b"],
        "source": ["", "s"],
        "references": [["sat"], []],
        "raw_prompt": ["the cat", "q"],
    }
