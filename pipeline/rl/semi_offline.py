"""Learning from masked tokens of static responses: rows -> reference and static rows -> one forward per micro-batch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline.algorithms import functional, supervised
from pipeline.algorithms.logits import Drawn
from pipeline.data import encoded, encoding
from pipeline.data.batching import Extent, Packing, Windows, collate
from pipeline.data.encoded import Items
from pipeline.data.prompts import reference_text, unique_prompts, with_gold
from pipeline.data.rows import Rows
from pipeline.data.tokenization import Encoder
from pipeline.errors import UserError
from pipeline.records import Answer, Batch, Example, Item, Row
from pipeline.rl.composition_samples import samples_of
from pipeline.rl.compositions import Composer
from pipeline.rl.context import Context, fresh_responses, required_rewards, splits
from pipeline.trainer import evaluation
from pipeline.trainer.engine import Engine
from pipeline.trainer.loop import REWARD, Evaluation, Trainer
from pipeline.trainer.model import Model, build_policy, encode, masked_packing
from pipeline.trainer.objective import Objective
from pipeline.trainer.schedule import epochs_of, steps_for

logger = logging.getLogger("tiffin")

CLOSE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}  # relative to the states' size, by precision


def trainer(context: Context) -> Trainer:
    """Semi-offline RL: nothing is known beforehand but static responses; rewards are those of what is composed."""
    settings, ranks, algorithm = context.settings, context.ranks, context.algorithm
    rewards = required_rewards(context)
    # what is composed is compared with what new responses are
    train, held_out = map(with_gold, splits(context))
    prompts = unique_prompts(held_out)[: settings.eval.max_rows]
    policy = build_policy(settings, ranks, context.start, mask=True)
    items, tested = encode(policy, context.directory, train, held_out[: settings.eval.max_rows], reference_rows)
    items = with_static_rows(items, policy.encoder, settings.static, f"{context.directory}/static")
    # masks and samples depend on seed, step and row alone, not on batches or ranks
    masked = masked_packing(policy, settings.masking, settings.seed, samples=algorithm.samples)
    draw = epochs_of(items, masked, settings)
    shuffled = settings.seed if settings.shuffle_rewards else None
    composer = Composer(ranks, policy.encoder, rewards, items, context.module, shuffled)
    return Trainer(
        model=policy,
        settings=settings,
        directory=context.directory,
        windows=Windows(items, draw, masked, ranks.rank, ranks.world),
        objective=composed_objective(context, policy, composer),
        max_steps=steps_for(settings, len(items)),
        evaluate=partial(evaluate, context, policy, WatchedCompositions(items, tested, prompts, composer, masked)),
        best_metric=REWARD,
        prepare=partial(check_shared, policy.engine, items, masked, CLOSE[settings.train.precision]),
    )


def composed_objective(context: Context, policy: Model, composer: Composer) -> Objective:
    """The algorithm's objective over composed texts; rewards of worker processes are awaited after the next forward."""
    # ZeRO-3 foresees each forward's backward to fetch weights in time
    overlap = composer.rewards.elsewhere and policy.engine.stage < 3
    return replace(
        context.objective,
        loss=lambda output, batch: composer.loss(output, batch, context.algorithm),
        begin=partial(composer.begin, settings=context.algorithm) if overlap else None,
    )


def reference_rows(example: Example, encoder: Encoder) -> tuple[Row, ...]:
    """The reference text as the response. Raises UserError where there is none."""
    return (encoding.row_of(example, reference_text(example), encoder),)


@dataclass(frozen=True, eq=False)
class StaticItems(Sequence[Item]):
    """Items with their static responses, made when they are asked for."""

    items: Items
    static: Items  # one row each: those of an item one after the other
    ends: np.ndarray  # (items + 1,) where in `static` those of each begin, and the last one's end

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: Any) -> Any:
        place = range(len(self))[place]
        own = range(int(self.ends[place]), int(self.ends[place + 1]))
        return replace(self.items[place], static_rows=tuple(self.static[at].rows[0] for at in own))


def with_static_rows(items: Items, encoder: Encoder, which: str, user: str = "") -> StaticItems:
    """The items with the static responses that `which` chooses, after a word about them.

    A response without a single word stays. One cut at the limit has no EOS. `user` as of `encoding.encode`. Raises
    UserError where a row has none.
    """
    rows = encoded.examples_of(items).made(f"static {which}", partial(_static_examples, which=which))
    static = encoding.encode(rows, encoder, encoding.completion_rows, user)
    numbers = rows.column("id")
    ends = np.concatenate([[0], np.flatnonzero(numbers[1:] != numbers[:-1]) + 1, [len(rows)]])
    short = wordless((item.rows[0] for item in static), encoder)
    logger.info(f"static responses: {which}, {short:,} of them without a word")
    return StaticItems(items, static, ends)


def _static_examples(rows: Rows, which: str) -> Iterator[Example]:
    """Each static response as a row, of which the id is the number of the example's."""
    for number, row in enumerate(rows):
        for text in static_texts(row, which):
            yield Example(str(number), row.prompt, completion=text, unfinished=row.unfinished)


