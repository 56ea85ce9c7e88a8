"""What a tokenizer's chat template writes: whole conversations, and what stands around an answer of the assistant."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pipeline.data.template import arguments_of, like
from pipeline.data.text_ids import OPEN
from pipeline.errors import UserError
from pipeline.records import Chat, Message

Turns = Sequence[Message] | Chat

SHOWN = 40  # characters of a text in a message
ASKED, ANSWER = "asked", "answered"  # one turn each of the conversation that is written to see what stands around it
MARK = "\ufdd2"  # stands for a text, to see where a template puts it; Unicode keeps it from texts
TAG = re.compile(r"[<\[][^<>\[\]\s]+[>\]]")  # of markup, as <think>, <|assistant|>, [/INST]
LAST_TAG = re.compile(rf"(?:<(?P<name>[^<>\s]+)>\s*</(?P=name)>|{TAG.pattern})\s*\Z")  # or <think></think>, empty
BLANKS = " \n\t"  # those that templates leave out around an answer
CALL = '{"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}'
TOOL = '[{"type": "function", "function": {"name": "f", "description": "f", "parameters": {"type": "object"}}}]'
CLOCK = "strftime_now"
STRFTIME = re.compile(r"%-?[A-Za-z]")  # a directive of strftime, as %d or %-d


class ChatFrame(NamedTuple):
    """What stands around the assistant's answer: `prompt` + header + lead + answer + tail + end."""

    header: str = ""  # of the assistant's turn, where add_generation_prompt has no effect; part of the prompt
    opened: str = ""  # the tag with which a prompt ends, as <think>, and the blanks behind it
    lead: str = ""  # between the prompt and the answer, part of the response
    tail: str = ""  # between the answer and the end, part of the response
    end: str | None = None  # the special token that ends the turn; None where only text does, or nothing
    known: bool = True  # the template can write an answer of the assistant
    strips: tuple[str, str] = ("", "")  # which of BLANKS it leaves out at the beginning of answers, and at their end
    only_prompts: bool = False  # `opened` stands in prompts alone, not before answers that the template writes


def prompt_text(tokenizer: PreTrainedTokenizerBase, turns: Turns, frame: ChatFrame, date: str | None = None) -> str:
    """`turns` as the chat template writes them, up to where the assistant goes on: with a turn, or its last words.

    `date`: see `written`. Raises UserError where the template refuses the turns.
    """
    if (last := turns[-1]).role != "assistant":
        return written(tokenizer, turns, date=date) + frame.header
    marked = like(turns, [*turns[:-1], Message("assistant", MARK)])
    before, found, _ = written(tokenizer, marked, False, date).partition(MARK)
    return (before if found else written(tokenizer, turns[:-1], date=date) + frame.header) + last.content


def answer_text(completion: str, frame: ChatFrame) -> str:
    """`completion`, marked or not, as it follows the prompt, without the token that ends it.

    What the prompt opened is not repeated.
    """
    left, right = frame.strips
    # all of BLANKS are a trim, which takes rarer ones too
    completion = completion.lstrip(None if left == BLANKS else left).rstrip(None if right == BLANKS else right)
    repeated = re.match(r"\s*" + r"\s*".join(map(re.escape, frame.opened.split())), completion)
    if frame.opened and repeated:
        blanks = frame.opened[len(frame.opened.rstrip()) :] + (frame.lead if frame.lead.isspace() else "")
        completion = completion[repeated.end() :].removeprefix(blanks)
    # a tag that is marked is not a token
    brings_own = any(re.search(f"(?<!{OPEN}){re.escape(tag)}", completion) for tag in TAG.findall(frame.lead))
    return ("" if brings_own else frame.lead) + completion + frame.tail


def message_text(
    tokenizer: PreTrainedTokenizerBase, turns: Turns, answer: Message, frame: ChatFrame, date: str | None = None
) -> tuple[str, str | None]:
    """What the chat template writes of `answer` behind the prompt `turns`, and the special token that ends it.

    Some end a call of tools with a token of its own. None: EOS ends it. Raises UserError where the template writes the
    answer otherwise than it begins one.
    """
    before = prompt_text(tokenizer, turns, frame, date)
    whole = written(tokenizer, like(turns, [*turns, answer]), False, date)
    if not whole.startswith(before):  # a template that opens <think> in prompts alone
        marked = like(turns, [*turns, Message("assistant", MARK)])
        before = written(tokenizer, marked, False, date).partition(MARK)[0]
    if not whole.startswith(before):
        begun, found = before[-SHOWN:], whole[max(0, len(before) - SHOWN) :][:SHOWN]
        raise UserError(
            f"template: prompts end with {begun!r}, but the chat template writes the assistant's message as {found!r}, "
            "wanted it to follow the prompt: has it reasoning_content where thinking is off (enable_thinking)?"
        )
    said = whole[len(before) :]
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = [one for one in markers(tokenizer) if one in special or one == frame.end]
    if frame.end is not None and (end := re.search(rf"({'|'.join(map(re.escape, ends))})\s*\Z", said)):
        return said[: end.start()], end.group(1)
    return said, None


