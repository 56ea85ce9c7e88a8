"""What a run keeps of its rows: read once, the same as from the file, complete or absent, never out of date."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.resolve import resolve
from pipeline.data import cache, convert, dataset, encoded, encoding, pairs
from pipeline.data.batching import Extent
from pipeline.data.conversations import learned
from pipeline.data.rows import Rows
from pipeline.data.stored import packed, unpacked
from pipeline.errors import UserError
from pipeline.records import Chat, Example, Message
from tests import tiny

ROWS = [{"prompt": f"p{i // 2}", "completion": f"c{i}", "reward": i / 8} for i in range(24)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, rows: list[dict]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def splits(*words: str, folder: str | None = "cache", carry: bool = False) -> list[Rows]:
    named = [] if any(word.startswith("data.train=") for word in words) else ["data.train=rows.jsonl"]
    data = resolve(["stage=sft", *named, *words]).settings.data
    return [*dataset.splits(data, 3, carry=carry, folder=folder and Path(folder))]


def entries(name: str) -> dict[str, int]:
    """The entries of a kind, and when each was written."""
    return {place.name: place.stat().st_mtime_ns for place in Path("cache").glob(f"{name}-*")}


def test_examples_come_back_as_they_were() -> None:
    turns = (Message("user", "a\n"), Message("assistant", "", '{"tool_calls": []}', weight=0, reward=0.1))
    every = [
        Example("1", "p", "c\ud800é"),  # half a surrogate, as JSON may hold
        Example("2", ""),
        Example("3", turns, Message("assistant", "x", '{"thinking": "y"}'), reward=0.1 + 0.2, turn_weight=0),
        Example("4", Chat(turns, tools="[]", arguments='{"a": 1}'), chosen="a", rejected=turns[1], margin=-0.0),
        Example("5", (), references=("r", ""), candidates=("a", "b"), candidate_rewards=(1, 0.5), source="s"),
        Example("6", "p", "", rewards={"é": 1e-300}, columns={"n": [1, {"k": None}], "t": True}, correctness=1.0),
        Example("7", "p", candidates=("a", "b"), candidate_scores={"x": (None, 2.0)}, chosen_reward=3.0),
    ]
    for row in every:
        back = unpacked(packed(row))
        assert back == row and repr(back) == repr(row)
        if not isinstance(row.prompt, str):
            assert [(one.weight, one.reward) for one in back.prompt] == [(one.weight, one.reward) for one in row.prompt]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (ROWS, ()),
        (ROWS, ("data.max_rows=7", "data.validation_fraction=0.4")),
        ([{**row, "rewards": {"good": row["reward"]}, "reward": None} for row in ROWS], ()),  # the only reward by name
        ([{**row, ("even", "odd")[i % 2]: i, "when": "x" if i else float("nan")} for i, row in enumerate(ROWS)], ()),
        (
            [
                {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]}
                for i in range(9)
            ],
            (),
        ),
        ([{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "margin": i} for i in range(9)], ()),
        (
            [
                {"prompt": f"p{i}", "candidates": [{"text": "a", "score": i}, {"text": "b", "score": 4}]}
                for i in range(9)
            ],
            (),
        ),
    ],
)
def test_rows_are_those_of_the_file_with_the_same_words_at_every_start(rows, words, caplog) -> None:
    write("rows.jsonl", rows)
    plain, said = splits(*words, folder=None, carry=True), caplog.messages[:]
    written = []
    for _ in range(2):
        caplog.clear()
        kept = splits(*words, carry=True)
        assert kept == plain and caplog.messages == said
        written.append(entries("rows"))
    assert written[0] == written[1] and len(written[0]) == 1
    for one, other in zip(kept, plain, strict=True):
        for make in (lambda some: convert.to_scored(some, "both"), convert.to_supervised):
            try:
                expected = make(other)
            except UserError as error:
                with pytest.raises(UserError, match=str(error)[:30]):
                    make(one)
                continue
            assert make(one) == expected == make(one)  # written, then read
            for fact in ("prompt", "answers", "reward", "answered"):
                assert np.array_equal(
                    make(one).column(fact), Rows.of([*expected]).column(fact), equal_nan=fact == "reward"
                )


def test_weights_copy_rows_of_the_cache() -> None:
    write("rows.jsonl", ROWS)
    write("other.jsonl", ROWS[:6])
    words = "data.train={rows.jsonl: 1.5, other.jsonl: 2}"
    assert splits(words) == splits(words, folder=None) == splits(words) and len(entries("rows")) == 2
    assert any(row.id.endswith("/copy-2") for row in splits(words)[0])


def test_a_changed_file_is_read_again_and_the_old_rows_go() -> None:
    write("rows.jsonl", ROWS)
    splits()
    before, stat = entries("rows"), os.stat("rows.jsonl")
    write("rows.jsonl", [{**row, "completion": row["completion"].upper()} for row in ROWS])
    os.utime("rows.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # of the same size and date
    assert splits()[0][0].completion == "C0" and not before.keys() & entries("rows").keys()


@pytest.mark.parametrize(
    "word",
    [
        *("data.max_bad_rows=3", "data.columns={completion: other}", "data.exclude=[tie]", "data.drop_abrupt=true"),
        *("data.sources=[s]", "data.format=supervised", "data.train=./rows.jsonl"),
    ],
)
def test_other_settings_are_other_rows(word: str) -> None:
    write("rows.jsonl", [{**row, "other": "x:", "tie": i > 20, "source": "st"[i > 9]} for i, row in enumerate(ROWS)])
    plain = splits()
    assert splits(word) == splits(word, folder=None) and splits() == plain and len(entries("rows")) == 2


def test_what_breaks_off_leaves_nothing(caplog) -> None:
    write("rows.jsonl", [*ROWS, {"prompt": "p"}])
    for _ in range(2):
        with pytest.raises(UserError, match=r"rows.jsonl:25: .*max_bad_rows=1"):
            splits()
        assert not entries("rows")
    assert len(splits("data.max_bad_rows=1")[0]) < 24


def killed_while_writing(place: Path) -> None:
    def make(writer: cache.Writer) -> dict:
        writer.batch({"prompt": [[1]], "response": [[2]], "learned": [[]], "flags": [0]})
        os._exit(9)

    cache.Cache(place, 1).entry("tokens", "who", "what", encoded.SCHEMA, make)


def test_a_killed_process_leaves_neither_an_entry_nor_a_lock() -> None:
    child = multiprocessing.get_context("fork").Process(target=killed_while_writing, args=(Path("cache"),))
    child.start()
    child.join()
    assert child.exitcode == 9 and [place.suffix for place in Path("cache").glob("tokens-*")] == [".part"]
    whole = {"prompt": [[3]], "response": [[4]], "learned": [[]], "flags": [0]}
    entry = cache.Cache(Path("cache"), 1).entry(
        "tokens", "who", "what", encoded.SCHEMA, lambda writer: writer.batch(whole) or {}
    )
    assert entry.table["prompt"].to_pylist() == [[3]] and all("." not in name for name in entries("tokens"))


def put(value: int) -> cache.Entry:
    """An entry of one row."""
    whole = {"prompt": [[value]], "response": [[4]], "learned": [[]], "flags": [0]}
    return cache.Cache(Path("cache"), 1).entry(
        "tokens", value, value, encoded.SCHEMA, lambda one: one.batch(whole) or {}
    )


def test_parts_of_other_machines_stay_while_they_are_written() -> None:
    ours, theirs, long_ago = (cache.part_of(Path("cache", f"rows-{i}")) for i in range(3))
    assert ours.name != cache.part_of(Path("cache", "rows-0")).name  # processes may share their number
    theirs, long_ago = (one.with_name(one.name.replace(f".{cache.host()}.", ".other.")) for one in (theirs, long_ago))
    for part in (ours, theirs, long_ago):
        part.mkdir(parents=True)
        (part / "data.arrow").write_bytes(b"half")
    for one in (long_ago, long_ago / "data.arrow"):
        os.utime(one, (1e9, 1e9))
    put(1)
    assert [*Path("cache").glob("*.part")] == [theirs]


def test_a_lock_that_is_a_file_goes_over_from_a_dead_holder_or_names_it(monkeypatch, caplog, recwarn) -> None:
    """On a file system without flock, as Lustre may be mounted."""

    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(cache, "PATIENCE", 0.1)
    lock = Path("cache", ".rows.lock")
    lock.parent.mkdir()
    dead = subprocess.Popen(["true"])
    dead.wait()
    lock.write_text(f"{dead.pid}\n{socket.gethostname()}\n")
    assert put(1).table.num_rows == 1 and not caplog.messages and not lock.exists()
    lock.write_text("77\nfar-away\n")
    threading.Timer(0.5, lock.unlink).start()
    assert put(2).table.num_rows == 1
    (line,) = caplog.messages
    assert (
        line
        == "cache/.rows.lock: waiting for process 77 on far-away, which reads rows: if it runs no more, remove the file"
    )


def reading(results: multiprocessing.Queue) -> None:
    results.put([row.id for row in splits()[0]])


def test_two_processes_at_once_make_one_entry() -> None:
    write("rows.jsonl", [{"prompt": f"p{i}", "completion": "c"} for i in range(20_000)])
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    both = [fork.Process(target=reading, args=(results,)) for _ in range(2)]
    for one in both:
        one.start()
    found = [results.get(timeout=60) for _ in both]
    assert found[0] == found[1] and len(found[0]) > 18_000 and len(entries("rows")) == 1


def test_a_damaged_entry_is_not_believed() -> None:
    write("rows.jsonl", ROWS)
    splits()
    (place,) = Path("cache").glob("rows-*")
    whole = (place / "data.arrow").read_bytes()
    (place / "data.arrow").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"rows-\w+: cannot be read .* remove it"):
        splits()


# tokens


def tokens(
    rows: Rows, encoder=None, made: Callable = encoding.completion_rows, user: str = "sft/train"
) -> encoded.Items:
    return encoding.encode(rows, encoder or tiny.encoder(), made, user)


def test_tokens_are_made_once_and_are_those_of_the_encoder() -> None:
    write("rows.jsonl", ROWS)
    train, _ = splits()
    items, written = tokens(train), entries("tokens")
    assert [item.rows for item in items] == [encoding.completion_rows(row, tiny.encoder()) for row in train]
    assert [item.numbers for item in items] == [{"reward": row.reward} for row in train]
    assert [item.example for item in items] == train
    assert [item.rows for item in tokens(splits()[0])] == [item.rows for item in items] and entries("tokens") == written
    some = items[3:7]
    assert [one.rows for one in some] == [items[i].rows for i in range(3, 7)] and Extent.of_each(
        some, [1]
    ) == Extent.of_each(items, [4])
    assert encoded.tokens_digest(some) == encoded.tokens_digest(tokens(Rows.of([*train[3:7]])))
    assert encoded.tokens_digest(some) != encoded.tokens_digest(items[3:6])


def test_other_words_templates_or_limits_are_other_tokens() -> None:
    write("rows.jsonl", ROWS)
    train, held = splits()
    plain, added, short = tiny.encoder(), tiny.encoder().anew(), tiny.encoder().anew()
    added.tokenizer = deepcopy(added.tokenizer)
    added.tokenizer.add_tokens(["Assistant"])
    short.max_response_length = 2
    found = [tokens(train, one) for one in (plain, added, short, tiny.encoder(system="Be kind."))]
    found.append(tokens(train, made=encoding.prompt_rows))
    assert len({one.key for one in (plain, added, short)}) == 3 and len({*map(encoded.tokens_digest, found)}) >= 4
    assert len(entries("tokens")) == 1  # that of the last: one user needs one
    tokens(held, user="sft/validation")
    assert len(entries("tokens")) == 2


def test_several_processes_make_the_same_tokens_and_stop_at_the_same_row(monkeypatch) -> None:
    monkeypatch.setattr(encoding, "LEAST", 8)
    monkeypatch.setattr(encoding, "PART", 3)
    write("rows.jsonl", ROWS)
    one, two = (tokens(splits("data.workers=1", folder="one")[0]), tokens(splits("data.workers=2", folder="two")[0]))
    assert [item.rows for item in one] == [item.rows for item in two]
    for folder in ("one", "two"):
        train, _ = splits(folder=folder)
        with pytest.raises(UserError, match=r"^rows/21: as there$"):
            tokens(train, made=not_the_last_ones)
        assert len([*Path(folder).glob("tokens-*")]) == 1


def not_the_last_ones(example: Example, encoder) -> tuple:
    if int(example.id.removeprefix("rows/")) > 20:
        raise UserError(f"{example.id}: as there")
    return encoding.completion_rows(example, encoder)


def test_turns_of_conversations_are_kept_as_rows() -> None:
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(2) for role in ("user", "assistant")]
    write("rows.jsonl", [{"messages": turns, "id": f"{i}"} for i in range(6)])
    train, plain = splits()[0], splits(folder=None)[0]
    assert learned(train, "all") == learned(plain, "all") == learned(train, "all") and len(entries("rows")) == 2
    assert learned(train, "last") == replace(plain) == train


def test_a_killed_process_that_tokenises_ends_the_start_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel kills it where memory runs out: waiting for its rows would never end."""
    monkeypatch.setattr(encoding, "PART", 1)

    def work(start: int) -> int:
        if start == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return start

    with pytest.raises(UserError, match=r"data.workers: .* died \(exit code -9\).*data.workers=1"):
        [*encoding._parts(work, 8, 2)]
    assert multiprocessing.active_children() == []


