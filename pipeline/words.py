"""The words of a text, whatever its script: runs of letters and digits; characters, where words have no blanks between.

Chinese, Japanese, Thai, Lao, Khmer and Burmese write no blanks: each of their characters, with the vowel signs and
tones that belong to it, is a word. Where there is nothing but ASCII all this costs nothing. Needs no package.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from itertools import groupby
from typing import NamedTuple

# what Unicode has set aside for the scripts without blanks, in the form of a character class
BLOCKS = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Burmese
    "\u1780-\u17ff"  # Khmer
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u303c\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
    "\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\uff66-\uff9f"  # kana, bopomofo
)
WIDE_MARK = "[\u3001-\u3003\u3008-\u3020\u303d-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]"
COMBINING = range(0x300, 0x20000)  # where there are any that words are written with


class Patterns(NamedTuple):
    """What is looked for in a text."""

    apart: re.Pattern[str]  # a character that is a word of its own, or a mark of East Asian punctuation
    word: re.Pattern[str]
    piece: re.Pattern[str]  # a word, or another character that is no blank


def set_apart(text: str) -> str:
    """The text with blanks around each character that is a word of its own, and around East Asian punctuation."""
    return text if text.isascii() else _patterns().apart.sub(r" \g<0> ", text)


def between_blanks(text: str) -> list[str]:
    """The words with the punctuation that clings to them, as a reader would count them."""
    return set_apart(text).split()


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case and Unicode's form NFKC, in which equal texts are equal."""
    return _patterns().word.findall(_folded(text))


def pieces(text: str) -> list[str]:
    """As `words`, and each other character that is no blank and no control sign by itself."""
    return [piece for piece in _patterns().piece.findall(_folded(text)) if unicodedata.category(piece[0])[0] != "C"]


@cache
def _patterns() -> Patterns:
    # vowel signs and tones: Python's \w leaves them out
    runs = groupby(COMBINING, key=lambda code: unicodedata.category(chr(code))[0] == "M")
    ends = [(codes[0], codes[-1]) for codes in ([*run] for is_sign, run in runs if is_sign)]
    signs = "".join(f"{chr(first)}-{chr(last)}" for first, last in ends)
    alone = rf"(?:(?=[^\W_]|[{signs}])[{BLOCKS}][{signs}]*)"
    word = rf"{alone}|(?:(?![{BLOCKS}])(?:[^\W_]|[{signs}]))+"
    return Patterns(*map(re.compile, (f"{alone}|{WIDE_MARK}", word, rf"{word}|\S")))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text.lower())
