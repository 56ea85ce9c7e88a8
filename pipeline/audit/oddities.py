"""Texts that are odd though each is sound: counted, with the first row of each kind."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from pipeline.audit.log import Log

MARKS = re.compile(
    r"<\|[a-z_]+\|>|\[/?INST\]|<(?:start|end)_of_turn>|</?s>|^### (?:Instruction|Response):|\n\nHuman:", re.M
)
HTML = re.compile(r"</?(?:p|br|div|span|a|b|i|ul|li|table|td|tr)\b[^<>]*>|&(?:amp|lt|gt|quot|nbsp|#\d+);", re.I)
BROKEN = re.compile("\ufffd|Ã[\x80-\xbf©¨¤¶¼]|â€")  # lost characters, and UTF-8 that was read as Latin-1
REFUSALS = re.compile(
    r"\W*(?:i'm sorry|i am sorry|sorry, (?:but )?i|i can't (?:help|assist|do|provide)|i cannot|as an ai\b|"
    r"i'm unable|i am unable)",
    re.I,
)
NOTHING = {"nan", "none", "null", "n/a", "<na>", "-"}
LONG_ANSWER = 8  # words, from which an answer that ends without a sign counts as cut
LETTERS = 400  # of a text, by which its script is told


class Oddity(NamedTuple):
    """One kind, how many answers (or prompts) are so, and the id of the first."""

    name: str
    count: int
    first: str


def of_texts(log: Log) -> list[Oddity]:
    """The kinds that occur, in a fixed order."""
    found = []
    for name, odd in KINDS.items():
        places = [i for i in range(len(log.ids)) if odd(log.prompts[i], log.answers[i])]
        if places:
            found.append(Oddity(name, len(places), log.ids[places[0]]))
    return found


def is_refusal(answer: str) -> bool:
    return REFUSALS.match(answer.replace("\u2019", "'")) is not None


def script(text: str) -> str:
    """The script that most letters of a text are of: LATIN, CYRILLIC, CJK ...; "" without letters."""
    counts: dict[str, int] = {}
    for sign in text[:LETTERS]:
        if name := _script_of(sign):
            counts[name] = counts.get(name, 0) + 1
    return max(counts, key=counts.__getitem__) if counts else ""


@cache
def _script_of(sign: str) -> str:
    if not sign.isalpha():
        return ""
    name = unicodedata.name(sign, "").split(" ")[0].split("-")[0]
    return "CJK" if name in ("HIRAGANA", "KATAKANA", "HALFWIDTH", "FULLWIDTH") else name


def _repeats(prompt: str, answer: str) -> bool:
    return len(prompt) > 20 and answer.lstrip().startswith(prompt.strip())


def _is_cut(prompt: str, answer: str) -> bool:
    text = answer.rstrip()
    return len(text.split()) >= LONG_ANSWER and text[-1].isascii() and text[-1].isalnum()


def _other_script(prompt: str, answer: str) -> bool:
    one, other = script(prompt), script(answer)
    return bool(one and other) and one != other


KINDS: dict[str, Callable[[str, str], bool]] = {
    "answers that stand for an empty cell (nan, null ...)": lambda prompt, answer: answer.strip().lower() in NOTHING,
    "marks of chat templates spelled in prompt or answer": lambda prompt, answer: bool(
        MARKS.search(prompt) or MARKS.search(answer)
    ),
    "broken characters": lambda prompt, answer: bool(BROKEN.search(prompt) or BROKEN.search(answer)),
    "HTML": lambda prompt, answer: bool(HTML.search(answer)),
    "answers that begin with their prompt": _repeats,
    "refusals": lambda prompt, answer: is_refusal(answer),
    "answers that end in the middle of a sentence": _is_cut,
    "answers in another script than their prompt": _other_script,
}
