"""The one converter between preference rows and scored rows.

    to_scored      a pair -> one or two rows, each a completion with its reward
    to_pairs       scored rows of one prompt -> the best against the worst
    to_supervised  a pair -> its chosen response as the completion

`to_pairs(to_scored(pairs, "both"))` gives back ids, prompts, responses, rewards and sources of scored pairs that stand
alone with their prompt, each with margin = chosen_reward - rejected_reward, and turned round where the rejected
response has the higher reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from pipeline.errors import UserError
from pipeline.records import Example

CHOSEN, REJECTED = "/chosen", "/rejected"  # what the ids of the two rows of a pair end with
PAIRED = ("chosen", "rejected", "chosen_reward", "rejected_reward", "margin", "correctness")  # fields of a pair


class Pairing(NamedTuple):
    """What became of the rows. Rows in == pairs_given + 2 made pairs + alone + tied + between."""

    examples: list[Example]  # the pairs given, then one made for each prompt, in the order of first appearance
    pairs_given: int  # rows that were pairs already
    alone: int  # rows whose prompt has no second row
    tied: int  # rows of prompts whose best and worst row have equal reward or equal text
    between: int  # rows of paired prompts that are neither the best nor the worst


def to_scored(examples: Sequence[Example], which: Literal["chosen", "both"]) -> list[Example]:
    """Each pair as one row (its chosen response) or two (chosen, then rejected); rows with a completion as they are.

    A new row has the pair's prompt, references, candidates and source; the response as completion; chosen_reward or
    rejected_reward as its reward (None if the pair has none: to be scored); and the pair's id with "/chosen" or
    "/rejected". Nothing else of a pair is kept. Raises UserError for a row with neither.
    """
    assert which in ("chosen", "both"), which
    return [row for example in examples for row in _scored_rows(example, which)]


def to_supervised(examples: Sequence[Example]) -> list[Example]:
    """Each pair with its chosen response as completion and chosen_reward as reward, id unchanged; others pass.

    Raises UserError for a row with neither completion nor pair.
    """
    return [one if one.completion is not None else _chosen(one, one.id) for one in examples]


def to_pairs(examples: Sequence[Example]) -> Pairing:
    """Scored rows grouped by prompt; of each prompt the highest reward is chosen, the lowest rejected.

    Of equal rewards the first row counts. margin = chosen_reward - rejected_reward > 0. Source, references and id are
    the chosen row's; where the two rows came from one pair, its id comes back. `rewards` are not kept. Rows that are
    pairs already, without a completion, pass unchanged. Raises UserError for a row without completion or reward.
    """
    given: list[Example] = []
    groups: dict[object, list[Example]] = {}
    for example in examples:
        if _is_pair(example) and example.completion is None:
            given.append(example)
        else:
            groups.setdefault(example.prompt, []).append(_checked(example))
    made, alone, tied, between = [], 0, 0, 0
    for rows in groups.values():
        best, worst = max(rows, key=lambda row: row.reward), min(rows, key=lambda row: row.reward)
        if len(rows) == 1:
            alone += 1
        elif best.reward == worst.reward or best.completion == worst.completion:
            tied += len(rows)
        else:
            made.append(_pair(best, worst))
            between += len(rows) - 2
    return Pairing([*given, *made], len(given), alone, tied, between)


def _scored_rows(example: Example, which: str) -> list[Example]:
    if example.completion is not None:
        return [_without_pair(example)]
    chosen = _chosen(example, example.id + CHOSEN)
    if which == "chosen":
        return [chosen]
    rejected = replace(chosen, id=example.id + REJECTED, completion=example.rejected, reward=example.rejected_reward)
    return [chosen, rejected]


def _without_pair(example: Example) -> Example:
    """A row with a response of its own, less what else it holds to compare."""
    held = [name for name in PAIRED if getattr(example, name) is not None]
    return replace(example, **dict.fromkeys(held)) if held else example


def _chosen(pair: Example, id: str) -> Example:
    if not _is_pair(pair):
        raise UserError(
            f"{pair.id}: neither a completion nor chosen and rejected, wanted a response to learn from; "
            "add the column `completion` (or `response`), or rename the one that holds it"
        )
    nothing = dict.fromkeys(PAIRED)
    return replace(pair, **nothing, id=id, completion=pair.chosen, reward=pair.chosen_reward, rewards={})


def _pair(best: Example, worst: Example) -> Example:
    return Example(
        _pair_id(best.id, worst.id),
        best.prompt,
        references=best.references,
        chosen=best.completion,
        rejected=worst.completion,
        chosen_reward=best.reward,
        rejected_reward=worst.reward,
        margin=best.reward - worst.reward,
        source=best.source,
    )


def _pair_id(best: str, worst: str) -> str:
    """The id that both had as a pair; else the better row's."""
    for one, other in ((CHOSEN, REJECTED), (REJECTED, CHOSEN)):
        if best.endswith(one) and worst.endswith(other) and best.removesuffix(one) == worst.removesuffix(other):
            return best.removesuffix(one)
    return best


def _is_pair(example: Example) -> bool:
    return example.chosen is not None and example.rejected is not None


def _checked(example: Example) -> Example:
    if example.completion is None:
        raise UserError(f"{example.id}: no completion, wanted a scored row; add the column 'completion'")
    if example.reward is None:
        raise UserError(
            f"{example.id}: no reward, wanted a scored row; add the column 'reward' (or chosen and "
            "rejected), or run stage=score"
        )
    return example
