"""A language model behind an OpenAI-compatible address as a reward: `reward=judge:http://HOST:PORT/v1`.

Each text is one chat completion; its answer is kept under the run's cache/judge/, so that no start asks for it twice.
The key is read from the environment when a request is sent, and stands in no setting, message or file.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import Event, Lock
from typing import Any, NamedTuple

from pipeline.config.reward_spec import judge_address, key_in
from pipeline.config.rewards import HttpSettings, JudgeSettings
from pipeline.errors import UserError
from pipeline.records import RewardFunction
from pipeline.rewards import http, verdicts
from reward_models._filled import texts_of

logger = logging.getLogger("tiffin")


class Ask(NamedTuple):
    """One request: the name of its answers in the cache, its body, and the row that it is about."""

    key: str
    body: bytes
    row: str


@dataclass
class Spent:
    """What this rank has used so far, and how often no verdict came of it."""

    requests: int = 0
    tokens: int = 0
    cached: int = 0
    again: int = 0  # requests after an answer without a verdict
    skipped: int = 0
    forecast: bool = False  # whether the number of texts was told
    lock: Any = field(default_factory=Lock)


class Judge(NamedTuple):
    server: http.Address
    settings: JudgeSettings
    cache: Path
    ranks: int
    spent: Spent


def check(name: str, settings: JudgeSettings, environ: Mapping[str, str]) -> None:
    """What can be told of a judge before it is asked. Raises UserError."""
    if settings.model is None:
        problem = "null, wanted what the server calls the model that judges"
        raise UserError(f"rewards.judge.model: {problem}: set rewards.judge.model=NAME")
    variable = http.key_variable(judge_address(name), settings.key_variable)
    if variable and not key_in(variable, environ):
        cure = f"export {variable}=..." + (
            "" if settings.key_variable else ", or name another in rewards.judge.key_variable="
        )
        raise UserError(f"reward {name}: the environment has no {variable}, wanted the key of the judge: {cure}")


def connect(name: str, settings: JudgeSettings, how: HttpSettings, cache: Path) -> RewardFunction:
    """A function with the rewards' calling convention that asks the judge at the address `name`, judge:http....

    `cache`: a directory of this run, which ranks share. Raises UserError where the judge is not there.
    """
    check(name, settings, os.environ)
    variable = http.key_variable(judge_address(name), settings.key_variable)
    key, address = key_in(variable, os.environ) if variable else "", judge_address(name)
    server = http.opened(address + "/chat/completions", how, key, variable or "rewards.judge.key_variable")
    http.listens(server, address + "/models")
    judge = Judge(server, settings, cache, int(os.environ.get("WORLD_SIZE", "1")), Spent())
    atexit.register(_tell, judge)  # whatever the stage, at its end

    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence) -> list[float | None]:
        return judged(judge, prompts, completions, columns)

    return reward


def judged(
    judge: Judge, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence]
) -> list[float | None]:
    """A number per completion, None for one without a verdict where that is allowed. Equal requests are sent once."""
    rows = [{name: values[i] for name, values in columns.items()} for i in range(len(completions))]
    asks = [_ask(judge, *one) for one in zip(prompts, completions, rows, strict=True)]
    known = {ask.key: kept for ask in asks if (kept := _kept(judge, ask)) is not None}
    new = [*{ask.key: ask for ask in asks if ask.key not in known}.values()]
    judge.spent.cached += len(asks) - len(new)
    _foretell(judge, len(asks), len(new))
    fresh = http.at_once(judge.server, lambda ask, over: _answers(judge, ask, over), new)
    answers = known | {ask.key: one for ask, one in zip(new, fresh, strict=True)}
    return [_verdict(judge, ask, answers[ask.key]) for ask in asks]


def _ask(judge: Judge, prompt: str, completion: str, row: Mapping[str, Any]) -> Ask:
    """The request about one text. Its name in the cache holds all that the answer depends on."""
    settings, texts = judge.settings, texts_of(prompt, completion, row)
    content = {"model": settings.model, "messages": verdicts.messages(settings, texts)}
    content[settings.max_tokens_name] = settings.max_tokens
    content |= {} if settings.temperature is None else {"temperature": settings.temperature}
    body = json.dumps(content).encode("ascii")
    key = hashlib.sha256(judge.server.address.encode() + b"\n" + body).hexdigest()
    return Ask(key, body, str(row.get("id", "")))


def _place(judge: Judge, ask: Ask) -> Path:
    return judge.cache / ask.key[:2] / f"{ask.key}.json"


def _kept(judge: Judge, ask: Ask) -> list[str] | None:
    """The answers of an earlier request if the settings of today find a verdict in one, or need no more of them."""
    try:
        answers = json.loads(_place(judge, ask).read_text(encoding="utf-8"))["answers"]
    except FileNotFoundError:
        return None
    settled = any(isinstance(_read(judge, one), float) for one in answers)
    enough = judge.settings.on_failure == "skip" and len(answers) >= judge.settings.attempts
    return answers if settled or enough else None


def _answers(judge: Judge, ask: Ask, over: Event) -> list[str]:
    """Answers to one request, until one has a verdict or there were enough; kept. Raises UserError."""
    answers: list[str] = []
    while len(answers) < judge.settings.attempts and not over.is_set():
        _pay(judge, again=bool(answers))
        answers.append(_content(judge, http.patiently(judge.server, ask.body, over)))
        if isinstance(_read(judge, answers[-1]), float):
            break
    if answers:
        _keep(_place(judge, ask), answers)
    return answers


def _keep(place: Path, answers: Sequence[str]) -> None:
    """The file of a request, complete or absent; two ranks may write the same one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("w", dir=place.parent, suffix=".tmp", delete=False, encoding="ascii") as draft:
        json.dump({"answers": answers}, draft)
        draft.flush()
        os.fsync(draft.fileno())
    os.replace(draft.name, place)


