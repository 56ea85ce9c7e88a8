"""Raw rows from every kind of file, and every way in which a file can be wrong."""

import csv
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from pipeline.data import hub
from pipeline.data.files import RawRow, raw_rows, stem
from pipeline.data.hub import HubName, folders, is_hub_name, parse
from pipeline.data.splits import split_files
from pipeline.errors import UserError

ROWS = [{"prompt": "Grüße?", "n": 1}, {"prompt": "two\nlines \u2028 and a rare end", "n": 2}]


def rows_of(path, **options):
    return [(row.line, row.columns) for row in raw_rows(str(path), **options)]


def write(folder, name, content):
    path = folder / name
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") and isinstance(content, str) else data)
    return path


LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.txt", "a.jsonl.gz", "a.json.gz", "a.JSONL"])
def test_json_lines_whatever_the_ending(tmp_path, name):
    assert rows_of(write(tmp_path, name, LINES)) == [(1, ROWS[0]), (2, ROWS[1])]


def test_blank_lines_count_but_are_no_rows_and_a_byte_order_mark_is_no_text(tmp_path):
    path = write(tmp_path, "a.jsonl", '\ufeff{"a": 1}\n\n{"a": 2}\r\n')
    assert rows_of(path) == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[\n {"a": 1},\n\n {"a":\n 2}\n]\n', [(2, {"a": 1}), (4, {"a": 2})]),
        ('[{"a": "]"}, {"a": [1]}]', [(1, {"a": "]"}), (1, {"a": [1]})]),
        ('{"version": {"data": [0]},\n "data": [\n{"a": 1},\n{"a": 2}], "end": 0}', [(3, {"a": 1}), (4, {"a": 2})]),
        ("[]", []),
        (" \n", []),
    ],
)
def test_json_arrays_give_the_line_of_each_element(tmp_path, content, expected):
    assert rows_of(write(tmp_path, "a.json", content)) == expected


def test_what_arrow_fills_calls_of_tools_up_with_is_not_there(tmp_path):
    """Two calls of different arguments: a table has both in both rows."""
    calls = [[{"role": "assistant", "arguments": {name: 1}}] for name in ("x", "y")]
    table = pyarrow.Table.from_pylist([{"messages": call, "seen": call} for call in calls])
    parquet.write_table(table, tmp_path / "a.parquet")
    rows = [row.columns for row in raw_rows(str(tmp_path / "a.parquet"))]
    assert [row["messages"] for row in rows] == calls
    assert rows[0]["seen"] == [{"role": "assistant", "arguments": {"x": 1, "y": None}}]  # of other columns nobody knows


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_parquet_rows_are_counted_from_one(tmp_path, name):
    plain = tmp_path / "plain"
    parquet.write_table(pyarrow.Table.from_pylist([*ROWS, {"prompt": "x", "n": None}]), plain)
    data = plain.read_bytes()
    path = write(tmp_path, name, gzip.compress(data) if name.endswith(".gz") else data)
    assert rows_of(path) == [(1, ROWS[0]), (2, ROWS[1]), (3, {"prompt": "x", "n": None})]


@pytest.mark.parametrize(("name", "dialect"), [("a.csv", "excel"), ("a.tsv", "excel-tab"), ("a.csv.gz", "excel")])
def test_tables_with_a_header_keep_quotes_and_line_breaks(tmp_path, name, dialect):
    plain = tmp_path / "plain"
    with plain.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, dialect).writerows([["prompt", "n"], ['say "a,\tb"\nplease', "1"], ["c", ""]])
    path = write(tmp_path, name, plain.read_text(encoding="utf-8") if name.endswith("gz") else plain.read_bytes())
    # The first row fills lines 2 and 3; an empty cell is no value.
    assert rows_of(path) == [(2, {"prompt": 'say "a,\tb"\nplease', "n": "1"}), (4, {"prompt": "c", "n": None})]


def test_a_cell_longer_than_the_csv_module_likes(tmp_path):
    path = write(tmp_path, "a.csv", "text\n" + "x" * 200_000 + "\n")
    assert len(rows_of(path)[0][1]["text"]) == 200_000


