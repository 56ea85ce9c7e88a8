"""Thresholds on what a policy says and how it is judged: what each means, what to do, why it lies there."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.report.spec import LOOK, START, TROUBLE, Limit, Rule

CHANCE = "two standard errors of a difference: chance alone does this once in forty runs"
RESPONSES: Mapping[str, Rule] = {
    "gain": Rule(
        "Gain in reward",
        (
            Limit(
                TROUBLE,
                "the policy does worse than the model it started from. Lower the learning rate, check that rewards "
                "and rows belong together, and read the samples",
                CHANCE,
                low=-2.0,
            ),
            Limit(
                LOOK,
                "no gain that chance could not make. Judge on more prompts (max_rows), train longer, or give data "
                "in which some responses are clearly better",
                CHANCE,
                low=2.0,
            ),
        ),
        "more than chance would give",
        unit="standard errors",
    ),
    "unseen": Rule(
        "Rewards never trained on",
        (
            Limit(
                TROUBLE,
                "it fell although the reward rose: the policy exploits the rewards it was trained on. Give "
                "reward models more or cleaner pairs, stop earlier, or add a KL term",
                CHANCE,
                low=-2.0,
            ),
        ),
        "rose or stayed as the reward rose",
        unit="standard errors",
    ),
    "parts": Rule(
        "Parts of the reward",
        (
            Limit(
                LOOK,
                "this part is being traded away for the others. Raise its weight in reward= if it matters",
                CHANCE,
                low=-2.0,
            ),
        ),
        "no part fell",
        unit="standard errors",
    ),
    "length": Rule(
        "Length of responses",
        (
            Limit(
                TROUBLE,
                "responses shrank to less than half. Compare the reward's correlation with length; reward parts "
                "that punish length, or rows that end early, do this",
                "at half the length something other than quality has changed",
                low=0.5,
            ),
            Limit(
                TROUBLE,
                "responses became more than twice as long. If the reward grew no faster than the length, the reward "
                "counts words: add a reward for brevity or one that is blind to length",
                "at twice the length something other than quality has changed",
                high=2.0,
            ),
            Limit(
                LOOK,
                "responses became clearly shorter: read a few, and see whether the reward likes brevity",
                "people notice a change by a third",
                low=0.67,
            ),
            Limit(
                LOOK,
                "responses became clearly longer: read a few, and see whether the reward likes length",
                "people notice a change by a third",
                high=1.33,
            ),
        ),
        "close to that of the start model",
        unit=START,
    ),
    "length_correlation": Rule(
        "Reward and length",
        (
            Limit(
                TROUBLE,
                "the reward is close to counting words. Train it on pairs of like length, or add a reward that is "
                "blind to length",
                "0.7 squared: half of the reward's variance is length",
                high=0.7,
            ),
            Limit(
                LOOK,
                "length explains a quarter of the reward or more: compare the gain with the change of length",
                "0.5 squared: a quarter of the variance is length",
                high=0.5,
            ),
        ),
        "the reward is not mainly length",
    ),
    "variety": Rule(
        "Variety (distinct-2)",
        (
            Limit(
                TROUBLE,
                "the responses have become alike. Stop earlier, add a KL term (algo=a_lol_kl), or sample rows with "
                "sampling=all",
                "half of the word pairs are gone",
                low=0.5,
            ),
            Limit(
                LOOK,
                "the policy settles on fewer phrases: read the samples; a KL term or fewer steps keep variety",
                "the demonstration loses 8 to 16 %; three tenths are no accident of the seed",
                low=0.7,
            ),
        ),
        "close to that of the start model",
        unit=START,
    ),
    "repetition": Rule(
        "Repetition",
        (
            Limit(
                TROUBLE,
                "responses loop. A model too small or trained too little does so with greedy decoding whatever RL "
                "does: look at the start model first, then sample, or stop earlier",
                "more than half of each response has been said before",
                high=0.5,
            ),
            Limit(
                LOOK,
                "responses repeat themselves: read the samples; stop earlier or add a KL term",
                "of 617 preferred answers of hh-rlhf, 99 in 100 repeat under 12 % of their word triples",
                high=0.2,
            ),
        ),
        "responses hardly repeat themselves",
    ),
    "cut": Rule(
        "Responses cut at the limit",
        (
            Limit(
                TROUBLE,
                "most responses never end, so rewards judge torsos. Check that the training rows end with the "
                "end-of-sequence token (data cut at max_response_length teaches never to end), or raise the limit",
                "the rewards judge mostly unfinished text",
                high=0.5,
            ),
            Limit(
                LOOK,
                "many responses are cut: raise generation.max_new_tokens, or find out why they do not end",
                "beyond one in five the cut moves the mean length and reward",
                high=0.2,
            ),
        ),
        "nearly all responses end by themselves",
    ),
    "kl": Rule(
        "KL from the start model",
        (
            Limit(
                LOOK,
                "the policy has hardly moved: raise the learning rate or the number of steps",
                "choosing the better of two samples costs ln 2 - 1/2 = 0.19 nats; a tenth of that is no choice",
                low=0.02,
            ),
            Limit(
                LOOK,
                "the policy is far from what the reward models were trained on, where their scores mean less: judge "
                "with a reward it was not trained on, or stop earlier",
                "choosing the best of n samples costs ln n - (n-1)/n nats: 10 are the best of 60,000",
                high=10.0,
            ),
        ),
        "it moved, and not far",
        unit="nats",
    ),
}
