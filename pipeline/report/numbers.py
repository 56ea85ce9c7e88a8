"""Numbers as people read them."""

from __future__ import annotations

import math

MINUS, NOTHING = "\N{MINUS SIGN}", "\N{EN DASH}"


def number(value: float) -> str:
    """Three significant digits behind whole numbers, thousands separated, a real minus sign."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else NOTHING
    size = abs(value)
    if size >= 1e7 or size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", MINUS)
    before = math.floor(math.log10(size)) + 1  # digits before the point; negative for leading zeros behind it
    return fixed(value, min(max(0, 3 - before), 5))


def signed(value: float) -> str:
    """A change: with its sign, whichever it is."""
    return ("+" if value > 0 else "") + number(value)


def alike(one: float, other: float) -> bool:
    """Whether two rewards are the same but for rounding: of equal texts in other batches the last digits may differ."""
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-6)


def fixed(value: float, decimals: int, sign: str = "") -> str:
    return f"{value:{sign},.{decimals}f}".replace("-", MINUS)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
