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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException, IncompleteRead
from threading import Event
from typing import NamedTuple, TypeVar
from urllib.parse import urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError

from pipeline.config.generation import ServerSettings
from pipeline.config.reward_spec import TOKEN, token, web_address
from pipeline.config.rewards import HttpSettings
from pipeline.errors import UserError
from pipeline.records import RewardFunction
from reward_models._values import shortened

OPENAI_KEY = "OPENAI_API_KEY"
LONGEST_WAIT = 60.0  # seconds between two tries
MEGABYTE = 10**6
CHUNK = 2**16  # bytes read at a time

One = TypeVar("One")
Got = TypeVar("Got")


class PassingError(Exception):
    """What came instead of an answer, and the seconds that the server asks for before another try, if it does."""


class NotTakenError(UserError):
    """The server is there, and does not take this request."""


class Purpose(NamedTuple):
    """What a server is asked for, as messages say it."""

    name: str = "reward"
    section: str = "rewards.http"  # of the settings
    wanted: str = "numbers: is this a reward?"
    again: str = "; the same command goes on from the last checkpoint"


class Address(NamedTuple):
    """Whom to ask, and how patiently."""

    address: str
    pool: urllib3.PoolManager
    settings: HttpSettings | ServerSettings
    key_name: str = TOKEN  # the environment variable with its key
    purpose: Purpose = Purpose()

    def error(self, complaint: str, kind: type[UserError] = UserError) -> UserError:
        key = self.pool.headers.get("Authorization", "").removeprefix("Bearer ")
        return kind(f"{self.purpose.name} {self.address}: {complaint.replace(key, '***') if key else complaint}")


def connect(name: str, settings: HttpSettings) -> RewardFunction:
    """A function with the rewards' calling convention that asks the server at the address `name`.

    Raises UserError where it is not there, or does not answer a request without rows as a reward does.
    """
    server = opened(name, settings, token(), TOKEN)
    try:
        answer = _once(server, b'{"prompts": [], "completions": []}')
    except PassingError as error:
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


def key_variable(address: str, given: str | None) -> str:
    """The environment variable whose key is sent; "" for none. A key meant for OpenAI goes to no http:// address."""
    if given is not None:
        return given
    return OPENAI_KEY if address.startswith("https:") else ""


def opened(address: str, settings: HttpSettings | ServerSettings, key: str, key_name: str) -> Address:
    """Whom to ask at `address`; `key`, "" for none, goes out with each request. Nothing is sent yet."""
    web_address(address)
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    tls = ssl.create_default_context()  # the system's authorities, and those of SSL_CERT_FILE
    pool = urllib3.PoolManager(headers=headers, maxsize=settings.concurrency, retries=False, ssl_context=tls)
    return Address(address, pool, settings, key_name)


def _requests(server: Address, columns: Mapping[str, list], start: int, stop: int) -> list[tuple[int, bytes]]:
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


def _ask(server: Address, requests: Sequence[tuple[int, bytes]]) -> list[float | None]:
    """The values of all requests in their order."""
    answers = at_once(server, lambda one, over: _values(server, patiently(server, one[1], over), one[0]), requests)
    return [value for values in answers for value in values]


def at_once(server: Address, ask: Callable[[One, Event], Got], requests: Sequence[One]) -> list[Got]:
    """What `ask` makes of each request, in their order, some under way at once; after a failure none goes on.

    `ask` is given the event of such a failure.
    """
    over = Event()
    threads = ThreadPoolExecutor(server.settings.concurrency, thread_name_prefix="reward")
    try:
        return list(threads.map(lambda one: ask(one, over), requests))
    finally:
        over.set()
        threads.shutdown(wait=False, cancel_futures=True)


def listens(server: Address, address: str) -> None:
    """Raises UserError where nobody answers a GET of `address`, or the key is refused; any other answer will do."""
    answered(server._replace(address=address))


