"""What the stages of a run left in its directory, read for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.yaml_layers import load_yaml
from pipeline.errors import UserError
from pipeline.files import flatten, read_metrics
from pipeline.launch import provenance
from pipeline.report.checks import Verdict, judge
from pipeline.report.stage_checks import CHOOSERS, Series, of_stage, series_of

FILES = ("config.yaml", "metrics.jsonl", "results.json")  # a directory with one of these is a stage's
STAGES = {
    "sft": ("Supervised fine-tuning", "The model learns to imitate good responses. What comes out is the start of RL."),
    "reward": ("Reward model", "A model learns from pairs which of two responses people prefer, and gives it a score."),
    "score": ("Scoring", "Logged responses get the reward models' scores."),
    "rl": ("Reinforcement learning", "The policy is moved towards responses with a higher reward."),
    "generate": ("Generation", "A policy answers prompts."),
    "evaluate": ("Evaluation", "All policies answer the same held-out prompts, and the same rewards judge them."),
}


class Stage(NamedTuple):
    """What one stage left: its path within the run, its kind, and the content of its files."""

    name: str
    kind: str
    folder: Path
    config: str
    command: str
    series: Series
    steps: int
    seconds: float  # of training, over all starts
    results: dict[str, Any]
    data: dict[str, Mapping[str, int]]  # split -> what encoding counted
    starts: list[dict]

    @property
    def title(self) -> str:
        words = STAGES[self.kind][0]
        return f"{words}: {self.name.split('/', 1)[1]}" if "/" in self.name else words

    @property
    def about(self) -> str:
        return STAGES[self.kind][1]

    @property
    def anchor(self) -> str:
        return self.name.replace("/", "-")

    @property
    def settings(self) -> Mapping[str, Any]:
        return (load_yaml(self.folder / "config.yaml") or {}) if self.config else {}

    @property
    def loss_compares(self) -> bool:
        """Whether its held-out loss tells one step from another, as where it chooses the best weights.

        Not under weights that follow the policy (a ratio), and not where no held-out row has a weight: it is 0 then.
        """
        method = self.settings.get("algorithm") or {}
        idle = self.kind == "rl" and not any(value for _, value in self.series.get("eval/loss", ()))
        return (method.get("settings") or {}).get("ratio", "none") == "none" and not idle


def stages_of(run_dir: Path) -> list[Stage]:
    """The stages in the order in which a recipe runs them; not `compare` and `bench`, whose results are no curves.

    Raises UserError on a file that cannot be read.
    """
    folders = [(kind, folder) for kind in STAGES for folder in folders_of(run_dir, kind)]
    return [read_stage(run_dir, folder, kind) for kind, folder in folders if any((folder / f).is_file() for f in FILES)]


def folders_of(run_dir: Path, kind: str) -> list[Path]:
    """Where a stage of this kind writes: without a name, then those with one."""
    return [run_dir / kind, *sorted((run_dir / kind).glob("*"))]


def verdicts(stage: Stage) -> dict[str, Verdict]:
    """What the rules say of a stage's curves and counts, by quantity."""
    if not stage.series:
        return {}
    lost = {path.name.split("-rank-")[0] for path in (stage.folder / "non_finite").glob("step-*.jsonl")}
    facts = {**stage.data.get("train", {}), "non_finite": len(lost)}
    results = {tag: value for tag, value in flatten(stage.results).items() if isinstance(value, (int, float))}
    readings = of_stage(stage.kind, stage.series, results, facts)
    if not {*CHOOSERS.values()} & {*stage.series} and not stage.loss_compares:
        readings.pop("best_step", None)
    return {quantity: judge(quantity, reading) for quantity, reading in readings.items()}


def json_object(text: str, place: str) -> dict:
    """The JSON object that `text` is. Raises UserError naming `place` if it is none."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error.msg}); run the stage again") from error
    if not isinstance(value, dict):
        raise UserError(f"{place}: found {type(value).__name__}, wanted a JSON object; run the stage again")
    return value


def read_stage(run_dir: Path, folder: Path, kind: str) -> Stage:
    """What the stage of this kind in `folder` of the run left. Raises UserError on a file that cannot be read."""
    rows = read_metrics(folder / "metrics.jsonl")
    last = rows[-1] if rows else {"step": 0}
    return Stage(
        folder.relative_to(run_dir).as_posix(),
        kind,
        folder,
        _text(folder / "config.yaml"),
        _text(folder / "command.txt").strip(),
        series_of(rows),
        int(last["step"]),
        last.get("time") or 0.0,
        _object(folder / "results.json"),
        _object(folder / "data.json"),
        provenance.read(folder),
    )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _object(path: Path) -> dict:
    return json_object(path.read_text(encoding="utf-8"), str(path)) if path.is_file() else {}
