"""What an export would refuse, told before it starts. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.config.schema import ExportStage
from pipeline.errors import UserError
from pipeline.files import fingerprint
from pipeline.launch import going_on, run_dir
from pipeline.models import place, publish
from stages.ahead import Ahead, told


def of_export(settings: ExportStage, ahead: Ahead) -> Iterator[str]:
    """A model that is not there, a directory that is somebody's, a push that cannot be."""
    model = settings.model.path
    if not any(ahead.makes(settings, stage) for stage in ([settings.policy] if settings.policy else ["rl", "sft"])):
        found = told(lambda: run_dir.policy_model(settings, settings.policy))
        yield from found
        if not found:
            model = run_dir.policy_model(settings, settings.policy).path
            yield from told(partial(refuse_state, model)) or told(partial(place.check, model))
    yield from told(partial(refuse_occupied, settings))
    if settings.push_to is not None:
        if problem := publish.obstacle():
            yield f"push_to: {problem}; or leave push_to out"
        yield from told(partial(refuse_half, settings, model))


def refuse_state(model: str) -> None:
    """Raises UserError where the directory is a training's checkpoint."""
    if (Path(model) / going_on.STATE).is_file():
        stage = Path(model).absolute().parent.parent
        problem = f"{model} is a checkpoint to go on from, and no model"
        raise UserError(f"policy: {problem}, wanted one: {stage / 'best'} where that is there, or the stage at its end")


def target(settings: ExportStage) -> Path:
    """The directory that is to be written."""
    place = Path(settings.to) if settings.to is not None else run_dir.stage_dir(settings, "export") / "model"
    return place.absolute()  # as it is noted: of another working directory it is another one


def asked(settings: ExportStage, model: str) -> dict[str, Any]:
    """All that decides what is written."""
    names = ("merge", "dtype", "max_shard_size")
    form = {name: getattr(settings, name) for name in names}
    return {"to": str(target(settings)), **form, "model": model, "fingerprint": fingerprint(model)}


def last(settings: ExportStage) -> dict[str, Any]:
    """What this run's last export left on record; nothing where there was none."""
    noted = run_dir.stage_dir(settings, "export") / going_on.RESULTS
    return json.loads(noted.read_text(encoding="utf-8")) if noted.is_file() else {}


def refuse_occupied(settings: ExportStage) -> None:
    """Raises UserError where `to` is there and holds something that this run's last export did not write."""
    there, before = target(settings), last(settings)
    if settings.to is None or not there.exists() or (there.is_dir() and not any(there.iterdir())):
        return
    if not there.is_dir() or before.get("to") != str(there):
        raise UserError(f"to: {there} is there already, wanted a new directory: remove it, or name another")
    if others := sorted(sizes(there).keys() - before.get("sizes", {}).keys()):
        raise UserError(f"to: {there} holds {others[0]}, which no export wrote: move that, or name another directory")


def sizes(directory: Path) -> dict[str, int]:
    """The bytes of everything in `directory`, by name; nothing where there is none."""
    return {file.name: file.stat().st_size for file in sorted(directory.glob("*"))}


def refuse_half(settings: ExportStage, model: str | None) -> None:
    """Raises UserError where adapters were sent whose base is a directory that stays here."""
    described = Path(model or "") / "adapter_config.json"
    if settings.merge or not described.is_file():
        return
    base = place.read_object(described).get("base_model_name_or_path")
    if base is not None and Path(base).is_dir():
        problem = f"the adapters of {model} belong to {base}, a directory of this machine"
        raise UserError(f"push_to: {problem}, wanted one on the hub: set merge=true, or write its name there")
