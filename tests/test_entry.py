"""What a stage's process says: which lines, on which stream, of which rank."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest

from pipeline.launch import entry

logger = logging.getLogger("tiffin")


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Sets RANK; afterwards this process speaks as before."""
    yield monkeypatch
    monkeypatch.undo()
    entry.set_up_logging()


@pytest.mark.parametrize(
    ("number", "out", "err"),
    [("0", "step 1\n", "tiffin: odd\ntiffin: wrong\n"), ("3", "", "tiffin: wrong\n")],
)
def test_lines_of_a_rank(rank: pytest.MonkeyPatch, capsys, number: str, out: str, err: str) -> None:
    rank.setenv("RANK", number)
    for _ in range(2):  # a second time is none too many
        entry.set_up_logging()
    logger.debug("not said")
    logger.info("step 1")
    logger.warning("odd")
    logger.error("wrong")
    assert capsys.readouterr() == (out, err)


def test_a_reader_that_leaves_ends_the_process_in_peace(rank: pytest.MonkeyPatch) -> None:
    """As with `head`: what cannot be written is no error of ours, and no traceback of logging's."""

    class Closed:
        def write(self, text: str) -> None:
            raise BrokenPipeError

    rank.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):
        logger.info("step 1")
