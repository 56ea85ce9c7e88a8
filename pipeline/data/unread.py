"""What rows bring for a template that it does not read: refused where a row is another one without it, else said.

Refused are tools, calls of tools and their results; said are further keys of messages, as `name`, and variables.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import loopcontrols
from transformers import PreTrainedTokenizerBase

from pipeline.config.sections import TemplateSettings
from pipeline.data import chat
from pipeline.data.template import CURE, Prompt, arguments_of
from pipeline.errors import UserError, did_you_mean
from pipeline.records import Answer, Chat, Message

logger = logging.getLogger("tiffin")

GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # marks of transformers, which write nothing
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # transformers gives one under the names of all
# what the template is given anyway, or the call of transformers takes for its own
TAKEN = ("messages", "tools", "add_generation_prompt", "chat_template", "tokenize", "continue_final_message")
FUNCTIONS = {"raise_exception", "strftime_now", "namespace", "range", "dict", "lipsum", "cycler", "joiner"}


class Unread:
    """Checks rows against one template, each kind of thing once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: TemplateSettings):
        self.tokenizer, self.is_chat = tokenizer, template.kind == "chat"
        self.known: set[str] = set()  # what rows brought, and was checked

    def check(self, prompt: Prompt, answer: Answer | None = None) -> None:
        """Raises UserError where the template cannot write what a row holds; logs a line where it leaves it out."""
        if isinstance(prompt, str) and not isinstance(answer, Message):
            return
        turns = [*(() if isinstance(prompt, str) else prompt), *([answer] if isinstance(answer, Message) else [])]
        tools = isinstance(prompt, Chat) and prompt.tools != ""
        source = chat.source_of(self.tokenizer, tools) if self.is_chat else ""
        if tools and self._new("tools") and "tools" not in variables(source):
            raise self._refused("tools", "tools: rows have them", "reads")
        for key in _keys(turns):
            names = THOUGHTS if key in THOUGHTS else (key,)
            if self._new(f"key {key}") and not any(re.search(rf"\b{name}\b", source) for name in names):
                self._say_key(key)
        if any(turn.role == "tool" for turn in turns) and self._new("tool") and not self._writes_results(source):
            raise self._refused("tool", "messages: some are of role 'tool'", "writes")
        told = any(turn.role == "developer" for turn in turns) and not chat.knows_developer(source)
        if told and self._new("developer"):
            logger.info(f"messages of the developer: read as the system's, {self._but} does not know the role")
        for name in arguments_of(prompt):
            if self._new(f"argument {name}") and (found := problem_of(name, source)):
                if name in TAKEN:
                    self.known.remove(f"argument {name}")
                    raise UserError(f"chat_template_kwargs: {found}: rename it, or leave it out")
                logger.warning(f"chat_template_kwargs: {found}; it does nothing")

    def _new(self, thing: str) -> bool:
        """Whether it is met for the first time."""
        known = thing in self.known
        self.known.add(thing)
        return not known

    def _refused(self, thing: str, found: str, verb: str) -> UserError:
        """The error about `thing`, which the next row is refused for too."""
        self.known.remove(thing)
        return UserError(f"{found}, {self._but} {verb} none, {CURE}")

    @property
    def _but(self) -> str:
        return "but the tokenizer's chat template" if self.is_chat else "but template.kind=text"

    def _say_key(self, key: str) -> None:
        if key == "tool_calls":
            raise self._refused(f"key {key}", "messages: some have tool_calls", "writes")
        logger.warning(f"messages: some have '{key}', {self._but} does not read it: the model does not see it")

    def _writes_results(self, source: str) -> bool:
        """Whether the chat template writes what a tool answers; tried, as some leave roles out unasked."""
        if not self.is_chat:
            return False
        call, result = Message("assistant", "", chat.CALL), Message("tool", chat.MARK, '{"name": "f"}')
        try:
            return chat.MARK in chat.written(self.tokenizer, (Message("user", chat.ASKED), call, result), False)
        except UserError:  # as where it refuses the role, or one of these three for another reason: rows will tell
            return "tool" in source


def check_arguments(template: TemplateSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for a setting of `template.arguments` that the template does not read."""
    for name in template.arguments:
        if template.kind == "text":
            raise UserError(f"template.arguments: {name}, but template.kind=text reads none, wanted a chat template")
        found = [problem_of(name, chat.source_of(tokenizer, tools)) for tools in (False, True)]
        if all(found):
            raise UserError(f"template.arguments: {found[0]}")


def problem_of(name: str, source: str) -> str:
    """Why the template cannot be given the variable `name`; "" where it reads it."""
    known = sorted(variables(source) - {*TAKEN})
    if name in known:
        return ""
    wanted = f"wanted one of {', '.join(known)}" if known else "which reads none"
    return f"'{name}' is no variable of the chat template, {wanted}{did_you_mean(name, known)}"


def variables(source: str) -> set[str]:
    """What a chat template reads from outside, functions aside."""
    try:
        tree = Environment(extensions=[loopcontrols]).parse(GENERATION.sub("", source))
    except TemplateError:  # each prompt will say so
        return set()
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    # of its own ones, those that it sets where nobody else does
    asked = {test.node.name for test in tree.find_all(nodes.Test) if isinstance(test.node, nodes.Name)}
    return meta.find_undeclared_variables(tree) - FUNCTIONS - (own - asked)


def _keys(turns: Iterable[Message]) -> list[str]:
    """The further keys of messages, each once."""
    return [*dict.fromkeys(key for turn in turns if turn.more for key in json.loads(turn.more))]
