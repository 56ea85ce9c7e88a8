"""A model to hand over: adapters merged, cast, in shards, with its card: runs/<run>/export/model/, or to=DIRECTORY."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

import torch

from pipeline.config.schema import ExportStage
from pipeline.files import write_json
from pipeline.launch import going_on, run_dir
from pipeline.launch.entry import run
from pipeline.models import publish
from pipeline.models.exporting import Form, export
from stages import export_faults

logger = logging.getLogger("tiffin")


def main(settings: ExportStage, words: Sequence[str]) -> None:
    directory, target = run_dir.stage_dir(settings, "export"), export_faults.target(settings)
    model = run_dir.policy_model(settings, settings.policy)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # in peft's calls
    directory.mkdir(parents=True, exist_ok=True)
    run_dir.claim(directory)
    export_faults.refuse_occupied(settings)
    asked, before = export_faults.asked(settings, model.path), export_faults.last(settings)
    if before and export_faults.sizes(target) == before.get("sizes") and asked.items() <= before.items():
        logger.info(f"{target} is this already")
        results = before
    else:
        dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
        said = export(model, target, Form(settings.merge, dtype, settings.max_shard_size))
        files = sorted(target.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        results = {**asked, "said": said, "sizes": export_faults.sizes(target), "bytes": size}
        write_json(directory / going_on.RESULTS, results)
        logger.info(f"{target}: {model.path} in {len(files)} files of weights, {size / 1e9:,.3f} GB. {said}".rstrip())
    if settings.push_to is not None:
        export_faults.refuse_half(settings, model.path)
        address = publish.push(target, settings.push_to, settings.private)
        write_json(directory / going_on.RESULTS, {**results, "pushed": address})
        logger.info(f"{address}: has it, {'private' if settings.private else 'for all to see'}")


if __name__ == "__main__":
    run(main, "export")
