"""Three steps of every algorithm by the real loop, cut in one way or another; test_same_step.py knows the right answer.

On two processes, under every ZeRO stage: `torchrun --nproc-per-node 2 -m tests.same_step FOLDER`. Rank 0 writes
FOLDER/seen.pt.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification, PreTrainedModel

from pipeline.config.schema import AlgorithmSettings
from pipeline.data.batching import Packing, Windows
from pipeline.data.masking import Masker
from pipeline.models.policy import Policy, RewardModel
from pipeline.records import Item
from pipeline.rl.compositions import Composer
from pipeline.rl.groups import GroupedItems
from pipeline.rl.reference_points import LabelledWindows, Midpoint, Mismatched, noted
from pipeline.trainer import loop
from pipeline.trainer.engine import Engine
from pipeline.trainer.group import Ranks
from pipeline.trainer.loop import HELD_OUT_LOSS, Evaluation, Trainer
from pipeline.trainer.metrics import Interval, Metrics
from pipeline.trainer.model import Model
from pipeline.trainer.objective import Objective, objective_of
from tests import masked, tiny

ALGO = Path(__file__).parents[1] / "stages" / "algo"
APART = ("semi_offline", "dpo", "reinforce", "mrt", "esrl", "esrl_drop")  # the last two sample otherwise, and no more
APART += (
    "rft",
    "iw_sft",
    "dft",
    "awr",
    "asymre",
    "topr",
    "grpo_offline",
    "qrpo",
    "a_star_po",
)  # cut as those they are like
APART += ("kto", "bco", "agro", "rebel", "nca")  # rebel is agro, and nca's formula alone differs
STAGES = ("zero0", "zero1", "zero2", "zero3")
BUDGET = Packing(None, 40, False, tiny.PAD_ID)  # micro-batches of 2 to 4 rows, 1 to 4 pairs
DRAWN = ((0, 1, 2, 3, 4), (8, 1, 8), (4,))  # rows of each step; on two ranks the last one leaves a filler
# Adam's large epsilon makes a step depend on the size of the gradient; decay, clipping and schedule have other tests
OPTIMIZER = {**tiny.PLAIN_STEP, "learning_rate": 0.05, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}


@dataclass(frozen=True)
class Case:
    """An algorithm with its settings, what it learns from, and the shape of its model."""

    algorithm: AlgorithmSettings
    pairs: bool = False
    scalar: bool = False  # scores, not log-probabilities
    masked: bool = False  # from masked tokens of static responses
    sampled: bool = False  # from responses whose coefficients are known, and references among them
    labels: bool = False  # from rows against a reference point
    groups: bool = False  # from groups of three rows
    shape: str = "llama"
    stages: tuple[str, ...] = STAGES


@cache
def cases() -> dict[str, Case]:
    """Every algorithm that ships, and the settings of theirs that change the formula."""
    names = [path.stem for path in ALGO.glob("*.yaml") if path.stem not in APART]
    offline = {name: Case(tiny.settings("rl", f"algo={name}").algorithm) for name in names}
    drawn = ("algo=semi_offline", "algorithm.settings.samples=5", "algorithm.settings.label_smoothing=0.1")
    semi_offline = tiny.settings("rl", *drawn).algorithm
    margin = ("algorithm.settings.use_margin=true", "algorithm.settings.center_coef=0.1")
    smoothed = ("algo=dpo", "algorithm.settings.beta=0.5", "algorithm.settings.label_smoothing=0.1")
    regression, mixed = (
        tiny.settings("reward", f"algorithm.settings.objective={name}").algorithm for name in ("regression", "mixed")
    )
    mixed_in = [f"algorithm.settings.{word}" for word in ("rl_weight=0.7", "sft_weight=0.3", "label_smoothing=0.1")]
    sampled = {
        "reinforce": ["algo=reinforce"],
        "reinforce_kl": ["algo=reinforce", "algorithm.settings.kl_beta=0.2"],
        "reinforce_mixed": ["algo=reinforce", *mixed_in],
        "mrt": ["algo=mrt"],
    }
    changed = ("beta=0.5", "undesirable_weight=2")
    labels = {name: tiny.settings("rl", f"algo={name}", *changed).algorithm for name in ("kto", "bco")}
    agro = ("algo=agro", "algorithm.settings.group_size=3")
    return {
        **dict(sorted(offline.items())),
        # kto alone reads more in a step than others do
        "kto": Case(labels["kto"], labels=True, stages=("zero0", "zero3")),
        "bco": Case(labels["bco"], labels=True, stages=("zero0",)),
        "agro": Case(tiny.settings("rl", *agro).algorithm, groups=True, stages=("zero0",)),
        **{name: Case(tiny.settings("rl", *words).algorithm, sampled=True) for name, words in sampled.items()},
        "a_lol_k3": Case(tiny.settings("rl", "algo=a_lol_kl", "algorithm.settings.kl_form=k3").algorithm),
        "supervised": Case(tiny.settings("sft").algorithm),
        "bradley_terry": Case(tiny.settings("reward", *margin).algorithm, pairs=True, scalar=True),
        "regression": Case(regression, pairs=True, scalar=True),
        "regression_alone": Case(regression, scalar=True),
        "mixed": Case(mixed, pairs=True, scalar=True),
        "dpo": Case(tiny.settings("rl", "algo=dpo").algorithm, pairs=True),
        "dpo_smoothed": Case(tiny.settings("rl", *smoothed).algorithm, pairs=True),
        "semi_offline": Case(semi_offline, masked=True),
        "semi_offline_t5": Case(semi_offline, masked=True, shape="t5"),
    }


def model(case: Case) -> PreTrainedModel:
    """A random model of one layer, with a scalar head where the case wants one."""
    layers = {"llama": "num_hidden_layers", "t5": "num_layers"}
    language = tiny.language_model(case.shape, **{layers[case.shape]: 1})
    if not case.scalar:
        return language
    language.config.num_labels = 1
    torch.manual_seed(0)
    return tiny.spread(LlamaForSequenceClassification(language.config)).eval()


def module(case: Case) -> nn.Module:
    return RewardModel(model(case)) if case.scalar else Policy(model(case), 64)


@cache
def rows() -> tuple[Item, ...]:
    """Nine rows of ragged lengths; rewards from 0, advantages of both signs, ratios inside and outside the clips."""
    return referred(tiny.items(9, reward=lambda i: i / 8, advantage=lambda i: (3 * i % 7 - 2.5) / 5))


@cache
def pairs() -> tuple[Item, ...]:
    """Nine pairs of ragged lengths, annotated, of which every second annotation is right."""
    numbers = {"margin": lambda i: i / 4, "chosen_reward": lambda i: i / 8, "rejected_reward": lambda i: -i % 3 / 3}
    return referred(tiny.items(9, pairs=True, **numbers, correctness=lambda i: i % 2))


def referred(items: Sequence[Item]) -> tuple[Item, ...]:
    """The items with the log-probabilities of a reference that is not far from the model."""
    language, noise = tiny.language_model("llama", num_hidden_layers=1), torch.Generator().manual_seed(0)

    def ref(item: Item, place: int) -> Tensor:
        logp = own_logps(language, item, place).detach()
        return (logp + 0.3 * torch.randn(logp.shape, generator=noise)).clamp(max=0.0)

    return tuple(replace(item, ref_logp=tuple(ref(item, place) for place in range(len(item.rows)))) for item in items)


@cache
def responses() -> tuple[Item, ...]:
    """The rows as responses at three temperatures, of three prompts; 1, 3 and 5 are references of theirs."""
    found = []
    for i, item in enumerate(rows()):
        numbers = {
            "leads": i in (0, 4, 8),
            "share": 0.25 + i / 8,
            "behaviour": -i,
            "temperature": (1.0, 0.5, 2.0)[i % 3],
        }
        if i in (1, 3, 5):
            numbers = {"leads": 0, "share": 0, "behaviour": 0, "temperature": 1, "advantage": 0, "reward": 0}
        values = {**item.numbers, **numbers, "target": i in (1, 3, 5)}
        found.append(replace(item, numbers={name: float(value) for name, value in values.items()}))
    return tuple(found)


@cache
def labelled() -> tuple[Item, ...]:
    """The rows with labels, and a reference point for where no step makes one."""
    numbers = [
        {"desirable": float(i % 3 != 1), "weight": 1.0 + (i % 3 == 1), "reference_point": 0.05} for i in range(9)
    ]
    return tuple(replace(item, numbers=found) for item, found in zip(rows(), numbers, strict=True))


@cache
def mismatched() -> tuple[Item, ...]:
    """The rows' prompts with one another's responses, which the reference finds less likely than the model does."""
    given = rows()
    turned = [
        replace(item, rows=(replace(item.rows[0], response_ids=given[(i + 4) % 9].rows[0].response_ids),))
        for i, item in enumerate(given)
    ]
    return tuple(replace(item, ref_logp=(item.ref_logp[0] - 0.25,)) for item in referred(turned))


@cache
def grouped() -> GroupedItems:
    """Nine groups of the rows."""
    return GroupedItems(rows(), np.array([[i, (i + 2) % 9, (i + 5) % 9] for i in range(9)]))


def without_reference(items: Sequence[Item]) -> tuple[Item, ...]:
    return tuple(replace(item, ref_logp=()) for item in items)


@cache
def with_static_rows() -> tuple[Item, ...]:
    """Nine rows of words with two static responses each."""
    return tuple(masked.items(9, choices=2, longest=4))


def items_of(case: Case) -> Sequence[Item]:
    if case.masked:
        return with_static_rows()
    if case.sampled:
        return responses() if case.algorithm.settings["kl_beta"] else without_reference(responses())
    if case.labels:
        return labelled()
    if case.groups:
        return grouped()
    return pairs() if case.pairs else rows()


def own_logps(language: PreTrainedModel, item: Item, place: int = 0) -> Tensor:
    """(T,) by the model's own forward on one row of the item, without padding."""
    row = item.rows[place]
    logits = language(input_ids=torch.tensor([row.prompt_ids + row.response_ids])).logits[0].float()
    before = slice(len(row.prompt_ids) - 1, -1)
    return logits[before].log_softmax(-1).gather(1, torch.tensor(row.response_ids)[:, None])[:, 0]


