"""What a reward returned, checked: a float or None per completion. Needs no package, so that a server needs none."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

from pipeline.errors import UserError

LARGEST = 3.4e38  # of a float32, in which models are trained
SHOWN = 80  # characters of a text in a message


def checked(
    name: str, values: object, completions: Sequence[str], first: int = 0, ids: Sequence[str] | None = None
) -> list[float | None]:
    """`values` as floats. Accepted: list, tuple, 1-d array or tensor of real numbers, numpy and 0-d tensor scalars too.

    Booleans count as 0 and 1; None stays, of a text that the reward does not judge. Raises UserError that names the
    reward, the text, its index counted from `first`, and its row where `ids` are known.
    """
    if hasattr(values, "tolist"):  # arrays and tensors, whose packages need not be loaded here
        values = values.tolist()
    if not isinstance(values, list | tuple):
        problem = f"it returned a {type(values).__name__}, wanted a list of one float per completion"
        raise UserError(f"reward {name}: {problem}")
    if len(values) != len(completions):
        problem = f"it returned {len(values)} values for {len(completions)} completions, wanted one for each"
        raise UserError(f"reward {name}: {problem}")
    rows = [f" of row {id}" for id in ids] if ids is not None else [""] * len(completions)
    places = [f"completion {i}{row}" for i, row in enumerate(rows, first)]
    given = zip(places, completions, values, strict=True)
    return [None if value is None else _number(name, place, text, value) for place, text, value in given]


def _number(name: str, place: str, text: str, value: object) -> float:
    if hasattr(value, "ndim") and value.ndim == 0:
        value = value.item()
    if isinstance(value, Real) and abs(value) <= LARGEST:
        return float(value)
    shown = f"{value!r:.40}" if isinstance(value, Real | str) else f"a {type(value).__name__}"
    cure = "a reward that cannot score a text must raise, and say why, or return None if the text is not for it"
    raise UserError(f"reward {name}: {shown} for {place} '{shortened(text)}', wanted a finite float; {cure}")


def shortened(text: str) -> str:
    """The text in one line of at most SHOWN characters, with escapes for line ends and what does not print."""
    shown = repr(text)[1:-1]
    return shown if len(shown) <= SHOWN else shown[: SHOWN - 3] + "..."
