"""Every key a user can set, with its type and range; the defaults live in `stages/*.yaml`, nowhere else."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pipeline.config.reward_spec import sound_addresses
from pipeline.config.sampler import SamplerSettings
from pipeline.config.sections import (
    Count,
    DataSettings,
    EvalSettings,
    FolderName,
    Fraction,
    GenerationSettings,
    LaunchSettings,
    ModelSettings,
    OptimizerSettings,
    Positive,
    ResultName,
    RewardSettings,
    Section,
    Seed,
    Split,
    TemplateSettings,
    TrainSettings,
    ValueSettings,
    Whole,
)


class Algorithm(Section):
    """The file in `pipeline/algorithms/` and its own settings, which that file checks."""

    file: str
    settings: dict[str, Any]


class Common(Section):
    """What every stage has."""

    run: FolderName
    name: ResultName | None
    runs_dir: str
    seed: Seed
    launch: LaunchSettings


class WithModel(Common):
    model: ModelSettings
    template: TemplateSettings
    data: DataSettings


class Training(WithModel):
    algorithm: Algorithm
    train: TrainSettings
    optimizer: OptimizerSettings
    eval: EvalSettings


class Masking(Section):
    """Which tokens of a response the model sees as [MASK] where it reads what it has said so far."""

    rate: Fraction
    span: Literal["token", "word", "whole_word"]
    after_punctuation: bool
    exact: bool
    plain: Fraction


class Sft(Training):
    train_on: Literal["last", "all"]
    masking: Masking
    generation: GenerationSettings


class Reward(Training):
    name: ResultName
    start_from: Literal["sft", "model"]


class RatioTolerance(Section):
    """How far policy and reference may differ before the first step, by precision; mean nats per token."""

    fp32: Positive
    bf16: Positive
    fp16: Positive


RewardSpec = Annotated[str | dict[str, float] | None, BeforeValidator(sound_addresses)]


class Rl(Training):
    algo: str
    start_from: Literal["sft", "model"]
    scored: str | None
    reward: RewardSpec
    rewards: RewardSettings
    rows: Literal["all", "chosen", "best_half", "worst_half"]
    shuffle_rewards: bool
    static: Literal["worst", "best", "random", "reference"]
    share_prompt: bool
    sampling: Literal["priority", "positive", "all"]
    scale_steps: bool
    ratio_tolerance: RatioTolerance
    masking: Masking
    sampler: SamplerSettings
    value: ValueSettings
    generation: GenerationSettings

    @model_validator(mode="after")
    def sampler_goes_with_the_rest(self) -> Rl:
        if self.algorithm.file == "online":  # others do not sample
            self.sampler.check_with(self.algorithm.settings, self.generation, self.train, self.data)
        return self


class Score(WithModel):
    of: Literal["data", "generate"]
    splits: Annotated[list[Split], Field(min_length=1)]
    reward: RewardSpec
    rewards: RewardSettings


class Generate(WithModel):
    policy: str | None
    splits: Annotated[list[Split], Field(min_length=1)]
    max_rows: Count | None
    train: TrainSettings
    reward: RewardSpec
    rewards: RewardSettings
    generation: GenerationSettings


class Evaluate(WithModel):
    policies: Annotated[dict[str, str], Field(min_length=1)]
    split: Split
    max_rows: Count
    num_samples: Whole
    train: TrainSettings
    reward: RewardSpec
    monitors: Annotated[list[str] | dict[str, str], BeforeValidator(sound_addresses)]
    rewards: RewardSettings
    generation: GenerationSettings


class Compare(Common):
    """Methods side by side over seeds; `rl`, `evaluate` and each of `variants` hold settings of those stages."""

    algos: str | list[str]
    variants: dict[str, dict[str, Any]]
    seeds: Whole | str | list[Whole]
    share_before: bool
    jobs: Count
    rl: dict[str, Any]
    evaluate: dict[str, Any]


class Report(Common):
    pass


class Plan(Training):
    parameters: Positive | None
    gpu_memory_gb: Positive


class GpuSettings(Section):
    """What is measured where there is a GPU, in the place of the small shape."""

    hidden_size: Count
    num_layers: Count
    num_heads: Count
    precision: Literal["fp32", "bf16"]
    batch_size: Count
    max_tokens: Count
    peak_tflops: Positive


class Bench(Training):
    parts: list[Literal["steps", "semi_offline", "sampling", "loop", "memory", "rouge", "startup", "peers"]]
    rounds: Count
    steps: Count
    clock: Literal["wall", "cpu"]
    peer_python: str | None
    gpu: GpuSettings


STAGES: dict[str, type[Common]] = {
    "sft": Sft,
    "reward": Reward,
    "rl": Rl,
    "score": Score,
    "generate": Generate,
    "evaluate": Evaluate,
    "compare": Compare,
    "report": Report,
    "plan": Plan,
    "bench": Bench,
}