def answered(server: Address, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and body of the answer to a single try, a GET without a `body`. Raises UserError as `listens`."""
    try:
        status, _, answer = _exchange(server, body)
    except HTTPError as error:
        problem = _unanswered(server, error)
        if isinstance(problem, PassingError):
            problem = server.error(f"{problem.args[0]}, wanted a server that answers: start it, or correct the address")
        raise problem from None
    if status in (401, 403):
        said = f" ({line})" if (line := first_line(answer)) else ""
        raise server.error(f"it answered {status}{said}, wanted 200: give the right key in {server.key_name}")
    return status, answer


def patiently(server: Address, body: bytes, over: Event) -> bytes:
    """The answer's body, tried for again after failures that may pass, unless `over`. Raises UserError."""
    since, wait = time.monotonic(), server.settings.backoff
    for tries in range(1, server.settings.retries + 2):
        try:
            return _once(server, body)
        except PassingError as error:
            problem, *asked = error.args
        if tries <= server.settings.retries and over.wait(min(max([wait, *asked]), LONGEST_WAIT)):
            break
        wait *= 2
    problem += f"; {tries} tries in {time.monotonic() - since:.0f} s"
    section = server.purpose.section
    cure = f"see to the server, or be more patient with {section}.retries= and {section}.timeout="
    raise server.error(f"{problem}, wanted an answer: {cure}{server.purpose.again}")


def _once(server: Address, body: bytes) -> bytes:
    """The body of the answer to one request. Raises PassingError, and UserError for what does not pass."""
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
    problem += f" ({line})" if (line := first_line(answer)) else ""
    # these pass: the request is sent again, after what the server asks for
    if status == 429 or status >= 500:
        wait = headers.get("Retry-After", "")
        raise PassingError(problem, float(wait) if wait.isdecimal() else 0.0)
    if status in (401, 403):
        raise server.error(f"{problem}, wanted 200: give the right key in {server.key_name}")
    raise server.error(f"{problem}, wanted 200: correct the address or the data", NotTakenError)


def _exchange(server: Address, body: bytes | None) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers and body of an answer, read in pieces: neither an endless nor a trickling one is waited for.

    With a `body` it is a POST, without a GET.
    """
    seconds, limit = server.settings.timeout, server.settings.max_answer_mb
    deadline, answer = time.monotonic() + seconds, bytearray()
    options = {"body": body, "timeout": seconds, "redirect": False, "preload_content": False}
    with server.pool.request("GET" if body is None else "POST", server.address, **options) as response:
        while piece := response.read1(CHUNK):
            answer += piece
            if len(answer) > limit * MEGABYTE:
                problem = f"its answer is larger than {limit:g} MB, wanted {server.purpose.wanted}"
                raise server.error(f"{problem} {server.purpose.section}.max_answer_mb= sets the limit")
            if time.monotonic() > deadline:
                raise HTTPError from TimeoutError()
    return response.status, response.headers, bytes(answer)


def _unanswered(server: Address, error: HTTPError) -> Exception:
    """What to raise where no answer came: PassingError, or UserError for what does not pass."""
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
    return PassingError(problem) if cure is None else server.error(f"{problem}, wanted {cure}")


def _values(server: Address, body: bytes, count: int) -> list[float | None]:
    """The `count` rewards of an answer; whether they are finite numbers is checked where all rewards are."""
    wanted = 'wanted {"rewards": [one number or null per completion]}'
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        raise server.error(f"its answer is no JSON ({first_line(body) or 'empty'}), {wanted}") from None
    values = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(values, list):
        raise server.error(f"its answer has no list of rewards ({first_line(body)}), {wanted}")
    if len(values) != count:
        raise server.error(f"it returned {len(values)} values for {count} completions, {wanted}")
    return values


def first_line(body: bytes) -> str:
    """An answer in one line: its `error`, a text or (of OpenAI's manner) an object with one; or its first line."""
    text = body[:CHUNK].decode("utf-8", "replace").strip()
    try:
        error = json.loads(text)["error"]
        return " ".join((error["message"] if isinstance(error, dict) else error).split())[:300]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):  # it is no object with a text `error`
        return shortened(text.splitlines()[0]) if text else ""
