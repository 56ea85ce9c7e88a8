"""The files of a model directory: adapters, the model below them, the tokenizer and how text is generated."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from pipeline.config.generation import GenerationSettings
from pipeline.errors import ROOM, UserError
from pipeline.files import CARD
from pipeline.models import checks, lora, mask_token
from pipeline.models.checks import Shapes
from pipeline.models.loading import hugging_face
from pipeline.models.shards import write_shards

TOKENIZER_CONFIG = "tokenizer_config.json"
SHARD = 5_000_000_000  # bytes of weights in a file
# what changes nothing where it has this value
NEUTRAL = {"min_new_tokens": 0, "no_repeat_ngram_size": 0, "repetition_penalty": 1.0}


@contextmanager
def whole(directory: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `directory` at the end; who may read the tokenizer may read the weights.

    Raises UserError where the disk refuses, and leaves nothing then.
    """
    part, old = directory.with_name(directory.name + ".part"), set_aside(directory)
    shutil.rmtree(part, ignore_errors=True)
    try:
        yield part
    except Exception as error:  # safetensors and tokenizers have no class of their own for what the system refuses
        shutil.rmtree(part, ignore_errors=True)
        if "os error" not in str(error):
            raise
        raise UserError(f"{part}: cannot be written ({error}), {ROOM}") from None
    for file in part.glob("*.safetensors"):  # which safetensors writes for their owner alone
        shutil.copymode(part / TOKENIZER_CONFIG, file)
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():  # removing much takes long, and whoever is killed meanwhile shall have one or the other
        os.replace(directory, old)
    os.replace(part, directory)
    shutil.rmtree(old, ignore_errors=True)


def set_aside(directory: Path) -> Path:
    """Where `whole` has the directory that was there while it puts the new one into its place."""
    return directory.with_name(directory.name + ".old.part")


Weights = Mapping[str, Tensor] | Callable[[Callable[[str], bool]], Iterator[tuple[str, Tensor]]]


def save(
    directory: Path,
    model: PreTrainedModel | PeftModel,
    weights: Weights,
    tokenizer: PreTrainedTokenizerBase,
    then: Callable[[Path], None] | None = None,
    ends: Collection[int] = (),
    dtype: torch.dtype | None = None,
    generation: GenerationSettings | None = None,
) -> None:
    """Write a directory that transformers (or peft) loads, then reopen it: complete or absent.

    Where no directory holds the model below adapters, it is written beside them. Neither of the two is in `dtype`, only
    all weights of a model without adapters are; None: as they are.
    `weights` gives those of `model`, which need not be in memory all at once: for each of `passes` in turn;
    `then` writes what else belongs into the directory. `ends` are ids that end responses: the `generate` of
    transformers, and vLLM, stop at them too. `generation` is how they are to generate; None: as the checkpoint says.
    Raises RuntimeError where what was written has an empty tensor or another shape than the model.
    """
    *below, own = (those(weights, wanted) for wanted in passes(model))
    if below:
        with whole(directory.with_name(lora.BASE).absolute()) as part:
            write_base(part, model, below[0], tokenizer, ends, generation)
        lora.name_base(model, directory)
    with whole(directory) as part:
        if isinstance(model, PeftModel):
            handed = write_adapters(part, model, dict(own))
        else:
            handed = write_weights(part, model, own, dtype)
        write_rest(part, hugging_face(model), tokenizer, ends, generation)
        if then is not None:
            then(part)
        checks.verify(part, model, handed)


def passes(model: PreTrainedModel | PeftModel) -> list[Callable[[str], bool]]:
    """Which names are asked for, from the first weight to the last, one time after the other.

    Of a model with adapters only those; first the model below, where no directory holds it.
    """
    if not isinstance(model, PeftModel):
        return [lambda name: True]
    base = model.peft_config[lora.TRAINED].base_model_name_or_path is None
    return [lambda name: not lora.is_added(name)] * base + [lora.is_added]


def those(weights: Weights, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """The wanted ones, one at a time."""
    if not isinstance(weights, Mapping):
        return weights(wanted)
    return ((name, weight) for name, weight in weights.items() if wanted(name))


def write_weights(
    directory: Path, model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None
) -> Shapes:
    """All weights, in `dtype` (None: as they are) but for those that the architecture reads in float32 all the same.

    Returns the shapes of those that were handed over.
    """
    handed: Shapes = {}
    exact = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    tied, ignored = model.all_tied_weights_keys, {*(model._keys_to_ignore_on_save or ())}

    def given() -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights:
            if name in ignored or tied.get(name, name) in handed:
                continue
            handed[name] = tuple(weight.shape)
            cast = dtype is not None and weight.is_floating_point() and exact.isdisjoint(name.split("."))
            yield name, weight.to(dtype) if cast else weight

    write_shards(directory, _as_published(model, given()), SHARD)
    model.save_pretrained(directory, state_dict={})  # the rest
    if dtype is not None:
        config = copy.deepcopy(model.config)
        config.dtype = config.get_text_config().dtype = dtype
        config.save_pretrained(directory)
    return handed


def _as_published(model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The weights by the names and in the pieces of the architecture's published files, such as single experts.

    One at a time, unless several of them become one.
    """
    changes = model.__dict__.get("_weight_conversions") or get_model_conversion_mapping(model, add_legacy=False)
    if any(isinstance(one, WeightConverter) and len(one.target_patterns) > 1 for one in changes):
        weights = {name: weight.cpu().clone() for name, weight in weights}.items()
        yield from revert_weight_conversion(model, dict(weights)).items()
        return
    for name, weight in weights:
        yield from revert_weight_conversion(model, {name: weight}).items()


def write_adapters(directory: Path, model: PeftModel, weights: dict[str, Tensor]) -> Shapes:
    """All adapters of `model` as one."""
    own = model.peft_config[lora.TRAINED]
    weights, model.peft_config[lora.TRAINED] = lora.exported(model, weights)
    options = {"selected_adapters": [lora.TRAINED], "save_embedding_layers": False}
    model.save_pretrained(directory, state_dict=dict(weights), **options)
    model.peft_config[lora.TRAINED] = own
    (directory / CARD).unlink(missing_ok=True)  # a form to be filled in
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def write_base(
    directory: Path,
    model: PeftModel,
    weights: Iterable[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    ends: Collection[int],
    generation: GenerationSettings | None,
) -> None:
    """The model below the adapters, where no other directory holds it."""
    lm = model.get_base_model()
    with torch.device("meta"):
        plain = type(lm)(copy.deepcopy(lm.config))
    known = plain.state_dict().keys()

    def below() -> Iterator[tuple[str, Tensor]]:
        for name, weight in weights:
            if (own := lora.name_below(name)) not in known:
                raise RuntimeError(f"{directory}: {own} is no weight of a {type(lm).__name__}")
            yield own, weight

    if lm.can_generate():
        plain.generation_config = lm.generation_config
    handed = write_weights(directory, plain, below(), None)
    write_rest(directory, lm, tokenizer, ends, generation)
    checks.verify(directory, plain, handed)


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
