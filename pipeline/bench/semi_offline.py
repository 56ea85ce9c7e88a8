"""Semi-offline RL's step against masked fine-tuning's: the same rows, two responses of each against one, with rewards.

Masked fine-tuning (M-FT) reads a prompt and its reference. Semi-offline RL reads a static response beside them,
composes n texts from that one forward, and scores them by ROUGE. The models are of one shape and new: no token is
likely, so that nearly every text differs from all others, which is the dearest case for decoding and rewards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from pipeline.bench.measure import Goal, Result, Timing, alternate, compared
from pipeline.bench.setup import Setup, even, model_of, new_policy, new_trainer, singles, stepper, with_settings
from pipeline.config.resolve import resolve
from pipeline.models.loading import hugging_face
from pipeline.records import Item
from pipeline.rewards.rewards import Rewards, WeightedReward
from pipeline.rl.compositions import Composer
from pipeline.trainer.loop import Trainer
from pipeline.trainer.model import Model, masked_packing
from pipeline.trainer.objective import objective_of
from reward_models import rouge

TIME, ONE = Goal(1.15), Goal(1)
SHAPES = {"t5": (4, (4, 16, 64)), "llama": (10, (64,))}  # layers (twice for t5); samples per prompt
SIZES = {
    "data": {"task": "docstrings", "task_size": 2000, "max_prompt_length": 512, "max_response_length": 60},
    "scratch": {"hidden_size": 384, "num_heads": 6, "vocab_size": 8192},
    "rows": 8,  # of a step, read in one micro-batch
}


def measure(setup: Setup, sizes: Mapping[str, Any] = SIZES) -> list[Result]:
    results = []
    for shape, (layers, samples) in SHAPES.items():
        scratch = {"num_layers": layers, **sizes["scratch"], "shape": shape}
        train = {"batch_size": sizes["rows"], "micro_batch_size": sizes["rows"], "max_tokens": None}
        values = {"data": sizes["data"], "model": {"scratch": scratch}, "train": train}
        long = with_settings(setup, values, mask=True)
        items, mft, rl = long_items(long), *(model_of(long, new_policy(long)) for _ in range(2))
        masked = masked_trainer(long, mft, items)
        weights = sum(weight.numel() for weight in rl.engine.module.parameters()) / 1e6
        for n in samples:
            name = f"{shape} of {weights:.0f} M, semi-offline step, n = {n}"
            results += against(setup.timing, name, semi_trainer(long, rl, items, n), masked)
    return results


def long_items(setup: Setup) -> list[Item]:
    """The rows at full length: each response is the reference; half of it, and half of the next, the static one."""
    data, made = setup.settings.data, []
    items = even(singles(setup), data.max_prompt_length, data.max_response_length)
    for item, other in zip(items, items[1:] + items[:1], strict=True):
        ids, half = item.rows[0].response_ids, data.max_response_length // 2
        static = replace(item.rows[0], response_ids=ids[:half] + other.rows[0].response_ids[half:])
        example = replace(item.example, references=(setup.encoder.decode(ids),))
        made.append(replace(item, example=example, static_rows=(static,)))
    return made


def masked_trainer(setup: Setup, model: Model, items: list[Item]) -> Trainer:
    """M-FT on the references."""
    settings = resolve(["stage=sft", "masking.rate=0.4"]).settings
    _, _, objective = objective_of(settings.algorithm)
    masked = masked_packing(model, settings.masking, settings.seed, spans=True)
    alone = [replace(item, static_rows=()) for item in items]
    return new_trainer(setup, model, objective, alone, masked)


def semi_trainer(setup: Setup, model: Model, items: list[Item], samples: int) -> Trainer:
    """Semi-offline RL with so many samples on references and static responses."""
    settings = resolve(["stage=rl", "algo=semi_offline", f"algorithm.settings.samples={samples}"]).settings
    module, algorithm, objective = objective_of(settings.algorithm)
    masked = masked_packing(model, settings.masking, settings.seed, samples=samples)
    rewards = Rewards([WeightedReward("rouge", 1.0, rouge.reward)])
    composer = Composer(setup.ranks, setup.encoder, rewards, items, module)
    scored = replace(objective, loss=partial(composer.loss, settings=algorithm))
    return new_trainer(setup, model, scored, items, masked)


def against(timing: Timing, name: str, semi: Trainer, masked: Trainer) -> list[Result]:
    """The two steps in turns, one of each per round: they take seconds. Then the calls of the model in one."""
    rounds = alternate(stepper(semi), stepper(masked), timing.single)
    calls: list[int] = []
    policy = semi.engine.module
    counted = (policy, hugging_face(policy.model))  # a language model is called by itself to say one more token
    handles = [module.register_forward_pre_hook(lambda *_: calls.append(1)) for module in counted]
    stepper(semi)(0)
    for handle in handles:
        handle.remove()
    ratio = compared(f"{name} / M-FT step", "s", rounds, TIME)
    return [ratio, Result(f"{name}: policy forwards", "", len(calls), goal=ONE)]
