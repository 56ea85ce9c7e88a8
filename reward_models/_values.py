"""What a reward returned, checked: one finite float per completion. Needs no package, so that a server needs none."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

from pipeline.errors import UserError

LARGEST = 3.4e38  # of a float32, in which models are trained
SHOWN = 80  # characters of a text in a message


def checked(name: str, values: object, completions: Sequence[str], first: int = 0) -> list[float]:
    """`values` as floats. Accepted: list, tuple, 1-d array or tensor of real numbers, numpy and 0-d tensor scalars too.

    Booleans count as 0 and 1. Raises UserError that names the reward, the text, and its index counted from `first`.
    """
    if hasattr(values, "tolist"):  # arrays and tensors, whose packages need not be loaded here
        values = values.tolist()
    if not isinstance(values, list | tuple):
        problem = f"it returned a {type(values).__name__}, wanted a list of one float per completion"
        raise UserError(f"reward {name}: {problem}")
    if len(values) != len(completions):
        problem = f"it returned {len(values)} values for {len(completions)} completions, wanted one for each"
        raise UserError(f"reward {name}: {problem}")
    return [_number(name, i, value, completions[i - first]) for i, value in enumerate(values, first)]


def _number(name: str, index: int, value: object, text: str) -> float:
    if hasattr(value, "ndim") and value.ndim == 0:
        value = value.item()
    if isinstance(value, Real) and abs(value) <= LARGEST:
        return float(value)
    shown = f"{value!r:.40}" if value is None or isinstance(value, Real | str) else f"a {type(value).__name__}"
    cure = "a reward that cannot score a text must raise, and say why"
    raise UserError(f"reward {name}: {shown} for completion {index} '{shortened(text)}', wanted a finite float; {cure}")


def shortened(text: str) -> str:
    """The text in one line of at most SHOWN characters, with escapes for line ends and what does not print."""
    shown = repr(text)[1:-1]
    return shown if len(shown) <= SHOWN else shown[: SHOWN - 3] + "..."