@pytest.mark.parametrize("name", ["a.tsv", "a.txt", "a.tsv.gz"])
def test_ranked_candidates_have_no_header_and_no_quoting(tmp_path, name):
    path = write(tmp_path, name, '"source\tref"\tc<#SCORE#>1\nsecond\tr\td<#SCORE#>2\n')
    first = {"data_src": '"source', "data_gt": 'ref"', "data_kd": "c<#SCORE#>1"}
    assert rows_of(path) == [(1, first), (2, {"data_src": "second", "data_gt": "r", "data_kd": "d<#SCORE#>2"})]


def test_text_between_bars(tmp_path):
    path = write(tmp_path, "a.txt", "Two\\nlines ||| Yes || no\n\nHi ||| Hello\n")
    expected = [
        (1, {"prompt": "Two\nlines", "completion": "Yes || no"}),
        (3, {"prompt": "Hi", "completion": "Hello"}),
    ]
    assert rows_of(path) == expected
    scored = write(tmp_path, "b.txt", "Hi ||| Hello ||| 3\n")
    assert rows_of(scored) == [(1, {"prompt": "Hi", "completion": "Hello", "score": "3"})]


@pytest.mark.parametrize(
    ("name", "content", "line", "error"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', 2, "no JSON (Expecting value"),
        ("a.jsonl", '{"a": 1}\n[1]\n', 2, "JSON of type list, wanted an object"),
        ("a.jsonl", "9" * 5000 + '\n{"a": 1}\n', 1, "wanted"),  # a number of 5000 digits
        ("a.json", '[{"a": 1},\n 7]', 2, "JSON of type int, wanted an object"),
        ("a.csv", "a,b\n1,2\n3\n", 3, "1 cells, wanted 2 (a, b)"),
        ("a.txt", "a ||| b ||| 1\na ||| b\n", 2, "2 cells, wanted 3 (prompt, completion, score)"),
        ("a.tsv", "s\tr\tc<#SCORE#>1\ns\tr\n", 2, "2 cells, wanted 3 (data_src, data_gt, data_kd)"),
    ],
)
def test_a_line_that_is_no_row_is_handed_on_as_a_fault(tmp_path, name, content, line, error):
    found = [row for row in raw_rows(str(write(tmp_path, name, content))) if row.error]
    assert [row.line for row in found] == [line]
    assert error in found[0].error
    assert found[0] == RawRow(line, {}, found[0].error)


BROKEN_GZIP = gzip.compress((LINES * 500).encode())
FATAL = [
    ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', "a.jsonl:2: byte 0xe9 at 8 is not UTF-8", "iconv"),
    ("a.csv", "text\nx\n".encode("utf-16"), "a.csv:1: byte 0xff at 1 is not UTF-8", "convert"),
    ("a.jsonl.gz", BROKEN_GZIP[:-12], "gzip data cut short or damaged", "fetch it again"),
    ("a.jsonl.gz", b"no gzip at all", "a.jsonl.gz:1: gzip data cut short or damaged", "fetch it again"),
    ("a.jsonl.gz", BROKEN_GZIP[:60] + b"\0\0\0\0" + BROKEN_GZIP[64:], "gzip data cut short or damaged", "fetch"),
    ("a.parquet.gz", BROKEN_GZIP[:-12], "gzip data cut short or damaged", "fetch it again"),
    ("a.parquet", b"PAR1 and nothing else", "a.parquet:1: no whole parquet file", "again"),
    ("a.json", b'[{"a": 1},\n{"a": 2}', "a.json:2: no JSON (Expecting ',' delimiter", "write the file again"),
    ("a.json", b'{"a":\n 1}', 'a.json:1: JSON of type dict without a "data" array', "wanted an array of objects"),
    ("a.json", b'"text"', 'a.json:1: JSON of type str without a "data" array', "rewrite it"),
    ("a.csv", b'a,b\n1,"2\n3,4\n', "a.csv:2: unexpected end of data", "quotes doubled and closed"),
    ("a.tsv", b'a\tb\n"one" two\t3\n', "a.tsv:2: '\t' expected after '\"'", "quotes doubled and closed"),
    ("a.csv", b"a,b,a\n1,2,3\n", "a.csv:1: the header names 'a' twice", "rename"),
    ("a.txt", b"just words\n", "a.txt:1: plain text, wanted JSON lines", '{"text": ...}'),
    ("a.xlsx", b"", "a.xlsx: unknown ending, wanted one of .jsonl,", "rename"),
    ("a.jsonl.zst", b"", "a.jsonl.zst: unknown ending", "plain or .gz"),
]


