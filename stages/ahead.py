"""What will be there when a step starts, and a fault as a line. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline import errors
from pipeline.config.schema import (
    WithModel,
)
from pipeline.errors import UserError
from pipeline.launch import run_dir


@dataclass(frozen=True)
class Ahead:
    """What will be there when a step starts, though it is not yet."""

    made: Collection[Path]  # the directories of the steps before it
    environ: Mapping[str, str]
    scored: Collection[str] = ()  # the rewards that rows bring which the steps before it score

    def makes(self, settings: WithModel, stage: str) -> bool:
        """Whether an earlier step is the run's `stage`, or stage/name."""
        return run_dir.run_dir(settings) / stage in self.made

    def holds(self, place: str | None) -> bool:
        """Whether a path lies in what an earlier step makes."""
        where = None if place is None else Path(place).absolute()
        return where is not None and any(where.is_relative_to(directory.absolute()) for directory in self.made)

    def will_hold(self, place: str | None) -> bool:
        """Whether a path is not there yet, and an earlier step makes it."""
        return self.holds(place) and not Path(str(place)).exists()

    def reward_models(self, settings: WithModel) -> list[str]:
        """Those of the run by name, and those that it will have."""
        folder = run_dir.run_dir(settings) / "reward"
        return [*run_dir.reward_models(settings), *(path.name for path in self.made if path.parent == folder)]


def told(check: Callable[[], object]) -> list[str]:
    """The line of the UserError that `check` raises, or of what the machine refuses; nothing where it raises none."""
    try:
        check()
    except UserError as error:
        return [str(error)]
    except OSError as error:
        mistake = errors.as_user_error(error)
        if mistake is None:
            raise
        return [str(mistake)]
    return []
