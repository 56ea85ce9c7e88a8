"""Where responses come from: here, from the policy.

One generation gathers ZeRO-3's weights once, or each layer's for every token where they do not fit: then all ranks make
the same number of steps. Ranks share the prompts. What is sampled depends on the seed and on the example, never on its
batch, its place or the rank (but for beams that sample). Sampled and greedy responses come from decode.py; beams,
penalties and least lengths are left to transformers' generate().
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from pipeline.config.generation import GenerationSettings
from pipeline.data.tokenization import Encoder, pad
from pipeline.errors import UserError
from pipeline.models import mask_token
from pipeline.models.checks import check_positions
from pipeline.models.loading import hugging_face
from pipeline.models.policy import Policy
from pipeline.models.start_check import nothing_inherited
from pipeline.models.writing import end_ids
from pipeline.records import Completion, Example, Request, Response
from pipeline.rollout import served
from pipeline.rollout.decode import Decoding, Spoken, decode, drops_rows, joins_rows
from pipeline.rollout.drawing import row_sampler
from pipeline.rollout.served import Served
from pipeline.trainer.engine import Engine

PIECES = 4  # that prompts are read in where they are more than one batch: a piece comes when so many rows have gone


def generate(
    engine: Engine,
    encoder: Encoder,
    examples: Sequence[Example],
    settings: GenerationSettings,
    seed: int,
    server: Served | None = None,
) -> list[Response]:
    """`num_return_sequences` responses per example, those of one example side by side; the same list on all ranks.

    The j-th response to a prompt is drawn at the j-th of `temperatures`, cyclically, where these are given. `server` as
    of `respond`.
    """
    levels = settings.temperatures or [settings.temperature]
    each = tuple(levels[copy % len(levels)] for copy in range(settings.num_return_sequences))
    requests = [Request(example, tuple(encoder.encode_prompt(example.prompt)[0]), each) for example in examples]
    groups = respond(engine, encoder, requests, settings, seed, server=server)
    return [response for group in groups for response in group]


def respond(
    engine: Engine,
    encoder: Encoder,
    requests: Sequence[Request],
    settings: GenerationSettings,
    seed: int,
    to_end: bool = False,
    server: Served | None = None,
) -> list[list[Response]]:
    """The responses to each request; the same on all ranks. Stage 1 of two-stage sampling: no gradient, no dropout.

    `temperatures` of the requests stand for those of `settings`, whose `num_return_sequences` only counts for beams.
    `to_end`: every row is drawn for until the longest of its batch ends, which `SampleStats.drop` is of.
    `server`: one that has this policy's weights, where `settings` name a server; None: who is there has them.
    """
    ranks, lm = engine.ranks, hugging_face(engine.module.model)
    config = _whole_config(settings, encoder, engine.module)
    longest = max((len(request.prompt_ids) for request in requests), default=0)
    check_positions(lm, longest, settings.max_new_tokens, whole=False)
    if settings.by_server:
        rows = served.respond(ranks, encoder, requests, settings, config, seed, server)
        both = zip(requests, rows, strict=True)
        return [[_response(encoder, request, one, config.eos_token_id) for one in of] for request, of in both]
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))  # like lengths: little padding
    cuda = [ranks.device] if ranks.device.type == "cuda" else []
    with engine.generating(settings.gather) as module, torch.no_grad(), torch.random.fork_rng(devices=cuda):
        waits = engine.stage == 3 and ranks.world > 1 and module is engine.module  # for the others, at each forward
        how = Decoding(module, config, ranks.device, ranks.any if waits else None)
        mine = _in_batches(how, engine, [(i, requests[i]) for i in order], settings, seed, to_end)
    by_request = {i: rows for part in ranks.gather(mine) for i, rows in part.items()}
    stops = config.eos_token_id
    return [[_response(encoder, request, one, stops) for one in by_request[i]] for i, request in enumerate(requests)]


def _in_batches(
    how: Decoding,
    engine: Engine,
    asked: Sequence[tuple[int, Request]],
    settings: GenerationSettings,
    seed: int,
    to_end: bool,
) -> dict[int, list[Completion]]:
    """This rank's share of the completions, by their numbers; `asked`: numbered requests, short prompts first."""
    rank, world, lm = engine.ranks.rank, engine.ranks.world, hugging_face(how.module.model)
    padded, waits = engine.module.reads_padding, how.on_some_rank is not None
    drops, joins = not to_end and drops_rows(lm, settings), padded and not waits and joins_rows(lm)
    size, plain = settings.batch_size, settings.do_sample and settings.num_beams == 1
    if drops:
        share = max(1, math.ceil(len(asked) / world))  # so that every rank has something to do
        size = math.ceil(size / PIECES) if joins and size < share else min(size, share)
    batches = batches_of([len(request.prompt_ids) for _, request in asked], size, padded)
    numbers = range(rank, math.ceil(len(batches) / world) * world if waits else len(batches), world)

    def begun(number: int) -> Spoken:
        chosen = [asked[place][1] for place in batches[number if number < len(batches) else 0]]  # idle ranks keep step
        return Spoken(how, number, chosen, row_sampler(chosen, settings, seed, how.device) if plain else None)

    if drops and joins:
        most = max((len(request.temperatures) for _, request in asked), default=0) if plain else 1
        done = decode(how, map(begun, numbers), settings.batch_size * most)
    elif drops:
        done = (one for number in numbers for one in decode(how, iter([begun(number)]), 0))
    else:
        done = (_generated(how, begun(number), seed) for number in numbers)
    completed = ((batches[one.number], _completions(how, one)) for one in done if one.number < len(batches))
    return {asked[place][0]: rows for places, each in completed for place, rows in zip(places, each, strict=True)}


