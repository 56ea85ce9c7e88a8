"""Rewards for rows: your rows in, the same rows with rewards out, in runs/<run>/score/<split>.jsonl.

A row with candidates leaves with these ranked, best first, and their `candidate_rewards`; if it has a completion too,
that stays what it was, the text to compare with, and gets no reward. A row with a completion alone leaves with its
`reward` and `rewards`; a preference pair as one or two such rows (data.responses).
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence

from pipeline.config.schema import ScoreStage
from pipeline.data import dataset
from pipeline.data.prompts import unique_prompts
from pipeline.data.write import write_rows
from pipeline.files import write_json
from pipeline.launch import run_dir
from pipeline.launch.entry import run
from pipeline.records import Example, Scores
from pipeline.rewards import build, candidates, scoring
from pipeline.trainer import evaluation, group
from pipeline.trainer.opening import open_stage
from stages import inputs

logger = logging.getLogger("tiffin")


def main(settings: ScoreStage, words: Sequence[str]) -> None:
    ranks = group.start(settings.launch.ddp_timeout)
    directory = run_dir.stage_dir(settings, "score")
    data = inputs.score_data(settings)
    if not open_stage(ranks, directory, settings, words, inputs.of_score(settings)):
        return
    rewards = build.build_rewards(settings, settings.reward, settings.rewards, ranks.device, logged=True)
    if rewards is None:
        raise inputs.no_judge(settings)
    results: dict[str, object] = {}
    wanted = inputs.score_splits(settings, data)
    if rewards.unsettled and wanted[0] != "train":
        raise inputs.train_first(wanted)
    for split, examples in zip(
        wanted, dataset.splits(data, settings.seed, wanted, True, run_dir.cache(settings)), strict=True
    ):
        rows = dataset.judgeable(examples, data)
        if split == wanted[0]:
            # candidates are compared with what new responses to the prompt are
            first = unique_prompts(rows[:1])[0] if rows[0].candidates else rows[0]
            scoring.try_rewards(ranks, rewards, first, written=False)
        judged = candidates.judged(ranks, rewards, rows, directory)
        if ranks.main:
            write_rows(directory / f"{split}.jsonl", judged.rows)
        measured = evaluation.reward_statistics(judged.scores, judged.texts) | by_source(judged.of, judged.scores)
        results[split] = {"rows": len(rows), "candidates": sum(len(row.candidates) for row in rows), **measured}
        logger.info(f"{split}: {len(rows):,} rows, reward {statistics.fmean(judged.scores.total):.4f}")
    if ranks.main:
        write_json(directory / "results.json", results)
    ranks.barrier()


def by_source(rows: Sequence[Example], scores: Scores) -> dict[str, float]:
    """The mean reward of each source, where rows name one."""
    totals: dict[str, list[float]] = {}
    for row, total in zip(rows, scores.total, strict=True):
        totals.setdefault(row.source, []).append(total)
    return {f"reward/{source}": statistics.fmean(values) for source, values in totals.items() if source}


if __name__ == "__main__":
    run(main, "score")
