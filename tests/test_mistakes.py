"""Every bad input: one line that names the place, what was found, what was wanted and the cure; and nothing is lost."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pipeline import errors
from pipeline.config.aliases import ALIASES
from pipeline.config.resolve import resolve_steps
from pipeline.config.yaml_layers import ROOT
from pipeline.errors import UserError
from pipeline.launch.launcher import command, free_port
from stages import faults
from tests.mistakes import Mistake, answers, judge, lines, pairs
from tests.mistakes_in_data import DATA
from tests.mistakes_in_models import MODELS, REWARDS, SYSTEM
from tests.mistakes_in_pairs import PAIRS
from tests.mistakes_in_settings import CONFIGURATION

TABLE: list[Mistake] = [*CONFIGURATION, *DATA, *PAIRS, *MODELS, *REWARDS, *SYSTEM]

WAIT = 300  # seconds that a process of its own may take on a busy machine; 10 on an idle one
LENGTHS = ["max_prompt_length=48", "max_response_length=48"]
DATA_WORDS = ["task=assistant", "data.task_size=96", *LENGTHS]
SMALL = [f"model.scratch.{size}" for size in ("hidden_size=32", "num_layers=2", "num_heads=2")]
STEP = ["batch_size=16", "eval.max_rows=12", "eval.num_samples=2", "max_steps=1"]
SHORT = ["max_new_tokens=12"]
VALUES = ["value.targets=data", "value.epochs=1"]  # of the default, algo=alol
SAME = 16  # characters that what is said early has at least in common with what the stage says
EARLY: dict[str, bool] = {}  # by mistake: whether it was told before the stage began
SOUND = {  # words with which a stage goes through, if its model is there
    "sft": [*DATA_WORDS, *SMALL, *STEP, *SHORT],
    "reward": [*DATA_WORDS, *SMALL, *STEP, "name=helpfulness"],
    "rl": [*DATA_WORDS, *STEP, *SHORT, *VALUES],
    "score": DATA_WORDS,
    "generate": [*DATA_WORDS, *SHORT, "max_rows=4", "splits=[validation]"],
    "evaluate": [*DATA_WORDS, *SHORT, "max_rows=4", "split=validation"],
    "report": [],
    "plan": [*DATA_WORDS, *SMALL],
}


def words_of(stage: str, runs: Path, own: list[str]) -> list[str]:
    """The user's own words, and of the sound ones those that they do not replace."""
    name = lambda word: ALIASES.get(word.split("=")[0], word.split("=")[0])  # noqa: E731
    given = {name(word) for word in own}
    if given & {"data.train", "data.path"} and "data.task" not in given:
        given |= {"data.task", "data.task_size"}
    if "algo" in given:
        given |= {name(word) for word in VALUES}
    sound = [f"runs_dir={runs}", *SOUND[stage]]
    return [f"stage={stage}", *(word for word in sound if name(word) not in given), *own]


def start(words: list[str]) -> None:
    """What the command line does, in this process: resolve, find the command, run the stage.

    Raises UserError, also for what the machine refuses, as `entry.leave` tells it.
    """
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    for step in resolve_steps(words):
        command(step.settings.launch, step.stage, step.words, environ)
        try:
            importlib.import_module(f"stages.{step.stage}").main(step.settings, list(step.words))
        except (OSError, RuntimeError) as error:
            mistake = errors.as_user_error(error)
            if mistake is None:
                raise
            raise mistake from error


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run with an SFT model and a reward model, which no mistake may change."""
    runs = tmp_path_factory.mktemp("sound")
    start(words_of("sft", runs, []))
    start(words_of("reward", runs, []))
    before = bytes_below(runs)
    yield runs / "default"
    assert bytes_below(runs) == before


def bytes_below(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def prepared(mistake: Mistake, here: Path, sound: Path) -> list[str]:
    """The mistake's files, made in `here`, and its words with the places in them."""
    for name, content in mistake.files.items():
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path, sound)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    places = {"HERE": here, "SFT": sound / "sft" / "model", "SCORER": sound / "reward" / "helpfulness" / "model"}
    own = shlex.split(mistake.words)
    for name, place in places.items():
        own = [word.replace(name, str(place)) for word in own]
    return words_of(mistake.stage, here / "runs", own)


