"""What the table of mistakes is made of: a mistake, the files it needs, and models that are broken in one way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Make = Callable[[Path, Path], None]  # (where to make it, the run that holds a sound policy and reward model)


class Mistake(NamedTuple):
    """One thing a user does wrong, and what the line must say of it: expressions for place, found, wanted or cure."""

    name: str
    stage: str
    words: str  # HERE: the folder of `files`; SFT and SCORER: model directories that are sound
    says: tuple[str, ...]
    files: Mapping[str, str | bytes | Make] = {}


def lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def answers(count: int = 40) -> list[dict[str, Any]]:
    """Rows for sft: 20 prompts, each with an answer of one of three lengths."""
    return [
        {"prompt": f"How do I boil egg {i % 20}?", "completion": "Put it in water." * (1 + i % 3)} for i in range(count)
    ]


def scored(count: int = 40) -> list[dict[str, Any]]:
    return [{**row, "reward": i * 7 % 10 / 10} for i, row in enumerate(answers(count))]


def pairs(count: int = 40) -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "No."} for row in answers(count)]


def changed(rows: Sequence[Mapping[str, Any]], at: int, **columns: Any) -> str:
    """The rows as lines, with other values in the one at `at`."""
    return lines([{**row, **columns} if i == at else row for i, row in enumerate(rows)])


def all_with(rows: Sequence[Mapping[str, Any]], **columns: Any) -> str:
    return lines([{**row, **columns} for row in rows])


def copy(
    source: str = "sft", drop: Sequence[str] = (), write: Mapping[str, bytes] | None = None, **of_json: Mapping
) -> Make:
    """A copy of a sound model without the files `drop`, others written, and keys of JSON files changed (None: gone)."""

    def make(path: Path, run: Path) -> None:
        shutil.copytree(run / source / "model", path)
        for name in drop:
            (path / name).unlink()
        for name, content in (write or {}).items():
            (path / name).write_bytes(content)
        for name, changes in of_json.items():
            file = path / f"{name}.json"
            content = {**json.loads(file.read_text()), **changes}
            file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return make


def cut_weights(path: Path, run: Path) -> None:
    copy()(path, run)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def few_embeddings(path: Path, run: Path) -> None:
    """A GPT-2 of 300 tokens and 24 positions with the tokenizer of another model, which has more."""
    from transformers import GPT2Config, GPT2LMHeadModel

    copy(drop=["model.safetensors"])(path, run)
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 24}
    GPT2LMHeadModel(GPT2Config(vocab_size=300, bos_token_id=1, eos_token_id=2, **shape)).save_pretrained(path)


def not_a_number(path: Path, run: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy()(path, run)
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def adapter(base: str | None, weights: bytes | None = b"", **changes: Any) -> Make:
    """A directory of LoRA adapters over `base`, in which HERE is the directory's parent."""

    def make(path: Path, run: Path) -> None:
        path.mkdir()
        named = None if base is None else base.replace("HERE", str(path.parent)).replace("SFT", str(run / "sft/model"))
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]}
        config |= {"base_model_name_or_path": named, **changes}
        (path / "adapter_config.json").write_text(json.dumps(config))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(run / "sft/model" / name, path / name)
        if weights is not None:
            (path / "adapter_model.safetensors").write_bytes(weights)

    return make


def judge(body: str) -> dict[str, str]:
    """judge.py with a reward that does `body`."""
    return {"judge.py": f"def reward(prompts, completions, **columns):\n    {body}\n"}
