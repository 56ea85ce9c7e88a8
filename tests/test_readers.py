"""Counting bad rows, filtering, and reading the real data sets whole."""

import json
from pathlib import Path

import pytest

from pipeline.data.readers import Filters, read
from pipeline.errors import UserError

DATA = Path(__file__).parents[2] / "shared" / "data"
SCORED, PAIR = {"prompt": "p", "completion": "c", "reward": 1}, {"prompt": "p", "chosen": "c", "rejected": "r"}
HH = "\n\nHuman: A joke\n\nAssistant:"
ALOL = {"prefix": [["<|prompter|>Hi", "<|assistant|>"]] * 2, "suffix": ["Hello", "No"], "reward": [0.5, -1]}


def write(folder, *rows, name="train.jsonl"):
    path = folder / name
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def test_several_bad_rows_are_counted_and_the_first_ones_named(tmp_path):
    bad = {**SCORED, "reward": "x"}
    path = write(tmp_path, bad, SCORED, bad, bad, "{", SCORED)
    with pytest.raises(UserError) as caught:
        read(path, max_bad_rows=3)
    one = "reward: 'x' is text, wanted a finite number"
    assert str(caught.value) == (
        f"{path}:1: {one} (4 bad rows of 6, next 3: {one}; 4: {one}); "
        "fix the data, or allow them with data.max_bad_rows=4"
    )
    result = read(path, max_bad_rows=4)
    assert [example.id for example in result.examples] == ["train/2", "train/6"]
    assert [one.split(": ")[0] for one in result.bad_rows] == [f"{path}:{line}" for line in (1, 3, 4, 5)]
    assert result.rows_read == 6


@pytest.mark.parametrize(
    ("rows", "format", "message"),
    [
        ([], None, "train.jsonl: empty, wanted at least one row"),
        (["{", "["], None, "train.jsonl:1: no JSON"),
        (
            [SCORED],
            "score",
            "data.format: 'score' is no format, wanted one of prefix_suffix,.*; did you mean 'scored'?",
        ),
        ([{"promt": "p", "answer": "a"}], None, "train.jsonl:1: columns promt, answer: no known format.*'prompt'?"),
        (
            [{"prompt": None}],
            None,
            "train.jsonl:1: prompt: null, wanted text (1 bad row of 1); no row is left",
        ),
        ([{"say": None}], None, "train.jsonl:1: columns (none): no known format.*prompt + completion + reward.*name"),
    ],
)
def test_a_file_without_rows_or_format(tmp_path, rows, format, message):
    path = write(tmp_path, *rows)
    with pytest.raises(UserError) as caught:
        read(path, format, max_bad_rows=9)
    assert all(part in str(caught.value) for part in message.split(".*"))
    assert "\n" not in str(caught.value)


FLAGGED = [
    {**PAIR, "tie": False, "abrupt": False, "source": "a"},
    {**PAIR, "tie": True, "abrupt": True, "source": "a"},
    {**PAIR, "tie": False, "abrupt": True, "source": "b", "chosen": ""},
    {**PAIR, "tie": 0, "abrupt": "False", "source": "b", "chosen": "as follows: "},
]


def test_flagged_rows_are_dropped_before_they_can_be_bad_and_are_counted(tmp_path, capsys):
    result = read(write(tmp_path, *FLAGGED), filters=Filters(exclude=("tie", "abrupt")))
    assert [example.id for example in result.examples] == ["train/1", "train/4"]
    assert result.dropped == {"tie": 1, "abrupt": 1}
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/train.jsonl: 2 of 4 rows, format preference; dropped tie 1, abrupt 1"
    ]


def test_abrupt_endings_are_dropped_when_asked_for(tmp_path):
    result = read(write(tmp_path, *FLAGGED), filters=Filters(drop_abrupt=True))
    assert [example.id for example in result.examples] == ["train/1", "train/2"]
    assert result.dropped == {"abrupt ending": 2}
    alol = write(tmp_path, ALOL, {**ALOL, "suffix": ["a", "such as:"]}, {**ALOL, "suffix": ["", "b"]})
    assert read(alol, filters=Filters(drop_abrupt=True)).dropped == {"abrupt ending": 2}
    transcripts = write(tmp_path, {"chosen": HH + " a", "rejected": HH + " b"}, {"chosen": HH, "rejected": HH + " b"})
    assert read(transcripts, filters=Filters(drop_abrupt=True)).dropped == {"abrupt ending": 1}


