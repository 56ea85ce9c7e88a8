"""What is said of odd rows, and that nothing is changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config.resolve import resolve
from pipeline.data import dataset, pairs
from pipeline.data.readers import read
from pipeline.records import Example

ROW = {"prompt": "p", "completion": "c"}


def written(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_repeated_rows_empty_cells_and_shared_prompts_are_said(tmp_path, capsys) -> None:
    train = [ROW, ROW, {**ROW, "completion": "NaN"}, {"prompt": "None of them?", "completion": "d"}]
    words = [f"data.train={written(tmp_path / 'a.jsonl', *train)}"]
    words += [f"data.validation={written(tmp_path / 'b.jsonl', ROW, {**ROW, 'prompt': 'q'})}"]
    learned, held_out = dataset.splits(resolve(["stage=sft", *words]).settings.data, 0)
    assert (len(learned), len(held_out)) == (4, 2)
    said = "".join(capsys.readouterr())
    assert "train: 1 of 4 rows repeat an earlier one" in said
    assert "train: 1 texts are 'NaN' and nothing else" in said
    assert "validation: 1 of 2 prompts stand in train too" in said
    assert said.count("rows repeat") == 1


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({**ROW, "label": False}, ""),
        ({**ROW, "context": "about"}, "context (prompts are without it"),
        ({"instruction": "p", "context": "about", "response": "c"}, ""),
        ({**ROW, "correctness": 4}, "correctness (it is read of pairs alone)"),
        ({**ROW, "id": "x", "topic": "t"}, ""),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "correctness": 1}, ""),
    ],
)
def test_what_bears_on_learning_and_is_not_read_is_said(tmp_path, caplog, row: dict, found: str) -> None:
    read(written(tmp_path / "a.jsonl", row))
    lines = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == bool(found) and all("not read, though it bears on what is learned" in line for line in lines)
    assert not found or found in lines[0]


def test_pairs_whose_numbers_contradict_their_order_are_said(caplog) -> None:
    plain = Example("a", "p", chosen="c", rejected="r")
    numbers = [
        {"chosen_reward": 1.0, "rejected_reward": 2.0},
        {"margin": -0.5},
        {"margin": 0.0},
        {"chosen_reward": 1.0},
    ]
    rows = [plain, *(Example("b", "p", chosen="c", rejected="r", **one) for one in numbers)]
    assert pairs.paired(rows) == rows
    assert "pairs: 2 of 5 have a lower reward for chosen than for rejected, or a margin below 0" in caplog.text
