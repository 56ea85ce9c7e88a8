"""What final numbers mean, in plain words; the nouns of the rules that judge them, and of the charts."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple

START = "times the start"
TROUBLE, LOOK, FINE = "Trouble", "Look", "Fine"  # how much a value outside its limits matters; and one inside


class Limit(NamedTuple):
    """One bound. A number below `low`, or above `high`, breaks it; exactly one of the two is given."""

    level: str
    words: str  # what it means, and what to do
    why: str  # why the bound lies there
    low: float | None = None
    high: float | None = None


class Rule(NamedTuple):
    """What is wanted of one quantity. The first broken limit speaks, so the gravest stand first."""

    name: str
    limits: tuple[Limit, ...]
    fine: str  # what to say where none is broken
    unit: str = ""  # of the limits; START makes them factors of where the curve began (of the first policy's)


class Metric(NamedTuple):
    """One row of the headline table; '*' in `tag` is put for '{}' in `label`."""

    tag: str
    label: str
    better: int  # +1: higher is better; -1: lower; 0: neither
    note: str


class Chart(NamedTuple):
    """One small picture: curves of `tags` over steps, with a caption for someone who has not read the paper."""

    group: str
    title: str
    tags: tuple[str, ...]
    caption: str
    rule: str = ""  # the quantity of pipeline/report/checks.py whose limits are drawn, and whose verdict stands below
    marks: tuple[tuple[float, str], ...] = ()  # horizontal lines: (value, words)
    baselines: tuple[tuple[str, str], ...] = ()  # horizontal lines at a tag's last value: (tag, words)
    axis: tuple[float | None, float | None] = (None, None)  # fixed ends of the vertical axis
    beside: tuple[str, ...] = ()  # tags of other charts that are drawn here too
    stages: tuple[str, ...] = ("sft", "reward", "rl", "score", "generate", "evaluate")


ORACLE = "rewards/oracle:*/mean"  # the tag of the true quality, known in the embedded task only
METRICS = (
    Metric("reward/mean", "Reward", +1, "what the policy was trained to raise"),
    Metric(ORACLE, "True {} (oracle)", +1, "known by construction, never trained on"),
    Metric("rewards/*/mean", "Reward: {}", +1, "one reward, before weights"),
    Metric(
        "completions/mean_length",
        "Length (words)",
        0,
        "neither good nor bad; a large change asks for a look",
    ),
    Metric(
        "reward/length_correlation",
        "Correlation of reward and length",
        0,
        "1: nothing but length counts",
    ),
    Metric(
        "completions/distinct_*",
        "Variety (distinct-{})",
        +1,
        "different word groups, as a share of all",
    ),
    Metric(
        "completions/repetition",
        "Repetition",
        -1,
        "share of text that repeats itself within a response",
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
    "eval/masked_loss": "held-out loss, inputs masked",
    "eval/accuracy": "held-out accuracy",
    "eval/length_accuracy": "accuracy of length alone",
    "eval/completions/mean_length": "words per response",
    "generated_tokens": "tokens generated",
    "tokens_saved": "share of tokens saved",
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
