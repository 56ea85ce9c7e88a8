"""Ids of responses -> their texts, as the ones who gave them wrote them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from pipeline.data.chat import ASKED, MARK
from pipeline.data.template import Prompt, arguments_text, goes_on
from pipeline.data.text_ids import TextIds
from pipeline.records import Chat, Message

PROBE = "a"  # a response of which nobody makes anything else


class Detokenizer:
    """What responses under one tokenizer and template say: blanks and added tokens such as <think> included.

    Left off is what spells nothing (what ends, begins, pads or masks a text, and the sign for unknown pieces) and what
    the template puts around a response.

    ends: ids that end a response.
    follows: whether a response follows its prompt in one text, as in a decoder-only model.
    text_of, ids_of: a response and its prompt -> its text as it follows the prompt; its ids, with the end.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        ids: TextIds,
        ends: Sequence[int],
        follows: bool,
        text_of: Callable[[str, Prompt], str],
        ids_of: Callable[[str, Prompt], list[int]],
    ):
        self.tokenizer, self._ids, self._ends, self._follows = tokenizer, ids, ends, follows
        self._text_of, self._ids_of = text_of, ids_of
        self._around: dict[str, tuple[str, str]] = {}  # by the arguments of the chat template

    def texts(self, rows: Sequence[Sequence[int]], prompts: Sequence[Prompt]) -> list[str]:
        """The texts of responses to `prompts`."""
        return [
            self._unframed(text, prompt) if prompt and not goes_on(prompt) else text
            for text, prompt in zip(self._whole(rows, prompts), prompts, strict=True)
        ]

    def _unframed(self, text: str, prompt: Prompt) -> str:
        """`text` without what the template puts before and after a response."""
        before, after = self._frame(arguments_text(prompt))
        return text.removeprefix(before).removesuffix(after)

    def _whole(self, rows: Sequence[Sequence[int]], prompts: Sequence[Prompt]) -> list[str]:
        """What stands in each row, blanks at its beginning too: decoders drop these unless something goes before."""
        lead, width = self._lead
        spoken = [[i for i in row if i not in self._unspoken] for row in rows]
        whole = [[*lead, *row] if prompt else row for row, prompt in zip(spoken, prompts, strict=True)]
        texts = self.tokenizer.batch_decode(whole, clean_up_tokenization_spaces=False) if whole else []
        return [text[width:] if prompt else text for text, prompt in zip(texts, prompts, strict=True)]

    @cached_property
    def _unspoken(self) -> frozenset[int]:
        known = self.tokenizer
        named = (known.bos_token_id, known.unk_token_id, known.sep_token_id, known.cls_token_id, known.mask_token_id)
        return frozenset({*named, known.pad_token_id, *self._ends})

    @cached_property
    def _lead(self) -> tuple[list[int], int]:
        """Ids to put before a response that goes on after a prompt, and how many characters they are."""
        if not self._follows or not self._ids.guards:
            return [], 0
        ids = self._ids.whole(self._ids.guards[0])
        return ids, len(self.tokenizer.decode(ids))

    def _frame(self, arguments: str) -> tuple[str, str]:
        """What the template puts before and after a response, as it comes out of the tokenizer again.

        A decoder may drop the blank at the beginning of a text, and then it is not there to take off.
        """
        if arguments not in self._around:
            asked = Chat((Message("user", ASKED),), arguments=arguments) if arguments else ASKED
            before, _, after = self._text_of(MARK, asked).partition(MARK)
            written = self._whole([self._ids_of(PROBE, asked)], [asked])[0]
            whole = written.endswith(PROBE + after)
            self._around[arguments] = written.removesuffix(PROBE + after) if whole else before, after
        return self._around[arguments]