@pytest.mark.parametrize(("name", "content", "found", "cure"), FATAL)
def test_a_file_that_cannot_be_read_says_where_and_how_to_mend_it(tmp_path, name, content, found, cure):
    with pytest.raises(UserError) as caught:
        rows_of(write(tmp_path, name, content))
    assert found in str(caught.value)
    assert cure in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whole_lines_before_the_cut_are_read_and_the_cut_is_named(tmp_path):
    path = write(tmp_path, "a.jsonl.gz", BROKEN_GZIP[:-12])
    rows = raw_rows(str(path))
    assert next(rows).columns == ROWS[0]
    with pytest.raises(UserError, match=r"a\.jsonl\.gz:\d+: gzip data cut short"):
        list(rows)


def test_absent_files_and_folders(tmp_path):
    write(tmp_path, "train.jsonl", LINES)
    with pytest.raises(UserError, match=r"trian\.jsonl: no such file.*did you mean '.*train\.jsonl'"):
        raw_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(UserError, match=r"no such file.*look into .*nowhere"):
        raw_rows(str(tmp_path / "nowhere" / "x.jsonl"))
    with pytest.raises(UserError, match=r"a folder, wanted a file.*data\.train="):
        raw_rows(str(tmp_path))


def test_hub_names_are_told_from_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert is_hub_name("Anthropic/hh-rlhf")
    assert is_hub_name("Anthropic/hh-rlhf/harmless-base:test")
    for path in (
        "train",
        "train.jsonl",
        "none/train.jsonl",
        "none/train.parquet",
        "/data/train",
        "./a/b",
        "data/train",
    ):
        assert not is_hub_name(path), path
    assert parse("Anthropic/hh-rlhf/harmless-base:test") == HubName("Anthropic/hh-rlhf", "harmless-base", "test")
    assert parse("openai/summaries") == HubName("openai/summaries", None, None)
    assert parse("a/b/c@refs/convert/parquet:test") == HubName("a/b", "c", "test", "refs/convert/parquet")
    assert parse("a/b@v2:main:test") == HubName("a/b", None, "test", "v2", "main")
    assert parse("a/b:main:") == HubName("a/b", None, None, None, "main") and stem("a/b:main:test") == "a/b/main/test"
    assert folders("a/b:main:test", ["c"]) == {} and not is_hub_name("a/b:") and not is_hub_name("a/b:c:d:e")
    assert is_hub_name("a/b@refs/convert/parquet")
    assert folders("a/b@v2:test", ["c"]) == {"c": "a/b/c@v2:test"}
    assert stem("Anthropic/hh-rlhf:test") == "Anthropic/hh-rlhf/test"
    assert stem("some/where/train.jsonl.gz") == "train"


HUB_SCRIPT = """
from pipeline.data import files, hub, splits
from pipeline.errors import UserError
print([(number, row["prompt"]) for number, row in hub.rows("owner/name/part@v1:test")])
print(hub.split_names("owner/name/part"))
print([row["prompt"] for _, row in hub.rows("owner/several:one:train")], hub.split_names("owner/several:two:"))
print(hub.mark("owner/several:one:train") != hub.mark("owner/several:two:train"), hub.mark("owner/name/part@v1:test"))
for ask in (files.raw_rows, splits.split_files):
    try:
        list(ask("nobody/nothing"))
    except UserError as error:
        print(error)
several = [lambda: list(hub.rows("owner/several"))]
for ask in (lambda: list(hub.rows("owner/name/part:tset")), lambda: hub.split_names("owner/coded"), *several):
    try:
        ask()
    except UserError as error:
        print(error)
"""


