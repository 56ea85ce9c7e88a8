"""The reward server: the same values as without it, one clear line for what it refuses, no packages of training."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline.config.reward_spec import TOKEN
from pipeline.config.rewards import HttpSettings
from pipeline.errors import UserError
from pipeline.plugins import available
from pipeline.rewards.http import connect
from reward_models import chrf
from reward_models.serve import main, options_of, server_of

ROOT = Path(__file__).resolve().parent.parent
HOW = HttpSettings(
    batch_size=2, concurrency=3, timeout=10.0, retries=0, backoff=0.0, max_request_mb=9.0, max_answer_mb=9.0
)


@contextmanager
def serving(*words: str) -> Iterator[int]:
    """The port of a server made with `words`."""
    with server_of([*words, "port=0"]) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def at(port: int) -> str:
    return f"http://127.0.0.1:{port}/"


def ask(port: int, body: bytes, method: str = "POST", **headers: str) -> tuple[int, dict]:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, "/", body, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def judge(folder: Path, body: str) -> str:
    """A user's file with a reward that does `body`; its path."""
    file = folder / "judge.py"
    file.write_text(f"def other(prompts, completions, **columns):\n    {body}\n")
    return f"{file}:other"


def test_a_reward_of_ours_gives_what_it_gives_here():
    prompts, texts = ["a", "b", "c"], ["the cat sat", "a dog", "nothing"]
    references = [["the cat sat down"], ["the dog", "a dog"], ["else"]]
    with serving("reward=chrf") as port:
        served = connect(at(port), HOW)
        found = served(prompts=prompts, completions=texts, references=references)
        assert found == chrf.reward(prompts, texts, references=references)
        assert found[1] == 1.0  # the text is one of its references
        assert ask(port, b"", "GET") == (200, {"serves": "chrf"})


def test_a_file_of_a_user(tmp_path):
    file = judge(tmp_path, "return [len(c) + len(r) for c, r in zip(completions, columns['references'])]")
    with serving(f"reward={file}") as port:
        assert connect(at(port), HOW)(prompts=["p"], completions=["abc"], references=[["x", "y"]]) == [5.0]


REFUSED = [
    (b"{", 400, "the body is no JSON"),
    (b"[" * 10**5, 400, "the body is no JSON"),
    (b"[1]", 400, "wanted a JSON object of columns, each a list"),
    (b'{"prompts": "a"}', 400, "wanted a JSON object of columns, each a list"),
    (b'{"prompts": ["a"]}', 400, "completions: wanted a list of texts"),
    (b'{"prompts": [1], "completions": ["a"]}', 400, "prompts: wanted a list of texts"),
    (b'{"prompts": ["a"], "completions": ["a", "b"]}', 400, "as many in each"),
    (b'{"prompts": ["a"], "completions": ["a"], "id": []}', 400, "as many in each"),
    (b"x" * 1_000_001, 413, "a request of 1,000,001 bytes, wanted at most 1,000,000"),
]


@pytest.mark.parametrize(("body", "status", "said"), REFUSED)
def test_requests_that_are_none(body: bytes, status: int, said: str):
    with serving("reward=length", "max_request_mb=1") as port:
        found, answer = ask(port, body)
        assert found == status
        assert said in answer["error"]
        assert ask(port, b'{"prompts": ["a"], "completions": ["a b"]}') == (200, {"rewards": [2.0]})  # still there


