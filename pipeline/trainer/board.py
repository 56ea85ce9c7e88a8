"""TensorBoard: curves of what varies, distributions, tables of text. metrics.jsonl and results.json have every number.

Of a tag TensorBoard keeps one kind of data, so that of a histogram ends in /histogram.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.files import flatten, write_text
from pipeline.report import spec

LEFT_OUT = (  # shell patterns of tags that no curve is drawn of
    "*_se",  # standard errors and deviations move with one another: the total's is drawn
    "*/se",
    "*rewards/*/std",
    "*scores/*/std",
    "*rewards/*/length_correlation",  # nor the parts' correlation with length
    "*/raw_mean",  # the mean before it is normalised
    "eval/perplexity",  # the loss again
    "eval/completions/mean_words",  # completions/mean_length again
    "train/learned_tokens",  # the part of num_tokens that teaches
    "train/logps/ref*",  # what is known of the rows drawn, and does not change with the policy
    "logged/reward*",
    "value/mean",
    "value/std",
    "advantage/*",
    "eval/ratio/*",  # ratio/* and logged/kl of training say the same
    "rollout/reward_per_prompt",  # train/reward again
    "semi_offline/hidden_tokens",  # semi_offline/mask_rate again
)

CURVES = "curves.txt"  # beside the event files: the tags that have a curve, whatever steps are taken again
SAME = 1e-5  # of a number's size: what an order of sums moves makes no curve

Row = Mapping[str, float | None]  # of metrics.jsonl


class Point(NamedTuple):
    step: int
    value: float
    time: float  # seconds since 1970


class Board:
    """The event files of one directory.

    A curve begins once a tag has had two values: until then its points are held back, so that no chart shows a
    constant or a single point. `resume_step`: later points of earlier starts are hidden; 0 hides all of them.
    `rows` are those of metrics.jsonl, by which the curves go on; `began` is when the clock of their times was 0.
    """

    def __init__(
        self,
        directory: Path,
        *,
        resume_step: int = 0,
        rows: Sequence[Row] = (),
        began: float = 0,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = resume_step + 1 if resume_step else 0
        self._writer = SummaryWriter(str(directory), purge_step=purge, flush_secs=30)
        self._curves = directory / CURVES
        noted = resume_step and self._curves.is_file()
        self._drawn: set[str] = set(self._curves.read_text(encoding="utf-8").splitlines() if noted else ())
        self._held: dict[str, list[Point]] = {}
        self._laid_out = 0  # curves
        for row in rows if resume_step else ():
            for tag, value in row.items():
                if tag not in ("step", "time") and value is not None and _has_curve(tag):
                    self._due(tag, Point(row["step"], value, began + row["time"]))
        self._held = {tag: [one for one in held if one.step <= resume_step] for tag, held in self._held.items()}
        write_text(self._curves, "".join(f"{tag}\n" for tag in sorted(self._drawn)))

    def scalar(self, tag: str, value: float, step: int) -> None:
        """A point of a curve; not of the tags LEFT_OUT."""
        if _has_curve(tag):
            known = tag in self._drawn
            for one in self._due(tag, Point(step, value, time.time())):
                self._writer.add_scalar(tag, one.value, one.step, walltime=one.time)
            if tag in self._drawn and not known:
                with self._curves.open("a", encoding="utf-8") as file:
                    file.write(f"{tag}\n")

    def histogram(self, tag: str, values: Tensor | Sequence[float], step: int) -> None:
        """The distribution of `values` (any shape) as <tag>/histogram; values that are not finite are left out."""
        flat = torch.as_tensor(values).detach().flatten().double().cpu()
        flat = flat[flat.isfinite()]
        if len(flat):
            self._writer.add_histogram(f"{tag}/histogram", flat.numpy(), step)

    def text(self, tag: str, markdown: str, step: int = 0) -> None:
        self._writer.add_text(tag, markdown, step)

    def lay_out(self) -> None:
        """The tab "Custom scalars", where curves have begun: the report's charts of them, with their healthy ranges."""
        if len(self._drawn) > self._laid_out:
            self._writer.add_custom_scalars(spec.layout(self._drawn))  # TensorBoard takes the last one
            self._laid_out = len(self._drawn)

    def hparams(self, settings: Mapping[str, object]) -> None:
        """The run's settings, for the tab "HParams"."""
        # TensorBoard takes the first Experiment summary it finds for all runs, so one stage would hide another's
        # settings and results. Without any it gathers both from all runs, which is what we want.
        from torch.utils.tensorboard.summary import hparams as summaries

        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in flatten(settings).items()}
        _, session_start, _ = summaries(plain, {})
        self._writer.file_writer.add_summary(session_start)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _due(self, tag: str, point: Point) -> list[Point]:
        """The points to draw now: `point`; none while the tag has one value; with the first other one all so far."""
        if tag in self._drawn:
            return [point]
        held = self._held.setdefault(tag, [])
        held.append(point)
        if math.isclose(point.value, held[0].value, rel_tol=SAME):
            return []
        self._drawn.add(tag)
        return self._held.pop(tag)


def _has_curve(tag: str) -> bool:
    return not any(fnmatchcase(tag, pattern) for pattern in LEFT_OUT)
