"""How weights are spread over ranks: a file of ds_configs/, or the user's own, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
SHARING = {  # what makes several ranks work on the same rows -> the values at which it does not
    "tensor_parallel.autotp_size": (0, 1),
    "tensor_parallel.tp_size": (1,),
    "tensor_parallel.tp.tp_size": (1,),
    "sequence_parallel_size": (1,),
    "expert_parallel.enabled": (False,),
    "pipeline.stages": (1,),
}
FIXED = {  # what would make a step another one than the settings say -> the one value it may have
    "gradient_allreduce_op": "mean",
    "managed_gradient_accumulation": True,
    "zero_optimization.compute_grad_norm": True,
    "elasticity.enabled": False,
    "curriculum_learning.enabled": False,
    "data_efficiency.enabled": False,
    "progressive_layer_drop.enabled": False,
    "eigenvalue.enabled": False,
    "hybrid_engine.enabled": False,
    "autotuning.enabled": False,
    "amp.enabled": False,
    "compile.deepcompile": False,
}
SECTIONS = ("compression_training", "quantize_training", "weight_quantization", "sparse_attention")  # as FIXED, whole
ROUNDED = {  # what DeepSpeed may be told and changes numbers -> what it changes, and the value at which it does not
    "zero_optimization.zero_quantized_weights": ("weights are rounded to 8 bits where ranks send them", False),
    "zero_optimization.zero_quantized_nontrainable_weights": ("frozen weights are kept in 8 bits", False),
    "zero_optimization.zero_quantized_gradients": ("gradients are rounded to 4 bits where ranks send them", False),
    "fp16.fp16_master_weights_and_grads": ("there are no float32 copies of the weights", False),
    "bf16.bf16_master_weights_and_grads": ("there are no float32 copies of the weights", False),
    "communication_data_type": ("gradients are added up in this type", None),
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


def offloads(zero: Mapping[str, Any], part: str) -> bool:
    """Whether zero_optimization keeps `part`, offload_optimizer or offload_param, elsewhere than it is computed."""
    return (zero.get(part) or {}).get("device", "none") != "none"


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
    flat = flatten(config, ".")
    for key, harmless in SHARING.items():
        if flat.get(key, harmless[0]) not in harmless:
            problem = f"{key} is {flat[key]!r}, so that ranks would share rows, which here are each rank's own"
            raise UserError(f"{path}: {problem}: remove it; zero=zero3 shards weights, max_tokens bounds activations")
    for key, only in FIXED.items():
        if flat.get(key, only) != only:
            raise UserError(f"{path}: {key} is {flat[key]!r}, which changes what a step is, wanted {only!r}: remove it")
    for key in SECTIONS:
        if key in config:
            raise UserError(f"{path}: {key} changes what a step is: remove it from the file, {ours}")
    left = next((key for key, value in flat.items() if value == "auto"), None)
    if left is not None:
        raise UserError(f"{path}: {left} is 'auto', wanted a value: nothing fills it in here; remove it, {ours}")


def rounded(name: str) -> list[str]:
    """What the file of `train.zero` says that makes steps others than of another file, a line each."""
    flat = flatten(read_ds_config(name), ".")
    lines = [
        f"train.zero: {name}: {key} is {flat[key]!r}: {what}, so that steps are not those of other files"
        for key, (what, harmless) in ROUNDED.items()
        if flat.get(key, harmless) != harmless
    ]
    if any(key.startswith("zero_optimization.zenflow") and value is not None for key, value in flat.items()):
        lines.append(
            f"train.zero: {name}: zenflow steps most weights later than their gradient was made; not tested here"
        )
    if flat.get("zero_optimization.offload_optimizer.super_offload"):
        lines.append(f"train.zero: {name}: super_offload: not tested here")
    return lines
