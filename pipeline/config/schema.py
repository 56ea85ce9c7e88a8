"""Every key a user can set, with its type and range; the defaults live in `stages/*.yaml`, nowhere else."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipeline.config import sections
from pipeline.config.generation import GenerationSettings
from pipeline.config.reward_spec import sound_addresses
from pipeline.config.rewards import RewardSettings
from pipeline.config.sampler import SamplerSettings
from pipeline.config.sections import Count, FolderName, Fraction, Positive, ResultName, Section, Seed, Split, Whole


class AlgorithmSettings(Section):
    """The file in `pipeline/algorithms/` and its own settings, which that file checks."""

    file: str
    settings: dict[str, Any]


class Common(Section):
    """What every stage has."""

    run: FolderName
    name: ResultName | None
    runs_dir: str
    seed: Seed
    launch: sections.LaunchSettings


class WithModel(Common):
    model: sections.ModelSettings
    template: sections.TemplateSettings
    data: sections.DataSettings


class Training(WithModel):
    algorithm: AlgorithmSettings
    train: sections.TrainSettings
    optimizer: sections.OptimizerSettings
    eval: sections.EvalSettings


class Masking(Section):
    """Which tokens of a response the model sees as [MASK] where it reads its own response so far."""

    rate: Fraction
    span: Literal["token", "word", "whole_word"]
    after_punctuation: bool
    exact: bool
    plain: Fraction


class SftStage(Training):
    train_on: Literal["auto", "last", "all"]
    masking: Masking
    generation: GenerationSettings

    @model_validator(mode="after")
    def speaks_itself(self) -> SftStage:
        if self.generation.by_server:
            raise ValueError(
                f"generation.engine: {self.generation.engine}, but stage=sft hands no server the weights that it "
                "changes: set generation.engine=generate; a server writes for stage=rl, generate and evaluate"
            )
        return self


class RewardStage(Training):
    name: ResultName
    start_from: Literal["sft", "model"]


class RatioTolerance(Section):
    """How far policy and reference may differ before the first step, by precision; mean nats per token."""

    fp32: Positive
    bf16: Positive
    fp16: Positive


RewardSpec = Annotated[str | dict[str, float] | None, BeforeValidator(sound_addresses)]


class RlStage(Training):
    """What all algorithms of stage=rl have; the records below add what one kind of them reads."""

    algo: str
    start_from: Literal["sft", "model"]
    scored: str | None
    reward: RewardSpec
    rewards: RewardSettings
    generation: GenerationSettings

    @model_validator(mode="after")
    def one_policy(self) -> RlStage:
        self.generation.one_model()
        return self

    def last_without_speaking(self) -> None:
        """Of methods whose weights only the reward of fresh responses can choose. Raises ValueError where there are
        none to choose by."""
        if not self.eval.generate and self.train.keep == "best":
            raise ValueError(
                f"eval.generate is false, but only the reward of fresh responses chooses the best weights of "
                f"algo={self.algo}: set train.keep=last, or eval.generate=true"
            )


class RlOffline(RlStage):
    """Of an algorithm that learns from logged responses."""

    rows: Literal["all", "chosen", "best_half", "worst_half", "best"]
    best: sections.BestRows
    shuffle_rewards: bool
    sampling: Literal["priority", "positive", "all"]
    scale_steps: bool

    @model_validator(mode="after")
    def draws_by_weights(self) -> RlOffline:
        if self.sampling == "priority" and self.algorithm.settings.get("weight") == "signed":
            raise ValueError(
                f"sampling is priority, but weights of algo={self.algo} may be negative, and no row is drawn so often: "
                "wanted all, or positive, which leaves such rows out"
            )
        if self.sampling != "all" and self.algorithm.file == "regression":
            raise ValueError(f"sampling is {self.sampling}, but algo={self.algo} weighs no row, wanted all")
        return self


class RlRatio(RlOffline):
    """Of one that compares the policy with the start model, by a ratio or a KL term."""

    ratio_tolerance: RatioTolerance


class RlAdvantage(RlOffline):
    """Of one that weighs them by their advantage, which takes a value of every prompt."""

    value: sections.ValueSettings


class RlAdvantageRatio(RlAdvantage, RlRatio):
    """Of one that does both."""


class RlSamples(RlRatio):
    """Of one that compares rewards with those of several responses of the start model to the same prompt."""

    reference_samples: sections.ReferenceSamples


class RlPairs(RlStage):
    """Of an algorithm that learns from preference pairs."""

    shuffle_rewards: bool
    ratio_tolerance: RatioTolerance


class RlScored(RlStage):
    """Of an algorithm that learns from rows with labels, or from groups of scored rows, against the start model."""

    shuffle_rewards: bool
    ratio_tolerance: RatioTolerance


class RlMasked(RlStage):
    """Of an algorithm that masks tokens of static responses and samples others in their places."""

    shuffle_rewards: bool
    static: Literal["worst", "best", "random", "reference"]
    masking: Masking

    @model_validator(mode="after")
    def something_chooses(self) -> RlMasked:
        self.last_without_speaking()
        return self


class RlPolicy(RlStage):
    """Of an algorithm that learns from responses it samples from the policy."""

    sampler: SamplerSettings

    @model_validator(mode="after")
    def sampler_goes_with_the_rest(self) -> RlPolicy:
        self.sampler.check_with(self.algorithm.settings, self.generation, self.train, self.data)
        self.last_without_speaking()
        return self


COMPARING = ("sequence", "token", "mean", "tapered")  # ratios to the start model, of algorithms.offline
RL_KINDS = {  # by RESPONSES
    "data": RlOffline,
    "pairs": RlPairs,
    "labels": RlScored,
    "groups": RlScored,
    "masked data": RlMasked,
    "policy": RlPolicy,
}


def rl_record(responses: str, settings: Mapping[str, Any]) -> type[RlStage]:
    """The settings of stage=rl with an algorithm of these RESPONSES and these settings of its own."""
    if responses != "data":
        return RL_KINDS[responses]
    target, weight = settings.get("target"), settings.get("weight")
    if target is not None:  # a regression
        return RlAdvantageRatio if target == "advantage" else RlSamples
    compares = settings.get("ratio") in COMPARING or settings.get("kl_form", "none") != "none"
    if weight in ("advantage", "exponential", "signed") and settings.get("baseline") == "value":
        return RlAdvantageRatio if compares else RlAdvantage
    return RlRatio if compares else RlOffline


class ScoreStage(WithModel):
    of: Literal["data", "generate"]
    splits: Annotated[list[Split], Field(min_length=1)]
    reward: RewardSpec
    rewards: RewardSettings


class AuditStage(Common):
    data: sections.DataSettings
    reward: RewardSpec


class GenerateStage(WithModel):
    policy: str | None
    splits: Annotated[list[Split], Field(min_length=1)]
    max_rows: Count | None
    train: sections.TrainSettings
    reward: RewardSpec
    rewards: RewardSettings
    generation: GenerationSettings

    @model_validator(mode="after")
    def one_policy(self) -> GenerateStage:
        self.generation.one_model()
        return self


def shard_size(given: str | int) -> int:
    """Bytes, given as a number or as 5GB (10^9) or 5GiB (2^30). Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(i?)B)?", str(given))
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2] or " ")) if found else 0
    if size < 1:
        raise ValueError(f"{given!r}, wanted bytes as a number, or as in 5GB or 500MB")
    return size