def batches_of(lengths: Sequence[int], size: int, padded: bool) -> list[range]:
    """Places of prompts of these ascending lengths that are generated from together; of one, if not `padded`."""
    starts = [0]
    for place, length in enumerate(lengths):
        if place - starts[-1] == size or not (padded or length == lengths[starts[-1]]):
            starts.append(place)
    return [range(*both) for both in pairwise([*starts, len(lengths)])] if lengths else []


def plain_sampling(settings: GenerationSettings) -> GenerationSettings:
    """`settings` without all that changes the policy's own distribution: plain sampling, one response per prompt."""
    return settings.model_copy(
        update={"do_sample": True, "temperature": 1.0, "temperatures": None, "top_p": 1.0, "top_k": 0}
        | {"num_beams": 1, "length_penalty": 1.0, "early_stopping": False, "no_repeat_ngram_size": 0}
        | {"repetition_penalty": 1.0, "min_new_tokens": 0, "num_return_sequences": 1}
    )


def generation_config(settings: GenerationSettings, encoder: Encoder, lm: PreTrainedModel) -> GenerationConfig:
    """transformers' configuration of `settings`; a response ends where those ended that `lm` learned from.

    Raises UserError for several responses per prompt with no way to make them differ.
    """
    n = settings.num_return_sequences
    if n > max(1, settings.num_beams) and not settings.do_sample:
        raise UserError(
            f"generation.num_return_sequences: {n} of {settings.num_beams} beam(s) without sampling, wanted fewer: "
            "set do_sample=true, or raise num_beams"
        )
    names = {"max_new_tokens", "min_new_tokens", "do_sample", "num_beams", "no_repeat_ngram_size", "repetition_penalty"}
    names |= {"length_penalty", "early_stopping"} if settings.num_beams > 1 else set()
    # without beams our own RowSampler narrows and tempers, so transformers must not
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    narrowed = settings.model_dump(include=set(plain)) if settings.num_beams > 1 else plain
    return GenerationConfig(
        **settings.model_dump(include=names),
        **(narrowed if settings.do_sample else {}),
        num_return_sequences=n,
        pad_token_id=encoder.pad_id,
        eos_token_id=end_ids(lm, encoder.stop_ids),
        bos_token_id=encoder.tokenizer.bos_token_id,
    )


def _whole_config(settings: GenerationSettings, encoder: Encoder, module: Policy) -> GenerationConfig:
    """As `generation_config`, with what is never said, how a decoder begins, and one response to each row."""
    lm = hugging_face(module.model)
    config = generation_config(settings, encoder, lm)
    config.suppress_tokens = mask_token.suppressed_ids(encoder.tokenizer, lm) or None  # before tokens are drawn
    config.decoder_start_token_id = next(iter(module.start_ids), None)
    if settings.do_sample and settings.num_beams == 1:
        config.num_return_sequences = 1  # each row is one response, and draws with its own random numbers
    return config


def _completions(how: Decoding, spoken: Spoken) -> list[list[Completion]]:
    """What was said to each request."""
    rows = [_until_end(row, how.config.eos_token_id) for row in spoken.ids.tolist()]
    stats, sampler = [None] * len(rows), spoken.sampler
    if sampler is not None:
        stats = sampler.stats([len(ids) for ids in rows], spoken.number)
    results = iter(map(Completion, rows, stats))
    return [[next(results) for _ in request.temperatures] for request in spoken.requests]


def _generated(how: Decoding, spoken: Spoken, seed: int) -> Spoken:
    """What transformers' generate() says, to the end of the longest row; of beams as many as the configuration asks."""
    lm, inputs = hugging_face(how.module.model), _inputs(how, spoken)
    torch.manual_seed((seed * 1_000_003 + spoken.number) % 2**63)  # for beams that sample
    with nothing_inherited(lm):
        out = lm.generate(
            **inputs,
            generation_config=how.config,
            logits_processor=LogitsProcessorList([] if spoken.sampler is None else [spoken.sampler]),
            synced_gpus=how.on_some_rank is not None,
        )
    read = len(how.module.start_ids) if how.module.encoder_decoder else inputs["attention_mask"].shape[1]
    spoken.ids = out[:, read:]
    return spoken


def _inputs(how: Decoding, spoken: Spoken) -> dict[str, Tensor | BaseModelOutput]:
    """What generate() reads: each prompt once for each of its rows; an encoder has read each of them once."""
    module = how.module
    side = "right" if module.encoder_decoder else "left"
    ids, mask = pad([request.prompt_ids for request in spoken.requests], how.config.pad_token_id, side=side)
    places = torch.repeat_interleave(torch.tensor(spoken.copies)).to(how.device)
    ids, mask = ids.to(how.device), mask.long().to(how.device)
    if not module.encoder_decoder:
        return {"input_ids": ids[places], "attention_mask": mask[places]}
    states = hugging_face(module.model).get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    encoded = {"encoder_outputs": BaseModelOutput(last_hidden_state=states[places]), "attention_mask": mask[places]}
    return encoded | module.begun(len(places))


def _until_end(ids: list[int], stops: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return ids[: end + 1]


def _response(encoder: Encoder, request: Request, completion: Completion, stops: Sequence[int]) -> Response:
    ids = completion.ids
    finished = bool(ids) and ids[-1] in stops
    return Response(
        example=request.example,
        prompt_text=encoder.prompt_text(request.example.prompt),
        text=encoder.decode(ids[:-1] if finished else ids, request.example.prompt),
        prompt_ids=request.prompt_ids,
        response_ids=tuple(ids),
        finished=finished,
        stats=completion.stats,
    )
