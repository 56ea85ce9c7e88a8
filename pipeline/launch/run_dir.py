"""The directory of a run: what earlier stages left, whether a stage is done, and whether it may go on.

Nothing passes between stages but directories. A stage directory holds what made it (config.yaml, inputs.json), so that
a second start neither redoes what is done nor continues what has become something else.
"""

from __future__ import annotations

import datetime
import errno
import json
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, SoftFileLock, Timeout

from pipeline.config.schema import Common, RewardStage, RlStage, Training, WithModel
from pipeline.config.sections import ModelSettings
from pipeline.config.yaml_layers import load_yaml
from pipeline.config.yaml_text import dump_yaml
from pipeline.errors import UserError
from pipeline.files import flatten, write_json, write_text

# What may differ between two starts of one stage: nothing here changes a weight or a reported number.
FREE = (
    "launch",
    "runs_dir",
    "train.logging_steps",
    "train.save_steps",
    "train.save_total_limit",
    "train.keep_checkpoint",
    "train.non_finite",
    "eval.num_samples",
    "rewards.workers",
    "data.workers",
    "rewards.judge.budget",
)
LENGTHS = ("train.max_steps", "train.num_train_epochs")  # these may be raised, to train longer
CONFIG, INPUTS, RESULTS = "config.yaml", "inputs.json", "results.json"
CHECKPOINTS, STATE = "checkpoints", "state.json"  # the folder of a stage's checkpoints; the last file of each
# model/ is no draft
UNSAVED = ("best", "last", "non_finite", "samples", "held_out", "tensorboard", "checkpoints", "data.json")
UNSAVED += ("normalise.json", "metrics.jsonl", "rewards.jsonl", "train.jsonl", "validation.jsonl", "test.jsonl")
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


def finished(directory: Path) -> bool:
    """Whether a stage's last file is there."""
    return (directory / RESULTS).is_file()


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
    if done(directory, settings, lambda: inputs):
        return False
    goes_on = begun(directory)
    if goes_on:
        refuse_other_inputs(directory, inputs)
        refuse_other_ranks(directory, int(os.environ.get("WORLD_SIZE", "1")))
        if not longer(directory, settings):
            return True
        (directory / RESULTS).unlink(missing_ok=True)  # first: what is noted below is not what these are of
    elif finished(directory):
        raise UserError(f"{directory}: it has results but not what made them (config.yaml): remove it, or use run=")
    else:
        remove_unsaved(directory)
    write_json(directory / INPUTS, dict(inputs))
    write_text(directory / "command.txt", "bash run.sh " + shlex.join(words) + "\n")
    write_text(directory / CONFIG, dump_yaml(settings.model_dump()))
    return True


def done(directory: Path, settings: Common, inputs: Callable[[], Mapping[str, str]]) -> bool:
    """Whether a stage is finished, which is then logged; `inputs`, as of `open_stage`, is called if it is.

    Raises UserError where it was started with other settings, or finished with other inputs, or is to train longer and
    kept no checkpoint.
    """
    if not begun(directory):
        return False
    refuse_other(directory, settings)
    if not finished(directory):
        return False
    refuse_other_inputs(directory, inputs())
    if more := longer(directory, settings):
        if checkpoint(directory) is None:
            _refuse_longer(directory, more)
        return False
    if isinstance(settings, Training):  # a kill right before the end leaves what is not kept
        drop_checkpoints(directory, keep_last=settings.train.keep_checkpoint)
    logger.info(f"{directory} is done; remove it to do it again")
    return True


def standing(directory: Path, settings: Common) -> str:
    """What a start would find, in words. Raises UserError where it would be refused for its settings."""
    if not begun(directory):
        return "starts from nothing"
    refuse_other(directory, settings)
    if ended(directory, settings):
        return "is done"
    newest, more = checkpoint(directory), longer(directory, settings)
    if newest is None:
        _refuse_longer(directory, more)
    return f"goes on from step {state_of(newest)['step']}" + (f": {more}" if more else "")


def begun(directory: Path) -> bool:
    """Whether there is something to go on from, a checkpoint or the end; a start that left neither binds no other."""
    noted = (directory / CONFIG).is_file() and (directory / INPUTS).is_file()
    return noted and (finished(directory) or checkpoint(directory) is not None)


