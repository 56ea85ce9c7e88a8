"""Text -> ids under one tokenizer, wherever the text stands and whatever it spells.

Tokenizers read what spells a special token as that token. In texts of the data it is plain text: it is marked before a
template is put around it, and the marked places are tokenised apart, or with everything else where no template's
token is near. Some tokenizers also put a blank before whatever they are given; in the middle of a text there is none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # around what spells a special token; Unicode keeps them from texts
BEFORE = ("\n", ":", "a", "1")  # texts to stand before another; one of them does not grow together with it


class TextIds:
    """The ids of texts under `tokenizer`. A `text` may be marked, see `marked`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
        special = {token.content for token in added if token.special} | {*tokenizer.all_special_tokens}
        self.special = _any_of(special)
        self.parsed = _any_of({token.content for token in added} | special)  # all that is not read as plain text
        self.marks = re.compile(f"{OPEN}({self.special.pattern}){CLOSE}|[{OPEN}{CLOSE}]")
        self.special_ids = {*tokenizer.convert_tokens_to_ids(sorted(special))} - {tokenizer.unk_token_id}
        self.before, self.after = self._around()  # ids that the tokenizer puts around a text, as BOS and EOS
        self.guards = self._guards()
        self.last_token = re.compile(f"(?:{self.parsed.pattern})\\Z")

    def marked(self, text: str) -> str:
        """`text` with marks around whatever spells a special token."""
        return self.special.sub(f"{OPEN}\\g<0>{CLOSE}", text)

    def unmarked(self, text: str) -> str:
        """`text` as it was before `marked`."""
        return text.replace(OPEN, "").replace(CLOSE, "")

    def whole(self, text: str, target: bool = False) -> list[int]:
        """Ids of a text from its beginning on; with `target`, by the pieces of the language translated into."""
        pieces = self.marks.split(text)  # text, marked token, text, ..., text
        if len(pieces) == 1:
            return self._ids(text, target)
        if not any(self.parsed.search(piece) for piece in pieces[::2]):
            plain = self._ids(self.unmarked(text), target, split_special_tokens=True)
            if self.special_ids.isdisjoint(plain):
                return plain
        ids = self._ids(pieces[0], target) if pieces[0] else []
        for i, piece in enumerate(pieces[1:], start=1):
            if piece:  # None where a template tore the marks of a token apart
                ids += self._spelled(piece, target) if i % 2 else self.inner(piece, target)
        return ids

    def first(self, text: str) -> list[int]:
        """Ids of a text that a decoder begins with, by the pieces of the target's language; never two blanks first."""
        adds_blank, brings_one = bool(self.guards), text[:1] == " " and not text[1:2].isspace()
        return self.whole(text[1:] if adds_blank and brings_one else text, target=True)

    def inner(self, text: str, target: bool = False, after: str = "") -> list[int]:
        """Ids of a text that goes on `after` another: without the blank that a tokenizer may put before a beginning.

        Behind a token of its own some put one all the same; so it is only where `after` ends with one.
        """
        token = self.last_token.search(after) if self.guards else None
        for guard in (*([token.group()] if token else []), *self.guards):
            ids, before = self.whole(guard + text, target), self._ids(guard, target)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self.whole(text, target)

    def _spelled(self, token: str, target: bool) -> list[int]:
        """Ids of the characters of a special token, in the middle of a text."""
        for guard in (*self.guards, ""):
            ids = self._ids(guard + token, target, split_special_tokens=True)
            before = self._ids(guard, target) if guard else []
            if ids[: len(before)] == before and self.special_ids.isdisjoint(ids):
                return ids[len(before) :]
        return self.inner(token[:1], target) + self.inner(token[1:], target)  # a vocabulary that has it as a piece too

    def _ids(self, text: str, target: bool = False, **how: bool) -> list[int]:
        given = {"text_target": text} if target else {"text": text}
        return list(self.tokenizer(**given, add_special_tokens=False, **how)["input_ids"])

    def _around(self) -> tuple[list[int], list[int]]:
        whole, own = list(self.tokenizer("b")["input_ids"]), self._ids("b")
        place = next((i for i in range(len(whole)) if whole[i : i + len(own)] == own), 0)
        return whole[:place], whole[place + len(own) :]

    def _guards(self) -> tuple[str, ...]:
        """Those of BEFORE that can stand before a letter, where they make a difference; else none is needed."""
        fit, needed = [], False
        for guard in BEFORE:
            ids, both = self._ids(guard), self._ids(guard + "b")
            if ids and both[: len(ids)] == ids:
                fit.append(guard)
                needed |= both[len(ids) :] != self._ids("b")
        return tuple(fit) if needed else ()


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    """Finds any of `tokens`, the longest that stands at a place."""
    listed: Sequence[str] = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, listed)) or "(?!)")
