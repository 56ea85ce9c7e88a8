"""Kill a stage at random moments, start it again, and compare with a run that nobody killed, bit for bit.

    python -m tests.kill_and_resume stage=sft,reward,rl processes=1,2 kills=20 seed=1

stage, processes    which, and over how many ranks; lists make every combination
algo                of rl: alol, semi_offline or esrl
kills               per combination
seed                decides every moment
signals             kill (-9), term, int, preempt (term, and soon after kill) or mixed
refuse              stages where a second process is started beside the first
switch=1,2,4        numbers of ranks, one of which is drawn whenever a run that was killed goes on
zeros=zero0,zero3   likewise files of ds_configs/; under either, what a run leaves is compared to rounding
start               fork (no imports: 1 to 3 s a start) or fresh (as a user starts it, launcher included)
reference           fork or fresh: how the run that nobody kills is started
folder              where to work; kept (a temporary one is removed if everything was the same)
zero=zero2 ...      every other word goes to the stage

Prints a line per kill and a table at the end. The exit code is 1 if anything differed, was left over or hung.
"""

from __future__ import annotations

import itertools
import os

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")  # before torch: a fork must find one thread only

import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests import moments, sameness
from tests.starts import Forked, Fresh

ROWS, BATCH = 96, 20  # epochs end in the middle of a step
WORDS = ["runs_dir=runs", "task=assistant", f"data.task_size={ROWS}", "data.max_prompt_length=48"]
WORDS += ["data.max_response_length=48", "model.scratch.hidden_size=32", "model.scratch.num_layers=2"]
WORDS += ["model.scratch.num_heads=2", "max_tokens=300", f"batch_size={BATCH}", "learning_rate=1e-3"]
WORDS += ["eval.max_rows=12", "eval.num_samples=2", "logging_steps=3", "eval_steps=4", "save_steps=2"]
OF_STAGE = {
    "sft": ["num_train_epochs=2.6", "model.dropout=0.1"],
    "reward": ["name=helpfulness", "num_train_epochs=2.6"],
    "rl": ["num_train_epochs=5", "generation.max_new_tokens=12"],
}
OF_ALGO = {
    "alol": ["algo=alol", "value.max_prompts=16", "value.samples_per_prompt=2", "value.epochs=6"],
    "semi_offline": ["algo=semi_offline", "static=reference", "reward=rouge", "algorithm.settings.samples=8"],
    "esrl": ["algo=esrl", "sampler.k=3", "sampler.k_max=3", "sampler.entropy_range=recent", "num_train_epochs=2.6"],
}
STARTS = {"fork": Forked, "fresh": Fresh}
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
SIGNALS = {"kill": [(KILL,)], "term": [(TERM,)], "int": [(INT,)], "preempt": [(TERM, KILL)]}
SIGNALS["mixed"] = [(KILL,), (KILL,), (TERM,), (INT,), (TERM, KILL)]
# exit codes a signal may give: ours, its own; 1 from a launcher or a rank that lost another
CODES = {KILL: (-9, 137, 247, 1), TERM: (75, -15, 143, 241, 1), INT: (130, -2, 254, 1)}
KILLS_PER_ROUND = 6  # then it may run to its end, and another run is begun
RUN = Path("runs/default")


@dataclass(frozen=True)
class Plan:
    """What the command line asks for."""

    stage: str = "sft"
    processes: str = "1"
    kills: int = 10
    seed: int = 1
    algo: str = "alol"
    signals: str = "kill"
    refuse: str = "sft,reward,rl"
    start: str = "fork"
    reference: str = "fork"
    switch: str = ""
    zeros: str = ""
    folder: str = ""
    words: tuple[str, ...] = ()


@dataclass
class Tried:
    """What came of one combination."""

    kind: str  # the stage, or of rl the algorithm
    world: int
    hits: Counter[str] = field(default_factory=Counter)
    signals: Counter[str] = field(default_factory=Counter)
    near: bool = False  # compared to rounding
    compared: int = 0
    troubles: list[str] = field(default_factory=list)


def plan_of(words: Sequence[str]) -> Plan:
    """Our own words, and those of the stage."""
    given = dict(word.split("=", 1) for word in words)
    own = {key: given.pop(key) for key in list(given) if key in Plan.__dataclass_fields__}
    numbers = {key: int(own.pop(key)) for key in ("kills", "seed") if key in own}
    return Plan(**own, **numbers, words=tuple(f"{key}={value}" for key, value in given.items()))


