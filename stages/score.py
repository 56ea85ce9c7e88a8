"""The front door of offline RL: rows in, the same rows with rewards out, in runs/<run>/score/<split>.jsonl."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from pipeline import assembly, engine, evaluate, examples, runs
from pipeline.entry import run
from pipeline.metrics import write_json
from pipeline.records import Example, Scores, UserError
from pipeline.settings import Score
from pipeline.tasks.write import write_rows


def main(settings: Score, words: Sequence[str]) -> None:
    ranks = engine.start(settings.launch.ddp_timeout)
    directory = runs.stage_dir(settings, "score")
    judge = assembly.build_rewards(settings, settings.reward, settings.rewards, ranks.device)
    if judge is None:
        raise UserError(
            "stage=score: nothing to score with: give reward=NAME (length, rouge, your/file.py ...), "
            f"or train one with bash run.sh stage=reward run={settings.run}"
        )
    inputs = assembly.inputs(settings, settings.model) | assembly.reward_inputs(settings, settings.reward)
    if not ranks.on_main(lambda: runs.open_stage(directory, settings, words, inputs)):
        return
    say = print if ranks.main else str
    results: dict[str, object] = {}
    for split in splits_of(settings):
        load = examples.load_train if split == "train" else lambda *a: examples.load(a[0], split, *a[1:])  # noqa: B023
        rows = examples.scored(load(settings.data, settings.seed, say), settings.data)
        scores = evaluate.score_texts(ranks, judge, rows, [row.completion for row in rows])
        if ranks.main:
            write_rows(str(directory / f"{split}.jsonl"), with_scores(rows, scores))
        texts = [row.completion for row in rows]
        results[split] = {"rows": len(rows), **evaluate.reward_statistics(scores, texts), **by_source(rows, scores)}
        say(f"{split}: {len(rows):,} rows, reward {statistics.fmean(scores.total):.4f}")
    if ranks.main:
        write_json(directory / "results.json", results)
    ranks.barrier()


def splits_of(settings: Score) -> list[str]:
    """The splits asked for that the data have; validation is cut from train where it has no file of its own."""
    if settings.data.task is not None:
        return settings.splits
    there = {*examples.split_places(settings.data), "validation"}
    return [split for split in settings.splits if split in there]


def with_scores(rows: Sequence[Example], scores: Scores) -> list[Example]:
    """The rows with the weighted sum as `reward` and each reward's normalised score in `rewards`."""
    return [
        replace(row, reward=scores.total[i], rewards={name: values[i] for name, values in scores.normalised.items()})
        for i, row in enumerate(rows)
    ]


def by_source(rows: Sequence[Example], scores: Scores) -> dict[str, float]:
    """The mean reward of each source, where rows name one."""
    found: dict[str, list[float]] = {}
    for row, total in zip(rows, scores.total, strict=True):
        found.setdefault(row.source, []).append(total)
    return {f"reward/mean/{source}": statistics.fmean(values) for source, values in found.items() if source}


if __name__ == "__main__":
    run(main, "score")
