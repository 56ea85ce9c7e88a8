"""What a training will need of each process, how its batches divide, and whether the machine has it.

Bytes per weight follow Rajbhandari et al. (2020, ZeRO): with half precision 2 for the weight, 2 for its gradient and 12
for the optimizer (float32 master, two moments); with float32 4, 4 and 8. Stage 1 shares the optimizer between ranks,
stage 2 the gradients too, stage 3 the weights too. Activations and logits are estimates. While a stage samples it keeps
keys and values of every token, and under stage 3 all weights, in the place of activations.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import TYPE_CHECKING, NamedTuple

from pipeline.config.deepspeed import read_ds_config
from pipeline.config.schema import PlanStage, RewardStage, RlAdvantage, RlPolicy, RlStage, SftStage, Training
from pipeline.config.sections import ModelSettings, TrainSettings
from pipeline.launch import launcher, machine

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

GB = 1e9
PROGRAM = 0.5 * GB  # Python with torch, transformers and DeepSpeed; on a GPU its context
# What autograd keeps of a layer for each number that the layer's matrices give out. Measured, in float32 and bfloat16:
# OPT 1.5, GPT-NeoX 2.1, Llama, Mistral and Qwen2 2.2 and 2.4, Phi-3 2.4 and 2.7, Qwen3 2.5 and 2.9, GPT-2 3.2
KEPT = 2.4

logger = logging.getLogger("tiffin")


class Shape(NamedTuple):
    """What the estimate needs to know of a model."""

    parameters: float
    trained: float
    hidden_size: int
    layers: int
    vocab_size: int  # 0 without an output matrix
    outputs: float  # numbers that all matrices but the head give out for a token
    cache: float  # numbers in the keys and values of a token


class Load(NamedTuple):
    """What one rank has in work at once."""

    tokens: int  # padded, of a forward of training
    sampled: int  # of all prompts and responses of one call of generation, 0 where a stage has none


class Memory(NamedTuple):
    """Bytes of one rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    sampling: float  # at another time than activations and logits
    program: float

    @property
    def needed(self) -> float:
        """At the fullest moment."""
        return sum(self) - min(self.activations + self.logits, self.sampling)


class Demand(NamedTuple):
    """Bytes that one process needs, by estimate, and those that are there for it."""

    needed: float
    available: float
    owner: str
    cures: str  # settings that lower it

    @property
    def fits(self) -> bool:
        return self.needed <= self.available

    def __str__(self) -> str:
        found = f"needs about {self.needed / GB:.1f} GB per process, {self.owner} {self.available / GB:.1f} GB for it"
        return found if self.fits else f"{found}: too little; {self.cures}"


def memory(shape: Shape, train: TrainSettings, load: Load, world: int, stage: int, offload: bool) -> Memory:
    """The estimate for `load` on each of `world` ranks."""
    from pipeline.models.policy import CHUNK_ELEMENTS

    half = train.precision != "fp32"
    element = 2 if half else 4
    kept = KEPT * shape.outputs
    if train.gradient_checkpointing:  # what every layer reads, and one layer as it is made again
        kept = kept / shape.layers + shape.hidden_size * shape.layers
    chunk = min(load.tokens * shape.vocab_size, CHUNK_ELEMENTS)
    slice_of_head = 4 * 4 * chunk  # logits, log-probabilities, two gradients
    weights = shape.parameters * element / (world if stage == 3 else 1)
    gathered = shape.parameters * element - weights
    return Memory(
        weights=weights,
        gradients=shape.trained * element / (world if stage >= 2 else 1),
        optimizer=0.0 if offload else shape.trained * (12 if half else 8) / (world if stage >= 1 else 1),
        activations=load.tokens * kept * element,
        logits=float(slice_of_head + element * shape.vocab_size * shape.hidden_size),
        sampling=load.sampled * shape.cache * element + gathered if load.sampled else 0.0,
        program=PROGRAM,
    )


