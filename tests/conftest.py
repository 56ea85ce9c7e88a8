"""What holds for every test: the program logs as it does where a user starts it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from filelock import FileLock

from pipeline.launch import entry


@pytest.fixture(autouse=True, scope="session")
def spoken() -> None:
    """Lines that are logged reach stdout and stderr, where tests read them."""
    entry.set_up_logging()


@pytest.fixture(scope="module")
def whole_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For tests that begin a cluster: one at a time, whatever else runs beside them."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "whole_machine.lock"):
        yield
