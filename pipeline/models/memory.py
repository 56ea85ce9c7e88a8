"""What a training will need of each process, how its batches divide, and whether the machine has it.

Bytes per weight follow Rajbhandari et al. (2020, ZeRO): with half precision 2 for the weight, 2 for its gradient and 12
for the optimizer (float32 master, two moments); with float32 4, 4 and 8. Stage 1 shares the optimizer between ranks,
stage 2 the gradients too, stage 3 the weights too. Activations and logits are estimates. While a stage samples it keeps
keys and values of every token, and under stage 3 all weights, in the place of activations.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.config.deepspeed import offloads, read_ds_config
from pipeline.config.reward_spec import parse
from pipeline.config.schema import (
    PlanStage,
    RewardStage,
    RlAdvantage,
    RlMasked,
    RlPairs,
    RlPolicy,
    RlSamples,
    RlStage,
    SftStage,
    Training,
)
from pipeline.config.sections import TrainSettings
from pipeline.launch import machine, run_dir
from pipeline.models.place import read_object

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

GB = 1e9
PROGRAM = 0.5 * GB  # Python with torch, transformers and DeepSpeed; on a GPU its context
# What autograd keeps of a layer for each number that the layer's matrices give out. Measured, in float32 and bfloat16:
# OPT 1.5, GPT-NeoX 2.1, Llama, Mistral and Qwen2 2.2 and 2.4, Phi-3 2.4 and 2.7, Qwen3 2.5 and 2.9, GPT-2 3.2
KEPT = 2.4
ADAPTER_CONFIG = "adapter_config.json"

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
    """What one rank has in work at once, and beside its model."""

    tokens: int  # padded, of a forward of training
    sampled: int  # of all prompts and responses of one call of generation, 0 where a stage has none
    layers: bool = False  # ZeRO-3 gathers single layers while it samples
    reference: bool = False  # a second model is asked beside the trained one
    judges: float = 0.0  # bytes of reward models
    buffers: bool = False  # DeepSpeed's are there as soon as they are made, as on a GPU; else as far as they are used


class Memory(NamedTuple):
    """Bytes of one rank."""

    weights: float
    gathered: float  # by ZeRO-3, while it reads
    gradients: float
    optimizer: float
    stepping: float  # copies that a step makes
    reference: float  # a second model, which is only read
    activations: float
    logits: float
    sampling: float  # at another time than activations and logits
    judges: float  # reward models
    program: float

    @property
    def needed(self) -> float:
        """At the fullest moment: while it learns, or while it samples, without what is only of the other."""
        learning = self.gathered + self.stepping + self.activations + self.logits
        return sum(self) - min(learning, self.sampling)


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


def memory(shape: Shape, train: TrainSettings, load: Load, world: int, zero: Mapping[str, Any]) -> Memory:
    """The estimate for `load` on each of `world` ranks under `zero`, the part of that name of DeepSpeed's file.

    What a step copies, and what ZeRO-3 gathers, was measured with DeepSpeed 0.19.8.
    """
    from pipeline.models.policy import CHUNK_ELEMENTS

    stage, half = zero["stage"], train.precision != "fp32"
    element = 2 if half else 4
    kept = KEPT * shape.outputs
    if train.gradient_checkpointing:  # what every layer reads, and one layer as it is made again
        kept = kept / shape.layers + shape.hidden_size * shape.layers
    chunk = min(load.tokens * shape.vocab_size, CHUNK_ELEMENTS)
    slice_of_head = 4 * 4 * chunk  # logits, log-probabilities, two gradients
    shared, whole = world if stage >= 1 else 1, shape.trained == shape.parameters
    live = min(shape.parameters, zero.get("stage3_max_live_parameters", 1e9)) if stage == 3 else 0.0
    gathered = 0.0
    if load.sampled and stage == 3:
        gathered = live if load.layers else shape.parameters
    weights = shape.parameters * element / (world if stage == 3 else 1)
    return Memory(
        weights=weights,
        gathered=1.5 * element * live,  # half of it once more as it arrives
        gradients=shape.trained * element / shared,
        optimizer=shape.trained * (12 if half or stage else 8) / shared,
        stepping=_stepping(shape.trained, zero, element, world, load.buffers),
        reference=weights if load.reference else 0.0,
        activations=load.tokens * kept * element,
        logits=float(slice_of_head + (element * shape.vocab_size * shape.hidden_size if whole else 0)),
        sampling=load.sampled * shape.cache * element + element * gathered,
        judges=load.judges,
        program=PROGRAM,
    )


def _stepping(trained: float, zero: Mapping[str, Any], element: int, world: int, buffers: bool) -> float:
    """Bytes of gradients beside a rank's part of them: before they are shared out, on their way, and in float32."""
    if zero["stage"] == 0:
        return 4 * trained if element == 2 else 0.0
    copies, bucket = 4 * trained / world, zero.get("reduce_bucket_size", 5e8)
    if zero["stage"] == 3:
        return copies + element * (bucket if buffers else min(trained, bucket))
    copies += element * trained / world if element == 2 and world > 1 else 0.0
    copies += element * bucket * (2 if zero.get("overlap_comm", True) else 1) if buffers else 0.0
    return max(copies, element * trained * (1 - 1 / world)) if zero["stage"] == 1 else copies


def by_layers(settings: Training, shape: Shape, world: int) -> bool:
    """Whether what samples under ZeRO-3 gathers single layers, because all weights would not fit."""
    zero, load = zero_of(settings), load_of(settings)
    if zero["stage"] < 3 or not load.sampled or settings.generation.gather != "auto":
        return False
    whole = on_device(memory(shape, settings.train, load, world, zero), settings, zero)
    rest = whole.gathered + whole.stepping + whole.activations + whole.logits
    return sum(whole) - rest > available_to(settings)[0]


