"""What is known of every measurement, read from measures/*.yaml: its chart, its healthy range, the words for both.

Page, findings and TensorBoard's layout all read this, so a limit and a caption stand once: a new measurement of RL
needs an entry there and nothing else. A check whose reading takes more than a curve has a function in stage_checks.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.yaml_layers import load_yaml

FOLDER = Path(__file__).resolve().parent / "measures"
FILES = ("learning", "rewards", "masking", "sampling", "policy")  # in the order of the page's charts
REST = "Other measurements"  # the group of charts that no file describes
START = "times the start"
TROUBLE, LOOK, FINE = LEVELS = ("Trouble", "Look", "Fine")  # the most serious first


class Limit(NamedTuple):
    """One bound: a number beyond it breaks it."""

    level: str
    side: str  # below | above
    bound: float
    means: str  # in plain words
    do: str
    why: str  # why the bound lies there

    def broken(self, value: float) -> bool:
        return value < self.bound if self.side == "below" else value > self.bound


class Rule(NamedTuple):
    """What is wanted of one quantity. The first broken limit speaks, so the most serious stand first."""

    name: str
    limits: tuple[Limit, ...]
    unit: str  # of the limits; START makes them factors of where the curve began (of the first policy's)
    drawn: bool  # the limits are a range of the chart's axis
    reads: str  # what of a curve of RL is judged: its end, its end as a share, its drift; '' is for stage_checks.py
    tags: tuple[str, ...]  # the first of these that was logged ...
    where: str  # ... if this was, too


class Chart(NamedTuple):
    """One small picture: curves of `tags` over steps, with a caption for someone who has not read the paper."""

    group: str
    title: str
    tags: Sequence[str]  # shell patterns; each stands for the same quantity of held-out data too
    caption: str = ""
    check: str = ""  # the quantity whose limits are drawn, and whose verdict stands below
    marks: Mapping[float, str] = {}  # horizontal lines, with words
    baselines: Mapping[str, str] = {}  # horizontal lines at a tag's last value, with words
    axis: Sequence[float | None] = (None, None)  # fixed ends of the vertical axis
    beside: Sequence[str] = ()  # tags of other charts that are drawn here too
    stages: Sequence[str] = ("sft", "reward", "rl", "score", "generate", "evaluate")


class Metric(NamedTuple):
    """One row of the headline table; '*' in `tag` is put for '{}' in `label`."""

    tag: str
    label: str
    better: int = 0  # +1: higher is better; -1: lower; 0: neither
    check: str = ""  # the rule under which an evaluation judges it
    note: str = ""


ORACLE = "rewards/oracle:*/mean"  # the tag of the true quality, known in the built-in task only
METRICS = (
    Metric("reward", "Reward", +1, "gain", "all rewards that judged here, by weight"),
    Metric(ORACLE, "True {} (oracle)", +1, "unseen", "known by construction, never trained on"),
    Metric("rewards/*/mean", "Reward: {}", +1, "parts", "one reward, before weights"),
    Metric(
        "sampled/reward",
        "Reward of plain samples",
        +1,
        "",
        "temperature 1, where the answers above are decoded otherwise",
    ),
    Metric(
        *("gain/known", "Estimated gain over the first", 0, "estimated_gain"),
        "by the rows' own rewards: from how likely their responses are, sampled at temperature 1",
    ),
    Metric("gain/*/known", "Estimated gain in {}", 0, "estimated_gain", "by one of the rows' named rewards"),
    Metric("logged/nll", "Logged responses (nats per token)", 0, "", "how likely they are; no measure of quality"),
    Metric(
        "completions/mean_words", "Length (words)", 0, "length", "neither good nor bad; a large change asks for a look"
    ),
    Metric(
        *("reward_length_correlation", "Correlation of reward and length", 0, "length_correlation"),
        "1: nothing but length counts",
    ),
    Metric(
        "completions/distinct_*", "Variety (distinct-{})", +1, "variety", "different word groups, as a share of all"
    ),
    Metric(
        *("completions/repetition", "Repetition", -1, "repetition"),
        "share of text that repeats itself within a response",
    ),
    Metric("completions/clipped_ratio", "Cut at the limit", -1, "cut", "share that did not end by itself"),
    Metric("objective/kl", "KL from the start model", 0, "kl", "how far the policy moved, in nats per response"),
    Metric("perplexity", "Perplexity", -1, "", "on the held-out responses"),
    Metric("rows", "Rows"),
)
# Final numbers of a training stage that are shown at once; the others are a click away. '*' is put for '{}'.
FINAL = {
    "eval/reward": "held-out reward",
    "eval/rewards/*/mean": "held-out {}",
    "eval/gain/estimate": "estimated gain in reward",
    "eval/gain/low": "its interval from",
    "eval/gain/high": "to",
    "eval/loss": "held-out loss",
    "eval/perplexity": "held-out perplexity",
    "eval/masked_loss": "held-out loss, inputs masked",
    "eval/accuracy": "held-out accuracy",
    "eval/length_accuracy": "accuracy of length alone",
    "eval/completions/mean_words": "words per response",
    "generated_tokens": "tokens generated",
    "tokens_saved": "share of tokens saved",
    "model_step": "step of the model kept",
}


@cache
def charts() -> tuple[Chart, ...]:
    """All charts, in the order of the page."""
    return tuple(
        Chart(group, **{name: value for name, value in entry.items() if name in Chart._fields})
        for group, entry in _entries()
        if "tags" in entry
    )


@cache
def rules() -> Mapping[str, Rule]:
    """What is wanted, by quantity."""
    return {entry["check"]: _rule(entry) for _, entry in _entries() if "check" in entry}


def charts_for(stage: str, tags: Sequence[str]) -> list[tuple[Chart, list[str]]]:
    """The charts of a stage with the tags each draws, in the table's order, then a plain chart per tag left over."""
    left, drawn = list(tags), []
    for chart in charts():
        patterns = [pattern for tag in chart.tags for pattern in (tag, held_out(tag))]
        own = [tag for pattern in patterns for tag in left if fnmatchcase(tag, pattern)]
        if own and stage in chart.stages:
            beside = [tag for tag in chart.beside if tag in tags]
            drawn.append((chart, list(dict.fromkeys([*own, *beside]))))
            left = [tag for tag in left if tag not in own]
    used_as_lines = {tag for chart, _ in drawn for tag in chart.baselines}
    return drawn + [(Chart(REST, tag, (tag,)), [tag]) for tag in sorted(left) if tag not in used_as_lines]


