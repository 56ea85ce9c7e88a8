"""A reward that a server gives: texts go out as JSON in requests of some rows each, numbers come back.

The protocol is in `reward_models/README.md`; a request without rows asks whether the server is there. What may pass
(nobody listens, a cut connection, a time-out, 429, 5xx) is tried again after a wait that doubles; all else ends the run
at once. Redirects are not followed: the key would go where they lead.
"""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException, IncompleteRead
from threading import Event
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError

from pipeline.config.reward_spec import TOKEN, token, web_address
from pipeline.config.sections import HttpSettings
from pipeline.errors import UserError
from pipeline.records import RewardFunction
from reward_models._values import shortened

LONGEST_WAIT = 60.0  # seconds between two tries
MEGABYTE = 10**6
CHUNK = 2**16  # bytes read at a time


class _PassingError(Exception):
    """What came instead of an answer, and the seconds that the server asks for before another try, if it does."""


class _Server(NamedTuple):
    """Whom to ask, and how patiently."""

    address: str
    pool: urllib3.PoolManager
    settings: HttpSettings

    def error(self, complaint: str) -> UserError:
        return UserError(f"reward {self.address}: {complaint}")


def connect(name: str, settings: HttpSettings) -> RewardFunction:
    """A function with the rewards' calling convention that asks the server at the address `name`.

    Raises UserError where it is not there, or does not answer a request without rows as a reward does.
    """
    web_address(name)
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
    headers |= {"Authorization": f"Bearer {key}"} if (key := token()) else {}
    tls = ssl.create_default_context()  # the system's authorities, and those of SSL_CERT_FILE
    pool = urllib3.PoolManager(headers=headers, maxsize=settings.concurrency, retries=False, ssl_context=tls)
    server = _Server(name, pool, settings)
    try:
        answer = _once(server, b'{"prompts": [], "completions": []}')
    except _PassingError as error:
        cure = "start it first (python -m reward_models.serve reward=NAME serves one of ours), or correct the address"
        raise server.error(f"{error.args[0]}, wanted a server that answers: {cure}") from None
    _values(server, answer, 0)

    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence) -> list[float | None]:
        whole = {"prompts": prompts, "completions": completions, **columns}
        whole.pop("completion_ids", None)  # of a tokenizer that a server does not know
        count, size = len(completions), settings.batch_size
        parts = [_requests(server, whole, start, min(start + size, count)) for start in range(0, count, size)]
        return _ask(server, [request for part in parts for request in part])

    return reward


def _requests(server: _Server, columns: Mapping[str, list], start: int, stop: int) -> list[tuple[int, bytes]]:
    """(rows, body) of the rows from `start` to `stop`, halved until none is too large. Raises UserError for one row."""
    body = json.dumps({name: values[start:stop] for name, values in columns.items()}).encode("ascii")
    limit = server.settings.max_request_mb
    if len(body) <= limit * MEGABYTE:
        return [(stop - start, body)]
    if stop - start == 1:
        problem = (
            f"completion {start} '{shortened(columns['completions'][start])}' makes a request of {len(body):,} bytes"
        )
        raise server.error(f"{problem}, wanted at most {limit:g} MB: set rewards.http.max_request_mb={limit * 2:g}")
    middle = (start + stop) // 2
    return _requests(server, columns, start, middle) + _requests(server, columns, middle, stop)


def _ask(server: _Server, requests: Sequence[tuple[int, bytes]]) -> list[float | None]:
    """The values of all requests in their order, some requests under way at once; after a failure none goes on."""
    over = Event()
    threads = ThreadPoolExecutor(server.settings.concurrency, thread_name_prefix="reward")
    try:
        answers = threads.map(lambda one: _values(server, _patiently(server, one[1], over), one[0]), requests)
        return [value for values in answers for value in values]
    finally:
        over.set()
        threads.shutdown(wait=False, cancel_futures=True)


def _patiently(server: _Server, body: bytes, over: Event) -> bytes:
    """The answer's body, tried for again after failures that may pass, unless `over`. Raises UserError."""
    since, wait = time.monotonic(), server.settings.backoff
    for tries in range(1, server.settings.retries + 2):
        try:
            return _once(server, body)
        except _PassingError as error:
            problem, *asked = error.args
        if tries <= server.settings.retries and over.wait(min(max([wait, *asked]), LONGEST_WAIT)):
            break
        wait *= 2
    problem += f"; {tries} tries in {time.monotonic() - since:.0f} s"
    cure = "see to the server, or be more patient with rewards.http.retries= and rewards.http.timeout="
    raise server.error(f"{problem}, wanted an answer: {cure}; the same command goes on from the last checkpoint")


