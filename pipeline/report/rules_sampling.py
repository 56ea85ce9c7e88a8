"""Thresholds on sampled responses: whether they can teach, and whether their numbers are well shared out."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.report.spec import LOOK, TROUBLE, Limit, Rule

SAMPLING: Mapping[str, Rule] = {
    "logp_gap": Rule(
        "Sampler against learner",
        (
            Limit(
                TROUBLE,
                "the policy that learns is not the one that spoke, so the gradient is wrong. Dropout has to be 0 "
                "(model.dropout=0.0); then try train.precision=fp32, model.attn_implementation=eager and "
                "generation.engine=generate: the one that closes the gap names its cause",
                "at 0.1 nats per token a response of 20 tokens counts e^2 = 7 times too much or too little",
                high=0.1,
            ),
            Limit(
                LOOK,
                "sampling and learning disagree by more than rounding. Check that dropout is 0 (model.dropout=0.0); "
                "then try train.precision=fp32, model.attn_implementation=eager, generation.engine=generate",
                "kernels that round to 8 bits (bf16) differ by up to 0.02 nats per token, those of fp32 by 1e-7",
                high=0.02,
            ),
        ),
        "both read the responses alike",
        unit="nats per token",
    ),
    "equal_groups": Rule(
        "Prompts whose responses earn the same",
        (
            Limit(
                TROUBLE,
                "next to no prompt has better and worse responses, so there is nothing to learn from. Sample hotter "
                "(sampler.temperature_min) or more (sampler.k, sampler.k_min), take a reward with finer steps, or "
                "stop: the policy may have learned what these prompts teach",
                "with one prompt in ten to learn from, a batch of 32 acts like 3 prompts",
                high=0.9,
            ),
            Limit(
                LOOK,
                "most prompts teach nothing: sample hotter (sampler.temperature_min), take more responses (sampler.k, "
                "sampler.k_min), a reward with finer steps, or sampler.skip_above=0.95, which leaves out what the "
                "policy is sure of",
                "beyond one half most of what is generated is spent on nothing",
                high=0.5,
            ),
        ),
        "most prompts have better and worse responses",
    ),
    "at_k_min": Rule(
        "Prompts at k_min",
        (
            Limit(
                LOOK,
                "the policy counts as sure of nearly every prompt, so k_min is in truth the only k. "
                "sampler.entropy_range=recent measures it against what it usually shows, sampler.capability=reward "
                "by how well it does; a larger sampler.k_min samples all of them more",
                "beyond four in five hardly a prompt is told from the others",
                high=0.8,
            ),
        ),
        "prompts differ in how many responses they get",
    ),
    "known": Rule(
        "Known prompts",
        (
            Limit(
                LOOK,
                "most prompts do not come again within the run, so there is no history to go by and each gets "
                "sampler.k responses. Take fewer prompts (data.max_rows) or more epochs (train.num_train_epochs), or "
                "say sampler.probe=2, which tries each with two responses before it decides",
                "below one half dynamic sampling decides less than sampler.k does",
                low=0.5,
            ),
        ),
        "most prompts have a history",
    ),
    "left_out": Rule(
        "Prompts left out",
        (
            Limit(
                TROUBLE,
                "next to nothing is left to learn from: the policy is sure of nearly every prompt. Stop here, raise "
                "sampler.skip_above, or give harder prompts",
                "with one prompt in ten to learn from, a batch of 32 acts like 3 prompts",
                high=0.9,
            ),
            Limit(
                LOOK,
                "most prompts are left out, so steps are noisier than batch_size suggests: raise batch_size or "
                "sampler.skip_above",
                "beyond one half most of a batch is not there",
                high=0.5,
            ),
        ),
        "most prompts are sampled",
    ),
    "baseline": Rule(
        "Baseline against the rewards",
        (
            Limit(
                LOOK,
                "the queue's mean lies far from what responses earn now, so nearly all count as better than usual, or "
                "nearly all as worse, whatever they say. A shorter algorithm.settings.queue_size follows faster; "
                "algorithm.settings.baseline=leave_one_out compares the responses to one prompt",
                "one standard deviation from the mean, five responses of six lie on the same side",
                high=1.0,
            ),
        ),
        "responses count as better and as worse",
        unit="standard deviation",
    ),
    "tokens_saved": Rule(
        "Tokens saved against k_max for all",
        (
            Limit(
                LOOK,
                "dynamic sampling saves next to nothing: the policy counts as unsure of nearly every prompt, or its "
                "prompts are not known (esrl/known). sampler.mode=static with as many responses costs the same",
                "a tenth is within what the lengths of responses change by",
                low=0.1,
            ),
        ),
        "fewer tokens than a fixed number of responses takes",
    ),
    "sampling_time": Rule(
        "Generated tokens",
        (
            Limit(
                LOOK,
                "nearly all of the time goes into making and judging responses. Take fewer (sampler.k, or algo=esrl, "
                "which shares them out), shorter ones (generation.max_new_tokens), a larger generation.batch_size, or "
                "generation.engine=continuous",
                "beyond nine tenths a faster learner would change nothing",
                high=0.9,
            ),
        ),
        "making them leaves time to learn",
        unit="of the time",
    ),
}
