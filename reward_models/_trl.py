"""A function of the user's as a reward: called as TRL's GRPOTrainer calls its reward functions. Needs no package.

Everything comes by keyword, and only what the function takes. What TRL has and we have not is said to the user, never
made up. Source: TRL's documentation, "GRPO Trainer", "Using a custom reward function".
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from inspect import Parameter
from typing import Any

from pipeline import plugins
from pipeline.errors import UserError, did_you_mean
from pipeline.records import TRL_ARGUMENTS

logger = logging.getLogger("tiffin")

FOLDER = "reward_models"
CHATS = "CHATS"  # what a file says at its top of rows whose prompt is a chat: "messages" (without a word) or "text"
NOT_KEPT = ("log_extra", "log_metric")
BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
WANTED = "wanted def reward(prompts, completions, **columns)"
_turn = threading.Lock()


@dataclass(frozen=True)
class TrlFunction:
    """A reward function, and what is known of it. It is called with texts, and columns among which is `raw_prompt`."""

    name: str
    function: Callable
    named: Mapping[str, bool]  # the parameters that it names: whether it must have them
    takes_all: bool  # it has **kwargs
    messages: bool  # whether prompts and completions of chats come as messages, as in TRL, or as text

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence) -> Any:
        """What the function returns, awaited where that is needed. Raises UserError where a parameter has no column."""
        texts = {"prompts": list(prompts), "completions": list(completions)}
        if self.messages and "raw_prompt" in columns:
            texts = _as_messages(columns["raw_prompt"], **texts)
        given = {"trainer_state": None, **dict.fromkeys(NOT_KEPT, _unkept), **columns, **texts}
        if missing := [name for name, needed in self.named.items() if needed and name not in given]:
            raise UserError(f"reward {self.name}: {_missing(missing[0], columns)}")
        found = self.function(**{name: value for name, value in given.items() if self.takes_all or name in self.named})
        return _awaited(found) if inspect.isawaitable(found) else found


def load(name: str) -> TrlFunction:
    """The function that `name` means: of a module of our folder, or of a file.

    Raises UserError as `plugins.load_any`, and for a function that cannot be called in this way.
    """
    module, function = plugins.load_any(name, FOLDER, "reward", "reward")
    chats = vars(module).get(CHATS, "messages")
    if chats not in ("messages", "text"):
        raise UserError(f"reward {name}: {CHATS} is {chats!r:.40}, wanted 'messages' or 'text'")
    named, takes_all = _parameters(name, function)
    if unkept := [one for one in NOT_KEPT if one in named]:
        logger.info(f"reward {name}: what it gives to {' and '.join(unkept)} is not kept")
    return TrlFunction(name, function, named, takes_all, chats == "messages")


def _parameters(name: str, function: Callable) -> tuple[dict[str, bool], bool]:
    """The parameters that a function names, and whether it must have them; and whether it takes all others too."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:
        raise UserError(f"reward {name}: a builtin that does not say what it takes, {WANTED}") from None
    if unnamed := [one.name for one in parameters if one.kind is Parameter.POSITIONAL_ONLY]:
        raise UserError(f"reward {name}: it takes {unnamed[0]} by position only, {WANTED}")
    named = {one.name: one.default is Parameter.empty for one in parameters if one.kind in BY_NAME}
    takes_all = any(one.kind is Parameter.VAR_KEYWORD for one in parameters)
    if not takes_all and not named.keys() & {"prompts", "completions", "completion_ids"}:
        raise UserError(f"reward {name}: it takes {', '.join(named) or 'nothing'}, {WANTED}")
    return named, takes_all


def _as_messages(raw_prompts: Sequence, prompts: list[str], completions: list[str]) -> dict[str, list]:
    """Both as TRL has them: of a chat a list of messages each, of a text the text."""
    chats = [not isinstance(prompt, str) for prompt in raw_prompts]
    return {
        "prompts": [
            [dict(turn) for turn in raw] if chat else text
            for raw, text, chat in zip(raw_prompts, prompts, chats, strict=True)
        ],
        "completions": [
            [{"role": "assistant", "content": text}] if chat else text
            for text, chat in zip(completions, chats, strict=True)
        ],
    }


def _missing(name: str, columns: Mapping[str, Sequence]) -> str:
    if name == "completion_ids":
        return (
            "it takes completion_ids, which only a policy's own responses have, wanted another stage, or a reward that "
            "reads completions"
        )
    known = [one for one in columns if one not in TRL_ARGUMENTS]
    return f"it takes {name}, which no row has, wanted one of the columns {', '.join(known)}{did_you_mean(name, known)}"


def _unkept(*given: object, **more: object) -> None:
    """What TRL's functions call to have something logged."""


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """One for the whole process: what a user's module keeps from call to call, such as a session, belongs to it."""
    return asyncio.new_event_loop()


def _awaited(found: Awaitable) -> Any:
    async def waiting() -> Any:
        return await found

    with _turn:
        return _loop().run_until_complete(waiting())
