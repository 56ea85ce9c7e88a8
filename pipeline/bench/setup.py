"""What the parts of the benchmark share: rows of a built-in task, new models, trainers with the product's own loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.bench.measure import Timing
from pipeline.config.resolve import resolve
from pipeline.config.schema import BenchStage
from pipeline.config.yaml_layers import ROOT
from pipeline.data import convert, dataset, encoded, encoding
from pipeline.data.batching import Packing, Windows
from pipeline.data.tokenization import Encoder
from pipeline.errors import UserError
from pipeline.models import build
from pipeline.models.policy import Policy, RewardModel
from pipeline.records import Example, Item, Row
from pipeline.rl import reference
from pipeline.trainer.engine import Engine
from pipeline.trainer.group import Ranks
from pipeline.trainer.loop import HELD_OUT_LOSS, Evaluation, Trainer, one_step, summary
from pipeline.trainer.metrics import Interval, Metrics
from pipeline.trainer.model import Model, packing_for
from pipeline.trainer.objective import Objective, objective_of
from pipeline.trainer.schedule import epochs_of

RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MANY = 1_000_000  # steps that a trainer of the benchmark could take


@dataclass(frozen=True)
class Setup:
    """Settings, ranks, and the rows every part draws from."""

    settings: BenchStage
    ranks: Ranks
    rows: list[Example]
    encoder: Encoder
    directory: Path  # of the stage: logs stay there
    folder: Path  # for what is needed only while measuring

    @property
    def timing(self) -> Timing:
        return Timing(self.settings.rounds, self.settings.steps, self.settings.clock)


def prepare(settings: BenchStage, ranks: Ranks, directory: Path, folder: Path) -> Setup:
    """The setup for `settings`, or, where there is a GPU, for the model and the batches of `settings.gpu`.

    Raises UserError where processor time is requested and there is a GPU.
    """
    if ranks.device.type == "cuda":
        if settings.clock == "cpu":
            raise UserError("clock: cpu, but the work is the GPU's: set clock=wall")
        settings = for_gpu(settings)
    return _load(settings, ranks, directory, folder)


def with_settings(setup: Setup, values: Mapping[str, Any], mask: bool = False) -> Setup:
    """A setup with other values, with rows and a tokenizer of their own; `mask`: it has a mask token."""
    return _load(changed(setup.settings, values), setup.ranks, setup.directory, setup.folder, mask)


def _load(settings: BenchStage, ranks: Ranks, directory: Path, folder: Path, mask: bool = False) -> Setup:
    (rows,) = dataset.splits(settings.data, settings.seed, ["train"])
    encoder = build.encoder_of(settings, settings.model, lambda: dataset.texts(rows, settings.template), mask)
    return Setup(settings, ranks, rows, encoder, directory, folder)


def changed(section: Any, values: Mapping[str, Any]) -> Any:
    """`section` of the settings with other values; a mapping holds those of a section in it."""
    inner = {name: changed(getattr(section, name), v) for name, v in values.items() if isinstance(v, dict)}
    return section.model_copy(update={**values, **inner})


def for_gpu(settings: BenchStage) -> BenchStage:
    """The settings with `gpu` in the place of the small shape."""
    gpu = settings.gpu.model_dump()
    sizes = {name: gpu[name] for name in ("hidden_size", "num_layers", "num_heads")}
    train = {name: gpu[name] for name in ("precision", "batch_size", "max_tokens")}
    return changed(settings, {"model": {"scratch": sizes}, "train": train})


def environment() -> dict[str, str]:
    """For another process: this one's without what says that it is a rank, and with our packages in reach."""
    own = {name: value for name, value in os.environ.items() if name not in RANK_NAMES}
    return {**own, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [own.get("PYTHONPATH")])])}


def singles(setup: Setup) -> Sequence[Item]:
    """The rows with one response each."""
    return encoding.encode(convert.to_supervised(setup.rows), setup.encoder, encoding.completion_rows)


