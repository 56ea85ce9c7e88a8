"""Learning from logged responses: scored rows -> reference log-probabilities and values -> which rows, for how long."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from pipeline.algorithms import estimates
from pipeline.data import convert, encoded, encoding
from pipeline.data.batching import Draw, Packing, Windows
from pipeline.data.prompts import UniquePrompts, unique_prompts
from pipeline.records import Example, Item, Needs, text_of
from pipeline.rl import baselines, rows, samples, values
from pipeline.rl.context import Context, fresh_responses, splits
from pipeline.rl.reference import ReferencePolicy, annotate, check_ratio, reference_of, with_ref_logps
from pipeline.rl.values import ValueData
from pipeline.trainer import evaluation
from pipeline.trainer.loop import GAIN, HELD_OUT_LOSS, REWARD, BestMetric, Evaluation, Trainer
from pipeline.trainer.model import Model, build_policy, encode
from pipeline.trainer.schedule import steps_for
from pipeline.words import between_blanks

MORE = "data.validation=FILE, or a larger data.validation_fraction, holds more out"

logger = logging.getLogger("tiffin")


def trainer(context: Context) -> Trainer:
    """The offline family, and regression: every row's reward is known beforehand, and all that the method compares it
    with."""
    settings, ranks, needs = context.settings, context.ranks, context.module.needs(context.algorithm)
    train, tested, prompts = rewarded_rows(context, needs)
    source = None
    if needs.samples:
        source = values.source_of(settings.reference_samples.targets, context.judge, "reference_samples")
    if source == "data":
        train, tested = samples.compared(train, "training"), samples.compared(tested, "held-out")
    policy = build_policy(settings, ranks, context.start)
    items, held_out = encode(policy, context.directory, train, tested, encoding.completion_rows)

    # what the reference says, before the first step changes it
    reference = reference_of(context, policy)
    value_data = ValueData(prompts, items, context.judge, context.rewards_key, context.hand_over)
    (items, held_out), facts = annotate(reference, (items, held_out), needs, value_data)
    items, held_out = with_own_numbers(context, reference, (items, held_out), value_data, source)
    if "reward" in held_out[0].numbers and not needs.ref_logp:
        held_out = with_ref_logps(reference, held_out)  # what was gained is told by ratios to it

    # which rows, for how long
    draw, shares = drawn(context, items, policy.packing)
    facts |= shares
    logger.info(spoken(facts))
    kept = facts["advantage/kept_fraction"] if settings.scale_steps else 1.0
    watched = WatchedRows(held_out, prompts[: settings.eval.max_rows], items, facts)
    return Trainer(
        model=policy,
        settings=settings,
        directory=context.directory,
        windows=Windows(items, draw, policy.packing, ranks.rank, ranks.world),
        objective=context.objective,
        max_steps=steps_for(settings, len(items), kept),
        evaluate=partial(evaluate, context, policy, watched),
        best_metric=best_metric(context, held_out),
        prepare=partial(check_start, context, policy, items, draw(0)),
        kept_fraction=kept,
    )


def drawn(context: Context, items: Sequence[Item], packing: Packing) -> tuple[Draw, dict[str, float]]:
    """How rows are drawn; and which share of them can be. Of a method that has advantages, but learns from other rows
    than those above 0, also which share these are."""
    settings, needs, by = context.settings, context.module.needs(context.algorithm), None
    if needs.weighed_by is not None:
        by = context.module.row_weights(torch.from_numpy(encoded.column(items, needs.weighed_by)), context.algorithm)
    draw, kept = rows.population(items, packing, needs.weighed_by or "one", settings, by)
    shares = {"advantage/kept_fraction": kept}
    if "advantage" in items[0].numbers and settings.algorithm.settings.get("weight") != "advantage":
        raised = encoded.column(items, "advantage") > 0 if by is None else by[by != 0].numpy() > 0
        shares["advantage/raised_fraction"] = float(raised.mean())
    return draw, shares


def with_own_numbers(
    context: Context,
    reference: ReferencePolicy,
    parts: Sequence[Sequence[Item]],
    data: ValueData,
    source: Literal["policy", "data"] | None,
) -> Sequence[Sequence[Item]]:
    """The items of each part with what the algorithm weighs rows by, or aims at, where that is not their reward over V:
    another baseline, or what rewards of the reference's responses say, which come from `source`."""
    needs = context.module.needs(context.algorithm)
    if needs.baseline not in ("", "value"):
        parts = baselines.with_advantages(parts, needs.baseline)
    if needs.weighed_by == "standard_advantage":
        parts = baselines.with_standard_advantages(parts)
    if source is not None:
        numbers_of = partial(context.module.sample_numbers, settings=context.algorithm)
        parts = samples.with_samples(reference, parts, data, source, numbers_of)
    return parts


def spoken(facts: Mapping[str, float]) -> str:
    """What is known before the first step, in one line. R2 is NaN where nothing varies that could be explained."""
    said = {name: f"{name} {value:.3g}" for name, value in facts.items()}
    if math.isnan(facts.get("value/r2", 0.0)):
        said["value/r2"] = "R2 unknown (all held-out prompts expect the same reward)"
    return ", ".join(said.values())