def _read(judge: Judge, answer: str) -> float | str:
    """The verdict of an answer, or why there is none."""
    try:
        return verdicts.value(judge.settings, answer)
    except verdicts.NoVerdictError as error:
        return str(error)


def _verdict(judge: Judge, ask: Ask, answers: Sequence[str]) -> float | None:
    """The verdict of the first answer that has one; without any None, or UserError."""
    read = [_read(judge, answer) for answer in answers]
    if (found := next((one for one in read if isinstance(one, float)), None)) is not None:
        return found
    if judge.settings.on_failure == "skip":
        judge.spent.skipped += 1
        return None
    problem = f"row {ask.row}: no verdict in {len(answers)} answers; of the last {read[-1] if read else 'nothing came'}"
    cure = "correct rewards.judge.prompt or parse, raise attempts or max_tokens, or leave such rows out with"
    raise judge.server.error(f"{problem}: {cure} rewards.judge.on_failure=skip")


def _content(judge: Judge, body: bytes) -> str:
    """The text of an answer, "" where it was cut or refused; its tokens are counted. Raises UserError for another."""
    try:
        whole = json.loads(body)
        choice = whole["choices"][0]
        content, end = choice["message"]["content"], choice.get("finish_reason")
        counted = (whole.get("usage") or {}).get("total_tokens")
        tokens = counted if isinstance(counted, int) else None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        wanted = 'wanted {"choices": [{"message": {"content": "..."}}]}: is this an OpenAI-compatible address?'
        raise judge.server.error(f"its answer is no chat completion ({http.first_line(body)}), {wanted}") from None
    if tokens is None and judge.settings.budget.tokens is not None:
        cure = "set rewards.judge.budget.requests instead of tokens"
        raise judge.server.error(f"its answer does not say how many tokens it took, wanted usage.total_tokens: {cure}")
    with judge.spent.lock:
        judge.spent.tokens += tokens or 0
    return content if isinstance(content, str) and end != "length" else ""


def _left(judge: Judge) -> dict[str, int]:
    """What this rank may still spend, by name, where there is a limit: its equal part less what it spent."""
    limits, spent = judge.settings.budget, judge.spent
    parts = {"requests": (limits.requests, spent.requests), "tokens": (limits.tokens, spent.tokens)}
    return {name: limit // judge.ranks - used for name, (limit, used) in parts.items() if limit is not None}


def _pay(judge: Judge, again: bool) -> None:
    """Count a request that is about to be sent. Raises UserError where the budget is spent."""
    with judge.spent.lock:
        for name, left in _left(judge).items():
            if left <= 0:
                raise _too_much(judge, name, "it is spent")
        judge.spent.requests += 1
        judge.spent.again += again


def _too_much(judge: Judge, name: str, problem: str) -> UserError:
    limit = getattr(judge.settings.budget, name)
    part = f" ({limit // judge.ranks:,} for each of {judge.ranks} ranks)" if judge.ranks > 1 else ""
    cure = f"raise it and start again, verdicts that were paid for are kept in {judge.cache}"
    return judge.server.error(f"rewards.judge.budget.{name} is {limit:,}{part}, and {problem}; {told(judge)}: {cure}")


def _foretell(judge: Judge, texts: int, new: int) -> None:
    """Say once, before the first larger call, what it takes. Raises UserError where the budget cannot pay for it."""
    left = _left(judge).get("requests")
    if left is not None and new > left:
        raise _too_much(judge, "requests", f"{new:,} of {texts:,} texts have no verdict yet")
    if texts > 1 and not judge.spent.forecast:
        judge.spent.forecast = True
        whose = f" of rank 0 of {judge.ranks}" if judge.ranks > 1 else ""
        most = f"at most {new * judge.settings.max_tokens:,} tokens of answers beside those of the prompts"
        kept = f"{texts - new:,} have a verdict or equal another"
        logger.info(f"reward {judge.server.address}: {texts:,} texts{whose}, {kept}: {new:,} requests, {most}")


def _tell(judge: Judge) -> None:
    if judge.spent.requests or judge.spent.cached:
        logger.info(f"reward {judge.server.address}: {told(judge)}")


def told(judge: Judge) -> str:
    """What this rank spent, in one line."""
    spent, whose = judge.spent, f" (this rank of {judge.ranks})" if judge.ranks > 1 else ""
    parts = [f"judge{whose}: {spent.requests:,} requests, {spent.tokens:,} tokens, {spent.cached:,} verdicts at hand"]
    parts += [f"{spent.again:,} requests after an answer without a verdict"] if spent.again else []
    parts += [f"{spent.skipped:,} texts without a verdict, left out"] if spent.skipped else []
    return ", ".join(parts)
