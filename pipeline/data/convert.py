"""Preference rows, and conversations of which several turns have rewards -> rows of one response each, for the stages
that do not compare; `pairs.py` is the way back.

`pairs.of_scored(to_scored(pairs, "both"))` gives back ids, prompts, responses, rewards and sources of scored pairs that
stand alone with their prompt, each with margin = chosen_reward - rejected_reward, and turned round where the rejected
response has the higher reward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Literal

import numpy as np

from pipeline.config.reward_spec import words_for
from pipeline.data import conversations
from pipeline.data.rows import Rows
from pipeline.data.stored import CHOSEN, PAIRED, REJECTED, is_pair
from pipeline.errors import UserError
from pipeline.records import Example, text_of

CANDIDATE = "/candidate-"  # and those of rows of candidates, before their number


def scores_of(example: Example, i: int) -> dict[str, float]:
    """What candidate number `i` of a row has by name."""
    return {name: values[i] for name, values in example.candidate_scores.items() if values[i] is not None}


def each_candidate(example: Example) -> list[Example]:
    """A row for each of its candidates with scores, with its reward and its scores by name; any other row as it is.

    The reward is None where there are scores by name alone.

    A completion beside candidates, which has no reward, is what they are compared with: a reference. One that has a
    reward is a row of its own.
    """
    if not (example.candidate_rewards or example.candidate_scores) or is_pair(example):
        return [example]
    bare = replace(example, candidates=(), candidate_rewards=(), candidate_scores={})
    gold = () if example.completion is None or example.reward is not None else (text_of(example.completion),)
    rows = [bare] if example.reward is not None and example.completion is not None else []
    rewards = example.candidate_rewards or [None] * len(example.candidates)
    for i, (text, reward) in enumerate(zip(example.candidates, rewards, strict=True)):
        given = {"completion": text, "reward": reward, "references": example.references or gold}
        given["rewards"] = scores_of(example, i)
        rows.append(replace(bare, id=f"{example.id}{CANDIDATE}{i + 1}", **given))
    return rows


def to_supervised(examples: Sequence[Example]) -> Rows:
    """Each pair with its chosen response as completion and chosen_reward as reward, id unchanged; others pass.

    Of scored candidates the best is the completion, where there is no other. Raises UserError for a row with neither
    completion nor pair nor scored candidates.
    """
    rows = Rows.of(examples)
    if rows.all("answered"):
        return rows
    return rows.made("supervised", lambda some: (row if row.completion is not None else _best(row) for row in some))


def to_scored(examples: Sequence[Example], which: Literal["chosen", "both"]) -> Rows:
    """Each pair as one row (its chosen response) or two (chosen, then rejected); scored candidates as one row each;
    others without what they hold of a pair, and a row for each of their turns that has a reward.

    A new row has the pair's prompt, references, candidates, source and further columns; the response as completion;
    chosen_reward or rejected_reward as its reward (None if the pair has none: to be scored); and the pair's id with
    "/chosen" or "/rejected". Nothing else of a pair is kept. Raises UserError for a row with neither completion nor
    pair.
    """
    assert which in ("chosen", "both"), which
    rows = Rows.of(examples)
    if rows.all("answered") and not any(map(rows.any, ("scored_candidates", "holds_pair", "rewarded_turns"))):
        return rows
    return rows.made(f"scored {which}", lambda some: _scored(some, which))


def _scored(rows: Sequence[Example], which: Literal["chosen", "both"]) -> Iterator[Example]:
    for example in chain.from_iterable(map(each_candidate, rows)):
        if example.completion is not None:
            held = [name for name in PAIRED if getattr(example, name) is not None]
            yield from conversations.rewarded_turns(replace(example, **dict.fromkeys(held)) if held else example)
            continue
        chosen = _chosen(example, example.id + CHOSEN)
        yield chosen
        if which == "both":
            other = {"completion": example.rejected, "reward": example.rejected_reward}
            yield replace(chosen, id=example.id + REJECTED, **other)


def parted(examples: Sequence[Example]) -> Rows:
    """A row that holds a pair beside its completion as two rows, the completion and the pair; others as they are."""
    rows = Rows.of(examples)
    if not (rows.column("is_pair") & rows.column("answered")).any():
        return rows
    return rows.made("parted", lambda some: chain.from_iterable(map(_parted, some)))


def _parted(row: Example) -> list[Example]:
    if not is_pair(row) or row.completion is None:
        return [row]
    return [replace(row, **dict.fromkeys(PAIRED)), replace(row, completion=None, reward=None, rewards={})]


def with_sides(examples: Sequence[Example]) -> Rows:
    """The sides of pairs with 1 for a chosen and 0 for a rejected response as their reward.

    Rows of which one has a reward, or is no side of a pair, stay as they are.
    """
    rows = Rows.of(examples)
    if not np.isnan(rows.column("reward")).all() or rows.any("by_name"):
        return rows
    ids = [row.id for row in rows]
    if not all(one.endswith((CHOSEN, REJECTED)) for one in ids):
        return rows
    return rows.with_rewards([float(one.endswith(CHOSEN)) for one in ids])


def with_score(row: Example) -> Example:
    """A row that holds a response and its reward. Raises UserError for another."""
    if row.completion is None:
        raise UserError(f"{row.id}: no completion, wanted a scored row; add the column 'completion'")
    if row.reward is None:
        named = next(iter(row.rewards), None)
        ours, theirs = (
            ("candidate_rewards", f"candidates.rewards.{named}") if CANDIDATE in row.id else ("reward", named)
        )
        cure = "add the column 'reward' (or chosen and rejected), or run stage=score"
        raise UserError(
            f"{row.id}: no reward, wanted a scored row; "
            + (f"choose one of its `rewards` with data.columns='{{{ours}: {theirs}}}'" if named else cure)
        )
    return row


def judged(rows: Sequence[Example], run: str) -> Sequence[Example]:
    """Rows that all bring a reward. Raises UserError, for where there is nothing to score the others with."""
    missing = first_without(rows, "reward")
    if missing is not None and missing.rewards:
        raise UserError(
            f"{missing.id}: rewards by name ({', '.join(missing.rewards)}) and no `reward`, wanted one number to learn "
            f"from: say what each counts, {words_for(missing.rewards)}"
        )
    if missing is not None:
        raise UserError(
            f"{missing.id}: no reward, and nothing to score it with: add a `reward` column, give reward=, "
            f"or train one with bash run.sh stage=reward run={run}"
        )
    return rows


def first_without(rows: Sequence[Example], number: str) -> Example | None:
    """The first row that has no such number; None where all have one."""
    rows = Rows.of(rows)
    places = np.flatnonzero(np.isnan(rows.column(number)))
    return rows[int(places[0])] if len(places) else None


def _best(row: Example) -> Example:
    if is_pair(row) or not row.candidate_rewards:
        return _chosen(row, row.id)
    return replace(each_candidate(row)[0], id=row.id)


def _chosen(pair: Example, id: str) -> Example:
    if not is_pair(pair):
        raise UserError(
            f"{pair.id}: neither a completion nor chosen and rejected, wanted a response to learn from; "
            "add the column `completion` (or `response`), or rename the one that holds it"
        )
    nothing = dict.fromkeys(PAIRED)
    return replace(pair, **nothing, id=id, completion=pair.chosen, reward=pair.chosen_reward, rewards={})
