"""What was meant by a word that is not key=value, or by a name that is no setting here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.aliases import ALGORITHM_IDS, ALIASES, SWITCHES
from pipeline.config.elsewhere import ADVICE, METHODS
from pipeline.config.schema import STAGES
from pipeline.config.validate import known_fields
from pipeline.errors import did_you_mean

FOLDER = Path(__file__).resolve().parents[2] / "stages"
FIELDS = {".".join(path): kind for records in STAGES.values() for one in records for path, kind in known_fields(one)}
SECTIONS = {name.partition(".")[0] for name in FIELDS if "." in name}
OTHERS = ("stage", "recipe", "config")  # words that choose layers
SWITCHED = {*SWITCHES, "dry_run", *(name for name, kind in FIELDS.items() if kind is bool)}
SWITCHED |= {name for name, target in ALIASES.items() if target in SWITCHED}


def advice(name: str, value: Any) -> str | None:
    """What to say of a name that others have and we have not: `wandb`, `trainer.x`, `train.optim`, `optimizer=x`."""
    first, _, rest = name.partition(".")
    key = first if name not in ADVICE and first not in FIELDS else name
    if first in SECTIONS and name not in FIELDS:
        key = rest
    ours = key in FIELDS and (key not in SECTIONS or not isinstance(value, str))  # of a stage; others are told by it
    if key not in ADVICE or ours:
        return None
    found = f"{value!r}" if key in FIELDS else "not a setting here"
    return f"{name}: {found}; {ADVICE[key]}"


def method(word: str, key: str) -> str:
    """What to set instead of a stage or an algorithm (the `key`) that is none here, after "; "; or nothing."""
    plain = word.lower().replace("-", "_")
    if key == "stage" and plain in STAGES:
        return f"; set stage={plain}"
    if key == "stage" and (plain in ALGORITHM_IDS or (FOLDER / "algo" / f"{plain}.yaml").is_file()):
        return f"; set stage=rl algo={plain}"
    if key == "stage" and (FOLDER / "recipes" / f"{plain}.yaml").is_file():
        return f"; set recipe={plain} without stage="
    return f"; {METHODS[plain]}" if plain in METHODS else ""


def cure(words: Sequence[str]) -> str:
    """What may have been meant by the first of `words`, which is not key=value; the others follow it."""
    word, value = words[0], _value(words)
    for folder, key in (("", "stage"), ("recipes", "recipe"), ("algo", "algo")):
        if (FOLDER / folder / f"{word}.yaml").is_file() and word != "common":
            return f"; did you mean '{key}={word}'?"
    if word in ("test", "help"):
        return f"; did you mean 'stage={word}'?"
    name = word.lstrip("-").partition("=")[0].strip().replace("-", "_")
    dashes = "; write settings without dashes" if word.startswith("-") else ""
    command = METHODS.get(word) if name not in SWITCHED else None  # elsewhere: `grpo`, `train`, `eval`
    if said := command or advice(name, value):
        return f"; {said}"
    if name not in (*ALIASES, *FIELDS, *SWITCHED, *OTHERS):
        return f"{dashes and dashes + ', as learning_rate=1e-5'}{did_you_mean(name, ALIASES)}; see stage=help"
    if value is None and name in SWITCHED:
        value = "true"
    if value is None:
        return f"{dashes}; give it a value: {name}=..."
    return f"{dashes or '; write'}{':' if dashes else ''} {name}={value}"


def _value(words: Sequence[str]) -> str | None:
    """The value that was meant for the first word: behind its own '=', or the next word, '=' alone left out."""
    _, equals, value = words[0].partition("=")
    if equals:
        return value
    value = next((word for word in words[1:] if word != "="), "-")
    return None if value.startswith("-") or "=" in value else value
