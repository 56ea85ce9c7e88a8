"""Responses, or candidates ranked by a reward, for the prompts of a split: runs/<run>/generate/responses.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline import assembly, engine, evaluate, examples, rollout, runs
from pipeline.entry import run
from pipeline.metrics import write_json
from pipeline.records import Example, Response, Scores
from pipeline.settings import Generate
from pipeline.tasks.write import write_rows


def main(settings: Generate, words: Sequence[str]) -> None:
    ranks = engine.start(settings.launch.ddp_timeout)
    directory = runs.stage_dir(settings, "generate")
    model = assembly.policy_model(settings, settings.policy)
    inputs = assembly.inputs(settings, model) | assembly.reward_inputs(settings, settings.reward, own=False)
    if not ranks.on_main(lambda: runs.open_stage(directory, settings, words, inputs)):
        return
    say = print if ranks.main else str
    judge = None
    if settings.reward is not None:
        judge = assembly.build_rewards(settings, settings.reward, settings.rewards, ranks.device)
    prompts = examples.unique_prompts(examples.load(settings.data, settings.split, settings.seed, say))
    prompts = prompts[: settings.max_rows]
    with assembly.inference(settings, model, ranks) as (speaker, encoder, _):
        answers = rollout.generate(speaker, encoder, prompts, settings.generation, settings.seed)
    scores = None if judge is None else evaluate.score_responses(ranks, judge, answers)
    rows = candidates(answers, scores, settings.generation.num_return_sequences)
    empty = sum(not answer.text for answer in answers)
    results = evaluate.completion_statistics(answers)
    if scores is not None:
        results |= evaluate.reward_statistics(scores, [answer.text for answer in answers])
    if ranks.main:
        write_rows(str(directory / "responses.jsonl"), rows)
        write_json(directory / "results.json", {"rows": len(rows), "empty_responses": empty, **results})
    left_out = f"{empty:,} of {len(answers):,} responses empty and left out"
    say(f"{directory / 'responses.jsonl'}: {len(rows):,} rows, {left_out}")
    ranks.barrier()


def candidates(answers: Sequence[Response], scores: Scores | None, n: int) -> list[Example]:
    """One row per prompt: its response, or its n candidates, best first where they were scored.

    Empty responses are left out, and with them rows that have no other.
    """
    rows = []
    for start in range(0, len(answers), n):
        order = [i for i in range(start, start + n) if answers[i].text]
        if not order:
            continue
        if scores is not None:
            order.sort(key=lambda i: -scores.total[i])
        rewards = () if scores is None else tuple(scores.total[i] for i in order)
        asked = answers[start].example
        bare = Example(asked.id, asked.prompt, references=asked.references, source=asked.source)
        if n == 1:
            rows.append(replace(bare, completion=answers[start].text, reward=rewards[0] if rewards else None))
        else:
            texts = tuple(answers[i].text for i in order)
            rows.append(replace(bare, candidates=texts, candidate_rewards=rewards))
    return rows


if __name__ == "__main__":
    run(main, "generate")
