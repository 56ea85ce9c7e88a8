"""Rewards of many responses: each rank scores its share, and all ranks get every score."""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.config.reward_spec import ROWS
from pipeline.config.rewards import Scale
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.records import Answer, Chat, Example, Message, Response, Scores, text_of
from pipeline.rewards import own_rewards
from pipeline.rewards.rewards import Rewards
from pipeline.trainer.group import Ranks
from reward_models._trl import TrlFunction

AT_ONCE = 16_384  # texts that a rank asks of a reward in one call
SCALES = "normalise.json"  # of a stage's directory: what its rewards are standardised by
NO_SPREAD = 1e-9  # a standard deviation that is rounding alone, as a share of the values' size

logger = logging.getLogger("tiffin")


@dataclass(frozen=True)
class TextsOfRows(Sequence[str]):
    """A text of each row, read when it is asked for."""

    rows: Sequence[Example]
    text: Callable[[Example], str]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        return self.text(self.rows[place])

    def __iter__(self) -> Iterator[str]:
        return map(self.text, self.rows)


def score_texts(
    ranks: Ranks,
    rewards: Rewards,
    examples: Sequence[Example],
    completions: Sequence[Answer],
    ids: Sequence[Sequence[int]] | None = None,
) -> Scores:
    """Score one new completion per example; ranks share the work and all get the whole result.

    `ids` are the completions' own, where a policy wrote them. Raises UserError where a reward fails, by the checks of
    `rewards`; on every rank, wherever it failed.
    """
    raw = raw_scores(ranks, rewards, examples, completions, ids)
    return rewards.weighed(raw, [text_of(one) for one in completions], [example.id for example in examples])


def score_logged(
    ranks: Ranks,
    rewards: Rewards,
    rows: Sequence[Example],
    completions: Sequence[Answer] | None,
    train: int,
    directory: Path | None,
) -> Scores:
    """Score the responses that rows hold, as `score_texts`, with the rewards that the rows bring where these are named.

    `completions`: the responses, where they are other ones than the rows' `completion`; then rows are read as needed.
    The first `train` of them say what is standardised by, if nothing did so far. Raises UserError for rows that lack a
    reward which is named.
    """
    raw = raw_scores(ranks, rewards, rows, completions)
    raw |= {one.name: own_rewards.values(one.own, rows, rewards.models) for one in rewards.own}
    say_what_is_meant(rewards, rows)
    settle(ranks, rewards, {name: values[:train] for name, values in raw.items()}, directory)
    texts = TextsOfRows(rows, lambda row: text_of(row.completion))
    if completions is not None:
        texts = [text_of(one) for one in completions]
    return rewards.weighed(raw, texts, TextsOfRows(rows, lambda row: row.id))


def raw_scores(
    ranks: Ranks,
    rewards: Rewards,
    examples: Sequence[Example],
    completions: Sequence[Answer] | None = None,
    ids: Sequence[Sequence[int]] | None = None,
) -> dict[str, list[float | None]]:
    """As `score_texts`, what each function says, by reward; of the examples' own completions where none are given.

    A rank asks for AT_ONCE texts at a time, so that few examples are in memory.
    """
    mine = range(ranks.rank, len(examples), ranks.world)
    found = {one.name: torch.zeros(len(examples), dtype=torch.float64) for one in rewards.functions}

    def judge() -> None:
        for start in range(0, max(1, len(mine)), AT_ONCE):
            places = mine[start : start + AT_ONCE]
            own = [examples[i] for i in places]
            answers = [one.completion for one in own] if completions is None else [completions[i] for i in places]
            values = _judged(rewards, own, answers, None if ids is None else [ids[i] for i in places])
            for name, some in values.items():
                numbers = [math.nan if value is None else value for value in some]
                found[name][places.start : places.stop : places.step] = torch.tensor(numbers, dtype=torch.float64)

    ranks.agreed(judge)
    whole = {name: ranks.all_sum(values) for name, values in found.items()}  # one rank has each
    return {name: [None if math.isnan(x) else x for x in values.tolist()] for name, values in whole.items()}


def _judged(
    rewards: Rewards,
    examples: Sequence[Example],
    answers: Sequence[Answer],
    ids: Sequence[Sequence[int]] | None,
) -> dict[str, list[float | None]]:
    """What each function says of these, by reward."""
    columns = reward_columns(examples, ids)
    if any(isinstance(answer, Message) for answer in answers):
        columns["raw_completion"] = [[one.given()] if isinstance(one, Message) else None for one in answers]
    prompts, texts = [plain_prompt(example) for example in examples], [text_of(answer) for answer in answers]
    return rewards.begin_raw(prompts, texts, columns)()


def settle(ranks: Ranks, rewards: Rewards, raw: Mapping[str, Sequence[float | None]], directory: Path | None) -> None:
    """Fix what rewards are standardised by, once: of `raw`, the values of training rows, or as noted in `directory`.

    The same on every rank, and in one that goes on from a checkpoint. Raises UserError where all values are equal.
    """
    if not (names := rewards.unsettled):
        return

    def scales() -> dict[str, dict[str, float]]:
        file = directory / SCALES
        if not file.is_file():
            write_json(file, {name: scale_of(name, raw[name]).model_dump() for name in names})
        return json.loads(file.read_text("utf-8"))

    found = {name: Scale(**numbers) for name, numbers in ranks.on_main(scales).items()}
    rewards.settle(found)
    words = ", ".join(f"{name}: {{mean: {one.mean!r}, std: {one.std!r}}}" for name, one in found.items())
    logger.info(f"rewards: standardised by the training rows; elsewhere the same is rewards.normalise='{{{words}}}'")


