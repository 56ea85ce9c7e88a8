"""Rows as public data sets publish them, under our names: before the format is recognised, and in the file's order.

Each layout is known by columns that only it has. Sources: the cards of the sets that LAYOUTS names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from pipeline.data import feedback, fields
from pipeline.data.fields import Columns, RowError, named, without
from pipeline.data.transcripts import ASSISTANT

SPEAKERS = {  # of ShareGPT's turns; other names are roles as they are
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
RESPONSES = ("completion", "response", "output", "chosen", "candidates")
ASKED = ("prompt", "instruction", "messages", "text", "sentence", "article", "document", "dialogue")
QUESTION = ("question", "query", "input")  # what is asked, where there is no `prompt` and no `instruction`
ABOUT = ("choices", "options", "passage", "paragraph")  # what a question is not complete without
HIDDEN = {  # columns that must not be read anew where they travel with rows of ours
    *("response_0", "response_1", "response_2", "response1", "response2"),
    *(*feedback.SEVERAL, *feedback.SCORES, "human_ref_A", "human_ref_B"),
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
    name = named(row, ("conversations", "conversation"))
    turns = fields.checked_list(row.get(name), name, "a list of turns")
    messages = [one for i, turn in enumerate(turns) for one in _turns(turn, f"{name}[{i}]")]
    rest = without(row, name, "system")
    if fields.optional_text(row, "system"):
        messages = [{"role": "system", "content": row["system"]}, *messages]
    if not (isinstance(row.get("chosen"), Mapping) and isinstance(row.get("rejected"), Mapping)):
        return {**rest, "messages": messages}
    return {**rest, "prompt": messages} | {side: _turns(row[side], side) for side in ("chosen", "rejected")}


def question(row: Columns) -> Columns:
    """A question, perhaps with a system's message or a text that it is about; an `answer` also stays what it is."""
    name = named(row, QUESTION)
    asked = without(row, name, "system", "system_prompt", "context", "output")
    system = fields.optional_text(row, named(row, ("system", "system_prompt")))
    text, about = fields.text(row, name), fields.optional_text(row, "context")
    text = f"{text}\n{about}" if about else text
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    given = fields.first_of(row, RESPONSES)
    answer = {"completion": row.get(given or "answer")} if given in (None, "output") else {}
    return {**asked, "prompt": messages if system else text, **answer}


def _turns(turn: object, place: str) -> list[Columns]:
    """The messages of one turn, with whatever else it holds."""
    if not isinstance(turn, Mapping):
        raise RowError(f'{place}: {fields.described(turn)}, wanted {{"from": ..., "value": ...}}')
    turn = {name: value for name, value in turn.items() if value is not None}  # tables give every turn all keys
    if "input" in turn or "output" in turn:
        sides = (("user", turn.get("input")), ("assistant", turn.get("output")))
        return [{"role": role, "content": content} for role, content in sides if content not in (None, "")]
    if "from" not in turn:
        return [turn]
    role, content = SPEAKERS.get(str(turn["from"]).lower(), turn["from"]), turn.get("value")
    return [{**without(turn, "from", "value"), "role": role, "content": content}]


def _bare(row: Columns, *needed: str, beside: Collection[str] = RESPONSES) -> bool:
    """Whether the row has all of the columns that are `needed` and none of those that it then has not."""
    return all(name in row for name in needed) and not any(name in row for name in beside)


def _entries(row: Columns, name: str, *keys: str) -> bool:
    """Whether a column is a list of mappings, of which the first has `keys`."""
    values = row.get(name)
    first = values[0] if isinstance(values, list) and values else None
    return isinstance(first, Mapping) and all(key in first for key in keys)


def _are_lists(row: Columns, names: Sequence[str], kind: type) -> bool:
    """Whether the first of `names` that is there is a list of nothing but `kind`."""
    values = row.get(named(row, names))
    return isinstance(values, list) and bool(values) and all(isinstance(value, kind) for value in values)


def _is_conversation(row: Columns) -> bool:
    name = named(row, ("conversations", "conversation"))
    return isinstance(row.get(name), list) and _bare(row, beside=("messages", "prompt", "instruction", "text"))


def _is_question(row: Columns) -> bool:
    """Whether a question has an answer, or two that do not hold it themselves, as chats and transcripts do."""
    answered = isinstance(row.get("answer"), str) or fields.first_of(row, RESPONSES) is not None
    own = isinstance(row.get("chosen"), list) or ASSISTANT in str(row.get("chosen"))
    others = (*ASKED, *ABOUT, "candidates")
    return answered and not own and isinstance(row.get(named(row, QUESTION)), str) and _bare(row, beside=others)


def _other_of(row: Columns) -> str:
    """Which of PKU's two ids decides."""
    name = named(row, feedback.BETTER)
    if name == "better":
        return "chosen is the response that `better` numbers"
    other = next((one for one in feedback.BETTER[1:] if one in row and one != name), None)
    choice = f" (data.columns='{{better: {other}}}' takes the other)" if other else ""
    return f"chosen is the response of {name}{choice}"


def _overall(row: Columns) -> str:
    if fields.has(row, "candidate_rewards"):
        return ""
    return "the reward is overall_score (data.columns='{candidate_rewards: completions.fine-grained_score}' is another)"


NOTHING: Callable[[Columns], str] = lambda row: ""  # noqa: E731
# no two fit one row but for the last, which take what is left
LAYOUTS: Mapping[str, Layout] = {
    "PKU-SafeRLHF": Layout(
        lambda row: _bare(row, "response_0", "response_1") and fields.first_of(row, feedback.BETTER) is not None,
        feedback.preferred_id,
        _other_of,
    ),
    "HelpSteer preference": Layout(
        lambda row: any(_bare(row, *names) for names in feedback.PAIRS_OF_HELPSTEER),
        feedback.preferred_strength,
        lambda row: "a strength below 0 prefers the first response, above 0 the second, 0 is a tie; margin is its size",
    ),
    "SHP": Layout(
        lambda row: _bare(row, "history", "human_ref_A", "human_ref_B", "labels"),
        feedback.votes,
        lambda row: "chosen is A where labels is 1; rewards of the two are ln(1 + votes)",
    ),
    "Nectar": Layout(
        lambda row: _bare(row, "prompt") and _entries(row, "answers", "answer", "rank"),
        feedback.ranks,
        lambda row: (
            "the reward of an answer is (K - rank) / (K - 1), K answers of one prompt, equal ranks in the middle"
        ),
    ),
    "UltraFeedback": Layout(
        lambda row: (
            _bare(row) and ("instruction" in row or "prompt" in row) and _entries(row, "completions", "response")
        ),
        feedback.rated_completions,
        _overall,
    ),
    "responses + scores": Layout(
        lambda row: (
            _bare(row) and _are_lists(row, feedback.SEVERAL, str) and _are_lists(row, feedback.SCORES, int | float)
        ),
        feedback.scored_responses,
        lambda row: "each response has the reward in its place of the other list",
    ),
    "summarize_from_feedback axis": Layout(
        lambda row: isinstance(row.get("info"), Mapping) and isinstance(row.get("summary"), Mapping),
        feedback.judged_summary,
        lambda row: "the reward is the overall grade",
    ),
    "summarize_from_feedback comparisons": Layout(
        lambda row: isinstance(row.get("info"), Mapping) and isinstance(row.get("summaries"), list) and "choice" in row,
        feedback.compared_summaries,
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
        lambda row: {**without(row, "context"), "input": row.get("context")},
        lambda row: "the context stands in the prompt, below the instruction",
    ),
}