def masker() -> Masker:
    """Words to their ends, one response in eight left as it is."""
    chosen = masked.masking(span="word", after_punctuation=False, plain=0.125)
    return Masker(masked.words(), chosen, seed=3, samples=5)


def packing_of(case: Case, packing: Packing) -> Packing:
    """`packing` as the case's rows need it."""
    if case.groups and packing.max_tokens:
        return replace(packing, max_tokens=60)  # for three rows of up to 19 tokens
    if not case.masked:
        return packing
    return replace(packing, encoder_decoder=case.shape == "t5", masker=masker())


def objective_for(case: Case, ranks: Ranks, items: Sequence[Item]) -> Objective:
    module, settings, objective = objective_of(case.algorithm)
    if not case.masked:
        return objective
    composer = Composer(ranks, masked.encoder(), masked.judge(), items, module)
    return replace(objective, loss=lambda output, batch: composer.loss(output, batch, settings))


def trainer_of(case: Case, trained: Engine, items: Sequence[Item], packing: Packing, folder: Path) -> Trainer:
    """What the loop is given to take the steps of DRAWN; nothing is evaluated, logged or exported."""
    ranks = trained.ranks
    changed = {"train": tiny.train_settings(), "optimizer": tiny.optimizer_settings(**OPTIMIZER)}
    objective = objective_for(case, ranks, items)
    windows = Windows(items, lambda step: list(DRAWN[step]), packing_of(case, packing), ranks.rank, ranks.world)
    if case.labels:
        own = case.algorithm.settings
        others = (Mismatched(trained, packing, own["beta"], mismatched(), ()), Midpoint(ranks))
        point = others[own["objective"] == "bco"]
        objective, windows = noted(objective, point), LabelledWindows(windows, point, ranks)
    return Trainer(
        model=Model(trained, tiny.encoder(), packing),
        objective=objective,
        windows=windows,
        evaluate=lambda step: Evaluation({}),
        settings=tiny.settings("sft").model_copy(update=changed),
        max_steps=len(DRAWN),
        best_metric=HELD_OUT_LOSS,
        directory=folder,
    )


