"""Learning from responses that the policy samples now: prompts -> responses -> rewards -> one step, again and again.

Two-stage sampling: responses are sampled without gradient (rollout/generate.py); then their likelihood is computed in
parallel with gradient, over the sampled ids themselves. How many are sampled for each prompt is planned before
(rollout/allocation.py).
Source: Wang et al., "ESRL: Efficient Sampling-based Reinforcement Learning for Sequence Generation" (AAAI 2024).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.algorithms import capability
from pipeline.algorithms.stats import mean_stat
from pipeline.config.generation import GenerationSettings
from pipeline.config.schema import RlPolicy
from pipeline.data import dataset
from pipeline.data.batching import Draw, Packing, collate, window
from pipeline.data.encoding import row_of
from pipeline.data.prompts import reference_text, unique_prompts
from pipeline.data.tokenization import Encoder
from pipeline.errors import UserError
from pipeline.records import Batch, Example, Item, Request, Response, Row, Stat
from pipeline.rewards import scoring
from pipeline.rewards.rewards import Rewards
from pipeline.rl import reference
from pipeline.rl.context import Context, fresh_responses, required_rewards, splits
from pipeline.rollout import drawn_elsewhere
from pipeline.rollout.allocation import Sampler, prompt_key, spoken_sampler
from pipeline.rollout.generate import plain_sampling, respond
from pipeline.rollout.groups import (
    Group,
    items_of,
    record_of,
    records_of_others,
    statistics,
    table,
    target_item,
    untempered,
    valued,
)
from pipeline.rollout.served import Served, remark
from pipeline.trainer.engine import Engine
from pipeline.trainer.loop import REWARD, Evaluation, Trainer
from pipeline.trainer.model import Model, build_policy, frozen_policy, spoken_packing
from pipeline.trainer.schedule import epochs, steps_for

logger = logging.getLogger("tiffin")

NOT_OF_THE_POLICY = (
    "generation.engine: the tokens that the server drew are less likely than draws of the policy by {:.2g} nats each "
    "({:.0f} standard errors): has it the weights that it was handed, and does it draw at the temperature it is told, "
    "from all tokens? rollout/surprise goes on to say (0: draws of the policy)"
)
TURN = 1_000_000  # more than the responses that a prompt has at once


def trainer(context: Context) -> Trainer:
    """On-policy RL. train.batch_size counts prompts, each of which has several responses in the step."""
    settings, ranks, algorithm = context.settings, context.ranks, context.algorithm
    rewards = required_rewards(context)
    prompts, held_out = (unique_prompts(rows, copies=True) for rows in splits(context))
    longest = max(settings.generation.max_new_tokens, settings.data.max_response_length)
    policy = build_policy(settings, ranks, context.start, longest=longest)
    # a KL term compares with the start as it was: a second model, which is only read
    frozen = None
    if context.module.needs(algorithm).ref_logp:
        frozen = frozen_policy(settings, policy, context.start, longest)
    packing = spoken_packing(policy)
    packing = replace(packing, prompts_once=packing.prompts_once or packing.apart)
    never = 0 if packing.suppressed is None else int(packing.suppressed.sum())
    rollouts = Rollouts(
        engine=policy.engine,
        frozen=frozen,
        encoder=policy.encoder,
        rewards=rewards,
        prompts=prompts,
        draw=epochs(len(prompts), settings.train.batch_size, settings.seed),
        packing=packing,
        settings=settings,
        algorithm=algorithm,
        sampler=Sampler(settings.sampler, policy.engine.module.vocab_size - never, algorithm.queue_size),
        server=partial(context.served, policy),
    )
    logger.info(f"train: {len(prompts):,} prompts, {spoken_sampler(settings)}, sampled at every step")
    return Trainer(
        model=policy,
        settings=settings,
        directory=context.directory,
        windows=rollouts,
        objective=context.objective,
        max_steps=steps_for(settings, len(prompts)),
        evaluate=partial(evaluate, context, policy, held_out[: settings.eval.max_rows], rollouts),
        best_metric=REWARD,
    )


def evaluate(context: Context, policy: Model, prompts: Sequence[Example], rollouts: Rollouts, step: int) -> Evaluation:
    """Fresh responses to held-out prompts; and the last step's samples, prompt by prompt."""
    last = rollouts.groups
    judged = fresh_responses(context, policy, prompts)
    known = [group.allocation.capability for group in last if group.allocation.capability is not None]
    histograms = dict(judged.histograms)
    if known:
        histograms["esrl/capability"] = torch.tensor(known)
    if last:
        histograms["esrl/samples"] = torch.tensor([float(len(group.responses)) for group in last])
        histograms["train/reward"] = torch.tensor([reward for group in last for reward in group.raw])
        histograms["train/advantage"] = torch.tensor([weight for group in last for weight in group.advantages])
    return Evaluation(judged.scalars, histograms, [*judged.samples, *table(last, context.settings.eval.num_samples)])


