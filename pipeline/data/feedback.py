"""Feedback as public data sets publish it, under our names: pairs by ids, strengths and votes, ranks, ratings.

Each function takes the columns of one row and gives it with ours in place of the set's own, or raises RowError;
TeachesNothingError where the row is sound and says nothing. Sources: the cards of the sets, which `layouts.LAYOUTS`
names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pipeline.data import fields
from pipeline.data.fields import Columns, RowError, TeachesNothingError, named, without

BETTER = ("better", "better_response_id", "safer_response_id")  # of the two of PKU-SafeRLHF
PAIRS_OF_HELPSTEER = (
    ("response_1", "response_2", "preference_strength"),
    ("response1", "response2", "overall_preference"),
)
SEVERAL, SCORES = ("responses", "completions", "answers"), ("scores", "rewards", "ratings")  # of one prompt, as lists


def preferred_id(row: Columns) -> Columns:
    """Two responses, 0 and 1, and the number of the better one."""
    name = named(row, BETTER)
    better = _one_of_two(row, name, "0 or 1")
    sides = row.get(f"response_{better}"), row.get(f"response_{1 - better}")
    return _pair(without(row, "response_0", "response_1", *BETTER), *sides)


def preferred_strength(row: Columns) -> Columns:
    """Two responses, and a number below 0 where the first is better, above 0 where the second is; 0 is a tie."""
    one, two, name = next((names for names in PAIRS_OF_HELPSTEER if names[2] in row), PAIRS_OF_HELPSTEER[0])
    strength = fields.number(row, name)
    if strength == 0:
        raise TeachesNothingError("tie")
    sides = (row.get(one), row.get(two)) if strength < 0 else (row.get(two), row.get(one))
    rest = without(row, one, two, name, "context")
    prompt = {} if fields.has(row, "prompt") else {"prompt": row.get("context")}
    return _pair({**rest, **prompt, "margin": abs(strength)}, *sides)


def votes(row: Columns) -> Columns:
    """Two comments on a post, which of them is preferred (1: A), and their votes, as rewards in logarithms."""
    first = _one_of_two(row, "labels", "1 (A is preferred) or 0") == 1
    chosen, rejected = ("A", "B") if first else ("B", "A")
    rewards = {
        f"{side}_reward": _logarithm(fields.number(row, f"score_{letter}"))
        for side, letter in (("chosen", chosen), ("rejected", rejected))
    }
    rest = without(row, "history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B")
    given = {"prompt": row.get("history"), "source": fields.optional_label(row, "domain")}
    return _pair({**rest, **given, **rewards}, row.get(f"human_ref_{chosen}"), row.get(f"human_ref_{rejected}"))


def ranks(row: Columns) -> Columns:
    """Answers with their rank, 1 the best, as candidates with rewards (K - rank) / (K - 1), K of them.

    Equal ranks share the mean of the places that they take.
    """
    answers = fields.checked_list(row.get("answers"), "answers", "a list of answers with their rank")
    if len(answers) < 2:
        raise RowError(f"answers: {len(answers)}, wanted two or more, which are ranked")
    entries = [_entry(one, f"answers[{i}]") for i, one in enumerate(answers)]
    order = [_number(one, "rank", f"answers[{i}]") for i, one in enumerate(entries)]
    texts = [one.get("answer") for one in entries]
    places = [sum(other < rank for other in order) + (order.count(rank) + 1) / 2 for rank in order]
    rewards = [(len(order) - place) / (len(order) - 1) for place in places]
    prompt = fields.text(row, "prompt").rstrip(" ")  # behind the mark of the assistant's turn
    listed = row.get("source")
    source = {"source": ", ".join(map(str, listed))} if isinstance(listed, list) else {}
    return {**without(row, "answers"), "prompt": prompt, "candidates": texts, "candidate_rewards": rewards, **source}


def rated_completions(row: Columns) -> Columns:
    """UltraFeedback's completions as candidates: overall_score is the reward, which annotations are rewards by name."""
    completions = fields.checked_list(row.get("completions"), "completions", "a list of completions")
    candidates = [
        _rated(_entry(one, f"completions[{i}]"), f"completions[{i}]", fields.has(row, "candidate_rewards"))
        for i, one in enumerate(completions)
    ]
    return {**without(row, "completions"), "candidates": candidates}


