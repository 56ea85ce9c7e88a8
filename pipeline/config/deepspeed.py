"""How weights are spread over ranks: a file of ds_configs/, or the user's own, read and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files import flatten

DS_CONFIGS = Path(__file__).parent.parent.parent / "ds_configs"
STAGES = (0, 1, 2, 3)
OWNED = {  # key of the file -> the setting that decides it
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size or train.max_tokens",
    "gradient_accumulation_steps": "train.batch_size",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer.*",
    "scheduler": "optimizer.lr_scheduler_type",
}


def read_ds_config(name: str) -> dict[str, Any]:
    """The JSON of ds_configs/ called `name`, or the user's file.

    Raises UserError: no such file or JSON, or it sets what another setting owns, or leaves values to others.
    """
    path = Path(name) if name.endswith(".json") else DS_CONFIGS / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in DS_CONFIGS.glob("*.json")))
        raise UserError(f"train.zero: {name!r} is no file, wanted one of {known}, or the path of a .json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        place, found = (f":{error.lineno}", error.msg) if isinstance(error, json.JSONDecodeError) else ("", error)
        raise UserError(f"{path}{place}: {found}, wanted a DeepSpeed configuration in JSON") from None
    _check(path, config)
    return config


def _check(path: Path, config: Any) -> None:
    section = config.get("zero_optimization") if isinstance(config, dict) else None
    stage = section.get("stage") if isinstance(section, dict) else None
    if isinstance(stage, bool) or stage not in STAGES:
        cure = "copy a file of ds_configs/ and change that"
        raise UserError(f"{path}: zero_optimization.stage is {stage!r}, wanted 0, 1, 2 or 3: {cure}")
    ours = f"or give zero=zero{stage} instead of the file"
    for key, owner in OWNED.items():
        if key in config:
            raise UserError(f"{path}: {key} is set there, but {owner} decides it: remove it from the file, {ours}")
    for key in ("bf16", "fp16"):
        if not isinstance(config.get(key, {}), dict):
            raise UserError(f"{path}: {key} is {config[key]!r}, wanted a mapping; train.precision switches it on")
    left = next((key for key, value in flatten(config, ".").items() if value == "auto"), None)
    if left is not None:
        raise UserError(f"{path}: {left} is 'auto', wanted a value: nothing fills it in here; remove it, {ours}")
