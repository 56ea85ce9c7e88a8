"""LoRA: fresh adapters on a model, and what a directory of trained ones belongs to."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from pipeline.config.sections import LoraSettings, ModelSettings
from pipeline.errors import UserError
from pipeline.models import checks
from pipeline.models.checks import HEADS, reading


def with_lora(
    model: PreTrainedModel, lora: LoraSettings, task: str, tokens: list[int] | None = None
) -> PreTrainedModel | PeftModel:
    """The model with fresh adapters, its own weights frozen but for the embeddings of `tokens`; itself when r is 0."""
    if lora.r == 0:
        return model
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type=task,
        modules_to_save=HEADS if task == "SEQ_CLS" else None,
        trainable_token_indices=tokens,
    )
    try:
        adapted = get_peft_model(model, config)
    except (TypeError, ValueError) as error:  # the former where the embeddings are among the targets, beside `tokens`
        problem = str(error).splitlines()[0].split(". ")[0]
        matrices = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        names = ", ".join(sorted({name.rpartition(".")[2] for name in matrices}))
        raise UserError(f"model.lora.target_modules: {problem}, wanted all-linear, or some of {names}") from None
    found = adapted.active_peft_config
    if isinstance(found.target_modules, set):  # whose order changes from process to process
        found.target_modules = sorted(found.target_modules)
    return adapted


def adapter_of(settings: ModelSettings) -> PeftConfig | None:
    """The description of the adapters in `settings.path`, if an earlier stage with LoRA left some there."""
    if settings.path is None or not (Path(settings.path) / "adapter_config.json").is_file():
        return None
    checks.check_files(settings.path)
    with reading(settings.path, "adapter_config.json"):
        adapter = PeftConfig.from_pretrained(settings.path)
    if not any(Path(settings.path).glob("adapter_model.*")):
        problem = "has adapter_config.json, but no adapter_model.safetensors, wanted both: copy it again"
        raise UserError(f"model.path: {settings.path} {problem}")
    if adapter.base_model_name_or_path is None:
        raise UserError(f"model.path: the adapters of {settings.path} do not say what model they belong to")
    return adapter


def under(settings: ModelSettings, adapter: PeftConfig) -> ModelSettings:
    """The settings of the model that `adapter` was trained on."""
    return settings.model_copy(update={"path": adapter.base_model_name_or_path, "revision": adapter.revision})