def test_only_the_sources_asked_for_stay(tmp_path, capsys):
    path = write(tmp_path, *(FLAGGED[i] for i in (0, 1, 3)))
    result = read(path, filters=Filters(sources=("b", "c")))
    assert [example.id for example in result.examples] == ["train/3"]
    assert result.dropped == {"source": 2}
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: 1 of 3 rows, format preference; dropped source 2; sources there are: a 2, b 1; "
        "columns not used: tie, abrupt"
    ]


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (Filters(exclude=("tei",)), ":1: exclude: no column 'tei', wanted one of prompt,.*; did you mean 'tie'?"),
        (Filters(exclude=("prompt",)), ":1: prompt: 'p' is text, wanted true or false"),
        (Filters(sources=("bb",)), ": no row of source bb, wanted one of a 2, b 1; did you mean"),
        (Filters(sources=("zzz",)), ": no row of source zzz, wanted one of a 2, b 1"),
        (Filters(exclude=("always",)), ": all rows dropped (always 3), wanted at least one row; loosen the filters"),
    ],
)
def test_filters_that_leave_nothing_or_name_nothing(tmp_path, filters, message):
    path = write(tmp_path, *({**FLAGGED[i], "always": True} for i in (0, 1, 3)))
    with pytest.raises(UserError) as caught:
        read(path, filters=filters)
    first, *rest = message.split(".*")
    assert str(caught.value).startswith(path + first)
    assert all(part in str(caught.value) for part in rest)


REAL = {
    # the counts are those of the README of the data folder
    "hh_preference/{}": ("preference", 4710, 573, 617),
    "tldr_reddit/sft_{}": ("supervised", 1553, 209, 183),
    "tldr_reddit/preference_{}": ("preference", 808, 96, 96),
    "scitldr/{}": ("supervised", 1991, 618, 618),
    "squad_qg/{}": ("supervised", 11831, 5112, 5420),
    "multi30k_de_en/{}": ("supervised", 28997, 1014, 1000),
    "tinystories/tinystories_{}": ("text", 3631, 204, 208),
}


@pytest.mark.parametrize("pattern", REAL)
def test_the_real_data_sets_are_read_whole(pattern):
    format, *counts = REAL[pattern]
    for split, count in zip(("train", "validation", "test"), counts, strict=True):
        path = DATA / f"{pattern.format(split)}.jsonl.gz"
        if not path.exists():
            pytest.skip(f"{path.name} of the shared data folder is not here")
        result = read(str(path), max_bad_rows=8)  # hh_preference: 8, 2 and 1 rows with an empty response
        assert result.format == format
        assert result.rows_read == count == len(result.examples) + len(result.bad_rows)
        assert len({example.id for example in result.examples}) == len(result.examples)
        assert bool(result.bad_rows) == (pattern == "hh_preference/{}")


def test_the_flags_of_the_real_preference_data_leave_no_bad_row():
    path = DATA / "hh_preference" / "train.jsonl.gz"
    if not path.exists():
        pytest.skip("hh_preference of the shared data folder is not here")
    result = read(str(path), filters=Filters(exclude=("tie", "abrupt")))
    # 12 ties and 385 abrupt rows, 3 of them both: 4710 - 12 - 382 = 4316
    assert result.dropped == {"tie": 12, "abrupt": 382}
    assert len(result.examples) == 4316
    sources = sorted({example.source for example in result.examples})
    assert sources == ["harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"]


def test_sources_of_a_hub_set_are_its_folders() -> None:
    from pipeline.data import hub

    assert hub.folders("Anthropic/hh-rlhf:test", ["helpful-base", "harmless-base"]) == {
        "helpful-base": "Anthropic/hh-rlhf/helpful-base:test",
        "harmless-base": "Anthropic/hh-rlhf/harmless-base:test",
    }
    assert hub.folders("Anthropic/hh-rlhf/helpful-base:test", ["helpful-base"]) == {}


@pytest.mark.parametrize("column", ["prompt", "completion", "reward"])
@pytest.mark.parametrize("line", [1, 2, 3])
def test_a_null_is_the_same_error_wherever_it_stands(tmp_path, column, line):
    rows = [{**SCORED, column: None} if i == line else SCORED for i in (1, 2, 3)]
    wanted = "a finite number" if column == "reward" else "text"
    path = write(tmp_path, *rows)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:{line}: {column}: null, wanted {wanted} (1 bad row of 3)")
    assert len(read(path, max_bad_rows=1).examples) == 2


def test_a_column_without_any_value_is_none(tmp_path):
    path = write(tmp_path, {"prompt": "p", "completion": "c", "reward": None, "chosen": None})
    assert read(path).format == "supervised"
