"""Prompts and responses as text, under a template of our own (`template.kind=text`): no tokenizer is asked.

A prompt that is one text is one turn of the user; "" is the prompt of plain text, around which no template stands.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.sections import TemplateSettings
from pipeline.errors import UserError
from pipeline.records import Message

Prompt = str | Sequence[Message]


def check(template: TemplateSettings) -> None:
    """Raises UserError where a placeholder is missing."""
    for name, value in (("prompt", template.prompt), ("response", template.response)):
        if value is not None and f"{{{name}}}" not in value:
            raise UserError(f"template.{name}: {value!r} lacks {{{name}}}, wanted it where the text goes")


def turns_of(prompt: Prompt, template: TemplateSettings) -> tuple[Message, ...]:
    """`prompt` as turns, the system's first where there is one; what `template` says is in them."""
    if isinstance(prompt, str):
        filled = prompt if template.prompt is None else template.prompt.replace("{prompt}", prompt)
        prompt = (Message("user", filled),)
    return tuple(prompt) if template.system is None else (Message("system", template.system), *prompt)


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
    heads = {"user": template.human, "assistant": template.assistant.rstrip(), "system": ""}
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
