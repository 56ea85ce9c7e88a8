"""Two-stage sampling against sampling with the graph kept, on the same weights and prompts; then its two engines.

One stage: every response is decoded with gradient, keys and values of earlier tokens kept, and the graph of all its
steps lives until the backward pass. Two stages, as on-policy RL does it: rollout.answer without gradient, then one pass
with gradient over the sampled ids. Source of the comparison: Wang et al., "ESRL" (AAAI 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.bench.bed import Bed, even, new_policy, packing
from pipeline.bench.measure import Goal, Plan, Result, alternate, compared, peak_megabytes, timed
from pipeline.config.resolve import resolve
from pipeline.config.sections import GenerationSettings
from pipeline.data import dataset
from pipeline.data.batching import collate
from pipeline.models import build
from pipeline.models.loading import hugging_face
from pipeline.records import Ask, Item, Response, Row
from pipeline.rollout import generate
from pipeline.trainer.engine import Engine

LESS = Goal(5.0, at_least=True)
GOAL_LENGTH = 256  # tokens, at which LESS is asked for


class Sizes(NamedTuple):
    """A Llama, and what it is asked for."""

    hidden_size: int
    num_layers: int
    num_heads: int
    vocabulary: int
    attention: str
    prompt: int  # tokens of each prompt
    rows: int  # prompts
    lengths: tuple[int, ...]  # tokens of every response; of the engines: the longest that may be
    copies: int = 1  # responses per prompt
    mean_length: float | None = None  # of the engines: EOS is as likely everywhere that responses have this mean


TOY = Sizes(64, 2, 2, 512, "eager", 8, 4, (16, 32, 64, 128, 256))
RAGGED = Sizes(384, 8, 6, 8192, "sdpa", 32, 8, (96,), copies=4, mean_length=32.0)


def measure(bed: Bed, toy: Sizes = TOY, ragged: Sizes = RAGGED) -> list[Result]:
    found = shaped(bed, toy)
    lines = [line for length in toy.lengths for line in at_length(found, length)]
    return [*lines, *engines(shaped(bed, ragged), ragged)]


@dataclass(frozen=True)
class Ground:
    """A model, its engine, and prompts."""

    bed: Bed
    engine: Engine
    asks: list[Ask]


def shaped(bed: Bed, sizes: Sizes) -> Ground:
    """A new Llama of these sizes in float32, with a vocabulary of its own, and prompts of equal length."""
    settings, longest = bed.settings, max(sizes.lengths)
    weights = {"hidden_size": sizes.hidden_size, "num_layers": sizes.num_layers, "num_heads": sizes.num_heads}
    weights |= {"shape": "llama", "vocab_size": sizes.vocabulary}
    scratch = settings.model.scratch.model_copy(update=weights)
    model = settings.model.model_copy(update={"scratch": scratch, "attn_implementation": sizes.attention})
    data = settings.data.model_copy(update={"max_prompt_length": sizes.prompt, "max_response_length": longest})
    tokens = sizes.rows * sizes.copies * (sizes.prompt + longest)
    train = settings.train.model_copy(update={"max_tokens": tokens, "micro_batch_size": None, "precision": "fp32"})
    settings = settings.model_copy(update={"model": model, "data": data, "train": train})
    (rows,) = dataset.splits(data, settings.seed, ["train"])
    encoder = build.encoder_of(settings, model, lambda: dataset.texts(rows, settings.template))
    items = dataset.encode(dataset.supervised(rows), encoder, dataset.completion_rows).items[: sizes.rows]
    bed = replace(bed, settings=settings, encoder=encoder, singles=even(items, sizes.prompt, longest), pairs=[])
    heats = (1.0,) * sizes.copies
    asks = [Ask(item.example, item.rows[0].prompt_ids, heats) for item in bed.singles]
    policy = new_policy(bed)
    if sizes.mean_length is not None:
        ends_by_chance(hugging_face(policy.model), encoder.eos_id, sizes.mean_length)
        policy = type(policy)(policy.model, tokens)
    return Ground(bed, Engine(policy, bed.ranks, train, None), asks)


def ends_by_chance(lm: nn.Module, eos: int, mean: float) -> None:
    """Give a new model, to which all tokens are nearly alike, a bias that makes EOS come after `mean` tokens."""
    old = lm.get_output_embeddings()
    vocabulary, width = old.weight.shape
    head = nn.Linear(width, vocabulary)
    with torch.no_grad():
        head.weight.copy_(old.weight)
        head.bias.zero_()
        head.bias[eos] = math.log(vocabulary / mean)
    lm.set_output_embeddings(head)


def at_length(ground: Ground, length: int) -> list[Result]:
    """Memory and time of both ways at responses of `length` tokens."""
    clock, rounds = ground.bed.plan.clock, ground.bed.plan.rounds
    ways = {"two": partial(two_stages, ground, length), "one": partial(one_stage, ground, length)}
    saved = {name: saved_megabytes(ground.engine.module, way) for name, way in ways.items()}
    peaks = {name: peak_megabytes(partial(learn, ground, way)) for name, way in ways.items()}
    steps = {name: lambda _, way=way: learn(ground, way) for name, way in ways.items()}
    turns = alternate(steps["two"], steps["one"], Plan(rounds, 1, clock, warm=1))
    sampling = timed(partial(sample, ground, length), clock)
    head, goal = f"T = {length}: ", LESS if length == GOAL_LENGTH else None
    less = {"saved for the backward pass": saved, "peak memory beyond the model's own": peaks}
    found = [
        Result(f"{head}one-stage / two-stage sampling, {what}", "MB", mb["two"], mb["one"], mb["one"] / mb["two"])
        for what, mb in less.items()
    ]
    time = compared(f"{head}two-stage / one-stage sampling, step time", "s", turns, None)
    share = Result(f"{head}sampling / two-stage step", "s", sampling, time.ours, sampling / time.ours)
    return [replace(found[0], goal=goal, note="weights included"), found[1], time, share]


def learn(ground: Ground, way: Callable[[], Tensor]) -> None:
    """The gradient of what `way` gives, and away with it."""
    way().backward()
    ground.engine.module.zero_grad(set_to_none=True)


def sample(ground: Ground, length: int) -> list[list[Response]]:
    """Stage 1, with responses of exactly `length` tokens."""
    settings = spoken_settings().model_copy(
        update={"max_new_tokens": length, "min_new_tokens": length, "batch_size": len(ground.asks)}
    )
    return generate.answer(ground.engine, ground.bed.encoder, ground.asks, settings, seed=0)


def spoken_settings() -> GenerationSettings:
    """Plain sampling, as on-policy RL samples."""
    return generate.free(resolve(["stage=rl", "algo=reinforce"]).settings.generation)


def two_stages(ground: Ground, length: int) -> Tensor:
    """() minus the log-probability of sampled responses, from one pass over them."""
    found = [answer for group in sample(ground, length) for answer in group]
    items = [Item(one.example, (Row(one.prompt_ids, one.response_ids),)) for one in found]
    batch = collate(items, range(len(items)), packing(ground.bed)).to(ground.bed.ranks.device)
    return -ground.engine.module(batch)[batch.response_mask].sum()


def one_stage(ground: Ground, length: int) -> Tensor:
    """() the same from the decoding itself, with gradient through every step and its keys and values."""
    lm = hugging_face(ground.engine.module.model)
    dice = torch.Generator(ground.bed.ranks.device).manual_seed(0)
    ids = torch.tensor([ask.prompt_ids for ask in ground.asks], device=ground.bed.ranks.device)
    total, cache = torch.zeros((), device=ids.device), None
    for _ in range(length):
        said = lm(input_ids=ids, past_key_values=cache, use_cache=True)
        logps, cache = said.logits[:, -1].float().log_softmax(-1), said.past_key_values
        ids = torch.multinomial(logps.detach().exp(), 1, generator=dice)  # (B, 1)
        total = total - logps.gather(1, ids).sum()
    return total


def saved_megabytes(module: nn.Module, work: Callable[[], Tensor]) -> float:
    """What autograd keeps of `work` for its backward pass, and the weights: each piece of memory once."""
    kept = {weight.untyped_storage().data_ptr(): weight.untyped_storage() for weight in module.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        work()
    return sum(storage.nbytes() for storage in kept.values()) / 1e6


def engines(ground: Ground, sizes: Sizes) -> list[Result]:
    """Seconds per sampled token of both engines, in turns; and what generate() spends on responses that are done."""
    size = max(1, sizes.rows // 4)  # several batches, so that continuous batching has somebody to take a place
    plain = spoken_settings().model_copy(update={"max_new_tokens": max(sizes.lengths), "batch_size": size})
    found = {name: Turns(ground, plain.model_copy(update={"engine": name})) for name in ("continuous", "generate")}
    ours, other = found.values()
    rounds = []
    for seed in range(ground.bed.plan.rounds):
        first, second = (ours, other) if seed % 2 else (other, ours)
        first.take(seed)
        second.take(seed)
        rounds.append((ours.seconds_per_token, other.seconds_per_token))
    weights = sum(weight.numel() for weight in ground.engine.module.parameters()) / 1e6
    note = f"Llama of {weights:.0f} M, {size * sizes.copies} of {sizes.rows * sizes.copies} responses at a time"
    time = compared("continuous batching / generate(), time per sampled token", "s", rounds, None, note)
    said = f"mean {sum(other.lengths) / len(other.lengths):.0f} tokens, longest {max(other.lengths)}"
    return [time, Result("generate(): row-steps after a response's end", "", wasted(other.responses), note=said)]


@dataclass
class Turns:
    """One engine at work; what it said last, and how fast."""

    ground: Ground
    settings: GenerationSettings
    responses: Sequence[Response] = ()
    seconds_per_token: float = 0.0

    def take(self, seed: int) -> None:
        groups: list[list[Response]] = []
        parts = self.ground.engine, self.ground.bed.encoder, self.ground.asks, self.settings
        seconds = timed(lambda: groups.extend(generate.answer(*parts, seed)), self.ground.bed.plan.clock)
        self.responses = [response for group in groups for response in group]
        self.seconds_per_token = seconds / sum(self.lengths)

    @property
    def lengths(self) -> list[int]:
        return [len(response.response_ids) for response in self.responses]


def wasted(responses: Sequence[Response]) -> float:
    """The share of a decoded batch's rows times its steps that come after a row's own end; over all batches."""
    batches: dict[int, list[int]] = {}
    for response in responses:
        batches.setdefault(response.seen.batch, []).append(len(response.response_ids))
    steps = sum(len(lengths) * max(lengths) for lengths in batches.values())
    return 1.0 - sum(sum(lengths) for lengths in batches.values()) / steps
