"""Texts as the released code of semi-offline RL (Chen et al. 2023) prepares them before it compares them."""

from __future__ import annotations

import re

_SPECIAL = re.compile("<pad>|</?s>")
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SET_APART = re.compile(r"\s*(['?$%])")  # 's too, by its apostrophe
_QUOTED = re.compile('"([^"]+)"')
_HYPHENED = re.compile(r"\s*(-.{2})")


def punctuated(text: str) -> str:
    """Lower case, special tokens as blanks, full stops as ` <sep> ` and commas as ` <sep2> `; no blanks around."""
    return _SPECIAL.sub(" ", text).replace(".", " <sep> ").replace(",", " <sep2> ").lower().strip()


def question(text: str) -> str:
    """The same in what was meant as the spelling of the SQuAD references.

    Brackets by name, a blank before apostrophes, ?, $ and %, double quotes as `` and '' with blanks inside. A blank
    goes before a hyphen with two characters behind it too, so that "twenty-first" becomes two words and "-lrb-" is
    torn where a third follows.
    """
    text = punctuated(text)
    for bracket, name in BRACKETS.items():  # faster than str.translate where there are none
        text = text.replace(bracket, name)
    text = _QUOTED.sub(r"`` \1 ''", _SET_APART.sub(r" \1", text))
    return _HYPHENED.sub(r" \1", text)
