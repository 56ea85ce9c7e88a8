"""Load or initialise policies (causal, encoder-decoder), scalar-head models and tokenizers; save them."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.config.sections import ModelSettings
from pipeline.errors import ROOM, UserError
from pipeline.models import checks, mask_token
from pipeline.models.checks import NO_REWARD_MODEL, reading
from pipeline.models.lora import adapter_of, under, with_lora
from pipeline.models.scratch import small_config, train_tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

PAD_NAMES = ("<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")


def load_tokenizer(settings: ModelSettings, texts: Sequence[str], mask: bool = False) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, with a pad token chosen if it has none; made from `texts` without a checkpoint.

    `mask`: the tokenizer shall have a mask token.
    """
    if settings.path is None:
        tokenizer = train_tokenizer(texts, settings.scratch.vocab_size)
    else:
        tokenizer = with_pad(_read_tokenizer(settings))
    return mask_token.with_mask(tokenizer) if mask else tokenizer


def _read_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer as it is."""
    checks.check_files(settings.path)
    with reading(settings.path, "tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(settings.path, **_version(settings))


def _version(settings: ModelSettings) -> dict[str, Any]:
    """Which files of a checkpoint are read, and whether code among them is run."""
    return {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}


def with_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer with a pad token that is in its vocabulary already, EOS only if nothing else is."""
    if tokenizer.pad_token_id is None:
        vocabulary = tokenizer.get_vocab()
        spare = (name for name in PAD_NAMES if name in vocabulary and name != tokenizer.eos_token)
        tokenizer.pad_token = next(spare, tokenizer.eos_token)
    return tokenizer


