"""A worker process of `workers.py`: receives the names of rewards, then answers each question by values or an error.

`python -m pipeline.rewards.worker_main N`, with N the file descriptor of its end of the pipe.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection

from pipeline.errors import UserError
from pipeline.rewards.rewards import WeightedReward, call, loaded
from pipeline.rewards.workers import Question, Values

POLL_SECONDS = 0.5  # between two checks whether the process that asks is still there


def main(pipe: Connection) -> None:
    """Answer until the process that asks is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a stage that is stopped still finishes its step
        signal.signal(number, signal.SIG_IGN)
    os.set_inheritable(pipe.fileno(), False)
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    try:
        rewards = known(pipe.recv())
        while True:
            pipe.send(answer(rewards, pipe.recv()))
    except (EOFError, ConnectionError):
        return


def known(names: Mapping[str, str]) -> dict[str, WeightedReward] | UserError:
    """The rewards by name, or why they cannot be had, which is the answer to every question."""
    try:
        return {name: WeightedReward(name, 1.0, loaded(source), given=source) for name, source in names.items()}
    except UserError as error:
        return error


def answer(rewards: dict[str, WeightedReward] | UserError, question: Question) -> Values | UserError:
    """The values of each reward, or the error of the first that fails."""
    if isinstance(rewards, UserError):
        return rewards
    given = (question.prompts, question.completions, question.columns, question.first)
    try:
        return {name: call(rewards[name], *given) for name in question.rewards}
    except UserError as error:
        return error


def end_with(parent: int) -> None:
    """End this process when `parent` has ended, even while a reward runs."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(0)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
    os._exit(0)  # whatever threads a reward has left
