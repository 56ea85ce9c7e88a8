"""Ratios measured side by side in one run: runs/<run>/bench/results.json."""

from __future__ import annotations

import platform
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipeline.bench import (
    drawing,
    memory,
    offline,
    peers,
    prompts,
    rouge,
    sampling,
    semi_offline,
    setup,
    startup,
    steps,
)
from pipeline.bench.measure import Result, table
from pipeline.config.schema import BenchStage
from pipeline.files import write_json
from pipeline.launch import run_dir
from pipeline.launch.entry import run
from pipeline.trainer import group

PARTS: dict[str, Callable[[setup.Setup], list[Result]]] = {
    "steps": steps.against_sft,
    "offline": offline.measure,
    "semi_offline": semi_offline.measure,
    "sampling": sampling.measure,
    "loop": steps.against_bare,
    "memory": memory.measure,
    "draw": drawing.measure,
    "prompts": prompts.measure,
    "rouge": rouge.measure,
    "startup": startup.measure,
    "peers": peers.measure,
}


def main(settings: BenchStage, words: Sequence[str]) -> None:
    ranks = group.start(settings.launch.ddp_timeout)
    directory = run_dir.stage_dir(settings, "bench")
    directory.mkdir(parents=True, exist_ok=True)
    measured: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        prepared = setup.prepare(settings, ranks, directory, Path(folder))
        print(", ".join(f"{name} {value}" for name, value in machine().items()), flush=True)
        for part in settings.parts:
            results = PARTS[part](prepared)
            measured += results
            print(table(results), flush=True)
    rows = [{**asdict(result), "goal": result.goal and str(result.goal), "met": result.met} for result in measured]
    command = "bash run.sh " + shlex.join(words)
    report = {"command": command, **machine(), "settings": settings.model_dump(), "results": rows}
    write_json(directory / "results.json", report)


def machine() -> dict[str, Any]:
    """Versions, threads, device."""
    packages = {name: version(name) for name in ("torch", "transformers", "deepspeed")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"python": platform.python_version(), **packages, "threads": torch.get_num_threads(), "device": device}


if __name__ == "__main__":
    run(main, "bench")
