"""What a training logged: stages/README.md has every tag, and TensorBoard few enough curves to look at."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CURVES = 40  # of one stage
README = Path(__file__).resolve().parents[1] / "stages" / "README.md"


def described() -> list[str]:
    """Shell patterns of the tags in the tables of "What is logged"; each stands for held-out data too."""
    section = README.read_text(encoding="utf-8").partition("## What is logged")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    tags = [re.sub(r"\.\.\.|NAME|SOURCE", "*", tag) for cell in cells for tag in re.findall("`([^`]+)`", cell)]
    assert len(tags) > 50
    return [*tags, *("eval/" + tag.removeprefix("train/") for tag in tags)]


def check(stage: Path) -> None:
    """Of a training's directory."""
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    tags = {tag for line in lines for tag in line} - {"step", "time"}
    patterns = described()
    assert not [tag for tag in tags if not any(fnmatchcase(tag, pattern) for pattern in patterns)]
    drawn = EventAccumulator(str(stage / "tensorboard")).Reload().Tags()["scalars"]
    assert "train/loss" in drawn and len(drawn) <= CURVES and set(drawn) <= tags
