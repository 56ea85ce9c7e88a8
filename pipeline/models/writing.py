"""The files of a model directory: adapters, the model below them, the tokenizer and how text is generated."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from pipeline.errors import ROOM, UserError
from pipeline.models import checks, lora, mask_token


@contextmanager
def whole(directory: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `directory` at the end; who may read the tokenizer may read the weights.

    Raises UserError where the disk refuses, and leaves nothing then.
    """
    part = directory.with_name(directory.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        yield part
    except Exception as error:  # safetensors and tokenizers have no class of their own for what the system refuses
        if "os error" not in str(error):
            raise
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{part}: cannot be written ({error}), {ROOM}") from None
    for file in part.glob("*.safetensors"):  # which safetensors writes for their owner alone
        shutil.copymode(part / "tokenizer_config.json", file)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(part, directory)


def write_weights(
    directory: Path, model: PreTrainedModel, weights: dict[str, Tensor], dtype: torch.dtype | None
) -> None:
    """All weights, in `dtype` (None: as they are) but for those that the architecture reads in float32 all the same."""
    weights = dict(weights)
    if dtype is None:
        model.save_pretrained(directory, state_dict=weights)
        return
    exact = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    cast = {}
    for name, weight in weights.items():
        if weight.is_floating_point() and exact.isdisjoint(name.split(".")):
            weights[name] = cast.setdefault((weight.data_ptr(), weight.shape), weight.to(dtype))  # tied ones stay one
    model.save_pretrained(directory, state_dict=weights)
    config = copy.deepcopy(model.config)
    config.dtype = config.get_text_config().dtype = dtype
    config.save_pretrained(directory)


def write_adapters(directory: Path, model: PeftModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """All adapters of `model` as one."""
    own = model.peft_config[lora.TRAINED]
    weights, model.peft_config[lora.TRAINED] = lora.exported(model, weights)
    options = {"selected_adapters": [lora.TRAINED], "save_embedding_layers": False}
    model.save_pretrained(directory, state_dict=dict(weights), **options)
    model.peft_config[lora.TRAINED] = own
    return weights


def write_base(
    directory: Path,
    model: PeftModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    ends: Collection[int],
) -> None:
    """The model below the adapters, where no other directory holds it."""
    lm, below = model.get_base_model(), lora.weights_below(weights)
    with torch.device("meta"):
        plain = type(lm)(copy.deepcopy(lm.config))
    if strange := sorted(below.keys() - plain.state_dict().keys()):
        raise RuntimeError(f"{directory}: {strange[0]} is no weight of a {type(lm).__name__}")
    if lm.can_generate():
        plain.generation_config = lm.generation_config
    plain.save_pretrained(directory, state_dict=dict(below))
    write_rest(directory, lm, tokenizer, ends)
    checks.verify(directory, plain, below)


def write_rest(directory: Path, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> None:
    """The tokenizer, and how text is generated: where it ends, and what must not be in it."""
    tokenizer.save_pretrained(directory)
    if lm.can_generate():  # beside adapters too
        generation = copy.deepcopy(lm.generation_config)
        ids = end_ids(lm, ends)
        generation.eos_token_id = ids[0] if len(ids) == 1 else ids or None
        generation.suppress_tokens = mask_token.suppressed_ids(tokenizer, lm) or generation.suppress_tokens
        # not `save_pretrained`, which refuses what some published ones have: a temperature, but no sampling
        generation.to_json_file(directory / GENERATION_CONFIG_NAME)


def end_ids(model: PreTrainedModel, more: Collection[int]) -> list[int]:
    """The ids that end a response: those of the checkpoint's own generation configuration, then `more`."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys(i for i in (*own, *sorted(more)) if i < model.config.get_text_config().vocab_size))
