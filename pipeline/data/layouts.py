"""Rows as public data sets publish them, under our names: before the format is recognised, and in the file's order.

Each layout is known by columns that only it has. Sources: the cards of the sets that LAYOUTS names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from pipeline.data import fields
from pipeline.data.fields import Columns, RowError, TeachesNothingError

SPEAKERS = {  # of ShareGPT's turns; other names are roles as they are
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
RESPONSES = ("completion", "response", "output", "chosen", "candidates")
ASKED = ("prompt", "instruction", "messages", "text", "sentence", "article", "document", "dialogue")
ABOUT = ("choices", "options", "passage", "paragraph")  # what a question is not complete without
BETTER = ("better", "better_response_id", "safer_response_id")  # of the two of PKU-SafeRLHF
PAIRS_OF_HELPSTEER = (
    ("response_1", "response_2", "preference_strength"),
    ("response1", "response2", "overall_preference"),
)
HIDDEN = {  # columns that must not be read anew where they travel with rows of ours
    *("response_0", "response_1", "response_2", "response1", "response2"),
    *("answers", "completions", "human_ref_A", "human_ref_B"),
}


class Layout(NamedTuple):
    """One layout. `rewrite` gives our columns in place of its own, or raises RowError or TeachesNothingError."""

    fits: Callable[[Columns], bool]
    rewrite: Callable[[Columns], Columns]
    says: Callable[[Columns], str]  # how a row is read, where that is a choice; else ""


def of(row: Columns) -> str | None:
    """The name of the layout that the columns of `row` have."""
    present = {name: value for name, value in row.items() if value is not None}
    return next((name for name, layout in LAYOUTS.items() if layout.fits(present)), None)


def conversations(row: Columns) -> Columns:
    """ShareGPT's {"from", "value"}, Capybara's {"input", "output"}, or {"role", "content"}, as messages.

    Beside `chosen` and `rejected`, each one turn, they are the prompt.
    """
    name = _listed(row, ("conversations", "conversation"))
    turns = fields.checked_list(row.get(name), name, "a list of turns")
    messages = [one for i, turn in enumerate(turns) for one in _turns(turn, f"{name}[{i}]")]
    rest = _without(row, name, "system")
    if fields.optional_text(row, "system"):
        messages = [{"role": "system", "content": row["system"]}, *messages]
    if not (isinstance(row.get("chosen"), Mapping) and isinstance(row.get("rejected"), Mapping)):
        return {**rest, "messages": messages}
    return {**rest, "prompt": messages} | {side: _turns(row[side], side) for side in ("chosen", "rejected")}


def question(row: Columns) -> Columns:
    """A question, perhaps with a system's message or a text that it is about; an `answer` also stays what it is."""
    asked = _without(row, "question", "system", "system_prompt", "context")
    system = fields.optional_text(row, _listed(row, ("system", "system_prompt")) or "system")
    text, about = fields.text(row, "question"), fields.optional_text(row, "context")
    text = f"{text}\n{about}" if about else text
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    answer = {} if fields.first_of(row, RESPONSES) else {"completion": row.get("answer")}
    return {**asked, "prompt": messages if system else text, **answer}


def preferred_id(row: Columns) -> Columns:
    """Two responses, 0 and 1, and the number of the better one."""
    name = _listed(row, BETTER)
    better = {0: 0, 1: 1, "0": 0, "1": 1}.get(row.get(name))
    if better is None or isinstance(row[name], bool):
        raise RowError(f"{name}: {fields.described(row.get(name))}, wanted 0 or 1")
    sides = row.get(f"response_{better}"), row.get(f"response_{1 - better}")
    return _pair(_without(row, "response_0", "response_1", *BETTER), *sides)


