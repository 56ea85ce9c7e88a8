"""How a model was trained to read: kept beside its weights, so that whoever opens it next reads as it did."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase
from transformers.utils import CHAT_TEMPLATE_FILE

from pipeline.config.schema import WithModel
from pipeline.config.sections import Count, ModelSettings, Section, TemplateSettings
from pipeline.config.validate import describe, one_complaint
from pipeline.config.yaml_layers import ROOT, load_yaml
from pipeline.data import chat, written_template
from pipeline.data.tokenization import Encoder, resolved
from pipeline.errors import UserError
from pipeline.launch import run_dir
from pipeline.models.lora import layers_of
from pipeline.models.place import read_object

logger = logging.getLogger("tiffin")

INPUT_FILE = "trained_input.json"
FORMER_FILE = "reward_input.json"  # beside reward models of versions that kept less
OF_TEXT = ("human", "assistant")  # what template.kind=text alone reads


class TrainedInput(Section):
    """The template of a model's training, and where it cut prompt and response: only reward models cut there again.

    chat_template: the tokenizer's own, where another is saved with it for other tools.
    """

    template: TemplateSettings
    max_prompt_length: Count
    keep_of_prompt: Literal["end", "beginning"]
    max_response_length: Count
    chat_template: str | None = None  # of models of former versions there is none


def save_input(directory: Path, encoder: Encoder, asked: bool = True, scalar: bool = False) -> None:
    """Keep in a model's directory how the rows were made that it was trained on, for ourselves and for other tools.

    `asked`: the rows have prompts; without, nothing is learned of chats, and no chat template is made. `scalar`: it is
    a reward model.
    """
    lengths = {"max_prompt_length": encoder.max_prompt_length, "max_response_length": encoder.max_response_length}
    own = encoder.tokenizer.get_chat_template() if encoder.tokenizer.chat_template is not None else None
    content = TrainedInput(template=encoder.template, keep_of_prompt=encoder.keep, chat_template=own, **lengths)
    text = json.dumps(content.model_dump(), indent=2, ensure_ascii=False)
    (directory / INPUT_FILE).write_text(text + "\n", encoding="utf-8")
    if asked and (written := written_template.for_others(encoder, scalar)) is not None:
        (directory / CHAT_TEMPLATE_FILE).write_text(written, encoding="utf-8")


def with_own_chat_template(tokenizer: PreTrainedTokenizerBase, model: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer of `model` with its own chat template, not the one that `save_input` wrote for other tools."""
    if written_template.is_written(tokenizer) and (trained := saved_input(model)) is not None:
        tokenizer.chat_template = trained.chat_template
    return tokenizer


def saved_input(model: ModelSettings) -> TrainedInput | None:
    """What `save_input` left with a model, or with the one under its adapters; None where it left nothing.

    Raises UserError where it is no such thing.
    """
    if model.path is None:
        return None
    layers, below = layers_of(model)
    for directory in (*(Path(path) for path, _ in reversed(layers)), Path(below.path)):
        if (directory / INPUT_FILE).is_file():
            return _read(directory / INPUT_FILE)
        if (directory / FORMER_FILE).is_file():
            raise UserError(f"{directory}: has {FORMER_FILE}, wanted {INPUT_FILE} in its place: train it again")
    return None


def _read(file: Path) -> TrainedInput:
    try:
        return TrainedInput(**read_object(file))
    except ValidationError as error:
        path, complaint = one_complaint(error)
        raise UserError(f"{file}: {'.'.join(path)}: {complaint}; train the model again, or remove the file") from None


def template_for(settings: WithModel, model: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> TemplateSettings:
    """The template that `model` was trained under, with what the user gave instead; the stage's own without one.

    A setting counts as given where it is not what ships. One line says so where it differs from training, and one where
    nothing reads it.
    """
    given, trained = _given(settings.template), saved_input(model)
    template = settings.template if trained is None else trained.template.model_copy(update=given)
    template = resolved(template, tokenizer)
    unread = [name for name in given if name in OF_TEXT] if template.kind == "chat" else []
    if unread:
        names = ", ".join(f"template.{name}" for name in unread)
        logger.warning(f"{names}: given, but {model.path} reads under its chat template: set template.kind=text")
    if trained is not None:
        _say_changes(model, trained.template, {name: value for name, value in given.items() if name not in unread})
    if template.date is None and template.kind == "chat" and chat.writes_date(tokenizer):
        template = template.model_copy(update={"date": run_dir.first_day(settings)})
    return template


def _given(template: TemplateSettings) -> dict[str, Any]:
    shipped = load_yaml(ROOT / "stages" / "common.yaml")["template"]
    return {name: value for name, value in template.model_dump().items() if value != shipped[name]}


def _say_changes(model: ModelSettings, trained: TemplateSettings, given: Mapping[str, Any]) -> None:
    before = trained.model_dump()
    changes = [f"{name}={describe(value)}" for name, value in given.items() if value != before[name]]
    if changes:
        named = ", ".join(f"{name}={describe(before[name])}" for name in given if given[name] != before[name])
        logger.warning(f"{model.path}: trained under template {named}, read under {', '.join(changes)} as given")
