"""The gain of a policy as held-out logged rows let it be estimated: in words, and as something to judge."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from pipeline.report.numbers import number, signed

KNOWN = "gain/known"  # 1 or 0
PATTERNS = (KNOWN, "gain/*/known")  # by the rows' reward; by one of their named rewards
JUDGED = {1: "better", 0: "the same within noise", -1: "worse"}
SAYS_OTHERS = 0.05  # under such a mass none is made: the policy hardly says the logged responses any more
COUNTS_WORDS = 0.7  # beyond such a correlation with their number no estimate is made: ratios hardly tell of length
Values = Mapping[str, float | None]


def known_tags(values: Values) -> list[str]:
    """Of all estimates that `values` holds, known or not."""
    return [tag for tag in values if any(fnmatchcase(tag, pattern) for pattern in PATTERNS)]


def of_training(values: Values) -> dict[str, float]:
    """What a training logged of its estimate, eval/gain/..., with the tags of an evaluation; {} where there is none."""
    found = {
        tag.removeprefix("eval/"): v for tag, v in values.items() if tag.startswith("eval/gain/") and v is not None
    }
    return {**found, KNOWN: float("gain/estimate" in found)} if found else {}


def title(tag: str, judged: bool) -> str:
    """What stands above the estimates; `judged`: fresh responses were judged too, perhaps on another scale."""
    name = name_of(tag)
    return f"gain{f' in {name}' if name else ''}{' by rewards of rows' if judged else ''}"


def name_of(tag: str) -> str:
    """Of which of the rows' rewards an estimate is; empty for `reward` itself."""
    return tag.removeprefix("gain/").removesuffix("known").rstrip("/")


def said(values: Values, tag: str = KNOWN) -> str:
    """'+0.120 (90 % interval +0.0800 .. +0.150, from 400 logged responses; ESS 120)', or 'not known (ESS 7 of 400)'."""
    head = tag.removesuffix("known")
    size, rows, prompts = (values.get(f"{head}{name}") for name in ("ess", "rows", "prompts"))
    ess = "" if size is None else f"ESS {size:,.0f}"
    if not values.get(tag) and abs(values.get(f"{head}length_correlation") or 0.0) > COUNTS_WORDS:
        return f"not known (it follows length, correlation {number(values[f'{head}length_correlation'])})"
    mass = values.get(f"{head}mass")
    if not values.get(tag) and mass is not None and mass < SAYS_OTHERS:
        return f"not known (logged responses are {number(mass)} times as likely: it says other things)"
    if not values.get(tag):
        of = f"{ess} of {rows:,.0f}" if rows is not None else ess
        of += f", {prompts:,.0f} prompt{'s' * (prompts != 1)}" if prompts is not None and prompts != rows else ""
        return f"not known ({of})" if of else "not known"
    low, high = (signed(values[f"{head}{end}"]) for end in ("low", "high"))
    source = "" if rows is None else f", from {rows:,.0f} logged responses"
    return f"{signed(values[f'{head}estimate'])} (90 % interval {low} .. {high}{source}{f'; {ess}' if ess else ''})"


def sign(values: Values, tag: str = KNOWN) -> int | None:
    """1 where the whole interval lies above 0, -1 below it, 0 where it holds 0; None where it is not known."""
    head = tag.removesuffix("known")
    if not values.get(tag):
        return None
    low, high = values[f"{head}low"], values[f"{head}high"]
    return 1 if low > 0 else -1 if high < 0 else 0


def above(values: Values, tag: str = KNOWN) -> float:
    """For the rule `estimated_gain`: how much of the interval lies above 0: all, none, or, also where it is not known,
    a half that stands for a part."""
    return {1: 1.0, -1: 0.0}.get(sign(values, tag), 0.5)


def short(values: Values, tag: str = KNOWN) -> str:
    """For a cell of a table in the terminal: '+0.120 (+0.0800 .. +0.150)', 'not known (ESS 7 of 400)', or '-'."""
    if tag not in values:
        return "-"
    head = tag.removesuffix("known")
    if not values[tag]:
        return said(values, tag)
    estimate, low, high = (signed(values[f"{head}{name}"]) for name in ("estimate", "low", "high"))
    return f"{estimate} ({low} .. {high})"
