"""Many texts held against one reference at once: the tokens they share with it, and their common subsequences.

Where a token stands in the reference is a mask, one bit per position. Each text has a lane of whole bytes with a bit
for each position and at least one bit to spare; the lanes of all texts stand side by side in one long integer. One
addition then serves all texts, and as many of them are needed as the longest text has tokens. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest


class Places(dict[str, bytes]):
    """word of a text -> the mask of where it stands in the reference, `width` bytes, the lowest first.

    `form` makes a token of a word (its stem); it is called once per word, of which the dictionary then knows the mask.
    """

    def __init__(self, tokens: Sequence[str], form: Callable[[str], str] = str) -> None:
        super().__init__()
        self.length = len(tokens)
        self.width = self.length // 8 + 1
        self.nowhere = bytes(self.width)
        self._form = form
        self._masks = {token: mask.to_bytes(self.width, "little") for token, mask in places(tokens).items()}

    def __missing__(self, word: str) -> bytes:
        mask = self[word] = self._masks.get(self._form(word), self.nowhere)
        return mask


@dataclass(frozen=True)
class Lanes:
    """The lanes of `count` texts; `steps[j]` holds the masks of the j-th token of each, 0 beyond a text's end."""

    steps: list[int]
    count: int
    length: int  # tokens of the reference
    width: int  # bytes per lane

    def each(self, mask: int) -> int:
        """`mask`, less than 256 ** width, in every lane."""
        return int.from_bytes(mask.to_bytes(self.width, "little") * self.count, "little")

    def bits(self, lanes: int) -> list[int]:
        """How many bits are set in each lane."""
        data, width, number = lanes.to_bytes(self.count * self.width, "little"), self.width, int.from_bytes
        return [number(data[i : i + width], "little").bit_count() for i in range(0, len(data), width)]


def places(tokens: Iterable[str]) -> dict[str, int]:
    """For each token an integer whose bit i is set where the i-th token is that token."""
    found: dict[str, int] = {}
    for i, token in enumerate(tokens):
        found[token] = found.get(token, 0) | 1 << i
    return found


def side_by_side(reference: Places, texts: Sequence[Sequence[str]]) -> Lanes:
    """The lanes of texts that are given as their words."""
    masks = [map(reference.__getitem__, words) for words in texts]
    number, joined = int.from_bytes, b"".join
    steps = [number(joined(step), "little") for step in zip_longest(*masks, fillvalue=reference.nowhere)]
    return Lanes(steps, len(texts), reference.length, reference.width)


def shared(lanes: Lanes) -> list[int]:
    """Clipped counts: how many tokens of each text find a position of their own in the reference."""
    return _matched(lanes, lanes.steps)


def shared_pairs(lanes: Lanes) -> list[int]:
    """The same of pairs of neighbouring tokens; a pair stands where its second token does."""
    return _matched(lanes, [first << 1 & second for first, second in pairwise(lanes.steps)])


def subsequences(lanes: Lanes) -> list[int]:
    """Tokens in the longest common subsequence of each text and the reference.

    After j tokens, bit i of a lane of `row` is 0 where the i-th reference token makes the subsequence longer: the zeros
    count its tokens. An addition carries into the spare bit, which is then cleared.

    Source: Hyyro 2004, "Bit-parallel LCS-length computation revisited".
    """
    row = full = lanes.each((1 << lanes.length) - 1)
    for step in lanes.steps:
        matches = row & step
        row = (row + matches | row - matches) & full
    return lanes.bits(row ^ full)


def _matched(lanes: Lanes, steps: Iterable[int]) -> list[int]:
    """Each step takes from each lane the lowest of the free positions that suit it, if there is one."""
    free = full = lanes.each((1 << lanes.length) - 1)
    ones, spare = lanes.each(1), lanes.each(1 << lanes.length)
    for step in steps:
        suited = free & step
        # 1 less clears the lowest bit of a lane, and what it sets lies below; the spare bit pays where none suits
        free ^= suited ^ suited & (suited | spare) - ones
    return lanes.bits(free ^ full)
