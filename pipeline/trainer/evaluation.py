"""Numbers of held-out data: losses, rewards and statistics of decoded responses, distance to the start model."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.data.batching import Packing, once
from pipeline.records import Batch, Example, Item, Response, Row, Scores, text_of
from pipeline.trainer.engine import Engine
from pipeline.trainer.metrics import Metrics
from pipeline.trainer.objective import Objective, Output
from pipeline.words import between_blanks


@torch.no_grad()
def held_out_loss(
    engine: Engine,
    objective: Objective,
    items: Sequence[Item],
    packing: Packing,
    seen: Callable[[Batch, Output], None] = lambda batch, output: None,
) -> dict[str, float]:
    """The objective's statistics over all items, as eval/...; the same on every rank.

    `seen` is called with each micro-batch of this rank and what the module says of it.
    """
    engine.train(False)
    metrics = Metrics()
    for batch in once(items, packing, engine.ranks.rank, engine.ranks.world):
        output = objective.ask(engine, batch)
        _, stats = objective.loss(output, batch.to(engine.ranks.device))
        metrics.add({f"eval/{name}": stat for name, stat in stats.items()})
        seen(batch, output)
    return metrics.reduce(engine.ranks.all_sum)


def held_out_ratios(
    engine: Engine, objective: Objective, items: Sequence[Item], packing: Packing
) -> tuple[dict[str, float], Tensor]:
    """As `held_out_loss`; and, of the same forwards, (rows,) float64 ln(policy / reference) of each whole response.

    In nats, the rows of an item one after another; the items carry the reference's ref_logp.
    """
    mine: dict[int, list[float]] = {}

    def note(batch: Batch, logp: Tensor) -> None:
        gaps = torch.where(batch.response_mask, logp.double().cpu() - batch.ref_logp, 0.0).sum(1)  # (B,)
        mine.update({index: gaps[place :: len(batch.items)].tolist() for place, index in enumerate(batch.items)})

    scalars = held_out_loss(engine, objective, items, packing, note)
    merged = {index: gaps for part in engine.ranks.gather(mine) for index, gaps in part.items()}
    return scalars, torch.tensor([gap for i in range(len(items)) for gap in merged[i]], dtype=torch.float64)


def reward_statistics(scores: Scores, texts: Sequence[str]) -> dict[str, float]:
    """reward/* of the weighted sum; rewards/<name>/* of each normalised score, with its correlation with length, and
    rewards/<name>/raw_mean where that is another number.

    A reward's numbers are those of the responses that it judges; of fewer than all, rewards/<name>/judged is the share.
    They are NaN where it judges none; so is a standard error of a single response. There is no reward/* without a sum.
    """
    result = {}
    if scores.total is not None:
        result = {"reward": statistics.fmean(scores.total), "reward_std": statistics.pstdev(scores.total)}
        result["reward_se"] = standard_error(scores.total)
        result["reward_length_correlation"] = length_correlation(scores.total, texts)
    for name in scores.normalised:
        judged = [i for i, value in enumerate(scores.normalised[name]) if value is not None]
        raw, values = ([each[name][i] for i in judged] or [math.nan] for each in (scores.raw, scores.normalised))
        result[f"rewards/{name}/mean"] = statistics.fmean(values)
        result[f"rewards/{name}/std"] = statistics.pstdev(values) if judged else math.nan
        result[f"rewards/{name}/se"] = standard_error(values)
        if scores.raw[name] != scores.normalised[name]:
            result[f"rewards/{name}/raw_mean"] = statistics.fmean(raw)
        result[f"rewards/{name}/length_correlation"] = length_correlation(values, [texts[i] for i in judged])
        if len(judged) < len(texts):
            result[f"rewards/{name}/judged"] = len(judged) / len(texts)
    return result


def standard_error(values: Sequence[float]) -> float:
    """Of their mean; NaN where one value tells of no spread."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def completion_statistics(responses: Sequence[Response]) -> dict[str, float]:
    """completions/*: words and tokens per response, the share cut at the limit, variety, repetition."""
    words = [between_blanks(r.text) for r in responses]
    return {
        "completions/mean_words": statistics.fmean(len(w) for w in words),
        "completions/mean_length": statistics.fmean(len(r.response_ids) for r in responses),
        "completions/clipped_ratio": statistics.fmean(float(not r.finished) for r in responses),
        "completions/distinct_2": distinct(words, 2),
        "completions/repetition": statistics.fmean(repetition(w) for w in words),
    }


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams over all n-grams of all texts, lower-cased; NaN without any."""
    grams = [tuple(w.lower() for w in text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition(words: Sequence[str], n: int = 3) -> float:
    """The share of a text's n-grams that occur in it before; 0 for short texts."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


@torch.no_grad()
def response_logps(engine: Engine, responses: Sequence[Response], packing: Packing) -> list[Tensor]:
    """The log-probability of every token of every response under the engine's policy, in the order given."""
    items = [Item(r.example, (Row(r.prompt_ids, r.response_ids),)) for r in responses]
    engine.train(False)
    mine: dict[int, Tensor] = {}
    for batch in once(items, packing, engine.ranks.rank, engine.ranks.world):
        logp = engine(batch).float().cpu()
        mine |= {index: logp[place][batch.response_mask[place]] for place, index in enumerate(batch.items)}
    merged = {index: row for part in engine.ranks.gather(mine) for index, row in part.items()}
    return [merged[i] for i in range(len(responses))]


def same_tokens(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, responses: Sequence[Response]
) -> bool:
    """Whether the ids of `responses` mean the same to both; tokens that one alone has, as [MASK], may not occur."""
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours == theirs:
        return True
    shared = {index for token, index in ours.items() if theirs.get(token) == index}
    return len(shared) == min(len(ours), len(theirs)) and shared.issuperset(
        i for r in responses for i in r.response_ids
    )


def sampled_kl(policy: Sequence[Tensor], reference: Sequence[Tensor]) -> dict[str, float]:
    """KL(policy, reference) in nats per response, from responses sampled from the policy at temperature 1.

    objective/kl is k3 = sum_t (e^-d - 1 + d), d = logp - ref_logp, which is never negative and has little variance;
    objective/kl_k1 is the plain mean of sum_t d. Both are unbiased per token along sampled prefixes (Schulman 2020).
    """
    gaps = [p.double() - r.double() for p, r in zip(policy, reference, strict=True)]
    k3 = [float((torch.exp(-d) - 1 + d).sum()) for d in gaps]
    k1 = [float(d.sum()) for d in gaps]
    return {
        "objective/kl": statistics.fmean(k3),
        "objective/kl_k1": statistics.fmean(k1),
        "objective/kl_se": standard_error(k3),
    }


def sample_rows(responses: Sequence[Response], scores: Scores | None, count: int, **more: Any) -> list[dict[str, Any]]:
    """The first `count` responses as rows of a sample table, with their rewards where they were judged."""
    rows = [{**more, "id": r.example.id, "prompt": r.prompt_text, "response": r.text} for r in responses[:count]]
    for i, row in enumerate(rows if scores is not None else ()):
        if scores.total is not None:
            row["reward"] = scores.total[i]
        row["rewards"] = {name: values[i] for name, values in scores.normalised.items()}
    return rows


def pair_accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """The share of pairs in the right order; a tie counts one half. NaN without pairs."""
    if not chosen:
        return math.nan
    return statistics.fmean(0.5 if c == r else float(c > r) for c, r in zip(chosen, rejected, strict=True))


def agreement(examples: Sequence[Example], scores: Sequence[float]) -> dict[str, float]:
    """How the scores of single responses follow their annotated rewards: eval/correlation, and eval/accuracy.

    The accuracy is the share of the pairs of responses to one prompt, of different reward, that the scores put in the
    same order; there is none where no prompt has such a pair. The correlation is Pearson's, NaN where all are equal.
    """
    rewards = [example.reward for example in examples]
    groups: defaultdict[object, list[int]] = defaultdict(list)
    for i, example in enumerate(examples):
        groups[example.prompt].append(i)
    ordered = [(i, j) for rows in groups.values() for i in rows for j in rows if rewards[i] > rewards[j]]
    result = {"eval/correlation": correlation(scores, rewards)}
    if ordered:
        result["eval/accuracy"] = pair_accuracy([scores[i] for i, _ in ordered], [scores[j] for _, j in ordered])
        result["eval/pairs"] = float(len(ordered))
    return result


def accuracy_by_source(
    examples: Sequence[Example], chosen: Sequence[float], rejected: Sequence[float]
) -> dict[str, float]:
    """Pair accuracy overall and by source, beside the better of "the longer wins" and "the shorter wins"."""
    words = [tuple(len(between_blanks(text_of(one))) for one in (e.chosen, e.rejected)) for e in examples]
    groups: defaultdict[str, list[int]] = defaultdict(list, {"": list(range(len(examples)))})
    for i, example in enumerate(examples):
        if example.source:
            groups[f"/{example.source}"].append(i)
    result = {}
    for suffix, rows in groups.items():
        longer = pair_accuracy([words[i][0] for i in rows], [words[i][1] for i in rows])
        result[f"eval/accuracy{suffix}"] = pair_accuracy([chosen[i] for i in rows], [rejected[i] for i in rows])
        result[f"eval/length_accuracy{suffix}"] = max(longer, 1.0 - longer)
        result[f"eval/pairs{suffix}"] = float(len(rows))
    return result


def length_correlation(values: Sequence[float], completions: Sequence[str]) -> float:
    """Pearson correlation of the values with the number of words; NaN where one of the two does not vary."""
    return correlation(values, [float(len(between_blanks(text))) for text in completions])


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Pearson's; NaN where one of the two does not vary."""
    if len(set(xs)) < 2 or len(set(ys)) < 2:
        return math.nan
    try:
        return statistics.correlation(xs, ys)
    except statistics.StatisticsError:  # they vary, but by less than a float's square can hold
        return math.nan
