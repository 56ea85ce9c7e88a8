"""The words of a text, whatever its script: runs of letters and digits; characters, where words have no blanks between.

Chinese, Japanese, Thai, Lao, Khmer and Burmese write no blanks: each of their characters, with the vowel signs and
tones that belong to it, is a word. Where there is nothing but ASCII all this costs nothing.
"""

from __future__ import annotations

import unicodedata

import regex

_SCRIPTS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー"
_ALONE = rf"[[\p{{L}}\p{{M}}\p{{N}}]&&[{_SCRIPTS}]]\p{{M}}*"
_WIDE_MARK = r"[\u3001-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]"  # of East Asian punctuation
_WORD = rf"{_ALONE}|[[\p{{L}}\p{{M}}\p{{N}}]--[{_SCRIPTS}]]+"
APART = regex.compile(rf"(?V1){_ALONE}|{_WIDE_MARK}")
WORD = regex.compile(rf"(?V1){_WORD}")
PIECE = regex.compile(rf"(?V1){_WORD}|[^\s\p{{C}}]")


def set_apart(text: str) -> str:
    """The text with blanks around each character that is a word of its own, and around East Asian punctuation."""
    return text if text.isascii() else APART.sub(r" \g<0> ", text)


def between_blanks(text: str) -> list[str]:
    """The words with the punctuation that clings to them, as a reader would count them."""
    return set_apart(text).split()


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case and Unicode's form NFKC, in which equal texts are equal."""
    return WORD.findall(_folded(text))


def pieces(text: str) -> list[str]:
    """As `words`, and each other character that is no blank by itself."""
    return PIECE.findall(_folded(text))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text.lower())
