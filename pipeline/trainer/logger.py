"""Logging: metrics.jsonl, TensorBoard, sample tables, progress bar, results.json; files complete or absent.

`metrics.jsonl` is the truth: one JSON object per logged step, {"step": int, "time": seconds, tag: number or null}.
TensorBoard is a view of it. Files are complete or absent; only the log of rank 0 writes any.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.files import flatten, read_metrics, write_json, write_jsonl, write_text
from pipeline.launch import provenance
from pipeline.report import spec
from pipeline.trainer import markdown

DIGITS = 6  # significant digits in metrics.jsonl
PLAIN_SECONDS = 10.0  # between two progress lines where there is no terminal to draw a bar on
SHOWN = {
    "train/loss": "loss",
    "eval/reward": "held-out reward",
    "train/accuracy": "accuracy",
}  # beside the progress bar


class RunLog:
    """Everything a stage writes while it runs: metrics.jsonl, tensorboard/, samples/, results.json, a progress bar.

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
        from torch.utils.tensorboard import SummaryWriter

        self._directory = Path(directory)
        kept = _truncate(self._directory / "metrics.jsonl", resume_step)
        _drop_samples(self._directory / "samples", resume_step)
        self._start = time.monotonic() - (kept[-1]["time"] if kept else 0.0)
        self._rows = open(self._directory / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        purge = resume_step + 1 if resume_step else 0
        self._board = SummaryWriter(str(self._directory / "tensorboard"), purge_step=purge, flush_secs=30)
        self._board.add_custom_scalars(spec.layout())
        self._write_hparams(hparams)
        provenance.note(self._directory, resume_step)
        self._progress = _Progress(resume_step, total_steps, description)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One row of metrics.jsonl and a point per tag in TensorBoard; what is not finite becomes null and no point."""
        if not self.enabled:
            return
        row = {"step": step, "time": round(time.monotonic() - self._start, 3)}
        row |= {tag: _rounded(value) for tag, value in values.items()}
        self._rows.write(json.dumps(row, allow_nan=False) + "\n")
        for tag, value in values.items():
            if math.isfinite(value):
                self._board.add_scalar(tag, value, step)
        self._progress.show(step, values)

    def histogram(self, tag: str, values: Tensor | Sequence[float], step: int) -> None:
        """The distribution of `values` (any shape) in TensorBoard; values that are not finite are left out."""
        if not self.enabled:
            return
        flat = torch.as_tensor(values).detach().flatten().double().cpu()
        flat = flat[flat.isfinite()]
        if len(flat):
            self._board.add_histogram(tag, flat.numpy(), step)

    def samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """samples/step-N.jsonl with every row, and the first rows to read in TensorBoard."""
        if not self.enabled or not rows:
            return
        write_jsonl(self._directory / "samples" / f"step-{step:06d}.jsonl", rows)
        for name, text in markdown.pages([flatten(row) for row in rows]).items():
            self._board.add_text(name, text, step)

    def finish(self, results: Mapping[str, object]) -> None:
        """results.json, after which the stage is done; before it, in TensorBoard, the same numbers as results/<tag>."""
        if not self.enabled:
            return
        for tag, value in flatten(results).items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self._board.add_scalar(f"results/{tag}", value, self._progress.bar.n)
        self._board.flush()
        write_json(self._directory / "results.json", results)

    def close(self) -> None:
        """Flush and close the files and the bar. The log cannot be used afterwards."""
        if not self.enabled:
            return
        self._progress.bar.close()
        self._rows.close()
        self._board.close()

    def _write_hparams(self, hparams: Mapping[str, object]) -> None:
        # TensorBoard takes the first Experiment summary it finds for all runs, so one stage would hide another's
        # settings and results. Without any it gathers both from all runs, which is what we want.
        from torch.utils.tensorboard.summary import hparams as summaries

        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in flatten(hparams).items()}
        _, session_start, _ = summaries(plain, {})
        self._board.file_writer.add_summary(session_start)


class _Progress:
    """A tqdm bar on a terminal; elsewhere a plain line every PLAIN_SECONDS."""

    def __init__(self, first_step: int, total_steps: int, description: str) -> None:
        self._terminal, self._last_line = sys.stderr.isatty(), time.monotonic()
        never = {"ncols": 0, "delay": math.inf, "mininterval": math.inf}  # tqdm formats the line, and draws nothing
        style = {"dynamic_ncols": True} if self._terminal else never
        self.bar = tqdm(desc=description, total=total_steps, initial=first_step, unit="step", **style)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Move to `step`; the tags of SHOWN stand beside the bar."""
        now, moved = time.monotonic(), max(step - self.bar.n, 0)
        shown = {name: f"{values[tag]:.4g}" for tag, name in SHOWN.items() if tag in values}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(moved)
        ended = moved and step >= self.bar.total
        if not self._terminal and (ended or now - self._last_line >= PLAIN_SECONDS):
            self._last_line = now
            print(self.bar, file=sys.stderr, flush=True)


def _truncate(path: Path, resume_step: int) -> list[dict[str, float | None]]:
    """Keep the rows up to `resume_step` (none for 0) and return them; the file is rewritten whole."""
    rows = [row for row in read_metrics(path) if resume_step and row["step"] <= resume_step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _drop_samples(folder: Path, resume_step: int) -> None:
    for path in folder.glob("step-*.jsonl"):
        step = path.stem.removeprefix("step-")
        if step.isdigit() and (not resume_step or int(step) > resume_step):
            path.unlink()


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
