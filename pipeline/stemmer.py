"""The Porter stemmer: takes the endings off English words, so that `connected` and `connections` meet in `connect`.

Sources: Porter 1980, "An algorithm for suffix stripping", with the changes that NLTK's `PorterStemmer()` makes by
default (irregular forms, dies -> die, y -> i only after a consonant, -alli, -fulli and -logi); the tests compare both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

# Words the rules would spoil. Forms of up to three letters are never stemmed and need no entry.
_IRREGULAR = {
    "skies": "sky",
    "dying": "die",
    "lying": "lie",
    "tying": "tie",
    "innings": "inning",
    "outings": "outing",
    "cannings": "canning",
} | {word: word for word in ("news", "inning", "outing", "canning", "howe", "proceed", "exceed", "succeed")}

# (ending, what replaces it): the first ending that fits decides, whether or not its condition holds.
_STEP_2 = (
    ("ational", "ate"),
    ("tional", "tion"),
    ("enci", "ence"),
    ("anci", "ance"),
    ("izer", "ize"),
    ("bli", "ble"),
    ("alli", "al"),
    ("entli", "ent"),
    ("eli", "e"),
    ("ousli", "ous"),
    ("ization", "ize"),
    ("ation", "ate"),
    ("ator", "ate"),
    ("alism", "al"),
    ("iveness", "ive"),
    ("fulness", "ful"),
    ("ousness", "ous"),
    ("aliti", "al"),
    ("iviti", "ive"),
    ("biliti", "ble"),
    ("fulli", "ful"),
)
_STEP_3 = (
    ("icate", "ic"),
    ("ative", ""),
    ("alize", "al"),
    ("iciti", "ic"),
    ("ical", "ic"),
    ("ful", ""),
    ("ness", ""),
)
_STEP_4 = tuple(
    (ending, "")
    for ending in "al ance ence er ic able ible ant ement ment ent ou ism ate iti ous ive ize".split()  # noqa: SIM905
)


@lru_cache(maxsize=1 << 17)
def stem(word: str) -> str:
    """Porter's stem of a lower-case word longer than three letters; shorter ones stay as they are."""
    if len(word) <= 3:
        return word
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    word = _step_1c(_step_1b(_step_1a(word)))
    word = _replaced(_step_2(word), _STEP_3, 0)
    return _step_5(_step_4(word))


def _letters(word: str) -> str:
    """'c' or 'v' per character: vowels are a, e, i, o, u, and y after a consonant."""
    kinds = accumulate(word, lambda before, x: "v" if x in "aeiou" or (x == "y" and before == "c") else "c", initial="")
    return "".join(kinds)


def _measure(word: str) -> int:
    """Porter's m: how often a vowel is followed by a consonant."""
    return _letters(word).count("vc")


def _ends_short(word: str) -> bool:
    """Porter's *o, consonant-vowel-consonant where the last is not w, x or y; or a whole word vowel-consonant."""
    letters = _letters(word)
    return (letters.endswith("cvc") and word[-1] not in "wxy") or letters == "vc"


def _replaced(word: str, rules: Sequence[tuple[str, str]], above: int) -> str:
    """The first ending that fits is replaced, if the measure of what is before it is greater than `above`."""
    for ending, replacement in rules:
        if word.endswith(ending):
            start = word[: -len(ending)]
            return start + replacement if _measure(start) > above else word
    return word


def _step_1a(word: str) -> str:
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _step_1b(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for ending in ("ed", "ing"):
        start = word.removesuffix(ending)
        if start != word and "v" in _letters(start):
            return _mended(start)
    return word


def _mended(start: str) -> str:
    """What -ed or -ing was taken from, with its last letter put right: hop(p)ing, fil(e)ing."""
    if start.endswith(("at", "bl", "iz")):
        return start + "e"
    if start[-2:-1] == start[-1] and _letters(start)[-1] == "c":
        return start if start[-1] in "lsz" else start[:-1]
    return start + "e" if _measure(start) == 1 and _ends_short(start) else start


def _step_1c(word: str) -> str:
    return word[:-1] + "i" if word.endswith("y") and len(word) > 2 and _letters(word)[-2] == "c" else word


def _step_2(word: str) -> str:
    if word.endswith("alli") and _measure(word[:-4]) > 0:
        return _step_2(word[:-2])
    if word.endswith("logi"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    return _replaced(word, _STEP_2, 0)


def _step_4(word: str) -> str:
    if word.endswith("ion"):
        return word[:-3] if word[-4:-3] in ("s", "t") and _measure(word[:-3]) > 1 else word
    return _replaced(word, _STEP_4, 1)


def _step_5(word: str) -> str:
    if word.endswith("e"):
        measure = _measure(word[:-1])
        if measure > 1 or (measure == 1 and not _ends_short(word[:-1])):
            word = word[:-1]
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word