def run(case: Case, trainer: Trainer) -> dict:
    """The losses and gradient norms of the steps, and the weights they leave (on rank 0)."""
    seen = []
    for step in range(len(DRAWN)):
        interval = Interval(Metrics())
        assert loop.one_step(trainer, step, interval) is None  # nothing that is not finite
        seen.append(interval.close(trainer.engine.ranks.all_sum)[0])
    norms = [values["train/grad_norm"] for values in seen]
    return {
        "loss": [minimised(case, values) for values in seen],
        "grad_norm": norms,
        "weights": trainer.engine.state_dict(),
    }


def minimised(case: Case, values: dict[str, float]) -> float:
    """The number whose gradient was taken, as it was logged: one mean, or two with their weights."""
    if case.masked:
        return 5.0 * values["loss/rl"] + values["loss/mle"]
    if not case.sampled:
        return values["train/loss"]
    weights = case.algorithm.settings
    parts = [weights["rl_weight"] * values["train/loss"]]
    if weights["sft_weight"]:
        parts.append(weights["sft_weight"] * values["loss/mle"])
    return sum(part for part in parts if not math.isnan(part))  # a mean of nothing


def steps(case: Case, zero: str, packing: Packing, folder: Path) -> dict:
    """What `run` gives for the case's own model and rows."""
    trained = tiny.trainer(module(case), zero, optimizer=OPTIMIZER)
    return run(case, trainer_of(case, trained, items_of(case), packing, folder))


def main(folder: Path) -> None:
    ranks = tiny.ranks()
    gc.freeze()  # every start of ZeRO-3 collects garbage: 0.3 s over all that was imported, nothing over the rest
    seen = {
        zero: {name: steps(case, zero, BUDGET, folder) for name, case in cases().items() if zero in case.stages}
        for zero in STAGES
    }
    if ranks.main:
        torch.save(seen, folder / "seen.pt")
    ranks.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
