"""Whether two runs left the same: every file byte for byte, but for what tells the time; or numbers to rounding."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from pathlib import Path

from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.launch import provenance

UNFINISHED = ("part-*", "*.part", "*.tmp")
LEFT_OUT = ("tensorboard", "checkpoints")  # names that are times; state that holds times
TIMES = ("time", "seconds")
AS_STARTED = ("config.yaml", "command.txt", "README.md")  # which tell ranks or ZeRO stage of one of its starts
ROUNDED = 1e-4  # of a number's size, or of 1: what some steps in another order of sums may come to
KINDS = ("scalars", "histograms")  # of what TensorBoard keeps


def differences(one: Path, two: Path, near: bool = False) -> list[str]:
    """What differs between two run directories, with `near` by more than rounding; a line each."""
    ours, theirs = files(one), files(two)
    found = [f"only one of the two has {name}" for name in sorted(ours ^ theirs)]
    for name in sorted(ours & theirs):
        if near:
            found += further(one / name, two / name)
        elif content(one / name) != content(two / name):
            found.append(f"{name} differs{first_difference(one / name, two / name)}")
    for board in sorted(path.relative_to(one) for path in one.rglob("tensorboard")):
        ours, theirs = points(one / board), points(two / board)
        for what, points_of in (("lacks", ours - theirs), ("has too many", theirs - ours)):
            if points_of:
                found.append(f"{board}: the second {what} {points_of.total()} points, first {min(points_of)}")
    return found


def further(one: Path, two: Path) -> list[str]:
    """Where the numbers of two files differ by more than rounding, or anything else differs; a line at most."""
    if one.name in AS_STARTED:
        return []
    if one.suffix == ".safetensors":
        ours, theirs = load_file(one), load_file(two)
        same = ours.keys() == theirs.keys()
        apart = max((float(abs(ours[name] - theirs[name]).max()) for name in ours), default=0.0) if same else math.inf
        return [f"{one.name}: weights differ by {apart:.2g}"] if apart > ROUNDED else []
    if one.suffix == ".jsonl":
        read = [[timeless(json.loads(line)) for line in path.read_text("utf-8").splitlines()] for path in (one, two)]
    elif one.suffix == ".json":
        read = [timeless(json.loads(path.read_text("utf-8"))) for path in (one, two)]
    else:
        return [f"{one.name} differs"] if one.suffix != ".pt" and one.read_bytes() != two.read_bytes() else []
    return [f"{one.name}: {line}" for line in apart_at(*read)][:1]


def apart_at(ours: object, theirs: object, where: str = "") -> list[str]:
    """Where two values of JSON differ by more than rounding."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        return [line for key in ours for line in apart_at(ours[key], theirs[key], f"{where} {key}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [
            line for i, pair in enumerate(zip(ours, theirs, strict=True)) for line in apart_at(*pair, f"{where} {i}")
        ]
    if isinstance(ours, int | float) and isinstance(theirs, int | float):
        return [] if math.isclose(ours, theirs, rel_tol=ROUNDED, abs_tol=ROUNDED) else [f"{where}: {ours} and {theirs}"]
    return [] if ours == theirs else [f"{where}: {ours} and {theirs}"]


def leftovers(run: Path) -> list[str]:
    """What only an unfinished run may hold."""
    return sorted(str(path.relative_to(run)) for pattern in UNFINISHED for path in run.rglob(pattern))


def files(run: Path) -> set[str]:
    """All files but those of LEFT_OUT, locks, which hold nothing, and the list of starts."""
    names = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
    return {
        str(name) for name in names if not {*LEFT_OUT} & {*name.parts} and name.name not in (".lock", provenance.NAME)
    }


def content(path: Path) -> object:
    """The bytes of a file; of metrics.jsonl and results.json what does not depend on the clock."""
    if path.name == "metrics.jsonl":
        return [timeless(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.name == "results.json":
        return timeless(json.loads(path.read_text(encoding="utf-8")))
    return path.read_bytes()


def timeless(row: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in row.items() if key not in TIMES and not key.startswith("perf/")}


def first_difference(one: Path, two: Path) -> str:
    """Where, if it can be said in a line."""
    ours, theirs = content(one), content(two)
    if not isinstance(ours, list) or not isinstance(theirs, list):
        return ""
    steps = [[row["step"] for row in rows] for rows in (ours, theirs)]
    if steps[0] != steps[1]:
        return f": steps {steps[0]} and {steps[1]}"
    first = next((a, b) for a, b in zip(ours, theirs, strict=True) if a != b)
    return f" at step {first[0]['step']}: {set(first[0].items()) ^ set(first[1].items())}"


def points(board: Path) -> Counter[tuple[str, int]]:
    """(tag, step) of every curve and histogram that TensorBoard shows, as often as it shows it.

    Left out: what tells the end (results/), and sample tables, of which TensorBoard purges none after a restart.
    """
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every restart
    shown = EventAccumulator(str(board), size_guidance=dict.fromkeys(KINDS, 0)).Reload()
    read = {"scalars": shown.Scalars, "histograms": shown.Histograms}
    tags = [(kind, tag) for kind in KINDS for tag in shown.Tags()[kind] if not tag.startswith("results/")]
    return Counter((tag, event.step) for kind, tag in tags for event in read[kind](tag))
