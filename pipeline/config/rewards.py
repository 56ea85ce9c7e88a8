"""`rewards`: how rewards are read, servers and judges asked, and values brought to one scale."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from pipeline.config.sections import Count, NotNegative, Positive, Section, Whole
from pipeline.errors import did_you_mean

READ = ("auto", "conversation", "pair", "completion")  # by a classifier


def what_is_read(value: str | list[str]) -> str | list[str]:
    """`value`, what a classifier reads: a word of READ, a text with {completion}, or two of which one has it.

    Raises ValueError.
    """
    texts, wanted = ([value], 1) if isinstance(value, str) else (value, 2)
    if value in READ or (len(texts) == wanted and any("{completion}" in text for text in texts)):
        return value
    words = f"wanted {', '.join(READ)}, a text with {{completion}} in it, or two texts of which one has it"
    raise ValueError(f"{value!r}, {words}{did_you_mean(value, READ) if isinstance(value, str) else ''}")


def verdict_pattern(value: str) -> str:
    """`value`, which must be json:KEY or a regular expression with one group. Raises ValueError."""
    if value.startswith("json:") and value != "json:":
        return value
    try:
        groups = re.compile(value).groups
    except re.error as error:
        raise ValueError(f"{value!r} is no regular expression ({error}), wanted one with one group") from None
    if groups != 1:
        raise ValueError(f"{value!r} has {groups} groups, wanted one, around the verdict: make others (?:...)")
    return value


Reads = Annotated[str | list[str], AfterValidator(what_is_read)]


class HttpSettings(Section):
    """How requests are sent to the servers whose addresses `reward` names."""

    batch_size: Count
    concurrency: Annotated[int, Field(ge=1, le=256)]
    timeout: Positive
    retries: Whole
    backoff: NotNegative
    max_request_mb: Positive
    max_answer_mb: Positive


class Turn(Section):
    """A message of a judge's prompt."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str


class BudgetSettings(Section):
    """The most that a stage may spend on a judge, over all ranks; None: no limit."""

    requests: Count | None
    tokens: Count | None


class JudgeSettings(Section):
    """How a language model behind an OpenAI-compatible address is asked for a verdict, and how that is read."""

    model: str | None
    prompt: str | Annotated[list[Turn], Field(min_length=1)]
    parse: Annotated[str, AfterValidator(verdict_pattern)]
    scale: Annotated[list[float], Field(min_length=2, max_length=2)] | Annotated[dict[str, float], Field(min_length=1)]
    temperature: NotNegative | None
    max_tokens: Count
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"]
    attempts: Count
    on_failure: Literal["error", "skip"]
    key_variable: str | None
    budget: BudgetSettings

    @model_validator(mode="after")
    def sound(self) -> Self:
        texts = [self.prompt] if isinstance(self.prompt, str) else [turn.content for turn in self.prompt]
        if not any("{completion}" in text for text in texts):
            raise ValueError("prompt: no {completion} in it, wanted the text that is judged: put {completion} in it")
        if isinstance(self.scale, list) and self.scale[0] == self.scale[1]:
            raise ValueError(f"scale: {self.scale}, wanted two different numbers, the worst verdict and the best")
        return self


class Scale(Section):
    """What a reward's values are standardised by: (x - mean) / std."""

    mean: float
    std: Positive


Normalisation = Literal["auto", "none", "sigmoid", "standardise"]


class RewardSettings(Section):
    """How rewards given in `reward` are read; `reward` itself is a name, a path, or a mapping to weights."""

    normalise: Normalisation | dict[str, Normalisation | Scale]
    batch_size: Count
    max_length: Count
    workers: Whole
    reads: Reads | dict[str, Reads]
    http: HttpSettings
    judge: JudgeSettings

    @field_validator("normalise", mode="before")
    @classmethod
    def whole_scales(cls, value: object) -> object:
        for name, one in value.items() if isinstance(value, dict) else ():
            if isinstance(one, dict) and {*one} != {"mean", "std"}:
                raise ValueError(f"{name}: {one}, wanted a word or both numbers, as in {{mean: 0.31, std: 0.08}}")
        return value
