"""The report's charts of the machine's work: tokens, seconds, memory."""

from __future__ import annotations

from pipeline.report.spec import Chart

GROUP = "Speed"
SPEED = (
    Chart(
        GROUP,
        "Tokens per second",
        ("perf/tokens_per_second",),
        "Training speed over all ranks.",
        axis=(0.0, None),
    ),
    Chart(
        GROUP,
        "Tokens per step",
        ("train/num_tokens",),
        "Response tokens learned from in one step.",
        axis=(0.0, None),
    ),
    Chart(
        GROUP,
        "Seconds per step",
        ("perf/step_seconds",),
        "Time of one optimizer step.",
        axis=(0.0, None),
    ),
    Chart(
        GROUP,
        "Seconds of sampling per step",
        ("perf/sampling_seconds",),
        "The part of a step in which responses are made and judged, and the reference reads them.",
        axis=(0.0, None),
    ),
    Chart(
        GROUP,
        "Use of the hardware (MFU)",
        ("perf/mfu",),
        "Arithmetic done as a share of what the hardware could do.",
        axis=(0.0, None),
    ),
    Chart(
        GROUP,
        "Peak memory",
        ("perf/peak_memory_gb",),
        "Most memory used on a device so far, in gigabytes. It should be flat after the first steps.",
        axis=(0.0, None),
    ),
)
