"""Semi-offline RL's step against that of M-FT: the same rows, one decoder row of each against two, rewards included.

M-FT reads a prompt and its reference. Semi-offline RL reads a static response beside them, composes n texts from that
one forward, and judges them by ROUGE. The models are of one shape and new: no token is likely, so that nearly every
text differs from all others, which is the dearest case for decoding and rewards. Prompts are as long as the presets
cut them. REINFORCE, which decodes its texts token by token, takes one step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from pipeline.bench.bed import Bed, job, new_engine, new_policy, stepper
from pipeline.bench.long_rows import Sizes, long_bed
from pipeline.bench.measure import Goal, Plan, Result, alternate, compared, timed
from pipeline.bench.semi_parts import Semi, parts_of
from pipeline.config.resolve import resolve
from pipeline.data.batching import Windows
from pipeline.models import build
from pipeline.models.loading import hugging_face
from pipeline.models.policy import Policy
from pipeline.rewards.rewards import Reward, Rewards
from pipeline.rl import on_policy
from pipeline.rl.compositions import Composer
from pipeline.rollout.allocation import Sampler
from pipeline.trainer.engine import Engine
from pipeline.trainer.loop import Job
from pipeline.trainer.objective import objective_of
from reward_models import rouge

TIME, ONE = Goal(1.15), Goal(1)
SAMPLES, ONLINE_SAMPLES = (4, 16, 64), 8
LARGE = Sizes("docstrings", 2000, 512, 60, 8, 8192, hidden_size=384, num_heads=6, num_layers={"t5": 4, "llama": 10})
JUDGE = Rewards([Reward("rouge", 1.0, rouge.reward)])


def measure(bed: Bed, sizes: Sizes = LARGE) -> list[Result]:
    return [line for shape in sizes.num_layers for line in measure_shape(long_bed(bed, sizes, shape), shape)]


def measure_shape(bed: Bed, shape: str) -> list[Result]:
    """Of a T5 all lines, of other shapes those of the largest number of samples."""
    mft, rl = (new_engine(bed, new_policy(bed)) for _ in range(2))
    masked, whole = masked_job(bed, mft), shape == "t5"
    found = [line for n in SAMPLES[0 if whole else -1 :] for line in against(bed, semi_job(bed, rl, n), masked)]
    found += parts_of(semi_job(bed, rl, SAMPLES[-1]), bed.plan)
    if whole:
        found += against_online(bed, online_job(bed, rl), masked)
    weights = sum(weight.numel() for weight in rl.module.parameters()) / 1e6
    return [replace(line, name=f"{shape} of {weights:.0f} M, {line.name}") for line in found]


def masked_job(bed: Bed, engine: Engine) -> Job:
    """M-FT on the references."""
    settings = resolve(["stage=sft", "masking.rate=0.4"]).settings
    packing = build.packing(bed.settings.train, bed.ranks.world, engine.module, bed.encoder)
    masked = build.masked_packing(packing, bed.encoder, engine.module, settings, spans=True)
    items = [replace(item, static_rows=()) for item in bed.singles]
    work = job(bed, engine, settings.algorithm, items, bed.settings.train.batch_size)
    return replace(work, windows=Windows(items, work.windows.draw, masked, bed.ranks.rank, bed.ranks.world))


def semi_job(bed: Bed, engine: Engine, samples: int) -> Semi:
    """Semi-offline RL with so many samples on references and static responses."""
    settings = resolve(["stage=rl", "algo=semi_offline", f"algorithm.settings.samples={samples}"]).settings
    module, algorithm, objective = objective_of(settings.algorithm)
    packing = build.packing(bed.settings.train, bed.ranks.world, engine.module, bed.encoder)
    masked = build.masked_packing(packing, bed.encoder, engine.module, settings, samples=samples)
    composer = Composer(bed.ranks, bed.encoder, JUDGE, bed.singles, module)
    work = job(bed, engine, settings.algorithm, bed.singles, bed.settings.train.batch_size)
    windows = Windows(bed.singles, work.windows.draw, masked, bed.ranks.rank, bed.ranks.world)
    learned = replace(objective, loss=lambda output, batch: composer.loss(output, batch, algorithm))
    return Semi(replace(work, windows=windows, objective=learned), composer, algorithm)


def online_job(bed: Bed, engine: Engine) -> Job:
    """REINFORCE with responses as long as the references: a new model hardly ever says EOS."""
    length = bed.settings.data.max_response_length
    words = [f"sampler.k={ONLINE_SAMPLES}", f"max_new_tokens={length}"]
    settings = resolve(["stage=rl", "algo=reinforce", *words]).settings
    _, algorithm, _ = objective_of(settings.algorithm)
    work = job(bed, engine, settings.algorithm, bed.singles, bed.settings.train.batch_size)
    windows = on_policy.Rollouts(
        engine=engine,
        frozen=None,
        encoder=bed.encoder,
        judge=JUDGE,
        prompts=[item.example for item in bed.singles],
        draw=work.windows.draw,
        packing=build.packing(bed.settings.train, bed.ranks.world, engine.module, bed.encoder),
        settings=settings,
        algorithm=algorithm,
        sampler=Sampler(settings.sampler, engine.module.vocab_size, algorithm.queue_size),
    )
    return replace(work, windows=windows)


def against(bed: Bed, semi: Semi, masked: Job) -> list[Result]:
    """The two steps in turns, one of each per round: they take seconds. Then the calls of the policy in one."""
    name = f"semi-offline step, n = {semi.settings.samples}"
    rounds = alternate(stepper(semi.job), stepper(masked), Plan(bed.plan.rounds, 1, bed.plan.clock, warm=1))
    with counted(semi.job.engine.module) as calls:
        stepper(semi.job)(0)
    ratio = compared(f"{name} / M-FT step", "s", rounds, TIME)
    return [ratio, Result(f"{name}: policy forwards", "", len(calls), goal=ONE)]


def against_online(bed: Bed, online: Job, masked: Job) -> list[Result]:
    """One step of each."""
    clock, name = bed.plan.clock, f"REINFORCE step, n = {ONLINE_SAMPLES}"
    with counted(online.engine.module) as calls:
        seconds = timed(partial(stepper(online), 0), clock)
    other = timed(partial(stepper(masked), 0), clock)
    ratio = Result(f"{name} / M-FT step, measured once", "s", seconds, other, seconds / other)
    return [ratio, Result(f"{name}: policy forwards", "", len(calls))]


@contextmanager
def counted(policy: Policy) -> Iterator[list[int]]:
    """One entry for each call of the policy, or of its language model to say one more token."""
    calls: list[int] = []
    modules = (policy, hugging_face(policy.model))
    handles = [module.register_forward_pre_hook(lambda *_: calls.append(1)) for module in modules]
    yield calls
    for handle in handles:
        handle.remove()
