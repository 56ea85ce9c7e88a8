"""What a training will take, in words, before it starts: each process, the host, the disk."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.config.schema import PlanStage, RewardStage, RlAdvantage, RlSamples, Training
from pipeline.config.sections import ModelSettings
from pipeline.launch import launcher, machine
from pipeline.models.memory import (
    GB,
    PROGRAM,
    Demand,
    Memory,
    Shape,
    available_to,
    by_layers,
    cures,
    load_of,
    memory,
    on_device,
    on_gpu,
    shape_of,
    zero_of,
)


def estimate(settings: Training) -> str:
    """A table of the estimate for the configured ZeRO stage beside the others; what the host and the disk are to hold.

    Raises UserError where the model's configuration or the ZeRO file cannot be read.
    """
    shape, train = planned_shape(settings), settings.train
    world = launcher.world(settings.launch, "sft", os.environ)  # as any stage that trains
    chosen, load = zero_of(settings), load_of(settings)
    parts = {one: memory(shape, train, load, world, {"stage": one}) for one in range(4)}
    load = load._replace(layers=load.layers or by_layers(settings, shape, world))
    kept = memory(shape, train, load, world, chosen)
    parts[chosen["stage"]] = on_device(kept, settings, chosen)
    by_size = isinstance(settings, PlanStage) and settings.parameters is not None
    lines = [
        f"model: {_named(settings)}{shape.parameters / 1e6:,.1f} M weights, {shape.trained / 1e6:,.1f} M trained, "
        f"{train.precision}",
        f"shape: {'typical of that size, ' if by_size else ''}{shape.layers} layers of {shape.hidden_size:,}"
        + (f", vocabulary {shape.vocab_size:,}" if shape.vocab_size else ""),
        f"batch: {train.batch_size} rows per step over {world} processes, {load.tokens:,} padded tokens per forward",
        f"{'GB per process':14}" + "".join(f"{title:>12}" for title in (*Memory._fields, "all")),
    ]
    for one, row in parts.items():
        numbers = "".join(f"{part / GB:12.2f}" for part in (*row, row.needed))
        lines.append(f"{f'ZeRO-{one}':14}{numbers}" + (" <- train.zero" if one == chosen["stage"] else ""))
    lines.append("gathered, stepping, activations and logits are needed at another time than sampling")
    if load.sampled and load.layers and chosen["stage"] == 3:
        lines.append("sampling gathers layer by layer for every token: all weights at once would not fit")
    available, owner = available_to(settings)
    if isinstance(settings, PlanStage):
        limit = 0.9 * available  # the rest is for what is not estimated
        fitting = [f"ZeRO-{one}" for one, row in parts.items() if row.needed <= limit]
        lines.append(f"fits in {available / GB:.1f} GB, with a tenth to spare: {', '.join(fitting) or 'none'}")
    lines.append(str(Demand(parts[chosen["stage"]].needed, available, owner, cures(settings, world))))
    lines += host_lines(settings, shape, kept, world, chosen)
    lines.append(disk_line(settings, shape, chosen["stage"]))
    if isinstance(settings, RlAdvantage) and settings.value.targets != "data":
        most = settings.value.most_prompts("policy")
        lines.append(settings.value.spoken_cost(most, settings.generation.max_new_tokens))
    if isinstance(settings, RlSamples) and settings.reference_samples.targets != "data":
        lines.append(settings.reference_samples.spoken_cost(None, settings.generation.max_new_tokens))
    if not load.reference:
        lines.append("one model in memory: no reference is kept beside it")
    return "\n".join(lines)


def _named(settings: Training) -> str:
    return "" if settings.model.path is None else f"{settings.model.path}, "


def host_lines(settings: Training, shape: Shape, kept: Memory, world: int, zero: Mapping[str, Any]) -> Iterator[str]:
    """What a machine with GPUs holds in its own memory: weights as they are read, and what is offloaded."""
    if not on_gpu(settings):
        return
    local = min(world, settings.launch.processes)
    element = 2 if settings.train.precision == "bf16" else 4  # as they are read
    read = 0.0 if zero["stage"] == 3 else shape.parameters * element
    device = on_device(kept, settings, zero)
    if kept.optimizer != device.optimizer:
        held = f"the optimizer's {kept.optimizer / GB:.2f} GB per process are in the host's memory"
        yield f"{settings.train.zero}: {held}"
    needed = local * (PROGRAM + max(read, kept.weights - device.weights + kept.optimizer - device.optimizer))
    what = "one weight at a time is read" if zero["stage"] == 3 else f"{read / GB:.1f} GB of weights are read"
    line = f"host memory: about {needed / GB:.1f} GB for {local} processes of a machine; in each {what}"
    if isinstance(settings, PlanStage) and settings.gpu_memory_gb is not None:
        yield line  # of another machine
    else:
        there = machine.ram()
        yield f"{line}, this machine has {there / GB:.1f} GB" + (": too little" if needed > there else "")


def disk_line(settings: Training, shape: Shape, stage: int) -> str:
    """Bytes of what is saved: checkpoints of trained weights with their optimizer, and the weights for others."""
    half, all_weights = settings.train.precision != "fp32", not settings.model.lora.r
    checkpoint = shape.trained * (14 if half else 16 if stage else 12)
    kept = settings.train.save_total_limit
    export = (shape.parameters if all_weights else shape.trained) * (2 if settings.train.precision == "bf16" else 4)
    most = (kept + 1) * checkpoint + 3 * export  # one more of each while it is written
    sizes = (
        f"{checkpoint / GB:.1f} GB a checkpoint, of which {kept} stay; {export / GB:.1f} GB each for best/ and last/"
    )
    line = f"disk: {sizes}: up to {most / GB:.1f} GB"
    if isinstance(settings, PlanStage) and settings.gpu_memory_gb is not None:
        return line  # of another machine
    free = shutil.disk_usage(nearest(Path(settings.runs_dir))).free
    short = ": too little; lower train.save_total_limit" if most > free else ""
    return f"{line}, {settings.runs_dir} has {free / GB:.1f} GB free{short}"


def nearest(path: Path) -> Path:
    """The path, or the first of those around it that is there."""
    return next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())


def planned_shape(settings: Training) -> Shape:
    """The model's size from its configuration, built without memory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from pipeline.models.loading import load_config
    from pipeline.models.lora import Base, with_lora
    from pipeline.models.typical import typical_config

    weights = settings.parameters if isinstance(settings, PlanStage) else None
    if weights is None:
        config = load_config(settings.model, UntrainedTokenizer(settings.model))
    else:
        config = typical_config(weights)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    # weights without memory: only their shapes count
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=settings.model.trust_remote_code)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # in peft's calls
    base = Base(settings.model.path or "")
    shape = shape_of(with_lora(model, base, settings.model.lora, "CAUSAL_LM"), settings)
    if weights is not None:
        shape = shape._replace(parameters=weights, trained=shape.trained if settings.model.lora.r else weights)
    return shape._replace(vocab_size=0) if isinstance(settings, RewardStage) else shape


class UntrainedTokenizer:
    """What a model's configuration needs of a tokenizer that is not made yet: its largest size, and its first ids."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __init__(self, model: ModelSettings):
        self.size = model.scratch.vocab_size

    def __len__(self) -> int:
        return self.size
