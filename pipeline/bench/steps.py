"""A-LOL's step against SFT's: the same rows in the same micro-batches through engines of the same kind."""

from __future__ import annotations

from pipeline.bench.bed import Bed, algorithm_of, job, new_engine, new_policy, packing, stepper
from pipeline.bench.measure import Goal, Result, alternate, compared, peak_megabytes
from pipeline.data import dataset
from pipeline.records import Item
from pipeline.rl import reference
from pipeline.trainer.engine import Engine
from pipeline.trainer.loop import Job

TIME, MEMORY = Goal(1.05), Goal(1.02)


def measure(bed: Bed) -> list[Result]:
    sft_engine, rl_engine = (new_engine(bed, new_policy(bed)) for _ in range(2))
    size = bed.settings.train.batch_size
    sft = job(bed, sft_engine, algorithm_of("stage=sft"), bed.singles, size)
    rl = job(bed, rl_engine, algorithm_of("stage=rl", "algo=alol"), with_advantages(bed, rl_engine), size)
    rounds = alternate(stepper(rl), stepper(sft), bed.plan)
    results = [compared("A-LOL step / SFT step", "s", rounds, TIME)]
    peaks = [(peak_of(rl, step), peak_of(sft, step)) for step in range(bed.settings.rounds)]
    results.append(compared("A-LOL step / SFT step, peak memory beyond the model's own", "MB", peaks, MEMORY))
    if bed.ranks.device.type == "cuda":
        results.append(utilisation(bed, sft, results[0].other))
    return results


def with_advantages(bed: Bed, engine: Engine) -> list[Item]:
    """The rows as offline RL trains on them: with the reference's log-probabilities, and an advantage each."""
    saved = reference.reference_logps(engine, bed.singles, packing(bed))
    items = reference.with_reference(bed.singles, saved)
    ones = [1.0] * len(items)
    return dataset.with_numbers(items, reward=ones, value=[0.0] * len(items), advantage=ones)


def peak_of(work: Job, step: int) -> float:
    take = stepper(work)
    return peak_megabytes(lambda: take(step))


def utilisation(bed: Bed, sft: Job, seconds: float) -> Result:
    """The share of the GPU's arithmetic that 6 operations per weight and token read make up (MFU)."""
    weights = sum(p.numel() for p in sft.engine.module.parameters())
    steps = range(bed.settings.steps)
    tokens = sum(int(batch.input_mask.sum()) for step in steps for batch in sft.windows.at(step)) / len(steps)
    share = 6 * weights * tokens / seconds / (bed.settings.gpu.peak_tflops * 1e12)
    return Result("SFT step, MFU", "", ours=share, note=f"{weights / 1e9:.2f} G weights, {tokens:,.0f} tokens per step")