def scored_responses(row: Columns) -> Columns:
    """A list of responses and one of their scores, as candidates."""
    texts, scores = named(row, SEVERAL), named(row, SCORES)
    return {**without(row, texts, scores), "candidates": row.get(texts), "candidate_rewards": row.get(scores)}


def judged_summary(row: Columns) -> Columns:
    """A post and a summary with grades by axis; the overall one is the reward."""
    summary = _entry(row.get("summary"), "summary")
    axes = fields.named_numbers(summary, "axes")
    if "overall" not in axes:
        raise RowError("summary.axes: no overall, wanted {..., overall: a finite number}")
    given = {"completion": summary.get("text"), "reward": axes["overall"], "rewards": axes}
    return {**without(row, "info", "summary"), "prompt": _post(row), **given}


def compared_summaries(row: Columns) -> Columns:
    """A post, two summaries, and the number of the one that was chosen."""
    summaries = fields.checked_list(row.get("summaries"), "summaries", "two summaries", 2)
    texts = [_entry(one, f"summaries[{i}]").get("text") for i, one in enumerate(summaries)]
    choice = _one_of_two(row, "choice", "0 or 1")
    return _pair(
        {**without(row, "info", "summaries", "choice"), "prompt": _post(row)}, texts[choice], texts[1 - choice]
    )


def _one_of_two(row: Columns, name: str, wanted: str) -> int:
    """0 or 1, as a number or as text (csv)."""
    value = row.get(name)
    found = next((one for one in (0, 1) if value in (one, str(one))), None)
    if found is None or isinstance(value, bool):
        raise RowError(f"{name}: {fields.described(value)}, wanted {wanted}")
    return found


def _rated(one: Columns, place: str, has_reward: bool) -> Columns:
    given = {name: one[name] for name in ("overall_score", "fine-grained_score") if one.get(name) is not None}
    score = None if has_reward else _number(one, "overall_score", place)
    annotations = one.get("annotations")
    noted = annotations if isinstance(annotations, Mapping) else {}
    ratings = {name: note.get("Rating") for name, note in noted.items() if isinstance(note, Mapping)}
    named = {name: value for name, value in ratings.items() if value not in (None, "N/A", "None")}
    return {"text": one.get("response"), "score": score, "rewards": {**given, **named}}


def _post(row: Columns) -> str:
    """What was summarised, as those who collected it show it to their models."""
    info = _entry(row.get("info"), "info")
    if not fields.has(info, "post"):
        return f"Article:\n\n{fields.text(info, 'article')}\n\nTL;DR:"
    parts = [f"SUBREDDIT: r/{info['subreddit']}"] if fields.optional_text(info, "subreddit") else []
    parts += [f"TITLE: {info['title']}"] if fields.optional_text(info, "title") else []
    return "\n\n".join([*parts, f"POST: {fields.text(info, 'post')}", "TL;DR:"])


def _logarithm(votes: float) -> float:
    """ln(1 + votes); of votes below 0 as far below."""
    return math.copysign(math.log1p(abs(votes)), votes)


def _pair(rest: Columns, chosen: object, rejected: object) -> Columns:
    return {**rest, "chosen": chosen, "rejected": rejected}


def _entry(value: object, place: str) -> Columns:
    if not isinstance(value, Mapping):
        raise RowError(f"{place}: {fields.described(value)}, wanted a mapping")
    return value


def _number(holder: Columns, name: str, place: str) -> float:
    if holder.get(name) is None:
        raise RowError(f"{place}.{name}: {'null' if name in holder else 'missing'}, wanted a finite number")
    return fields.checked_number(holder[name], f"{place}.{name}")
