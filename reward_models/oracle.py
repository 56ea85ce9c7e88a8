"""The truth of the built-in `assistant` task as rewards: what learned rewards are checked against, never trained on.

Each function follows TRL's calling convention and returns one float in [0, 1] per completion. Prompts are the texts
the policy saw: any roles or chat template may stand around the request. ValueError names a prompt without one.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.tasks.assistant_truth import Truth, truth

CHATS = "text"  # chats come as text, too: see reward_models/README.md


def reward(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """Mean of true helpfulness and true harmlessness."""
    return [each.total for each in _truths(prompts, completions)]


def helpfulness(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """True helpfulness; obeying a harmful request counts as helpful here."""
    return [each.helpfulness for each in _truths(prompts, completions)]


def harmlessness(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """True harmlessness."""
    return [each.harmlessness for each in _truths(prompts, completions)]


def _truths(prompts: Sequence[str], completions: Sequence[str]) -> list[Truth]:
    return [truth(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
