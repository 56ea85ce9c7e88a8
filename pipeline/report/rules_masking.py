"""Thresholds on hidden tokens and on what is drawn in their places: what each means, what to do, why it lies there."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.report.rules_responses import CHANCE
from pipeline.report.spec import LOOK, TROUBLE, Limit, Rule

NAT = "at one nat each token is e = 2.7 times less likely; models that have learned to read past [MASK] lie well below"

MASKING: Mapping[str, Rule] = {
    "masked_start": Rule(
        "Masked inputs, at the start",
        (
            Limit(
                LOOK,
                "the start model does not know what [MASK] means, so what it draws behind one is noise. Fine-tune it "
                "with masks first: stage=sft masking.rate=0.4",
                NAT,
                high=1.0,
            ),
        ),
        "the start model reads past [MASK]",
        unit="nats",
    ),
    "masked_end": Rule(
        "Masked inputs",
        (
            Limit(
                LOOK,
                "the model has not learned to read past [MASK]: more steps, or a lower masking.rate. Where this is "
                "the start of semi-offline RL, what RL draws behind [MASK] will be noise",
                NAT,
                high=1.0,
            ),
        ),
        "the model reads past [MASK]",
        unit="nats",
    ),
    "mask_rate": Rule(
        "Hidden share of static responses",
        (
            Limit(
                LOOK,
                "hiding each word to its end hides far more than masking.rate says: tokens of one word are drawn "
                "without seeing each other, and the texts fall apart. Lower masking.rate, say masking.span=token, or "
                "train a vocabulary with longer tokens (model.scratch.vocab_size)",
                "beyond one half more is guessed than given; at masking.rate=0.4 ordinary vocabularies hide 0.40",
                high=0.5,
            ),
        ),
        "more is given than guessed",
    ),
    "nothing_hidden": Rule(
        "Rows with nothing hidden",
        (
            Limit(
                LOOK,
                "these rows teach nothing by reward: raise masking.rate, or give longer static responses (static=best "
                "or static=reference, where the candidates are short)",
                "at masking.rate=0.4 rows of five tokens do so once in thirteen times (0.6 to the power 5)",
                high=0.1,
            ),
        ),
        "nearly every row has hidden tokens",
    ),
    "equal_rewards": Rule(
        "Rows whose texts earn the same",
        (
            Limit(
                TROUBLE,
                "nearly no row has anything to tell good texts from bad. Take a reward that has more than a few "
                "values, or check that it depends on the words that change",
                "with one row in ten to learn from, a batch of 32 acts like 3 rows",
                high=0.9,
            ),
            Limit(
                LOOK,
                "most rows teach nothing, as all of their texts earn the same: a reward with finer steps, more samples "
                "(algorithm.settings.samples), or a higher masking.rate",
                "beyond one half most of each step's cost is spent on nothing",
                high=0.5,
            ),
        ),
        "most rows have better and worse texts",
    ),
    "different_texts": Rule(
        "Texts that differ",
        (
            Limit(
                LOOK,
                "the policy is sure of what it draws, so more samples add next to nothing: fewer of them "
                "(algorithm.settings.samples) cost less, a higher masking.rate explores more",
                "under a quarter, 64 samples are fewer than 16 texts",
                low=0.25,
            ),
        ),
        "samples bring different texts",
    ),
    "carried_over": Rule(
        "From compositions to decoding",
        (
            Limit(
                TROUBLE,
                "the policy fills gaps better and speaks worse: compositions are not what it says. Lower "
                "algorithm.settings.rl_weight or the learning rate, stop earlier, or take static responses nearer to "
                "what it says (candidates of this very model)",
                CHANCE,
                low=-2.0,
            ),
        ),
        "decoded responses did not fall while compositions gained",
        unit="standard errors",
    ),
}
