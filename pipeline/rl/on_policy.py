"""Learning from responses that the policy gives now: prompts -> responses -> rewards -> one step, again and again.

Two-stage sampling: responses are sampled without gradient (rollout.py); then their likelihood is computed in parallel
with gradient, over the sampled ids themselves. How many are sampled for each prompt is planned before (sampler.py).
Source: Wang et al., "ESRL: Efficient Sampling-based Reinforcement Learning for Sequence Generation" (AAAI 2024).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.algorithms import capability
from pipeline.algorithms.functional import mean_stat
from pipeline.config.schema import Rl
from pipeline.config.sections import GenerationSettings
from pipeline.data import dataset
from pipeline.data.batching import Draw, Packing, collate, window
from pipeline.data.tokenization import Encoder
from pipeline.models import build
from pipeline.records import Batch, Example, Item, Row, Stat
from pipeline.rewards import scoring
from pipeline.rewards.rewards import Rewards
from pipeline.rl import reference
from pipeline.rl.context import Lesson, Scene, refuse, required_judge, spoken
from pipeline.rollout import generate
from pipeline.rollout import groups as rollout_groups
from pipeline.rollout.allocation import Queue, Sampler, check_sampler, prompt_key, spoken_sampler
from pipeline.rollout.generate import Ask
from pipeline.rollout.groups import Lot
from pipeline.trainer import loop
from pipeline.trainer.engine import Engine
from pipeline.trainer.loop import Evaluation, Watch

TURN = 1_000_000  # more than the responses that a prompt has at once


def lesson(scene: Scene) -> Lesson:
    """On-policy RL. train.batch_size counts prompts, each of which has several responses in the step."""
    settings, ranks = scene.settings, scene.ranks
    refuse(settings, rows="all", sampling="all", shuffle_rewards=False)
    judge = required_judge(scene)
    check_sampler(settings, scene.algorithm)
    prompts, held_out = map(dataset.unique_prompts, dataset.splits(scene.data, settings.seed))
    held_out = held_out[: settings.eval.max_rows]
    encoder = build.encoder_of(settings, scene.model, list)
    longest = max(settings.generation.max_new_tokens, settings.data.max_response_length)
    policy = build.build_policy(scene.model, encoder, settings.train, longest, settings.seed)
    packing = replace(build.packing(settings.train, ranks.world, policy, encoder), prompts_once=True)
    frozen = None
    if scene.module.needs(scene.algorithm).ref_logp:
        frozen = build.build_policy(scene.model, encoder, settings.train, longest, settings.seed)
        frozen = Engine(frozen, ranks, settings.train, None)
    trainer = Engine(policy, ranks, settings.train, settings.optimizer)
    rollouts = Rollouts(
        engine=trainer,
        frozen=frozen,
        encoder=encoder,
        judge=judge,
        prompts=prompts,
        draw=loop.epochs(len(prompts), settings.train.batch_size, settings.seed),
        packing=packing,
        settings=settings,
        algorithm=scene.algorithm,
        sampler=Sampler(settings.sampler, policy.vocab_size, Queue(scene.algorithm.queue_size)),
    )
    scene.say(f"train: {len(prompts):,} prompts, {spoken_sampler(settings)}, sampled at every step")
    course = loop.Course(
        windows=rollouts,
        objective=scene.objective,
        max_steps=loop.steps_for(settings, len(prompts)),
        eval_steps=settings.train.eval_steps,
        evaluate=Look(scene, trainer, encoder, held_out, judge, rollouts),
        watch=Watch("eval/reward/mean", True),
        export=loop.exporter(trainer, encoder),
    )
    return Lesson(trainer, course, lambda: None)


def sampled(settings: Rl) -> GenerationSettings:
    """The policy's own distribution, which the gradient is an expectation over; the dropping modes narrow it."""
    free = generate.free(settings.generation)
    if settings.sampler.mode != "drop":
        return free
    return free.model_copy(update={"top_p": settings.generation.top_p, "top_k": settings.generation.top_k})