@pytest.mark.parametrize("mistake", TABLE, ids=[mistake.name for mistake in TABLE])
def test_a_mistake_is_one_line_and_costs_nothing(mistake: Mistake, tmp_path: Path, sound: Path) -> None:
    words = prepared(mistake, tmp_path, sound)
    before = bytes_below(tmp_path)
    early = told_early(words)
    assert bytes_below(tmp_path) == before
    with pytest.raises(UserError) as raised:
        start(words)
    assert not early or any(one[:SAME] == str(raised.value)[:SAME] for one in early), f"{early}, then {raised.value}"
    EARLY[mistake.name] = bool(early)
    line = str(raised.value)
    assert "\n" not in line
    parts = [part.replace("HERE", re.escape(str(tmp_path))) for part in mistake.says]
    assert re.search(".*".join(parts), line), f"{line!r} does not say {parts}"
    after = bytes_below(tmp_path)
    assert before.items() <= after.items()  # what was there is as it was
    made = [Path(name) for name in after.keys() - before.keys()]
    halves = [path for path in made if path.name == "results.json" or path.suffix in (".part", ".tmp")]
    halves += [path for path in made if {"model", "model.part", "best.part"} & set(path.parts)]
    assert not halves


def told_early(words: list[str]) -> list[str]:
    """What the command line says before it starts a process."""
    try:
        return faults.of(resolve_steps(words), {})
    except UserError as error:
        return [str(error)]


def test_most_mistakes_are_told_before_anything_is_imported() -> None:
    """The others need a model, all rows, or a user's code to be run."""
    if len(EARLY) == len(TABLE):  # else some were deselected
        assert sum(EARLY.values()) > len(TABLE) / 2, [name for name, early in EARLY.items() if not early]


def test_the_table_is_long_and_reaches_every_stage() -> None:
    assert len(TABLE) >= 60 and len({mistake.name for mistake in TABLE}) == len(TABLE)
    assert {mistake.stage for mistake in TABLE} == set(SOUND)


# What is allowed is done, and counted where something is left out.


def test_what_is_cut_and_what_teaches_nothing_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twins = [{**row, "rejected": row["chosen"]} if i == 3 else row for i, row in enumerate(pairs())]
    (tmp_path / "rows.jsonl").write_text(lines(twins))
    own = [f"data.train={tmp_path / 'rows.jsonl'}", "data.validation_fraction=0.3", "max_response_length=2"]
    start(words_of("reward", tmp_path / "runs", own))
    printed = capsys.readouterr().out
    # 40 pairs of 20 prompts, some of which are held out; "Put it in water." never fits into two tokens, nor does "No."
    rows = int(re.search(r"train: (\d+) rows", printed)[1])
    assert f"0 prompts and {2 * rows} responses cut" in printed
    assert re.search(r"pairs: 1 of \d+ have the same text as chosen and rejected", printed)


def test_a_reward_may_talk_and_take_its_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = "import time; time.sleep(0.2); print('hello'); return [1.0] * len(completions)"
    (tmp_path / "judge.py").write_text(judge(body)["judge.py"])
    start(words_of("score", tmp_path, [f"reward={tmp_path / 'judge.py'}", "data.task_size=20", "splits=[train]"]))
    assert "hello" in capsys.readouterr().out
    assert json.loads((tmp_path / "default/score/results.json").read_text())["train"]["rows"] == 20


def test_rewards_that_only_some_rows_have_do_not_disturb_fine_tuning(tmp_path: Path) -> None:
    rows = [{**row, "reward": 1.0} if i % 2 else row for i, row in enumerate(answers())]
    (tmp_path / "rows.jsonl").write_text(lines(rows))
    start(words_of("sft", tmp_path, [f"data.train={tmp_path / 'rows.jsonl'}", "data.validation_fraction=0.3"]))
    assert (tmp_path / "default/sft/results.json").is_file()


def test_a_mended_command_goes_through_where_the_mistaken_one_stood(tmp_path: Path) -> None:
    """Nothing was begun, so nothing has to be removed."""
    with pytest.raises(UserError, match=r"train\.batch_size: 16 is no multiple"):
        start(words_of("sft", tmp_path, ["micro_batch_size=3"]))
    start(words_of("sft", tmp_path, ["micro_batch_size=4"]))
    with pytest.raises(UserError, match=r"was started with train\.batch_size=16, now it is 8: go back, choose"):
        start(words_of("sft", tmp_path, ["micro_batch_size=4", "batch_size=8"]))
    assert (tmp_path / "default/sft/model/config.json").is_file()


# The machine.


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses to let any file grow beyond `size` bytes, as a full disk or a quota would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "place"),
    [
        (1_000, r"config\.yaml|command\.txt|inputs\.json"),
        (50_000, r"best\.part"),
        (400_000, "weights cannot be written"),
    ],
)
def test_a_disk_that_is_full_is_one_line_and_half_a_file_is_none(tmp_path: Path, size: int, place: str) -> None:
    """Notes, the exported model, a checkpoint (with Adam's moments three times the model): each stops there once."""
    words = words_of("sft", tmp_path, ["max_steps=3", "train.save_steps=1"])
    with pytest.raises(UserError, match=rf"({place}).*wanted room: free some") as raised, files_of_at_most(size):
        start(words)
    assert "\n" not in str(raised.value)
    stage = tmp_path / "default" / "sft"
    assert not (stage / "results.json").exists() and not (stage / "model").exists()
    assert not (stage / "checkpoints" / "latest").exists()
    start(words)  # there is room again: the same command goes to the end
    assert json.loads((stage / "results.json").read_text())["steps"] == 3
    assert not [path for path in stage.rglob("*") if ".part" in path.name or path.suffix == ".tmp"]