def layout(tags: Collection[str]) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's tab "Custom scalars": group -> chart, with its healthy range -> the tags as regular expressions.

    Only the charts that show some of `tags`.
    """
    board: dict[str, dict[str, list[Any]]] = {}
    for chart in charts():
        title = chart.title + (f": {wanted(chart.check)}" if chart.check and rules()[chart.check].drawn else "")
        patterns = [_regular_expression(tag) for tag in (*chart.tags, *chart.baselines, *chart.beside)]
        if any(re.search(pattern, tag) for pattern in patterns[: len(chart.tags)] for tag in tags):
            board.setdefault(chart.group, {})[title] = ["Multiline", patterns]
    return board


def held_out(tag: str) -> str:
    """The tag under which the same quantity of held-out data is logged."""
    return "eval/" + tag.removeprefix("train/")


def band(quantity: str) -> tuple[float | None, float | None]:
    """The healthy range of a quantity: its tightest limits; None is open."""
    limits = rules()[quantity].limits
    lows, highs = ([limit.bound for limit in limits if limit.side == side] for side in ("below", "above"))
    return max(lows, default=None), min(highs, default=None)


def wanted(quantity: str) -> str:
    """The healthy range in words: 'healthy from 0.2 to 0.8'."""
    low, high = band(quantity)
    upper = "" if high is None else f"to {high:g}" if low is not None else f"up to {high:g}"
    lower = "" if low is None else f"from {low:g}"
    return " ".join(filter(None, ["healthy", lower, upper, rules()[quantity].unit]))


def match(tag: str, pattern: str, label: str) -> str:
    """`label` with what the '*' of `pattern` stands for in `tag`; empty if it does not match."""
    if not fnmatchcase(tag, pattern):
        return ""
    head, star, tail = pattern.partition("*")
    return label.format(tag[len(head) : len(tag) - len(tail)].replace("_", " ")) if star else label


def metric_of(tag: str) -> tuple[Metric, str]:
    """The entry for a headline `tag`, and its label; an unknown tag is its own label and is judged by nobody."""
    matches = ((metric, match(tag, metric.tag, metric.label)) for metric in METRICS)
    return next(((metric, label) for metric, label in matches if label), (Metric(tag, tag), tag))


@cache
def _entries() -> tuple[tuple[str, Mapping[str, Any]], ...]:
    files = [load_yaml(FOLDER / f"{name}.yaml") for name in FILES]
    return tuple((group, entry) for file in files for group, entries in file.items() for entry in entries)


def _rule(entry: Mapping[str, Any]) -> Rule:
    reads, _, tags = entry.get("reads", "").partition(" of ")
    return Rule(
        entry.get("name", entry.get("title")),
        tuple(_limit(limit) for limit in entry["limits"]),
        entry.get("unit", ""),
        entry.get("drawn", True),
        reads,
        tuple(tags.split(", ")),
        entry.get("where", ""),
    )


def _limit(entry: Mapping[str, Any]) -> Limit:
    """{Look: below 0.2, means: ..., do: ..., why: ...}."""
    level = next(level for level in LEVELS if level in entry)
    side, bound = entry[level].split()
    return Limit(level, side, float(bound), entry["means"], entry["do"], entry["why"])


def _regular_expression(tag: str) -> str:
    """A chart's tag, and the same of held-out data."""
    kinds, _, name = "(eval/)?", "", tag
    if tag.startswith(("train/", "eval/")):
        kind, _, name = tag.partition("/")
        kinds = "(train|eval)/" if kind == "train" else "eval/"
    return f"^{kinds}{name.replace('*', '[^/]+')}$"
