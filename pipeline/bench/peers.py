"""Tokens per second beside TRL's trainers, in turns: our step here, theirs in the interpreter `peer_python`.

Both read the same token ids, start from the same weights, take equally many sequences per optimizer step, and count
the tokens they read without padding: SFT against SFTTrainer, the reward model against RewardTrainer, and A-LOL against
DPOTrainer with precomputed reference log-probabilities. DPO reads pairs, A-LOL both responses of each pair as rows of
their own, so that all learn from the same sequences and a token read stands for equally many response tokens.
TRL runs as it comes (`default`: activations are recomputed, 8 rows per call) and `tuned`: no recomputation, and of
rows grouped by length, 32, 16 or 8 per call, or at random, 8 per call, what was fastest for SFT and reward models.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.bench.bed import Bed, algorithm_of, environment, even, job, new_engine, new_policy, new_scalar, stepper
from pipeline.bench.measure import Goal, Result, compared, timed
from pipeline.bench.steps import with_advantages
from pipeline.errors import UserError
from pipeline.models import loading
from pipeline.records import Item
from pipeline.trainer.loop import Job

FASTER = Goal(1.2, at_least=True)
WORKER = Path(__file__).with_name("trl_worker.py")
LENGTH = 32  # tokens of each prompt and of each response where lengths do not vary
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "tuned": {
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 16,
        "train_sampling_strategy": "group_by_length",
    },
}


@dataclass(frozen=True)
class Match:
    """One comparison: our job, and what the peer trains on."""

    name: str
    trainer: str  # sft | reward | dpo, as the worker calls them
    ours: Job
    rows: list[dict[str, Any]]
    batch_size: int  # of the peer: rows, or pairs


class Peer:
    """The worker process: jobs go in, steps come out."""

    def __init__(self, process: subprocess.Popen[str], log: Path):
        self.process, self.log = process, log

    def ask(self, words: str) -> dict[str, float]:
        """Send a line, return the answer. Raises UserError where the worker has ended."""
        try:
            self.process.stdin.write(words + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self.process.wait()
            raise UserError(f"peer_python: its worker ended with exit code {code}, wanted steps: see {self.log}")
        return json.loads(answer)

    def step(self) -> tuple[float, float]:
        """Tokens and seconds of one step."""
        answer = self.ask("go")
        return answer["tokens"], answer["seconds"]


def measure(bed: Bed) -> list[Result]:
    python = bed.settings.peer_python
    if python is None:
        print("peers: left out, peer_python names no interpreter with trl in it", flush=True)
        return []
    results = []
    with worker(python, bed.directory / "trl.log") as peer:
        for shape, change in (("ragged", list), ("even", lambda items: even(items, LENGTH, LENGTH))):
            for match in matches(replace(bed, singles=change(bed.singles), pairs=change(bed.pairs))):
                for name, options in CONFIGURATIONS.items():
                    rounds = contest(bed, match, peer, options)
                    results.append(compared(f"{match.name}, {shape} rows, TRL {name}", "tok/s", rounds, FASTER))
    return results


@contextmanager
def worker(python: str, log: Path) -> Iterator[Peer]:
    """A worker under the interpreter `python`, ended when the block ends."""
    with log.open("w", encoding="utf-8") as errors:
        try:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
            process = subprocess.Popen([python, str(WORKER)], env=environment(), **pipes)
        except OSError as error:
            raise UserError(f"peer_python: {python} cannot be started ({error.strerror}), wanted a Python") from None
        try:
            yield Peer(process, log)
        finally:
            process.kill()
            process.wait()


def matches(bed: Bed) -> Iterator[Match]:
    """The three comparisons on the rows of `bed`. A pair counts as two sequences of the batch."""
    size = bed.settings.train.batch_size
    sft = job(bed, new_engine(bed, new_policy(bed)), algorithm_of("stage=sft"), bed.singles, size)
    yield Match("SFT", "sft", sft, [single_row(item) for item in bed.singles], size)
    pairs = [pair_row(item) for item in bed.pairs]
    reward = job(bed, new_engine(bed, new_scalar(bed)), algorithm_of("stage=reward"), bed.pairs, size // 2)
    yield Match("reward model", "reward", reward, [whole_pair(row) for row in pairs], size // 2)
    policy = new_engine(bed, new_policy(bed))
    both = [replace(item, rows=(row,)) for item in bed.pairs for row in item.rows]
    scored = with_advantages(replace(bed, singles=both), policy)
    alol = job(bed, policy, algorithm_of("stage=rl", "algo=alol"), scored, size)
    yield Match("A-LOL / DPO", "dpo", alol, pairs, size // 2)


def single_row(item: Item) -> dict[str, Any]:
    prompt, response = item.rows[0].prompt_ids, item.rows[0].response_ids
    mask = [0] * len(prompt) + [1] * len(response)
    return {"input_ids": [*prompt, *response], "completion_mask": mask, "length": len(mask)}


def pair_row(item: Item) -> dict[str, Any]:
    chosen, rejected = item.rows
    ids = {"prompt_ids": chosen.prompt_ids, "chosen_ids": chosen.response_ids, "rejected_ids": rejected.response_ids}
    return {**{name: list(row) for name, row in ids.items()}, "length": max(len(chosen), len(rejected))}


def whole_pair(row: dict[str, Any]) -> dict[str, Any]:
    """A pair as RewardTrainer takes it: the prompt at the head of both."""
    both = {name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")}
    return {**both, "length": row["length"]}


def contest(bed: Bed, match: Match, peer: Peer, options: dict[str, Any]) -> list[tuple[float, float]]:
    """Per round the tokens per second of our steps and of the peer's, taken in turns."""
    plan = bed.plan
    steps = plan.warm + plan.rounds * plan.steps
    peer.ask(json.dumps(peer_job(bed, match, steps, options)))
    take, rounds = stepper(match.ours), []
    for number in range(plan.warm):
        ours(match.ours, take, number, plan.clock)
        peer.step()
    for start in range(plan.warm, steps, plan.steps):
        turns = [
            (ours(match.ours, take, number, plan.clock), peer.step()) for number in range(start, start + plan.steps)
        ]
        rounds.append((speed([mine for mine, _ in turns]), speed([theirs for _, theirs in turns])))
    return rounds


def speed(steps: list[tuple[float, float]]) -> float:
    """Tokens per second of steps of (tokens, seconds)."""
    return sum(tokens for tokens, _ in steps) / sum(seconds for _, seconds in steps)


def ours(work: Job, take: Callable[[int], None], number: int, clock: str) -> tuple[float, float]:
    """Tokens and seconds of our step."""
    seconds = timed(lambda: take(number), clock)
    return sum(int(batch.input_mask.sum()) for batch in work.windows.at(number)), seconds


def peer_job(bed: Bed, match: Match, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """The worker's job, its rows and the model it starts from written to the bed's folder."""
    rows = bed.folder / f"{match.trainer}.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in match.rows), encoding="utf-8")
    model = bed.folder / "model"
    if not model.is_dir():
        policy = new_policy(bed)
        loading.save(model, policy.model, policy.model.state_dict(), bed.encoder.tokenizer)
    return {
        "trainer": match.trainer,
        "model": str(model),
        "rows": str(rows),
        "batch_size": match.batch_size,
        "max_steps": steps,
        "clock": bed.settings.clock,
        "threads": torch.get_num_threads(),
        "bf16": bed.settings.train.precision == "bf16",
        "learning_rate": bed.settings.optimizer.learning_rate,
        "folder": str(bed.folder / "trl"),
        "options": options,
    }
