"""The peer's side of the benchmark, in an interpreter of its own: TRL's trainers, one step at a word.

Reads lines from stdin, answers in lines of JSON. A `PeerJob` in JSON builds a trainer and is answered {"ready": 1}.
Each "go" then lets it take one optimizer step, from fetching the rows to the updated weights, answered by
{"seconds": s, "tokens": tokens read, padding not counted}. After the last of its steps it waits for the next job.
Imports nothing of ours.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class PeerJob:
    """What to train."""

    trainer: str  # sft | reward | dpo
    model: str  # a Hugging Face directory
    rows: str  # a file of JSON lines: token ids
    clock: str  # wall | cpu
    threads: int
    options: dict[str, Any]  # of the trainer's configuration, over the peer's own defaults


class ReadyDPOTrainer(DPOTrainer):
    """DPO on rows that are token ids already, as the other two trainers take them."""

    def _prepare_dataset(self, dataset: Dataset, *others: Any) -> Dataset:
        return dataset


KINDS = {  # by the job's word: trainer, configuration, and what makes it learn as ours does
    "sft": (SFTTrainer, SFTConfig, {"completion_only_loss": True}),
    "reward": (RewardTrainer, RewardConfig, {}),
    "dpo": (ReadyDPOTrainer, DPOConfig, {"precompute_ref_log_probs": True}),
}


class Turns(TrainerCallback):
    """One step per word from the other side; between two words this process sleeps."""

    def __init__(self, channel: Any, clock: str):
        self.channel, self.trainer, self.clock = channel, None, CLOCKS[clock]
        self.started, self.counted = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.answer({"ready": 1})

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = self.clock() - self.started
        before, self.counted = self.counted, int(self.trainer._total_train_tokens)  # TRL's count of the attention mask
        answer = {"seconds": seconds, "tokens": self.counted - before}
        self.answer(answer, last=state.global_step == state.max_steps)

    def answer(self, words: dict[str, float], last: bool = False) -> None:
        """Print `words`, and, except for the last time, wait for the next line of input."""
        self.channel.write(json.dumps(words) + "\n")
        self.channel.flush()
        if not last and not sys.stdin.readline():
            sys.exit(0)
        self.started = self.clock()


def train(job: PeerJob, channel: Any) -> None:
    """All steps of the trainer that `job` names, from the float32 weights in its model directory."""
    torch.set_num_threads(job.threads)
    trainer, configuration, own = KINDS[job.trainer]
    common = {
        "model_init_kwargs": {"dtype": "float32"},
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    with open(job.rows, encoding="utf-8") as lines:
        rows = Dataset.from_list([json.loads(line) for line in lines])
    turns = Turns(channel, job.clock)
    turns.trainer = trainer(
        model=job.model,
        args=configuration(**own, **common, **job.options),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(job.model),
        callbacks=[turns],
    )
    turns.trainer.train()


def main() -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what trainers print does not mix with the answers
    for line in iter(sys.stdin.readline, ""):
        train(PeerJob(**json.loads(line)), channel)


if __name__ == "__main__":
    main()
