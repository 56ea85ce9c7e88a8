"""What holds for every test: the program logs as it does where a user starts it."""

from __future__ import annotations

import pytest

from pipeline.launch import entry


@pytest.fixture(autouse=True, scope="session")
def spoken() -> None:
    """Lines that are logged reach stdout and stderr, where tests read them."""
    entry.set_up_logging()