def load_config(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The checkpoint's configuration, or that of a small new model."""
    passed: list[str | None] = []
    while (adapter := adapter_of(settings)) is not None:  # adapters may lie on adapters
        passed.append(settings.path)
        settings = under(settings, adapter)
        if settings.path in passed:
            problem = f"the adapters of {settings.path} name themselves as the model below them"
            raise UserError(f"model.path: {problem}, wanted another")
    if settings.path is None:
        config = small_config(settings.scratch, tokenizer)
    else:
        with reading(settings.path, "model"):
            config = transformers.AutoConfig.from_pretrained(settings.path, **_version(settings))
    config.pad_token_id = tokenizer.pad_token_id
    return config


def load_policy(
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    dtype: torch.dtype = torch.float32,
    mask: bool = False,
) -> PreTrainedModel | PeftModel:
    """A causal or encoder-decoder language model with weights in `dtype`, with LoRA if requested.

    `mask`: the model shall read the tokenizer's mask token, and learn its embedding under LoRA too.
    """
    config = load_config(settings, tokenizer)
    checks.check_kind(settings.path, config)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    torch.manual_seed(seed)
    model = _load(auto, settings, config, dtype, new_head=False)
    if config.is_encoder_decoder:
        start_from_forced(model)
    mask = mask or mask_token.lacks_row(model, tokenizer)
    if mask and settings.path is not None:
        known = _read_tokenizer(settings).mask_token_id == tokenizer.mask_token_id
        mask_token.give_row(model, tokenizer, known)
    checks.check_vocabulary(settings.path, model, tokenizer)
    task = "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"
    return with_lora(model, settings.lora, task, [tokenizer.mask_token_id] if mask else None)


def load_scalar(
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    new_head: bool,
    dtype: torch.dtype | str = torch.float32,
) -> PreTrainedModel | PeftModel:
    """A model with one output per sequence, weights in `dtype` ("auto": as they were saved).

    `new_head`: whether a checkpoint without a scalar head (an SFT model) is welcome; its head starts at zero, so that
    every first score is 0. Otherwise such a checkpoint is an error, never a random head.
    """
    config = load_config(settings, tokenizer)
    config.num_labels = 1
    torch.manual_seed(seed)
    model = _load(transformers.AutoModelForSequenceClassification, settings, config, dtype, new_head)
    checks.check_vocabulary(settings.path, model, tokenizer)
    return with_lora(model, settings.lora, "SEQ_CLS")


def _load(
    auto: type, settings: ModelSettings, config: PretrainedConfig, dtype: torch.dtype | str, new_head: bool
) -> PreTrainedModel:
    """A model of the class `auto`: a new one, or what `settings.path` holds."""
    options = {"attn_implementation": settings.attn_implementation, "dtype": dtype}
    if settings.path is not None:
        model = _from_path(auto, settings, config, options, new_head)
    elif settings.lora.r:
        raise UserError("model.lora.r: adapters of a new model's frozen random weights learn little: give model=")
    else:
        try:
            model = auto.from_config(config, **options)
        except (ImportError, ValueError) as error:
            problem = f"{settings.attn_implementation} ({' '.join(str(error).split())})"
            raise UserError(f"model.attn_implementation: {problem}: set sdpa") from None
        zero_head(model)
    if settings.dropout is not None:
        set_dropout(model, settings.dropout)
    return model


def _from_path(
    auto: type, settings: ModelSettings, config: PretrainedConfig, options: dict[str, Any], new_head: bool
) -> PreTrainedModel:
    """A checkpoint's weights; or the model under adapters, with their difference added to its weights."""
    if (adapter := adapter_of(settings)) is None:
        return _from_checkpoint(auto, settings, config, options, new_head)
    scalar = adapter.task_type == "SEQ_CLS"
    if scalar != (auto is transformers.AutoModelForSequenceClassification) and not new_head:
        if scalar:
            raise UserError(f"{settings.path}: its adapters belong to a reward model, wanted a policy's: name another")
        raise UserError(f"{settings.path}: no scalar head (its adapters belong to a policy), {NO_REWARD_MODEL}")
    kinds = {
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    }
    kind = kinds.get(adapter.task_type, transformers.AutoModelForCausalLM)
    model = _from_path(kind, under(settings, adapter), config, options, new_head=scalar)
    mask_token.grow_for(model, adapter)
    with reading(settings.path, "adapters"):
        model = PeftModel.from_pretrained(model, settings.path).merge_and_unload()
    if kind is not auto:  # a reward model starts from a policy
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            merged = settings.model_copy(update={"path": folder, "revision": None})
            config = copy.deepcopy(config)
            config.get_text_config().vocab_size = model.config.get_text_config().vocab_size
            model = _from_checkpoint(auto, merged, config, options, new_head)
    model.name_or_path = settings.path  # adapters trained on top belong to this, not to the model below
    return model


def _from_checkpoint(
    auto: type, settings: ModelSettings, config: PretrainedConfig, options: dict[str, Any], new_head: bool
) -> PreTrainedModel:
    options = {**options, **_version(settings), "output_loading_info": True}
    with reading(settings.path, "weights"):  # `check_report` names mismatched sizes
        model, report = auto.from_pretrained(settings.path, config=config, ignore_mismatched_sizes=True, **options)
    if checks.check_report(settings.path, report, model, new_head):
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


def save(
    directory: Path,
    model: PreTrainedModel | PeftModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    then: Callable[[Path], None] | None = None,
) -> None:
    """Write a directory that transformers (or peft) loads, then reopen it: complete or absent.

    `weights` is the whole `state_dict` of `model`, on the CPU; `then` writes what else belongs into the directory.
    Raises RuntimeError where what was written has an empty tensor or another shape than the model.
    """
    part = directory.with_name(directory.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    _write(part, model, weights, tokenizer)
    if then is not None:
        then(part)
    checks.verify(part, model, weights)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(part, directory)


def _write(
    directory: Path, model: PreTrainedModel | PeftModel, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Weights, configuration and tokenizer. Raises UserError where the disk refuses, and leaves nothing then."""
    lm = hugging_face(model)
    try:
        options = {}
        if isinstance(model, PeftModel) and model.active_peft_config.trainable_token_indices is not None:
            options = {"save_embedding_layers": False}  # the adapters hold the embeddings that were trained
        model.save_pretrained(directory, state_dict=dict(weights), **options)
        tokenizer.save_pretrained(directory)
        if lm.can_generate() and (suppressed := mask_token.suppressed_ids(tokenizer, lm)):
            generation = copy.deepcopy(lm.generation_config)
            generation.suppress_tokens = suppressed
            generation.save_pretrained(directory)
    except Exception as error:  # safetensors and tokenizers have no class of their own for what the system refuses
        if "os error" not in str(error):
            raise
        shutil.rmtree(directory, ignore_errors=True)
        raise UserError(f"{directory}: cannot be written ({error}), {ROOM}") from None


def start_from_forced(model: PreTrainedModel) -> None:
    """Start the decoder from the token that generation forces first, in what is saved too.

    Otherwise a checkpoint would spend its first words' probability on that token, and the `generate` of transformers
    would force a token that training never showed.
    """
    generation = model.generation_config
    if generation is not None and isinstance(generation.forced_bos_token_id, int):
        model.config.decoder_start_token_id = generation.decoder_start_token_id = generation.forced_bos_token_id
        generation.forced_bos_token_id = None
