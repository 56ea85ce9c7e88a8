"""The report's charts: what each curve means, in plain words, and where it is healthy. One record per chart.

Tags are matched with shell patterns. A chart on `x` also draws `eval/x`; one on `train/x` also draws `eval/x`:
held-out beside trained. A tag that no entry names still gets a plain chart.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple

from pipeline.glossary import Range

REST = "Other measurements"  # the group of charts that no entry of CHARTS describes


class Chart(NamedTuple):
    """One small picture: curves of `tags` over steps, with a caption for someone who has not read the paper."""

    group: str
    title: str
    tags: tuple[str, ...]
    caption: str
    healthy: Range = Range()
    marks: tuple[tuple[float, str], ...] = ()  # horizontal lines: (value, words)
    baselines: tuple[tuple[str, str], ...] = ()  # horizontal lines at a tag's last value: (tag, words)
    axis: tuple[float | None, float | None] = (None, None)  # fixed ends of the vertical axis
    stages: tuple[str, ...] = ("sft", "reward", "rl", "score", "generate", "evaluate")


CHARTS = (
    Chart(
        "Learning",
        "Loss",
        ("train/loss",),
        "How badly the model predicts what it is shown. It should fall and level off; the held-out curve shows "
        "whether that carries over to text it has not seen.",
        Range(
            high=1.1,
            above="the held-out loss rose again after its lowest point: the model begins to memorise. Train for fewer "
            "steps, or keep the best checkpoint",
            against="lowest",
            judged="eval/loss",
        ),
        stages=("sft", "reward"),
    ),
    Chart(
        "Learning",
        "Loss",
        ("train/loss",),
        "The weighted loss that the optimizer lowers. Its weights change with the data drawn and with the policy, so "
        "its level says little here: judge by the rewards.",
        stages=("rl",),
    ),
    Chart(
        "Learning",
        "Pair accuracy",
        ("train/accuracy",),
        "Share of pairs in which the preferred response gets the higher score. Guessing gives one half; the dashed "
        "line is what counting words alone would reach on the held-out pairs. A useful reward model is above both.",
        Range(0.5, None, "no better than guessing: more data, more steps or a higher learning rate", ""),
        baselines=(("eval/length_accuracy", "length alone"),),
        axis=(None, 1.0),
    ),
    Chart(
        "Learning",
        "Pair accuracy by source",
        ("eval/accuracy/*",),
        "Held-out pair accuracy, for each source of the data on its own.",
        Range(0.5, None, "no better than guessing on this source", ""),
        axis=(None, 1.0),
    ),
    Chart(
        "Learning",
        "Margin",
        ("train/margin",),
        "By how much the preferred response outscores the other. It should grow away from zero.",
        marks=((0.0, "no preference"),),
    ),
    Chart(
        "Learning",
        "Scores",
        ("scores/*/mean",),
        "Mean score of the preferred and of the other responses. What counts is the gap, not the level.",
    ),
    Chart(
        "Learning",
        "Gradient norm",
        ("train/grad_norm",),
        "Size of each update before clipping. It should settle; growth or spikes mean that the learning rate is too "
        "high or that some rows are odd.",
        Range(high=10.0, above="gradients grew more than tenfold: lower the learning rate", against="start"),
        axis=(0.0, None),
    ),
    Chart(
        "Learning",
        "Learning rate",
        ("train/learning_rate",),
        "Step size of the optimizer: warm-up, then decay, as configured.",
        axis=(0.0, None),
    ),
    Chart(
        "Rewards",
        "Reward",
        ("reward/mean",),
        "The number the policy is trained to raise: the weighted sum of the rewards. On logged data it describes the "
        "rows drawn; the held-out curve, of the policy's own responses, is the one that should rise.",
    ),
    Chart(
        "Rewards",
        "Oracle",
        ("rewards/oracle:*/mean",),
        "The true quality, known only in the embedded task and never trained on. If the reward rises and this does "
        "not, the policy exploits the reward model.",
    ),
    Chart(
        "Rewards",
        "Each reward",
        ("rewards/*/mean",),
        "The parts of the reward, each under its own name. One that falls while the sum rises is being traded away.",
    ),
    Chart(
        "Rewards",
        "Spread of the rewards",
        ("reward/std", "rewards/*/std"),
        "Standard deviation over responses. Near zero there is nothing left to tell good from bad.",
        axis=(0.0, None),
    ),
    Chart(
        "Rewards",
        "Correlation with length",
        ("rewards/*/length_correlation", "reward/length_correlation"),
        "Whether longer responses simply score higher: 0 is no relation, 1 is nothing but length.",
        Range(-0.7, 0.7, "short responses win almost by rule", "the reward is close to counting words"),
        axis=(-1.0, 1.0),
    ),
    Chart(
        "Ratio to the reference",
        "Probability ratio",
        ("ratio/mean",),
        "How much likelier the policy finds a response than the model it started from, as it enters the weights: after "
        "the clip. It starts at exactly 1; where it leaves 1 for good, the policy has moved away.",
        marks=((1.0, "start"),),
    ),
    Chart(
        "Ratio to the reference",
        "Clipped share",
        ("ratio/clip_fraction", "ratio/clip_fraction_low", "ratio/clip_fraction_high"),
        "Share of ratios limited by the clip. A clipped ratio no longer weighs a response by itself but by the bound.",
        Range(
            high=0.5,
            above="more than half of the ratios sit at the clip, so the method acts like its reference-free form. A "
            "lower learning rate, fewer steps or the per-token variant keep it apart",
        ),
        axis=(0.0, 1.0),
    ),
    Chart(
        "Ratio to the reference",
        "Effective share of samples",
        ("ratio/ess",),
        "How evenly the weights are spread: 1 when all responses count alike, near 0 when a few decide the step.",
        Range(0.1, None, "a few responses decide every step: raise the batch size or lower the learning rate", ""),
        axis=(0.0, 1.0),
    ),
    Chart(
        "Advantage and value",
        "Kept share",
        ("advantage/kept_fraction",),
        "Share of responses that beat what was expected for their prompt. Only these are learned from.",
        Range(
            0.3,
            0.7,
            "few responses are kept: the value estimate may be too high, or the data much worse than the start model",
            "nearly all responses are kept: the value estimate may be too low, so the filter hardly selects",
        ),
        axis=(0.0, 1.0),
    ),
    Chart(
        "Advantage and value",
        "Advantage",
        ("advantage/mean",),
        "Reward minus what was expected for the prompt: how much better than usual the responses learned from are.",
        marks=((0.0, "as expected"),),
    ),
    Chart(
        "Advantage and value",
        "Value fit (R2)",
        ("value/r2",),
        "How much of the reward can be foreseen from the prompt alone, on held-out prompts: 1 is all of it, 0 no more "
        "than the overall mean.",
        Range(0.0, None, "the value estimate is worse than a constant: give it more prompts or samples", ""),
        axis=(None, 1.0),
    ),
    Chart(
        "Advantage and value",
        "Value error",
        ("value/mse",),
        "Mean squared error of the expected reward. Lower is better; the held-out curve decides when to stop.",
        axis=(0.0, None),
    ),
    Chart(
        "Distance and certainty",
        "KL from the reference",
        ("objective/kl",),
        "How far the policy has moved from the model it started from, in nats per response. Some distance is "
        "the price of a higher reward; distance without reward is drift.",
    ),
    Chart(
        "Distance and certainty",
        "Entropy",
        ("objective/entropy",),
        "How undecided the policy is about the next token, in nats. A fall to near zero means that it always says the "
        "same.",
        Range(0.3, None, "the policy has become nearly deterministic: add a KL term or stop earlier", "", "start"),
        axis=(0.0, None),
    ),
    Chart(
        "Distance and certainty",
        "Log-probabilities",
        ("logps/*",),
        "Log-probability of whole responses under the policy and under the fixed reference, in nats. The two "
        "curves start together.",
        stages=("rl",),
    ),
    Chart(
        "Completions",
        "Length",
        ("completions/mean_length",),
        "Mean length of the responses in words. Rewards often have a taste for length: watch it beside them.",
        Range(
            0.5,
            1.5,
            "responses shrank to less than half: check that the reward does not simply like brevity",
            "responses grew by more than half: check that the reward does not simply like length",
            "start",
        ),
        axis=(0.0, None),
    ),
    Chart(
        "Completions",
        "Ended by themselves, or cut",
        ("completions/eos_fraction", "completions/clipped_fraction"),
        "Share of responses that end with the end-of-text token, and share cut at the length limit.",
        Range(
            high=0.2,
            above="many responses are cut at the limit: raise it, or find out why they do not end",
            judged="*clipped_fraction",
        ),
        axis=(0.0, 1.0),
    ),
    Chart(
        "Completions",
        "Variety (distinct-2)",
        ("completions/distinct_*",),
        "Different word pairs as a share of all word pairs. A fall means that the responses become alike.",
        Range(0.7, None, "variety fell by more than 30 %: the policy settles on a few phrases", "", "start"),
        axis=(0.0, None),
    ),
    Chart(
        "Completions",
        "Repetition",
        ("completions/repetition",),
        "Share of text that repeats what the same response has already said.",
        Range(high=0.2, above="responses repeat themselves: stop earlier, or add a KL term"),
        axis=(0.0, None),
    ),
    Chart(
        "Speed",
        "Tokens per second",
        ("perf/tokens_per_second",),
        "Training speed over all ranks.",
        axis=(0.0, None),
    ),
    Chart(
        "Speed",
        "Tokens per step",
        ("train/num_tokens",),
        "Response tokens learned from in one step.",
        axis=(0.0, None),
    ),
    Chart(
        "Speed",
        "Seconds per step",
        ("perf/step_seconds",),
        "Time of one optimizer step.",
        axis=(0.0, None),
    ),
    Chart(
        "Speed",
        "Use of the hardware (MFU)",
        ("perf/mfu",),
        "Arithmetic done as a share of what the hardware could do.",
        axis=(0.0, None),
    ),
    Chart(
        "Speed",
        "Peak memory",
        ("perf/peak_memory_gb",),
        "Most memory used on a device so far, in gigabytes. It should be flat after the first steps.",
        axis=(0.0, None),
    ),
)


def held_out(tag: str) -> str:
    """The tag under which the same quantity of held-out data is logged."""
    return "eval/" + tag.removeprefix("train/")


def charts_for(stage: str, tags: list[str]) -> list[tuple[Chart, list[str]]]:
    """The charts of a stage with the tags each draws, in the table's order, then a plain chart per tag left over."""
    left, drawn = list(tags), []
    for chart in CHARTS:
        patterns = [p for tag in chart.tags for p in (tag, held_out(tag))]
        own = [tag for pattern in patterns for tag in left if fnmatchcase(tag, pattern)]
        if own and stage in chart.stages:
            drawn.append((chart, list(dict.fromkeys(own))))
            left = [tag for tag in left if tag not in own]
    used_as_lines = {tag for chart, _ in drawn for tag, _ in chart.baselines}
    rest = sorted(tag for tag in left if tag not in used_as_lines)
    return drawn + [(Chart(REST, tag, (tag,), ""), [tag]) for tag in rest]
