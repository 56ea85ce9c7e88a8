"""The HTML of the pages: templates/*.html filled in. Every text is escaped; nothing is fetched, no script runs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from pipeline.report.numbers import duration, number, signed


def render(template: str, context: dict[str, Any]) -> str:
    """The template filled in. A name that `context` lacks raises jinja2.UndefinedError."""
    return _environment().get_template(template).render(context)


@cache
def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).resolve().parent / "templates")
    made = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {"number": number, "signed": signed, "duration": duration}
    return made
