"""Logging: metrics.jsonl, TensorBoard, sample tables, progress bar, results.json; files complete or absent.

`metrics.jsonl` is the truth: one JSON object per logged step, {"step": int, "time": seconds, tag: number or null}.
TensorBoard is a view of it (board.py). Files are complete or absent; only the log of rank 0 writes any.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from pipeline.files import flatten, read_metrics, write_json, write_jsonl, write_text
from pipeline.launch import provenance
from pipeline.trainer import markdown
from pipeline.trainer.board import Board

DIGITS = 6  # significant digits in metrics.jsonl
PLAIN_SECONDS = 10.0  # between two progress lines where there is no terminal to draw a bar on
HELD_OUT = {  # of these the first that is known stands beside the progress bar: what the policy itself earns, if judged
    "eval/reward": "held-out reward",
    "eval/accuracy": "held-out accuracy",
    "eval/rewards/accuracies": "held-out accuracy",
    "eval/gain/estimate": "estimated gain",
    "eval/loss": "held-out loss",
}


class RunLog:
    """All that a stage writes while it runs: metrics.jsonl, tensorboard/, samples/, held_out/, results.json, a bar.

    `resume_step` is the step of the checkpoint the run goes on from: what was logged later is removed. 0 is a start
    from nothing and removes whatever an earlier start logged. With `enabled` False every method does nothing.
    """

    def __init__(
        self,
        directory: Path,
        hparams: Mapping[str, object],
        *,
        resume_step: int,
        enabled: bool,
        total_steps: int,
        description: str,
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return
        self._directory = Path(directory)
        path = self._directory / "metrics.jsonl"
        before = read_metrics(path)
        kept = [row for row in before if resume_step and row["step"] <= resume_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        for folder in ("samples", "held_out"):
            _drop_later(self._directory / folder, resume_step)
        spent = kept[-1]["time"] if kept else 0.0
        self._start = time.monotonic() - spent
        self._rows = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        place = self._directory / "tensorboard"
        self._board = Board(place, resume_step=resume_step, rows=before, began=time.time() - spent)
        self._board.hparams(hparams)
        provenance.note(self._directory, resume_step)
        self._progress = _Progress(resume_step, total_steps, description)
        for row in kept:
            self._progress.note(row)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One row of metrics.jsonl and a point per tag in TensorBoard; what is not finite becomes null and no point."""
        if not self.enabled:
            return
        row = {tag: _rounded(value) for tag, value in values.items()}
        clock = {"step": step, "time": round(time.monotonic() - self._start, 3)}
        self._rows.write(json.dumps(clock | row, allow_nan=False) + "\n")
        for tag, value in row.items():
            if value is not None:
                self._board.scalar(tag, value, step)
        self._board.lay_out()
        self._progress.note(row)
        self._progress.show(step)

    def histogram(self, tag: str, values: Tensor | Sequence[float], step: int) -> None:
        """The distribution of `values` in TensorBoard."""
        if self.enabled:
            self._board.histogram(tag, values, step)

    def samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """samples/step-N.jsonl with every row, and the first rows to read in TensorBoard."""
        if not self.enabled or not rows:
            return
        write_jsonl(self._directory / "samples" / f"step-{step:06d}.jsonl", rows)
        for name, text in markdown.pages([flatten(row) for row in rows]).items():
            self._board.text(name, text, step)

    def held_out(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """held_out/step-N.jsonl: what an evaluation knows of each held-out row."""
        if self.enabled and rows:
            write_jsonl(self._directory / "held_out" / f"step-{step:06d}.jsonl", rows)

    def finish(self, results: Mapping[str, object]) -> None:
        """results.json, after which the stage is done; before it, in TensorBoard, the same numbers as a table."""
        if not self.enabled:
            return
        self._board.text("results", markdown.numbers({"value": flatten(results)}), self._progress.bar.n)
        self._board.flush()
        write_json(self._directory / "results.json", results)

    def close(self) -> None:
        """Flush and close the files and the bar. The log cannot be used afterwards."""
        if not self.enabled:
            return
        self._progress.bar.close()
        self._rows.close()
        self._board.close()


class _Progress:
    """A tqdm bar on a terminal; elsewhere a plain line every PLAIN_SECONDS."""

    def __init__(self, first_step: int, total_steps: int, description: str) -> None:
        self._terminal, self._last_line = sys.stderr.isatty(), time.monotonic()
        never = {"delay": math.inf, "mininterval": math.inf}  # tqdm formats the line, and draws nothing
        # times come last, for they are what a narrow window may cut off
        line = "{n_fmt}/{total_fmt}{postfix} [{elapsed}<{remaining}, {rate_fmt}]"
        drawn = {"dynamic_ncols": True, "bar_format": "{l_bar}{bar}| " + line}
        style = drawn if self._terminal else never | {"bar_format": "{desc}: {percentage:3.0f}% " + line}
        self.bar = tqdm(desc=description, total=total_steps, initial=first_step, unit="step", **style)
        self._known: dict[str, float | None] = {}

    def note(self, row: Mapping[str, float | None]) -> None:
        """Numbers of the log; each stands beside the bar until the next one."""
        self._known |= {tag: row[tag] for tag in ("train/loss", *HELD_OUT) if tag in row}
        held_out = [tag for tag in HELD_OUT if tag in self._known][:1]
        names = {"train/loss": "loss"} | {tag: HELD_OUT[tag] for tag in held_out}
        known = {name: self._known[tag] for tag, name in names.items() if tag in self._known}
        shown = [f"{name} {'not finite' if value is None else f'{value:.4g}'}" for name, value in known.items()]
        self.bar.set_postfix_str(", ".join(shown), refresh=False)

    def show(self, step: int) -> None:
        """Move to `step`."""
        now, moved = time.monotonic(), max(step - self.bar.n, 0)
        self.bar.update(moved)
        ended = moved and step >= self.bar.total
        if not self._terminal and (ended or now - self._last_line >= PLAIN_SECONDS):
            self._last_line = now
            print(self.bar, file=sys.stderr, flush=True)


def _drop_later(folder: Path, resume_step: int) -> None:
    for path in folder.glob("step-*.jsonl"):
        step = path.stem.removeprefix("step-")
        if step.isdigit() and (not resume_step or int(step) > resume_step):
            path.unlink()


def _rounded(value: float) -> float | None:
    """Whole numbers stay whole; null for what is not finite."""
    if isinstance(value, int):
        return value
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
