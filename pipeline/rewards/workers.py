"""Worker processes that call rewards, so that this process can run the model meanwhile.

Each is `pipeline/rewards/worker_main.py` at the other end of a pipe. It is started anew, not forked, and ends when
this process does, whatever ends that. Not a ProcessPoolExecutor: its workers would make the stage's own imports again,
torch among them, which takes ten times as long; it does not say how a worker ended; and with it Ctrl-C waits for
rewards.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import Pipe

from pipeline.errors import UserError

POLL_SECONDS = 1.0  # between two checks whether a worker that does not answer is still there

Values = dict[str, list[float | None]]  # by reward


@dataclass(frozen=True)
class Question:
    """A contiguous part of the texts that rewards are called with, from number `first` on."""

    rewards: list[str]
    first: int
    prompts: list[str]
    completions: list[str]
    columns: dict[str, list]


class RewardWorkers:
    """Worker processes that all know the same rewards. They end when this is forgotten."""

    def __init__(self, names: Mapping[str, str], count: int):
        """`names`: what `reward=` would name, by the name of the reward."""
        self.names = dict(names)
        self._workers = [Worker(self.names) for _ in range(count)]

    def ask(
        self, rewards: Sequence[str], prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, list]
    ) -> Callable[[], Values]:
        """Have each worker score a part; what is returned waits for all values, in the order of the texts.

        Only that raises UserError: a reward's, or that of a worker that died.
        """
        asked = []
        for worker, (start, end) in zip(self._workers, cuts(len(completions), len(self._workers)), strict=True):
            if start < end:
                part = {name: list(values[start:end]) for name, values in columns.items()}
                texts = list(prompts[start:end]), list(completions[start:end])
                asked.append(worker.ask(Question(list(rewards), start, *texts, part)))

        def values() -> Values:
            try:
                parts = [answer.result() for answer in asked]
            except KeyboardInterrupt:  # Python waits for its threads when it ends, and they for an answer
                for worker in self._workers:
                    worker.process.kill()
                raise
            return {reward: [value for part in parts for value in part[reward]] for reward in rewards}

        return values


def cuts(size: int, parts: int) -> list[tuple[int, int]]:
    """(start, end) of contiguous parts that differ by at most one in length."""
    return list(pairwise(i * size // parts for i in range(parts + 1)))


class Worker:
    """One worker process, and a thread that puts one question after the other to it."""

    def __init__(self, names: Mapping[str, str]):
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-u", "-m", "pipeline.rewards.worker_main", str(theirs.fileno())]
        # in a session of its own: Ctrl-C is for this process alone
        self.process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
        )
        theirs.close()
        self._thread = ThreadPoolExecutor(1)
        self._thread.submit(self._pipe.send, dict(names))  # a worker that is gone shows where its answer is read

    def ask(self, question: Question) -> Future[Values]:
        """The values to come; or a UserError, where the answer is one, or where the worker is gone."""
        return self._thread.submit(self._answer, question)

    def _answer(self, question: Question) -> Values:
        try:
            self._pipe.send(question)
            # the pipe may be open though the worker is gone: a process that it has started may hold it
            while not self._pipe.poll(POLL_SECONDS):
                if self.process.poll() is not None and not self._pipe.poll():
                    raise EOFError
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise UserError(lost(self.process.wait(), question)) from None
        if isinstance(answer, UserError):
            raise answer
        return answer


def environment() -> dict[str, str]:
    """Ours, with the places where we find modules, and one thread for each worker's arithmetic."""
    places = os.pathsep.join(place or os.getcwd() for place in sys.path)
    return {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}


def lost(code: int, question: Question) -> str:
    """What to say of a worker that ended with `code`, that of subprocess: -N for signal N."""
    ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    texts = f"completions {question.first} to {question.first + len(question.completions) - 1}"
    return (
        f"rewards.workers: a worker process {ending} while it scored {texts} by {', '.join(question.rewards)}, wanted "
        "values: fewer workers take less memory, rewards.workers=0 calls rewards in the stage's own process"
    )
