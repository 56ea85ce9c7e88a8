"""Any reward as a server: for rewards whose packages clash with training's, or that live on another machine.

    python -m reward_models.serve reward=chrf port=8000
    python -m reward_models.serve reward=my/brief.py:other host=0.0.0.0 port=8000 threads=4
    python -m reward_models.serve reward=comet model=Unbabel/wmt22-comet-da batch_size=32 gpus=1 port=8000

Needs Python and what the reward itself imports, nothing else that training needs. It follows the protocol of
`reward_models/README.md`, says one line when it is ready, and ends with Ctrl-C or SIGTERM. Where the environment
variable TIFFIN_REWARD_TOKEN holds a key, it answers only those who send it.
"""

from __future__ import annotations

import hmac
import json
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pipeline import plugins
from pipeline.config import reward_spec
from pipeline.errors import UserError, did_you_mean
from reward_models import _comet, _trl
from reward_models._values import checked

MEGABYTE = 10**6
CHUNK = 2**16  # bytes
IDLE = 60  # seconds without a byte from a client, after which it is given up


@dataclass(frozen=True)
class Options:
    """What the command line sets; `model`, `batch_size` and `gpus` are COMET's."""

    reward: str = ""
    host: str = "127.0.0.1"  # 0.0.0.0: other machines may ask too
    port: int = 8000  # 0 takes a free one
    threads: int = 1  # calls of the reward at once: more than 1 only if it is safe for threads
    max_request_mb: int = 16
    model: str = "Unbabel/wmt22-comet-da"
    batch_size: int = 16
    gpus: int = 0


class RefusedError(Exception):
    """A request that is answered with an error: the status, and one line of what was wrong."""


class Server(ThreadingHTTPServer):
    """Listens from the moment it is made; one thread per request, `threads` of them in the reward."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, options: Options, reward: Callable[..., Any]) -> None:
        self.options, self.reward = options, reward
        self.token = reward_spec.token()
        self.turns = threading.Semaphore(options.threads)
        super().__init__((options.host, options.port), Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """One line where a client left before it had its answer."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)
        else:
            print(f"{client_address}: left before the answer", file=sys.stderr, flush=True)


class Handler(BaseHTTPRequestHandler):
    """POST at any path scores; GET says what is served."""

    server: Server
    timeout = IDLE

    def do_GET(self) -> None:
        self._answer(200, {"serves": self.server.options.reward})

    def do_POST(self) -> None:
        try:
            columns = columns_of(self._body())
            self._answer(200, {"rewards": scored(self.server, columns)})
        except RefusedError as refused:
            status, complaint = refused.args
            self._answer(status, {"error": complaint})

    def log_message(self, *arguments: object) -> None:
        """Nothing: a line per request would drown the others."""

    def _body(self) -> bytes:
        """The request's body, read whatever becomes of it: the client hears us only after it has sent all."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise RefusedError(411, "no Content-Length, wanted one")
        body, limit = bytearray(), self.server.options.max_request_mb * MEGABYTE
        left = int(length)
        while left and (piece := self.rfile.read(min(left, CHUNK))):
            left -= len(piece)
            if int(length) <= limit:
                body += piece
        sent = self.headers.get("Authorization", "").encode()
        if self.server.token and not hmac.compare_digest(sent, f"Bearer {self.server.token}".encode()):
            raise RefusedError(401, f"the key is missing or another, wanted the one in {reward_spec.TOKEN}")
        if int(length) > limit:
            raise RefusedError(413, f"a request of {int(length):,} bytes, wanted at most {limit:,}")
        return bytes(body)

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def columns_of(body: bytes) -> dict[str, list]:
    """The columns of a request: lists of equal length, among them prompts and completions. Raises RefusedError."""
    try:
        columns = json.loads(body)
    except (ValueError, RecursionError):
        raise RefusedError(400, "the body is no JSON, wanted an object of columns") from None
    if not isinstance(columns, dict) or not all(isinstance(column, list) for column in columns.values()):
        raise RefusedError(400, "wanted a JSON object of columns, each a list")
    for name in ("prompts", "completions"):
        texts = columns.get(name)
        if texts is None or not all(isinstance(text, str) for text in texts):
            raise RefusedError(400, f"{name}: wanted a list of texts")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise RefusedError(400, f"the columns have {lengths} entries, wanted as many in each")
    return columns


def scored(server: Server, columns: dict[str, list]) -> list[float | None]:
    """The reward's values. Raises RefusedError 422, which is not retried, where it fails: it would fail again."""
    name, completions = server.options.reward, columns["completions"]
    if not completions:
        return []
    try:
        with server.turns:
            values = plugins.guarded(f"reward {name}", partial(server.reward, **columns))
        return checked(name, values, completions, ids=columns.get("id"))
    except UserError as error:
        raise RefusedError(422, str(error)) from None


def options_of(words: Sequence[str]) -> Options:
    """The command line's `key=value` words. Raises UserError."""
    kinds = {field.name: type(field.default) for field in fields(Options)}
    given: dict[str, Any] = {}
    for word in words:
        key, sign, value = word.partition("=")
        if key not in kinds or not sign:
            raise UserError(f"{word}: wanted one of {'=, '.join(kinds)}={did_you_mean(key, kinds)}")
        if kinds[key] is int and not value.isdecimal():
            raise UserError(f"{key}: {value!r}, wanted a whole number")
        given[key] = kinds[key](value)
    options = Options(**given)
    if not options.reward:
        raise UserError("no reward, wanted reward=NAME, reward=path/file.py, or reward=comet")
    if zero := {"threads", "max_request_mb", "batch_size"} & {key for key, value in given.items() if value == 0}:
        raise UserError(f"{min(zero)}: 0, wanted at least 1")
    if options.reward != "comet" and (foreign := {"model", "batch_size", "gpus"} & set(given)):
        raise UserError(f"{min(foreign)}: only reward=comet has it, wanted it left out")
    return options


def reward_of(options: Options) -> Callable[..., Any]:
    """The function that is served. Raises UserError, for COMET that is not installed as for a mistake in a file."""
    if options.reward != "comet":
        return _trl.load(options.reward)
    load = partial(_comet.load, options.model, options.batch_size, options.gpus)
    return plugins.guarded("reward comet (pip install unbabel-comet, in an environment of its own)", load)


def server_of(words: Sequence[str]) -> Server:
    """A server that listens, and answers once `serve_forever` is called. Raises UserError."""
    options = options_of(words)
    reward = reward_of(options)
    try:
        return Server(options, reward)
    except (OSError, OverflowError) as error:
        raise UserError(f"{options.host}:{options.port}: cannot listen ({error}), wanted a free port of ours") from None


def main(words: Sequence[str]) -> int:
    """0 when stopped, 2 and one line for a user's mistake."""
    try:
        with server_of(words) as server:
            host, port = server.server_address[:2]
            for stop in (signal.SIGINT, signal.SIGTERM):  # also where a script started us with &
                signal.signal(stop, signal.default_int_handler)
            print(f"ready: {server.options.reward} at http://{host}:{port}/", flush=True)
            server.serve_forever()
    except UserError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
