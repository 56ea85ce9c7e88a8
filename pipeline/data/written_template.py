"""The chat template that a model directory gives to other tools, so that they read chats as it was trained.

Under our own template (`template.kind=text`) it is written anew, in Jinja. A tokenizer's own is kept, with what was set
around it: the system's words, `template.prompt` and `template.response`, `template.arguments` where none are given, the
date. What a tool makes of a chat are the
ids that `Encoder` makes of the same turns, but for one thing: special tokens that a message spells are those tokens.
"""

from __future__ import annotations

import json
import logging

from transformers import PreTrainedTokenizerBase

from pipeline.config.sections import TemplateSettings
from pipeline.data import chat
from pipeline.data.template import blank_of
from pipeline.data.tokenization import Encoder
from pipeline.records import Message

logger = logging.getLogger("tiffin")

ANY_LENGTH = 1 << 20
MARK = "{#- Chats as this model was trained to read them, see trained_input.json #}\n"
# a prompt that is one text is one turn of the user
ANSWERED = "messages|length == 2 and messages[1].role == 'assistant'"
ALONE = f"messages[0].role == 'user' and (messages|length == 1 or {ANSWERED})"
PROBES: tuple[tuple[Message, ...], ...] = (
    (Message("user", "How do I plant a bean?"),),
    (Message("system", "Be kind."), Message("user", "Why?"), Message("assistant", "So."), Message("user", "And 2?")),
)


def for_others(encoder: Encoder, scalar: bool = False) -> str | None:
    """The chat template with which other tools read as `encoder` does; None where the tokenizer's own does that.

    `scalar`: a reward model reads, whose texts end where an answer does.
    """
    template, tokenizer = encoder.template, encoder.tokenizer
    if template.kind == "chat":
        return _around_own(encoder, scalar)
    before, after = ("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in encoder.around)
    apart = encoder.encoder_decoder and not scalar  # the answer is no part of what the encoder reads
    end = after if apart else tokenizer.eos_token
    # some tokenizers put a blank before a text, but none behind BOS
    tried = [_of_text(template, before + blank, end, apart) for blank in ("", " ")]
    same = [one for one in tried if _reads_alike(one, encoder)]
    if not same:
        logger.warning("tokenizer: its saved chat template makes other ids of a chat than training did")
    return (same or tried)[0]


def is_written(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template is one that `for_others` made."""
    return tokenizer.chat_template is not None and tokenizer.get_chat_template().startswith(MARK)


def _of_text(template: TemplateSettings, before: str, end: str, apart: bool) -> str:
    """Our own template in Jinja: the turns as `template.prompt_text` writes them; `end` closes an answer.

    `apart`: the prompt is read without its answer, and `end` closes the prompt.
    """
    blank, said, start = blank_of(template), "message.content", before + (template.system or "")
    following = f"{said}[{len(blank)}:{len(blank) + 1}]"  # the blank stands once, if no further one comes behind it
    begun = f"{said}.startswith({_text(blank)}) and {following} == {following}|trim"
    answer = f"{said} if {begun} else {_text(blank)} + {said}" if blank else said
    opened, asked = _text(template.assistant.rstrip()), f"{_text(template.human)} + {said}"
    if template.prompt is not None:
        asked = f"{_filled('prompt', template.prompt, said)} if alone else {asked}"
        opened = f"'' if alone else {opened}"
    if template.response is not None:
        answer = f"{_filled('response', template.response, said)} if alone else ({answer})"
    closed = f"{{%- elif messages[-1].role == 'assistant' -%}}{_written(end)}"
    parts = [
        f"{{%- set alone = {ALONE} -%}}" if {template.prompt, template.response} != {None} else "",
        f"{{%- set opened = {opened} -%}}",
        _written(start),
        "{%- for message in messages -%}",
        f"{{%- if message.role == 'user' -%}}{{{{- {asked} -}}}}",
        f"{{%- elif message.role == 'assistant' -%}}{{{{- opened -}}}}{{{{- {answer} -}}}}",
        f"{{%- elif message.role == 'system' -%}}{{{{- {said} -}}}}",
        "{%- else -%}{{- raise_exception('no role of this model: ' + message.role) -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        "{%- if add_generation_prompt -%}{{- opened if messages[-1].role != 'assistant' else '' -}}",
        f"{{%- endif -%}}{_written(end)}" if apart else f"{closed}{{%- endif -%}}",
    ]
    return MARK + "\n".join(part for part in parts if part) + "\n"


def _around_own(encoder: Encoder, scalar: bool) -> str | None:
    """The tokenizer's own chat template with what was set; None where nothing was."""
    template, frame, sets = encoder.template, encoder.frame, []
    own, date = encoder.tokenizer.get_chat_template(), template.date
    if template.prompt is not None or template.response is not None:
        asked, answer = "messages[0].content", "messages[1].content"
        if template.prompt is not None:
            asked = _filled("prompt", template.prompt, asked)
        if template.response is not None:
            answer = _filled("response", template.response, answer)
        answered = f"[{{'role': 'assistant', 'content': {answer}}}] if messages|length == 2 else []"
        alone = f"[{{'role': 'user', 'content': {asked}}}] + ({answered})"
        sets.append(f"messages = ({alone}) if {ALONE} else messages")
    if template.system is not None:
        both = f"{_text(template.system)} + '\\n\\n' + messages[0].content"  # as `chat.written` joins two of the system
        told = "[{{'role': 'system', 'content': {}}}] + {}".format
        first = f"{told(both, 'messages[1:]')} if messages[0].role == 'system'"
        sets.append(f"messages = {first} else {told(_text(template.system), 'messages')}")
    before = "".join(f"{{%- set {one} %}}\n" for one in sets)
    before += "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {value!r} %}}{{%- endif %}}\n"
        for name, value in template.arguments.items()
    )
    if date is not None and chat.writes_date(encoder.tokenizer):
        before += chat.clock(own, date) + "\n"
    after = f"{{% if add_generation_prompt %}}{{{{ {_text(frame.header)} }}}}{{% endif %}}" if frame.header else ""
    if scalar and frame.end is not None:  # many go on after it, with a line end
        before += "{%- set answered = messages[-1].role == 'assistant' and not add_generation_prompt %}\n"
        own = f"{{% set whole %}}\n{own}{{% endset %}}"
        after = f"{{{{ whole[:whole|length - whole.split({_text(frame.end)})[-1]|length] if answered else whole }}}}"
    # trim_blocks, which transformers sets, removes the line end after a block
    return MARK + before + own + after if before or after else None


def _filled(name: str, line: str, value: str) -> str:
    """The Jinja expression of a line of the template with the text `value`, an expression too, in its place."""
    return f"{_text(line)}|replace('{{{name}}}', {value})"


def _written(text: str) -> str:
    """Jinja that writes `text`."""
    return f"{{{{- {_text(text)} -}}}}" if text else ""


def _text(text: str) -> str:
    """`text` as a literal of Jinja."""
    return json.dumps(text, ensure_ascii=False)


def _reads_alike(written: str, encoder: Encoder) -> bool:
    """Whether a tool that has this template reads chats as `encoder` does, as far as two of them tell."""
    return all(
        encoder.tokenizer.apply_chat_template(
            [turn.given() for turn in turns], chat_template=written, add_generation_prompt=True, return_dict=False
        )
        == list(encoder.encode_prompt(turns[0].content if len(turns) == 1 else turns, ANY_LENGTH)[0])
        for turns in PROBES
    )
