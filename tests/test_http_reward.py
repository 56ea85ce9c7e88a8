"""Rewards asked over HTTP: real servers on this machine, sound ones and ones that fail in every way."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.config.resolve import resolve
from pipeline.config.reward_spec import TOKEN, web_address
from pipeline.config.rewards import HttpSettings
from pipeline.errors import UserError
from pipeline.records import Example, Message
from pipeline.rewards.http import connect
from pipeline.rewards.rewards import Rewards, WeightedReward
from pipeline.rewards.scoring import reward_columns

Answer = tuple[int, bytes, dict[str, str]]  # status, body, headers beside Content-Length
FAST = {"batch_size": 2, "concurrency": 2, "timeout": 5.0, "retries": 2, "backoff": 0.01}


def how(**changes: object) -> HttpSettings:
    return HttpSettings(**{**FAST, "max_request_mb": 1.0, "max_answer_mb": 1.0, **changes})


class Heard:
    """What a server was asked, and how it answers: `answer(number of the request, its columns)`, checks left out."""

    def __init__(self, answer: Callable[[int, dict], Answer]) -> None:
        self.answer, self.bodies, self.headers, self.paths = answer, [], [], []
        self.times: list[float] = []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()


@contextmanager
def serving(answer: Callable[[int, dict], Answer]) -> Iterator[tuple[str, Heard]]:
    """A server that answers checks soundly and all else with `answer`; its address, and what it heard."""
    heard = Heard(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            columns = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, body, headers = (200, b'{"rewards": []}', {}) if columns == EMPTY else self.asked(columns)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            try:
                self.wfile.write(body)
            except ConnectionError:  # the client had enough
                self.close_connection = True

        def asked(self, columns: dict) -> Answer:
            with heard.lock:
                number = len(heard.bodies)
                heard.bodies.append(columns)
                heard.headers.append(dict(self.headers))
                heard.paths.append(self.path)
                heard.times.append(time.monotonic())
                heard.busy += 1
                heard.busiest = max(heard.busiest, heard.busy)
            answer = heard.answer(number, columns)
            with heard.lock:
                heard.busy -= 1
            return answer

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/score", heard
        finally:
            server.shutdown()
            thread.join()


EMPTY = {"prompts": [], "completions": []}


def lengths(columns: dict) -> Answer:
    return 200, json.dumps({"rewards": [len(text) for text in columns["completions"]]}).encode(), {}


def always(status: int, body: bytes, **headers: str) -> Callable[[int, dict], Answer]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda number, columns: (status, body, named)


def score(address: str, texts: list[str], settings: HttpSettings, **columns: list) -> list[float]:
    rewards = Rewards([WeightedReward(address, 1.0, connect(address, settings))])
    return list(rewards.score([f"p{i}" for i in range(len(texts))], texts, columns).total)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_values_do_not_depend_on_the_batches(size: int):
    texts = ["", "a", "ü", "four", "five5"]
    with serving(lambda number, columns: lengths(columns)) as (address, heard):
        assert score(address, texts, how(batch_size=size)) == [0.0, 1.0, 1.0, 4.0, 5.0]
    assert len(heard.bodies) == -(-5 // size)
    asked = sorted(heard.bodies, key=lambda columns: columns["prompts"])
    assert [text for columns in asked for text in columns["completions"]] == texts


def test_what_is_sent(monkeypatch):
    monkeypatch.setenv(TOKEN, "s3cret\n")
    chat = (Message("user", "hi"), Message("assistant", "ho"))
    row = Example("i", chat, references=("x", "y"), columns={"ground_truth": {"answer": [1, None]}})
    with serving(lambda number, columns: lengths(columns)) as (address, heard):
        score(address, ["a"], how(), **reward_columns([row], ids=[(5, 2)]))
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    wanted = {"prompts": ["p0"], "completions": ["a"], "references": [["x", "y"]], "raw_prompt": [turns]}
    wanted |= {"id": ["i"], "source": [""], "ground_truth": [{"answer": [1, None]}]}
    assert heard.bodies == [wanted]  # ids of a tokenizer that a server does not know stay here
    assert heard.paths == ["/score"]
    assert heard.headers[0]["Content-Type"] == "application/json"
    assert heard.headers[0]["Authorization"] == "Bearer s3cret"


def test_a_slow_server_is_kept_busy():
    four = threading.Barrier(4, timeout=4)  # lets nobody through before four are there

    def slow(number: int, columns: dict) -> Answer:
        four.wait()
        return lengths(columns)

    with serving(slow) as (address, heard):
        texts = ["a", "bb", "ccc", "dddd", "", "f", "gg", "hhh"]
        wanted = [1.0, 2.0, 3.0, 4.0, 0.0, 1.0, 2.0, 3.0]
        assert score(address, texts, how(batch_size=1, concurrency=4)) == wanted
    assert heard.busiest == 4


def test_no_texts_ask_nothing():
    with serving(lambda number, columns: lengths(columns)) as (address, heard):
        assert score(address, [], how()) == []
    assert heard.bodies == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_passes_is_tried_again(status: int):
    def once(number: int, columns: dict) -> Answer:
        return (status, b"not yet", {}) if number == 0 else lengths(columns)

    with serving(once) as (address, heard):
        assert score(address, ["abc"], how()) == [3.0]
    assert len(heard.bodies) == 2


def test_a_connection_that_breaks_is_tried_again():
    def once(number: int, columns: dict) -> Answer:
        status, body, _ = lengths(columns)
        return status, body, {"Content-Length": "500"} if number == 0 else {}

    with serving(once) as (address, heard):
        assert score(address, ["abc"], how()) == [3.0]
    assert len(heard.bodies) == 2


def test_the_wait_doubles_and_the_tries_are_counted():
    said = r"it answered 503 \(busy\); 3 tries in \d s, wanted an answer: see to"
    with serving(always(503, b"busy\nmore")) as (address, heard), pytest.raises(UserError, match=said):
        score(address, ["a"], how(backoff=0.1))
    first, second = heard.times[1] - heard.times[0], heard.times[2] - heard.times[1]
    assert first >= 0.1 and second >= 0.2


def test_the_server_may_ask_for_a_longer_wait():
    def once(number: int, columns: dict) -> Answer:
        return (429, b"", {"Retry-After": "1"}) if number == 0 else lengths(columns)

    with serving(once) as (address, heard):
        assert score(address, ["a"], how()) == [1.0]
    assert heard.times[1] - heard.times[0] >= 1


def test_a_timeout_is_tried_again_and_then_said():
    def slow(number: int, columns: dict) -> Answer:
        time.sleep(0.3)
        return lengths(columns)

    with serving(slow) as (address, heard):
        with pytest.raises(UserError, match=r"no answer within 0.1 s; 2 tries in"):
            score(address, ["a"], how(timeout=0.1, retries=1))
        assert len(heard.bodies) == 2


ENDS = [
    ((400, b"bad column\nat line 3"), r"it answered 400 \(bad column\), wanted 200: correct the address or the data"),
    ((422, b'{"error": "reward x: no\\nreference"}'), r"it answered 422 \(reward x: no reference\), wanted 200"),
    ((404, b""), "it answered 404, wanted 200"),
    ((401, b"who?"), rf"it answered 401 \(who\?\), wanted 200: give the right key in {TOKEN}"),
    (
        (200, b"<html>hello"),
        r"its answer is no JSON \(<html>hello\), wanted \{\"rewards\": \[one number or null per completion",
    ),
    ((200, b""), r"its answer is no JSON \(empty\)"),
    ((200, b"[" * 10**5), r"its answer is no JSON"),
    ((200, b"[1.0, 2.0]"), r"its answer has no list of rewards \(\[1.0, 2.0\]\)"),
    ((200, b'{"rewards": 1}'), "its answer has no list of rewards"),
    ((200, b'{"rewards": [1.0]}'), "it returned 1 values for 2 completions"),
    ((200, b'{"rewards": [1.0, NaN]}'), "nan for completion 1 'second', wanted a finite float"),
    ((200, b'{"rewards": [1.0, "2"]}'), "'2' for completion 1 'second', wanted a finite float"),
    ((200, b" " * 1_100_000), r"its answer is larger than 1 MB, wanted numbers"),
]


@pytest.mark.parametrize(("answer", "said"), ENDS)
def test_what_does_not_pass_ends_at_once(answer: tuple[int, bytes], said: str):
    with serving(always(*answer)) as (address, heard):
        with pytest.raises(UserError, match=said) as raised:
            score(address, ["first", "second"], how())
        assert str(raised.value).startswith(f"reward {address}: ")
        assert "\n" not in str(raised.value)
    assert len(heard.bodies) == 1


def test_redirects_are_not_followed(monkeypatch):
    monkeypatch.setenv(TOKEN, "s3cret")
    elsewhere = always(307, b"", Location="http://me:pw@127.0.0.1:1/there?key=k")
    said = r"it answered 307, a redirect to http://127.0.0.1:1/there, wanted the address"
    with serving(elsewhere) as (address, heard), pytest.raises(UserError, match=said):
        score(address, ["a"], how())
    with serving(always(302, b"", Location="/score")) as (address, heard):  # to itself
        with pytest.raises(UserError, match=rf"a redirect to {address}, wanted"):
            score(address, ["a"], how())
        assert len(heard.bodies) == 1


def test_large_requests_are_halved_and_a_large_text_is_named():
    with serving(lambda number, columns: lengths(columns)) as (address, heard):
        texts = ["x" * 400_000, "y" * 400_000, "z" * 400_000]
        assert score(address, texts, how(batch_size=3)) == [400_000.0] * 3
        assert sorted(len(columns["completions"]) for columns in heard.bodies) == [1, 2]
        before = len(heard.bodies)
        with pytest.raises(UserError, match=r"completion 1 'zzz.*' makes a request of 1,2\d\d,\d\d\d bytes, wanted at"):
            score(address, ["a", "z" * 1_200_000], how(batch_size=1))
        assert len(heard.bodies) == before  # nothing is asked where the whole cannot be


def test_a_trickling_answer_is_not_waited_for():
    server = socket.create_server(("127.0.0.1", 0))
    stopped = threading.Event()

    def trickle() -> None:
        client, _ = server.accept()
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while not stopped.wait(0.05):
            try:
                client.sendall(b" ")
            except OSError:
                return

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"no answer within 0\.3 s"):
            connect(f"http://127.0.0.1:{server.getsockname()[1]}", how(timeout=0.3))
    finally:
        stopped.set()
        thread.join()
        server.close()


def test_a_server_that_speaks_something_else():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            client, _ = server.accept()
            client.sendall(b"220 mail at your service\r\n")
            client.shutdown(socket.SHUT_WR)
            while client.recv(4096):  # closed with something unread, the connection would break before the greeting
                pass
            client.close()

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(
            UserError, match=r"what answers is not an HTTP server \(BadStatusLine\), wanted an http server"
        ):
            connect(f"http://127.0.0.1:{server.getsockname()[1]}/", how())
        thread.join()


def test_http_where_https_was_said():
    said = r"no TLS with this server \(\w+\), wanted https: is it an http:// address"
    with serving(lambda number, columns: lengths(columns)) as (address, _), pytest.raises(UserError, match=said):
        connect(address.replace("http://", "https://"), how())


def test_a_server_that_is_not_there_is_said_at_once():
    address = f"http://127.0.0.1:{free_port()}/"
    since = time.monotonic()
    with pytest.raises(UserError) as raised:
        connect(address, how(retries=50, backoff=9.0))
    assert time.monotonic() - since < 2
    said = f"reward {address}: nobody listens there, wanted a server that answers: start it first (python -m reward_"
    assert str(raised.value).startswith(said)


def test_a_server_that_goes_away_is_waited_for():
    with serving(lambda number, columns: lengths(columns)) as (address, _):
        reward = connect(address, how(retries=2, backoff=0.02))
    with pytest.raises(UserError, match=r"nobody listens there; 3 tries in \d s, wanted an answer"):
        reward(prompts=["p"], completions=["c"])


def test_after_a_failure_the_other_requests_are_not_sent():
    with serving(always(400, b"no")) as (address, heard):
        with pytest.raises(UserError, match="it answered 400"):
            score(address, ["a"] * 200, how(batch_size=1, concurrency=1))
        time.sleep(0.1)
        assert len(heard.bodies) < 20


@pytest.mark.parametrize("token", ["two words", "naïve", "a\nb"])
def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch, token: str):
    monkeypatch.setenv(TOKEN, token)
    with pytest.raises(UserError, match=f"^{TOKEN}: it holds spaces or characters that are not ASCII") as raised:
        connect("http://127.0.0.1:1/", how())
    assert token not in str(raised.value)


def test_addresses():
    parts = web_address("https://[::1]:8443/a/b")
    assert (parts.scheme, parts.hostname, parts.port, parts.path) == ("https", "::1", 8443, "/a/b")
    assert web_address("http://host").port is None


@pytest.mark.parametrize("word", ["reward=", "reward='{ADDRESS: 1.0}'", "monitors=[ADDRESS]", "monitors={m: ADDRESS}"])
@pytest.mark.parametrize(
    "secret", ["http://me:pass@host/", "https://host/?key=pass", "http://me:p/pass@host", "x://h#pass"]
)
def test_addresses_with_secrets_are_refused_and_not_shown(word: str, secret: str):
    word = word.strip("'").replace("'", "") + (secret if word == "reward=" else "")
    with pytest.raises(
        UserError, match="wanted none of it, for settings are kept and shown: give the key in"
    ) as raised:
        resolve(["stage=evaluate", word.replace("ADDRESS", f'"{secret}"')])
    assert "pass" not in str(raised.value).replace("a password", "")


@pytest.mark.parametrize(
    "address", ["ftp://host/", "http://", "http://h:x/", "http://h:0/", "http://h:99999", "http://[::1"]
)
def test_addresses_that_are_none(address: str):
    with pytest.raises(UserError, match=r"command line: reward: '.*', wanted http://HOST:PORT/PATH or https://"):
        resolve(["stage=score", f"reward={address}"])
    with pytest.raises(UserError, match="without spaces, other characters as %XX"):
        resolve(["stage=score", "reward=http://host/a b"])


def test_an_address_in_a_mapping_of_rewards():
    settings = resolve(["stage=score", "reward={http://127.0.0.1:8000/chrf: 0.5, length: -0.1}"]).settings
    assert settings.reward == {"http://127.0.0.1:8000/chrf": 0.5, "length": -0.1}
    assert settings.rewards.http.batch_size >= 1
