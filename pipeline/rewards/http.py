"""A reward that a server gives: texts go out as JSON in requests of some rows each, numbers come back.

POST {"prompts": [...], "completions": [...], "references": [[...], ...], ...}: the arguments of a reward function, one
entry per completion. The answer is 200 with {"rewards": [number, ...]}. A request without rows asks whether the server
is there. `reward_models/README.md` says it for those who write one, `reward_models/serve.py` is one.

Requests are independent of each other, so the values do not depend on how rows are cut into requests. Each has its own
connection and thread. What may pass (nobody listens, a cut connection, a time-out, 429, 5xx) is tried again after a
wait that doubles; all else ends the run at once. Redirects are not followed: the key would go where it leads.
"""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from threading import Event
from typing import NamedTuple
from urllib.parse import SplitResult, urljoin, urlsplit

from pipeline.config.reward_spec import TOKEN, token, web_address
from pipeline.config.sections import HttpSettings
from pipeline.errors import UserError
from pipeline.records import RewardFunction
from pipeline.rewards.rewards import shortened

LONGEST_WAIT = 60.0  # seconds between two tries
MEGABYTE = 10**6
CHUNK = 2**16  # bytes read at a time
START = "start it first (python -m reward_models.serve reward=NAME serves one of ours), or correct the address"


class _PassingError(Exception):
    """What was found instead of an answer, where that may be gone the next time.

    `wait`: the seconds that the server asks for before that, 0 where it does not say.
    """

    def __init__(self, found: str, wait: float = 0.0) -> None:
        super().__init__(found)
        self.wait = wait


class _Answer(NamedTuple):
    status: int
    location: str  # of a redirect
    wait: str  # the header Retry-After
    body: bytes


@dataclass(frozen=True)
class _Server:
    """Whom to ask, with which key, and how patiently."""

    name: str
    address: SplitResult
    token: str
    settings: HttpSettings

    def error(self, complaint: str) -> UserError:
        return UserError(f"reward {self.name}: {complaint}")


def connect(name: str, settings: HttpSettings) -> RewardFunction:
    """A function with the rewards' calling convention that asks the server at the address `name`.

    Raises:
        UserError: the server is not there, or does not answer a request without rows as a reward does.
    """
    server = _Server(name, web_address(name), token(), settings)
    try:
        answer = _once(server, b'{"prompts": [], "completions": []}')
    except _PassingError as error:
        raise server.error(f"{error}, wanted a server that answers: {START}") from None
    _values(server, answer, 0)

    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence) -> list[float]:
        """Chat messages among the columns go out as objects with role and content."""
        rows = {"prompts": prompts, "completions": completions, **columns}
        whole = {name: [_plain(value) for value in values] for name, values in rows.items()}
        return _ask(server, list(_requests(server, whole)))

    return reward


def _plain(value: object) -> object:
    """Messages, which are named tuples, as objects; all else as it is."""
    if isinstance(value, tuple):
        return [message._asdict() for message in value]
    return value


def _requests(server: _Server, columns: Mapping[str, list]) -> Iterator[tuple[int, bytes]]:
    """(rows, body) of the requests that `columns` make, in order."""
    count = len(columns["completions"])
    size = server.settings.batch_size
    for start in range(0, count, size):
        yield from _fitting(server, columns, start, min(start + size, count))


