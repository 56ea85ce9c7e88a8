"""The report's charts of sampled responses: how many each prompt gets, what they cost, whether they can teach."""

from __future__ import annotations

from pipeline.report.spec import Chart

GROUP = "Sampled responses"
SAMPLING = (
    Chart(
        GROUP,
        "Tokens generated per step",
        ("rollout/generated_tokens",),
        "Tokens sampled in one step, over all ranks; those that are thrown away count too. With dynamic sampling it "
        "falls once the prompts come again.",
        rule="sampling_time",
        axis=(0.0, None),
    ),
    Chart(
        GROUP,
        "Tokens saved",
        ("esrl/tokens_saved",),
        "Share of the tokens that are not generated, as prompts get fewer than k_max responses. 0 while nothing is "
        "known of the prompts.",
        rule="tokens_saved",
        axis=(0.0, 1.0),
    ),
    Chart(
        GROUP,
        "Responses per prompt",
        ("esrl/samples_per_prompt",),
        "Mean over the prompts of a step, those left out included. With dynamic sampling it lies between k_min and "
        "k_max; TensorBoard has the histogram, esrl/samples.",
        axis=(0.0, None),
    ),
    Chart(
        GROUP,
        "Prompts at k_min",
        ("esrl/at_k_min",),
        "Share of the sampled prompts that get the fewest responses. Where it is nearly all of them, k_min decides and "
        "the capability does not.",
        rule="at_k_min",
        axis=(0.0, 1.0),
    ),
    Chart(
        GROUP,
        "Capability",
        ("esrl/capability",),
        "How sure the policy is of a prompt, or how well it does there: 1 means that it can do no better, and the "
        "fewest responses. Mean over the prompts of which something is known.",
        axis=(None, 1.0),
    ),
    Chart(
        GROUP,
        "Known prompts",
        ("esrl/known",),
        "Share of the prompts that an earlier step has sampled, or a probe has just tried. The others get as many "
        "responses as sampler.k says.",
        rule="known",
        axis=(0.0, 1.0),
    ),
    Chart(
        GROUP,
        "Prompts left out",
        ("esrl/left_out",),
        "Share of the prompts of a step that have no response to learn from: the policy is sure of them (skip_above), "
        "or, in the dropping modes, theirs is thrown away.",
        rule="left_out",
        axis=(0.0, 1.0),
    ),
    Chart(
        GROUP,
        "Prompts whose responses earn the same",
        ("rollout/equal_groups",),
        "Share of the prompts with several responses whose rewards are all equal. Compared with one another, these "
        "responses teach nothing.",
        rule="equal_groups",
        axis=(0.0, 1.0),
    ),
    Chart(
        GROUP,
        "Baseline",
        ("rollout/queue_mean",),
        "Mean of the rewards that earlier steps earned, after penalties: what algorithm.settings.baseline=queue "
        "takes off a reward. Beside it the rewards of the step, before penalties.",
        rule="baseline",
        beside=("reward/mean",),
    ),
    Chart(
        GROUP,
        "Sampler against learner",
        ("rollout/logp_gap",),
        "By how many nats per token the pass that learns finds a response more or less likely than the pass that "
        "sampled it. Both are the same policy: what is left is rounding.",
        rule="logp_gap",
        axis=(0.0, None),
    ),
)
