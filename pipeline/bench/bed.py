"""What the parts measure with: rows of the embedded task, fresh models, and jobs of the house's own loop."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from pipeline.bench.measure import Plan
from pipeline.config.resolve import resolve
from pipeline.config.schema import Algorithm, Bench
from pipeline.config.yaml_layers import ROOT
from pipeline.data import dataset
from pipeline.data import pairs as pairing
from pipeline.data.batching import Packing, Windows, packing_of
from pipeline.data.tokenization import Encoder
from pipeline.errors import UserError
from pipeline.models import build
from pipeline.models.policy import Policy, RewardModel
from pipeline.records import Item
from pipeline.trainer import loop
from pipeline.trainer.checkpoint import Checkpoints
from pipeline.trainer.engine import Engine, Ranks
from pipeline.trainer.logger import RunLog
from pipeline.trainer.loop import Evaluation, Job, Watch, one_step, summary
from pipeline.trainer.metrics import Interval, Tally
from pipeline.trainer.objective import objective_of

RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MANY = 1_000_000  # steps that a bench's job could take


@dataclass(frozen=True)
class Bed:
    """Settings, ranks, and the rows every part draws from."""

    settings: Bench
    ranks: Ranks
    encoder: Encoder
    singles: list[Item]  # one response per row
    pairs: list[Item]  # chosen and rejected
    directory: Path  # of the stage: logs stay there
    folder: Path  # for what is needed only while measuring

    @property
    def plan(self) -> Plan:
        return Plan(self.settings.rounds, self.settings.steps, self.settings.clock)


def prepare(settings: Bench, ranks: Ranks, directory: Path, folder: Path) -> Bed:
    """The bed for `settings`, or, where there is a GPU, for the model and the batches of `settings.gpu`.

    Raises:
        UserError: processor time is asked for where there is a GPU.
    """
    if ranks.device.type == "cuda":
        if settings.clock == "cpu":
            raise UserError("clock: cpu, but the work is the GPU's: say clock=wall")
        settings = for_gpu(settings)
    (rows,) = dataset.splits(settings.data, settings.seed, ["train"])
    encoder = build.encoder_of(settings, settings.model, lambda: dataset.texts(rows, settings.template))
    singles = dataset.encode(dataset.supervised(rows), encoder, dataset.completion_rows).items
    pairs = dataset.encode(pairing.paired(rows), encoder, dataset.pair_rows).items
    return Bed(settings, ranks, encoder, singles, pairs, directory, folder)


def environment() -> dict[str, str]:
    """For another process: this one's without what says that it is a rank, and with our packages in reach."""
    own = {name: value for name, value in os.environ.items() if name not in RANK_NAMES}
    return {**own, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [own.get("PYTHONPATH")])])}


def for_gpu(settings: Bench) -> Bench:
    """The settings with `gpu` in the place of the small shape."""
    gpu = settings.gpu
    sizes = {"hidden_size": gpu.hidden_size, "num_layers": gpu.num_layers, "num_heads": gpu.num_heads}
    scratch = settings.model.scratch.model_copy(update=sizes)
    batches = {"precision": gpu.precision, "batch_size": gpu.batch_size, "max_tokens": gpu.max_tokens}
    return settings.model_copy(
        update={
            "model": settings.model.model_copy(update={"scratch": scratch}),
            "train": settings.train.model_copy(update=batches),
        }
    )


def algorithm_of(*words: str) -> Algorithm:
    """The algorithm of the stage that `words` name, as its YAML gives it."""
    return resolve(words).settings.algorithm


def new_policy(bed: Bed) -> Policy:
    settings = bed.settings
    longest = settings.data.max_response_length
    return build.build_policy(settings.model, bed.encoder, settings.train, longest, settings.seed)


def new_scalar(bed: Bed) -> RewardModel:
    return build.build_scalar(bed.settings.model, bed.encoder, bed.settings.train, bed.settings.seed)


def new_engine(bed: Bed, module: nn.Module) -> Engine:
    return Engine(module, bed.ranks, bed.settings.train, bed.settings.optimizer)


def packing(bed: Bed) -> Packing:
    return packing_of(bed.settings.train, bed.ranks.world, False, bed.encoder.pad_id)


def job(bed: Bed, engine: Engine, algorithm: Algorithm, items: list[Item], size: int) -> Job:
    """A training of `items`, `size` of them per step, as a stage would put it together."""
    settings, ranks = bed.settings, bed.ranks
    _, _, objective = objective_of(algorithm)
    draw = loop.epochs(len(items), size, settings.seed)
    return Job(
        engine=engine,
        objective=objective,
        windows=Windows(items, draw, packing(bed), ranks.rank, ranks.world),
        evaluate=lambda step: Evaluation({}),
        export=lambda directory: None,
        train=settings.train,
        optimizer=settings.optimizer,
        max_steps=MANY,
        eval_steps=None,
        watch=Watch("eval/loss", larger_is_better=False),
        log=RunLog(bed.folder, {}, resume_step=0, enabled=False, total_steps=MANY, description=""),
        checkpoints=Checkpoints(bed.folder, ranks, 1),
        directory=bed.folder,
    )


def stepper(work: Job) -> Callable[[int], None]:
    """A function that takes one step of a job, and sums its statistics up every train.logging_steps."""
    interval = Interval(Tally())

    def step(number: int) -> None:
        one_step(work, number, interval)
        if (number + 1) % work.train.logging_steps == 0:
            summary(work.engine.ranks, interval)

    return step


def even(items: list[Item], prompt: int, response: int) -> list[Item]:
    """The items with every row cut or repeated to `prompt` and `response` tokens: no variation of length."""
    return [
        replace(
            item,
            rows=tuple(
                replace(row, prompt_ids=_sized(row.prompt_ids, prompt), response_ids=_sized(row.response_ids, response))
                for row in item.rows
            ),
        )
        for item in items
    ]


def _sized(ids: tuple[int, ...], length: int) -> tuple[int, ...]:
    return (ids * (length // max(1, len(ids)) + 1))[:length]
