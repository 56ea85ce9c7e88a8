"""Templates, tokenizing, truncation and padding: the only tokenizing code.

A row is prompt ids followed by response ids, tokenised apart, so that the prompt of training is the prompt of
generation, token for token. EOS belongs to the response. Masks come from lengths, never from `ids != pad`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.config.sections import TemplateSettings
from pipeline.data import chat
from pipeline.errors import UserError
from pipeline.records import Message, Row

PROBE = "a"  # a response of which nobody makes anything else


class Encoder:
    """Text -> ids under one tokenizer, template and pair of limits, and back.

    encoder_decoder: prompts are read by an encoder, and keep the EOS that its tokenizer puts at their end.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: TemplateSettings,
        max_prompt_length: int,
        max_response_length: int,
        keep: str = "end",
        encoder_decoder: bool = False,
    ):
        template = resolved(template, tokenizer)
        check_template(template, tokenizer)
        if tokenizer.eos_token_id is None:
            raise UserError("model.path: its tokenizer has no EOS token, wanted one to end responses: set eos_token")
        self.tokenizer, self.template = tokenizer, template
        self.max_prompt_length, self.max_response_length = max_prompt_length, max_response_length
        self.keep = keep  # the end or the beginning of a long prompt
        self.encoder_decoder = encoder_decoder
        self.frame = chat.frame_of(tokenizer) if template.kind == "chat" else chat.ChatFrame()
        own = tokenizer.eos_token_id
        self.eos_id: int = own if self.frame.end is None else tokenizer.convert_tokens_to_ids(self.frame.end)
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((self.eos_id, own)))  # each of them ends a response
        self.pad_id: int = tokenizer.pad_token_id

    def described(self) -> str:
        """One line for people: which template is in use, and how a response ends."""
        end = self.tokenizer.convert_ids_to_tokens(self.eos_id)
        if self.template.kind == "text":
            return f"template: text, responses end with {end}"
        if self.frame.end is not None:
            dated = "" if self.template.date is None else f" of {self.template.date}"
            return f"template: the tokenizer's chat template{dated}, turns end with {end}"
        why = "ends turns without a special token" if self.frame.known else "writes no turn of the assistant"
        return f"template: the tokenizer's chat template, which {why}: responses end with {end}"

    def _turns(self, prompt: str | Sequence[Message]) -> list[Message]:
        turns = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
        return turns if self.template.system is None else [Message("system", self.template.system), *turns]

    def prompt_text(self, prompt: str | Sequence[Message]) -> str:
        """What the model reads for `prompt`, as text."""
        template = self.template
        if template.kind == "chat":
            return chat.written(self.tokenizer, self._turns(prompt), date=template.date) + self.frame.header
        system = "" if template.system is None else template.system
        if isinstance(prompt, str):
            return system + template.prompt.replace("{prompt}", prompt)
        return system + "".join(self._turn(turn) for turn in prompt) + template.assistant.rstrip()

    def _turn(self, turn: Message) -> str:
        heads = {"user": self.template.human, "assistant": self.template.assistant, "system": ""}
        return heads[turn.role] + turn.content

    def response_text(self, completion: str) -> str:
        """`completion` as it follows the prompt."""
        if self.template.kind == "chat":
            return completion
        return self.template.response.replace("{response}", completion)

    def encode_prompt(self, prompt: str | Sequence[Message], limit: int | None = None) -> tuple[tuple[int, ...], bool]:
        """Ids of a prompt, cut to `limit` (by default the Encoder's own), and whether it was cut.

        BOS stays, and EOS at an end that is cut off.
        """
        limit = self.max_prompt_length if limit is None else limit
        text = self.prompt_text(prompt)
        ids = self.tokenizer(text, add_special_tokens=self.template.kind == "text")["input_ids"]
        bos = self.tokenizer.bos_token_id
        if not ids and bos is not None:
            ids = [bos]
        if not ids:
            raise UserError("prompt: it is empty and the tokenizer has no BOS token to start from, wanted some text")
        return self.cut_prompt(tuple(ids), limit), len(ids) > limit

    def cut_prompt(self, ids: tuple[int, ...], limit: int) -> tuple[int, ...]:
        """`limit` (>= 1) of prompt ids: the last ones after BOS, or the first ones before an EOS that was the last."""
        if len(ids) <= limit:
            return ids
        if self.keep == "beginning":
            tail = ids[-1:] if ids[-1] == self.eos_id else ()
            return ids[: limit - len(tail)] + tail
        head = ids[:1] if ids[0] == self.tokenizer.bos_token_id else ()
        return head + ids[len(ids) - limit + len(head) :]

    def encode(self, prompt: str | Sequence[Message], completion: str | None) -> Row:
        """A prompt with its response and EOS, cut on the right to the limit; no response at all where None."""
        prompt_ids, cut_prompt = self.encode_prompt(prompt)
        if completion is None:
            return Row(prompt_ids, (), cut_prompt)
        text = self.response_text(completion)
        ids = [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.eos_id]
        limit = self.max_response_length
        return Row(prompt_ids, tuple(ids[:limit]), cut_prompt, cut_response=len(ids) > limit)

    def encode_conversation(self, prompt: str | Sequence[Message], completion: str) -> tuple[int, ...]:
        """Ids of all that the chat template writes for the conversation with this answer, uncut."""
        turns = [*self._turns(prompt), Message("assistant", completion)]
        text = chat.written(self.tokenizer, turns, open_turn=False, date=self.template.date)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of response ids, as the one who gave it wrote it: see `decode_all`."""
        return self.decode_all([ids])[0]

    def decode_all(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The texts of responses: all that they say, blanks and added tokens such as <think> included.

        Left off is what spells nothing (what ends, begins, pads or masks a text, and the sign for unknown pieces) and
        what the template puts around a response.
        """
        spoken = [[i for i in row if i not in self._unspoken] for row in rows]
        texts = self.tokenizer.batch_decode(spoken, clean_up_tokenization_spaces=False) if spoken else []
        before, after = self._around
        return [text.removeprefix(before).removesuffix(after) for text in texts]

    @cached_property
    def _unspoken(self) -> frozenset[int]:
        known = self.tokenizer
        named = (known.bos_token_id, known.unk_token_id, known.sep_token_id, known.cls_token_id, known.mask_token_id)
        return frozenset({*named, self.pad_id, *self.stop_ids})

    @cached_property
    def _around(self) -> tuple[str, str]:
        """What the template puts before and after a response, as it comes out of the tokenizer again.

        Many decoders drop the blank at the beginning of a text themselves, and then it is not there to take off.
        """
        before, _, after = self.response_text("{response}").partition("{response}")
        ids = self.tokenizer(before + PROBE, add_special_tokens=False)["input_ids"]
        written = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return (written.removesuffix(PROBE) if written.endswith(PROBE) else before), after


