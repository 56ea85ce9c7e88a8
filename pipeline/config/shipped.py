"""What ships for a stage, beside which its settings are shown."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.config.resolve import resolve
from pipeline.config.yaml_layers import as_word
from pipeline.files import flatten

LORA_R = "model.lora.r"


def shipped(stage: str, now: Mapping[str, object]) -> dict[str, object]:
    """The defaults by dotted key, for the algorithm of the settings `now`, and for adapters where these have some.

    Raises UserError where `now` names an algorithm that is not there.
    """
    words = [as_word(key, now[key]) for key in ("algo", LORA_R) if now.get(key)]
    defaults = flatten(resolve([f"stage={stage}", *words]).settings.model_dump(), ".")
    return defaults | ({LORA_R: 0} if LORA_R in defaults else {})  # the learning rate that ships depends on it
