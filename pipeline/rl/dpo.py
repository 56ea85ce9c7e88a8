"""Learning from preference pairs: pairs -> reference log-probabilities of both sides -> every pair once per epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from pipeline.data import encoding, pairs, sampling
from pipeline.data.batching import Windows
from pipeline.data.prompts import unique_prompts
from pipeline.data.rows import Rows
from pipeline.records import Example
from pipeline.rl.context import Context, splits
from pipeline.rl.offline import WatchedRows, check_start, evaluate
from pipeline.rl.reference import annotate, reference_of
from pipeline.trainer.loop import HELD_OUT_LOSS, REWARD, Trainer
from pipeline.trainer.model import build_policy, encode
from pipeline.trainer.schedule import epochs_of, steps_for


def trainer(context: Context) -> Trainer:
    """DPO: the start model's log-probabilities of both responses are known beforehand; nothing has to be judged."""
    settings, ranks = context.settings, context.ranks
    train, held_out = (pairs.paired(rows) for rows in splits(context))
    if settings.shuffle_rewards:
        train = with_shuffled_sides(train, settings.seed)
    prompts = unique_prompts(held_out)[: settings.eval.max_rows]
    policy = build_policy(settings, ranks, context.start)
    items, tested = encode(policy, context.directory, train, held_out[: settings.eval.max_rows], encoding.pair_rows)

    # what the reference says, before the first step changes it
    reference = reference_of(context, policy)
    (items, tested), _ = annotate(reference, (items, tested), context.module.needs(context.algorithm))
    draw = epochs_of(items, policy.packing, settings)
    return Trainer(
        model=policy,
        settings=settings,
        directory=context.directory,
        windows=Windows(items, draw, policy.packing, ranks.rank, ranks.world),
        objective=context.objective,
        max_steps=steps_for(settings, len(items)),
        evaluate=partial(evaluate, context, policy, WatchedRows(tested, prompts, items, {})),
        best_metric=REWARD if context.judge is not None and settings.eval.generate else HELD_OUT_LOSS,
        prepare=partial(check_start, context, policy, items, draw(0)),
    )


def with_shuffled_sides(examples: Sequence[Example], seed: int) -> Rows:
    """The pairs, each turned round by a fair coin of its own: which response is better can no longer be learned."""
    coins = torch.rand(len(examples), generator=sampling.generator("sides", seed, 0)).tolist()
    return Rows.of(examples).made(
        f"sides shuffled by {seed}",
        lambda pairs: (
            replace(pair, chosen=pair.rejected, rejected=pair.chosen) if coin < 0.5 else pair
            for pair, coin in zip(pairs, coins, strict=True)
        ),
    )
