"""How samples look on a page: texts are escaped here, whatever they hold."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from pipeline.report.html import folded


class Answer(NamedTuple):
    """One policy's response, with its reward and the parts of it as text."""

    policy: str
    reward: str
    parts: str
    text: str


Parts = Sequence[tuple[str, bool]]  # a text in pieces: (piece, whether it is marked)


class Ranked(NamedTuple):
    """One of the texts made of one response, with its reward as text; `name` may be empty."""

    reward: str
    name: str
    parts: Parts


class Composed(NamedTuple):
    """A response with hidden pieces, and what became of them; all numbers are text."""

    prompt: str
    reference: str
    static: Parts
    hidden: str  # how many tokens
    words: str  # about all texts
    texts: Sequence[Ranked]
    credit: Sequence[tuple[str, Sequence[tuple[str, str, str]]]]  # of some tokens: (name, (token, instead of, credit))


class Said(NamedTuple):
    """One of several responses to a prompt; all numbers are text."""

    reward: str
    advantage: str
    tokens: str
    text: str


def sample(prompt: str, answers: Sequence[Answer]) -> str:
    """A prompt above its responses."""
    cells = "".join(
        f'<div><div class="who"><b>{escape(one.policy)} {escape(one.reward)}</b> {escape(one.parts)}</div>'
        f'<div class="text">{escape(one.text)}</div></div>'
        for one in answers
    )
    return f'<div class="sample"><div class="text soft">{escape(prompt)}</div><div class="pair">{cells}</div></div>\n'


def composed(shown: Composed) -> str:
    """A response with its hidden pieces marked above the texts that were made of it, and the tokens of most credit."""
    rows = "".join(
        f'<tr class="{escape(one.name) or "plain"}"><td>{escape(one.reward)}</td><td>{escape(one.name)}</td>'
        f"<td>{marked(one.parts)}</td></tr>\n"
        for one in shown.texts
    )
    said = "".join(_credits(name, tokens) for name, tokens in shown.credit)
    return (
        f'<div class="sample"><div class="text soft">{escape(shown.prompt)}</div><div class="pair">'
        f'<div><div class="who"><b>static response</b> {escape(shown.hidden)}</div>'
        f'<div class="text">{marked(shown.static)}</div></div>'
        f'<div><div class="who"><b>reference</b></div><div class="text">{escape(shown.reference)}</div></div></div>'
        f'<div class="who told">{escape(shown.words)}</div><table class="rank"><tbody>\n{rows}</tbody></table>'
        f'<div class="pair">{said}</div></div>\n'
    )


def said(prompt: str, words: str, best: Sequence[Said], between: Sequence[Said], worst: Sequence[Said]) -> str:
    """A prompt above the responses to it, the best first; those between best and worst are a click away."""
    middle = folded(f"{len(between)} between", _said_table(between)) if between else ""
    return (
        f'<div class="sample"><div class="text soft">{escape(prompt)}</div><div class="who told">{escape(words)}</div>'
        f"{_said_table(best)}{middle}{_said_table(worst) if worst else ''}</div>\n"
    )


def _said_table(rows: Sequence[Said]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("reward", "advantage", "tokens", "response"))
    body = "".join(
        f"<tr><td>{escape(one.reward)}</td><td>{escape(one.advantage)}</td><td>{escape(one.tokens)}</td>"
        f"<td>{escape(one.text)}</td></tr>\n"
        for one in rows
    )
    return f'<table class="said"><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>\n'


def marked(parts: Parts) -> str:
    """A text with some of its pieces marked."""
    return "".join(f"<mark>{escape(text)}</mark>" if flag else escape(text) for text, flag in parts)


def _credits(name: str, tokens: Sequence[tuple[str, str, str]]) -> str:
    lines = "".join(
        f"<mark>{escape(token)}</mark> {escape(credit)}, for <mark>{escape(other)}</mark>\n"
        for token, other, credit in tokens
    )
    return f'<div><div class="who"><b>{escape(name)}</b></div><div class="text">{lines}</div></div>'