def hub_name(given: str) -> str:
    """`given`, which must name one repository of an owner. Raises ValueError."""
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", given) is None:
        raise ValueError(f"{given!r}, wanted OWNER/NAME")
    return given


class ExportStage(Common):
    model: sections.ModelSettings
    policy: str | None
    to: str | None
    merge: bool
    dtype: Literal["bfloat16", "float16", "float32"] | None
    max_shard_size: Annotated[str | int, AfterValidator(shard_size)]
    push_to: Annotated[str, AfterValidator(hub_name)] | None
    private: bool


class EvaluateStage(WithModel):
    policies: Annotated[dict[str, str], Field(min_length=1)] | None
    split: Split
    max_rows: Count
    max_logged: Count
    judge_samples: bool
    num_samples: Whole
    train: sections.TrainSettings
    reward: RewardSpec
    monitors: Annotated[list[str] | dict[str, str], BeforeValidator(sound_addresses)]
    rewards: RewardSettings
    generation: GenerationSettings


class CompareStage(Common):
    """Methods side by side over seeds; `rl`, `evaluate` and each of `variants` hold settings of those stages."""

    algos: str | list[str]
    variants: dict[str, dict[str, Any]]
    seeds: Whole | str | list[Whole]
    share_before: bool
    jobs: Count
    rl: dict[str, Any]
    evaluate: dict[str, Any]


class ReportStage(Common):
    pass


def number_of_weights(value: object) -> object:
    """8e9 for "8B", 135e6 for "135M"; another number as it is. Raises ValueError where it is of no model's size."""
    matched = re.fullmatch(r"([0-9]+\.?[0-9]*) ?([MBT])", value.upper()) if isinstance(value, str) else None
    found = value if matched is None else float(matched[1]) * {"M": 1e6, "B": 1e9, "T": 1e12}[matched[2]]
    if found is not None and not (isinstance(found, int | float) and 1e6 <= found < math.inf):
        raise ValueError(f"{value!r}, wanted the number of weights, a million or more: 8B, 135M or 8e9")
    return found


class PlanStage(Training):
    parameters: Annotated[Positive | None, BeforeValidator(number_of_weights)]
    gpu_memory_gb: Positive | None

    @model_validator(mode="after")
    def one_size(self) -> PlanStage:
        if self.parameters is not None and self.model.path is not None:
            raise ValueError(f"both model={self.model.path} and parameters are given, wanted one of them")
        return self


class GpuSettings(Section):
    """What is measured where there is a GPU, in the place of the small shape."""

    hidden_size: Count
    num_layers: Count
    num_heads: Count
    precision: Literal["fp32", "bf16"]
    batch_size: Count
    max_tokens: Count


class BenchStage(Training):
    parts: list[
        Literal[
            "steps",
            "offline",
            "semi_offline",
            "sampling",
            "loop",
            "memory",
            "draw",
            "prompts",
            "rouge",
            "startup",
            "peers",
        ]
    ]
    rounds: Count
    steps: Count
    clock: Literal["wall", "cpu"]
    peer_python: str | None
    gpu: GpuSettings


STAGES: dict[str, tuple[type[Common], ...]] = {  # several records where the algorithm decides which settings there are
    "sft": (SftStage,),
    "reward": (RewardStage,),
    "rl": (RlOffline, RlRatio, RlAdvantage, RlAdvantageRatio, RlSamples, RlPairs, RlScored, RlMasked, RlPolicy),
    "score": (ScoreStage,),
    "audit": (AuditStage,),
    "generate": (GenerateStage,),
    "evaluate": (EvaluateStage,),
    "export": (ExportStage,),
    "compare": (CompareStage,),
    "report": (ReportStage,),
    "plan": (PlanStage,),
    "bench": (BenchStage,),
}
