"""The directory of a run: what earlier stages left, who is at work in it, and how a stage is opened.

Nothing passes between stages but directories.
"""

from __future__ import annotations

import datetime
import errno
import logging
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from pipeline.config.schema import Common, ExportStage, RewardStage, RlStage, WithModel
from pipeline.config.sections import ModelSettings
from pipeline.config.yaml_layers import load_yaml
from pipeline.config.yaml_text import dump_yaml
from pipeline.errors import UserError
from pipeline.files import write_json, write_text
from pipeline.launch import going_on
from pipeline.launch.going_on import CONFIG, INPUTS, RESULTS, begun, finished

DAY = "first_day.txt"  # of a run: the date that chat templates write which write today's
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system that knows none

logger = logging.getLogger("tiffin")
_held: dict[Path, FileLock] = {}  # a lock that is forgotten is free


def run_dir(settings: Common) -> Path:
    return Path(settings.runs_dir) / settings.run


def cache(settings: Common) -> Path:
    """What the run keeps of its rows, and of what the reference says of them: made again where it is removed."""
    return run_dir(settings) / "cache"


def stage_dir(settings: Common, stage: str) -> Path:
    """runs/<run>/<stage>, or runs/<run>/<stage>/<name> where a name is given."""
    base = run_dir(settings) / stage
    return base if settings.name is None else base / settings.name


def first_day(settings: Common) -> str:
    """The day on which the run's first stage was opened, as 2026-03-01; today's where none was."""
    file = run_dir(settings) / DAY
    return file.read_text("utf-8").strip() if file.is_file() else datetime.date.today().isoformat()


def model_of(settings: Common, stage: str) -> Path | None:
    """The final model that `stage` (or stage/name) of this run left, if it did."""
    directory = run_dir(settings) / stage
    return directory / "model" if finished(directory) and (directory / "model").is_dir() else None


def reward_models(settings: Common) -> dict[str, str]:
    """The reward models trained in this run: name -> model directory."""
    folder = run_dir(settings) / "reward"
    folders = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.name: str(path / "model") for path in folders if finished(path) and (path / "model").is_dir()}


def claim(directory: Path) -> None:
    """Hold `directory` until this process ends, however it ends; what one holds one may claim again.

    Raises UserError where another process holds it.
    """
    path = (directory / ".lock").resolve()
    if path in _held:
        return
    lock = FileLock(path)
    try:
        _acquire(lock, timeout=0)
    except Timeout:
        raise UserError(
            f"{directory}: another process is at work there, wanted one at a time: wait for it, or choose another "
            "run= or name="
        ) from None
    _held[path] = lock


def refuse_taken(directory: Path) -> None:
    """Raises UserError as `claim`, and holds nothing."""
    path = (directory / ".lock").resolve()
    if path in _held or not path.is_file():
        return
    claim(directory)
    _held.pop(path).release()


@contextmanager
def waiting(directory: Path) -> Iterator[None]:
    """Hold `directory` for a while, once whoever holds it lets go."""
    lock = FileLock(directory / ".lock")
    _acquire(lock, timeout=-1)
    try:
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, timeout: float) -> None:
    """Take the lock; where the file system has none, say so and go on."""
    try:
        lock.acquire(timeout)
        if not isinstance(lock, SoftFileLock):
            return
        lock.release()  # a file that would stay where a process is killed
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    logger.warning(f"{lock.lock_file}: this file system has no locks: start one process at a time")


def open_stage(directory: Path, settings: Common, words: Sequence[str], inputs: Mapping[str, str]) -> bool:
    """Start or continue a stage: compare with what an earlier start noted, then note what this one is.

    False where the stage is finished, with the same settings and inputs; nothing is left to do. A length that was
    raised opens it again: it has no results until it ends, and its old model/ stays until then. `inputs` is name ->
    fingerprint of what the stage starts from (models, data, rewards). Raises UserError where it was started with other
    settings, inputs or ranks, or another process is at work there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    claim(directory)
    if not (run_dir(settings) / DAY).is_file():
        with waiting(run_dir(settings)):  # stages of one run may open at once
            write_text(run_dir(settings) / DAY, first_day(settings) + "\n")
    if going_on.done(directory, settings, lambda: inputs):
        return False
    if begun(directory):
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        going_on.refuse_other_inputs(directory, inputs)
        going_on.refuse_other_ranks(directory, settings, ranks)
        if cut := going_on.spoken_cut(directory, settings, ranks):
            logger.info(f"{directory}: goes on with {cut}")
        if not going_on.longer(directory, settings):
            return True
        (directory / RESULTS).unlink(missing_ok=True)  # first: what is noted below is not what these are of
    elif finished(directory):
        raise UserError(f"{directory}: it has results but not what made them (config.yaml): remove it, or use run=")
    else:
        going_on.remove_unsaved(directory)
    write_json(directory / INPUTS, dict(inputs))
    write_text(directory / "command.txt", "bash run.sh " + shlex.join(words) + "\n")
    write_text(directory / CONFIG, dump_yaml(settings.model_dump()))
    return True


def start_model(settings: RewardStage | RlStage) -> ModelSettings:
    """The run's SFT model if start_from says so and it is there, else the model that is named, else a new one.

    Raises UserError where a model is named, and the SFT model was made of another; and where the SFT model is not
    there yet, though it was begun.
    """
    trained = model_of(settings, "sft") if settings.start_from == "sft" else None
    if trained is None:
        if settings.start_from == "sft" and begun(sft := run_dir(settings) / "sft") and not finished(sft):
            raise UserError(
                f"{sft}: has not ended, wanted its model to start from: start it again to its end, "
                "or set start_from=model to start from another"
            )
        return settings.model
    made_of, named = load_yaml(trained.parent / CONFIG)["model"]["path"], settings.model.path
    if named not in (None, made_of, str(trained)):
        raise UserError(
            f"model.path: {named}, but {trained.parent} was made of {made_of or 'a new model'}: "
            "set start_from=model to start from it, or choose another run="
        )
    return settings.model.model_copy(update={"path": str(trained), "revision": None})


def policy_model(settings: WithModel | ExportStage, place: str | None) -> ModelSettings:
    """The model called `place`: a stage of the run (sft, rl, rl/name), a directory, or a hub name; None: the newest.

    Raises UserError where there is no such policy.
    """
    names = ["rl", "sft"] if place is None else [place]
    latest = next((path for name in names if (path := model_of(settings, name))), None)
    if latest is not None:
        return settings.model.model_copy(update={"path": str(latest)})
    if place is None and settings.model.path is not None:
        return settings.model
    if place is not None and (Path(place).is_dir() or ("/" in place and not place.startswith(("rl/", "sft/")))):
        return settings.model.model_copy(update={"path": place})
    stage = (place or "sft").split("/")[0]
    raise UserError(
        f"policy {place or 'rl or sft'}: {run_dir(settings)} holds none: make it with "
        f"bash run.sh stage={stage} run={settings.run}, or name a model directory"
    )
