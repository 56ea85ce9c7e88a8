"""The files of a model directory: adapters, the model below them, the tokenizer and what must not be generated."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

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


def write_adapters(directory: Path, model: PeftModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """All adapters of `model` as one."""
    own = model.peft_config[lora.TRAINED]
    weights, model.peft_config[lora.TRAINED] = lora.exported(model, weights)
    options = {"selected_adapters": [lora.TRAINED], "save_embedding_layers": False}
    model.save_pretrained(directory, state_dict=dict(weights), **options)
    model.peft_config[lora.TRAINED] = own
    return weights


def write_base(
    directory: Path, model: PeftModel, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase
) -> None:
    """The model below the adapters, where no other directory holds it."""
    lm, below = model.get_base_model(), lora.weights_below(weights)
    with torch.device("meta"):
        plain = type(lm)(copy.deepcopy(lm.config))
    if lm.can_generate():
        plain.generation_config = lm.generation_config
    plain.save_pretrained(directory, state_dict=dict(below))
    write_rest(directory, lm, tokenizer)
    checks.verify(directory, below)


def write_rest(directory: Path, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokenizer, and what must not be generated."""
    tokenizer.save_pretrained(directory)
    if lm.can_generate() and (suppressed := mask_token.suppressed_ids(tokenizer, lm)):
        generation = copy.deepcopy(lm.generation_config)
        generation.suppress_tokens = suppressed
        generation.save_pretrained(directory)
