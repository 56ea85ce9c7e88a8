"""Memory and batch arithmetic of a training before it is started: of the model that is named, or that the run made."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.config.schema import PlanStage
from pipeline.launch import run_dir
from pipeline.launch.entry import run
from pipeline.models import plan


def main(settings: PlanStage, words: Sequence[str]) -> None:
    if settings.model.path is None and settings.parameters is None and (path := run_dir.model_of(settings, "sft")):
        settings = settings.model_copy(update={"model": settings.model.model_copy(update={"path": str(path)})})
    print(plan.estimate(settings), flush=True)


if __name__ == "__main__":
    run(main, "plan")
