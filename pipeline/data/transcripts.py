"""Dialogues that are written into one text, as in hh-rlhf: "\\n\\nHuman: ...\\n\\nAssistant: ...", and their turns."""

from __future__ import annotations

import re

from pipeline.records import Message

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ROLES = {"Human": "user", "User": "user", "Assistant": "assistant"}
HEAD = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
MARKED = re.compile(r"(?:\A|\n)<extra_id_1>(User|Assistant)\n")  # source: the card of nvidia/HelpSteer2


def turns_of(text: str) -> tuple[Message, ...] | None:
    """The turns of a dialogue that ends where the assistant is to speak; None of any other text.

    Text before the first mark is the system's, the blank behind a mark the mark's. What one side says in two turns
    running is one turn, with an empty line in it; if the last is the assistant's, the response goes on with it.
    """
    before, *parts = HEAD.split(text)
    if len(parts) < 4 or not text.endswith(ASSISTANT):
        return None
    turns = [Message("system", before)] if before else []
    for name, said in zip(parts[::2], parts[1::2], strict=True):
        content = said.removeprefix(" ")
        if turns and turns[-1].role == ROLES[name]:
            turns[-1] = Message(ROLES[name], f"{turns[-1].content}\n\n{content}")
        else:
            turns.append(Message(ROLES[name], content))
    goes_on = parts[-4] == "Assistant"
    return tuple(turns) if goes_on else tuple(turns[:-1])


def marked_turns(text: str) -> tuple[Message, ...] | None:
    """The turns of a prompt as HelpSteer writes those of several turns; None of any other text.

    "Hi\\n<extra_id_1>Assistant\\nHello\\n<extra_id_1>User\\nA joke"
    """
    first, *parts = MARKED.split(text)
    if len(parts) < 2:
        return None
    turns = [Message("user", first)] if first.strip() else []
    return (*turns, *(Message(ROLES[name], said) for name, said in zip(parts[::2], parts[1::2], strict=True)))


def answer_of(text: str) -> str:
    """What the assistant says, up to where the human speaks again."""
    return text.partition(HUMAN)[0]
