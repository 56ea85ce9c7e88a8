"""The report's charts of learning from preference pairs: what the policy has come to prefer, and at what price."""

from __future__ import annotations

from pipeline.report.spec import Chart

GROUP = "Preferences"
PAIRS = (
    Chart(
        GROUP,
        "Pairs in the right order",
        ("rewards/accuracy",),
        "Share of pairs of which the policy made the preferred response likelier, against the start model, than the "
        "other. It begins at one half; the held-out curve tells learning from remembering.",
        marks=((0.5, "the start"),),
        axis=(None, 1.0),
    ),
    Chart(
        GROUP,
        "Implicit rewards",
        ("rewards/chosen", "rewards/rejected", "rewards/margin"),
        "beta times the log-ratio of policy to start model, of the preferred and of the other responses, and their "
        "difference. The gap should grow. Where both fall, the policy moves to texts that are in no pair.",
        marks=((0.0, "the start"),),
    ),
    Chart(
        GROUP,
        "Likelihood of both responses",
        ("logps/chosen", "logps/rejected", "logps/ref_chosen", "logps/ref_rejected"),
        "Log-probability of whole responses, in nats, under the policy and under the start model (ref).",
    ),
)
