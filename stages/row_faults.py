"""Which rows a stage reads, and what is wrong with them as far as the first ones tell. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from pipeline import plugins
from pipeline.config.schema import (
    AuditStage,
    EvaluateStage,
    GenerateStage,
    RewardStage,
    RlOffline,
    RlPairs,
    RlScored,
    RlStage,
    ScoreStage,
    SftStage,
    WithModel,
)
from pipeline.config.sections import DataSettings
from pipeline.data import convert, hub, readers
from pipeline.data.files import raw_rows
from pipeline.data.splits import origins
from pipeline.errors import UserError
from pipeline.records import Example
from stages import inputs
from stages.ahead import Ahead

Rows = tuple[DataSettings, Sequence[str]]  # where they lie, and the splits that a stage reads
FirstRows = tuple[list[Example], list[str]]  # and why there are no more
WHOLE_MB = 20  # files that can only be read whole, and are larger, are left to the stage
READ_WHOLE = (".json", ".parquet")
MOST_HEADS = 20  # of more files than these only the first are looked into


def of_rows(settings: WithModel, ahead: Ahead, use: Callable[[list[Example]], object]) -> Iterator[str]:
    """Files and splits that are not there; rows, of each file the first, that are none or that `use` refuses."""
    try:
        found = rows_of(settings, ahead)
        if found is None:  # an earlier step makes them
            return
        data, names = found
        if data.task is not None:
            plugins.check(data.task, "pipeline.tasks", "data.task", "examples")
            return
        if data.path is not None and hub.is_hub_name(data.path):  # the stage asks the hub
            return
        files = dict.fromkeys(chain.from_iterable(origins(data, names).values()))
    except UserError as error:
        yield str(error)
        return
    filters = readers.Filters(data.exclude, data.drop_abrupt, data.sources)
    for number, file in enumerate(files):
        path = Path(file)
        whole = path.name.removesuffix(".gz").endswith(READ_WHOLE)
        if (
            ahead.will_hold(file)
            or hub.is_hub_name(file)
            or (whole and path.is_file() and path.stat().st_size > WHOLE_MB * 1e6)
        ):
            continue
        try:
            if number < MOST_HEADS:
                use(readers.head(file, data.format, filters, data.max_bad_rows, data.columns, data.streaming))
            else:
                raw_rows(file, streaming=data.streaming)
        except UserError as error:
            yield str(error)


def rows_of(settings: WithModel, ahead: Ahead) -> Rows | None:
    """The rows that a stage reads; None where an earlier step makes them. Raises UserError."""
    made = isinstance(settings, ScoreStage) and settings.of == "generate" and ahead.makes(settings, "generate")
    if made or ahead.will_hold(settings.data.path):
        return None
    if isinstance(settings, ScoreStage):
        data = inputs.score_data(settings)
        hub_set = data.path is not None and hub.is_hub_name(data.path)
        return data, [] if hub_set else inputs.score_splits(settings, data)
    if isinstance(settings, RlStage):
        made = ahead.holds(settings.scored) if settings.scored else ahead.makes(settings, "score")
        return None if made else (inputs.rl_data(settings), ("train", "validation"))
    if isinstance(settings, GenerateStage):
        return settings.data, settings.splits
    if isinstance(settings, EvaluateStage):
        return settings.data, [inputs.evaluate_split(settings)]
    return settings.data, ("train",) if isinstance(settings, AuditStage) else ("train", "validation")


def first_rows(settings: WithModel, ahead: Ahead) -> FirstRows:
    """The first rows of each file that a stage reads, as far as there are some; and why there are no more."""
    rows: list[Example] = []
    return rows, [*of_rows(settings, ahead, rows.extend)]


def may_bring_rewards(settings: WithModel, ahead: Ahead) -> bool:
    """Whether rows that cannot be seen yet may bring rewards: those of the hub, of large files, of a user's task."""
    found = rows_of(settings, ahead)
    return found is not None and (found[0].task is None or ".py" in found[0].task)


def suits(examples: Sequence[Example], settings: WithModel, ahead: Ahead) -> None:
    """Raises UserError, as the stage would, for a row of the first ones that it cannot use."""
    if isinstance(settings, SftStage):
        convert.to_supervised(examples)
    elif isinstance(settings, RewardStage | RlPairs):
        for one in [] if all(map(convert.is_pair, examples)) else examples:
            for row in [] if convert.is_pair(one) else convert.each_candidate(one):
                convert.with_score(row)
    elif isinstance(settings, RlScored):
        rows = convert.to_scored(convert.parted(examples), "both")
        if settings.reward is None and not ahead.reward_models(settings):
            convert.judged(convert.with_sides(rows) if settings.algorithm.file == "labels" else rows, settings.run)
    elif isinstance(settings, ScoreStage | RlOffline):
        rows = [one for one in examples if isinstance(settings, RlOffline) or not one.candidates]
        rows = convert.to_scored(rows, settings.data.responses)
        if isinstance(settings, RlOffline) and needs_rewards(settings) and not ahead.reward_models(settings):
            convert.judged(rows, settings.run)


def needs_rewards(settings: RlOffline) -> bool:
    """Whether rows must bring rewards, unless a model of the run judges them."""
    read = settings.algorithm.settings.get("weight") != "one"  # those without weigh all alike by what they aim at
    return (read or settings.rows != "all" or settings.shuffle_rewards) and settings.reward is None