def preferred_strength(row: Columns) -> Columns:
    """Two responses, and a number below 0 where the first is better, above 0 where the second is; 0 is a tie."""
    one, two, name = next(names for names in PAIRS_OF_HELPSTEER if names[0] in row)
    strength = fields.number(row, name)
    if strength == 0:
        raise TeachesNothingError("tie")
    sides = (row.get(one), row.get(two)) if strength < 0 else (row.get(two), row.get(one))
    rest = _without(row, one, two, name, "context")
    prompt = {} if fields.has(row, "prompt") else {"prompt": row.get("context")}
    return _pair({**rest, **prompt, "margin": abs(strength)}, *sides)


def votes(row: Columns) -> Columns:
    """Two comments on a post, which of them is preferred (1: A), and their votes, as rewards in logarithms."""
    if row.get("labels") not in (0, 1, "0", "1") or isinstance(row["labels"], bool):
        raise RowError(f"labels: {fields.described(row.get('labels'))}, wanted 1 (A is preferred) or 0")
    chosen, rejected = ("A", "B") if int(row["labels"]) == 1 else ("B", "A")
    rewards = {
        f"{side}_reward": _logarithm(fields.number(row, f"score_{letter}"))
        for side, letter in (("chosen", chosen), ("rejected", rejected))
    }
    rest = _without(row, "history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B")
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
    return {**_without(row, "answers"), "prompt": prompt, "candidates": texts, "candidate_rewards": rewards, **source}


def rated_completions(row: Columns) -> Columns:
    """UltraFeedback's completions as candidates: overall_score is the reward, which annotations are rewards by name."""
    completions = fields.checked_list(row.get("completions"), "completions", "a list of completions")
    candidates = [
        _rated(_entry(one, f"completions[{i}]"), f"completions[{i}]", fields.has(row, "candidate_rewards"))
        for i, one in enumerate(completions)
    ]
    return {**_without(row, "completions"), "candidates": candidates}


def judged_summary(row: Columns) -> Columns:
    """A post and a summary with grades by axis; the overall one is the reward."""
    summary = _entry(row["summary"], "summary")
    axes = fields.named_numbers(summary, "axes")
    if "overall" not in axes:
        raise RowError("summary.axes: no overall, wanted {..., overall: a finite number}")
    given = {"completion": summary.get("text"), "reward": axes["overall"], "rewards": axes}
    return {**_without(row, "info", "summary"), "prompt": _post(row), **given}


def compared_summaries(row: Columns) -> Columns:
    """A post, two summaries, and the number of the one that was chosen."""
    summaries = fields.checked_list(row["summaries"], "summaries", "two summaries", 2)
    texts = [_entry(one, f"summaries[{i}]").get("text") for i, one in enumerate(summaries)]
    choice = row.get("choice")
    if isinstance(choice, bool) or choice not in (0, 1):
        raise RowError(f"choice: {fields.described(choice)}, wanted 0 or 1")
    return _pair(
        {**_without(row, "info", "summaries", "choice"), "prompt": _post(row)}, texts[choice], texts[1 - choice]
    )


def _turns(turn: object, place: str) -> list[Columns]:
    """The messages of one turn, with whatever else it holds."""
    if not isinstance(turn, Mapping):
        raise RowError(f'{place}: {fields.described(turn)}, wanted {{"from": ..., "value": ...}}')
    if "input" in turn and "output" in turn:
        pair = ({"role": "user", "content": turn["input"]}, {"role": "assistant", "content": turn["output"]})
        return [one for one in pair if one["content"] not in (None, "")]
    if "from" not in turn:
        return [turn]
    role, content = SPEAKERS.get(str(turn["from"]).lower(), turn["from"]), turn.get("value")
    return [{**_without(turn, "from", "value"), "role": role, "content": content}]


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
    info = _entry(row["info"], "info")
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


def _without(row: Columns, *names: str) -> dict[str, object]:
    return {name: value for name, value in row.items() if name not in names}


def _listed(row: Columns, names: Sequence[str]) -> str:
    """The first of `names` that has a value, else that is there, else the first."""
    return fields.first_of(row, names) or next((name for name in names if name in row), names[0])