def rewarded_rows(context: Context, needs: Needs) -> tuple[Sequence[Example], Sequence[Example], UniquePrompts]:
    """Rows to learn from, chosen or shuffled as set, and held-out rows, with rewards where they are needed; and
    all held-out prompts, each once."""
    settings, data = context.settings, context.data
    train, held_out = (convert.to_scored(examples, data.responses) for examples in splits(context))
    prompts = unique_prompts(held_out)
    held_out = held_out[: settings.eval.max_rows]
    wanted = needs.rewards or settings.rows != "all" or settings.shuffle_rewards
    if wanted or (context.rewards is not None and (context.rewards.own or context.rewards.unsettled)):
        train, held_out = rows.with_rewards(context, train, held_out)
    return rows.learned_rows(train, settings), held_out, prompts


def best_metric(context: Context, held_out: Sequence[Item]) -> BestMetric:
    """What chooses the weights: the reward of fresh responses; where there are none, or nothing judges them, what
    held-out rows say was gained; where these bring no rewards, the likelihood of all of them alike.

    A loss that weighs rows chooses nothing: it falls when the rows of much weight are merely forgotten.
    """
    if context.judge is not None and context.settings.eval.generate:
        return REWARD
    return GAIN if "reward" in held_out[0].numbers else HELD_OUT_LOSS


def check_start(context: Context, policy: Model, items: Sequence[Item], indices: Sequence[int]) -> None:
    """Raises UserError where there is a reference, and its ratio with the policy is not 1 before the first step."""
    if items[0].ref_logp:
        tolerance = context.settings.ratio_tolerance.model_dump()[context.settings.train.precision]
        check_ratio(policy.engine, items, indices, policy.packing, tolerance)


@dataclass(frozen=True)
class WatchedRows:
    """What an evaluation reads, and what it logs once: the numbers of the rows learned from, the value's fit."""

    held_out: Sequence[Item]
    prompts: Sequence[Example]
    learned: Sequence[Item]
    facts: Mapping[str, float]


def evaluate(context: Context, policy: Model, watched: WatchedRows, step: int) -> Evaluation:
    """The loss's statistics on held-out rows, what they say was gained, and fresh responses, judged."""
    engine, packing, items = policy.engine, policy.packing, watched.held_out
    known: list[dict[str, Any]] = []
    if not items[0].ref_logp:
        scalars, ratios = evaluation.held_out_loss(engine, context.objective, items, packing), None
    else:
        scalars, ratios = evaluation.held_out_ratios(engine, context.objective, items, packing)
    judged = fresh_responses(context, policy, watched.prompts)
    scalars, histograms = scalars | judged.scalars, dict(judged.histograms)
    if ratios is not None:
        histograms["ratio/log"] = ratios
    if ratios is not None and "reward" in items[0].numbers:
        rows = estimated(items, ratios)
        scalars |= gained(rows, step)
        numbers = {name: column.tolist() for name, column in rows._asdict().items()}
        known = [
            {"id": item.example.id, **{name: column[i] for name, column in numbers.items()}}
            for i, item in enumerate(items)
        ]
    if step == 0:
        scalars, histograms = scalars | watched.facts, histograms | number_histograms(watched.learned)
    return Evaluation(scalars, histograms, judged.samples, known)


def estimated(items: Sequence[Item], log_ratios: torch.Tensor) -> estimates.HeldOut:
    """What a gain is estimated from. V is that of the method; the rows' mean reward where it has none."""
    rewards = torch.tensor([item.numbers["reward"] for item in items], dtype=torch.float64)
    mean = float(rewards.mean())
    values = torch.tensor([item.numbers.get("value", mean) for item in items], dtype=torch.float64)
    places: dict[object, int] = {}
    prompts = torch.tensor([places.setdefault(item.example.prompt, len(places)) for item in items])
    words = torch.tensor([len(between_blanks(text_of(item.example.completion))) for item in items])
    return estimates.HeldOut(log_ratios, rewards, values, prompts, words)


def gained(rows: estimates.HeldOut, step: int) -> dict[str, float]:
    """eval/gain/...: how much more reward the policy earns than its start, as held-out rows say.

    Without the estimate and its interval, and a word, where they are not to be believed.
    """
    gain = estimates.gain(rows)
    carried = {"eval/gain/ess": gain.ess, "eval/gain/rows": float(gain.rows), "eval/gain/prompts": float(gain.prompts)}
    carried |= {"eval/gain/length_correlation": gain.length_correlation, "eval/gain/power": gain.power}
    carried["eval/gain/mass"] = gain.mass
    if not gain.known:
        if not gain.never or step == 0:  # that no step's is known is said once
            when = "any step" if gain.never else f"step {step}"
            more = f" ({MORE})" if gain.few else ""
            logger.warning(f"eval/gain: not known at {when}: {gain.unknown}{more}")
        return carried
    found = {"eval/gain/estimate": gain.value, "eval/gain/low": gain.low, "eval/gain/high": gain.high}
    return found | {"eval/gain/dr": gain.dr} | carried


def number_histograms(items: Sequence[Item]) -> dict[str, torch.Tensor]:
    """Distributions of what is known of all rows: they do not change."""
    tags = {"reward": "logged/reward", "value": "logged/value", "advantage": "logged/advantage"}
    known = {tag: name for name, tag in tags.items() if name in items[0].numbers}
    return {tag: torch.from_numpy(encoded.column(items, name)).float() for tag, name in known.items()}
