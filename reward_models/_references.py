"""The column `references`, which rewards that compare texts need: checked, and equal neighbours put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter

from reward_models._values import shortened

References = Sequence[Sequence[str]] | None


def runs(completions: Sequence[str], references: References, metric: str) -> Iterator[tuple[Sequence[str], list[str]]]:
    """(references, the completions that follow each other and have them), in the order given.

    What the completions of a run are compared with is then prepared once. Raises ValueError where there is no column,
    or an entry of it is not a list of texts of which one is not blank.
    """
    if references is None:
        raise ValueError(f"there is no column `references`, which {metric} compares with: give the data one")
    for i, texts in enumerate(references):
        if isinstance(texts, str):
            raise ValueError(f"references[{i}] is {texts!r:.60}, wanted a list of at least one text")
        text = shortened(completions[i])
        if not texts:
            raise ValueError(
                f"completion {i} '{text}' has no references, which {metric} compares with, and is not compared with "
                "itself: give the data a column `references`"
            )
        if not any(map(str.strip, texts)):
            raise ValueError(
                f"completion {i} '{text}' has blank references alone, wanted one with text for {metric} to compare "
                "with: leave the row out"
            )
    for texts, pairs in groupby(zip(references, completions, strict=True), key=itemgetter(0)):
        yield texts, [completion for _, completion in pairs]