def _once(server: _Server, body: bytes) -> bytes:
    """The body of the answer to one request. Raises _PassingError, and UserError for what does not pass."""
    try:
        status, headers, answer = _exchange(server, body)
    except HTTPError as error:
        raise _unanswered(server, error) from None
    problem = f"it answered {status}"
    if status == 200:
        return answer
    if 300 <= status < 400:
        place = urlsplit(urljoin(server.address, headers.get("Location", "")))
        shown = shortened(f"{place.scheme}://{place.netloc.rpartition('@')[2]}{place.path}")
        raise server.error(f"{problem}, a redirect to {shown}, wanted the address itself: give that, if it is right")
    problem += f" ({line})" if (line := _first_line(answer)) else ""
    # these pass: the request is sent again, after what the server asks for
    if status == 429 or status >= 500:
        wait = headers.get("Retry-After", "")
        raise _PassingError(problem, float(wait) if wait.isdecimal() else 0.0)
    cure = f"give the right key in {TOKEN}" if status in (401, 403) else "correct the address or the data"
    raise server.error(f"{problem}, wanted 200: {cure}")


def _exchange(server: _Server, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers and body of an answer, read in pieces: neither an endless nor a trickling one is waited for."""
    seconds, limit = server.settings.timeout, server.settings.max_answer_mb
    deadline, answer = time.monotonic() + seconds, bytearray()
    options = {"body": body, "timeout": seconds, "redirect": False, "preload_content": False}
    with server.pool.request("POST", server.address, **options) as response:
        while piece := response.read1(CHUNK):
            answer += piece
            if len(answer) > limit * MEGABYTE:
                problem = f"its answer is larger than {limit:g} MB, wanted numbers: is this a reward?"
                raise server.error(f"{problem} rewards.http.max_answer_mb= sets the limit")
            if time.monotonic() > deadline:
                raise HTTPError from TimeoutError()
    return response.status, response.headers, bytes(answer)


def _unanswered(server: _Server, error: HTTPError) -> Exception:
    """What to raise where no answer came: _PassingError, or UserError for what does not pass."""
    cause: BaseException = error
    while below := cause.__cause__ or cause.__context__:  # down to the error of the socket, TLS or the parser
        cause = below
    cure = None
    match cause:
        case TimeoutError():
            problem = f"no answer within {server.settings.timeout:g} s"
        case ConnectionRefusedError():
            problem = "nobody listens there"
        case socket.gaierror():
            problem = f"its host is not known ({cause.strerror})"
        case ssl.SSLCertVerificationError():
            problem = f"its certificate does not hold ({cause.verify_message})"
            cure = "one that SSL_CERT_FILE's authorities signed"
        case ssl.SSLError() if not isinstance(cause, ssl.SSLEOFError):
            problem, cure = f"no TLS with this server ({cause.reason})", "https: is it an http:// address?"
        case HTTPException() if not isinstance(cause, OSError | IncompleteRead):  # those of a connection that ended
            problem = f"what answers is not an HTTP server ({type(cause).__name__})"
            cure = "an http server: correct the address, or use https://"
        case _:
            problem = f"the connection broke ({shortened(str(cause))})"
    return _PassingError(problem) if cure is None else server.error(f"{problem}, wanted {cure}")


def _values(server: _Server, body: bytes, count: int) -> list[float | None]:
    """The `count` rewards of an answer; whether they are finite numbers is checked where all rewards are."""
    wanted = 'wanted {"rewards": [one number or null per completion]}'
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise server.error(f"its answer is no JSON ({_first_line(body) or 'empty'}), {wanted}") from None
    values = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(values, list):
        raise server.error(f"its answer has no list of rewards ({_first_line(body)}), {wanted}")
    if len(values) != count:
        raise server.error(f"it returned {len(values)} values for {count} completions, {wanted}")
    return values


def _first_line(body: bytes) -> str:
    """An answer in one line: its `error`, as servers of this protocol send it, or its first line."""
    text = body[:CHUNK].decode("utf-8", "replace").strip()
    try:
        return " ".join(json.loads(text)["error"].split())[:300]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):  # it is no object with a text `error`
        return shortened(text.splitlines()[0]) if text else ""
