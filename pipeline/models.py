"""Load or initialise policies (causal, encoder-decoder), scalar-head models, tokenizers and LoRA; save them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from pipeline.records import UserError
from pipeline.scratch import small_config, train_tokenizer
from pipeline.settings import LoraSettings, ModelSettings

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

HEADS = ["score", "classifier", "classification_head"]  # what architectures call their scalar head
PAD_NAMES = ("<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")


def load_tokenizer(settings: ModelSettings, texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, with a pad token chosen if it has none; made from `texts` without a checkpoint."""
    if settings.path is None:
        return train_tokenizer(texts, settings.scratch.vocab_size)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            settings.path, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(unreadable(settings.path, "tokenizer", error)) from None
    return with_pad(tokenizer)


def with_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with a pad token that is in its vocabulary already, EOS only if nothing else is."""
    if tokenizer.pad_token_id is not None:
        return tokenizer
    vocabulary = tokenizer.get_vocab()
    spare = next((name for name in PAD_NAMES if name in vocabulary and name != tokenizer.eos_token), None)
    tokenizer.pad_token = spare if spare is not None else tokenizer.eos_token
    return tokenizer


def load_config(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The checkpoint's configuration, or that of a small new model."""
    while (adapter := adapter_of(settings)) is not None:
        settings = under(settings, adapter)
    if settings.path is None:
        config = small_config(settings.scratch, tokenizer)
    else:
        try:
            config = AutoConfig.from_pretrained(
                settings.path, revision=settings.revision, trust_remote_code=settings.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise UserError(unreadable(settings.path, "model", error)) from None
    config.pad_token_id = tokenizer.pad_token_id
    return config


def load_policy(
    settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, seed: int, dtype: torch.dtype = torch.float32
) -> PreTrainedModel | PeftModel:
    """A causal or encoder-decoder language model with weights in `dtype`, with LoRA if asked for."""
    config = load_config(settings, tokenizer)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = _load(auto, settings, config, Making(seed, dtype, new_head=False))
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise UserError(
            f"model.path: {settings.path} has {model.get_input_embeddings().weight.shape[0]} embeddings but its "
            f"tokenizer has {len(tokenizer)} tokens, wanted no more tokens than embeddings: is it another model's?"
        )
    return with_lora(model, settings.lora, "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM")


def load_scalar(
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    new_head: bool,
    dtype: torch.dtype | str = torch.float32,
) -> PreTrainedModel | PeftModel:
    """A model with one output per sequence, weights in `dtype` ("auto": as they were saved).

    Args:
        new_head: whether a checkpoint without a scalar head (an SFT model) is welcome; its head starts at zero,
            so that every first score is 0. Otherwise such a checkpoint is an error, never a random head.
    """
    config = load_config(settings, tokenizer)
    config.num_labels = 1
    model = _load(AutoModelForSequenceClassification, settings, config, Making(seed, dtype, new_head))
    return with_lora(model, settings.lora, "SEQ_CLS")


class Making(NamedTuple):
    """How weights are made or read: the seed of new ones, their type, and whether a new scalar head is welcome."""

    seed: int
    dtype: torch.dtype | str
    new_head: bool


def _load(auto: type, settings: ModelSettings, config: PretrainedConfig, making: Making) -> PreTrainedModel:
    options = {"attn_implementation": settings.attn_implementation, "dtype": making.dtype}
    torch.manual_seed(making.seed)
    if settings.path is None:
        if settings.lora.r:
            raise UserError("model.lora.r: adapters of a new model's frozen random weights learn little: give model=")
        model = auto.from_config(config, **options)
        zero_head(model)
    elif (adapter := adapter_of(settings)) is not None:
        model = _from_adapter(auto, settings, config, adapter, options, making.new_head)
    else:
        model = _from_checkpoint(auto, settings, config, options, making.new_head)
    if settings.dropout is not None:
        set_dropout(model, settings.dropout)
    return model


def adapter_of(settings: ModelSettings) -> PeftConfig | None:
    """What `settings.path` says of itself if it holds adapters, as an earlier stage with LoRA leaves them."""
    if settings.path is None or not (Path(settings.path) / "adapter_config.json").is_file():
        return None
    adapter = PeftConfig.from_pretrained(settings.path)
    if adapter.base_model_name_or_path is None:
        raise UserError(f"model.path: the adapters of {settings.path} do not say what model they belong to")
    return adapter


def under(settings: ModelSettings, adapter: PeftConfig) -> ModelSettings:
    """The settings of the model that `adapter` was trained on."""
    return settings.model_copy(update={"path": adapter.base_model_name_or_path, "revision": adapter.revision})


def _from_adapter(
    auto: type, settings: ModelSettings, config: PretrainedConfig, adapter: PeftConfig, options: dict, new_head: bool
) -> PreTrainedModel:
    """The model under the adapters with their difference added to its weights."""
    scalar = adapter.task_type == "SEQ_CLS"
    if scalar != (auto is AutoModelForSequenceClassification) and not new_head:
        if scalar:
            raise UserError(f"{settings.path}: its adapters belong to a reward model, wanted a policy's: name another")
        raise UserError(
            f"{settings.path}: no scalar head (its adapters belong to a policy), wanted a reward model: "
            "train one with bash run.sh stage=reward"
        )
    kinds = {"SEQ_CLS": AutoModelForSequenceClassification, "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM}
    kind = kinds.get(adapter.task_type, AutoModelForCausalLM)
    base = under(settings, adapter)
    if (below := adapter_of(base)) is not None:
        model = _from_adapter(kind, base, config, below, options, new_head=scalar)
    else:
        model = _from_checkpoint(kind, base, config, options, new_head=scalar)
    model = PeftModel.from_pretrained(model, settings.path).merge_and_unload()
    if kind is not auto:  # a reward model starts from a policy
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            merged = settings.model_copy(update={"path": folder, "revision": None})
            model = _from_checkpoint(auto, merged, config, options, new_head)
    model.name_or_path = settings.path  # adapters trained on top belong to this, not to the model below
    return model


def _from_checkpoint(auto: type, settings: ModelSettings, config: PretrainedConfig, options: dict, new_head: bool):
    try:
        model, report = auto.from_pretrained(
            settings.path,
            config=config,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(unreadable(settings.path, "weights", error)) from None
    missing = sorted(report["missing_keys"])
    heads = [name for name in missing if name.split(".")[0] in HEADS]
    if len(heads) < len(missing):
        lost = [name for name in missing if name not in heads]
        raise UserError(f"model.path: {settings.path} lacks {len(lost)} weights ({lost[0]}, ...): is it whole?")
    if heads and not new_head:
        raise UserError(
            f"{settings.path}: no scalar head ({heads[0]} is missing), wanted a reward model: "
            "train one with bash run.sh stage=reward"
        )
    if heads:
        zero_head(model)
    return model


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


def with_lora(model: PreTrainedModel, lora: LoraSettings, task: str) -> PreTrainedModel | PeftModel:
    """The model with fresh adapters, its own weights frozen; the model itself when r is 0."""
    if lora.r == 0:
        return model
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type=task,
        modules_to_save=HEADS if task == "SEQ_CLS" else None,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"model.lora.target_modules: {str(error).splitlines()[0]}") from None


def hugging_face(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model itself, adapters in place, without PEFT's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def save(
    directory: Path,
    model: PreTrainedModel | PeftModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    then: Callable[[Path], None] | None = None,
) -> None:
    """Write a directory that transformers (or peft) loads, then reopen it: complete or absent.

    Args:
        weights: the whole `state_dict` of `model`, on the CPU.
        then: writes what else belongs into the directory.

    Raises:
        RuntimeError: what was written has an empty tensor or another shape than the model.
    """
    part = directory.with_name(directory.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part, state_dict=dict(weights))
    tokenizer.save_pretrained(part)
    if then is not None:
        then(part)
    verify(part, weights)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(part, directory)


def verify(directory: Path, weights: dict[str, Tensor]) -> None:
    """Reopen saved weights: none empty, shapes and number of elements as they were handed over."""
    from safetensors import safe_open

    shapes = {tuple(weight.shape) for weight in weights.values()}
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise RuntimeError(f"{directory}: no weights were written")
    for file in files:
        with safe_open(file, "pt") as saved:
            for name in saved.keys():  # noqa: SIM118  (safe_open is no mapping)
                shape = tuple(saved.get_slice(name).get_shape())
                if 0 in shape or shape not in shapes:
                    raise RuntimeError(f"{file}: {name} was saved with shape {shape}, which no weight of the model has")


def unreadable(path: str, what: str, error: Exception) -> str:
    """One line for a checkpoint that cannot be read."""
    place = Path(path)
    if place.exists() and not (place / "config.json").exists() and not (place / "adapter_config.json").exists():
        return f"model.path: {path} has no config.json, wanted a Hugging Face model directory"
    if not place.exists() and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        return f"model.path: {path} does not exist, wanted a directory or a Hugging Face name"
    reason = " ".join(str(error).split())[:200]
    return f"model.path: the {what} of {path} cannot be read ({reason})"
