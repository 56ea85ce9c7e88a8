"""Chat templates that behave as the makers' do: Qwen 3 (ChatML with tools and thoughts), Llama 3.1, Gemma 2.

Each is a short one of our own, after what the makers' templates write: which roles, where blanks are stripped, how
tools and calls are told, what a switch changes.
"""

from __future__ import annotations

from functools import cache

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.chats import byte_pairs

QWEN = """
{%- set told = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools %}{{- '<|im_start|>system\n' + (told + '\n\n' if told else '') + '# Tools\n<tools>' }}
{%- for tool in tools %}{{- '\n' + tool | tojson }}{% endfor %}{{- '\n</tools><|im_end|>\n' }}
{%- elif told %}{{- '<|im_start|>system\n' + told + '<|im_end|>\n' }}{% endif %}
{%- set asked = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set asked.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- set said = m.content if m.content is string else '' %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\n' + said + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}
{%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > asked.last and (loop.last or thought) %}{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
{{- said.lstrip('\n') }}{% else %}{{- said }}{% endif %}
{%- for call in m.tool_calls or [] %}{% set f = call.function or call %}
{{- ('' if loop.first and not said else '\n') + '<tool_call>\n{"name": "' + f.name + '", "arguments": ' }}
{{- f.arguments | tojson }}{{- '}\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + said + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{% endif %}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}
"""
LLAMA = """
{{- bos_token }}
{%- if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- macro head(role) %}{{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}{% endmacro %}
{%- set first = messages[0].role == 'system' %}
{{- head('system') }}{% if tools is not none or builtin_tools is defined %}{{- 'Environment: ipython\n' }}{% endif %}
{{- 'Today Date: ' + date_string + '\n\n' + (messages[0].content | trim if first else '') + '<|eot_id|>' }}
{%- set told = namespace(tools=false) %}
{%- for m in (messages[1:] if first else messages) %}
{%- if m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{- raise_exception('Only single tool-calls') }}{% endif %}
{%- set f = m.tool_calls[0].function %}{{- head('assistant') }}
{%- if builtin_tools is defined and f.name in builtin_tools %}
{{- '<|python_tag|>' + f.name + '.call(' }}{% for k, v in f.arguments | items %}{{- k + '="' + v + '"' }}{% endfor %}
{{- ')<|eom_id|>' }}{% else %}{{- '{"name": "' + f.name + '", "parameters": ' + f.arguments | tojson + '}<|eot_id|>' }}
{%- endif %}
{%- elif m.role in ['tool', 'ipython'] %}{{- head('ipython') + m.content | tojson + '<|eot_id|>' }}
{%- elif m.role == 'user' and tools is not none and not told.tools %}{% set told.tools = true %}
{{- head('user') + 'Answer with a call of one of these functions.\n\n' }}
{%- for tool in tools %}{{- tool | tojson(indent=4) + '\n\n' }}{% endfor %}{{- m.content | trim + '<|eot_id|>' }}
{%- else %}{{- head(m.role) + m.content | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- head('assistant') }}{% endif %}
"""
GEMMA = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{% endif %}
"""
TEMPLATES = {"qwen": QWEN, "llama": LLAMA, "gemma": GEMMA}
SPECIAL = {
    "qwen": ("<|im_start|>", "<|im_end|>"),
    "llama": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}
ADDED = {"qwen": ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")}
ENDS = {"qwen": "<|im_end|>", "llama": "<|eot_id|>", "gemma": "<end_of_turn>"}


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A small tokenizer with the tokens of the maker's, and its template."""
    made = byte_pairs(TEMPLATES[name])
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL[name]])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED.get(name, ())])
    return made
