"""How many responses on-policy RL samples for each prompt; and all rules about which of its settings go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config import sections
from pipeline.config.generation import GenerationSettings
from pipeline.config.sections import Count, Fraction, Positive, Section, Whole


class SamplerSettings(Section):
    """How many responses on-policy RL samples for each prompt, and at which temperature."""

    mode: Literal["static", "dynamic", "drop", "drop_fixed"]
    k: Count
    k_min: Whole
    k_max: Count
    capability: Literal["entropy", "reward", "combined", "confidence"]
    entropy_weight: Fraction
    entropy_range: Literal["full", "recent"] | Annotated[list[float], Field(min_length=2, max_length=2)]
    reward_range: Annotated[list[float], Field(min_length=2, max_length=2)] | None
    history: Count
    discount: Fraction
    temperature_min: Positive
    temperature_max: Positive
    temperature_by: Literal["constant", "capability", "incapability"]
    budget: Count | None
    skip_above: Fraction | None
    recheck: Count
    probe: Count | None
    drop_share: Annotated[float, Field(gt=0, lt=1)]

    @model_validator(mode="after")
    def one_meaning(self) -> SamplerSettings:
        if self.k_min > self.k_max:
            raise ValueError(f"k_min is {self.k_min}, wanted at most k_max, {self.k_max}")
        if self.temperature_min > self.temperature_max:
            raise ValueError(f"temperature_min is {self.temperature_min}, wanted at most {self.temperature_max}")
        for name, given in (("reward_range", self.reward_range), ("entropy_range", self.entropy_range)):
            if isinstance(given, list) and not given[0] < given[1]:
                raise ValueError(f"{name} is {given}, wanted a low and a higher number")
        if (self.k_min == 0) != (self.skip_above is not None):
            raise ValueError(
                f"k_min is {self.k_min} and skip_above is {self.skip_above}, wanted both or neither: "
                "sampler.k_min=0 lets prompts be left out, skip_above says which"
            )
        if self.probe is not None and self.capability in ("reward", "combined"):
            raise ValueError(
                f"probe is {self.probe} with capability {self.capability}, wanted one that does not use rewards "
                "(entropy): probes whose rewards decide how many more there are would bias their own baseline"
            )
        return self

    @model_validator(mode="after")
    def fits_the_mode(self) -> SamplerSettings:
        if self.mode != "dynamic":
            for name in ("budget", "skip_above", "probe"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(f"{name} is {value} with mode {self.mode}, wanted null there, or mode dynamic")
            return self
        if not max(1, self.k_min) <= self.k <= self.k_max:
            raise ValueError(
                f"k is {self.k}, wanted a number from {max(1, self.k_min)} (k_min) to {self.k_max} (k_max)"
            )
        if self.probe is not None and not 2 <= self.probe <= self.k_max:
            raise ValueError(f"probe is {self.probe}, wanted 2 to k_max, {self.k_max}: each is weighed by the others")
        if self.probe is not None and self.budget is not None:
            raise ValueError(
                f"probe is {self.probe} and budget is {self.budget}, wanted one of them null: what is left over is not "
                "known before the probes are"
            )
        return self

    def check_with(
        self,
        algorithm: Mapping[str, Any],
        generation: GenerationSettings,
        train: sections.TrainSettings,
        data: sections.DataSettings,
    ) -> None:
        """Raise ValueError where these do not go with the other sections; `algorithm` holds algorithms/online.py's."""
        if generation.by_server and self.mode == "drop":
            raise ValueError(
                f"sampler.mode is drop with generation.engine={generation.engine}, wanted another, for it scores what "
                "comes after the end of a response, which no server writes: set sampler.mode=drop_fixed, or "
                "generation.engine=generate"
            )
        self._check_comparison(algorithm)
        if self.probe is not None:
            self._check_probe(algorithm)
        if self.mode in ("drop", "drop_fixed"):
            self._check_drop(generation.batch_size, train.batch_size)
        answer = generation.max_new_tokens
        if algorithm.get("sft_weight"):  # references are learned too
            answer = max(answer, data.max_response_length)
        longest = data.max_prompt_length + answer
        if train.max_tokens is not None and longest > train.max_tokens:
            raise ValueError(
                f"train.max_tokens: {train.max_tokens}, but a prompt with its response may have {longest} tokens: "
                "raise it, or lower data.max_prompt_length, generation.max_new_tokens or, with sft_weight, "
                "data.max_response_length"
            )

    @property
    def fewest(self) -> int:
        """The fewest responses of a prompt that is not left out."""
        return {"static": self.k, "dynamic": max(1, self.k_min)}.get(self.mode, 1)

    @property
    def most(self) -> int:
        return {"static": self.k, "dynamic": self.k_max}.get(self.mode, 1)

    @property
    def tempered(self) -> bool:
        """Whether any response may be drawn at another temperature than 1."""
        return (self.temperature_min, self.temperature_max) != (1.0, 1.0)

    def _check_comparison(self, algorithm: Mapping[str, Any]) -> None:
        """Enough responses to a prompt, where these are compared with one another."""
        objective, baseline = algorithm.get("objective"), algorithm.get("baseline")
        found = f"sampler: {self.fewest} response(s) to a prompt at least"
        if self.fewest < 2 and objective == "mrt":
            raise ValueError(
                f"{found} with objective: mrt, wanted 2 or more, which are compared with one another: raise "
                f"sampler.{'k' if self.mode == 'static' else 'k_min'}"
            )
        if self.fewest < 2 and objective == "reinforce" and baseline in ("mean", "group"):
            raise ValueError(
                f"{found} with baseline: {baseline}, wanted 2 or more, or one is compared with itself: set "
                "algorithm.settings.baseline=queue"
            )

    def _check_probe(self, algorithm: Mapping[str, Any]) -> None:
        """Only where each response is compared with others that it does not depend on are probes without bias."""
        found = "mrt" if algorithm.get("objective") == "mrt" else algorithm.get("baseline")
        if found in ("mrt", "mean", "group"):
            raise ValueError(
                f"sampler.probe: {self.probe} with {found}, where the number of responses, which the probes decide, "
                "enters what they are worth: set algorithm.settings.baseline=leave_one_out, or sampler.probe=null"
            )

    def _check_drop(self, decoded: int, prompts: int) -> None:
        """Something stays of every batch of `decoded` prompts (drop), or of all `prompts` of a step (drop_fixed)."""
        by_batch = self.mode == "drop"
        least = (prompts % decoded or min(decoded, prompts)) if by_batch else prompts
        if round(self.drop_share * least, 9) > least - 1:  # rounded up, as algorithms/capability.py does, it is all
            raise ValueError(
                f"sampler.drop_share: {self.drop_share} of a batch of {least} drops all of it, wanted some kept: "
                f"lower it, or raise {'generation' if by_batch else 'train'}.batch_size"
            )