def test_what_goes_wrong_in_a_process_that_tokenises_ends_its_parent(monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setattr(encoding, "PART", 1)
    assert [*encoding._parts(lambda start: start * 2, 5, 3)] == [0, 2, 4, 6, 8]
    with pytest.raises(RuntimeError, match="a process that tokenises rows failed: its own traceback stands above"):
        [*encoding._parts(lambda start: 1 // (3 - start), 5, 2)]
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_processes_that_tokenise_end_where_their_parent_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PART", 1)
    ended, alive = multiprocessing.Pipe(duplex=False)  # its end is read once nobody holds `alive` any more

    def parent() -> None:
        for _ in encoding._parts(lambda start: bytes(1 << 17), 1000, 3):
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=parent)
    process.start()
    alive.close()
    process.join()
    assert ended.poll(10)
    with pytest.raises(EOFError):
        ended.recv()


@pytest.mark.parametrize("folder", [None, "cache"])
def test_pairs_and_scored_rows_with_other_columns_are_judged_together(folder: str | None) -> None:
    """The pairs become new rows, which hold the columns themselves; the scored ones stay as they are."""
    write("pairs.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b", "topic": "x"}])
    write("scored.jsonl", [{"prompt": "q", "completion": "c", "reward": 0.5, "place": "y"}])
    parts = splits("data.train=pairs.jsonl", "data.validation=scored.jsonl", folder=folder, carry=True)
    train, held_out = (convert.to_scored(rows, "both") for rows in parts)
    assert [row.columns for row in train + held_out] == [
        *[{"topic": "x", "place": None}] * 2,
        {"topic": None, "place": "y"},
    ]