def words_of(stage: str, algo: str, *more: str) -> list[str]:
    """The words that the stage gets; of a key given twice the last."""
    own = [*OF_STAGE[stage], *(OF_ALGO[algo] if stage == "rl" else [])]
    said = dict(word.split("=", 1) for word in [f"stage={stage}", *WORDS, *own, *more])
    return [f"{key}={value}" for key, value in said.items()]


class Case:
    """One stage over one number of ranks: its run that nobody kills, and those that are killed."""

    def __init__(self, plan: Plan, folder: Path, stage: str, world: int):
        self.plan, self.stage, self.world = plan, stage, world
        self.folder, self.base = folder / f"{stage}-{world}", folder / "base"
        self.rng = random.Random(f"{plan.seed} {stage} {world}")
        self.near = bool(plan.switch or plan.zeros)
        self.words = words_of(stage, plan.algo, *(["model.dropout=0"] if self.near else []), *plan.words)
        self.directory = RUN / (stage if stage != "reward" else "reward/helpfulness")
        self.tried = Tried(self.kind(), world, near=self.near)

    def prove(self) -> Tried:
        """Kill as often as asked, and compare every run that came to its end."""
        began = time.monotonic()
        whole = self.place("whole")
        code, trouble = self.start(whole, how=self.plan.reference).end()
        assert code == 0 and not trouble, f"{whole}/log: exit code {code} without a kill {trouble}"
        seconds = time.monotonic() - began
        print(f"{self.stage} on {self.world}: {seconds:.1f} s without a kill", flush=True)
        self.complain(sameness.leftovers(whole / RUN), "nobody killed it, but it left over")
        if self.stage in self.plan.refuse.split(","):
            self.intrude(place := self.place("refuse"))
            self.compare(place, whole)
        drawn = moments.draws(self.kind(), self.rng, seconds / 2)
        missed = None
        for number in itertools.count(1):
            place = self.place(f"round-{number}")
            missed = self.round(place, itertools.chain([missed] if missed else [], drawn))
            self.compare(place, whole)
            if self.tried.hits.total() >= self.plan.kills:
                return self.tried
        raise AssertionError

    def place(self, name: str) -> Path:
        """A fresh folder with what the stage starts from."""
        place = self.folder / name
        place.mkdir(parents=True)
        if self.stage == "rl":
            shutil.copytree(self.base / "runs", place / "runs")
        return place

    def round(self, place: Path, drawn: Iterator[moments.Moment]) -> moments.Moment | None:
        """One run, killed and started again until it has ended by itself.

        Returns:
            The moment that did not come before that end, to be tried where it may: on a run that has not begun.
        """
        for turn in range(KILLS_PER_ROUND):
            if self.tried.hits.total() >= self.plan.kills:
                break
            if not self.kill_one(place, moment := next(drawn)):
                return moment if turn else None
        self.ended_well(place, *self.again(place)[0].end())
        return None

    def again(self, place: Path) -> tuple[Forked | Fresh, int]:
        """A start of a run that is killed, and on how many ranks: as always, or on those that are drawn.

        A start that has no checkpoint to go on from is on `processes`: what other ranks begin is another training, of
        other values.
        """
        drawn = int(self.rng.choice(self.plan.switch.split(","))) if self.plan.switch else self.world
        ranks = drawn if (place / self.directory / "checkpoints" / "latest").is_file() else self.world
        zero = [f"zero={self.rng.choice(self.plan.zeros.split(','))}"] if self.plan.zeros else []
        return self.start(place, ranks, more=zero), ranks

    def kill_one(self, place: Path, moment: moments.Moment) -> bool:
        """Start, and kill at `moment`; False if the stage came to its end before."""
        numbers = self.rng.choice(SIGNALS[self.plan.signals])
        exactly, pause = self.rng.random() < 0.5, self.rng.uniform(0.0, 0.1)
        started, ranks = self.again(place)
        alone = self.rng.choice([None, *range(ranks)]) if ranks > 1 else None  # one rank, or all
        if not moments.wait(place / self.directory, moment, lambda: started.code() is not None):
            self.ended_well(place, *started.end())
            return False
        where = started.where(0, exactly)
        for number in numbers:
            started.signal(number, alone)
            time.sleep(pause if number is not numbers[-1] else 0.0)
        code, trouble = started.end()
        hit = moments.hit(where, self.crosses_epoch) or f"after {moment.event}"
        name = "+".join(signal.Signals(number).name for number in numbers)
        self.tried.hits[hit] += 1
        self.tried.signals[name] += 1
        whom = "" if ranks == 1 else (f" to all {ranks}" if alone is None else f" to rank {alone} of {ranks}")
        print(f"  {place.name}: {name}{whom} at {moment}: {hit}; exit code {code}", flush=True)
        if trouble or code not in (0, *(code for number in numbers for code in CODES[number])):
            self.complain([trouble or f"exit code {code}"], f"{place}: after {name} at {moment}")
        return True

    def intrude(self, place: Path) -> None:
        """A second process in the directory is refused."""
        first = self.start(place)
        self.wait_for(place, first, "row")
        first.signal(signal.SIGSTOP, None)  # so that it does not end meanwhile
        self.refused(place, self.start(place), "another process is at work there")
        first.signal(signal.SIGCONT, None)
        self.wait_for(place, first, "pointer")
        first.signal(KILL, None)
        first.end()
        self.ended_well(place, *self.start(place).end())

    def wait_for(self, place: Path, started: Forked | Fresh, event: str) -> None:
        came = moments.wait(place / self.directory, moments.Moment(event, 1, 0.0), lambda: started.code() is not None)
        assert came, f"{place}/log: it ended before its first {event}"

    def refused(self, place: Path, started: Forked | Fresh, why: str) -> None:
        code, trouble = started.end()
        if code != 2 or trouble or why not in (place / "log").read_text(encoding="utf-8"):
            self.complain([f"not refused because {why!r}: exit code {code} {trouble}"], str(place))

    def start(
        self, place: Path, world: int | None = None, how: str | None = None, more: Sequence[str] = ()
    ) -> Forked | Fresh:
        ranks = world or self.world
        return STARTS[how or self.plan.start](place, [*self.words, f"gpus={ranks}", *more], ranks)

    def kind(self) -> str:
        """What it does: the stage, or of rl the algorithm."""
        return self.plan.algo if self.stage == "rl" else self.stage

    def crosses_epoch(self, step: int) -> bool:
        """Whether the step counted from 0 draws from two epochs; A-LOL draws rows, not epochs."""
        return self.kind() != "alol" and step * BATCH // ROWS != ((step + 1) * BATCH - 1) // ROWS

    def ended_well(self, place: Path, code: int, trouble: str) -> None:
        if code != 0 or trouble:
            self.complain([f"exit code {code} {trouble}"], f"{place}/log: nobody killed it")

    def compare(self, place: Path, whole: Path) -> None:
        """With the run that nobody killed; what was the same is removed."""
        found = sameness.differences(whole / RUN, place / RUN, self.near)
        found += [f"left over: {name}" for name in sameness.leftovers(place / RUN)]
        self.tried.compared += 1
        self.complain(found, str(place))
        same = "the same to rounding" if self.near else "identical"
        print(f"  {place.name}: {same if not found else 'DIFFERENT'}", flush=True)
        if not found:
            shutil.rmtree(place)

    def complain(self, found: Sequence[str], where: str) -> None:
        for line in found:
            print(f"    {where}: {line}", flush=True)
            self.tried.troubles.append(f"{where}: {line}")


