"""How well held-out rows tell what was gained, where a judge knows the truth: the table of RESULTS.md.

    python stages/recipes/gain_study.py runs/one runs/two ...

Each run holds stage=rl results whose `reward` judged the policy's own responses (eval/reward, the truth) and whose
logged rows carry rewards of the same judge (held_out/). Printed are: Spearman's correlation of each estimate with the
true gain, over the evaluations of one training and over the trainings of one run at their end; the true gain that is
lost where the estimate chooses the weights; and how often the 90 % interval holds the true gain.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.algorithms import estimates
from pipeline.algorithms.estimates import ESTIMATES, HeldOut
from pipeline.files import read_metrics

LOSS = "lowest eval/loss"  # what must not choose


class TrueGain(NamedTuple):
    """One evaluation: the true gain over the start, its standard error, and what is estimated."""

    truth: float
    error: float
    estimated: Mapping[str, float]
    gain: estimates.Gain


def main(runs: Sequence[str]) -> None:
    trainings = {run: of_run(Path(run)) for run in runs}
    all_of_them = [seen for of in trainings.values() for seen in of if len(seen) > 1]
    print(f"{len(all_of_them)} trainings of {len(runs)} runs, {sum(map(len, all_of_them))} evaluations")
    print(f"{'':18}{'within a training':>20}{'between trainings':>20}{'lost by choosing':>20}")
    for name in [*ESTIMATES, LOSS]:
        within = [spearman(*columns(seen, name)) for seen in all_of_them if len(seen) > 3]
        between = [spearman(*columns([seen[-1] for seen in of], name)) for of in trainings.values() if len(of) > 3]
        lost = [max(one.truth for one in seen) - chosen(seen, name).truth for seen in all_of_them]
        print(f"{name:18}{mean(within):20.2f}{mean(between):20.2f}{mean(lost):20.3f}")
    print(f"{'the last':18}{'':40}{mean([max(o.truth for o in seen) - seen[-1].truth for seen in all_of_them]):20.3f}")
    ends = [seen[-1] for seen in all_of_them]
    known = [one for one in ends if one.gain.known]
    held = sum(one.gain.low <= one.truth <= one.gain.high for one in known)
    print(f"at the end: {len(known)} of {len(ends)} known, the 90 % interval holds the true gain in {held}")
    told, true = mean([one.gain.value for one in known]), mean([one.truth for one in known])
    print(f"mean estimate {told:.3f}, mean true gain {true:.3f}")


def of_run(run: Path) -> list[list[TrueGain]]:
    """The evaluations of each training of a run, but for those of which nothing is known of held-out rows."""
    return [read(stage) for stage in sorted(run.glob("rl/*")) if (stage / "held_out").is_dir()]


def read(stage: Path) -> list[TrueGain]:
    """The evaluations of one training behind the first."""
    rows = {row["step"]: row for row in read_metrics(stage / "metrics.jsonl") if "eval/reward" in row}
    first = rows[0]
    return [seen(stage, row, first) for step, row in rows.items() if step]


def seen(stage: Path, row: Mapping[str, float], first: Mapping[str, float]) -> TrueGain:
    lines = (stage / "held_out" / f"step-{row['step']:06d}.jsonl").read_text("utf-8").splitlines()
    table = [json.loads(line) for line in lines]
    numbers = {name: torch.tensor([one[name] for one in table]) for name in HeldOut._fields}
    held_out = HeldOut(**{name: column if name == "prompt" else column.double() for name, column in numbers.items()})
    once = torch.ones(1, len(table), dtype=torch.float64)
    estimated = {name: float(estimate(held_out, once)) for name, estimate in ESTIMATES.items()}
    error = math.hypot(row["eval/reward_se"], first["eval/reward_se"])
    truth = row["eval/reward"] - first["eval/reward"]
    return TrueGain(truth, error, estimated | {LOSS: -row["eval/loss"]}, estimates.gain(held_out))


def chosen(seen: Sequence[TrueGain], name: str) -> TrueGain:
    """The evaluation that the estimate likes best."""
    return max(seen, key=lambda one: one.estimated[name])


def columns(seen: Sequence[TrueGain], name: str) -> tuple[list[float], list[float]]:
    return [one.truth for one in seen], [one.estimated[name] for one in seen]


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Pearson's correlation of ranks; no two numbers are equal here."""
    return statistics.correlation(*([sorted(values).index(one) for one in values] for values in (xs, ys)))


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


if __name__ == "__main__":
    main(sys.argv[1:])