@dataclass
class Rollouts:
    """Windows of responses that are sampled when they are asked for: a function of weights, seed, step and history."""

    engine: Engine
    frozen: Engine | None  # the reference, where a KL term wants it
    encoder: Encoder
    judge: Rewards
    prompts: Sequence[Example]
    draw: Draw
    packing: Packing
    settings: Rl
    algorithm: Any
    sampler: Sampler
    items: Sequence[Item] = ()  # of the last step
    lots: Sequence[Lot] = ()  # and its prompts with their responses
    stats: Mapping[str, Stat] = field(default_factory=dict)
    last: int | None = None  # the step that `lots` are of, while the sampler does not know them yet

    def at(self, step: int) -> list[Batch]:
        """This rank's micro-batches of the responses to the prompts of `step`."""
        began, ranks = time.monotonic(), self.engine.ranks
        self._learn_of()
        asked = [self.prompts[i] for i in self.draw(step)]
        said = self._said(asked, step)
        generated = sum(len(response.response_ids) for lot in said for response in lot.responses)
        judged = self._judged(self._kept(said))
        ref_logps = self._ref_logps(judged)
        usual = self.sampler.queue.mean()
        self.lots, self.last = rollout_groups.valued(judged, ref_logps, usual, self.algorithm), step
        items = [*rollout_groups.items_of(self.lots, ref_logps), *self._targets(asked)] or [self._silent(asked[0])]
        self.items = items if self._tempered else rollout_groups.untempered(items)
        seconds = mean_stat(torch.tensor([time.monotonic() - began]))
        most = self.settings.sampler.k_max if self.settings.sampler.mode == "dynamic" else self.settings.sampler.k
        told = rollout_groups.statistics(self.lots, most, self.sampler.least, usual, generated)
        self.stats = {name: Stat(kind, sums.to(ranks.device)) for name, (kind, sums) in told.items()} | {
            "perf/sampling_seconds": Stat(seconds.kind, seconds.sums.to(ranks.device))
        }
        learned = range(len(self.items)) if any(lot.responses for lot in self.lots) or self._mixes else []
        plan = window(self.items, learned, self.packing, ranks.rank, ranks.world)
        return [collate(self.items, indices, self.packing, step) for indices in plan]

    @property
    def _tempered(self) -> bool:
        s = self.settings.sampler
        return (s.temperature_min, s.temperature_max) != (1.0, 1.0)

    @property
    def _mixes(self) -> bool:
        return self.algorithm.sft_weight > 0

    def _said(self, asked: Sequence[Example], step: int) -> list[Lot]:
        """The responses to the prompts of a step; where the sampler probes, in two rounds."""
        ids = [tuple(self.encoder.encode_prompt(example.prompt)[0]) for example in asked]
        keys = [prompt_key(one) for one in ids]
        shares, probed = self.sampler.plan(keys), self.sampler.probes(keys)
        few = self.settings.sampler.probe
        first = [share._replace(k=few) if probe else share for share, probe in zip(shares, probed, strict=True)]
        found = [Lot(*parts) for parts in zip(asked, ids, keys, first, strict=True)]
        found = self._answered(found, [(0, lot.share.k) for lot in found], step)
        if not any(probed):
            return found
        after = [
            replace(lot, share=self.sampler.after_probe(rollout_groups.record_of(lot, step))) if probe else lot
            for lot, probe in zip(found, probed, strict=True)
        ]
        return self._answered(after, [(len(lot.responses), lot.share.k) for lot in after], step)

    def _answered(self, found: Sequence[Lot], spans: Sequence[tuple[int, int]], step: int) -> list[Lot]:
        """The lots with their responses number `start` to `end` - 1 added."""
        places = [i for i, (start, end) in enumerate(spans) if end > start]
        keys = [lot.key for lot in found]
        asks = []
        for i in places:
            (start, end), turn = spans[i], keys[:i].count(keys[i])  # a prompt that comes twice throws other dice
            heat = (found[i].share.temperature,) * (end - start)
            asks.append(Ask(found[i].example, found[i].prompt_ids, heat, turn * TURN + start))
        seed = self.settings.seed * 1_000_003 + step
        groups = generate.answer(self.engine, self.encoder, asks, sampled(self.settings), seed) if asks else []
        more = dict(zip(places, groups, strict=True))
        return [replace(lot, responses=(*lot.responses, *more.get(i, ()))) for i, lot in enumerate(found)]

    def _kept(self, found: Sequence[Lot]) -> list[Lot]:
        """The lots without what the dropping modes throw away: a share of each decoded batch, or of all."""
        mode, share = self.settings.sampler.mode, self.settings.sampler.drop_share
        if mode not in ("drop", "drop_fixed"):
            return list(found)
        surest = {i: lot.responses[0].seen for i, lot in enumerate(found)}
        batches: dict[int, list[int]] = {}
        for i, seen in surest.items():
            batches.setdefault(seen.batch if mode == "drop" else 0, []).append(i)
        gone = set()
        for members in batches.values():
            scores = [surest[i].drop if mode == "drop" else surest[i].confidence for i in members]
            gone |= {members[place] for place in capability.dropped(scores, share)}
        return [replace(lot, responses=()) if i in gone else lot for i, lot in enumerate(found)]

    def _judged(self, found: Sequence[Lot]) -> list[Lot]:
        flat = [response for lot in found for response in lot.responses]
        totals = iter(scoring.score_responses(self.engine.ranks, self.judge, flat).total)
        return [replace(lot, raw=tuple(next(totals) for _ in lot.responses)) for lot in found]

    def _ref_logps(self, found: Sequence[Lot]) -> list[Tensor]:
        """(T,) float32 of the reference for each response in order; nothing where no KL term wants them."""
        heat = [{"temperature": lot.share.temperature} if self._tempered else {} for lot in found]
        items = [Item(lot.example, (row,), each) for lot, each in zip(found, heat, strict=True) for row in lot.rows]
        if self.frozen is None or not items:
            return []
        saved = reference.reference_logps(self.frozen, items, self.packing)
        return list(saved["logp"].split(saved["lengths"].tolist()))

    def _targets(self, asked: Sequence[Example]) -> list[Item]:
        """The references of the prompts, where their likelihood is learned too."""
        if not self._mixes:
            return []
        rows = [self.encoder.encode(example.prompt, dataset.reference_text(example)) for example in asked]
        return [
            rollout_groups.target_item(example, row, self.frozen is not None)
            for example, row in zip(asked, rows, strict=True)
        ]

    def _silent(self, example: Example) -> Item:
        """What a step of fillers is made from, when every prompt was left out."""
        row = Row(tuple(self.encoder.encode_prompt(example.prompt)[0]), (self.encoder.eos_id,))
        return rollout_groups.target_item(example, row, self.frozen is not None, target=False)

    def _learn_of(self) -> None:
        """Let the sampler know of the last step."""
        if self.last is None:
            return
        for lot in self.lots:
            if lot.responses:
                self.sampler.learn(lot.key, rollout_groups.record_of(lot, self.last), lot.told.rewards.tolist())
            else:
                self.sampler.learn(lot.key, None)
        self.last = None

    def remembered(self, step: int) -> dict[str, Any]:
        """As `data.Source`: history and queue."""
        if self.last is not None and self.last < step:
            self._learn_of()
        return self.sampler.state()

    def recall(self, memory: Mapping[str, Any]) -> None:
        """As `data.Source`."""
        if memory:
            self.sampler.restore(memory)


@dataclass(frozen=True)
class Look:
    """Evaluation: fresh responses to held-out prompts; and the last step's samples, prompt by prompt."""

    scene: Scene
    engine: Engine
    encoder: Encoder
    prompts: Sequence[Example]
    judge: Rewards
    rollouts: Rollouts

    def __call__(self, step: int) -> Evaluation:
        settings, last = self.scene.settings, self.rollouts.lots
        found, samples = spoken(self.engine, self.encoder, self.prompts, self.judge, settings)
        known = [lot.share.capability for lot in last if lot.share.capability is not None]
        histograms = {"esrl/capability": torch.tensor(known)} if known else {}
        if last:
            histograms["esrl/samples"] = torch.tensor([float(len(lot.responses)) for lot in last])
            histograms["advantage"] = torch.tensor([weight for lot in last for weight in lot.advantages])
        return Evaluation(found, histograms, [*samples, *rollout_groups.table(last, settings.eval.num_samples)])