def test_a_small_file_system_that_runs_full(tmp_path: Path) -> None:
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", tmp_path], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"mounting a file system is not allowed here: {made.stderr.decode().strip()}")
    try:
        with pytest.raises(UserError, match=r"wanted room: free some"):
            start(words_of("sft", tmp_path, ["max_steps=3", "train.save_steps=1"]))
        assert not list(tmp_path.rglob("results.json")) and not list(tmp_path.rglob("latest"))
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_port_that_is_taken_is_told_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"launch\.master_port: {port} cannot be had .*leave it out"):
            start(words_of("sft", tmp_path, ["gpus=2", f"master_port={port}"]))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device, wanted room"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a: Permission denied, wanted a place that may be"),
        (RuntimeError("[enforce] PytorchStreamWriter failed writing file data/0: file write failed"), "wanted room"),
        (FileNotFoundError(errno.ENOENT, "No such file", "ours"), None),
        (RuntimeError("shapes do not match"), None),
    ],
)
def test_the_machines_errors_are_explained_and_ours_are_not_hidden(error: OSError, expected: str | None) -> None:
    mistake = errors.as_user_error(error)
    assert (mistake is None) if expected is None else (expected in str(mistake))


# The real command line: exit codes, one line on stderr, no traceback.


def line_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of ours on stderr; exit code 2 and no traceback."""
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    ours = [line for line in done.stderr.splitlines() if line.startswith("tiffin: ")]
    assert len(ours) == 1, done.stderr
    return ours[0]


def started(module: str, words: list[str], **environ: str) -> subprocess.Popen[str]:
    """`python -m module` as a user starts it, outside of this process's own group of ranks."""
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    own |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", **environ}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", module, *words], env=own, **pipes)


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """What became of it; it is killed where it does not end."""
    try:
        out, err = process.communicate(timeout=WAIT)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_the_command_line_ends_with_2_for_a_bad_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(lines(answers()) + '{"prompt": "a"}\n')
    done = ended(started("stages", words_of("sft", tmp_path / "runs", [f"data.train={tmp_path / 'rows.jsonl'}"])))
    assert "rows.jsonl:41: completion (or response): missing" in line_of(done)


def test_a_reward_that_fails_on_the_second_rank_ends_both(tmp_path: Path) -> None:
    """By itself, with no launcher that kills the rest: then the second has its own line, which says whose it is."""
    code = "import os; return [1 / (1 - int(os.environ['RANK'])) for _ in completions]"
    (tmp_path / "judge.py").write_text(judge(code)["judge.py"])
    words = words_of("score", tmp_path, [f"reward={tmp_path / 'judge.py'}", "data.task_size=20", "splits=[train]"])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [started("stages.score", words, RANK=rank, LOCAL_RANK=rank, **group) for rank in ("0", "1")]
    first, second = [ended(process) for process in ranks]
    assert "ZeroDivisionError" in line_of(first)
    assert line_of(second) == line_of(first).replace("tiffin: ", "tiffin: rank 1: ")
    assert not list(tmp_path.rglob("results.json"))


def test_interrupting_a_training_ends_with_130_and_loses_no_checkpoint(tmp_path: Path) -> None:
    latest = tmp_path / "default" / "sft" / "checkpoints" / "latest"
    own = ["max_steps=5000", "train.save_steps=1", "train.eval_steps=5000"]
    process, begin = started("stages", words_of("sft", tmp_path, own)), time.monotonic()
    while process.poll() is None and not latest.is_file() and time.monotonic() - begin < WAIT:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    done = ended(process)
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr[-2000:]
    newest = latest.parent / latest.read_text().strip()
    assert (newest / "state.json").is_file()
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("tiffin: ")]
    assert re.match(r"tiffin: stopped by Ctrl-C after step \d+ of 5,000: ", said)
    assert said.endswith(f"{newest} is saved; the same command goes on from there")


def test_interrupting_a_recipe_says_what_is_not_started(tmp_path: Path) -> None:
    """Here while the first stage, a process of its own, imports torch."""
    process = started("stages", ["recipe=demo", f"runs_dir={tmp_path}"])
    while not (children := psutil.Process(process.pid).children()) or "stages.sft" not in children[0].cmdline():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    done = ended(process)
    assert done.returncode == 130
    assert done.stderr.splitlines() == [
        "tiffin: stopped by Ctrl-C: nothing is saved yet (save_steps=200): the same command starts again",
        "tiffin: 5 later steps not started",
    ]
