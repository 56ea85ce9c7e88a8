"""How the process of a stage runs: key=value words -> settings -> main; user errors in one line with exit code 2."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipeline import errors
from pipeline.config.resolve import resolve
from pipeline.config.schema import EvaluateStage, GenerateStage, Training
from pipeline.errors import LostError, PreemptedError, UserError
from pipeline.launch import machine, run_dir, stopping
from pipeline.launch.launcher import PREEMPTED, rank_environment, unpacked

LOST = 1  # another process ended: its code tells
USER_ERROR = 2
PATIENCE = 5.0

logger = logging.getLogger("tiffin")  # what a program says while it runs; results that the user requested are printed


def run(main: Callable[[Any, list[str]], None], stage: str) -> NoReturn:
    """Call `main(settings, words)` with the settings that the process's words mean for `stage`, then exit."""
    words = unpacked(sys.argv[1:])
    if not any(word.startswith("stage=") for word in words):
        words = [f"stage={stage}", *words]
    leave(lambda: _call(main, stage, words))


def leave(work: Callable[[], int]) -> NoReturn:
    """Exit with what `work` returns; 2 and one line on stderr for a UserError or what the machine refuses; 1 and a line
    where another process is lost; 130 when
    interrupted; 75 when saved after SIGTERM."""
    set_up_logging()
    try:
        code = work()
    except UserError as error:
        complain(error)
        code = USER_ERROR
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (OSError, RuntimeError) as error:
        mistake = errors.as_user_error(error)
        lost = errors.as_lost_error(error) if isinstance(error, RuntimeError) else None
        if mistake is None and lost is None:
            raise
        complain(mistake or lost)
        code = LOST if mistake is None else USER_ERROR
    except PreemptedError as error:
        complain(error)
        code = PREEMPTED
    except KeyboardInterrupt as stopped:  # of who had others to stop first; else the signal's handler has ended it
        stopping.leave(str(stopped) or "stopped by Ctrl-C")
    sys.stdout.flush()
    sys.stderr.flush()
    if code != 0:  # at once: a rank that tears down a live process group may abort and lose its exit code
        os._exit(code)
    sys.exit(0)


class Lines(logging.Handler):
    """Each record as a line: on stdout, or on stderr behind `tiffin: ` where it is a warning or worse."""

    def emit(self, record: logging.LogRecord) -> None:
        grave = record.levelno >= logging.WARNING
        text = f"tiffin: {record.getMessage()}" if grave else record.getMessage()
        print(text, file=sys.stderr if grave else sys.stdout, flush=True)


def set_up_logging() -> None:
    """Show what is logged to `tiffin`; of the ranks of a launch only the first shows more than errors."""
    logger.handlers, logger.propagate = [Lines()], False
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)  # its tries: the error says it once


def complain(error: UserError | LostError | PreemptedError) -> None:
    """One line on stderr, from one rank per machine where all of them meet the same error.

    Another than the first speaks where that one did not: a launcher would have ended it within PATIENCE seconds.
    """
    rank, first = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0") == "0"
    if not first and isinstance(error, PreemptedError):
        return
    if not first or isinstance(error, LostError):  # a launcher ends who only lost another, and that one has spoken
        time.sleep(PATIENCE)
    where = "" if rank == "0" else f"rank {rank}: "
    logger.error(f"{where}{' '.join(str(error).split())}")


def warn_of_slow_bf16(precision: str, system: Path = machine.SYSTEM) -> None:
    """Say so where a processor without bf16 instructions is to compute in bf16."""
    if precision == "bf16" and not machine.has_gpu(system) and machine.computes_bf16(system) is False:
        logger.warning("train.precision: bf16 on a CPU without bf16 instructions takes several times as long as fp32")


def _call(main: Callable[[Any, list[str]], None], stage: str, words: Sequence[str]) -> int:
    resolved = resolve(words)
    if resolved.stage != stage:
        raise UserError(f"command line: stage={resolved.stage}, but this is stages/{stage}.py")
    os.environ.update(rank_environment(resolved.settings.launch, os.environ))
    set_up_logging()  # now that the rank is known, under srun too
    if isinstance(resolved.settings, Training | GenerateStage | EvaluateStage) and stage != "plan":
        warn_of_slow_bf16(resolved.settings.train.precision)
    stopping.listen(run_dir.stage_dir(resolved.settings, stage), resolved.settings)
    main(resolved.settings, list(words))
    return 0
