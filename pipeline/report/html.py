"""The HTML of the pages: templates/*.html filled in. Every text is escaped; nothing is fetched, no script runs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from pipeline.report.numbers import duration, number, signed

LONG, CUT = 900, 600  # characters of a text that is shown in two parts, and of the first


def render(template: str, context: dict[str, Any]) -> str:
    """The template filled in. A name that `context` lacks raises jinja2.UndefinedError."""
    return _environment().get_template(template).render(context)


def in_two(text: str) -> tuple[str, str]:
    """A long text as its beginning, up to a blank where there is one near, and the rest; a short one, and nothing."""
    if len(text) <= LONG:
        return text, ""
    blanks = [place for place in range(CUT - 60, CUT) if text[place].isspace()]
    cut = blanks[-1] if blanks else CUT
    return text[:cut], text[cut:].lstrip(" ")


@cache
def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).resolve().parent / "templates")
    made = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {"number": number, "signed": signed, "duration": duration, "in_two": in_two}
    return made