def make_base(folder: Path) -> None:
    """What RL starts from: an SFT model and a reward model."""
    (folder / "base").mkdir()
    for stage in ("sft", "reward"):
        code, _ = Forked(folder / "base", words_of(stage, "", "num_train_epochs=1"), 1).end()
        assert code == 0, f"{folder}/base/log: exit code {code}"


def table(tried: Sequence[Tried]) -> str:
    """stage, ranks, signals, kills by what was hit, runs compared, what differed."""
    lines = []
    for one in tried:
        signals = ", ".join(f"{count} {name}" for name, count in sorted(one.signals.items()))
        hits = ", ".join(f"{count} {name}" for name, count in one.hits.most_common())
        same = "all the same to rounding" if one.near else "all identical"
        end = same if not one.troubles else f"{len(one.troubles)} TROUBLES, first: {one.troubles[0]}"
        lines.append(f"{one.kind} on {one.world}: {signals}: {hits}; {one.compared} runs compared, {end}")
    return "\n".join(lines)


def main(words: Sequence[str]) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would forks
    plan = plan_of(words)
    folder = Path(plan.folder or tempfile.mkdtemp(prefix="kills-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    stages, worlds = plan.stage.split(","), [int(world) for world in plan.processes.split(",")]
    if "rl" in stages:
        make_base(folder)
    tried = [Case(plan, folder, stage, world).prove() for stage in stages for world in worlds]
    print(table(tried))
    if any(one.troubles for one in tried):
        return 1
    if not plan.folder:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
