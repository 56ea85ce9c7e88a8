"""The report's charts: what each curve means, in plain words, and which rule judges it. One record per chart.

Tags are matched with shell patterns. A chart on `x` also draws `eval/x`; one on `train/x` also draws `eval/x`:
held-out beside trained. A tag that no entry names still gets a plain chart.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from pipeline.report.charts_masking import MASKING
from pipeline.report.charts_pairs import PAIRS
from pipeline.report.charts_sampling import SAMPLING
from pipeline.report.charts_speed import SPEED
from pipeline.report.spec import ORACLE, Chart

REST = "Other measurements"  # the group of charts that no entry of CHARTS describes

CHARTS = (
    Chart(
        "Learning",
        "Loss",
        ("train/loss",),
        "How badly the model predicts what it is shown. It should fall and level off; the held-out curve shows "
        "whether that carries over to text it has not seen.",
        rule="overfit",
        stages=("sft", "reward"),
    ),
    Chart(
        "Learning",
        "Loss",
        ("train/loss",),
        "Of the rows trained on, and of held-out ones. Most methods weight it, and the weights change with the data "
        "drawn and with the policy, so its level says little here: judge by the rewards.",
        stages=("rl",),
    ),
    Chart(
        "Learning",
        "Parts of the loss",
        ("loss/rl", "loss/mle"),
        "The part that follows the rewards, before its weight, and the part that learns the references, in "
        "semi-offline RL with masked inputs. Only the second should fall steadily; the first has no level, only a "
        "gradient.",
    ),
    Chart(
        "Learning",
        "Pair accuracy",
        ("train/accuracy",),
        "Share of pairs in which the preferred response gets the higher score. Guessing gives one half; the dashed "
        "line is what counting words alone would reach on the held-out pairs. A useful reward model is above both.",
        rule="pair_accuracy",
        baselines=(("eval/length_accuracy", "length alone"),),
        axis=(None, 1.0),
    ),
    Chart(
        "Learning",
        "Pair accuracy by source",
        ("eval/accuracy/*",),
        "Held-out pair accuracy, for each source of the data on its own.",
        rule="source_accuracy",
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
        rule="grad_spike",
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
        "rows drawn, in semi-offline RL the compositions, in on-policy RL the sampled responses; the held-out curve, "
        "of the policy's own responses, is the one that should rise.",
    ),
    Chart(
        "Rewards",
        "Oracle",
        (ORACLE,),
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
        rule="length_correlation",
        axis=(-1.0, 1.0),
    ),
    *PAIRS,
    *MASKING,
    *SAMPLING,
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
        "Share of ratios at a bound of the clip, 1 - epsilon or 1 + epsilon. The ratio says how much likelier a "
        "response is under the policy than under the start model; at a bound it weighs the response by the bound.",
        rule="clip",
        axis=(0.0, 1.0),
    ),
    Chart(
        "Ratio to the reference",
        "Effective share of samples",
        ("ratio/ess",),
        "How evenly the weights are spread: 1 when all responses count alike, near 0 when a few decide the step.",
        rule="ess",
        axis=(0.0, 1.0),
    ),
    Chart(
        "Advantage and value",
        "Kept share",
        ("advantage/kept_fraction",),
        "Share of the logged responses with a reward above what the start model is expected to get on that prompt. "
        "Only these are learned from.",
        rule="kept",
        axis=(0.0, 1.0),
    ),
    Chart(
        "Advantage and value",
        "Advantage",
        ("advantage/mean", "advantage/std"),
        "Reward minus what was expected for the prompt: how much better than usual the responses learned from are, and "
        "how far they differ. Without differences nothing is learned.",
        marks=((0.0, "as expected"),),
    ),
    Chart(
        "Advantage and value",
        "Value fit (R2)",
        ("value/r2",),
        "How much of the differences in reward between held-out prompts the value head foresees from the prompt alone: "
        "1 is all, 0 no more than the overall mean. It decides which rows count as better than expected.",
        rule="value_r2",
        axis=(None, 1.0),
    ),
    Chart(
        "Advantage and value",
        "Value error",
        ("value/mse",),
        "Mean squared error of the expected reward on held-out prompts, in squared units of the reward.",
        axis=(0.0, None),
    ),
    Chart(
        "Distance and certainty",
        "KL from the reference",
        ("objective/kl",),
        "How far the policy has moved from the model it started from, in nats per response. Some distance is "
        "the price of a higher reward; distance without reward is drift.",
        rule="kl",
    ),
    Chart(
        "Distance and certainty",
        "Entropy",
        ("objective/entropy",),
        "How undecided the policy is about the next token, in nats. A fall to near zero means that it always says the "
        "same.",
        rule="entropy",
        axis=(0.0, None),
    ),
    Chart(
        "Distance and certainty",
        "Log-probabilities",
        ("logps/*",),
        "Log-probability of whole responses, in nats, under the policy and, where the method has one, under the "
        "fixed reference. The two start together.",
        stages=("rl",),
    ),
    Chart(
        "Completions",
        "Length",
        ("completions/mean_length",),
        "Mean length of the responses in words. Rewards often have a taste for length: watch it beside them.",
        rule="length",
        axis=(0.0, None),
    ),
    Chart(
        "Completions",
        "Length in tokens",
        ("completions/mean_tokens",),
        "Mean length of the responses in tokens, that of the end included.",
        axis=(0.0, None),
    ),
    Chart(
        "Completions",
        "Ended by themselves, or cut",
        ("completions/eos_fraction", "completions/clipped_fraction"),
        "Share of responses that end with the end-of-text token, and share cut at the length limit.",
        rule="cut",
        axis=(0.0, 1.0),
    ),
    Chart(
        "Completions",
        "Variety (distinct-2)",
        ("completions/distinct_*",),
        "Different word pairs as a share of all word pairs over all responses. A fall means that they become alike. It "
        "falls with more or longer responses too, so compare equal numbers of prompts.",
        rule="variety",
        axis=(0.0, None),
    ),
    Chart(
        "Completions",
        "Repetition",
        ("completions/repetition",),
        "Share of a response's word triples that it has said before.",
        rule="repetition",
        axis=(0.0, None),
    ),
    *SPEED,
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
            beside = [tag for tag in chart.beside if tag in tags]
            drawn.append((chart, list(dict.fromkeys([*own, *beside]))))
            left = [tag for tag in left if tag not in own]
    used_as_lines = {tag for chart, _ in drawn for tag, _ in chart.baselines}
    rest = sorted(tag for tag in left if tag not in used_as_lines)
    return drawn + [(Chart(REST, tag, (tag,), ""), [tag]) for tag in rest]
