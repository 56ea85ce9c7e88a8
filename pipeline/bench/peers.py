"""Tokens per second beside TRL's trainers, in turns: our step here, theirs in the interpreter `peer_python`.

Both read the same token ids, start from the same weights, take equally many sequences per optimizer step, and count
the tokens they read without padding. DPO, its reference log-probabilities precomputed, reads pairs; A-LOL reads both
responses of each pair as rows of their own, so that a token read stands for equally many response tokens.
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

from pipeline.bench import setup as prepared
from pipeline.bench.measure import Goal, Result, Timing, compared, in_turns, speed, timed
from pipeline.bench.setup import Setup, alol_trainer, dpo_trainer, even, new_policy, sft_trainer, singles
from pipeline.data import encoding
from pipeline.data import pairs as pairing
from pipeline.errors import UserError
from pipeline.models import build, writing
from pipeline.records import Item
from pipeline.trainer.loop import Trainer

FASTER = {
    "SFT": Goal(1.3, True),
    "reward model": Goal(1.5, True),
    "DPO": Goal(1.5, True),
    "A-LOL / DPO": Goal(1.5, True),
}
WORKER = Path(__file__).with_name("trl_worker.py")
LENGTH = 32  # tokens of each prompt and of each response where lengths do not vary
TUNED = {"gradient_checkpointing": False, "per_device_train_batch_size": 16}  # the fastest of 32, 16, 8 for SFT
CONFIGURATIONS: dict[str, dict[str, Any]] = {  # as TRL comes, activations are recomputed, 8 rows per call
    "default": {},
    "tuned": {**TUNED, "train_sampling_strategy": "group_by_length"},
}

Worker = Callable[[str], dict[str, float]]  # sends a line to the worker, returns its answer


@dataclass(frozen=True)
class Match:
    """One comparison: our trainer, and what the peer trains on."""

    name: str
    peer: str  # its trainer: sft | reward | dpo, as the worker calls them
    ours: Trainer
    rows: list[dict[str, Any]]
    batch_size: int  # of the peer: rows, or pairs


def measure(setup: Setup) -> list[Result]:
    python = setup.settings.peer_python
    if python is None:
        print("peers: left out, peer_python names no interpreter with trl in it", flush=True)
        return []
    results = []
    with worker(python, setup.directory / "trl.log") as ask:
        for shape in ("ragged", "even"):
            for match in matches(setup, shape):
                for name, options in CONFIGURATIONS.items():
                    ask(json.dumps(peer_job(setup, match, options)))
                    rounds = contest(match, ask, setup.timing)
                    results.append(
                        compared(f"{match.name}, {shape} rows, TRL {name}", "tok/s", rounds, FASTER[match.name])
                    )
    return results


def contest(match: Match, ask: Worker, timing: Timing) -> list[tuple[float, float]]:
    """Per round the tokens per second of our steps and of the peer's, taken in turns."""
    take = prepared.stepper(match.ours)

    def ours(number: int) -> tuple[float, float]:
        seconds = timed(lambda: take(number), timing.clock)
        return sum(int(batch.input_mask.sum()) for batch in match.ours.windows.at(number)), seconds

    def peers(number: int) -> tuple[float, float]:
        answer = ask("go")
        return answer["tokens"], answer["seconds"]

    return in_turns(ours, peers, timing, speed)


@contextmanager
def worker(python: str, log: Path) -> Iterator[Worker]:
    """A worker under the interpreter `python`, ended when the block ends; asking one that has ended is a UserError."""
    with log.open("w", encoding="utf-8") as errors:
        try:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
            process = subprocess.Popen([python, str(WORKER)], env=prepared.environment(), **pipes)
        except OSError as error:
            raise UserError(f"peer_python: {python} cannot be started ({error.strerror}), wanted a Python") from None

        def ask(words: str) -> dict[str, float]:
            try:
                process.stdin.write(words + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            if not answer:
                code = process.wait()
                raise UserError(f"peer_python: its worker ended with exit code {code}, wanted steps: see {log}")
            return json.loads(answer)

        try:
            yield ask
        finally:
            process.kill()
            process.wait()


def matches(setup: Setup, shape: str) -> Iterator[Match]:
    """The four comparisons on rows that are `ragged`, or all `even`."""
    size = setup.settings.train.batch_size
    items, rows = singles(setup), pairing.paired(setup.rows)
    pairs = encoding.encode(rows, setup.encoder, encoding.pair_rows)
    if shape == "even":
        items, pairs = even(items, LENGTH, LENGTH), even(pairs, LENGTH, LENGTH)
    pair_rows = [pair_row(item) for item in pairs]
    yield Match("SFT", "sft", sft_trainer(setup, items), [single_row(item) for item in items], size)
    scalar = build.reward_module(setup.settings.model, setup.encoder, setup.settings.train, setup.settings.seed)
    reward = prepared.trainer_of(setup, prepared.model_of(setup, scalar), pairs, ["stage=reward"])
    yield Match("reward model", "reward", reward, [whole_pair(row) for row in pair_rows], size // 2)
    yield Match("DPO", "dpo", dpo_trainer(setup, pairs), pair_rows, size // 2)
    both = [replace(item, rows=(row,)) for item in pairs for row in item.rows]
    yield Match("A-LOL / DPO", "dpo", alol_trainer(setup, both), pair_rows, size // 2)


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


def peer_job(setup: Setup, match: Match, options: dict[str, Any]) -> dict[str, Any]:
    """The worker's job, its rows and the model it starts from written to the setup's folder."""
    settings, folder = setup.settings, setup.folder
    per_call = min(options.get("per_device_train_batch_size", 8), match.batch_size)
    rows = folder / f"{match.peer}.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in match.rows), encoding="utf-8")
    if not (folder / "model").is_dir():
        policy = new_policy(setup)
        writing.save(folder / "model", policy.model, policy.model.state_dict(), setup.encoder.tokenizer)
    options = {
        **options,
        "per_device_train_batch_size": per_call,
        "gradient_accumulation_steps": match.batch_size // per_call,
        "max_steps": setup.timing.total,
        "learning_rate": settings.optimizer.learning_rate,
        "bf16": settings.train.precision == "bf16",
        "output_dir": str(folder / "trl"),
    }
    job = {"trainer": match.peer, "model": str(folder / "model"), "rows": str(rows), "options": options}
    return {**job, "clock": settings.clock, "threads": torch.get_num_threads()}