def _bare(row: Columns, *needed: str, beside: Collection[str] = RESPONSES) -> bool:
    """Whether the row has all of the columns that are `needed` and none of those that it then has not."""
    return all(name in row for name in needed) and not any(name in row for name in beside)


def _entries(row: Columns, name: str, *keys: str) -> bool:
    """Whether a column is a list of mappings with `keys`."""
    values = row.get(name)
    return (
        isinstance(values, list)
        and bool(values)
        and all(isinstance(v, Mapping) for v in values[:1])
        and all(key in values[0] for key in keys)
    )


def _is_conversation(row: Columns) -> bool:
    name = _listed(row, ("conversations", "conversation"))
    return isinstance(row.get(name), list) and _bare(row, beside=("messages", "prompt", "instruction", "text"))


def _is_question(row: Columns) -> bool:
    answered = isinstance(row.get("answer"), str) or fields.first_of(row, RESPONSES) is not None
    return answered and isinstance(row.get("question"), str) and _bare(row, beside=(*ASKED, *ABOUT))


def _other_of(row: Columns) -> str:
    """Which of PKU's two ids decides."""
    name = _listed(row, BETTER)
    if name == "better":
        return "chosen is the response that `better` numbers"
    other = next((one for one in BETTER[1:] if one in row and one != name), None)
    return f"chosen is the response of {name}" + (
        f" (data.columns='{{better: {other}}}' takes the other)" if other else ""
    )


def _overall(row: Columns) -> str:
    if fields.has(row, "candidate_rewards"):
        return ""
    return "the reward is overall_score (data.columns='{candidate_rewards: completions.fine-grained_score}' is another)"


NOTHING: Callable[[Columns], str] = lambda row: ""  # noqa: E731
# no two fit one row but for the last, which take what is left
LAYOUTS: Mapping[str, Layout] = {
    "PKU-SafeRLHF": Layout(
        lambda row: _bare(row, "response_0", "response_1") and fields.first_of(row, BETTER) is not None,
        preferred_id,
        _other_of,
    ),
    "HelpSteer preference": Layout(
        lambda row: any(_bare(row, *names) for names in PAIRS_OF_HELPSTEER),
        preferred_strength,
        lambda row: "a strength below 0 prefers the first response, above 0 the second, 0 is a tie; margin is its size",
    ),
    "SHP": Layout(
        lambda row: _bare(row, "history", "human_ref_A", "human_ref_B", "labels"),
        votes,
        lambda row: "chosen is A where labels is 1; rewards of the two are ln(1 + votes)",
    ),
    "Nectar": Layout(
        lambda row: _bare(row, "prompt") and _entries(row, "answers", "answer", "rank"),
        ranks,
        lambda row: (
            "the reward of an answer is (K - rank) / (K - 1), K answers of one prompt, equal ranks in the middle"
        ),
    ),
    "UltraFeedback": Layout(
        lambda row: (
            _bare(row) and ("instruction" in row or "prompt" in row) and _entries(row, "completions", "response")
        ),
        rated_completions,
        _overall,
    ),
    "summarize_from_feedback axis": Layout(
        lambda row: isinstance(row.get("info"), Mapping) and isinstance(row.get("summary"), Mapping),
        judged_summary,
        lambda row: "the reward is the overall grade",
    ),
    "summarize_from_feedback comparisons": Layout(
        lambda row: isinstance(row.get("info"), Mapping) and isinstance(row.get("summaries"), list) and "choice" in row,
        compared_summaries,
        NOTHING,
    ),
    "conversations": Layout(_is_conversation, conversations, NOTHING),
    "question": Layout(
        _is_question,
        question,
        lambda row: "" if fields.first_of(row, RESPONSES) else "the completion is `answer`, which stays a column too",
    ),
    "instruction + context": Layout(
        lambda row: _bare(row, "instruction", "context", beside=("input",)) and isinstance(row["context"], str),
        lambda row: {**_without(row, "context"), "input": row.get("context")},
        lambda row: "the context stands in the prompt, below the instruction",
    ),
}