def resolved(template: TemplateSettings, tokenizer: PreTrainedTokenizerBase) -> TemplateSettings:
    """`template` with its kind: auto is chat where the tokenizer has a chat template, else text."""
    if template.kind != "auto":
        return template
    return template.model_copy(update={"kind": "text" if tokenizer.chat_template is None else "chat"})


def check_template(template: TemplateSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError when a placeholder or the chat template is missing."""
    if template.kind == "chat":
        if tokenizer.chat_template is None:
            raise UserError(
                "template.kind: chat, but the tokenizer has no chat template: set template.kind=text, "
                "or use a chat model"
            )
        return
    for name, value in (("prompt", template.prompt), ("response", template.response)):
        if f"{{{name}}}" not in value:
            raise UserError(f"template.{name}: {value!r} lacks {{{name}}}, wanted it where the text goes")


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Ragged ids as (B, T) int64, T >= 1, and the mask (B, T) bool that is True on them."""
    width = max([1, *(len(row) for row in rows)])
    ids = torch.full((len(rows), width), value, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place] = torch.tensor(row, dtype=torch.int64)
        mask[i, place] = True
    return ids, mask


def coloured(encoder: Encoder, row: Row) -> str:
    """One row to read: the prompt, the response's tokens with their boundaries, EOS visible.

    On a terminal the prompt is dim and the response green, unless NO_COLOR is set (https://no-color.org).
    """
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    dim, green, plain = ("\033[2m", "\033[32m", "\033[0m") if colours else ("", "", "")
    pieces = encoder.tokenizer.convert_ids_to_tokens(list(row.response_ids))
    prompt = encoder.tokenizer.decode(list(row.prompt_ids))
    counts = f"{len(row.prompt_ids)} prompt tokens (not learned) + {len(row.response_ids)} response tokens (learned)"
    return f"{dim}{prompt}{plain}{green}{'|'.join(pieces)}{plain}\n{counts}"