def _fitting(server: _Server, columns: Mapping[str, list], start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """The rows from `start` to `stop` as one request, halved until none is too large. Raises UserError for one row."""
    body = json.dumps({name: values[start:stop] for name, values in columns.items()}).encode("ascii")
    limit = server.settings.max_request_mb
    if len(body) <= limit * MEGABYTE:
        yield stop - start, body
        return
    if stop - start == 1:
        text = shortened(columns["completions"][start])
        found = f"completion {start} '{text}' makes a request of {len(body):,} bytes"
        raise server.error(f"{found}, wanted at most {limit:g} MB: say rewards.http.max_request_mb={limit * 2:g}")
    middle = (start + stop) // 2
    yield from _fitting(server, columns, start, middle)
    yield from _fitting(server, columns, middle, stop)


def _ask(server: _Server, requests: Sequence[tuple[int, bytes]]) -> list[float]:
    """The values of all requests in their order, some requests under way at once; after a failure none goes on."""
    over = Event()
    pool = ThreadPoolExecutor(server.settings.concurrency, thread_name_prefix="reward")
    try:
        answers = pool.map(lambda request: _values(server, _patiently(server, request[1], over), request[0]), requests)
        return [value for values in answers for value in values]
    finally:
        over.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _patiently(server: _Server, body: bytes, over: Event) -> bytes:
    """The answer's body, tried for again after failures that may pass, unless `over`. Raises UserError."""
    since, wait = time.monotonic(), server.settings.backoff
    for tries in range(1, server.settings.retries + 2):
        try:
            return _once(server, body)
        except _PassingError as error:
            found, asked = str(error), error.wait
        if tries <= server.settings.retries and over.wait(min(max(wait, asked), LONGEST_WAIT)):
            break
        wait *= 2
    told = f"{found}; {tries} tries in {time.monotonic() - since:.0f} s"
    cure = "look at the server, or be more patient with rewards.http.retries= and rewards.http.timeout="
    raise server.error(f"{told}, wanted an answer: {cure}; the same command goes on from the last checkpoint")


def _once(server: _Server, body: bytes) -> bytes:
    """The body of the answer to one request. Raises _PassingError, and UserError for what does not pass."""
    answer = _heard(server, body)
    if answer.status == 200:
        return answer.body
    found = f"it answered {answer.status}"
    if 300 <= answer.status < 400:
        place = urlsplit(urljoin(server.name, answer.location))
        shown = shortened(f"{place.scheme}://{place.netloc.rpartition('@')[2]}{place.path}")
        raise server.error(f"{found}, a redirect to {shown}, wanted the address itself: give that, if it is right")
    found += f" ({said})" if (said := _said(answer.body)) else ""
    if answer.status == 429 or answer.status >= 500:
        raise _PassingError(found, float(answer.wait) if answer.wait.isdecimal() else 0.0)
    cure = f"give the right key in {TOKEN}" if answer.status in (401, 403) else "correct the address or the data"
    raise server.error(f"{found}, wanted 200: {cure}")


def _heard(server: _Server, body: bytes) -> _Answer:
    """One answer, of whatever status. Raises as `_once` does where there is none."""
    try:
        return _exchange(server, body)
    except TimeoutError:
        raise _PassingError(f"no answer within {server.settings.timeout:g} s") from None
    except ssl.SSLEOFError:
        raise _PassingError("the connection broke") from None
    except ssl.SSLCertVerificationError as error:
        found = f"its certificate does not hold ({error.verify_message})"
        raise server.error(f"{found}, wanted one that SSL_CERT_FILE's authorities signed") from None
    except ssl.SSLError as error:
        found = f"no TLS with this server ({error.reason})"
        raise server.error(f"{found}, wanted https: is it an http:// address?") from None
    except ConnectionRefusedError:
        raise _PassingError("nobody listens there") from None
    except socket.gaierror as error:
        raise _PassingError(f"its host is not known ({error.strerror})") from None
    except (OSError, IncompleteRead) as error:
        raise _PassingError(f"the connection broke ({shortened(str(error))})") from None
    except HTTPException as error:
        found = f"what answers speaks no HTTP ({type(error).__name__})"
        raise server.error(f"{found}, wanted an http server: correct the address, or say https://") from None


def _exchange(server: _Server, body: bytes) -> _Answer:
    """Send one request and read the answer. Raises OSError and HTTPException, and UserError for one too large."""
    address, seconds = server.address, server.settings.timeout
    kind = HTTPSConnection if address.scheme == "https" else HTTPConnection
    connection = kind(str(address.hostname), address.port, timeout=seconds)
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
    if server.token:
        headers["Authorization"] = f"Bearer {server.token}"
    deadline = time.monotonic() + seconds
    try:
        connection.request("POST", address.path or "/", body, headers)
        with connection.getresponse() as response:
            told = [response.getheader(name, "") for name in ("Location", "Retry-After")]
            return _Answer(response.status, *told, _read(server, response, deadline))
    finally:
        connection.close()


def _read(server: _Server, response: HTTPResponse, deadline: float) -> bytes:
    """The body, in pieces, so that neither an endless nor a trickling one is waited for."""
    pieces, size, limit = [], 0, server.settings.max_answer_mb
    while piece := response.read1(CHUNK):
        pieces.append(piece)
        size += len(piece)
        if size > limit * MEGABYTE:
            found = f"its answer is larger than {limit:g} MB"
            raise server.error(f"{found}, wanted numbers: is this a reward? rewards.http.max_answer_mb= sets the limit")
        if time.monotonic() > deadline:
            raise TimeoutError
    if response.length:
        raise IncompleteRead(b"".join(pieces), response.length)
    return b"".join(pieces)


def _values(server: _Server, body: bytes, count: int) -> list[float]:
    """The `count` rewards of an answer; whether they are finite numbers is checked where all rewards are."""
    wanted = 'wanted {"rewards": [one number per completion]}'
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise server.error(f"its answer is no JSON ({_said(body) or 'empty'}), {wanted}") from None
    values = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(values, list):
        raise server.error(f"its answer has no list of rewards ({_said(body)}), {wanted}")
    if len(values) != count:
        raise server.error(f"it returned {len(values)} values for {count} completions, {wanted}")
    return values


def _said(body: bytes) -> str:
    """What an answer says in one line: its `error`, as servers of this protocol send it, or its first line."""
    text = body[:CHUNK].decode("utf-8", "replace").strip()
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        answer = None
    if isinstance(answer, dict) and isinstance(answer.get("error"), str):
        return " ".join(answer["error"].split())[:300]
    return shortened(text.splitlines()[0]) if text else ""