def estimate(settings: Training) -> str:
    """A table of the estimate for the configured ZeRO stage beside the others.

    Raises UserError where the model's configuration or the ZeRO file cannot be read.
    """
    shape, train = planned_shape(settings), settings.train
    world = launcher.world(settings.launch, "sft", os.environ)  # as any stage that trains
    stage, offload = sharding_of(settings)
    load = load_of(settings)
    parts = {one: memory(shape, train, load, world, one, offload and one == stage) for one in range(4)}
    by_size = isinstance(settings, PlanStage) and settings.parameters is not None
    lines = [
        f"model: {shape.parameters / 1e6:,.1f} M weights, {shape.trained / 1e6:,.1f} M trained, {train.precision}",
        f"shape: {'typical of that size, ' if by_size else ''}{shape.layers} layers of {shape.hidden_size:,}"
        + (f", vocabulary {shape.vocab_size:,}" if shape.vocab_size else ""),
        f"batch: {train.batch_size} rows per step over {world} processes, {load.tokens:,} padded tokens per forward",
        f"{'GB per process':16}" + "".join(f"{title:>12}" for title in (*Memory._fields, "all")),
    ]
    for one, row in parts.items():
        numbers = "".join(f"{part / GB:12.2f}" for part in (*row, row.needed))
        lines.append(f"{f'ZeRO-{one}':16}{numbers}" + (" <- train.zero" if one == stage else ""))
    if offload:
        kept = memory(shape, train, load, world, stage, offload=False).optimizer
        lines.append(f"{train.zero}: the optimizer's {kept / GB:.2f} GB per process are in the host's memory")
    available, owner = available_to(settings)
    if isinstance(settings, PlanStage):
        limit = 0.9 * available  # the rest is for what is not estimated
        fitting = [f"ZeRO-{one}" for one, row in parts.items() if row.needed <= limit]
        lines.append(f"fits in {available / GB:.1f} GB, with a tenth to spare: {', '.join(fitting) or 'none'}")
    lines.append(str(Demand(parts[stage].needed, available, owner, cures(settings, world))))
    if isinstance(settings, RlAdvantage) and settings.value.targets != "data":
        most = settings.value.most_prompts("policy")
        lines.append(settings.value.spoken_cost(most, settings.generation.max_new_tokens))
    lines.append("one model in memory: a reference is never kept beside the policy")
    return "\n".join(lines)


def warn_where_short(model: nn.Module, settings: Training, world: int) -> None:
    """Say so where the estimate for a model that was read is more than there is."""
    stage, offload = sharding_of(settings)
    needed = memory(shape_of(model, settings), settings.train, load_of(settings), world, stage, offload).needed
    if not (demand := Demand(needed, *available_to(settings), cures(settings, world))).fits:
        logger.warning(f"memory: {demand}")


def sharding_of(settings: Training) -> tuple[int, bool]:
    """The ZeRO stage, and whether the optimizer is in another memory."""
    zero = read_ds_config(settings.train.zero)["zero_optimization"]
    return zero["stage"], "offload_optimizer" in zero and on_gpu(settings)


def on_gpu(settings: Training) -> bool:
    """Whether it is a GPU's memory that is meant; without one there is no other to offload to."""
    import torch

    return torch.cuda.is_available() or (isinstance(settings, PlanStage) and settings.gpu_memory_gb is not None)


def cures(settings: Training, world: int) -> str:
    """What lowers the need of each of `world` processes and is not set yet."""
    train = settings.train
    further = {
        "bf16=true": train.precision == "fp32",
        "gradient_checkpointing=true": not train.gradient_checkpointing,
        "lora_r=16": settings.model.lora.r == 0,
        "zero=zero3": world > 1 and not train.zero.startswith("zero3"),
        "zero=zero3_offload": train.zero != "zero3_offload" and on_gpu(settings),
    }
    unset = [word for word, lowers in further.items() if lowers]
    return "lower train.max_tokens (or micro_batch_size)" + (f", or set {', '.join(unset)}" if unset else "")


