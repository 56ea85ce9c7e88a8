"""What a prompt that is too long loses: whole turns first, then a part of one text."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.data.chat import MARK
from pipeline.data.template import SYSTEM, goes_on, like
from pipeline.records import Chat, Message


def with_mark(prompt: Sequence[Message] | Chat) -> tuple[str, tuple[Message, ...] | Chat]:
    """The text that is cut, of the last turn that is gone on with, else of the longest, and the turns with MARK there.

    Behind the user's turn there may be calls of tools and their results.
    """
    first = 1 if prompt[0].role in SYSTEM and len(prompt) > 1 else 0
    longest = max(range(first, len(prompt)), key=lambda i: len(prompt[i].content))
    place = len(prompt) - 1 if goes_on(prompt) else longest
    turns = [turn._replace(content=MARK) if i == place else turn for i, turn in enumerate(prompt)]
    return prompt[place].content, like(prompt, turns)


def fewer_turns(turns: Sequence[Message] | Chat, keep: str) -> list[tuple[Message, ...] | Chat]:
    """`turns` without the first ones, always fewer, or without the last ones where keep is "beginning".

    The first message stays where it is the system's; what follows begins, or ends, with a turn of the user, as
    templates want it, and so a tool's result is never without its call. Where nothing less is left, these are the turns
    as they are.
    """
    system = tuple(turns[:1]) if turns[0].role in SYSTEM else ()
    rest = tuple(turns)[len(system) :]
    users = [i for i, turn in enumerate(rest) if turn.role == "user"]
    if keep == "end":
        parts = [rest[i:] for i in users if i > 0]
    else:
        parts = [rest[: i + 1] for i in reversed(users) if i + 1 < len(rest)]
    return [like(turns, (*system, *part)) for part in parts or [rest]]