# rows that are made anew


def test_rows_keep_rewards_that_are_given_them_through_all_that_is_done_with_rows() -> None:
    write("rows.jsonl", ROWS)
    plain, held = splits("data.validation_fraction=0.4")
    values = np.arange(len(plain)) / 4
    values[3] = np.nan
    rows = plain.with_rewards(values)
    wanted = [replace(row, reward=None if i == 3 else i / 4) for i, row in enumerate(plain)]
    assert rows == wanted and plain[0].reward == 0.0 and rows.cache is not None
    assert rows[2:9] == wanted[2:9] and rows.take(values > 2) == [row for row in wanted if (row.reward or 0) > 2]
    assert [row.reward for row in rows.repeated(np.arange(len(rows)) % 3)][:3] == [0.25, 0.5, 0.5]
    assert rows + held == [*wanted, *held] and held + rows == [*held, *wanted]
    for some in (rows, rows + held, rows[2:9], Rows.of([*plain]).with_rewards(values)):
        assert np.array_equal(some.column("reward"), Rows.of([*some]).column("reward"), equal_nan=True)
    assert rows.key != plain.key != rows.with_rewards(values + 1).key
    assert [*rows.made("same", lambda some: some)] == wanted  # written, then read


def best_and_worst(rows: list[Example]) -> list[tuple[str, str, float]]:
    """What pairs are to be made of: completions and margin, of scored rows by prompt."""
    groups: dict[str, list[Example]] = {}
    for row in rows:
        groups.setdefault(row.prompt, []).append(row)
    ordered = [sorted(group, key=lambda row: -row.reward) for group in groups.values()]
    ends = [(group[0], next(row for row in group if row.reward == group[-1].reward)) for group in ordered]
    return [
        (best.completion, worst.completion, best.reward - worst.reward)
        for best, worst in ends
        if best.reward > worst.reward and best.completion != worst.completion
    ]


@pytest.mark.parametrize("folder", [None, "cache"])
def test_pairs_of_scored_rows_are_the_best_and_the_worst_of_each_prompt(folder: str | None, caplog) -> None:
    chance = np.random.default_rng(5)
    rows = [
        {"prompt": f"p{chance.integers(60)}", "completion": f"c{chance.integers(4)}", "reward": int(chance.integers(5))}
        for _ in range(200)
    ]
    write("rows.jsonl", rows)
    train, _ = splits("data.validation_fraction=0.05", folder=folder)
    for _ in range(2):
        caplog.clear()
        made = pairs.paired(train)
        assert [(row.chosen, row.rejected, row.margin) for row in made] == best_and_worst([*train])
        (line,) = [line for line in caplog.messages if "made of scored rows" in line]
        assert line.startswith(f"pairs: {len(made)} made of scored rows, 0 given, ") and 30 < len(made) < 60
    assert len(entries("rows")) == (0 if folder is None else 2)
