"""How long a response is, in words. A monitor and a baseline, not a goal.

Learned rewards often prefer longer text: give length beside them, or train on it alone, to see how much of their
gain it explains.
"""

from __future__ import annotations

from pipeline.words import between_blanks

CHATS = "text"  # chats come as text, too: see reward_models/README.md


def reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """The number of words between white space, 0 or more; of characters, where a script writes none."""
    return [float(len(between_blanks(completion))) for completion in completions]
