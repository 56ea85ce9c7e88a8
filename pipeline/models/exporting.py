"""A model directory made of another: adapters merged or left alone, in another type, in shards."""

from __future__ import annotations

import copy
import logging
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from pipeline.config.sections import ModelSettings
from pipeline.errors import UserError
from pipeline.files import CARD, write_json, write_text
from pipeline.models import card, lora, merging, writing
from pipeline.models.checks import reading
from pipeline.models.place import read_object, reading_options
from pipeline.models.shards import write_shards
from pipeline.models.trained_input import INPUT_FILE

logger = logging.getLogger("tiffin")

ADAPTERS, ADAPTER_CONFIG = "adapter_model", "adapter_config.json"


@dataclass(frozen=True)
class Form:
    """What the directory shall be."""

    merge: bool
    dtype: torch.dtype | None  # None: as it is
    most_bytes: int  # of a shard
    quiet: bool = False  # about what merging rounds away


def export(model: ModelSettings, directory: Path, form: Form) -> str:
    """Write the model to `directory`, complete or absent, and say in sentences what was done.

    Raises UserError where it cannot be read, merged or cast.
    """
    layers, below = lora.layers_of(model)
    with writing.whole(directory) as part:
        part.mkdir(parents=True)
        if layers and not form.merge:
            said = _adapters(Path(model.path), part, form.dtype)
        else:
            said = _whole_model(model, part, form)
        places = [Path(path) for path, _ in reversed(layers)] + [Path(below.path)]
        _rest(model, places, part)
        _card(model, part, bool(layers) and form.merge, said)
    return said


def _whole_model(model: ModelSettings, part: Path, form: Form) -> str:
    """Weights and configuration, all adapters merged."""
    parts = merging.opened(model)
    dtype = form.dtype or parts.dtype
    names = merging.written(parts)
    expected = merging.shapes(parts, names)
    with torch.no_grad():
        found = write_shards(part, merging.merged(parts, names, dtype), form.most_bytes)
    assert found == expected, f"{part}: {sorted(found.items() ^ expected.items())[:4]}"
    config: PretrainedConfig = copy.deepcopy(parts.lm.config)
    config.architectures = [type(parts.lm).__name__]
    config.dtype = config.get_text_config().dtype = dtype
    config.save_pretrained(part)
    if parts.lm.can_generate():  # until the file of the model itself is copied over it, if there is one
        parts.lm.generation_config.to_json_file(part / GENERATION_CONFIG_NAME)
    return " ".join(_told(parts, dtype, form.quiet))


def _told(parts: merging.Parts, dtype: torch.dtype, quiet: bool) -> Iterator[str]:
    kind, came = (str(one).removeprefix("torch.") for one in (dtype, parts.dtype))
    if parts.adapted:
        yield f"The adapters of training are merged into it, in {len(parts.adapted)} of its modules."
    yield f"Its weights are {kind}." if dtype == parts.dtype else f"Its weights are {kind}; they were {came}."
    if parts.adapted and dtype != torch.float32 and not quiet:
        lost = f"{torch.finfo(dtype).eps / 2:.2%}"
        logger.info(f"dtype: {kind}: of what adapters add, less than {lost} of a weight may be rounded away")


def _adapters(source: Path, part: Path, dtype: torch.dtype | None) -> str:
    """The adapters as they are, or in another type."""
    file = source / f"{ADAPTERS}.safetensors"
    if not file.is_file():
        raise UserError(f"{source}: has no {file.name}, wanted it: save the adapters again with safetensors")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        with safe_open(file, "pt") as saved:
            for name in saved.keys():  # noqa: SIM118 - it is no mapping
                weight = saved.get_tensor(name)
                yield name, weight if dtype is None else merging.cast(name, weight, dtype)

    with reading(str(source), "adapters"):
        write_shards(part, tensors(), sys.maxsize, ADAPTERS)
    told = read_object(source / ADAPTER_CONFIG)
    told["base_model_name_or_path"] = lora.place(told["base_model_name_or_path"])
    write_json(part / ADAPTER_CONFIG, told)
    return "" if dtype is None else f"Its adapters are {str(dtype).removeprefix('torch.')}."


def _rest(model: ModelSettings, places: list[Path], part: Path) -> None:
    """Tokenizer, chat template, how it generates and how it was trained to read, and code of its own, as they are.

    `places`: of the model, of the adapters below it, of the model below all; hub names among them are no directories.
    """
    with reading(model.path, "tokenizer"):
        transformers.AutoTokenizer.from_pretrained(model.path, **reading_options(model)).save_pretrained(part)
    for name in (INPUT_FILE,) if merging.scores(model) else (INPUT_FILE, GENERATION_CONFIG_NAME):
        if found := next((place / name for place in places if (place / name).is_file()), None):
            shutil.copyfile(found, part / name)
    for code in (file for place in reversed(places) if place.is_dir() for file in place.glob("*.py")):
        shutil.copyfile(code, part / code.name)
    writing.write_for_4(part)


def _card(model: ModelSettings, part: Path, merged: bool, said: str) -> None:
    """The card of the model's training, or another's as it is, or a short one where that would no longer be true."""
    own, shown = Path(model.path) / CARD, model.path if not Path(model.path).is_dir() else Path(model.path).name
    text = own.read_text(encoding="utf-8") if own.is_file() else ""
    made = card.exported(text, merged, said)
    if made is None and text and not merged:
        logger.info(f"{own}: no card of a training here: it is copied as it is")
        made = text
    write_text(part / CARD, card.of_another(shown, said) if made is None else made)
