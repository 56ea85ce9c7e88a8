"""What dry_run=true shows: of each step what it is and takes, then what a start would refuse, last the commands.

The faults are those of stages/faults.py, which a start asks too; and, since here is time for torch, what a stage would
find in its algorithm's settings, its model's configuration and the inputs of what was begun. Nothing is written.
"""

from __future__ import annotations

import io
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from functools import partial

from pipeline.config.resolve import Resolved
from pipeline.config.schema import EvaluateStage, GenerateStage, RewardStage, RlStage, Training, WithModel
from pipeline.config.shipped import shipped
from pipeline.config.yaml_layers import as_word
from pipeline.config.yaml_text import dump_yaml
from pipeline.data import hub
from pipeline.data.splits import split_places
from pipeline.errors import UserError
from pipeline.files import flatten
from pipeline.launch import going_on, run_dir
from pipeline.launch.entry import USER_ERROR, complain, logger, warn_of_slow_bf16
from pipeline.launch.launcher import batch_file, command, environment, world
from stages import faults, inputs

WEIGHTS = "data.train."


def show(steps: Sequence[Resolved]) -> int:
    """Print it all; faults and notes on stderr. Exit code 2 where a start would be refused.

    Under launcher=slurm what is printed is a file for sbatch, with all else as comments.
    """
    launch = steps[0].settings.launch
    if launch.launcher != "slurm" or "SLURM_JOB_ID" in os.environ:
        return _show(steps)
    tasks = launch.nnodes * launch.processes  # as in the allocation that the file asks for
    os.environ |= {"SLURM_JOB_ID": "0", "SLURM_NNODES": str(launch.nnodes), "SLURM_NTASKS": str(tasks)}
    shown = io.StringIO()
    with redirect_stdout(shown):
        code = _show(steps)
    print(batch_file(launch, steps[0].settings.run, [step.words for step in steps], shown.getvalue()), flush=True)
    return code


def _show(steps: Sequence[Resolved]) -> int:
    environ = dict(os.environ)  # before torch and DeepSpeed add to it
    found = faults.of(steps, environ)
    before_are_done = True
    for step in steps:
        print(
            f"# {step.title}",
            *changed(step),
            *chosen(step),
            dump_yaml(step.settings.model_dump()),
            sep="\n",
            flush=True,
        )
        found += _shown(partial(memory, step))
        found += _shown(partial(algorithm, step))
        if before_are_done:  # else its inputs may still change
            found += _shown(partial(as_begun, step))
        before_are_done &= going_on.ended(run_dir.stage_dir(step.settings, step.stage), step.settings)
    for line in faults.notes(steps, environ):
        logger.warning(f"note: {line}")
    for precision in dict.fromkeys(_precisions(steps)):
        warn_of_slow_bf16(precision)
    found = [*dict.fromkeys(found)]
    for number, line in enumerate(found, 1):
        complain(UserError(f"fault {number} of {len(found)}: {line}"))
    print("\n".join(spoken(step, environ) for step in steps), flush=True)
    return USER_ERROR if found else 0


def changed(step: Resolved) -> Iterator[str]:
    """The settings that are not as by default, as words, each with its default."""
    now = flatten(step.settings.model_dump(), ".")
    if weights := {key: value for key, value in now.items() if key.startswith(WEIGHTS)}:  # names of files have dots
        now = {key: value for key, value in now.items() if key not in weights}
        now[WEIGHTS[:-1]] = {key.removeprefix(WEIGHTS): value for key, value in weights.items()}
    usual = shipped(step.stage, now)
    words = {as_word(key, value): usual.get(key) for key, value in now.items() if value != usual.get(key)}
    yield "# not as by default:" if words else "# all as by default"
    width = max(map(len, words), default=0)
    yield from (f"#   {word:{width}}   default: {as_word('', default)[1:]}" for word, default in words.items())


def chosen(step: Resolved) -> Iterator[str]:
    """A line for each split whose files are found by a pattern, in a list or as shards; none where they are not."""
    settings = step.settings
    if not isinstance(settings, WithModel) or settings.data.task is not None:
        return
    if settings.data.path is not None and hub.is_hub_name(settings.data.path):
        return
    with suppress(UserError):  # faults.py tells of it
        for split, files in split_places(settings.data).items():
            if len(files) > 1 or (settings.data.path is None and [*files] != [getattr(settings.data, split)]):
                count = f"{len(files):,} file" + "s" * (len(files) > 1)
                yield f"# data.{split}: {count}: {', '.join(files)}"


def memory(step: Resolved) -> None:
    """Print the estimate for a stage that trains. Raises UserError where its model's configuration cannot be read."""
    settings = step.settings
    if not isinstance(settings, Training):
        return
    from pipeline.models.plan import estimate

    if isinstance(settings, RewardStage | RlStage):
        with suppress(UserError):  # faults.py has told of it, or an earlier step makes the model
            settings = settings.model_copy(update={"model": run_dir.start_model(settings)})
    print(f"{estimate(settings)}\n", flush=True)


def algorithm(step: Resolved) -> None:
    """Raises UserError where the settings of the algorithm that a stage trains by are not what its file wants."""
    if step.stage in inputs.OF and isinstance(step.settings, Training):
        from pipeline.trainer.objective import objective_of

        objective_of(step.settings.algorithm)


def as_begun(step: Resolved) -> None:
    """Say where a stage is done. Raises UserError where it was begun with other inputs."""
    directory = run_dir.stage_dir(step.settings, step.stage)
    if step.stage in inputs.OF and going_on.begun(directory):
        going_on.refuse_other_inputs(directory, inputs.OF[step.stage](step.settings))
        cut = going_on.spoken_cut(directory, step.settings, world(step.settings.launch, step.stage, os.environ))
        logger.warning(f"note: {directory} {going_on.standing(directory, step.settings)}" + (cut and f", with {cut}"))


def spoken(step: Resolved, environ: Mapping[str, str]) -> str:
    """The command with the environment that it adds; where there can be none, the user's."""
    words = [word for word in step.words if not word.startswith("dry_run=")]
    try:
        argv = command(step.settings.launch, step.stage, words, environ)
        env = environment(step.settings.launch, step.stage, environ)
    except UserError:
        return f"bash run.sh {shlex.join(words)}"
    return shlex.join([*(f"{name}={value}" for name, value in env.items() if name not in environ), *argv])


def _shown(show: Callable[[], None]) -> list[str]:
    try:
        show()
    except UserError as error:
        return [str(error)]
    return []


def _precisions(steps: Sequence[Resolved]) -> Iterator[str]:
    kinds = Training | GenerateStage | EvaluateStage
    yield from (step.settings.train.precision for step in steps if isinstance(step.settings, kinds))