def written(tokenizer: PreTrainedTokenizerBase, turns: Turns, open_turn: bool = True, date: str | None = None) -> str:
    """`turns` as the chat template writes them, with the beginning of the assistant's next turn if `open_turn`.

    Two messages of the system become one; under a template that does not name the developer, its messages are the
    system's. `date`: what it writes as today's, 2026-03-01; None: today's. Raises UserError where the template refuses
    them.
    """
    tools = json.loads(turns.tools) if isinstance(turns, Chat) and turns.tools else None
    template = source_of(tokenizer, tools is not None)
    told = "system" if not knows_developer(template) else "developer"
    listed = [turn._replace(role=told) if turn.role == "developer" else turn for turn in turns]
    if [turn.role for turn in listed[:2]] == ["system", "system"]:
        listed[:2] = [listed[1]._replace(content=f"{listed[0].content}\n\n{listed[1].content}")]
    try:
        return tokenizer.apply_chat_template(
            [turn.given() for turn in listed],
            tools=tools,
            tokenize=False,
            add_generation_prompt=open_turn,
            chat_template=template if date is None else dated(template, date),
            **arguments_of(turns),
        )
    except (TemplateError, TypeError) as error:
        # broken, or one of the many that want user and assistant in turn, or no system message
        roles = ", ".join(turn.role for turn in turns)
        raise UserError(
            f"template.kind: the tokenizer's chat template cannot write the roles {roles} ({error}), "
            "wanted one that can: change template.system, the prompts or the template, or set template.kind=text"
        ) from None


def end_of_calls(tokenizer: PreTrainedTokenizerBase, frame: ChatFrame) -> str | None:
    """The special token that ends a call of a tool, as <|call|>; None where the template writes none, or no calls."""
    if "tool_calls" not in source_of(tokenizer, tools=True):
        return None
    asked = Chat((Message("user", ASKED),), tools=TOOL)
    try:
        return message_text(tokenizer, asked, Message("assistant", "", CALL), frame)[1]
    except UserError:
        return None


def source_of(tokenizer: PreTrainedTokenizerBase, tools: bool = False) -> str:
    """The chat template itself; some tokenizers have one of their own for prompts with tools."""
    return tokenizer.get_chat_template(tools=[] if tools else None)


def knows_developer(template: str) -> bool:
    """Whether it says of the role what it does with it."""
    return re.search(r"['\"]developer['\"]", template) is not None


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template reads the clock, by the function that transformers gives to templates."""
    return tokenizer.chat_template is not None and CLOCK in tokenizer.get_chat_template()


def dated(template: str, date: str) -> str:
    """The chat template with a clock that stands still at `date`, see `clock`."""
    # trim_blocks, which transformers sets, removes the line end after a block
    return f"{clock(template, date)}\n{template}"


def clock(template: str, date: str) -> str:
    """A macro that stands still at `date` and hides the function by which `template` reads the real one's time.

    (transformers passes no function of ours into a template.)
    """
    day = datetime.date.fromisoformat(date)
    codes = sorted({*STRFTIME.findall(template)})
    replaced = "".join(f"|replace('{code}', '{day.strftime(code)}')" for code in codes)
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}"


def frame_of(tokenizer: PreTrainedTokenizerBase, arguments: str = "") -> ChatFrame:
    """What the template writes around an answer, read off one that it writes; `arguments` as a Chat has them."""
    asked = Chat((Message("user", ASKED),), arguments=arguments)
    try:
        closed, prompt = (written(tokenizer, asked, open_turn) for open_turn in (False, True))
        before, found, after = _around_answer(tokenizer, asked, ANSWER)
        left = "".join(blank for blank in BLANKS if _around_answer(tokenizer, asked, blank + ANSWER)[0] == before)
        right = "".join(blank for blank in BLANKS if _around_answer(tokenizer, asked, ANSWER + blank)[2] == after)
    except UserError:  # each prompt will say so, if it is one that the template refuses
        return ChatFrame(known=False)
    if not found:
        return ChatFrame(opened=_last_tag(prompt), known=False)
    end = re.search("|".join(map(re.escape, markers(tokenizer))), after)
    header, lead = "", before.removeprefix(prompt) if before.startswith(prompt) else ""
    if prompt == closed and lead.strip():
        header = lead.rstrip(" ")
        lead = lead[len(header) :]
    return ChatFrame(
        header,
        opened=_last_tag(prompt + header),
        lead=lead,
        tail=after[: end.start()] if end else "",
        end=end.group() if end else None,
        strips=(left, right),
        only_prompts=not before.startswith(prompt),
    )


def markers(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens with which a template can mark an end, the longest first: special and added ones that show."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    shown = {token for token in (*added, *tokenizer.all_special_tokens) if token.strip()}
    return sorted(shown, key=len, reverse=True)


def _around_answer(tokenizer: PreTrainedTokenizerBase, asked: Chat, answer: str) -> tuple[str, str, str]:
    """What the template writes before ANSWER, ANSWER itself, or "" where it does not, and what comes behind it."""
    turns = like(asked, [*asked, Message("assistant", answer)])
    return written(tokenizer, turns, open_turn=False).rpartition(ANSWER)


def _last_tag(prompt: str) -> str:
    """The tag that ends `prompt`, or the two with nothing in them, with all blanks; "" where something else does."""
    found = LAST_TAG.search(prompt)
    return found.group() if found else ""
