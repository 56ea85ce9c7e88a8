"""What can be said of a checkpoint by its path and its small files, before it is opened. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.config.sections import ModelSettings
from pipeline.errors import UserError

JSON_FILES = ("config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json")


def check(path: str) -> None:
    """Raises UserError where `path` is no directory of a model and no hub name, or a file of it is no JSON object."""
    if problem := problem_of(path):
        raise UserError(problem)
    check_files(path)


def problem_of(path: str) -> str:
    """Why `path` cannot be a model, in one line; "" where it may be one, here or on the hub."""
    place = Path(path)
    if place.exists() and not (place / "config.json").exists() and not (place / "adapter_config.json").exists():
        return f"model.path: {path} has no config.json, wanted a Hugging Face model directory"
    if not place.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        return f"model.path: {path} does not exist, wanted a directory or a Hugging Face name"
    return ""


def check_files(path: str) -> None:
    """Raises UserError where a file that describes a local checkpoint is no JSON object."""
    for file in (Path(path) / name for name in JSON_FILES):
        if file.is_file():
            read_object(file)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file that belongs to a checkpoint. Raises UserError with file and line."""
    cure = "wanted a JSON object: save the model again, or name another"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: no JSON ({error.msg}), {cure}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: no UTF-8 text ({error}), {cure}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: JSON of type {type(content).__name__}, {cure}")
    return content


def reading_options(settings: ModelSettings) -> dict[str, Any]:
    """Which files of a checkpoint are read, and whether code among them is run."""
    return {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