def new_policy(setup: Setup) -> Policy:
    settings = setup.settings
    longest = settings.data.max_response_length
    return build.policy_module(settings.model, setup.encoder, settings.train, longest, settings.seed)


def model_of(setup: Setup, module: Policy | RewardModel, trained: bool = True) -> Model:
    """The module under an engine, with an optimizer if it is to be trained."""
    train = setup.settings.train
    engine = Engine(module, setup.ranks, train, setup.settings.optimizer if trained else None)
    return Model(engine, setup.encoder, packing_for(module, setup.encoder, train, setup.ranks))


def new_trainer(setup: Setup, model: Model, objective: Objective, items: list[Item], packing: Packing) -> Trainer:
    """What a stage would put together, without evaluation, logs and checkpoints. A pair is two sequences of a batch."""
    settings, ranks = setup.settings, setup.ranks
    drawn = changed(settings, {"train": {"batch_size": settings.train.batch_size // len(items[0].rows)}})
    draw = epochs_of(items, packing, drawn)
    return Trainer(
        model=model,
        objective=objective,
        windows=Windows(items, draw, packing, ranks.rank, ranks.world),
        evaluate=lambda step: Evaluation({}),
        settings=settings,
        max_steps=MANY,
        best_metric=HELD_OUT_LOSS,
        directory=setup.folder,
    )


def trainer_of(setup: Setup, model: Model, items: list[Item], words: list[str]) -> Trainer:
    """A trainer of `items` with the algorithm of the stage that `words` name."""
    _, _, objective = objective_of(resolve(words).settings.algorithm)
    return new_trainer(setup, model, objective, items, model.packing)


def sft_trainer(setup: Setup, items: list[Item]) -> Trainer:
    return trainer_of(setup, model_of(setup, new_policy(setup)), items, ["stage=sft"])


def alol_trainer(setup: Setup, items: list[Item]) -> Trainer:
    """A-LOL on the items, with the reference's log-probabilities, and an advantage of 1 each."""
    model, ones = model_of(setup, new_policy(setup)), [1.0] * len(items)
    items = with_reference(model, items)
    items = encoded.with_numbers(items, reward=ones, value=[0.0] * len(items), advantage=ones)
    return trainer_of(setup, model, items, ["stage=rl", "algo=alol"])


def dpo_trainer(setup: Setup, pairs: list[Item]) -> Trainer:
    """DPO on pairs, with the reference's log-probabilities of both responses."""
    model = model_of(setup, new_policy(setup))
    return trainer_of(setup, model, with_reference(model, pairs), ["stage=rl", "algo=dpo"])


def with_reference(model: Model, items: list[Item]) -> Sequence[Item]:
    """The items with what the model says of their responses before it is trained."""
    parts = [logps for logps, _ in reference.read_in_parts(model.engine, items, model.packing)]
    return reference.attached(items, np.concatenate(parts))


def stepper(trainer: Trainer) -> Callable[[int], None]:
    """A function that takes one step of a trainer, and sums its metrics up every train.logging_steps."""
    interval = Interval(Metrics())

    def step(number: int) -> None:
        one_step(trainer, number, interval)
        if (number + 1) % trainer.settings.train.logging_steps == 0:
            summary(trainer.engine.ranks, interval, 0)

    return step


def even(items: list[Item], prompt: int, response: int) -> list[Item]:
    """The items with every row cut or repeated to `prompt` and `response` tokens: no variation of length."""

    def sized(row: Row) -> Row:
        prompts = row.prompt_ids * (prompt // max(1, len(row.prompt_ids)) + 1)
        responses = row.response_ids * (response // max(1, len(row.response_ids)) + 1)
        return replace(row, prompt_ids=prompts[:prompt], response_ids=responses[:response])

    return [replace(item, rows=tuple(sized(row) for row in item.rows)) for item in items]
