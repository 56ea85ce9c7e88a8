"""Settings that do not go together, as far as neither rows nor weights decide: asked before a start and within it.

Each raises UserError. Needs no torch.
"""

from __future__ import annotations

from pipeline.config.sections import ModelSettings, ScratchSettings, TrainSettings
from pipeline.errors import UserError


def whole_batches(train: TrainSettings, world: int) -> None:
    """A step's rows divide into `world` processes and their micro-batches."""
    per_call = train.micro_batch_size if train.micro_batch_size is not None else 1
    if train.batch_size % (world * per_call):
        what = f"processes {world}" + (f" x micro_batch_size {per_call}" if train.micro_batch_size else "")
        raise UserError(f"train.batch_size: {train.batch_size} is no multiple of {what}, wanted one: change either")


def fp16_on_gpu(train: TrainSettings, gpu: bool) -> None:
    if train.precision == "fp16" and not gpu:
        raise UserError("train.precision: fp16 needs a GPU, and there is none here: use bf16 or fp32")


def fp16_scaled(train: TrainSettings, zero_stage: int) -> None:
    """Trained in fp16, the loss is scaled."""
    if train.precision == "fp16" and zero_stage == 0:
        # there DeepSpeed divides gradients by a loss scale that it never multiplied the loss by
        raise UserError(
            f"train.zero: {train.zero}, stage 0, with fp16, whose loss DeepSpeed does not scale there, wanted "
            "zero=zero1 (on one GPU the same) or another stage, or bf16=true"
        )


def heads(scratch: ScratchSettings) -> None:
    """A small new model's width divides into its heads."""
    size, count = scratch.hidden_size, scratch.num_heads
    if size % (2 * count):
        raise UserError(f"model.scratch: hidden_size {size} is no multiple of twice num_heads {count}: change one")


def adapters(model: ModelSettings) -> None:
    """There is a model that adapters are for."""
    if model.path is None and model.lora.r:
        raise UserError("model.lora.r: adapters of a new model's frozen random weights learn little: give model=")
