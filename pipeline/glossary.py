"""What final numbers mean, in plain words, and where they are healthy: the tables behind the report's tables."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple


class Range(NamedTuple):
    """Where a number is healthy, and what to say of one that is outside. Bounds are None where there is none.

    `against`: 'value', the bounds are values; 'start', factors of where the curve began (for a headline figure: of
    the first policy's); 'lowest', factors of the lowest point of the curve. `judged`: pattern of the tags it is for.
    """

    low: float | None = None
    high: float | None = None
    below: str = ""
    above: str = ""
    against: str = "value"
    judged: str = "*"


class Metric(NamedTuple):
    """One row of the headline table; '*' in `tag` is put for '{}' in `label`."""

    tag: str
    label: str
    better: int  # +1: higher is better; -1: lower; 0: neither
    note: str
    healthy: Range = Range()


ORACLE = "rewards/oracle:*/mean"  # the tag of the true quality, known in the embedded task only
METRICS = (
    Metric("reward/mean", "Reward", +1, "what the policy was trained to raise"),
    Metric(ORACLE, "True {} (oracle)", +1, "known by construction, never trained on"),
    Metric("rewards/*/mean", "Reward: {}", +1, "one part of the reward, before weights"),
    Metric(
        "completions/mean_length",
        "Length (words)",
        0,
        "neither good nor bad; a large change asks for a look",
        Range(0.5, 1.5, "responses are less than half as long", "responses are more than half as long again", "start"),
    ),
    Metric(
        "reward/length_correlation",
        "Correlation of reward and length",
        0,
        "1: nothing but length counts",
        Range(-0.7, 0.7, "short responses win almost by rule", "the reward is close to counting words"),
    ),
    Metric(
        "completions/distinct_*",
        "Variety (distinct-{})",
        +1,
        "different word groups, as a share of all",
        Range(0.7, None, "variety fell by more than 30 %: read the samples", "", "start"),
    ),
    Metric(
        "completions/repetition",
        "Repetition",
        -1,
        "share of text that repeats itself within a response",
        Range(high=0.2, above="responses repeat themselves: read the samples"),
    ),
    Metric("completions/clipped_fraction", "Cut at the limit", -1, "share that did not end by itself"),
    Metric("objective/kl", "KL from the reference", 0, "distance from the start model, in nats per response"),
    Metric("perplexity", "Perplexity", -1, "on the held-out responses"),
    Metric("rows", "Rows", 0, ""),
)
# Final numbers of a training stage that are shown at once; the others are a click away. '*' is put for '{}'.
FINAL = {
    "eval/reward/mean": "held-out reward",
    "eval/rewards/*/mean": "held-out {}",
    "eval/loss": "held-out loss",
    "eval/perplexity": "held-out perplexity",
    "eval/accuracy": "held-out accuracy",
    "eval/length_accuracy": "accuracy of length alone",
    "eval/completions/mean_length": "words per response",
    "model_step": "step of the model kept",
}


def match(tag: str, pattern: str, label: str) -> str:
    """`label` with what the '*' of `pattern` stands for in `tag`; empty if it does not match."""
    if not fnmatchcase(tag, pattern):
        return ""
    head, star, tail = pattern.partition("*")
    return label.format(tag[len(head) : len(tag) - len(tail)].replace("_", " ")) if star else label


def metric_of(tag: str) -> tuple[Metric, str]:
    """The entry for a headline `tag`, and its label; an unknown tag is its own label and is judged by nobody."""
    found = ((metric, match(tag, metric.tag, metric.label)) for metric in METRICS)
    return next(((metric, label) for metric, label in found if label), (Metric(tag, tag, 0, ""), tag))
