"""A model's weights with its adapters added to them, one module at a time: never a second whole copy in memory.

transformers reads safetensors by memory map, so that the model below costs no memory of the process while nothing
changes it. Each adapted module is copied in float32 by itself, and peft adds its own adapters to that copy: what comes
is what `merge_and_unload` makes of the whole model in float32, for every kind of adapter that peft can merge.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from pipeline.config.sections import ModelSettings
from pipeline.errors import UserError
from pipeline.models import loading, lora, mask_token, tokenizers
from pipeline.models.checks import HEADS, NO_LANGUAGE_MODEL, reading
from pipeline.models.shards import written_once

logger = logging.getLogger("tiffin")

AS_READ = "auto"  # the type that a checkpoint says of itself


@dataclass(frozen=True)
class Parts:
    """A model and the adapters upon it, apart."""

    lm: PreTrainedModel  # what adapters brought besides those of `adapted`, a head and embeddings of tokens, is in it
    adapted: dict[str, BaseTunerLayer]  # name of a module of `lm` -> that module within its adapters
    dtype: torch.dtype  # of the model as it was read


def opened(settings: ModelSettings) -> Parts:
    """The model of `settings` in the type that it is in. Raises UserError where it or its adapters cannot be merged."""
    settings = settings.model_copy(update={"lora": settings.lora.model_copy(update={"r": 0})})
    layers, below = lora.layers_of(settings)
    scalar = scores(settings)
    tokenizer = tokenizers.load_tokenizer(settings, [], scalar=scalar)
    config = loading.load_config(settings, tokenizer)
    if "quantization_config" in config.to_dict():
        raise UserError(
            f"{below.path}: its weights are quantized, wanted whole ones: export from the model before that"
        )
    if len(layers) != 1:  # adapters upon adapters are taken together, see `loading`
        model = _whole(settings, tokenizer, scalar, new_head=False)
        return _apart(model, loading.hugging_face(model).dtype)
    path, adapter = layers[0]
    if adapter.is_prompt_learning:
        raise UserError(f"{path}: adapters of the kind {adapter.peft_type.value} cannot be merged, wanted merge=false")
    brought = scalar and bool({*HEADS} & {*(vars(adapter).get("modules_to_save") or ())})
    lm = _whole(below, tokenizer, scalar, new_head=brought)
    dtype = lm.dtype
    mask_token.grow_for(lm, lora.tokens_of(adapter))
    _widen(lm, adapter)
    with reading(path, "adapters"):
        return _apart(PeftModel.from_pretrained(lm, path), dtype)


def scores(settings: ModelSettings) -> bool:
    """Whether it is a reward model."""
    layers, below = lora.layers_of(settings)
    if layers:
        return layers[-1][1].task_type == "SEQ_CLS"
    with reading(below.path, "model"):
        config, _ = PretrainedConfig.get_config_dict(below.path, revision=below.revision)
    return any(name.endswith(NO_LANGUAGE_MODEL[0]) for name in config.get("architectures") or ())


def _whole(
    settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, scalar: bool, new_head: bool
) -> PreTrainedModel | PeftModel:
    if scalar:
        return loading.load_scalar(settings, tokenizer, 0, new_head, AS_READ)
    return loading.load_policy(settings, tokenizer, 0, AS_READ, frozen=True)


def _widen(lm: PreTrainedModel, adapter: PeftConfig) -> None:
    """Have in float32 what adapters replace: the heads and embeddings that they bring are not rounded on the way."""
    told = vars(adapter)
    names = {*(told.get("modules_to_save") or ())}
    tokens = told.get("trainable_token_indices") or []
    names |= {*tokens} if isinstance(tokens, dict) else set()
    for name, module in lm.named_modules():
        embeds = isinstance(tokens, list) and tokens and module is lm.get_input_embeddings()
        if embeds or any(name == one or name.endswith(f".{one}") for one in names):
            module.float()  # the same parameters with other values: what is tied stays tied


def _apart(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> Parts:
    """The model without the layers of its adapters, which still hold its modules."""
    if not isinstance(model, PeftModel):
        return Parts(model, {}, dtype)
    lm, adapted = model.get_base_model(), {}
    within: tuple[str, ...] = ()
    for name, layer in [*lm.named_modules()]:
        if name.startswith(within):
            continue
        if isinstance(layer, BaseTunerLayer):
            adapted[name] = layer
            lm.set_submodule(name, layer.get_base_layer())
        if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
            within += (f"{name}.",)
    return Parts(model.merge_and_unload(), adapted, dtype)


def written(parts: Parts) -> list[str]:
    """The names of the weights that a file of `parts.lm` holds: all, but of tied ones one.

    Those of which only one is adapted are tied no longer, and the configuration says so then. Raises UserError where an
    encoder-decoder's are: it may scale its states by whether they are tied.
    """
    lm, state = parts.lm, parts.lm.state_dict()
    tied = {name: source for name, source in lm.all_tied_weights_keys.items() if {name, source} <= {*state}}
    adapted = {name for pair in tied.items() for name in pair if name.rpartition(".")[0] in parts.adapted}
    apart = {
        name
        for name, source in tied.items()
        if {name, source} & adapted or state[name].data_ptr() != state[source].data_ptr()
    }
    if apart and lm.config.is_encoder_decoder:
        problem = f"adapters change {min(adapted or apart)}, which is tied to others"
        raise UserError(f"{lm.name_or_path}: {problem}, wanted those of other modules: export with merge=false")
    if apart:
        lm.config.tie_word_embeddings = lm.config.get_text_config().tie_word_embeddings = False
        logger.info(f"adapters change {min(adapted or apart)}, which was tied: the merged model has it twice")
    left_out = {*(lm._keys_to_ignore_on_save or ())}
    names = written_once(state, {name: source for name, source in tied.items() if name not in apart})
    return [name for name in names if name not in left_out]


def merged(parts: Parts, names: list[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The weights of `names` with their adapters in `dtype`, by the names that files of the architecture have.

    Weights that the architecture reads in float32 all the same stay in it. Raises UserError where a number is too large
    for `dtype`.
    """
    lm, state = parts.lm, parts.lm.state_dict()
    exact = {*(lm._keep_in_fp32_modules or ()), *(lm._keep_in_fp32_modules_strict or ())}
    last, module = "", nn.Module()
    for name in names:
        weight, (owner, _, own) = state[name], name.rpartition(".")
        if owner in parts.adapted:
            if owner != last:  # those of one module come one after another
                last, module = owner, _with_adapters(parts.adapted[owner])
            weight = module.state_dict()[own]
        if weight.is_floating_point() and exact.isdisjoint(name.split(".")):
            weight = cast(name, weight, dtype)
        yield from revert_weight_conversion(lm, {name: weight}).items()


def shapes(parts: Parts, names: list[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of what `merged` gives, by the names that files have."""
    state = parts.lm.state_dict()
    whole = revert_weight_conversion(parts.lm, {name: state[name].to("meta") for name in names})
    return {name: tuple(weight.shape) for name, weight in whole.items()}


@torch.no_grad()
def _with_adapters(layer: BaseTunerLayer) -> nn.Module:
    """A copy of the module within `layer` in float32, with what the adapters add."""
    own = copy.deepcopy(layer).float()
    if isinstance(own, ParamWrapper):  # of experts, one in another for each of their tensors
        return own.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    own.merge()
    return own.get_base_layer()


def cast(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`. Raises UserError where a number is too large for it."""
    other = weight.to(dtype)
    if dtype == torch.float16 and bool((other.isinf() & weight.isfinite()).any()):
        largest = weight.abs().max().item()
        raise UserError(f"dtype: float16, but {name} reaches {largest:.4g}, wanted at most 65504: take bfloat16")
    return other
