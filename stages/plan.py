"""Memory and batch arithmetic of a training before it is started."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.schema import PlanStage
from pipeline.launch.entry import run
from pipeline.models import memory


def main(settings: PlanStage, words: Sequence[str]) -> None:
    print(memory.estimate(settings), flush=True)


if __name__ == "__main__":
    run(main, "plan")
