"""The parts that stages' settings are made of, each key with its type and range.

`generation`, `rewards` and `sampler` have files of their own.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

# in a stage directory
STAGE_FILES = ("model", "best", "last", "checkpoints", "tensorboard", "samples", "held_out", "non_finite", "handed")


def folder_name(value: str) -> str:
    """`value`, which must name one visible folder. Raises ValueError."""
    if not value.strip() or value.startswith(".") or "/" in value or not value.isprintable():
        raise ValueError(f"{value!r}, wanted the name of one folder: no '/', no dot at the beginning, one line")
    return value


def result_name(value: str) -> str:
    """A folder's name that no file of a stage has. Raises ValueError."""
    if value in STAGE_FILES:
        raise ValueError(f"{value!r} is what a stage calls a folder of its own, wanted another name")
    return folder_name(value)


def day(value: str) -> str:
    """`value`, which must be a date as in 2026-03-01. Raises ValueError."""
    try:
        datetime.date.fromisoformat(value)
    except ValueError:
        raise ValueError(f"{value!r}, wanted a date as in 2026-03-01") from None
    return value


Fraction = Annotated[float, Field(ge=0, le=1)]
Dropped = Annotated[float, Field(ge=0, lt=1)]  # a share of which something must remain
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=10**9)]
Port = Annotated[int, Field(ge=1, le=65535)]
FolderName = Annotated[str, AfterValidator(folder_name)]
ResultName = Annotated[str, AfterValidator(result_name)]
Split = Literal["train", "validation", "test"]