def load_of(settings: Training) -> Load:
    """The most padded tokens of one forward on one rank, and of one call of generation."""
    data, train = settings.data, settings.train
    tokens = train.max_tokens or train.micro_batch_size * (data.max_prompt_length + data.max_response_length)
    if not isinstance(settings, SftStage | RlStage):
        return Load(tokens, 0)
    generation = settings.generation
    judged, new = (settings.eval.max_rows, generation.max_new_tokens)
    if isinstance(settings, SftStage):
        judged, new = settings.eval.num_samples, data.max_response_length
    calls = [(judged, generation.num_return_sequences * generation.num_beams)]  # prompts, responses to each
    if isinstance(settings, RlPolicy):
        sampler = settings.sampler
        calls.append((train.batch_size, sampler.k_max if sampler.mode == "dynamic" else sampler.k))
    if isinstance(settings, RlAdvantage) and settings.value.targets != "data":
        calls.append((settings.value.most_prompts("policy"), settings.value.samples_per_prompt))
    rows = max(min(prompts, generation.batch_size) * each for prompts, each in calls)
    return Load(tokens, rows * (data.max_prompt_length + new))


def available_to(settings: Training) -> tuple[float, str]:
    """Bytes that each process has on this machine or, where `gpu_memory_gb` says so, on another; and whose they are."""
    import torch

    if isinstance(settings, PlanStage) and settings.gpu_memory_gb is not None:
        return settings.gpu_memory_gb * GB, "a GPU has"
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory), "this machine's GPU has"
    return machine.ram() / settings.launch.processes, "this machine (no GPU) has"


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


def shape_of(model: nn.Module, settings: Training) -> Shape:
    """The size of a model, with LoRA or without, as it is or on the meta device."""
    from pipeline.models.loading import hugging_face

    lm = hugging_face(model)
    known, head = lm.config.get_text_config(), lm.get_output_embeddings()
    sizes = [(_size(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return Shape(
        parameters=float(sum(size for size, _ in sizes)),
        trained=float(sum(size for size, trained in sizes if trained)),
        hidden_size=known.hidden_size,
        layers=known.num_hidden_layers,
        vocab_size=0 if head is None else known.vocab_size,
        outputs=outputs_of(lm, head, settings.data.max_prompt_length, settings.data.max_response_length),
        cache=cache_of(known),
    )


def cache_of(config: PretrainedConfig) -> float:
    """Numbers in the keys and values of a token, in all layers that generate."""
    named, heads = config.to_dict(), config.num_attention_heads
    width = named.get("head_dim") or named.get("d_kv") or config.hidden_size // heads
    layers = named.get("decoder_layers") or named.get("num_decoder_layers") or config.num_hidden_layers
    return 2.0 * layers * (named.get("num_key_value_heads") or heads) * width


def outputs_of(lm: PreTrainedModel, head: nn.Module | None, prompt: int, response: int) -> float:
    """Numbers that the model's matrices but the head give out for a token; an encoder's of prompt tokens only."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    total = 0.0
    experts = lm.config.get_text_config().to_dict().get("num_experts_per_tok") or 1  # that read a token
    encoder = set(lm.get_encoder().modules()) if lm.config.is_encoder_decoder else set()
    for name, module in lm.named_modules():
        if module is head or "lora_" in name:  # adapters give small numbers, or some that are only added
            continue
        width = module.out_features if isinstance(module, nn.Linear) else 0
        width = module.nf if isinstance(module, Conv1D) else width
        if not width:  # many matrices in one: (experts, out, in)
            width = sum(experts * one.shape[1] for one in module.parameters(recurse=False) if one.dim() == 3)
        share = (prompt if module in encoder else response) / (prompt + response) if encoder else 1.0
        total += width * share
    return total


def _size(parameter: nn.Parameter) -> int:
    """Its elements, also where ZeRO-3 has shared them out."""
    return parameter.ds_numel if hasattr(parameter, "ds_numel") else parameter.numel()


class UntrainedTokenizer:
    """What a model's configuration needs of a tokenizer that is not made yet: its largest size, and its first ids."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __init__(self, model: ModelSettings):
        self.size = model.scratch.vocab_size

    def __len__(self) -> int:
        return self.size
