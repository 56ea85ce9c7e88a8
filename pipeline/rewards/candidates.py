"""Several responses to one prompt: gathered from a policy, scored, ordered best first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from pipeline.data.columns import ranked
from pipeline.data.convert import scores_of
from pipeline.data.prompts import gold
from pipeline.records import Example, Response, Scores, text_of
from pipeline.rewards import scoring
from pipeline.rewards.rewards import Rewards
from pipeline.trainer.group import Ranks


class Gathered(NamedTuple):
    """Rows made of responses, and how many responses are in none of them."""

    rows: list[Example]
    empty: int  # responses without text, or of blanks alone
    repeated: int  # responses equal to an earlier one to the same prompt


class Judged(NamedTuple):
    """Rows with their rewards; and every text that was judged, with its row and its scores."""

    rows: list[Example]
    of: list[Example]  # the row of each text
    texts: list[str]
    scores: Scores


def gathered(answers: Sequence[Response], n: int) -> Gathered:
    """One row per prompt, of its n neighbouring `answers`, with id, source, references and columns of the row asked.

    n = 1: the response is the completion. n > 1: each different text is one of the `candidates`, in the order drawn,
    and the completion of the row asked stays. Prompts whose responses are all empty have no row.
    """
    rows, empty, repeated = [], 0, 0
    for start in range(0, len(answers), n):
        some = [answer for answer in answers[start : start + n] if answer.text.strip()]
        written = [answer.text for answer in some]
        ended = {answer.text for answer in some if answer.finished}
        texts = tuple(dict.fromkeys(written))
        empty += n - len(written)
        repeated += len(written) - len(texts)
        if texts:
            row = _row(answers[start].example, texts, n)
            rows.append(replace(row, unfinished=tuple(text for text in texts if text not in ended)))
    return Gathered(rows, empty, repeated)


def _row(example: Example, texts: tuple[str, ...], n: int) -> Example:
    kept = {name: getattr(example, name) for name in ("references", "source", "columns")}
    if n == 1:
        return Example(example.id, example.prompt, texts[0], **kept)
    return Example(example.id, example.prompt, example.completion, candidates=texts, **kept)


def judged(ranks: Ranks, rewards: Rewards, rows: Sequence[Example], directory: Path | None = None) -> Judged:
    """The rows with what `rewards` give them. A stage's first ones say what is standardised by; `directory` keeps it.

    A row with candidates: each is judged, and they are put best first (equal ones keep their order) with their
    `candidate_rewards`; a completion beside them is what they are compared with, and is not judged. A row with a
    completion alone: the weighted sum becomes its `reward`, each normalised score one of its `rewards`; it is compared
    with the references given alone. Rewards that rows bring are, of candidates, their scores by name. Raises UserError
    where one that is named is missing.
    """
    scoring.warn_of_equals(rewards, [row for row in rows if not row.candidates])
    counts = [len(row.candidates) or 1 for row in rows]
    of = [one for row in rows for one in (_each(row) if row.candidates else [row])]
    answers = [text for row in rows for text in row.candidates or (row.completion,)]
    scoring.tell_of_calls(answers)
    scores = scoring.score_logged(ranks, rewards, of, answers, len(answers), directory)
    texts = [text_of(answer) for answer in answers]
    starts = accumulate(counts, initial=0)
    scored = [_with_scores(row, scores, start) for row, start in zip(rows, starts, strict=False)]
    return Judged(scored, of, texts, scores)


def _each(row: Example) -> list[Example]:
    """The row once for each of its candidates, with what it brings for that one, and what they are compared with."""
    rewards = row.candidate_rewards or [None] * len(row.candidates)
    bare = replace(row, references=gold(row))
    return [replace(bare, reward=one, rewards=scores_of(row, i)) for i, one in enumerate(rewards)]


def _with_scores(row: Example, scores: Scores, start: int) -> Example:
    """`row` with the scores of its texts, of which the first is number `start`."""
    if not row.candidates:
        found = {name: values[start] for name, values in scores.normalised.items()}
        rewards = {name: value for name, value in found.items() if value is not None}
        return replace(row, reward=scores.total[start], rewards=rewards)
    own = slice(start, start + len(row.candidates))
    named = {name: values[own] for name, values in scores.normalised.items()}
    return replace(row, **ranked(row.candidates, tuple(scores.total[own]), named))