class Section(BaseModel):
    """Unknown keys and wrong types are errors, values never change, and every key must be given."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class LoraSettings(Section):
    r: Whole
    alpha: Positive
    dropout: Dropped
    target_modules: str | list[str]


class ScratchSettings(Section):
    """The small model that is made when no `model.path` is given."""

    shape: Literal["llama", "t5", "bart"]
    hidden_size: Count
    num_layers: Count
    num_heads: Count
    vocab_size: Count
    max_position_embeddings: Count


class ModelSettings(Section):
    path: str | None
    revision: str | None
    scratch: ScratchSettings
    lora: LoraSettings
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"]
    trust_remote_code: bool
    dropout: Dropped | None
    save_dtype: Literal["bfloat16", "float16"] | None
    load_in_4bit: bool = False  # of settings that were saved before there was one


class TemplateSettings(Section):
    kind: Literal["auto", "text", "chat"]
    prompt: str | None
    response: str | None
    human: str
    assistant: str
    system: str | None
    special_tokens: Literal["text", "token"]
    date: Annotated[str, AfterValidator(day)] | None
    arguments: dict[str, JsonValue] = Field(default_factory=dict)  # a model trained before there were any has none

    @model_validator(mode="after")
    def a_template_for_arguments(self) -> TemplateSettings:
        if self.kind == "text" and self.arguments:
            raise ValueError("template.kind=text reads none of template.arguments, wanted template.kind=chat")
        return self


class DataSettings(Section):
    task: str | None
    task_size: Count | None
    path: str | None
    files: str | None
    train: str | list[str] | dict[str, Positive] | None  # files or hub names, patterns of files; weights
    validation: str | list[str] | None
    test: str | list[str] | None
    format: str | None
    columns: dict[str, str | list[str]]
    responses: Literal["chosen", "both"]
    sources: list[str] | None
    exclude: list[str]
    drop_abrupt: bool
    max_rows: Count | None
    streaming: bool
    workers: Count | None
    max_bad_rows: Whole
    validation_fraction: Dropped
    max_prompt_length: Count
    keep_of_prompt: Literal["end", "beginning"]
    max_response_length: Count

    @field_validator("validation", "test", mode="before")
    @classmethod
    def no_weights(cls, given: object) -> object:
        if isinstance(given, dict):
            raise ValueError("a mapping, but only rows to learn from have weights, wanted one file or a list of files")
        return given

    @field_validator("train", "validation", "test")
    @classmethod
    def some_files(cls, given: str | list[str] | dict[str, float] | None) -> str | list[str] | dict[str, float] | None:
        if given is not None and not (given and all(given)):
            raise ValueError(f"{given!r} names no file, wanted one, a list of some, or some with weights for train")
        return given

    @model_validator(mode="after")
    def task_or_files(self) -> DataSettings:
        files = [name for name in ("path", "train", "validation", "test") if getattr(self, name) is not None]
        if self.task is not None and files:
            raise ValueError(f"both task and {files[0]} are given, wanted one source of rows: set data.task=null")
        if self.task is not None and self.columns:
            raise ValueError(f"columns are given, but task {self.task} makes rows of its own: set data.columns={{}}")
        if self.task is None and self.task_size is not None:
            raise ValueError(f"task_size is {self.task_size}, wanted null without a task: set data.max_rows")
        if self.streaming and self.max_rows is None:
            raise ValueError(
                "streaming is true, but max_rows is null, wanted how many rows to read: data.max_rows=64000 is 1,000 "
                "steps of 64 rows"
            )
        if self.streaming and self.task is not None:
            raise ValueError(f"streaming is true, but task {self.task} makes its rows: set data.streaming=false")
        return self


class TrainSettings(Section):
    batch_size: Count
    micro_batch_size: Count | None
    max_tokens: Count | None
    padding_free: bool
    group_by_length: bool
    num_train_epochs: Positive | None
    max_steps: Count | None
    precision: Literal["fp32", "bf16", "fp16"]
    zero: str
    gradient_checkpointing: bool
    router_aux_loss_coef: NotNegative | None
    logging_steps: Count
    eval_steps: Count | None
    save_steps: Count | None
    save_total_limit: Count
    keep_checkpoint: bool
    keep: Literal["best", "last"]
    best_steps: Count | None
    non_finite: Literal["stop", "skip"]

    @model_validator(mode="after")
    def one_owner_each(self) -> TrainSettings:
        for one, other in (("micro_batch_size", "max_tokens"), ("num_train_epochs", "max_steps")):
            if (getattr(self, one) is None) == (getattr(self, other) is None):
                found = f"{one} and {other} are both " + ("null" if getattr(self, one) is None else "given")
                raise ValueError(f"{found}, wanted one of {one} and {other}, the other null or left out")
        return self


class OptimizerSettings(Section):
    name: Literal["adamw", "adamw_8bit", "muon"]
    learning_rate: Positive
    lr_scheduler_type: Literal["linear", "cosine", "constant", "warmup_stable_decay"]
    warmup_ratio: Fraction | None
    warmup_steps: Whole | None
    decay_ratio: Annotated[float, Field(gt=0, le=1)]
    min_lr_ratio: Dropped
    weight_decay: NotNegative
    adam_beta1: Dropped
    adam_beta2: Dropped
    adam_epsilon: Positive
    muon_momentum: Dropped
    max_grad_norm: NotNegative

    @model_validator(mode="after")
    def one_course(self) -> OptimizerSettings:
        if (self.warmup_ratio is None) == (self.warmup_steps is None):
            found = "null" if self.warmup_ratio is None else "given"
            raise ValueError(f"warmup_ratio and warmup_steps are both {found}, wanted one of them, the other null")
        falls = self.lr_scheduler_type == "warmup_stable_decay"
        if falls and self.warmup_ratio is not None and self.warmup_ratio + self.decay_ratio > 1:
            found = f"{self.warmup_ratio:g} of the steps warm up and {self.decay_ratio:g} decay"
            raise ValueError(f"{found}, wanted no more than 1 in all: lower warmup_ratio or decay_ratio")
        if self.lr_scheduler_type == "constant" and self.min_lr_ratio:
            raise ValueError(f"min_lr_ratio is {self.min_lr_ratio:g}, but a constant rate never falls: set it to 0")
        return self


class EvalSettings(Section):
    generate: bool
    max_rows: Count
    num_samples: Whole


class ValueSettings(Section):
    targets: Literal["auto", "policy", "data"]
    samples_per_prompt: Count
    max_prompts: Count | None
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)]
    learning_rate: Positive
    epochs: Count
    batch_size: Count
    patience: Count
    num_heads: Count
    dropout: Dropped

    def most_prompts(self, targets: Literal["policy", "data"]) -> int:
        """From how many prompts V is learned at most: those to sample for cost more."""
        return self.max_prompts or {"policy": 100, "data": 400}[targets]

    def spoken_cost(self, prompts: int, max_new_tokens: int) -> str:
        """What is sampled from the policy before the first step, in words; `prompts` that are taken."""
        taken, each = prompts, self.samples_per_prompt
        return (
            f"values: {taken:,} prompts x {each} responses x at most {max_new_tokens} tokens = "
            f"{taken * each * max_new_tokens:,} tokens to sample before the first step (value.targets=data: none)"
        )


class ReferenceSamples(Section):
    targets: Literal["auto", "policy", "data"]
    per_prompt: Annotated[int, Field(ge=2)]

    def spoken_cost(self, prompts: int | None, max_new_tokens: int) -> str:
        """What is sampled from the policy before the first step, in words; `prompts`: how many the rows have."""
        whole = "" if prompts is None else f" = {prompts * self.per_prompt * max_new_tokens:,} tokens"
        taken = "every prompt" if prompts is None else f"{prompts:,} prompts"
        return (
            f"reference_samples: {taken} x {self.per_prompt} responses x at most {max_new_tokens} tokens{whole} to "
            "sample before the first step (data.max_rows or reference_samples.per_prompt make it less; "
            "reference_samples.targets=data: none)"
        )


class BestRows(Section):
    of_prompt: Count | None
    at_least: float | None

    @model_validator(mode="after")
    def some_limit(self) -> BestRows:
        if self.of_prompt is None and self.at_least is None:
            raise ValueError("of_prompt and at_least are both null, wanted one of them: how many, or how good")
        return self

    def spoken(self) -> str:
        """The limits in words."""
        most = [f"the {self.of_prompt} best of each prompt"] if self.of_prompt is not None else []
        return ", ".join([*most, *([f"reward at least {self.at_least:.4g}"] if self.at_least is not None else [])])


class LaunchSettings(Section):
    processes: Count
    hostfile: str | None
    launcher: Literal["auto", "single", "deepspeed", "torchrun", "srun", "slurm"]
    nnodes: Count
    rdzv_endpoint: str | None
    master_port: Port | None
    ddp_timeout: Count

    @model_validator(mode="after")
    def nodes_meet(self) -> LaunchSettings:
        if self.launcher == "slurm" and self.hostfile is None and self.rdzv_endpoint is None:
            return self
        if (self.nnodes > 1) != (self.rdzv_endpoint is not None):
            raise ValueError(
                f"nnodes is {self.nnodes} and rdzv_endpoint {self.rdzv_endpoint}, wanted both or neither: the same "
                "command on every host, as launch.nnodes=2 launch.rdzv_endpoint=HOST:29500"
            )
        if self.nnodes > 1 and (self.launcher not in ("auto", "torchrun") or self.hostfile is not None):
            raise ValueError("nnodes is torchrun's or slurm's, wanted launcher=torchrun or slurm, and no hostfile")
        return self
