"""data.streaming: the first rows of what is named and no more, the same as without it, and kept like any others."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from threading import Thread

import pyarrow
import pytest
from pyarrow import parquet

from pipeline.config.resolve import resolve
from pipeline.data import dataset, hub
from pipeline.data.rows import Rows
from pipeline.errors import UserError
from stages import faults


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows_of(name: str, count: int) -> list[dict]:
    return [{"prompt": f"{name} {i // 2}", "completion": f"c{i}", "reward": i / 8} for i in range(count)]


def write(file: str, rows: list[dict], behind: str = "") -> None:
    """JSON lines, `behind` them what is none; or parquet."""
    if file.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=4)
        return
    text = "".join(json.dumps(row) + "\n" for row in rows) + behind
    Path(file).write_bytes(gzip.compress(text.encode()) if file.endswith(".gz") else text.encode())


def splits(*words: str, folder: str | None = "cache") -> list[Rows]:
    data = resolve(["stage=sft", *words]).settings.data
    return [*dataset.splits(data, 3, folder=folder and Path(folder))]


def kept() -> dict[str, int]:
    return {place.name: place.stat().st_mtime_ns for place in Path("cache").glob("rows-*")}


@pytest.mark.parametrize("file", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_the_first_rows_are_those_of_the_whole_file(file: str) -> None:
    write(file, rows_of("p", 400))
    words = (f"data.train={file}", "data.max_rows=60", "data.validation_fraction=0.2")
    whole, held = splits(*words, folder=None)
    train, held_of_these = splits(*words, "data.streaming=true")
    assert train == whole and len(held_of_these) == 60 - len(train)
    assert [*held_of_these] == [row for row in held if int(row.id.partition("/")[2]) <= 60]
    written = kept()
    assert (
        splits(*words, "data.streaming=true")[0] == train and kept() == written and len(written) == 1
    )  # as it is kept


def test_what_stands_behind_them_is_not_read(caplog: pytest.LogCaptureFixture) -> None:
    write("a.jsonl", rows_of("a", 12))
    write("b.jsonl.gz", rows_of("b", 2000), "no row")  # of which 1,000 are looked at to know what they are
    write("c.jsonl", [], "no row")
    words = ("data.train=[a.jsonl, b.jsonl.gz, c.jsonl]", "data.validation_fraction=0")
    with pytest.raises(UserError, match=r"b\.jsonl\.gz:2001: no JSON"):
        splits(*words, "data.max_rows=20", "data.validation=a.jsonl")
    train, held = splits(*words, "data.max_rows=20", "data.streaming=true", "data.validation=a.jsonl")
    assert [row.id for row in train] == [f"a/{i}" for i in range(1, 13)] + [f"b/{i}" for i in range(1, 9)]
    assert len(held) == 12 and "train: 20 rows of 3 files: a.jsonl 12, b.jsonl.gz 8, c.jsonl 0" in caplog.messages
    assert any(line.startswith("b.jsonl.gz: 8 of 8 rows") and "read no further" in line for line in caplog.messages)
    assert len(kept()) == 3  # a.jsonl as a whole and as the stream of both splits, b.jsonl.gz as that of one


def test_rows_that_are_dropped_do_not_count() -> None:
    rows = [{**row, "tie": i % 3 == 0} for i, row in enumerate(rows_of("p", 90))]
    write("rows.jsonl", rows)
    words = ("data.train=rows.jsonl", "data.max_rows=30", "data.exclude=[tie]", "data.validation=rows.jsonl")
    assert splits(*words, "data.streaming=true")[0] == splits(*words, folder=None)[0]


def test_what_streaming_cannot_mean_is_refused() -> None:
    for words, found in {
        ("data.train=x",): "streaming is true, but max_rows is null, wanted how many rows to read",
        ("data.task=numerals", "data.max_rows=3"): "streaming is true, but task numerals makes its rows",
    }.items():
        with pytest.raises(UserError, match=found):
            splits(*words, "data.streaming=true")
    write("rows.json", rows_of("p", 4))
    step = resolve(["stage=sft", "data.train=rows.json", "data.max_rows=3", "data.streaming=true"])
    (line,) = [line for line in faults.of([step], {}) if "streaming" in line]
    assert line.startswith("rows.json: data.streaming, but such a file is read whole before its first row")


COMMIT = "ab" * 20
SENT: list[int] = []  # bytes of files


class BigHub(BaseHTTPRequestHandler):
    """As much of the hub as one data set me/big of large files needs; what is sent of them is counted."""

    protocol_version = "HTTP/1.1"
    row = json.dumps({"prompt": "p", "completion": "c" * 1000, "reward": 0.5}).encode() + b"\n"
    files = dict.fromkeys(("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"), row * 40_000)

    def log_message(self, *words: object) -> None:
        pass

    def answer(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        place = self.path.partition("?")[0]
        body = self.files.get(place.rpartition("/")[2])
        if place.endswith(f"/tree/{COMMIT}"):
            listed = [
                {"type": "file", "path": name, "size": len(one), "oid": COMMIT} for name, one in self.files.items()
            ]
            self.answer(200, json.dumps(listed).encode())
        elif body is not None:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            part = body[first : last + 1]
            SENT.append(len(part))
            self.answer(206, part, Content_Range=f"bytes {first}-{first + len(part) - 1}/{len(body)}", ETag='"e"')
        elif place in ("/api/datasets/me/big", f"/api/datasets/me/big/revision/{COMMIT}"):
            self.answer(200, json.dumps({"id": "me/big", "sha": COMMIT, "siblings": []}).encode())
        else:
            self.answer(404, b"{}", X_Error_Code="EntryNotFound")


HUB_SCRIPT = """
import json, sys
from pathlib import Path
from pipeline.config.resolve import resolve
from pipeline.data import dataset
words = ["stage=sft", "data.streaming=true", "data.max_rows=30", sys.argv[1]]
train, held = dataset.splits(resolve(words).settings.data, 1, folder=Path("cache"))
print(json.dumps([sorted(row.id for row in train + held), train[0].completion, train[0].reward]))
"""


def test_of_a_hub_set_what_is_read_is_fetched_once_and_never_kept(tmp_path: Path) -> None:
    """Its library itself, with a hub of files of 41 MB each, of which it asks for 16 MB at a time."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BigHub)
    Thread(target=server.serve_forever, daemon=True).start()
    environ = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    environ |= {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
    }
    command = [sys.executable, "-c", HUB_SCRIPT, f"data.train=me/big@{COMMIT}:train"]
    first = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    server.shutdown()
    assert first.returncode == 0, first.stderr
    ids, completion, reward = json.loads(first.stdout.splitlines()[-1])
    assert ids == sorted(f"me/big@{COMMIT}/train/{i}" for i in range(1, 31))
    assert completion == "c" * 1000 and reward == 0.5
    assert 0 < sum(SENT) < 41e6 and sum(file.stat().st_size for file in tmp_path.rglob("*")) < 1e6
    # a commit names its content for ever: what is kept serves without the hub
    words = (f"data.train=me/big@{COMMIT}:train", "data.streaming=true", "data.max_rows=30")
    again = [*chain.from_iterable(splits(*words))]
    assert sorted(row.id for row in again) == ids and len(kept()) == 1


def test_a_stream_that_breaks_off_is_told_in_one_line() -> None:
    def rows():
        yield {"prompt": "p"}
        raise OSError("no route\n to host")

    with pytest.raises(
        UserError, match=r"^a/b: the stream broke off after 1 rows \(no route to host\), wanted to read"
    ):
        [*hub._streamed("a/b", rows())]
