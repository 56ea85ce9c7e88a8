"""Policies side by side on held-out prompts: runs/<run>/evaluate/results.json, {policy: {metric: value}}."""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from pipeline.config.reward_spec import labelled
from pipeline.config.schema import EvaluateStage
from pipeline.config.sections import ModelSettings
from pipeline.data import dataset
from pipeline.data.prompts import unique_prompts
from pipeline.files import flatten, write_json, write_jsonl
from pipeline.launch import run_dir
from pipeline.launch.entry import run
from pipeline.records import Example, Response, Scores
from pipeline.report import gains as report_gains
from pipeline.rewards import build, scoring
from pipeline.rewards.rewards import Rewards
from pipeline.rollout import same_words
from pipeline.rollout.generate import generate, plain_sampling
from pipeline.trainer import evaluation, gains, group, markdown
from pipeline.trainer.board import Board
from pipeline.trainer.evaluated import Alone, Kept, Read
from pipeline.trainer.group import Ranks
from pipeline.trainer.model import Model, build_inference, spoken_packing
from pipeline.trainer.opening import open_stage
from stages import inputs

logger = logging.getLogger("tiffin")

SAMPLED = "sampled/"
SHOWN = {
    "reward": "reward",
    f"{SAMPLED}reward": "sampled",
    "completions/mean_words": "words",
    "completions/distinct_2": "distinct-2",
    "logged/nll": "nll",
    "objective/kl": "KL",
}


def main(settings: EvaluateStage, words: Sequence[str]) -> None:
    ranks = group.start(settings.launch.ddp_timeout)
    directory = run_dir.stage_dir(settings, "evaluate")
    places = inputs.policies(settings)
    models = {name: run_dir.policy_model(settings, place) for name, place in places.items()}
    started_from = inputs.of_evaluate(settings)
    if not open_stage(ranks, directory, settings, words, started_from):
        return
    kept = Kept(ranks, directory, settings, started_from)
    if settings.policies is None and "start" in places:
        logger.info(
            f"policies: this run has no sft, so rl is compared with start, from which it began: {places['start']}"
        )
    monitors = labelled(settings.monitors)
    rewards = build.build_rewards(settings, settings.reward, settings.rewards, ranks.device, monitors)
    split = inputs.evaluate_split(settings)
    for line in inputs.not_held_out(settings, split):
        logger.warning(line)
    carry = rewards is not None and rewards.reads_columns
    (rows,) = dataset.splits(settings.data, settings.seed, [split], carry, run_dir.cache(settings))
    prompts = unique_prompts(rows)[: settings.max_rows]
    if rewards is not None:
        scoring.try_rewards(ranks, rewards, prompts[0], written=True)
    logged = gains.logged(rows)[: settings.max_logged]

    results, answers = answered(settings, models, prompts, rewards, ranks, logged, kept)
    if ranks.main:
        samples = [row for rows in answers.values() for row in rows[: settings.num_samples]]
        every = [row for rows in answers.values() for row in rows] if rewards is not None else []
        earned = {name: [row["reward"] for row in rows] for name, rows in answers.items() if rewards is not None}
        write_jsonl(directory / "samples" / "policies.jsonl", samples)
        write_jsonl(directory / "rewards.jsonl", [_rewards_of(row) for row in every])
        show(Board(directory / "tensorboard"), results, samples, earned)
        write_json(directory / "results.json", results)
        print(table(results))
    kept.clear()


def answered(
    settings: EvaluateStage,
    models: dict[str, ModelSettings],
    prompts: list[Example],
    rewards: Rewards | None,
    ranks: Ranks,
    logged: list[Example],
    kept: Kept,
) -> tuple[dict[str, dict[str, float]], dict[str, list[dict]]]:
    """What is known of each policy and, against the first one, its distance and gain; and its responses as rows.

    In the policies' order. The first policy, the reference, is opened last, so that one model is in memory at a time.
    """
    first, *others = models
    found: dict[str, Alone] = {}
    # the first policy comes last: by then it can say how likely it finds the others' responses
    for name in others:
        if before := kept.take(name, models[name], prompts, logged):
            logger.info(f"policy {name}: evaluated by an earlier start, which was stopped")
            found[name] = before
            continue
        policy = build_inference(settings, ranks, models[name], logged=bool(logged))
        found[name] = alone(settings, policy, name, prompts, rewards, logged)
        kept.put(name, found[name])
        del policy
        gc.collect()
    reference = build_inference(settings, ranks, models[first], logged=bool(logged))
    found[first] = alone(settings, reference, first, prompts, rewards, logged)
    for name, one in found.items():
        one.results.update(distance(reference, first, name, one.sampled))
    known, read = gains.rewarded(logged), {name: one.logged for name, one in found.items() if one.logged}
    gains.say_of_rows(logged, read, known)
    for other in others if known else []:
        found[other].results.update(gained(read, first, other, known))
    return {name: found[name].results for name in models}, {name: found[name].rows for name in models}


