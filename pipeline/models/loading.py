"""Load or initialise policies (causal, encoder-decoder) and scalar-head models."""

from __future__ import annotations

import copy
import importlib.util
import logging
from dataclasses import replace
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config import together
from pipeline.config.sections import ModelSettings
from pipeline.errors import UserError
from pipeline.models import checks, lora, mask_token, tokenizers
from pipeline.models.checks import NO_REWARD_MODEL, reading
from pipeline.models.late import Late, make_again, type_of_files
from pipeline.models.lora import Base, with_lora
from pipeline.models.place import reading_options
from pipeline.models.scratch import small_config

logger = logging.getLogger("tiffin")

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

KINDS = {  # by the tasks of adapters
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
}


def load_config(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The checkpoint's configuration, or that of a small new model."""
    _, settings = lora.layers_of(settings)
    if settings.path is None:
        config = small_config(settings.scratch, tokenizer)
    else:
        with reading(settings.path, "model"):
            config = transformers.AutoConfig.from_pretrained(settings.path, **reading_options(settings))
    config.pad_token_id = tokenizer.pad_token_id
    return config


def load_policy(
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    dtype: torch.dtype = torch.float32,
    mask: bool = False,
    frozen: bool = False,
    late: Late | None = None,
) -> PreTrainedModel | PeftModel:
    """A causal or encoder-decoder language model with weights in `dtype`, with LoRA if requested.

    `mask`: the model shall read the tokenizer's mask token, and learn its embedding under LoRA too; `frozen`: it is
    only read, so that nothing is added for training; `late`: weights stay in their files, see `Late`.
    """
    config = load_config(settings, tokenizer)
    checks.check_kind(settings.path, config)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    torch.manual_seed(seed)
    model, base = _load(auto, settings, config, dtype, new_head=False, late=late)
    rows = model.get_input_embeddings().weight.shape[0]
    mask = mask or mask_token.lacks_row(model, tokenizer)
    if mask and settings.path is not None:
        read_embeddings(model, late)
        known = tokenizers.read_tokenizer(settings).mask_token_id == tokenizer.mask_token_id
        mask_token.give_row(model, tokenizer, known)
    checks.check_vocabulary(settings.path, model, tokenizer)
    if model.get_input_embeddings().weight.shape[0] != rows:
        base = replace(base, path=None)
    task = "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"
    tokens = [tokenizer.mask_token_id] if mask else []
    return with_lora(model, base, None if frozen else settings.lora, task, tokens, late)


def load_scalar(
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    new_head: bool,
    dtype: torch.dtype | str = torch.float32,
    outputs: int = 1,
    late: Late | None = None,
) -> PreTrainedModel | PeftModel:
    """A model with one output per sequence, or `outputs`, weights in `dtype` ("auto": as they were saved).

    `new_head`: it is to be trained, and a checkpoint without a scalar head (an SFT model) is welcome; its head starts
    at zero, so that every first score is 0. Otherwise it is only read, and such a checkpoint is an error, never a
    random head. `late`: weights stay in their files, see `Late`.
    """
    config, pad_id = load_config(settings, tokenizer), tokenizer.pad_token_id
    config.num_labels = outputs
    if lacking := new_head and pad_id == config.get_text_config().vocab_size:  # see `tokenizers.with_pad_apart`
        config.pad_token_id = None
    torch.manual_seed(seed)
    auto = transformers.AutoModelForSequenceClassification
    model, base = _load(auto, settings, config, dtype, new_head, late)
    if lacking:
        read_embeddings(model, late)
        mask_token.grow(model, pad_id + 1)
        base = replace(base, path=None)
    for part in (model.config, model.config.get_text_config()):
        part.pad_token_id = pad_id
    checks.check_vocabulary(settings.path, model, tokenizer)
    return with_lora(model, base, settings.lora if new_head else None, "SEQ_CLS", late=late)


def files_type(settings: ModelSettings, dtype: torch.dtype | str, late: Late | None) -> torch.dtype | str:
    """The type that weights are opened in: `dtype`; or that of their files, in which these stay mapped.

    Not where the files have several types, nor below adapters that change more than a product of matrices.
    """
    layers, below = lora.layers_of(settings)
    if late is None or below.path is None:
        return dtype
    own = type_of_files(below) if all(lora.is_plain(adapter) for _, adapter in layers) else None
    if own is None:
        why = "its files are no safetensors, or of several types, or adapters on it are no plain ones"
        logger.info(f"model: {settings.path} is read whole by every process before it is cut into parts: {why}")
    return own or dtype


def read_buffers(model: PreTrainedModel, late: Late) -> None:
    """Numbers of the files that are not weights in the type that they are to have: they are never cut."""
    exact, saved = {*(model._keep_in_fp32_modules_strict or ())}, model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point() and exact.isdisjoint(name.split(".")):
            buffer.data = buffer.data.to(late.dtype)


def read_embeddings(model: PreTrainedModel, late: Late | None) -> None:
    """The embeddings and the output matrix in the type that they are to have, before they grow."""
    _read(late, model.get_input_embeddings(), model.get_output_embeddings())


def _read(late: Late | None, *parts: nn.Module | None) -> None:
    for part in parts if late is not None else ():
        for parameter in () if part is None else part.parameters():
            parameter.data = parameter.data.to(late.dtype, copy=True)


def _load(
    auto: type,
    settings: ModelSettings,
    config: PretrainedConfig,
    dtype: torch.dtype | str,
    new_head: bool,
    late: Late | None,
) -> tuple[PreTrainedModel, Base]:
    """A model of the class `auto`: a new one, or what `settings.path` holds, without the adapters that it names."""
    options = {"attn_implementation": settings.attn_implementation, "dtype": files_type(settings, dtype, late)}
    base = Base(None)
    if settings.path is not None:
        model, base = _from_path(auto, settings, config, options, new_head, late)
        if late is not None:
            read_buffers(model, late)
    else:
        together.adapters(settings)
        try:
            model = auto.from_config(config, **options)
        except (ImportError, ValueError) as error:
            problem = f"{settings.attn_implementation} ({' '.join(str(error).split())})"
            raise UserError(f"model.attn_implementation: {problem}: set sdpa") from None
        zero_head(model)
    if settings.dropout is not None:
        set_dropout(model, settings.dropout)
    return model, base


def _from_path(
    auto: type,
    settings: ModelSettings,
    config: PretrainedConfig,
    options: dict[str, Any],
    new_head: bool,
    late: Late | None,
) -> tuple[PreTrainedModel, Base]:
    """A checkpoint's weights; or the model below adapters, and what there is of those that are not in its weights."""
    layers, below = lora.layers_of(settings)
    base = Base(lora.place(below.path), below.revision)
    if not layers:
        return _from_checkpoint(auto, settings, config, options, new_head, late), base
    scalar = layers[-1][1].task_type == "SEQ_CLS"
    if scalar != (auto is transformers.AutoModelForSequenceClassification) and not new_head:
        if scalar:
            raise UserError(f"{settings.path}: its adapters belong to a reward model, wanted a policy's: name another")
        raise UserError(f"{settings.path}: no scalar head (its adapters belong to a policy), {NO_REWARD_MODEL}")
    kinds = [KINDS.get(adapter.task_type, transformers.AutoModelForCausalLM) for _, adapter in layers]
    model = _from_checkpoint(kinds[0], below, config, options, scalar, late)
    for (path, adapter), kind, following in zip(layers, kinds, [*kinds[1:], auto], strict=True):
        model, base = _without_adapters(model, base, path, adapter, late)
        if following is not kind:  # a reward model starts from a policy
            model = _reopened(following, model, settings, config, options, new_head, late)
    model.name_or_path = settings.path
    return model, base


def _without_adapters(
    model: PreTrainedModel, base: Base, path: str, adapter: PeftConfig, late: Late | None
) -> tuple[PreTrainedModel, Base]:
    """The model below the adapters in `path`, and those; or with them, where they are no plain ones."""
    if tokens := lora.tokens_of(adapter):
        read_embeddings(model, late)
    _read(late, *(part for name, part in model.named_children() if name in checks.HEADS))  # which adapters may bring
    if mask_token.grow_for(model, tokens):
        base = replace(base, path=None)
    plain = lora.is_plain(adapter)
    if not plain:
        model = lora.merged(model, base)
        lora.warn_of_rounding(model.dtype, path)
    with lora.frozen_as_before(model):
        with reading(path, "adapters"):
            opened = PeftModel.from_pretrained(model, path)
        return lora.taken_out(opened, base) if plain else (opened.merge_and_unload(), Base(None))


def _reopened(
    auto: type,
    model: PreTrainedModel,
    settings: ModelSettings,
    config: PretrainedConfig,
    options: dict[str, Any],
    new_head: bool,
    late: Late | None,
) -> PreTrainedModel:
    """The same weights as a model of the class `auto`; by no file: transformers writes on the first rank alone."""
    config = copy.deepcopy(config)
    config.get_text_config().vocab_size = model.config.get_text_config().vocab_size
    with reading(settings.path, "weights"), torch.device("meta"):
        kind = type(auto.from_config(config, trust_remote_code=settings.trust_remote_code))
    return _from_checkpoint(kind, settings, config, options, new_head, late, model.state_dict())


def _from_checkpoint(
    auto: type,
    settings: ModelSettings,
    config: PretrainedConfig,
    options: dict[str, Any],
    new_head: bool,
    late: Late | None = None,
    weights: dict[str, Tensor] | None = None,
) -> PreTrainedModel:
    """What `settings.path` holds, or `weights`, as a model of the class `auto`."""
    options = {**options, **reading_options(settings), "state_dict": weights, "output_loading_info": True}
    if settings.load_in_4bit and weights is None:
        options["quantization_config"] = four_bits(options["dtype"])
    random = torch.get_rng_state()
    with reading(settings.path, "weights"):  # `check_report` names mismatched sizes
        place = settings.path if weights is None else None
        model, report = auto.from_pretrained(place, config=config, ignore_mismatched_sizes=True, **options)
    if late is not None and options["dtype"] != late.dtype:
        torch.set_rng_state(random)
        make_again(model, options["dtype"], late.dtype)
    if checks.check_report(settings.path, report, model, new_head):
        zero_head(model)
    return model


def four_bits(dtype: torch.dtype) -> transformers.BitsAndBytesConfig:
    """How QLoRA keeps the weights below adapters: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3.

    `dtype` is that of computing. Raises UserError where bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"model.load_in_4bit: {together.NO_BITSANDBYTES}")
    kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return transformers.BitsAndBytesConfig(load_in_4bit=True, **kind)


def zero_head(model: PreTrainedModel) -> None:
    """Start a decoder's fresh scalar head at zero: every first score is 0 and the body decides where it goes."""
    if isinstance(head := dict(model.named_children()).get("score"), nn.Linear):
        nn.init.zeros_(head.weight)


def set_dropout(model: nn.Module, rate: float) -> None:
    """One rate for every dropout: the modules and the rates that attention reads from attributes."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        for name in ("dropout", "attention_dropout", "activation_dropout", "attn_dropout", "dropout_rate"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, rate)


def hugging_face(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model itself, adapters in place, without PEFT's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def body(lm: PreTrainedModel) -> nn.Module:
    """What `lm` computes its last hidden states with. Raises UserError where that is no part of its own."""
    if (base := lm.base_model) is not lm:
        return base
    if (part := dict(lm.named_children()).get("model")) is None:  # Llama 4 has one under another name than it says
        raise UserError(f"model.path: {type(lm).__name__} has no body apart from its head: name another model")
    return part
