"""The files of a model directory: adapters, the model below them, the tokenizer and how text is generated."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from pipeline.config.sections import GenerationSettings
from pipeline.errors import ROOM, UserError
from pipeline.files import CARD
from pipeline.models import checks, lora, mask_token

TOKENIZER_CONFIG = "tokenizer_config.json"
# what changes nothing where it has this value
NEUTRAL = {"min_new_tokens": 0, "no_repeat_ngram_size": 0, "repetition_penalty": 1.0}


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
        shutil.copymode(part / TOKENIZER_CONFIG, file)
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
    (directory / CARD).unlink(missing_ok=True)  # a form to be filled in
    return weights


def write_base(
    directory: Path,
    model: PeftModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    ends: Collection[int],
    generation: GenerationSettings | None,
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
    write_rest(directory, lm, tokenizer, ends, generation)
    checks.verify(directory, plain, below)


def write_rest(
    directory: Path,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ends: Collection[int],
    generation: GenerationSettings | None,
) -> None:
    """The tokenizer, and how text is generated, for transformers 4 too."""
    tokenizer.save_pretrained(directory)
    if lm.can_generate():  # beside adapters too
        config = copy.deepcopy(lm.generation_config) if generation is None else decoding(generation, lm, tokenizer)
        ids = end_ids(lm, ends)
        config.eos_token_id = ids[0] if len(ids) == 1 else ids or None
        config.suppress_tokens = mask_token.suppressed_ids(tokenizer, lm) or config.suppress_tokens
        # not `save_pretrained`, which refuses what some published ones have: a temperature, but no sampling
        config.to_json_file(directory / GENERATION_CONFIG_NAME)
    write_for_4(directory)


def write_for_4(directory: Path) -> None:
    """Say in the words of transformers 4, too, what the files about tokenizer and configuration say in those of 5."""
    for name, in_words_of_4 in ((TOKENIZER_CONFIG, _tokenizer_for_4), (CONFIG_NAME, _positions_for_4)):
        if (file := directory / name).is_file():
            told = in_words_of_4(json.loads(file.read_text(encoding="utf-8")))
            file.write_text(json.dumps(told, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def decoding(settings: GenerationSettings, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """How the stage itself generates: `settings`, and of what the checkpoint brought only what begins a response."""
    named = {"max_new_tokens", "do_sample"} | {name for name in NEUTRAL if getattr(settings, name) != NEUTRAL[name]}
    named |= {"temperature", "top_p", "top_k"} if settings.do_sample else set()
    named |= {"num_beams", "length_penalty", "early_stopping"} if settings.num_beams > 1 else set()
    return GenerationConfig(
        **settings.model_dump(include=named),
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=lm.config.to_dict().get("decoder_start_token_id"),
        forced_bos_token_id=lm.generation_config.forced_bos_token_id,
    )


def _tokenizer_for_4(told: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with the names that transformers 4 knows, which 5 reads too."""
    if told["tokenizer_class"] == "TokenizersBackend":
        told["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(told.get("extra_special_tokens"), list):
        told["additional_special_tokens"] = told.pop("extra_special_tokens")
    return told


def _positions_for_4(told: dict[str, Any]) -> dict[str, Any]:
    """config.json with the rotation of positions where transformers 4 looks; where it finds none, it takes 10,000."""
    rope = told.get("rope_parameters") or {}
    if "rope_theta" in rope:  # else one for each kind of layer
        told["rope_theta"] = rope["rope_theta"]
        if rope["rope_type"] != "default":
            told["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        if "partial_rotary_factor" in rope:
            told["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return told


def end_ids(model: PreTrainedModel, more: Collection[int]) -> list[int]:
    """The ids that end a response: those of the checkpoint's own generation configuration, then `more`."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys(i for i in (*own, *sorted(more)) if i < model.config.get_text_config().vocab_size))
