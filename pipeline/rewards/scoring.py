"""Rewards of many responses: each rank scores its share, and all ranks get every score."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

from pipeline.records import Example, Response, Scores
from pipeline.rewards.rewards import Rewards
from pipeline.trainer.engine import Ranks

logger = logging.getLogger("tiffin")


def score_texts(ranks: Ranks, rewards: Rewards, examples: Sequence[Example], completions: Sequence[str]) -> Scores:
    """Score one completion per example; ranks share the work and all get the whole result.

    Raises UserError where a reward fails, by the checks of `rewards`; on every rank, wherever it failed.
    """
    mine = range(ranks.rank, len(examples), ranks.world)
    own = [examples[i] for i in mine]
    prompts = [plain_prompt(example) for example in own]
    texts = [completions[i] for i in mine]
    part = ranks.agreed(lambda: rewards.score(prompts, texts, reward_columns(own)))
    parts = ranks.gather(part)

    def merged(shares: Sequence[Sequence[float]]) -> list[float]:
        return [shares[i % ranks.world][i // ranks.world] for i in range(len(examples))]

    def by_name(field: str) -> dict[str, list[float]]:
        return {name: merged([getattr(one, field)[name] for one in parts]) for name in getattr(part, field)}

    return Scores(by_name("raw"), by_name("normalised"), merged([one.total for one in parts]))


def reward_columns(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """The columns that rewards are called with beside prompts and completions; one entry per example."""
    return {
        "id": [example.id for example in examples],
        "source": [example.source for example in examples],
        "references": [list(example.references) for example in examples],
        "raw_prompt": [example.prompt for example in examples],
    }


def warn_of_equals(rewards: Rewards, rows: Sequence[Example]) -> None:
    """One line where a reward compares, and rows whose completions are to be scored hold them as references."""
    equal = sum(row.completion in row.references for row in rows)
    if equal and any("references" in inspect.signature(one.function).parameters for one in rewards.rewards):
        logger.warning(
            f"rewards: {equal:,} of {len(rows):,} completions stand among their own references: equal texts score "
            "highest, whatever they are worth"
        )


def score_responses(ranks: Ranks, rewards: Rewards, responses: Sequence[Response]) -> Scores:
    """Score decoded responses."""
    return score_texts(ranks, rewards, [r.example for r in responses], [r.text for r in responses])


def plain_prompt(example: Example) -> str:
    """The prompt as rewards see it: the row's own text, or "role: content" paragraphs of a chat."""
    if isinstance(example.prompt, str):
        return example.prompt
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in example.prompt)
