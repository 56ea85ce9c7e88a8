"""What DeepSpeed is told: sharding from the file, and ours for batch, clipping, precision and optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.config import together
from pipeline.config.deepspeed import offloads, read_ds_config
from pipeline.config.sections import OptimizerSettings, TrainSettings
from pipeline.errors import UserError
from pipeline.trainer import muon

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# DeepSpeed divides by this number and frees its accumulation buffers when it is 1; the true number of micro-batches
# varies from step to step, so the boundary is set by hand and the division is undone in `backward`.
NOMINAL_ACCUMULATION = 2


def full_config(train: TrainSettings, optimizer: OptimizerSettings | None) -> dict[str, Any]:
    """The whole DeepSpeed configuration: the file's sharding, and ours for batch, clipping, precision, optimizer."""
    config = read_ds_config(train.zero)
    config["train_micro_batch_size_per_gpu"] = 1
    config["gradient_accumulation_steps"] = NOMINAL_ACCUMULATION
    for name in ("bf16", "fp16"):
        config[name] = {**config.get(name, {}), "enabled": train.precision == name}
    config["bf16"]["check_grad_overflow"] = True  # a step with a gradient that is not finite is left out
    if optimizer is None:
        return config
    config["gradient_clipping"] = optimizer.max_grad_norm
    if optimizer.name == "adamw_8bit":  # which is tested here, though not there
        config["zero_allow_untested_optimizer"] = True
    if offloads(config["zero_optimization"], "offload_optimizer"):
        config["optimizer"] = {"type": "AdamW", "params": adam_arguments(optimizer)}
    return config


def client_optimizer(module: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer that `optimizer.name` names, on the trained parameters of `module`.

    Raises UserError where its package is not installed.
    """
    adam = adam_arguments(settings)
    if settings.name == "muon":
        return muon.muon(module, settings, adam)
    groups = parameter_groups(module, settings.weight_decay)
    if settings.name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **adam)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(f"optimizer.name: adamw_8bit: {together.NO_BITSANDBYTES} ({error})") from None
    return AdamW8bit(groups, **adam)


def adam_arguments(settings: OptimizerSettings) -> dict[str, Any]:
    """AdamW's arguments, but for the learning rate, which every step sets anew."""
    betas = (settings.adam_beta1, settings.adam_beta2)
    return {"lr": 0.0, "betas": betas, "eps": settings.adam_epsilon, "weight_decay": settings.weight_decay}


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: matrices, which decay, and vectors (norms, biases), which do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    vectors = [p for p in trained if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
