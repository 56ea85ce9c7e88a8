"""What a training will need of each GPU, and how its batches divide, before anything is started.

Bytes per weight follow Rajbhandari et al. (2020, ZeRO): with half precision 2 for the weight, 2 for its gradient and 12
for the optimizer (float32 master, two moments); with float32 4, 4 and 8. Stage 1 shares the optimizer between ranks,
stage 2 the gradients too, stage 3 the weights too. Activations and logits are estimates.
"""

from __future__ import annotations

from typing import NamedTuple

from pipeline.config.deepspeed import read_ds_config
from pipeline.config.schema import PlanStage, Training
from pipeline.config.sections import ModelSettings

GB = 1e9


class Shape(NamedTuple):
    """What the estimate needs to know of a model."""

    parameters: float
    trained: float
    hidden_size: int
    layers: int
    vocab_size: int


class Memory(NamedTuple):
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float


def memory(shape: Shape, stage: int, world: int, half: bool, offload: bool, tokens: int, checkpointing: bool) -> Memory:
    """The estimate for `tokens` padded tokens per micro-batch on each of `world` ranks."""
    element = 2 if half else 4
    logits = 3 * 4 * min(tokens * shape.vocab_size, 1 << 25)  # one slice of the head: logits, softmax, gradient
    per_token = shape.hidden_size * element * (2 if checkpointing else 34)  # Korthikanti et al. (2022), flash attention
    return Memory(
        weights=shape.parameters * element / (world if stage == 3 else 1),
        gradients=shape.trained * element / (world if stage >= 2 else 1),
        optimizer=0.0 if offload else shape.trained * (12 if half else 8) / (world if stage >= 1 else 1),
        activations=float(tokens * shape.layers * per_token),
        logits=float(logits),
    )


def estimate(settings: Training) -> str:
    """A table of the estimate for the configured ZeRO stage beside the others.

    Raises UserError where the model's configuration or the ZeRO file cannot be read.
    """
    shape, train, world = shape_of(settings), settings.train, settings.launch.processes
    zero = read_ds_config(train.zero)["zero_optimization"]
    longest = settings.data.max_prompt_length + settings.data.max_response_length
    tokens = train.max_tokens or train.micro_batch_size * longest

    def parts(stage: int, offload: bool) -> Memory:
        half = train.precision != "fp32"
        return memory(shape, stage, world, half, offload, tokens, train.gradient_checkpointing)

    lines = [
        f"model: {shape.parameters / 1e6:,.1f} M weights, {shape.trained / 1e6:,.1f} M trained, {train.precision}",
        f"batch: {train.batch_size} rows per step over {world} processes, {tokens:,} padded tokens per forward",
        f"{'GB per process':16}" + "".join(f"{title:>12}" for title in (*Memory._fields, "all")),
    ]
    for stage in range(4):
        chosen = stage == zero["stage"]
        row = parts(stage, chosen and "offload_optimizer" in zero)
        numbers = "".join(f"{part / GB:12.2f}" for part in (*row, sum(row)))
        lines.append(f"{f'ZeRO-{stage}':16}{numbers}" + (" <- train.zero" if chosen else ""))
    if isinstance(settings, PlanStage):
        limit = 0.9 * settings.gpu_memory_gb * GB  # the rest is for what is not estimated
        fitting = [f"ZeRO-{stage}" for stage in range(4) if sum(parts(stage, offload=False)) <= limit]
        cure = "none: more processes, LoRA, offload or gradient_checkpointing"
        lines.append(f"fits in {settings.gpu_memory_gb:g} GB: {', '.join(fitting) or cure}")
    lines.append("one model in memory: a reference is never kept beside the policy")
    return "\n".join(lines)


def shape_of(settings: Training) -> Shape:
    """The model's size from its configuration, built without memory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from pipeline.models.loading import load_config
    from pipeline.models.lora import with_lora

    config = load_config(settings.model, UntrainedTokenizer(settings.model))
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    # weights without memory: only their shapes count
    with torch.device("meta"):
        model = auto.from_config(config)
    parameters = float(sum(p.numel() for p in model.parameters()))
    if isinstance(settings, PlanStage) and settings.parameters is not None:
        parameters = settings.parameters
    trained = parameters
    if settings.model.lora.r:
        lora = with_lora(model, settings.model.lora, "CAUSAL_LM")
        trained = float(sum(p.numel() for p in lora.parameters() if p.requires_grad))
    known = config.get_text_config()
    return Shape(parameters, trained, known.hidden_size, known.num_hidden_layers, known.vocab_size)


class UntrainedTokenizer:
    """What a model's configuration needs of a tokenizer that is not made yet: its largest size, and its first ids."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __init__(self, model: ModelSettings):
        self.size = model.scratch.vocab_size

    def __len__(self) -> int:
        return self.size
