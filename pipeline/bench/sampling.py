"""Two-stage sampling against sampling with the graph kept; ended rows dropped or not. All on one model.

One stage: every response is decoded with gradient, keys and values of earlier tokens kept, and the graph of all its
steps lives until the backward pass. Two stages, as on-policy RL does it: generate() without gradient, then one pass
with gradient over the sampled ids. Source of the comparison: Wang et al., "ESRL" (AAAI 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.bench.measure import Goal, Result, alternate, compared, in_turns, speed, timed, times_less
from pipeline.bench.setup import Setup, even, model_of, new_policy, singles, with_settings
from pipeline.config.resolve import resolve
from pipeline.data.batching import collate
from pipeline.models.loading import hugging_face
from pipeline.models.policy import Policy
from pipeline.records import Item, Request, Response, Row
from pipeline.rollout.generate import plain_sampling, respond
from pipeline.trainer.model import Model

LESS = Goal(5.0, at_least=True)
DROPPED = Goal(0.6)
GOAL_LENGTH = 256  # tokens, at which LESS is the goal
MEAN_LENGTH = 32.0  # tokens of responses that end by chance


@dataclass(frozen=True)
class Sizes:
    """A Llama, and what it has to sample."""

    scratch: Mapping[str, int]
    attention: str
    prompt: int  # tokens of each prompt
    lengths: tuple[int, ...]  # tokens of every response; of those that end by chance, the most that one may have
    prompts: int
    copies: int = 1  # responses per prompt


SMALL = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 512}
MIDDLE = {"hidden_size": 256, "num_layers": 4, "num_heads": 4, "vocab_size": 4096}
STAGES = Sizes(SMALL, "eager", 8, (16, 32, 64, 128, GOAL_LENGTH), prompts=4)
ROWS = Sizes(MIDDLE, "sdpa", 32, (128,), prompts=32, copies=8)


@dataclass(frozen=True)
class Sampled:
    """A new model in float32, and the prompts, all of one length, that it answers."""

    setup: Setup
    model: Model
    requests: list[Request]

    @property
    def module(self) -> Policy:
        return self.model.engine.module

    def responses(self, seed: int, to_end: bool = False, **generation: Any) -> list[Response]:
        """Plain sampling, as on-policy RL samples, some settings of the generation set; `to_end`: by generate()."""
        plain = plain_sampling(resolve(["stage=rl", "algo=reinforce"]).settings.generation)
        settings = plain.model_copy(update=generation)
        groups = respond(self.model.engine, self.setup.encoder, self.requests, settings, seed, to_end)
        return [response for group in groups for response in group]


def measure(setup: Setup, stages: Sizes = STAGES, rows: Sizes = ROWS) -> list[Result]:
    small = sampled(setup, stages)
    lines = [line for length in stages.lengths for line in at_length(small, length)]
    return [*lines, by_rows(setup, rows)]


def sampled(setup: Setup, sizes: Sizes) -> Sampled:
    longest = max(sizes.lengths)
    model = {"scratch": {**sizes.scratch, "shape": "llama"}, "attn_implementation": sizes.attention}
    tokens = sizes.prompts * sizes.copies * (sizes.prompt + longest)
    train = {"max_tokens": tokens, "micro_batch_size": None, "precision": "fp32"}
    setup = with_settings(setup, {"model": model, "data": {"max_response_length": longest}, "train": train})
    items = even(singles(setup)[: sizes.prompts], sizes.prompt, longest)
    requests = [Request(item.example, item.rows[0].prompt_ids, (1.0,) * sizes.copies) for item in items]
    return Sampled(setup, model_of(setup, new_policy(setup), trained=False), requests)


def at_length(small: Sampled, length: int) -> list[Result]:
    """Memory and time of both ways at responses of `length` tokens."""

    def learn(way: Callable[[Sampled, int], Tensor], step: int = 0) -> None:
        way(small, length).backward()
        small.module.zero_grad(set_to_none=True)

    two, one = partial(learn, two_stages), partial(learn, one_stage)
    head = f"T = {length}: "
    less = times_less(f"{head}graph kept / two-stage sampling", two, one, LESS if length == GOAL_LENGTH else None)
    rounds = alternate(two, one, small.setup.timing.single)
    return [less, compared(f"{head}two-stage sampling / graph kept, step time", "s", rounds, None)]


def two_stages(small: Sampled, length: int) -> Tensor:
    """() minus the log-probability of sampled responses, from one pass over them."""
    lengths = {"max_new_tokens": length, "min_new_tokens": length}
    responses = small.responses(0, **lengths, batch_size=len(small.requests))
    items = [Item(one.example, (Row(one.prompt_ids, one.response_ids),)) for one in responses]
    batch = collate(items, range(len(items)), small.model.packing).to(small.setup.ranks.device)
    return -small.module(batch)[batch.response_mask].sum()


def one_stage(small: Sampled, length: int) -> Tensor:
    """() the same from the decoding itself, with gradient through every step and its keys and values."""
    lm, device = hugging_face(small.module.model), small.setup.ranks.device
    draws = torch.Generator(device).manual_seed(0)
    ids = torch.tensor([request.prompt_ids for request in small.requests], device=device)
    total, cache = torch.zeros((), device=device), None
    for _ in range(length):
        output = lm(input_ids=ids, past_key_values=cache, use_cache=True)
        logps, cache = output.logits[:, -1].float().log_softmax(-1), output.past_key_values
        ids = torch.multinomial(logps.detach().exp(), 1, generator=draws)  # (B, 1)
        total = total - logps.gather(1, ids).sum()
    return total


def by_rows(setup: Setup, sizes: Sizes) -> Result:
    """Seconds per token where ended rows are dropped and prompts are read once, and of generate(), in one batch."""
    ragged = sampled(setup, sizes)
    ends_by_chance(hugging_face(ragged.module.model), ragged.setup.encoder.eos_id)
    limits = {"max_new_tokens": max(sizes.lengths), "batch_size": sizes.prompts}

    def take(to_end: bool, seed: int) -> tuple[int, float]:
        responses: list[Response] = []
        seconds = timed(lambda: responses.extend(ragged.responses(seed, to_end, **limits)), setup.timing.clock)
        return sum(len(response.response_ids) for response in responses), seconds

    rounds = in_turns(partial(take, False), partial(take, True), setup.timing.single, lambda steps: 1 / speed(steps))
    note = f"{sizes.prompts} prompts x {sizes.copies} responses of 1 to {max(sizes.lengths)} tokens"
    return compared("sampling, ended rows dropped / generate(), time per token", "s", rounds, DROPPED, note)


def ends_by_chance(lm: nn.Module, eos: int) -> None:
    """Make EOS come after MEAN_LENGTH tokens in a new model, to which all tokens are nearly alike."""
    output = lm.get_output_embeddings()
    bias = torch.zeros(output.weight.shape[0], device=output.weight.device)
    bias[eos] = math.log(len(bias) / MEAN_LENGTH)
    output.register_forward_hook(lambda module, given, logits: logits + bias)
