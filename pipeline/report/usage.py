"""The model that a run left: where it is, how it is called, as its own card says."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.files import CARD
from pipeline.report.stages import Stage

PLACE = re.compile(r'"DIRECTORY".*')  # in a card's code: where the model lies, with a comment on it
POLICIES = ("rl", "sft")  # whose model is the run's: that of the first of these
CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


class ModelLeft(NamedTuple):
    """A model directory, which stage left it, and Python that calls it; empty where no card says how."""

    path: Path
    stage: Stage
    code: str


def model_of(stages: Sequence[Stage]) -> ModelLeft | None:
    """The policy that a run left last: of its last RL stage, before there is one of its SFT; None without either."""
    for kind in POLICIES:
        left = [stage for stage in stages if stage.kind == kind and (stage.folder / "model").is_dir()]
        if left:
            path = left[-1].folder / "model"
            return ModelLeft(path, left[-1], _code(path))
    return None


def _code(model: Path) -> str:
    """The first block of Python in a model's card, which calls it, with the model's directory filled in."""
    card = model / CARD
    found = CODE.search(card.read_text(encoding="utf-8")) if card.is_file() else None
    return PLACE.sub(lambda _: json.dumps(str(model), ensure_ascii=False), found.group(1)).strip() if found else ""
