"""A template with {fields} for the texts of a row: what a judge is asked, and what a classifier reads. Needs no torch.

Texts are put into the template once and never read as part of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.errors import UserError

FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")  # {"score": 5} of an example in JSON is none
OF_EVERY_ROW = ("prompt", "completion", "reference")


def filled(template: str, texts: Mapping[str, Any], setting: str, kept: Callable[[str], str] = str) -> str:
    """`template` with each {field} replaced, texts as they are and all else as JSON, after `kept` of it.

    Raises UserError, which names the `setting`, where a row has no such value.
    """

    def text_of(match: re.Match) -> str:
        name = match[1]
        value = texts.get(name)
        if value is None:
            problem = f"{{{name}}}: row {texts.get('id', '?')} has no such value"
            names = ", ".join(key for key, given in texts.items() if given is not None)
            raise UserError(f"{setting}: {problem}, wanted one of {names}: correct the template or the rows")
        return kept(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))

    return FIELD.sub(text_of, template)


def texts_of(prompt: str, completion: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row by name: its columns, both texts, and the first of its references."""
    references = row.get("references") or [None]
    return {**row, "prompt": prompt, "completion": completion, "reference": references[0]}


def columns_of(templates: str | list[str]) -> set[str]:
    """The columns of the data that templates name."""
    listed = [templates] if isinstance(templates, str) else templates
    return {name for template in listed for name in FIELD.findall(template)} - {*OF_EVERY_ROW}