def test_the_hub_library_reads_splits_and_says_when_there_is_no_network(tmp_path):
    """The library takes a local folder for a hub name, which is how its answers are tried without a network."""
    part = tmp_path / "owner" / "name" / "part"
    part.mkdir(parents=True)
    write(part, "train.jsonl", '{"prompt": "a"}\n')
    write(part, "test.jsonl", '{"prompt": "b"}\n{"prompt": "c"}\n')
    (tmp_path / "owner" / "coded").mkdir()
    write(tmp_path / "owner" / "coded", "coded.py", "wants = 'to be run'\n")
    several = tmp_path / "owner" / "several"
    several.mkdir()
    write(several, "one.jsonl", '{"prompt": "one"}\n')
    write(several, "two.jsonl", '{"prompt": "two"}\n')
    configs = [{"config_name": name, "data_files": f"{name}.jsonl"} for name in ("one", "two")]
    write(several, "README.md", f"---\nconfigs: {json.dumps(configs)}\n---\n")
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": root}
    command = [sys.executable, "-c", HUB_SCRIPT]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert lines[:2] == ["[(1, 'b'), (2, 'c')]", "['train', 'test']"]
    assert lines[2] == "['one'] ['train']" and hub.of_split("a/b:two:", "x") == hub.of_split("a/b:two", "x")
    assert re.fullmatch(r"True [0-9a-f]{16}", lines[3])
    del lines[2:4]
    for line in lines[2:4]:
        assert line.startswith("nobody/nothing: neither a local file nor readable from the hub (")
        assert line.endswith("bring the data as files with data.path= or data.train=")
    assert "tset" in lines[4]
    assert lines[5].startswith("owner/coded: neither a local file nor readable from the hub (Dataset scripts")
    assert "name its files with owner/coded@refs/convert/parquet, or bring the data" in lines[5]
    assert "name one with owner/several:CONFIG:SPLIT, or bring" in lines[6] and len(lines) == 7


def test_split_files_finds_the_words_people_use(tmp_path):
    for name in ("pairs_train.jsonl.gz", "train_notes.md", "dev.csv", "test-00000-of-00001.parquet", "latest.jsonl"):
        (tmp_path / name).touch()
    assert split_files(str(tmp_path)) == {
        "train": (str(tmp_path / "pairs_train.jsonl.gz"),),
        "validation": (str(tmp_path / "dev.csv"),),
        "test": (str(tmp_path / "test-00000-of-00001.parquet"),),
    }
    assert split_files(str(tmp_path / "dev.csv")) == {"train": (str(tmp_path / "dev.csv"),)}


def test_an_exact_name_goes_before_longer_ones(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "test_2017.jsonl"):
        (tmp_path / name).touch()
    assert split_files(str(tmp_path)) == {
        "train": (str(tmp_path / "train.jsonl"),),
        "test": (str(tmp_path / "test.jsonl"),),
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["a_train.jsonl", "b_train.jsonl"],
            r"2 files for train \(a_train.jsonl, b_train.jsonl\) among.*'\[.*/a_train",
        ),
        (
            ["train-00000-of-00002.csv", "train-1-of-3.csv"],
            r"2 files for train \(train-00000-of-00002.csv, train-1-of-3",
        ),
        (
            ["train-0-of-3.csv", "train-2-of-3.csv"],
            r"2 of the 3 shards of train \(.*\), number 1 is missing, wanted all",
        ),
        (
            ["train.jsonl", "val_a.csv", "b_dev.csv"],
            r"2 files for validation \(b_dev.csv, val_a.csv\).*data.validation=",
        ),
        (["rows.jsonl", "test.jsonl"], r"no training file among rows.jsonl, test.jsonl, wanted.*data.train="),
        (["README.md"], r"no training file among \(no data files\)"),
    ],
)
def test_a_folder_without_one_clear_training_file_is_listed(tmp_path, names, message):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}: {message}"):
        split_files(str(tmp_path))


def test_a_path_that_is_nothing():
    with pytest.raises(UserError, match=r"\./nowhere: no such file or folder.*data\.path="):
        split_files("./nowhere")