def test_a_request_of_no_length():
    with serving("reward=length") as port:
        connection = HTTPConnection("127.0.0.1", port, timeout=10)
        connection.putrequest("POST", "/")
        connection.endheaders()
        assert connection.getresponse().status == 411


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [1 / 0]", r"other: ZeroDivisionError: division by zero \(.*judge.py:2\)"),
        ("return [1.0, 2.0]", "2 values for 1 completions, wanted one for each"),
        ("return [float('nan')]", "nan for completion 0 'c', wanted a finite float"),
        ("return None", "it returned a NoneType, wanted a list"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_reward_that_fails_is_not_asked_again(tmp_path, body: str, said: str):
    with serving(f"reward={judge(tmp_path, body)}") as port:
        reward = connect(at(port), HOW.model_copy(update={"retries": 50, "backoff": 9.0}))
        with pytest.raises(UserError, match=rf"^reward {at(port)}: it answered 422 \(reward .*{said}") as raised:
            reward(prompts=["p"], completions=["c"])
        assert "\n" not in str(raised.value)


def test_calls_take_turns(tmp_path):
    busy = "t.busy += 1; t.most = max(t.most, t.busy); time.sleep(0.02); t.busy -= 1"
    body = f"import time, judge_times as t; {busy}; return [0] * len(prompts)"
    times = types.SimpleNamespace(busy=0, most=0)
    sys.modules["judge_times"] = times
    try:
        with serving(f"reward={judge(tmp_path, body)}") as port:
            connect(at(port), HOW)(prompts=["p"] * 6, completions=["c"] * 6)
    finally:
        del sys.modules["judge_times"]
    assert times.most == 1  # three requests at once


def test_the_key(monkeypatch):
    body = b'{"prompts": [], "completions": []}'
    monkeypatch.setenv(TOKEN, "s3cret")
    with serving("reward=length") as port:
        assert connect(at(port), HOW)(prompts=["p"], completions=["a b"]) == [2.0]
        assert ask(port, body, Authorization="Bearer s3cret") == (200, {"rewards": []})
        assert ask(port, body)[0] == 401
        monkeypatch.setenv(TOKEN, "0ther")
        with pytest.raises(
            UserError, match=rf"it answered 401 \(the key is missing or another.*: give the right key in {TOKEN}"
        ):
            connect(at(port), HOW)


class Prediction(NamedTuple):
    """What COMET's `predict` returns, as far as we use it."""

    scores: list[float]
    system_score: float


class StandIn:
    """The names of unbabel-comet 2.x that are used, with their arguments. COMET itself is not installed here."""

    def __init__(self, compares: bool) -> None:
        self.compares, self.asked = compares, []

    def module(self) -> types.ModuleType:
        module = types.ModuleType("comet")
        module.download_model = lambda model: self.asked.append(("download", model)) or "/cache/model.ckpt"
        module.load_from_checkpoint = lambda path: self.asked.append(("load", path)) or self
        return module

    def requires_references(self) -> bool:
        return self.compares

    def predict(self, samples, batch_size=16, gpus=1, progress_bar=True, num_workers=None) -> Prediction:
        self.asked.append((samples, batch_size, gpus, progress_bar, num_workers))
        scores = [len(row["mt"]) / 8 for row in samples]
        return Prediction(scores, sum(scores) / len(scores))


def test_comet_as_its_package_is_called(monkeypatch):
    stand_in = StandIn(compares=True)
    monkeypatch.setitem(sys.modules, "comet", stand_in.module())
    with serving("reward=comet", "model=Unbabel/some", "batch_size=4", "gpus=1") as port:
        reward = connect(at(port), HOW)
        assert reward(prompts=["ein"], completions=["a"], references=[["one", "1"]]) == [0.125]
        with pytest.raises(UserError, match="row 1 has no reference, which Unbabel/some compares with"):
            reward(prompts=["a", "b"], completions=["a", "b"], references=[["a"], []])
        with pytest.raises(UserError, match="row 0 has no reference"):
            reward(prompts=["a"], completions=["a"])
    row = {"src": "ein", "mt": "a", "ref": "one"}
    assert stand_in.asked == [("download", "Unbabel/some"), ("load", "/cache/model.ckpt"), ([row], 4, 1, False, 0)]


def test_comet_without_references(monkeypatch):
    stand_in = StandIn(compares=False)
    monkeypatch.setitem(sys.modules, "comet", stand_in.module())
    with serving("reward=comet", "model=my/model.ckpt") as port:
        assert connect(at(port), HOW)(prompts=["ein"], completions=["ab"]) == [0.25]
    assert stand_in.asked == [("load", "my/model.ckpt"), ([{"src": "ein", "mt": "ab"}], 16, 0, False, 0)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no reward, wanted reward=NAME"),
        (["reward=chrff"], "reward 'chrff': not in reward_models/, which has .*; did you mean 'chrf'?"),
        (["reward=length", "prot=8"], "prot=8: wanted one of reward=, host=, .*; did you mean 'port'?"),
        (["reward=length", "port"], "port: wanted one of"),
        (["reward=length", "port=x"], "port: 'x', wanted a whole number"),
        (["reward=length", "threads=0"], "threads: 0, wanted at least 1"),
        (["reward=length", "gpus=1"], "gpus: only reward=comet has it, wanted it left out"),
        (["reward=length", "port=70000"], "127.0.0.1:70000: cannot listen"),
        (["reward=length", "host=256.0.0.1"], "256.0.0.1:8000: cannot listen"),
        (["reward=comet"], r"reward comet \(pip install unbabel-comet, in an environment of its own\): ModuleNotFound"),
    ],
)
def test_mistakes_on_the_command_line(words: list[str], said: str, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("serve: ") and err.count("\n") == 1
    with pytest.raises(UserError, match=said):
        server_of(words)


def test_a_port_that_is_taken():
    with serving("reward=length") as port, pytest.raises(UserError, match=r"cannot listen .* wanted a free port"):
        server_of(["reward=length", f"port={port}"])


def test_options():
    assert options_of(["reward=a", "port=1", "host=0.0.0.0"]).host == "0.0.0.0"
    assert "serve" not in available("reward_models", "reward")


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_it_runs_without_packages_and_ends_when_asked_to(stop: signal.Signals):
    start = "import sys; sys.path.insert(0, sys.argv[1]); from reward_models import serve; serve.main(sys.argv[2:])"
    command = [sys.executable, "-I", "-S", "-c", start, str(ROOT), "reward=length", "port=0"]  # -S: no site-packages
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        ready = process.stdout.readline()
        assert ready.startswith("ready: length at http://127.0.0.1:")
        assert connect(ready.split()[-1], HOW)(prompts=["p"] * 3, completions=["a", "b c", ""]) == [1.0, 2.0, 0.0]
        process.send_signal(stop)
        out, err = process.communicate(timeout=20)
    assert (out, err, process.returncode) == ("stopped\n", "", 0)
