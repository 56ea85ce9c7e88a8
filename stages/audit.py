"""What a log of scored rows can teach, before anything is trained: runs/<run>/audit/, with results.json and a page."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from pipeline.audit import findings, learnable, log, oddities, page
from pipeline.audit.log import Log
from pipeline.config.reward_spec import parse, words_for
from pipeline.config.schema import AuditStage
from pipeline.data import convert, dataset
from pipeline.data.mixing import copy_number
from pipeline.data.splits import split_places
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.launch import run_dir
from pipeline.launch.entry import run
from pipeline.records import Example
from pipeline.report.numbers import number
from pipeline.rewards import own_rewards
from pipeline.words import between_blanks
from stages import inputs

TOKENS_PER_WORD = 1.4  # of most tokenizers, about

logger = logging.getLogger("tiffin")


def main(settings: AuditStage, words: Sequence[str]) -> None:
    directory = run_dir.stage_dir(settings, "audit")
    if not run_dir.open_stage(directory, settings, words, inputs.of_audit(settings)):
        return
    rows, held_out = rows_of(settings)
    scored = [(row, reward) for row, reward in zip(rows, rewards_of(settings, rows), strict=True) if reward is not None]
    if not scored:
        raise UserError(
            f"stage=audit: none of {len(rows):,} rows has a reward, wanted scored rows: score them with stage=score "
            "reward=NAME; preference pairs teach without (algo=dpo)"
        )
    of = log.log_of([row for row, _ in scored], [reward for _, reward in scored])
    fitted = learnable.sampled(of, settings.seed)
    if len(fitted.ids) < len(of.ids):
        logger.info(f"what can be learned is told from {len(fitted.ids):,} of {len(of.ids):,} rows, whole prompts")
    odd, (learning, advantage) = oddities.of_texts(of), learnable.of_learning(fitted, settings.seed)
    parts = {
        "prompts": log.of_prompts(of) | {"without_reward": len(rows) - len(scored)} | overlap(rows, held_out),
        "rewards": log.of_rewards(of),
        "learning": learning,
        "duplicates": log.of_duplicates(of),
        "lengths": of_lengths(of, settings),
        "oddities": {one.name: one.count for one in odd},
    }
    numbers = {f"{part}/{name}": float(value) for part, values in parts.items() for name, value in values.items()}
    told = learnable.verdict(numbers["prompts/rows"], numbers["prompts/prompts"], numbers["learning/gain/sure"])
    said, found = findings.headline(told, numbers), findings.of_numbers(numbers)
    shown = page.Audited(directory.parent.name, said, found, numbers, fitted, advantage, odd, named(rows))
    page.build(directory / "audit.html", shown)
    lines = [one._asdict() for one in found]
    write_json(directory / "results.json", {"verdict": told, "headline": said._asdict(), "findings": lines, **numbers})
    for one in found:
        print(f"{one.level}: {one.text}. What to do: {one.do}", flush=True)


def rows_of(settings: AuditStage) -> tuple[list[Example], list[Example]]:
    """One row for each logged response of train, nothing held out; and the rows of the other splits there are."""
    whole = settings.data.model_copy(update={"validation_fraction": 0.0})
    others = [] if whole.task else [split for split in split_places(whole) if split != "train"]
    train, *rest = dataset.splits(whole, settings.seed, ["train", *others], folder=run_dir.cache(settings))
    train = [row for row in train if copy_number(row) == 1]  # whatever their weights
    held = [row for row in train if row.completion is not None or convert.is_pair(row) or row.candidate_rewards]
    if not held:
        raise UserError(f"stage=audit: none of {len(train):,} rows holds a response, wanted some with rewards")
    return convert.to_scored(held, "both"), [row for rows in rest for row in rows]


def rewards_of(settings: AuditStage, rows: Sequence[Example]) -> list[float | None]:
    """Each row's reward: its own, or what `reward` adds up of those it brings by name. Raises UserError."""
    if weights := parse(settings.reward):
        columns = [(weight, own_rewards.values(name, rows)) for name, weight in weights]
        return [sum(weight * values[i] for weight, values in columns) for i in range(len(rows))]
    names = [name for name in own_rewards.names(rows) if name != own_rewards.SINGLE]
    if names and all(row.reward is None for row in rows):
        raise UserError(
            f"stage=audit: the rows bring rewards by name ({', '.join(names)}) and no `reward`, wanted which count: "
            f"add {words_for(names)}"
        )
    return [row.reward for row in rows]


def overlap(rows: Sequence[Example], held_out: Sequence[Example]) -> dict[str, float]:
    """held_out_too: prompts of other splits that stand in train as well."""
    return {"held_out_too": len({row.prompt for row in rows} & {row.prompt for row in held_out})}


def of_lengths(of: Log, settings: AuditStage) -> dict[str, float]:
    """Words per answer; how many prompts and answers are longer than training takes, by TOKENS_PER_WORD."""
    data = settings.data
    prompts = np.array([len(between_blanks(prompt)) for prompt in of.prompts]) * TOKENS_PER_WORD
    return {
        "words": of.words.mean(),
        "long_prompts": (prompts > data.max_prompt_length).sum(),
        "long_answers": (of.words * TOKENS_PER_WORD > data.max_response_length).sum(),
        "max_prompt_length": data.max_prompt_length,
        "max_response_length": data.max_response_length,
    }


def named(rows: Sequence[Example]) -> list[list[str]]:
    """A table of the rewards that rows bring by name: rows, mean, spread, and the correlation with each other one."""
    names = dict.fromkeys(name for row in rows for name in row.rewards)
    columns = {name: [row.rewards.get(name) for row in rows] for name in names}
    if len(columns) < 2:
        return []
    table = [["reward", "rows", "mean", "std", *(f"with {name}" for name in columns)]]
    for name, values in columns.items():
        there = np.array([value for value in values if value is not None])
        table.append([name, f"{len(there):,}", number(float(there.mean())), number(float(there.std()))])
        for other in columns.values():
            both = [(a, b) for a, b in zip(values, other, strict=True) if a is not None and b is not None]
            table[-1].append(number(learnable.correlation(*zip(*both, strict=True))) if len(both) > 1 else "")
    return table


if __name__ == "__main__":
    run(main, "audit")
