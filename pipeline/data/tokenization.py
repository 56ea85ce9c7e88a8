"""Prompts and responses to ids under a tokenizer, a template and two limits, and back; padding.

A row is prompt ids followed by response ids, tokenised apart, so that the prompt of training is the prompt of
generation, token for token. The token that ends a response belongs to it. Masks come from lengths, never from
`ids != pad`.
"""

from __future__ import annotations

import bisect
import copy
import hashlib
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.config.sections import TemplateSettings
from pipeline.data import chat
from pipeline.data import template as plain
from pipeline.data.chat import ASKED, MARK, ChatFrame
from pipeline.data.cuts import fewer_turns, with_mark
from pipeline.data.detokenization import Detokenizer
from pipeline.data.template import SYSTEM, Prompt, goes_on, like
from pipeline.data.text_ids import TextIds
from pipeline.data.unread import Unread, check_arguments
from pipeline.errors import UserError
from pipeline.records import Answer, Chat, Message, Row


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
        if tokenizer.eos_token_id is None:
            raise UserError("model.path: its tokenizer has no EOS token, wanted one to end responses: set eos_token")
        self.tokenizer, self.template = tokenizer, template
        self.max_prompt_length, self.max_response_length = max_prompt_length, max_response_length
        self.keep = keep  # the end or the beginning of a long prompt
        self.encoder_decoder = encoder_decoder
        check_arguments(template, tokenizer)
        self.unread = Unread(tokenizer, template)
        self.said: set[str] = set()  # lines about rows that were tokenised
        self._frames: dict[str, ChatFrame] = {}  # by the arguments of the template
        self.frame = self._frame_of(ASKED)
        own = tokenizer.eos_token_id
        self.eos_id: int = own if self.frame.end is None else tokenizer.convert_tokens_to_ids(self.frame.end)
        call = chat.end_of_calls(tokenizer, self.frame) if template.kind == "chat" else None
        ends = (self.eos_id, own, *([] if call is None else [tokenizer.convert_tokens_to_ids(call)]))
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(ends))  # each of them ends a response
        self.pad_id: int = tokenizer.pad_token_id
        self._ids = TextIds(tokenizer)
        chat_writes_all = template.kind == "chat"  # else ids before and after a prompt, as BOS and EOS:
        self.around = ([], []) if chat_writes_all else (self._ids.before, self._ids.after if encoder_decoder else [])
        spelled = "|".join(map(re.escape, tokenizer.convert_ids_to_tokens(list(self.stop_ids))))
        self._back = Detokenizer(
            tokenizer, self._ids, self.stop_ids, not encoder_decoder, self.response_text, self._response_ids
        )
        self._own_end = re.compile(rf"(?:(?:{spelled})\s*)+\Z")

    def anew(self) -> Encoder:
        """The same, to which no row has been shown yet."""
        other = copy.copy(self)
        other.unread, other.said = Unread(self.tokenizer, self.template), set()
        return other

    @cached_property
    def key(self) -> str:
        """All that ids depend on: every file of the tokenizer, the template, the limits."""
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
            content = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        kind = type(self.tokenizer)
        limits = [self.max_prompt_length, self.max_response_length, self.keep, self.encoder_decoder]
        parts = [kind.__module__, kind.__qualname__, content, self.template.model_dump_json(), limits]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def described(self) -> str:
        """One line for people: which template is in use, and how a response ends."""
        end = self.tokenizer.convert_ids_to_tokens(self.eos_id)
        if self.template.kind == "text":
            return f"template: text, responses end with {end}"
        tag = f"; prompts end with {self.frame.opened.rstrip()}, which responses have to close"
        left_open = tag if self.frame.opened and self.frame.only_prompts else ""
        if self.frame.end is not None:
            dates = self.template.date is not None and chat.writes_date(self.tokenizer)
            dated = f" of {self.template.date}" if dates else ""
            return f"template: the tokenizer's chat template{dated}, turns end with {end}{left_open}"
        why = "ends turns without a special token" if self.frame.known else "writes no turn of the assistant"
        return f"template: the tokenizer's chat template, which {why}: responses end with {end}{left_open}"

    def prompt_text(self, prompt: Prompt) -> str:
        """What the model reads for `prompt`, as text; nothing before plain text, whose prompt is ""."""
        if self.template.kind == "text" or not prompt:
            return plain.prompt_text(prompt, self.template)
        turns = plain.turns_of(prompt, self.template)
        return chat.prompt_text(self.tokenizer, turns, self._frame_of(prompt), self.template.date)

    def response_text(self, completion: str, prompt: Prompt = ASKED) -> str:
        """`completion` as it follows `prompt`, without the token that ends it."""
        if self.template.kind == "text" or not prompt or goes_on(prompt):
            return plain.response_text(completion, self.template, prompt)
        if self.template.response is not None and isinstance(prompt, str):
            completion = plain.response_text(completion, self.template, prompt)
        return chat.answer_text(completion, self._frame_of(prompt))

    def encode_prompt(self, prompt: Prompt, limit: int | None = None) -> tuple[tuple[int, ...], bool]:
        """Ids of a prompt, cut to `limit` (by default the Encoder's own), and whether it was cut.

        Turns go first, then the text of the one that is left; what the template and the tokenizer put around it stays.
        Raises UserError where nothing else fits, or the template cannot write what the prompt holds.
        """
        self.unread.check(prompt)
        limit = self.max_prompt_length if limit is None else limit
        prompt = self._marked(self._without_ends(prompt))
        ids = self._prompt_ids(prompt)
        return (tuple(ids), False) if len(ids) <= limit else (tuple(self._cut(prompt, limit)), True)

    def encode(self, prompt: Prompt, completion: Answer | None, unfinished: bool = False) -> Row:
        """A prompt with its response and the token that ends it, cut on the right; no response at all where None.

        An unfinished response, which was cut off before it ended, has no such token.
        A response that is a message, as a call of tools, is what the chat template writes of it. Raises UserError where
        the template cannot write what the row holds.
        """
        if isinstance(completion, Message):
            self.unread.check(prompt, completion)
        prompt_ids, cut_prompt = self.encode_prompt(prompt)
        asked = self._without_ends(prompt)
        spelled = self._spells(asked)
        if completion is None:
            return Row(prompt_ids, (), cut_prompt, spelled=spelled)
        (answer,) = self._without_ends((_message_of(completion),))
        text = answer if answer.more and self.template.kind == "chat" else answer.content
        ids, limit = self._response_ids(text, prompt), self.max_response_length
        words = len(ids) - 1  # without the end
        ids = ids[:words] if unfinished else ids
        return Row(
            prompt_ids,
            tuple(ids[:limit]),
            cut_prompt,
            cut_response=len(ids) > limit,
            spelled=spelled or self._spells((answer,)),
            own_end=(answer, asked) != (_message_of(completion), prompt),
            unfinished=unfinished,
            cut_text=words > limit,
        )

    def encode_conversation(self, prompt: Prompt, completion: Answer) -> tuple[int, ...]:
        """Ids of all that the chat template writes for the conversation with this answer, uncut."""
        self.unread.check(prompt, completion)
        chat_of = plain.turns_of(self._marked(prompt), self.template)
        turns, (answer,) = [*chat_of], self._marked(self._without_ends((_message_of(completion),)))
        if goes_on(prompt):
            answer = answer._replace(content=turns.pop().content + answer.content)
        said = like(chat_of, [*turns, answer])
        return tuple(self._ids.whole(chat.written(self.tokenizer, said, False, self.template.date)))

    def decode(self, ids: Sequence[int], prompt: Prompt = ASKED) -> str:
        """The text of response ids, as the one who gave it wrote it: see `decode_all`."""
        return self.decode_all([ids], [prompt])[0]

    def decode_all(self, rows: Sequence[Sequence[int]], prompts: Sequence[Prompt]) -> list[str]:
        """The texts of responses to `prompts`: see `Detokenizer`."""
        return self._back.texts(rows, prompts)

    def _frame_of(self, prompt: Prompt) -> ChatFrame:
        """What stands around the answer to `prompt`, which hangs on the arguments of the chat template."""
        if self.template.kind != "chat":
            return ChatFrame()
        arguments = plain.arguments_text(plain.turns_of(prompt, self.template))
        if arguments not in self._frames:
            self._frames[arguments] = chat.frame_of(self.tokenizer, arguments)
        return self._frames[arguments]

    def _without_ends(self, prompt: Prompt) -> Prompt:
        """`prompt` without ends of the assistant's turns that its texts bring along."""
        if isinstance(prompt, str):
            return prompt
        answers = [turn.role == "assistant" and self._own_end.search(turn.content) is not None for turn in prompt]
        if not any(answers):
            return prompt
        return like(
            prompt,
            (
                turn._replace(content=self._own_end.sub("", turn.content)) if ends else turn
                for turn, ends in zip(prompt, answers, strict=True)
            ),
        )

    def _marked(self, prompt: Prompt) -> Prompt:
        """`prompt` with marks around what spells a special token, unless that is to be the token."""
        if self.template.special_tokens == "token":
            return prompt
        if isinstance(prompt, str):
            return self._ids.marked(prompt)
        marked = self._ids.marked  # in JSON text too, where a token is spelled as anywhere
        turns = (turn._replace(content=marked(turn.content), more=marked(turn.more)) for turn in prompt)
        chat_of = like(prompt, turns)
        return replace(chat_of, tools=marked(chat_of.tools)) if isinstance(chat_of, Chat) else chat_of

    def _spells(self, prompt: Prompt) -> bool:
        """Whether a special token is spelled in `prompt`, and read as plain text."""
        texts = [prompt] if isinstance(prompt, str) else [text for turn in prompt for text in (turn.content, turn.more)]
        texts += [prompt.tools] if isinstance(prompt, Chat) else []
        return self.template.special_tokens == "text" and any(map(self._ids.special.search, texts))

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        """Ids of a marked prompt, and of what the tokenizer puts around it."""
        ids, bos = [*self._begun(self.prompt_text(prompt)), *self.around[1]], self.tokenizer.bos_token_id
        return ids or [self.tokenizer.eos_token_id if bos is None else bos]

    def _begun(self, text: str) -> list[int]:
        """Ids of a text that begins a prompt, behind BOS where the tokenizer puts it; a text may bring it along."""
        ids, before = self._ids.whole(text), self.around[0]
        return [*before, *(ids[len(before) :] if ids[: len(before)] == before else ids)]

    def _response_ids(self, answer: Answer, prompt: Prompt) -> list[int]:
        """Ids of a response, and the token that ends it."""
        if isinstance(answer, Message):
            return self._message_ids(answer, prompt)
        text = self.response_text(self._marked(answer), prompt)
        if self.encoder_decoder:
            return [*self._ids.first(text), self.eos_id]
        if prompt:
            return [*self._ids.inner(text, after="" if goes_on(prompt) else self._frame_of(prompt).opened), self.eos_id]
        return [*self._ids.whole(text), self.tokenizer.eos_token_id]

    def _message_ids(self, answer: Message, prompt: Prompt) -> list[int]:
        """Ids of what the chat template writes of a message of the assistant, and of the token that ends it."""
        if not prompt or goes_on(prompt):
            raise UserError("messages: the assistant speaks twice running, wanted a tool's result or the user between")
        (answer,), turns = self._marked((answer,)), plain.turns_of(self._marked(prompt), self.template)
        frame = self._frame_of(prompt)
        text, end = chat.message_text(self.tokenizer, turns, answer, frame, self.template.date)
        last = self.eos_id if end is None else self.tokenizer.convert_tokens_to_ids(end)
        whole = self._ids.first(text) if self.encoder_decoder else self._ids.inner(text, after=frame.opened)
        return [*whole, last]

    def _cut(self, prompt: Prompt, limit: int) -> list[int]:
        """Ids of a marked prompt that is too long: fewer turns, else a part of one."""
        last = [prompt]
        if not isinstance(prompt, str):
            shorter = fewer_turns(prompt, self.keep)
            place = bisect.bisect_left(shorter, True, key=lambda some: len(self._prompt_ids(some)) <= limit)
            if place < len(shorter):
                return self._prompt_ids(shorter[place])
            last = shorter[-1:]
            if last[0][0].role in SYSTEM and len(last[0]) > 1:  # goes too where it leaves no room
                last.append(last[0][1:])
        parts = [self._part_of(one, limit) for one in last]
        found = next(filter(None, parts), None)
        if found is None:
            raise UserError(
                f"data.max_prompt_length: {limit}, which the template fills without any of the prompt's text, wanted "
                "more: raise it, or shorten template.system"
            )
        return found

    def _part_of(self, prompt: Prompt, limit: int) -> list[int] | None:
        """As many ids of the text of the only turn of the user, or what follows it, as fit in, or all.

        None where none of it does.
        """
        if len(whole := self._prompt_ids(prompt)) <= limit:  # as where the system's turn went
            return whole
        text = self.prompt_text(prompt)
        content, marked = (prompt, MARK) if isinstance(prompt, str) else with_mark(prompt)
        head, found, tail = self.prompt_text(marked).partition(MARK)
        if not found:
            return None
        if text.startswith(head) and text.endswith(tail):
            content = text[len(head) : len(text) - len(tail)]  # as the template wrote it
        ids, after = self._ids, self.around[1]
        if self.keep == "beginning":
            end, first, least = [*ids.inner(tail), *after], self._begun(head + content), len(self._begun(head))
            return [*first[: limit - len(end)], *end] if limit - len(end) > least else None
        # the blank at the end of the template's beginning belongs to the next word
        start = self._begun(head.rstrip(" "))
        blank = head[len(head.rstrip(" ")) :]
        rest, least = [*ids.inner(blank + content + tail, after=head), *after], len(ids.inner(tail) + after)
        return [*start, *rest[len(rest) - (limit - len(start)) :]] if limit - len(start) > least else None


def _message_of(answer: Answer) -> Message:
    return Message("assistant", answer) if isinstance(answer, str) else answer


def resolved(template: TemplateSettings, tokenizer: PreTrainedTokenizerBase) -> TemplateSettings:
    """`template` with its kind: auto is chat where the tokenizer has a chat template, else text.

    Raises UserError where a placeholder or the chat template is missing.
    """
    if template.kind == "chat" and tokenizer.chat_template is None:
        raise UserError(
            "template.kind: chat, but the tokenizer has no chat template: set template.kind=text, or use a chat model"
        )
    plain.check(template)
    if template.kind != "auto":
        return template
    return template.model_copy(update={"kind": "text" if tokenizer.chat_template is None else "chat"})


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
