"""The report's charts of hidden tokens: what is hidden, what is drawn there, what the texts made of it earn."""

from __future__ import annotations

from pipeline.report.spec import Chart

GROUP = "Hidden tokens"
MASKING = (
    Chart(
        GROUP,
        "Compositions and decoded responses",
        ("semi_offline/greedy_reward",),
        "Solid: the static responses with the policy's most likely token in every hidden place. Dotted: what it really "
        "says. Both should rise; gains of the first alone are of filling gaps, not of speaking.",
        rule="carried_over",
        beside=("eval/reward/mean",),
    ),
    Chart(
        GROUP,
        "Held-out loss, inputs masked",
        ("eval/masked_loss",),
        "Loss on held-out references: with tokens of the inputs hidden behind [MASK], and with the inputs whole. The "
        "gap is what hiding costs; where it is large the model does not know what [MASK] stands for.",
        rule="masked_start",
        beside=("eval/loss",),
        stages=("rl",),
    ),
    Chart(
        GROUP,
        "Held-out loss, inputs masked",
        ("eval/masked_loss",),
        "Loss on held-out responses: with tokens of the inputs hidden behind [MASK], and with the inputs whole. The "
        "gap should shrink, and the loss on whole inputs should not suffer for it.",
        rule="masked_end",
        beside=("eval/loss",),
        stages=("sft",),
    ),
    Chart(
        GROUP,
        "Hidden share",
        ("semi_offline/mask_rate",),
        "Share of the static responses' tokens that are hidden, and drawn anew. It is more than masking.rate where a "
        "word is hidden to its end, and less where rows stay whole.",
        rule="mask_rate",
        axis=(0.0, 1.0),
    ),
    Chart(
        GROUP,
        "Hidden tokens",
        ("semi_offline/hidden_tokens",),
        "Hidden tokens per static response: in how many places the policy may choose.",
        axis=(0.0, None),
    ),
    Chart(
        GROUP,
        "Rows with nothing hidden",
        ("semi_offline/nothing_hidden",),
        "Share of rows in which the draw hid no token: of these nothing is learned by reward.",
        rule="nothing_hidden",
        axis=(0.0, 1.0),
    ),
    Chart(
        GROUP,
        "Rows whose texts earn the same",
        ("semi_offline/equal_rewards",),
        "Share of rows whose compositions all have one reward. No text is better than another there, so nothing is "
        "learned by reward.",
        rule="equal_rewards",
        axis=(0.0, 1.0),
    ),
    Chart(
        GROUP,
        "Spread of rewards within a row",
        ("semi_offline/reward_spread",),
        "Standard deviation of the rewards of one row's compositions: what the choice of tokens changes. This is what "
        "is learned from; near zero there is nothing left.",
        axis=(0.0, None),
    ),
    Chart(
        GROUP,
        "Texts that differ",
        ("semi_offline/different_texts",),
        "Different texts among the compositions of a row, as a share of the samples.",
        rule="different_texts",
        axis=(0.0, 1.0),
    ),
    Chart(
        GROUP,
        "Static tokens drawn again",
        ("semi_offline/own_tokens",),
        "Share of draws that are the very token that was hidden: 1 when the policy would say the static response "
        "itself.",
        axis=(0.0, 1.0),
    ),
)
