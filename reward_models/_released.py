"""Texts as the released code of semi-offline RL (Chen et al. 2023) prepares them before it compares them."""

from __future__ import annotations

import re

_SPECIAL = re.compile("<pad>|</?s>")
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SET_APART = re.compile(r"\s*(['?$%])")  # 's too, by its apostrophe


def punctuated(text: str) -> str:
    """Lower case, special tokens as blanks, full stops as ` <sep> ` and commas as ` <sep2> `; no blanks around."""
    return _SPECIAL.sub(" ", text).replace(".", " <sep> ").replace(",", " <sep2> ").lower().strip()


def question(text: str) -> str:
    """The same in the spelling of the SQuAD references: brackets by name, a blank before apostrophes, ?, $ and %."""
    text = punctuated(text)
    for bracket, name in _BRACKETS.items():  # faster than str.translate where there are none
        text = text.replace(bracket, name)
    return _SET_APART.sub(r" \1", text)
