"""`generation`: how responses are written, and by whom."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from pipeline.config.reward_spec import web_address
from pipeline.config.sections import Count, Fraction, NotNegative, Positive, Section, Whole


def engine_name(value: str) -> str:
    """`value`, which must name what generates: one of ours, or the address of a server. Raises ValueError."""
    if "://" in value:
        web_address(value, "the variable that generation.server.key_variable names")
    elif value != "generate":
        raise ValueError(f"{value!r}, wanted generate or the address of a server, http://HOST:PORT/v1")
    return value.rstrip("/")


class ServerSettings(Section):
    """How a server that writes responses is asked: one request for each response."""

    key_variable: str | None
    concurrency: Annotated[int, Field(ge=1, le=256)]
    timeout: Positive
    retries: Whole
    backoff: NotNegative
    max_answer_mb: Positive


class GenerationSettings(Section):
    engine: Annotated[str, AfterValidator(engine_name)]
    served_model: str | dict[str, str] | None
    server: ServerSettings
    gather: Literal["auto", "whole", "layers"]
    max_new_tokens: Count
    min_new_tokens: Whole
    do_sample: bool
    temperature: Positive
    temperatures: Annotated[list[Positive], Field(min_length=1)] | None
    top_p: Fraction
    top_k: Whole
    num_beams: Count
    length_penalty: float
    early_stopping: bool
    no_repeat_ngram_size: Whole
    repetition_penalty: Positive
    num_return_sequences: Count
    batch_size: Count

    @model_validator(mode="after")
    def one_way_of_decoding(self) -> GenerationSettings:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}, wanted at most max_new_tokens, {self.max_new_tokens}"
            )
        if self.temperatures is not None and (not self.do_sample or self.num_beams > 1):
            raise ValueError(
                "temperatures are given, wanted plain sampling to use them: set do_sample=true and num_beams=1, "
                "or generation.temperatures=null"
            )
        return self

    @model_validator(mode="after")
    def one_engine(self) -> GenerationSettings:
        plain = {"num_beams": 1, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "repetition_penalty": 1.0}
        other = [f"{name} is {getattr(self, name)}" for name, value in plain.items() if getattr(self, name) != value]
        if self.by_server and other:
            raise ValueError(
                f"{other[0]} with engine {self.engine}, wanted plain sampling or greedy decoding: set "
                "generation.engine=generate"
            )
        return self

    @property
    def by_server(self) -> bool:
        """Whether a server writes the responses."""
        return "://" in self.engine

    def one_model(self) -> None:
        """Raises ValueError where servers of several policies are named."""
        if isinstance(self.served_model, dict):
            raise ValueError(
                f"generation.served_model: {self.served_model}, wanted the name of one model, for there is one policy"
            )