def on_device(found: Memory, settings: Training, zero: Mapping[str, Any]) -> Memory:
    """The estimate without what is kept in another memory than the model is computed in."""
    if not on_gpu(settings):
        return found
    if offloads(zero, "offload_optimizer"):
        found = found._replace(optimizer=0.0, stepping=0.0)
    return found._replace(weights=0.0) if offloads(zero, "offload_param") else found


def warn_where_short(model: nn.Module, settings: Training, world: int) -> None:
    """Say so where the estimate for a model that was read is more than there is."""
    zero, load, shape = zero_of(settings), load_of(settings), shape_of(model, settings)
    load = load._replace(layers=load.layers or by_layers(settings, shape, world))
    needed = on_device(memory(shape, settings.train, load, world, zero), settings, zero).needed
    if not (demand := Demand(needed, *available_to(settings), cures(settings, world))).fits:
        logger.warning(f"memory: {demand}")


def zero_of(settings: Training) -> dict[str, Any]:
    """How DeepSpeed is to share the model out."""
    return read_ds_config(settings.train.zero)["zero_optimization"]


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
    """The most padded tokens of one forward on one rank, and of one call of generation; and further models."""
    data, train = settings.data, settings.train
    longest = data.max_prompt_length + data.max_response_length * (2 if isinstance(settings, RlMasked) else 1)
    rows_each = 2 if isinstance(settings, RewardStage | RlPairs) else 1
    rows_each = settings.algorithm.settings.get("group_size", rows_each)
    tokens = train.max_tokens or train.micro_batch_size * rows_each * longest
    if not isinstance(settings, SftStage | RlStage):
        return Load(tokens, 0, buffers=on_gpu(settings))
    generation = settings.generation
    judged, new = (settings.eval.max_rows, generation.max_new_tokens)
    if isinstance(settings, SftStage):
        judged, new = settings.eval.num_samples, data.max_response_length
    calls = [(judged, generation.num_return_sequences * generation.num_beams)] if settings.eval.generate else []
    # prompts, responses to each
    if isinstance(settings, RlPolicy):
        sampler = settings.sampler
        calls.append((train.batch_size, sampler.k_max if sampler.mode == "dynamic" else sampler.k))
    if isinstance(settings, RlAdvantage) and settings.value.targets != "data":
        calls.append((settings.value.most_prompts("policy"), settings.value.samples_per_prompt))
    if isinstance(settings, RlSamples) and settings.reference_samples.targets != "data":
        calls.append((generation.batch_size, settings.reference_samples.per_prompt))
    rows = max((min(prompts, generation.batch_size) * each for prompts, each in calls), default=0)
    reference = isinstance(settings, RlPolicy) and settings.algorithm.settings.get("kl_beta", 0) > 0
    judges = judges_of(settings) if isinstance(settings, RlStage) else 0.0
    return Load(
        tokens,
        rows * (data.max_prompt_length + new),
        generation.gather == "layers",
        reference,
        judges,
        on_gpu(settings),
    )


def judges_of(settings: RlStage) -> float:
    """Bytes of the reward models that every process holds, as they were saved."""
    trained = run_dir.reward_models(settings)
    names = [name for name, _ in parse(settings.reward)] or [*trained]
    return float(sum(_saved(trained.get(name, name.rpartition(":")[0] or name)) for name in names))


def _saved(model: str, above: tuple[str, ...] = ()) -> int:
    """Bytes of the weights of a model that is here, a directory or one of the hub's, and of those below adapters."""
    folder = Path(model) if Path(model).is_dir() else _cached(model)
    if folder is None:
        return 0
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if (described := folder / ADAPTER_CONFIG).is_file():
        below = read_object(described).get("base_model_name_or_path")
        size += _saved(below, (*above, model)) if below and below not in (*above, model) else 0
    return size


def _cached(name: str) -> Path | None:
    """Where the hub's cache has a model, if it has it; None also where `name` is none of the hub's."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(name, file) for file in ("config.json", ADAPTER_CONFIG)]
    except HFValidationError:
        return None
    return next((Path(file).parent for file in found if isinstance(file, str)), None)


def available_to(settings: Training) -> tuple[float, str]:
    """Bytes that each process has on this machine or, where `gpu_memory_gb` says so, on another; and whose they are."""
    import torch

    if isinstance(settings, PlanStage) and settings.gpu_memory_gb is not None:
        return settings.gpu_memory_gb * GB, "a GPU has"
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory), "this machine's GPU has"
    return machine.ram() / settings.launch.processes, "this machine (no GPU) has"


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
        outputs=outputs_of(lm, head, settings.data.max_prompt_length, settings.data.max_response_length)
        + scores_of(known, settings),
        cache=cache_of(known),
    )


def cache_of(config: PretrainedConfig) -> float:
    """Numbers in the keys and values of a token, in all layers that generate."""
    named, heads = config.to_dict(), config.num_attention_heads
    width = named.get("head_dim") or named.get("d_kv") or config.hidden_size // heads
    layers = named.get("decoder_layers") or named.get("num_decoder_layers") or config.num_hidden_layers
    return 2.0 * layers * (named.get("num_key_value_heads") or heads) * width


def scores_of(config: PretrainedConfig, settings: Training) -> float:
    """Numbers, as `outputs_of`, in what an eager kernel keeps of a token: how it attends to each of its row.

    In float32, and under half precision once more as it is multiplied. Other kernels keep none.
    """
    if settings.model.attn_implementation != "eager":
        return 0.0
    longest = settings.data.max_prompt_length + settings.data.max_response_length
    copies = 1 if settings.train.precision == "fp32" else 3  # of the size of a weight
    return copies * config.num_hidden_layers * config.num_attention_heads * longest / KEPT


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