def sampled(settings: RlPolicy) -> GenerationSettings:
    """The policy's own distribution, which the gradient is an expectation over; the dropping modes narrow it."""
    plain = plain_sampling(settings.generation)
    if settings.sampler.mode != "drop":
        return plain
    return plain.model_copy(update={"top_p": settings.generation.top_p, "top_k": settings.generation.top_k})


@dataclass
class Rollouts:
    """Windows of responses that are sampled when they are requested: a function of weights, seed, step and history."""

    engine: Engine
    frozen: Engine | None  # the reference, where a KL term wants it
    encoder: Encoder
    rewards: Rewards
    prompts: Sequence[Example]
    draw: Draw
    packing: Packing
    settings: RlPolicy
    algorithm: Any
    sampler: Sampler
    server: Callable[[], Served | None] = lambda: None  # with the weights of now, where one writes the responses
    items: Sequence[Item] = ()  # of the last step
    groups: Sequence[Group] = ()  # and its prompts with their responses
    stats: Mapping[str, Stat] = field(default_factory=dict)
    handing_seconds: float = 0.0  # of this step
    surprises: list[float] = field(default_factory=list)  # of this step
    last: int | None = None  # the step that `groups` are of, while the sampler does not know them yet
    cuts_said: bool = False

    def at(self, step: int) -> list[Batch]:
        """This rank's micro-batches of the responses to the prompts of `step`."""
        began, ranks, self.handing_seconds, self.surprises = time.monotonic(), self.engine.ranks, 0.0, []
        self._learn()
        examples = [self.prompts[i] for i in self.draw(step)]
        groups = self._sampled(examples, step)
        self._say_of_cuts(groups, step)
        generated = sum(len(response.response_ids) for group in groups for response in group.responses)
        judged = self._judged(self._kept(groups))
        ref_logps = self._ref_logps(judged)
        # read before this step's rewards are known to it: a baseline must not depend on the responses it judges
        queue_mean = self.sampler.mean_reward()
        self.groups, self.last = valued(judged, ref_logps, queue_mean, self.algorithm), step
        learned = [*items_of(self.groups, ref_logps), *self._targets(examples)]
        items = learned or [self._filler(examples[0])]
        self.items = items if self.settings.sampler.tempered else untempered(items)
        stats = statistics(self.groups, self.settings.sampler, queue_mean, generated)
        stats["perf/sampling_seconds"] = mean_stat(torch.tensor([time.monotonic() - began]))
        if self.settings.generation.by_server:
            stats["perf/hand_over_seconds"] = mean_stat(torch.tensor([self.handing_seconds]))
            stats["rollout/surprise"] = mean_stat(torch.tensor(self.surprises))
        self.stats = {name: Stat(kind, sums.to(ranks.device)) for name, (kind, sums) in stats.items()}
        plan = window(self.items, range(len(learned)), self.packing, ranks.rank, ranks.world)
        return [collate(self.items, indices, self.packing, step) for indices in plan]

    def _sampled(self, examples: Sequence[Example], step: int) -> list[Group]:
        """The responses to the prompts of a step; where the sampler probes, in two rounds."""
        ids = [tuple(self.encoder.encode_prompt(example.prompt)[0]) for example in examples]
        keys = [prompt_key(one) for one in ids]
        planned, probed = self.sampler.plan(keys), self.sampler.probes(keys)
        few = self.settings.sampler.probe
        first = [one._replace(k=few) if probe else one for one, probe in zip(planned, probed, strict=True)]
        groups = [Group(*parts) for parts in zip(examples, ids, keys, first, strict=True)]
        groups = [
            replace(group, allocation=self.sampler.after_probe(records_of_others(group))) if probe else group
            for group, probe in zip(self._filled(groups, step), probed, strict=True)
        ]
        return self._filled(groups, step) if any(probed) else groups

    def _say_of_cuts(self, groups: Sequence[Group], step: int) -> None:
        """One line, once, where many responses are cut; those of a mode that samples past the end are meant to be."""
        if self.cuts_said or self.settings.sampler.mode == "drop":
            return
        responses = [response for group in groups for response in group.responses]
        cut = sum(not response.finished for response in responses)
        limit = f"generation.max_new_tokens={self.settings.generation.max_new_tokens}"
        what = f"sampled for step {step}, which are judged without their end"
        self.cuts_said = dataset.warn_of_cuts(cut, len(responses), limit, what)

    def _filled(self, groups: Sequence[Group], step: int) -> list[Group]:
        """The groups with as many responses as each is allocated; those that are there stay."""
        keys, requests = [group.key for group in groups], {}
        for i, group in enumerate(groups):
            turn, start = keys[:i].count(keys[i]), len(group.responses)  # other numbers if a prompt comes twice
            temperatures = (group.allocation.temperature,) * (group.allocation.k - start)
            if temperatures:
                requests[i] = Request(group.example, group.prompt_ids, temperatures, turn * TURN + start)
        if not requests:
            return list(groups)
        more = dict(zip(requests, self._answers(list(requests.values()), step), strict=True))
        return [replace(group, responses=(*group.responses, *more.get(i, ()))) for i, group in enumerate(groups)]

    def _answers(self, requests: Sequence[Request], step: int) -> list[list[Response]]:
        """The responses to each request; of a server with what is known of those that are sampled here."""
        seed = self.settings.seed * 1_000_003 + step
        to_end = self.settings.sampler.mode == "drop"  # which scores what comes after the end of a response too
        began, server = time.monotonic(), self.server()
        self.handing_seconds += time.monotonic() - began
        answers = respond(self.engine, self.encoder, requests, sampled(self.settings), seed, to_end, server)
        if server is None:
            return answers
        known, surprise = drawn_elsewhere.with_stats(self.engine, self.packing, requests, answers)
        self.surprises += [] if math.isnan(surprise.mean) else [surprise.mean]
        if abs(surprise.errors) > drawn_elsewhere.STRANGE:
            remark(server, "surprise", NOT_OF_THE_POLICY.format(*surprise))
        return known

    def _kept(self, groups: Sequence[Group]) -> list[Group]:
        """The groups without what the dropping modes leave out: a share of each decoded batch, or of all."""
        mode, share = self.settings.sampler.mode, self.settings.sampler.drop_share
        if mode not in ("drop", "drop_fixed"):
            return list(groups)
        stats = [group.responses[0].stats for group in groups]  # these modes sample one response to a prompt
        batches: dict[int, list[int]] = {}
        for i, one in enumerate(stats):
            batches.setdefault(one.batch if mode == "drop" else 0, []).append(i)
        gone = set()
        for members in batches.values():
            scores = [stats[i].drop if mode == "drop" else stats[i].confidence for i in members]
            gone |= {members[place] for place in capability.dropped(scores, share)}
        return [replace(group, responses=()) if i in gone else group for i, group in enumerate(groups)]

    def _judged(self, groups: Sequence[Group]) -> list[Group]:
        responses = [response for group in groups for response in group.responses]
        totals = iter(scoring.score_responses(self.engine.ranks, self.rewards, responses).total)
        return [replace(group, raw=tuple(next(totals) for _ in group.responses)) for group in groups]

    def _ref_logps(self, groups: Sequence[Group]) -> list[Tensor]:
        """(T,) float32 of the reference for each response in order; nothing where no KL term wants them."""
        items = [
            Item(group.example, (row,), {"temperature": group.allocation.temperature})
            for group in groups
            for row in group.rows
        ]
        if self.frozen is None or not items:
            return []
        items = items if self.settings.sampler.tempered else untempered(items)
        return reference.reference_logps(self.frozen, items, self.packing)

    def _targets(self, examples: Sequence[Example]) -> list[Item]:
        """The reference texts of the prompts, where their likelihood is learned too."""
        if self.algorithm.sft_weight == 0:
            return []
        rows = [row_of(one, reference_text(one), self.encoder) for one in examples]
        for example, row in zip(examples, rows, strict=True):
            if self.packing.suppressed is not None and self.packing.suppressed[list(row.response_ids)].any():
                raise UserError(f"{example.id}: its reference holds a mask token, which is never said: remove it")
        with_ref = self.frozen is not None
        return [target_item(example, row, with_ref) for example, row in zip(examples, rows, strict=True)]

    def _filler(self, example: Example) -> Item:
        """What a step of fillers is made from, when every prompt was left out."""
        row = Row(tuple(self.encoder.encode_prompt(example.prompt)[0]), (self.encoder.eos_id,))
        return target_item(example, row, self.frozen is not None, target=False)

    def _learn(self) -> None:
        """Let the sampler know of the last step."""
        if self.last is None:
            return
        for group in self.groups:
            if group.responses:
                self.sampler.learn(group.key, record_of(group), group.stats.rewards.tolist())
            else:
                self.sampler.learn(group.key, None)
        self.last = None

    def state_dict(self, step: int) -> dict[str, Any]:
        """As `batching.Source`: history and recent rewards."""
        if self.last is not None and self.last < step:
            self._learn()
        return self.sampler.state_dict()

    def load_state_dict(self, memory: Mapping[str, Any]) -> None:
        """As `batching.Source`."""
        if memory:
            self.sampler.load_state_dict(memory)
