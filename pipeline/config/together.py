"""Settings that do not go together, as far as neither rows nor weights decide: asked before a start and within it.

Each raises UserError. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config.deepspeed import offloads
from pipeline.config.sections import ModelSettings, OptimizerSettings, ScratchSettings, TrainSettings
from pipeline.errors import UserError

NO_BITSANDBYTES = "the package bitsandbytes is not installed here: pip install bitsandbytes"


def whole_batches(train: TrainSettings, world: int) -> None:
    """A step's rows divide into `world` processes and their micro-batches."""
    per_call = train.micro_batch_size if train.micro_batch_size is not None else 1
    if train.batch_size % (world * per_call):
        what = f"processes {world}" + (f" x micro_batch_size {per_call}" if train.micro_batch_size else "")
        raise UserError(f"train.batch_size: {train.batch_size} is no multiple of {what}, wanted one: change either")


def fp16_on_gpu(train: TrainSettings, gpu: bool) -> None:
    if train.precision == "fp16" and not gpu:
        raise UserError("train.precision: fp16 needs a GPU, and there is none here: use bf16 or fp32")


def optimizer_fits(optimizer: OptimizerSettings, train: TrainSettings, zero: Mapping[str, Any]) -> None:
    """The optimizer can be sharded as `train.zero` says; `zero` is the zero_optimization of its file."""
    stage, offload = zero["stage"], offloads(zero, "offload_optimizer")
    if optimizer.name == "muon" and (stage or offload):
        # it needs whole matrices; DeepSpeed's own, which gathers them, clips what it has made of the gradient
        problem = "its step is made of whole matrices, and of clipped gradients"
        raise UserError(f"optimizer.name: muon with {train.zero}: {problem}, wanted train.zero=zero0, or name: adamw")
    if optimizer.name == "adamw_8bit" and offload:
        problem = "DeepSpeed's own AdamW steps what is offloaded"
        raise UserError(f"optimizer.name: adamw_8bit with {train.zero}: {problem}, wanted name: adamw, or no offload")


def heads(scratch: ScratchSettings) -> None:
    """A small new model's width divides into its heads."""
    size, count = scratch.hidden_size, scratch.num_heads
    if size % (2 * count):
        raise UserError(f"model.scratch: hidden_size {size} is no multiple of twice num_heads {count}: change one")


def adapters(model: ModelSettings) -> None:
    """There is a model that adapters are for."""
    if model.path is None and model.lora.r:
        raise UserError("model.lora.r: adapters of a new model's frozen random weights learn little: give model=")


def four_bits(model: ModelSettings, train: TrainSettings, zero_stage: int, gpu: bool) -> None:
    """A model in 4 bits can be read and trained: by adapters, on a GPU, whole on each."""
    if not model.load_in_4bit:
        return
    problem = None
    if model.path is None:
        problem, cure = "a new model is read from no checkpoint", "give model="
    elif not model.lora.r:
        problem, cure = "weights of 4 bits are not trained themselves", "set lora_r=16"
    elif zero_stage == 3:
        problem, cure = f"{train.zero} would cut them in parts, which loses their scales", "set zero=zero2"
    elif train.precision == "fp32":
        problem, cure = "what is computed from them is no finer than bfloat16", "set bf16=true"
    elif not gpu:
        problem, cure = "needs a GPU, and there is none here", "set false"
    if problem is not None:
        raise UserError(f"model.load_in_4bit: {problem}: {cure}")
