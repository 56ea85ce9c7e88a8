"""Thresholds on how a stage learned: what each means, what to do, why it lies there."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.report.spec import LOOK, START, TROUBLE, Limit, Rule

TRAINING: Mapping[str, Rule] = {
    "kept": Rule(
        "Kept share of the rows",
        (
            Limit(
                LOOK,
                "hardly any row beats what the model would have done itself: better data, or a value fitted to other "
                "rewards than the rows have. Check that both come from the same reward=",
                "rows of the start model's own quality keep about half; under a fifth most of the data teaches nothing",
                low=0.2,
            ),
            Limit(
                LOOK,
                "nearly every row is kept, so the filter chooses little. That is right where the data are much better "
                "than the start model, and a sign of too low a value estimate where they are not",
                "rows of the start model's own quality keep about half; over four fifths the filter decides little",
                high=0.8,
            ),
        ),
        "the filter chooses",
    ),
    "value_r2": Rule(
        "Value fit (R2)",
        (
            Limit(
                TROUBLE,
                "the value head is worse than a constant, so it keeps and drops rows by noise. Raise "
                "value.samples_per_prompt or value.max_prompts, or lower value.learning_rate",
                "0 is what the mean of all rewards would reach",
                low=0.0,
            ),
            Limit(
                LOOK,
                "the head knows little more than the mean reward; more value.samples_per_prompt or value.max_prompts. "
                "Where prompts really do not differ in their reward, this is as good as it gets",
                "below 0.2 nine tenths of the spread (the square root of 0.8) remain",
                low=0.2,
            ),
        ),
        "the head can tell prompts apart",
    ),
    "clip": Rule(
        "Ratios at the clip",
        (
            Limit(
                LOOK,
                "nearly every ratio sits at a bound: the ratio no longer tells responses apart, and the method is its "
                "reference-free form. algo=a_lol_seq (per token), a lower learning rate or fewer steps give it meaning",
                "beyond nine in ten the ratio is a constant with exceptions",
                high=0.9,
            ),
            Limit(
                LOOK,
                "more than half of the ratios sit at a bound, so the weights are mostly those of the reference-free "
                "form. Usual for long responses; a lower learning rate, fewer steps or algo=a_lol_seq change it",
                "at one half the bounds decide more weights than the ratios do",
                high=0.5,
            ),
        ),
        "most ratios are free to weigh their response",
    ),
    "ess": Rule(
        "Effective share of samples",
        (
            Limit(
                TROUBLE,
                "a few responses decide every step: raise batch_size or lower the learning rate",
                "under one in ten, a batch of 32 acts like 3 rows",
                low=0.1,
            ),
            Limit(
                LOOK,
                "the weights are uneven, so steps are noisier than batch_size suggests: a larger batch helps",
                "under three in ten the noise of a step nearly doubles (the square root of 1/0.3)",
                low=0.3,
            ),
        ),
        "many responses share in every step",
    ),
    "entropy": Rule(
        "Entropy",
        (
            Limit(
                LOOK,
                "the policy has become nearly deterministic: add a KL term or stop earlier",
                "a fall to three tenths is far more than learning the data needs after fine-tuning",
                low=0.3,
            ),
        ),
        "the policy stays undecided where it was",
        unit=START,
    ),
    "best_step": Rule(
        "Step of the best weights",
        (
            Limit(
                TROUBLE,
                "no later evaluation was better than the start: the stage taught nothing that held-out data show. "
                "Lower the learning rate, or look for rewards and rows that do not belong together",
                "step 0 is before training",
                low=1.0,
            ),
        ),
        "training improved on its start",
        unit="steps",
    ),
    "overfit": Rule(
        "Held-out loss",
        (
            Limit(
                LOOK,
                "the held-out loss rose again after its lowest point: the model begins to memorise. Fewer epochs, or "
                "train.keep=best, which keeps the weights of the lowest point",
                "a tenth is beyond the noise of a few hundred held-out rows",
                high=1.1,
            ),
        ),
        "ended at or near its lowest point",
        unit="times its lowest",
    ),
    "pair_lead": Rule(
        "Lead over counting words",
        (
            Limit(
                TROUBLE,
                "the reward model orders held-out pairs no better than their length does, so RL would learn length. "
                "More pairs, more steps, a larger start model",
                "0 is what always choosing the longer, or the shorter, reaches",
                low=0.0,
            ),
            Limit(
                LOOK,
                "the lead over length alone could be chance: judge on more held-out pairs before trusting it",
                "two standard errors of an accuracy: chance alone does this once in forty runs",
                low=2.0,
            ),
        ),
        "it reads more than the length",
        unit="standard errors",
    ),
    "pair_accuracy": Rule(
        "Pair accuracy",
        (
            Limit(
                TROUBLE,
                "no better than guessing: check which side of the pairs is the chosen one, then the learning rate",
                "0.5 is a coin",
                low=0.5,
            ),
            Limit(
                LOOK,
                "a weak judge, and RL finds what is wrong with a judge: more pairs, a larger model, or a reward of "
                "another kind beside it",
                "at 0.6 two of five verdicts are wrong; two people agree on about three of four (Ouyang et al. 2022)",
                low=0.6,
            ),
        ),
        "a useful judge",
    ),
    "source_accuracy": Rule(
        "Weakest source",
        (
            Limit(
                LOOK,
                "on this source the reward model is worse than a coin: do not use its scores there, or give it pairs "
                "of that kind",
                "0.5 is a coin; sources of fewer than 30 held-out pairs are not judged",
                low=0.5,
            ),
        ),
        "better than a coin on every source",
    ),
    "pair_gap": Rule(
        "Training over held-out accuracy",
        (
            Limit(
                LOOK,
                "the reward model knows its training pairs by heart: fewer epochs, or more pairs",
                "a gap of 0.15 is beyond the noise of a hundred held-out pairs (standard error 0.05)",
                high=0.15,
            ),
        ),
        "what it learned carries over",
    ),
    "grad_spike": Rule(
        "Largest gradient",
        (
            Limit(
                TROUBLE,
                "a few steps pushed far harder than all others: lower the learning rate, lower max_grad_norm, and look "
                "for odd rows (empty, endless, of another language)",
                "twenty times the median: one such step can undo hundreds",
                high=20.0,
            ),
            Limit(
                LOOK,
                "the gradient spiked or grew: clipping holds one step back, but a longer warm-up or a lower learning "
                "rate is safer",
                "the demonstration's stages stay within 2.1 times their median after the first tenth of the steps",
                high=5.0,
            ),
        ),
        "no spikes",
        unit="times the median",
    ),
    "non_finite": Rule(
        "Steps that were not finite",
        (
            Limit(
                TROUBLE,
                "more than one step in a hundred was thrown away: use bf16 in place of fp16, lower the learning rate, "
                "and look at the rows in non_finite/",
                "fp16 alone loses a handful of steps while its loss scale settles, not one in a hundred",
                high=0.01,
            ),
            Limit(
                LOOK,
                "some steps were thrown away: their rows are in the stage's non_finite/",
                "a healthy step is finite",
                high=0.0,
            ),
        ),
        "every step was finite",
    ),
    "data_cut": Rule(
        "Responses cut in the data",
        (
            Limit(
                LOOK,
                "the ends of these training responses are cut off, and a model that sees no end does not learn to "
                "stop: raise max_response_length, or drop the long rows",
                "beyond one in twenty the cut rows shape how responses end",
                high=0.05,
            ),
        ),
        "responses are learned to their end",
    ),
}