def remove_unsaved(directory: Path) -> None:
    """Remove what a start left that noted its settings and saved nothing to go on from; stages within are none of it.

    Otherwise another start would show its curves, samples and weights as its own. A model/ stays until the new one is
    whole: it is of a stage that had ended, and was to train longer when its checkpoints were removed by hand.
    """
    if not (directory / CONFIG).is_file():
        return
    for path in directory.iterdir():
        if path.is_dir() and (path.name in UNSAVED or path.suffix == ".part") and not (path / CONFIG).is_file():
            shutil.rmtree(path)
        elif path.is_file() and path.name in UNSAVED:
            path.unlink()
    if (model := directory / "model").is_dir() and not (model / CONFIG).is_file():
        logger.warning(f"{model} is of an earlier start, which left no checkpoint: it stays until this one ends")


def checkpoint(directory: Path) -> Path | None:
    """The newest whole checkpoint of a stage. Raises UserError where the one that `latest` names is not."""
    pointer = directory / CHECKPOINTS / "latest"
    if not pointer.is_file():
        return None
    newest = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    if not (newest / STATE).is_file():
        raise UserError(f"{pointer}: names {newest.name}, which is not there whole: remove {pointer.parent}")
    return newest


def state_of(newest: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: step, of (how many were planned), world, ..."""
    return json.loads((newest / STATE).read_text(encoding="utf-8"))


def drop_checkpoints(directory: Path, keep_last: bool) -> None:
    """Remove the checkpoints of a finished stage, but for the last if that is kept to train longer from."""
    newest = checkpoint(directory) if keep_last else None
    for path in (directory / CHECKPOINTS).glob("*-*") if newest else [directory / CHECKPOINTS]:
        if path != newest:
            shutil.rmtree(path, ignore_errors=True)


def ended(directory: Path, settings: Common) -> bool:
    """Whether a stage is finished and is not to be trained longer."""
    return finished(directory) and not (begun(directory) and longer(directory, settings))


def longer(directory: Path, settings: Common) -> str:
    """What was raised to train longer than the stage noted, in words: 'train.max_steps is 800 now, it was 400'."""
    changed = differences(directory, settings)
    return next(
        (f"{key} is {now} now, it was {before}" for key, before, now in changed if raised(key, before, now)), ""
    )


def _refuse_longer(directory: Path, more: str) -> NoReturn:
    raise UserError(
        f"{directory}: {more}, but it is done and kept no checkpoint to go on from (train.keep_checkpoint): "
        "choose another run= or name=, or remove the directory"
    )


def raised(key: str, before: object, now: object) -> bool:
    return key in LENGTHS and None not in (before, now) and now > before


def differences(directory: Path, settings: Common) -> list[tuple[str, object, object]]:
    """(key, before, now) of the settings that count and are not what the stage noted.

    What a finished stage noted of top-level settings that its algorithm has not, as older versions did, is no change.
    """
    noted, given = load_yaml(directory / CONFIG), settings.model_dump()
    if finished(directory):
        noted = {name: value for name, value in noted.items() if name in given}
    before, now = flatten(noted, "."), flatten(given, ".")
    keys = [key for key in sorted({*before, *now}) if not key.startswith(FREE)]
    return [(key, before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)]


def refuse_other(directory: Path, settings: Common) -> None:
    """Raises UserError naming the first setting that changed since the stage was started, but for a raised length."""
    for key, before, now in differences(directory, settings):
        if not raised(key, before, now):
            only = " (it may be raised, to train longer)" if key in LENGTHS and None not in (before, now) else ""
            raise UserError(
                f"{directory}: was started with {key}={before}, now it is {now}{only}: "
                "go back, choose another run= or name=, or remove the directory"
            )


def refuse_other_ranks(directory: Path, ranks: int) -> None:
    """Raises UserError where the checkpoint to go on from was not written by so many ranks."""
    newest = checkpoint(directory)
    world = ranks if newest is None else state_of(newest)["world"]
    if world != ranks:
        raise UserError(f"{newest}: was written by {world} processes, now there are {ranks}: resume with gpus={world}")


def refuse_other_inputs(directory: Path, inputs: Mapping[str, str]) -> None:
    """Raises UserError naming the first input that changed since the stage was started."""
    old = json.loads((directory / INPUTS).read_text("utf-8"))
    changed = [name for name in sorted({*old, *inputs}) if old.get(name) != inputs.get(name)]
    if changed:
        name, more = changed[0], f" (and {len(changed) - 1} more inputs have)" if len(changed) > 1 else ""
        how = "has changed" if name in old and name in inputs else "is new" if name in inputs else "is gone"
        raise UserError(
            f"{directory}: its {name} {how}{more} since it was started: choose another run= or name=, "
            "or remove the directory"
        )


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


def policy_model(settings: WithModel, place: str | None) -> ModelSettings:
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
