"""Weights that are still as their files have them, mapped into memory and shared by the processes of a machine.

ZeRO-3 cuts a model's weights one by one. What must happen to each before, another type or adapters that are added to
it, happens then, so that no process ever holds more than one whole weight besides its parts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from pipeline.config.sections import ModelSettings
from pipeline.models.checks import HEADS

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Late:
    """What is still to be done to the weights of a model.

    dtype: the type that the model is computed with, into which they are read.
    sums: weight -> what is to be added to it, as a product of two matrices (out, r) and (r, in), or of the transposed.
    """

    dtype: torch.dtype
    sums: dict[nn.Parameter, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """The weight as it is to be, a new tensor: what is written into a mapped one stays until its file closes."""
        weight = parameter.data.to(self.dtype, copy=True)
        if (pair := self.sums.pop(parameter, None)) is None:
            return weight
        return (weight + pair[0] @ pair[1]).to(self.dtype)  # added in float32, rounded once


@contextmanager
def as_if_read(model: PreTrainedModel, late: Late | None) -> Iterator[None]:
    """While adapters are put on `model`: its matrices look as if they were in the type they are read into.

    Not embeddings and heads, of which peft may copy something.
    """
    kept = {} if late is None else {p: p.data for p in _matrices(model) if p.dtype != late.dtype}
    for parameter, data in kept.items():
        parameter.data = torch.zeros((), dtype=late.dtype).expand(data.shape)
    try:
        yield
    finally:
        for parameter, data in kept.items():
            parameter.data = data


def _matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    heads = [part for name, part in model.named_children() if name in HEADS]
    heads += [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    copied = {parameter for part in heads for parameter in part.parameters()}
    return [parameter for parameter in model.parameters() if parameter.dim() > 1 and parameter not in copied]


def make_again(model: PreTrainedModel, made: torch.dtype, wanted: torch.dtype) -> None:
    """What no file holds, such as a new head or the scale of embeddings: made in `wanted`, not in `made`.

    Of buffers in float32 nothing says whether they are to be exact in every type: they stay so.
    """
    for part in model.modules():
        own = [*part.parameters(recurse=False)]
        own += [] if made == torch.float32 else part.buffers(recurse=False)
        new = [tensor for tensor in own if tensor.dtype == made and not vars(tensor).get("_is_hf_initialized")]
        for tensor in new:
            tensor.data = tensor.data.to(wanted)
        if new:
            part._is_hf_initialized = False
    model.initialize_weights()  # of these alone


def type_of_files(settings: ModelSettings) -> torch.dtype | None:
    """The one type of all weights in the safetensors of a checkpoint; None where there are several, or none."""
    found = {TYPES.get(kind) for file in weight_files(settings) for kind in _kinds(file)}
    return found.pop() if len(found) == 1 else None


def weight_files(settings: ModelSettings) -> list[Path]:
    """The safetensors of a checkpoint, here or in the hub's cache, to which they come if need be."""

    def local(name: str) -> str | None:
        quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
        return cached_file(settings.path, name, revision=settings.revision, **quiet)

    if (single := local(SAFE_WEIGHTS_NAME)) is not None:
        return [Path(single)]
    if (index := local(SAFE_WEIGHTS_INDEX_NAME)) is None:
        return []
    names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
    return [Path(file) for file in map(local, dict.fromkeys(names)) if file is not None]


def _kinds(file: Path) -> Iterator[str]:
    with safe_open(file, "pt") as saved:
        yield from {saved.get_slice(name).get_dtype() for name in saved.keys()}  # noqa: SIM118
