"""Worker processes that judge texts, so that this process can run the model meanwhile.

Each is `pipeline/rewards/worker_main.py` at the other end of a pipe. It is started anew, not forked, and without
the stage's own imports, which take three times as long as a worker's. It ends when this process does,
whatever ends that.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import Pipe

from pipeline.errors import UserError

LOOK_SECONDS = 1.0  # between two looks whether a worker that does not answer is still there

Values = dict[str, list[float]]  # by reward


@dataclass(frozen=True)
class Question:
    """A contiguous part of the texts that rewards are called with, from number `first` on."""

    rewards: list[str]
    first: int
    prompts: list[str]
    completions: list[str]
    columns: dict[str, list]


class Judges:
    """Worker processes that all know the same rewards. They end when this is forgotten."""

    def __init__(self, names: Mapping[str, str], count: int):
        """`names`: what `reward=` would name, by the name of the reward."""
        self.names = dict(names)
        self._workers = [Worker(self.names) for _ in range(count)]

    def ask(
        self, rewards: Sequence[str], prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, list]
    ) -> Callable[[], Values]:
        """Have each worker judge a part; what is returned waits for all values, in the order of the texts.

        It is what raises UserError, never this call: a reward's, or that of a worker that died.
        """
        asked = []
        for worker, (start, end) in zip(self._workers, cuts(len(completions), len(self._workers)), strict=True):
            if start < end:
                part = {name: list(values[start:end]) for name, values in columns.items()}
                texts = list(prompts[start:end]), list(completions[start:end])
                asked.append((worker, worker.ask(Question(list(rewards), start, *texts, part))))

        def values() -> Values:
            parts = [worker.answer(number) for worker, number in asked]
            return {reward: [value for part in parts for value in part[reward]] for reward in rewards}

        return values


def cuts(size: int, parts: int) -> list[tuple[int, int]]:
    """(start, end) of contiguous parts that differ by at most one in length."""
    return list(pairwise(i * size // parts for i in range(parts + 1)))


class Worker:
    """One worker process. It is sent a question when it has answered the one before, so that sending never waits."""

    def __init__(self, names: Mapping[str, str]):
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-u", "-m", "pipeline.rewards.worker_main", str(theirs.fileno())]
        # in a session of its own: Ctrl-C is for this process alone
        self._process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
        )
        theirs.close()
        self._open: deque[tuple[int, Question]] = deque()  # not answered; the first one has been sent
        self._answers: dict[int, Values | UserError] = {}
        self._count = 0
        self._send(dict(names))

    def ask(self, question: Question) -> int:
        """The number under which `answer` has the answer."""
        self._count += 1
        self._open.append((self._count, question))
        if len(self._open) == 1:
            self._send(question)
        return self._count

    def answer(self, number: int) -> Values:
        """Wait for the answer. Raises UserError, where that is one, or where the worker is gone."""
        while number not in self._answers:
            self._receive()
        found = self._answers.pop(number)
        if isinstance(found, UserError):
            raise found
        return found

    def _send(self, message: object) -> None:
        with suppress(ConnectionError):  # a worker that is gone is found where its answer is read
            self._pipe.send(message)

    def _receive(self) -> None:
        """Take the answer to the question that is open, and send the next one."""
        number, question = self._open[0]
        try:
            # a process that the worker has started may hold the pipe open when the worker is gone
            while not self._pipe.poll(LOOK_SECONDS):
                if self._process.poll() is not None and not self._pipe.poll():
                    raise EOFError
            self._answers[number] = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise UserError(lost(self._process.wait(), question)) from None
        self._open.popleft()
        if self._open:
            self._send(self._open[0][1])


def environment() -> dict[str, str]:
    """Ours, with the places where we find modules, and one thread for each worker's arithmetic."""
    places = os.pathsep.join(place or os.getcwd() for place in sys.path)
    return {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}


def lost(code: int, question: Question) -> str:
    """What to say of a worker that ended with `code`, that of subprocess: -N for signal N."""
    ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    texts = f"completions {question.first} to {question.first + len(question.completions) - 1}"
    return (
        f"rewards.workers: a worker process {ending} while it was to judge {texts} by {', '.join(question.rewards)}, "
        "wanted values: fewer workers take less memory, rewards.workers=0 judges in the stage's own process"
    )
