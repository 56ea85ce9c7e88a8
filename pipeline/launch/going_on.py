"""Whether a stage's directory is done, may go on, or was begun as something else.

A stage directory holds what made it (config.yaml, inputs.json), so that a second start neither redoes what is done nor
continues what has become something else. What is compared, what may differ, and what a checkpoint says, stand here.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from pipeline.config.deepspeed import read_ds_config
from pipeline.config.schema import Common, Training
from pipeline.config.yaml_layers import load_yaml
from pipeline.errors import UserError
from pipeline.files import flatten

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
    "generation.server",
)
# What changes how a step is computed, and not what it is: the numbers agree to rounding, and a line says so.
CUT = ("train.zero", "train.micro_batch_size", "train.max_tokens", "train.gradient_checkpointing", "train.padding_free")
OLDER = {"train.group_by_length": False, "train.padding_free": False}  # what versions did that had no such setting
OLDER |= {"best.of_prompt": 1, "algorithm.settings.baseline": "value", "algorithm.settings.shift": 0.0}
OLDER |= {"algorithm.settings.weight_temperature": 1.0, "algorithm.settings.weight_limit": 20.0}
OLDER |= {"algorithm.settings.clip_form": "bound"}
ZERO, HELD = "train.zero", "train.zero holds"  # the name of a file, and what it held: a user's own may be edited
LENGTHS = ("train.max_steps", "train.num_train_epochs")  # these may be raised, to train longer
CONFIG, INPUTS, RESULTS = "config.yaml", "inputs.json", "results.json"
CHECKPOINTS, STATE = "checkpoints", "state.json"  # the folder of a stage's checkpoints; the last file of each
EVALUATED = "evaluated"  # the folder of what an evaluation that has not ended found, a file for each policy
PIECES = "pieces-{}.json"  # of each, what a rank held of the weights
# model/ is no draft
UNSAVED = ("best", "last", "handed", "non_finite", "samples", "held_out", "tensorboard", "checkpoints", "data.json")
UNSAVED += ("normalise.json", "metrics.jsonl", "rewards.jsonl", "train.jsonl", "validation.jsonl", "test.jsonl")

logger = logging.getLogger("tiffin")


def finished(directory: Path) -> bool:
    """Whether a stage's last file is there."""
    return (directory / RESULTS).is_file()


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
        kept = evaluated(directory, settings)
        return f"goes on: {kept}" if kept else "starts from nothing"
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


def evaluated(directory: Path, settings: Common) -> str:
    """How many policies an evaluation of these settings has ended, in words; "" where there are none."""
    count = len([*(directory / EVALUATED).glob("*.pt")])
    if not count or not (directory / CONFIG).is_file() or differences(directory, settings):
        return ""
    return "1 policy is evaluated" if count == 1 else f"{count:,} policies are evaluated"


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
    before = {**{key: value for key, value in OLDER.items() if key in now}, **before}
    keys = [key for key in sorted({*before, *now}) if not key.startswith((*FREE, *CUT))]
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


def cut_of(settings: Common) -> dict[str, Any]:
    """What a checkpoint notes of how its steps were computed: CUT, and what the file of train.zero holds."""
    flat = flatten(settings.model_dump(), ".")
    return {**{key: flat[key] for key in CUT}, HELD: flatten(read_ds_config(flat[ZERO]), ".")}


def cut_anew(directory: Path, settings: Common, ranks: int) -> list[tuple[str, object, object]]:
    """(key, before, now) of CUT and of the processes, where the newest checkpoint was not computed as `ranks` will.

    Of train.zero its file's content counts, where it was noted: the keys within that changed if the name has not.
    """
    newest = checkpoint(directory)
    if newest is None:
        return []
    state, noted = state_of(newest), flatten(load_yaml(directory / CONFIG), ".")
    before = OLDER | (state.get("cut") or {key: noted[key] for key in CUT if key in noted})  # which older ones kept
    given = cut_of(settings)
    compared = [("gpus", state["world"], ranks), *((key, before[key], given[key]) for key in CUT)]
    changed = [(key, was, now) for key, was, now in compared if was != now]
    if HELD not in before:
        return changed
    old, new, name = before[HELD], given[HELD], given[ZERO]
    if before[ZERO] == name:
        within = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        return [*changed, *((f"{ZERO}: {name}: {key}", old.get(key), new.get(key)) for key in within)]
    return [one for one in changed if one[0] != ZERO or old != new]


def spoken_cut(directory: Path, settings: Common, ranks: int) -> str:
    """What `cut_anew` found, in words; empty where nothing changed."""
    changed = cut_anew(directory, settings, ranks)
    if not changed:
        return ""
    what = ", ".join(f"{key}={now} (it was {before})" for key, before, now in changed)
    return f"{what}: the same steps, to rounding and no longer to the bit; dropout, if there is any, draws other masks"


def refuse_other_ranks(directory: Path, settings: Common, ranks: int) -> None:
    """Raises UserError where the checkpoint to go on from can be read as it was written only, and this is otherwise."""
    changed = {key: before for key, before, _ in cut_anew(directory, settings, ranks) if key.startswith(("gpus", ZERO))}
    if not changed:
        return
    newest = checkpoint(directory)
    cure = "resume with " + " ".join(f"{key}={before}" for key, before in changed.items())
    file = newest / PIECES.format(0)
    if not file.is_file():
        raise UserError(f"{newest}: was written by an older version, for as many processes and one ZeRO stage: {cure}")
    wrote = json.loads(file.read_text(encoding="utf-8"))
    stage = read_ds_config(settings.train.zero)["zero_optimization"]["stage"]
    if wrote["pieces"] is None and (wrote["world"], wrote["stage"]) != (ranks, stage):
        raise UserError(
            f"{newest}: was written by {wrote['world']} processes under ZeRO stage {wrote['stage']}, and what "
            f"{wrote['optimizer']} keeps there cannot be cut anew: {cure}"
        )


def first_ranks(directory: Path) -> int | None:
    """How many processes began the stage that goes on in `directory`; None where it has no checkpoint."""
    newest = checkpoint(directory)
    if newest is None:
        return None
    state = state_of(newest)
    return state.get("began") or state["world"]


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
