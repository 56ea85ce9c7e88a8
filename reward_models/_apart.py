"""What classifiers read that read no conversation: a completion alone, a pair of texts, or a text made of several.

All are encoded as transformers' own pipeline for text classification does, but that special tokens spelled in a text
of the data stay text, and that a pair that is too long loses its first text's beginning first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import BatchEncoding, PreTrainedTokenizerBase

from pipeline.data.text_ids import TextIds
from pipeline.errors import UserError
from pipeline.records import Answer, Message, text_of


class Ids(NamedTuple):
    """The ids of a text, and the numbers of its parts where the model reads them (BERT: 0 of a prompt, 1 after it)."""

    ids: Sequence[int]
    types: Sequence[int] = ()


def completion_ids(tokenizer: PreTrainedTokenizerBase, answer: Answer, max_length: int) -> Ids:
    """A completion alone; its end is cut."""
    return _ids(_encoded(tokenizer, [text_of(answer)], max_length, "longest_first", "right"))


def pair_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message], answer: Answer, max_length: int
) -> Ids:
    """A prompt and a completion; one that fills all loses its end, and the prompt is empty."""
    text = text_of(answer)
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    own = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if len(own) >= room:
        return _ids(_encoded(tokenizer, ["", text], max_length, "only_second", "right"))
    return _ids(_encoded(tokenizer, [said(prompt), text], max_length, "only_first", "left"))


def cut_ids(ids: TextIds, marked: str, max_length: int) -> Ids:
    """A text of which what `ids` has marked is no special token; one that is too long loses its beginning."""
    whole, room = ids.whole(marked), max_length - len(ids.before) - len(ids.after)
    return Ids([*ids.before, *whole[max(len(whole) - room, 0) :], *ids.after])


def refuse_no_pairs(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError where a tokenizer puts nothing between the texts of a pair."""
    if tokenizer.num_special_tokens_to_add(pair=True) <= tokenizer.num_special_tokens_to_add(pair=False):
        problem = "its tokenizer puts no token between the texts of a pair"
        raise UserError(
            f"rewards.reads: pair for {name}: {problem}, wanted one that does: set conversation or completion"
        )


def said(prompt: str | Sequence[Message]) -> str:
    """A prompt as one text: of a chat what the user says, or "role: content" paragraphs of several turns."""
    if isinstance(prompt, str):
        return prompt
    return prompt[0].content if len(prompt) == 1 else "\n\n".join(f"{turn.role}: {turn.content}" for turn in prompt)


def _encoded(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, cut: str, side: str
) -> BatchEncoding:
    tokenizer.truncation_side = side
    return tokenizer(*texts, truncation=cut, max_length=max_length, split_special_tokens=True)


def _ids(encoded: BatchEncoding) -> Ids:
    return Ids(encoded["input_ids"], encoded.get("token_type_ids", ()))
