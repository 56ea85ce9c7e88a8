"""Text and JSON files written whole or not at all, metrics.jsonl read back, and fingerprints. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.errors import UserError

BLOCK = 1 << 24
CARD = "README.md"  # of a model directory, for people alone


def fingerprint(path: str | Path) -> str:
    """sha256 over the names and bytes of a file, or of a model directory's files; the text itself for hub names.

    The model below adapters counts, where it is a directory: they mean nothing without it. A model's card does not.
    """
    digest = hashlib.sha256()
    if not Path(path).exists():
        digest.update(str(path).encode())
        return digest.hexdigest()
    places = [Path(path)]
    for place in places:
        files = sorted(p for p in place.iterdir() if p.is_file() and p.name != CARD) if place.is_dir() else [place]
        for file in files:
            digest.update(file.name.encode())
            with open(file, "rb") as stream:
                while block := stream.read(BLOCK):
                    digest.update(block)
        below = _below(place / "adapter_config.json")
        places += [below] if below is not None and below not in places else []
    return digest.hexdigest()


def _below(adapters: Path) -> Path | None:
    """The directory of the model that adapters belong to; None without one, or where their description is broken."""
    try:
        base = Path(json.loads(adapters.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):  # who opens the model says what is wrong with it
        return None
    return base if base.is_dir() else None


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """The rows of a metrics.jsonl in file order; none if it is absent.

    A last line that a kill cut short is dropped. Raises UserError on any other line that is no JSON object.
    """
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")  # the last is empty, or cut short
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not a JSON object ({error.msg}); remove that line") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{path}:{number}: wanted a JSON object with a whole number as 'step'; remove that line")
        rows.append(row)
    return rows


def write_json(path: Path, value: object) -> None:
    """`value` as indented JSON at `path`, complete or absent; numbers that are not finite become null."""
    write_text(path, json.dumps(_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """`rows` as JSON lines at `path`, complete or absent; numbers that are not finite become null."""
    write_text(path, "".join(json.dumps(_jsonable(r), ensure_ascii=False, allow_nan=False) + "\n" for r in rows))


def flatten(nested: Mapping[str, object], separator: str = "/", prefix: str = "") -> dict[str, object]:
    """Mappings within mappings as one with keys joined by `separator`, as in train.batch_size."""
    flat: dict[str, object] = {}
    for key, value in nested.items():
        inner = isinstance(value, Mapping)
        flat |= flatten(value, separator, f"{prefix}{key}{separator}") if inner else {f"{prefix}{key}": value}
    return flat


def write_text(path: Path, text: str) -> None:
    """`text` in UTF-8 at `path`, complete or absent; its folders are made."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """`content` at `path`, complete or absent; its folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    try:
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:  # a full disk, for instance, does not say of what file
        draft.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def _jsonable(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