@dataclass(frozen=True)
class WatchedCompositions:
    """What an evaluation reads: rows learned from, held-out rows and prompts, and how texts are composed."""

    learned: Sequence[Item]
    held_out: Sequence[Item]
    prompts: Sequence[Example]
    composer: Composer
    masked: Packing


def evaluate(context: Context, policy: Model, watched: WatchedCompositions, step: int) -> Evaluation:
    """Held-out references, read whole and masked; responses really decoded; compositions of some rows."""
    engine, masked = policy.engine, watched.masked
    scalars = evaluation.held_out_loss(engine, LIKELIHOOD, watched.held_out, policy.packing)
    alone = replace(masked, masker=replace(masked.masker, samples=0))
    scalars["eval/masked_loss"] = evaluation.held_out_loss(engine, LIKELIHOOD, watched.held_out, alone)["eval/loss"]
    judged = fresh_responses(context, policy, watched.prompts)
    histograms, table = composed(context, policy, watched)
    return Evaluation(scalars | judged.scalars, {**judged.histograms, **histograms}, [*judged.samples, *table])


@torch.no_grad()
def composed(
    context: Context, policy: Model, watched: WatchedCompositions
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Distributions of the compositions of the first rows; and a table of masked, sampled and credited tokens."""
    rewards, weights, rows = [], [], []
    for i in range(min(context.settings.eval.num_samples, len(watched.learned))):
        batch = collate(watched.learned, [i], watched.masked)
        drawn = Drawn(*policy.engine(batch, output="drawn")[2:])
        texts = watched.composer.compose(drawn, batch)
        rewards.append(texts.rewards[0, :-1])
        weights.append(functional.group_advantages(rewards[-1][None], context.algorithm.baseline))
        rows += samples_of(policy.encoder, batch, drawn, texts, weights[-1])
    if not rows:
        return {}, []
    return {"semi_offline/reward": torch.cat(rewards), "semi_offline/advantage": torch.cat(weights).flatten()}, rows


LIKELIHOOD = Objective(
    lambda output, batch: supervised.loss(output, batch, supervised.Settings(0.0)), supervised.MEAN_OVER
)


@torch.no_grad()
def check_shared(engine: Engine, items: Sequence[Item], packing: Packing, tolerance: float) -> None:
    """Compare states of the longest and the shortest row, both responses read in one pass, with those of padded rows.

    A window shows in the longest row alone; padding, beside it, in the shortest.
    Raises UserError where the model reads the rows otherwise when they share a prompt.
    """
    engine.train(False)
    cure = "name another model" if packing.apart else "set padding_free=false"
    order = sorted(range(len(items)), key=lambda i: Extent().with_item(items[i]).joined)
    batch = collate(items, [*dict.fromkeys((order[-1], order[0]))], packing)
    together = engine(batch, output="heads")
    masks = (batch.response_mask, batch.static.mask)
    unpadded, engine.module.unpadded = engine.module.unpadded, False
    apart = [engine(one, output="heads") for one in read_apart(batch, packing)]
    engine.module.unpadded = unpadded
    for name, ours, alone, mask in zip(("response", "static response"), together, apart, masks, strict=True):
        there = mask.to(ours.device)
        gap = float((ours - alone)[there].abs().max() / alone[there].abs().max()) if bool(mask.any()) else 0.0
        if not gap <= tolerance:
            raise UserError(
                f"model: it reads the {name} beside another one otherwise than "
                f"alone (its states differ by {gap:.2g} of their size, wanted at most {tolerance}): {cure}"
            )


def read_apart(batch: Batch, packing: Packing) -> tuple[Batch, Batch]:
    """Two batches of one response each, with the same tokens masked."""
    given = batch.static
    bare = replace(batch, static=None)
    second = replace(bare, response_ids=given.ids, response_mask=given.mask, shown_ids=given.shown_ids)
    if packing.apart:
        return bare, second
    size = len(batch.response_ids)
    cut = {name: getattr(batch, name).split(size) for name in ("input_ids", "input_mask", "prompt_lengths")}
    alone = ({"owners": None} | {name: parts[i] for name, parts in cut.items()} for i in range(2))
    return replace(bare, **next(alone)), replace(second, **next(alone))


def static_texts(example: Example, which: str) -> Sequence[Answer]:
    """What static RL may start from: the `worst` or the `best` candidate, all of them (`random`), or the `reference`.

    Candidates are taken to stand best first. Raises UserError where the example has none, or no reference text.
    """
    if which == "reference":
        return (reference_text(example),)
    if not example.candidates:
        raise UserError(
            f"{example.id}: no candidates, wanted some for static={which} to start from: make them with bash run.sh "
            "stage=generate num_return_sequences=8, rank them with stage=score of=generate, or set static=reference"
        )
    return {"worst": example.candidates[-1:], "best": example.candidates[:1], "random": example.candidates}[which]


def wordless(rows: Iterable[Row], encoder: Encoder) -> int:
    """How many of `rows` hold no letter and no digit in what is left of the response."""
    return sum(not any(char.isalnum() for char in encoder.decode(row.response_ids)) for row in rows)