def scale_of(name: str, values: Sequence[float | None]) -> Scale:
    """Mean and standard deviation (of the population) of those judged. Raises UserError where there is no spread."""
    judged = [value for value in values if value is not None]
    spread = statistics.pstdev(judged) if judged else 0.0
    if spread <= NO_SPREAD * max(map(abs, judged), default=0.0):
        found = f"{judged[0]:.6g} on each of {len(judged):,} training rows" if judged else "no training row is judged"
        raise UserError(
            f"rewards.normalise: standardise, but {name}: {found}, wanted values that differ: leave this reward out, "
            f"or set rewards.normalise='{{{name}: none}}'"
        )
    return Scale(mean=statistics.fmean(judged), std=spread)


def say_what_is_meant(rewards: Rewards, rows: Sequence[Example]) -> None:
    """One line for each reward whose name a reward of the rows has too."""
    for name in own_rewards.names(rows):
        if any(one.name == name and one.weight for one in rewards.functions):
            logger.info(f"reward {name}: scored anew; reward={ROWS}{name} would be that of the rows")


def reward_columns(examples: Sequence[Example], ids: Sequence[Sequence[int]] | None = None) -> dict[str, list[Any]]:
    """What rewards are called with beside prompts and completions, one entry per example: the data's columns, and ours.

    A reward may change what it is given: the examples' own values are copied.
    """
    names = dict.fromkeys(name for example in examples for name in example.columns)
    columns = {name: [_own(example.columns.get(name)) for example in examples] for name in names}
    columns |= {
        "id": [example.id for example in examples],
        "source": [example.source for example in examples],
        "references": [list(example.references) for example in examples],
        "raw_prompt": [raw_prompt(example) for example in examples],
    }
    chats = [example.prompt if isinstance(example.prompt, Chat) else Chat(()) for example in examples]
    if any(chats):  # as TRL names them
        columns["tools"] = [json.loads(one.tools) if one.tools else None for one in chats]
        columns["chat_template_kwargs"] = [json.loads(one.arguments) if one.arguments else None for one in chats]
    return columns if ids is None else columns | {"completion_ids": [list(one) for one in ids]}


def _own(value: Any) -> Any:
    return deepcopy(value) if isinstance(value, list | dict) else value


def tell_of_calls(answers: Iterable[Answer]) -> None:
    """One line where logged answers are more than a text."""
    count = calling = 0
    for answer in answers:
        count, calling = count + 1, calling + isinstance(answer, Message)
    if calling:
        logger.info(
            f"rewards: {calling:,} of {count:,} answers call tools or think: functions read their text and the "
            "calls as JSON, reward models what the chat template writes"
        )


def warn_of_equals(rewards: Rewards, rows: Sequence[Example]) -> None:
    """One line where a reward compares, and rows whose completions are to be scored hold them as references."""
    equal = sum(text_of(row.completion) in row.references for row in rows)
    compares = [isinstance(one.function, TrlFunction) and "references" in one.function.named for one in rewards.rewards]
    if equal and any(compares):
        logger.warning(
            f"rewards: {equal:,} of {len(rows):,} completions stand among their own references: equal texts score "
            "highest, whatever they are worth"
        )


def score_responses(ranks: Ranks, rewards: Rewards, responses: Sequence[Response]) -> Scores:
    """Score decoded responses."""
    ids = [r.response_ids for r in responses]
    return score_texts(ranks, rewards, [r.example for r in responses], [r.text for r in responses], ids)


def try_rewards(ranks: Ranks, rewards: Rewards, row: Example, written: bool) -> None:
    """Call every reward with one row, on all ranks, so that one that fails does so before a policy is loaded.

    The text is one of the row's own, else its prompt. `written`: the stage will judge responses of a policy, which have
    ids; one is made up. Raises UserError, with the row's id, where a reward fails.
    """
    texts = (row.completion, *row.references, *row.candidates, row.chosen, plain_prompt(row))
    text = text_of(next(filter(None, texts), ""))
    columns = reward_columns([row], [[0]] if written else None)

    def tried() -> None:
        try:
            values = rewards.begin_raw([plain_prompt(row)], [text], columns)()
            if not rewards.unsettled:
                rewards.weighed(values, [text], [row.id])
        except UserError as error:
            raise UserError(f"{error} (tried on row {row.id} before anything else)") from error

    ranks.agreed(tried)
    asked = [one.name for one in rewards.rewards if isinstance(one.function, TrlFunction) and one.function.messages]
    if asked and not isinstance(row.prompt, str):
        how = "prompts and completions of chats as messages, as in TRL"
        logger.info(f'reward {", ".join(asked)}: given {how} (CHATS = "text" in the file makes them text)')


def raw_prompt(example: Example) -> str | list[dict[str, Any]]:
    """The prompt as JSON has it: the row's own text, or a chat's messages."""
    return example.prompt if isinstance(example.prompt, str) else [turn.given() for turn in example.prompt]


def plain_prompt(example: Example) -> str:
    """The prompt as text: the row's own, or "role: content" paragraphs of a chat."""
    if isinstance(example.prompt, str):
        return example.prompt
    return "\n\n".join(f"{turn.role}: {turn.content}" for turn in example.prompt)
