"""Prompts and responses as text, under a template of our own (`template.kind=text`): no tokenizer is asked.

A prompt that is one text is one turn of the user; "" is the prompt of plain text, around which no template stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

from pipeline.config.sections import TemplateSettings
from pipeline.errors import UserError
from pipeline.records import Chat, Message

Prompt = str | Sequence[Message] | Chat
SYSTEM = ("system", "developer")  # under a template that does not know the developer, what it says is the system's
CURE = "wanted a model with a chat template that does (template.kind=chat), or rows without"


def check(template: TemplateSettings) -> None:
    """Raises UserError where a placeholder is missing."""
    for name, value in (("prompt", template.prompt), ("response", template.response)):
        if value is not None and f"{{{name}}}" not in value:
            raise UserError(f"template.{name}: {value!r} lacks {{{name}}}, wanted it where the text goes")


def turns_of(prompt: Prompt, template: TemplateSettings) -> tuple[Message, ...] | Chat:
    """`prompt` as turns, the system's first where there is one; what `template` says is in them.

    Arguments of the row go before those of `template.arguments`.
    """
    if isinstance(prompt, str):
        filled = prompt if template.prompt is None else template.prompt.replace("{prompt}", prompt)
        prompt = (Message("user", filled),)
    turns = like(prompt, prompt if template.system is None else (Message("system", template.system), *prompt))
    if not template.arguments:
        return turns
    arguments = template.arguments | arguments_of(prompt)
    chat = turns if isinstance(turns, Chat) else Chat(turns)
    return replace(chat, arguments=json.dumps(arguments, ensure_ascii=False))


def like(prompt: Sequence[Message] | Chat, turns: Iterable[Message]) -> tuple[Message, ...] | Chat:
    """`turns`, with what `prompt` gives its template beside its own."""
    return replace(prompt, turns=tuple(turns)) if isinstance(prompt, Chat) else tuple(turns)


def arguments_of(prompt: Prompt) -> dict[str, object]:
    """The template's variables that a prompt brings."""
    text = arguments_text(prompt)
    return json.loads(text) if text else {}


def arguments_text(prompt: Prompt) -> str:
    """The same as JSON text, "" where there are none."""
    return prompt.arguments if isinstance(prompt, Chat) else ""


def goes_on(prompt: Prompt) -> bool:
    """Whether the response goes on with the assistant's own words, of which the prompt has the first."""
    return not isinstance(prompt, str) and prompt[-1].role == "assistant"


def prompt_text(prompt: Prompt, template: TemplateSettings) -> str:
    """What stands before the response, without the blank that opens it."""
    if not prompt:
        return ""
    turns = turns_of(prompt, template)
    if isinstance(prompt, str) and template.prompt is not None:
        return "".join(turn.content for turn in turns)
    heads = {"user": template.human, "assistant": template.assistant.rstrip(), **dict.fromkeys(SYSTEM, "")}
    if unknown := next((turn.role for turn in turns if turn.role not in heads), None):
        raise UserError(f"template.kind: text, which writes no message of '{unknown}', {CURE}")
    said = [_after_blank(turn.content, template) if turn.role == "assistant" else turn.content for turn in turns]
    text = "".join(heads[turn.role] + words for turn, words in zip(turns, said, strict=True))
    return text if goes_on(prompt) else text + heads["assistant"]


def response_text(completion: str, template: TemplateSettings, prompt: Prompt) -> str:
    """`completion` as it follows `prompt`: behind turns, after the blank that ends template.assistant, but once."""
    if not prompt or goes_on(prompt):
        return completion
    if template.response is not None and isinstance(prompt, str):
        return template.response.replace("{response}", completion)
    return _after_blank(completion, template)


def blank_of(template: TemplateSettings) -> str:
    """What ends template.assistant, and opens the response."""
    return template.assistant[len(template.assistant.rstrip()) :]


def _after_blank(text: str, template: TemplateSettings) -> str:
    """`text` behind the blank, which it may bring along: more than that, as before indented code, is its own."""
    blank = blank_of(template)
    own = text.startswith(blank) and not text[len(blank) :][:1].isspace()
    return text if own else blank + text
