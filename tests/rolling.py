"""Three steps of on-policy RL by the real loop on tiny models, of every kind and of degenerate ones.

On two processes: `torchrun --nproc-per-node 2 -m tests.rolling FOLDER`. Rank 0 writes FOLDER/seen.pt.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.algorithms.stats import reduce
from pipeline.data.batching import Packing
from pipeline.data.sampling import epoch_rows
from pipeline.models.policy import Policy
from pipeline.records import Example
from pipeline.rewards.rewards import Rewards, WeightedReward
from pipeline.rl.on_policy import Rollouts
from pipeline.rollout.allocation import Sampler
from pipeline.trainer import engine, loop
from pipeline.trainer.loop import Trainer
from pipeline.trainer.metrics import Interval, Metrics
from pipeline.trainer.objective import objective_of
from tests import same_step, tiny

STEPS, SEED = 3, 7
STAGES = ("zero0", "zero3")


@dataclass(frozen=True)
class Case:
    """What a user says, and what is odd about it."""

    words: tuple[str, ...]
    prompts: int = 6
    per_step: int = 4
    equal: bool = False  # every reward is the same
    empty: bool = False  # the policy says nothing but EOS, ever
    shape: str = "llama"


def own(*words: str) -> tuple[str, ...]:
    return tuple(f"algorithm.settings.{word}" for word in words)


HOT = ("sampler.temperature_min=0.7", "sampler.temperature_max=1.3", "sampler.temperature_by=incapability")
RECENT = "sampler.entropy_range=recent"
LEFT_OUT = ("sampler.k_min=0", "sampler.skip_above=0.0", "sampler.recheck=9")
MIXED = own("sft_weight=0.3", "rl_weight=0.7", "label_smoothing=0.1")
CASES = {
    "esrl": Case(("algo=esrl", RECENT)),
    "temperatures and a budget": Case(("algo=esrl", RECENT, *HOT, "sampler.budget=12"), shape="t5"),
    "probes": Case(("algo=esrl", "sampler.entropy_range=[4.8, 5.0]", "sampler.probe=2")),
    "combined": Case(("algo=esrl", "sampler.capability=combined", *own("mean_over=tokens"))),
    "reinforce": Case(("algo=reinforce", "sampler.k=3", *own("baseline=queue", "missing_eos_penalty=0.5"))),
    "mrt": Case(("algo=mrt", "sampler.k=3", *own("alpha=0.1", "mean_over=sequences"))),
    "references and KL": Case(("algo=esrl", *MIXED, *own("kl_beta=0.1", "kl_in=reward"))),
    "KL in the loss": Case(("algo=reinforce", "sampler.k=2", *own("kl_beta=0.1"))),
    "drop": Case(("algo=esrl_drop", "generation.batch_size=2")),
    "drop_fixed": Case(("algo=esrl_drop", "sampler.mode=drop_fixed")),
    "left out": Case(("algo=esrl", *LEFT_OUT)),
    "left out, references": Case(("algo=esrl", *LEFT_OUT, *MIXED, *own("kl_beta=0.1"))),
    "one prompt": Case(("algo=esrl", *own("baseline=group")), prompts=1, per_step=1),
    "one row": Case(("algo=reinforce", "sampler.k=1"), prompts=1, per_step=1),
    "equal rewards": Case(("algo=esrl",), equal=True),
    "empty, all equal": Case(("algo=mrt", "sampler.k=2"), equal=True, empty=True, shape="bart"),
}
LAYERS = {
    "llama": {"num_hidden_layers": 1},
    "t5": {"num_layers": 1},
    "bart": {"encoder_layers": 1, "decoder_layers": 1},
}


def judge(case: Case) -> Rewards:
    """By the letters of a response."""

    def letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [0.5 if case.equal else sum(map(ord, text)) % 17 / 16 for text in completions]

    return Rewards([WeightedReward("letters", 1.0, letters)])


def policy(case: Case) -> Policy:
    lm = tiny.language_model(case.shape, **LAYERS[case.shape])
    if case.empty:
        lm.final_logits_bias[0, tiny.EOS_ID] = 100.0
    return Policy(lm, 64)


def examples(count: int) -> list[Example]:
    words = tiny.WORDS
    return [Example(str(i), " ".join(words[i : 2 * i + 1]), completion=" ".join(words[i::4])) for i in range(count)]


def trainer_of(case: Case, zero: str, folder: Path) -> Trainer:
    """What the loop is given to take the case's steps."""
    usual = ("generation.max_new_tokens=6", "sampler.k_max=4", "seed=7")
    given = [word.split("=")[0] for word in case.words]
    k = () if "sampler.k" in given or "algo=esrl_drop" in case.words else ("sampler.k=4",)
    size = () if "generation.batch_size" in given else ("generation.batch_size=3",)
    settings = tiny.settings("rl", *usual, *k, *size, *case.words)
    module, algorithm, objective = objective_of(settings.algorithm)
    trained = tiny.trainer(policy(case), zero, optimizer=same_step.OPTIMIZER)
    frozen = None
    if module.needs(algorithm).ref_logp:
        frozen = engine.Engine(policy(case), trained.ranks, tiny.train_settings(zero=zero), None)
    packing = Packing(None, 60, trained.module.encoder_decoder, tiny.PAD_ID, prompts_once=True)
    rollouts = Rollouts(
        engine=trained,
        frozen=frozen,
        encoder=tiny.encoder(),
        rewards=judge(case),
        prompts=examples(case.prompts),
        draw=lambda step: epoch_rows(case.prompts, case.per_step, step, SEED),
        packing=packing,
        settings=settings,
        algorithm=algorithm,
        sampler=Sampler(settings.sampler, tiny.V, algorithm.queue_size),
    )
    plain = same_step.trainer_of(same_step.cases()["nll"], trained, [], packing, folder)
    return replace(plain, windows=rollouts, objective=objective, max_steps=STEPS)


def run(trainer: Trainer, first: int = 0, steps: int = STEPS) -> list[dict[str, Any]]:
    """What was planned, said and logged in each step."""
    seen = []
    for step in range(first, steps):
        interval = Interval(Metrics())
        assert loop.one_step(trainer, step, interval) is None  # nothing that is not finite
        groups = trainer.windows.groups
        seen.append(
            {
                "plan": [(group.key, group.allocation.k, group.allocation.temperature) for group in groups],
                "ids": [[response.response_ids for response in group.responses] for group in groups],
                "advantages": [list(group.advantages) for group in groups],
                "stats": {name: reduce(stat) for name, stat in trainer.windows.stats.items()},
                "logged": interval.close(trainer.engine.ranks.all_sum)[0],
            }
        )
    return seen


def steps_of(case: Case, zero: str, folder: Path) -> dict[str, Any]:
    """All that can be compared: the steps, the weights they leave (on rank 0), and what a resume needs."""
    trainer = trainer_of(case, zero, folder)
    seen = run(trainer)
    return {"steps": seen, "weights": trainer.engine.state_dict(), "memory": trainer.windows.state_dict(STEPS)}


def main(folder: Path) -> None:
    ranks = tiny.ranks()
    gc.freeze()
    seen = {zero: {name: steps_of(case, zero, folder) for name, case in CASES.items()} for zero in STAGES}
    everywhere = ranks.gather({zero: {name: one["memory"] for name, one in of.items()} for zero, of in seen.items()})
    assert everywhere[0] == everywhere[1]  # history and queue, to the bit
    if ranks.main:
        torch.save(seen, folder / "seen.pt")
    ranks.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