def alone(
    settings: EvaluateStage,
    policy: Model,
    name: str,
    prompts: list[Example],
    rewards: Rewards | None,
    logged: list[Example],
) -> Alone:
    """What is known of a policy by itself."""
    answers, sampled = spoken(settings, policy, name, prompts)
    scores, results = judged(settings, policy.ranks, rewards, answers, sampled.responses)
    results |= evaluation.completion_statistics(answers)
    rows = evaluation.sample_rows(answers, scores, len(answers), policy=name)
    read = gains.read(policy, logged) if logged else None
    if read:
        results["logged/nll"] = gains.nll(read)
    return Alone(results, rows, sampled, read)


def spoken(settings: EvaluateStage, policy: Model, name: str, prompts: list[Example]) -> tuple[list[Response], Read]:
    """The policy's responses to the prompts; and plain samples with how likely it finds them, which are these responses
    where plain sampling is asked for."""
    generation = inputs.spoken(settings, name)
    same_words.compare(policy.engine, policy.encoder, prompts[0], generation)
    answers = generate(policy.engine, policy.encoder, prompts, generation, settings.seed)
    free = plain_sampling(generation)
    drawn = answers if free == generation else generate(policy.engine, policy.encoder, prompts, free, settings.seed)
    logps = evaluation.response_logps(policy.engine, drawn, spoken_packing(policy))
    return answers, Read(drawn, logps, policy.encoder.tokenizer)


def judged(
    settings: EvaluateStage,
    ranks: Ranks,
    rewards: Rewards | None,
    answers: Sequence[Response],
    samples: Sequence[Response],
) -> tuple[Scores | None, dict[str, float]]:
    """The rewards of the answers, and their statistics; those of the samples too, where these are others and asked for.

    Nothing of both where nothing judges.
    """
    if rewards is None:
        return None, {}
    scores = scoring.score_responses(ranks, rewards, answers)
    statistics = evaluation.reward_statistics(scores, [answer.text for answer in answers])
    if settings.judge_samples and samples is not answers:
        others = scoring.score_responses(ranks, rewards, samples)
        of_samples = evaluation.reward_statistics(others, [sample.text for sample in samples])
        statistics |= {f"{SAMPLED}{tag}": value for tag, value in of_samples.items()}
    return scores, statistics


def gained(found: Mapping[str, Read], first: str, other: str, known: Mapping[str, gains.Rewarded]) -> dict[str, float]:
    """gain/... of policy `other` over `first`; nothing, and a word, where there is no ratio of the two."""
    ratios = gains.log_ratios(found[other], found[first])
    if ratios is None:
        logger.warning(
            f"policy {other}: it does not write the logged responses in the tokens of {first}, or one of the two holds "
            "some for impossible: no gain over it is estimated"
        )
        return {}
    return gains.gained(ratios, known)


def _rewards_of(row: dict) -> dict:
    """What is kept of every response: the report draws how the rewards are spread."""
    return {name: row[name] for name in ("policy", "id", "reward", "rewards")}


def show(
    board: Board, results: dict[str, dict[str, float]], samples: list[dict], earned: dict[str, list[float]]
) -> None:
    """In TensorBoard: the numbers of the policies, their responses prompt by prompt, the distribution of rewards."""
    board.text("policies", markdown.numbers(results))
    board.text("samples", markdown.side_by_side([flatten(row) for row in samples]))
    for name, rewards in earned.items():
        board.histogram(f"policies/{name}/reward", rewards, 0)
    board.close()


def distance(reference: Model, name: str, other: str, sampled: Read) -> dict[str, float]:
    """The KL of policy `other`, which gave the responses of `sampled`, from the reference called `name`.

    Each reads a prompt as its own template writes it. Nothing where their tokens differ: the ids of one are other texts
    to the other, and its likelihood of the same texts would be that of other events. Both are said.
    """
    responses = sampled.responses
    if not evaluation.same_tokens(sampled.tokenizer, reference.encoder.tokenizer, responses):
        logger.warning(f"policy {other}: its tokens are not those of {name}, so there is no KL between the two")
        return {}
    asked = [replace(r, prompt_ids=reference.encoder.encode_prompt(r.example.prompt)[0]) for r in responses]
    if any(ours.prompt_ids != given.prompt_ids for ours, given in zip(asked, responses, strict=True)):
        logger.info(
            f"policy {other}: its prompts are written otherwise than those of {name}: KL of each as it reads them"
        )
    theirs = evaluation.response_logps(reference.engine, asked, spoken_packing(reference))
    return evaluation.sampled_kl(sampled.logps, theirs)


def table(results: dict[str, dict[str, float]]) -> str:
    """The headline numbers, one line per policy."""
    held = dict.fromkeys(name for values in results.values() for name in values)
    judged = [name for name in held if fnmatchcase(name, "rewards/*/mean")]
    columns = {name: name.removeprefix("rewards/").removesuffix("/mean") for name in judged}
    columns |= {name: title for name, title in SHOWN.items() if name in held}
    estimates = report_gains.known_tags(held)
    lines = [["policy", *columns.values(), *(report_gains.title(tag, "reward" in held) for tag in estimates)]]
    for policy, values in results.items():
        cells = [f"{values[name]:.4f}" if name in values else "-" for name in columns]
        lines.append([policy, *cells, *(report_gains.short(values, tag) for tag in estimates)])
    widths = [max(10, *(len(line[i]) for line in lines)) for i in range(len(lines[0]))]
    return "\n".join(_line(line, widths) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(cells))
    return "  ".join([first, *others])


if __name__ == "__main__":
    run(main, "evaluate")
