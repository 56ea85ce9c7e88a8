"""Responses, or candidates ranked by a reward, for the prompts of splits: runs/<run>/generate/<split>.jsonl.

Several responses to one prompt become candidates: beams (num_beams=k num_return_sequences=k), samples (do_sample=true
num_return_sequences=k), or diverse samples (these, and generation.temperatures=[0.5, 1.0, 1.5]).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pipeline.config.schema import GenerateStage
from pipeline.data import dataset
from pipeline.data.prompts import unique_prompts
from pipeline.data.write import write_rows
from pipeline.files import write_json
from pipeline.launch import run_dir
from pipeline.launch.entry import run
from pipeline.records import Example, Response
from pipeline.rewards import build, candidates, scoring
from pipeline.rewards.candidates import Gathered
from pipeline.rollout import same_words
from pipeline.rollout.generate import generate
from pipeline.trainer import evaluation, group
from pipeline.trainer.model import Model, build_inference
from pipeline.trainer.opening import open_stage
from stages import inputs

logger = logging.getLogger("tiffin")

BATCHES = 20  # on each rank between two words about how far it is


def main(settings: GenerateStage, words: Sequence[str]) -> None:
    ranks = group.start(settings.launch.ddp_timeout)
    directory = run_dir.stage_dir(settings, "generate")
    model = run_dir.policy_model(settings, settings.policy)
    if not open_stage(ranks, directory, settings, words, inputs.of_generate(settings)):
        return
    rewards = None
    if settings.reward is not None:
        rewards = build.build_rewards(settings, settings.reward, settings.rewards, ranks.device)
    splits = dataset.splits(settings.data, settings.seed, settings.splits, True, run_dir.cache(settings))
    prompts = {split: unique_prompts(rows) for split, rows in zip(settings.splits, splits, strict=True)}
    if rewards is not None:
        scoring.try_rewards(ranks, rewards, next(iter(prompts.values()))[0], written=False)
    results: dict[str, object] = {}
    policy = build_inference(settings, ranks, model)
    same_words.compare(policy.engine, policy.encoder, next(iter(prompts.values()))[0], settings.generation)
    for split, rows in prompts.items():
        chosen = rows[: settings.max_rows]
        answers = responses(policy, chosen, settings, split)
        gathered = candidates.gathered(answers, settings.generation.num_return_sequences)
        statistics = evaluation.completion_statistics(answers)
        cut = sum(not answer.finished for answer in answers)
        limit = f"generation.max_new_tokens={settings.generation.max_new_tokens}"
        dataset.warn_of_cuts(cut, len(answers), limit, "(their rows' `unfinished`), which then teach no end")
        if rewards is not None and gathered.rows:
            judged = candidates.judged(ranks, rewards, gathered.rows)
            gathered = gathered._replace(rows=judged.rows)
            statistics |= evaluation.reward_statistics(judged.scores, judged.texts)
        if ranks.main:
            write_rows(directory / f"{split}.jsonl", gathered.rows)
        left_out = {"empty_responses": gathered.empty, "repeated_responses": gathered.repeated}
        count = sum(len(row.candidates) for row in gathered.rows)
        results[split] = {"rows": len(gathered.rows), "candidates": count, **left_out, **statistics}
        logger.info(f"{directory / split}.jsonl: {summary(gathered, len(answers))}")
    if ranks.main:
        write_json(directory / "results.json", results)
    ranks.barrier()


def responses(policy: Model, chosen: Sequence[Example], settings: GenerateStage, split: str) -> list[Response]:
    """Those to `chosen`, part by part; after each of several parts the progress is logged."""
    part = BATCHES * settings.generation.batch_size * policy.ranks.world
    answers: list[Response] = []
    for start in range(0, len(chosen), part):
        some = chosen[start : start + part]
        answers += generate(policy.engine, policy.encoder, some, settings.generation, settings.seed)
        if len(chosen) > part:
            logger.info(f"{split}: {start + len(some):,} of {len(chosen):,} prompts")
    return answers


def summary(gathered: Gathered, drawn: int) -> str:
    """What was written and left out, and whether candidates are in order."""
    left_out = f"{gathered.empty:,} empty and {gathered.repeated:,} repeated ones of {drawn:,} responses left out"
    unranked = any(row.candidates and not row.candidate_rewards for row in gathered.rows)
    order = "; candidates not ranked yet: stage=score of=generate ranks them" if unranked else ""
    return f"{len(gathered.rows):,} rows, {left_out}{order}"


if __name__ == "__main__":
    run(main, "generate")
