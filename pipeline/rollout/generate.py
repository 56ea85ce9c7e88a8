"""Where responses come from: here, from the policy.

One generation gathers ZeRO-3's weights once, or each layer's for every token where they do not fit; ranks share the
prompts, and all make the same number of steps. What is sampled depends on the seed and on the example, never on its
batch, its place or the rank (but for beams that sample, and for the other engine, continuous.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper
from transformers.modeling_outputs import BaseModelOutput

from pipeline.algorithms import capability
from pipeline.config.sections import GenerationSettings
from pipeline.data.sampling import generator
from pipeline.data.tokenization import Encoder, pad
from pipeline.errors import UserError
from pipeline.models import mask_token
from pipeline.models.checks import check_positions
from pipeline.models.loading import hugging_face
from pipeline.models.policy import Policy
from pipeline.models.start_check import nothing_inherited
from pipeline.models.writing import end_ids
from pipeline.records import Completion, Example, Request, Response, SampleStats
from pipeline.rollout import continuous
from pipeline.trainer.engine import Engine


def generate(
    engine: Engine, encoder: Encoder, examples: Sequence[Example], settings: GenerationSettings, seed: int
) -> list[Response]:
    """`num_return_sequences` responses per example, those of one example side by side; the same list on all ranks.

    The j-th response to a prompt is drawn at the j-th of `temperatures`, cyclically, where these are given.
    """
    levels = settings.temperatures or [settings.temperature]
    each = tuple(levels[copy % len(levels)] for copy in range(settings.num_return_sequences))
    requests = [Request(example, tuple(encoder.encode_prompt(example.prompt)[0]), each) for example in examples]
    return [response for group in respond(engine, encoder, requests, settings, seed) for response in group]


def respond(
    engine: Engine, encoder: Encoder, requests: Sequence[Request], settings: GenerationSettings, seed: int
) -> list[list[Response]]:
    """The responses to each request; the same on all ranks. Stage 1 of two-stage sampling: no gradient, no dropout.

    `temperatures` of the requests stand for those of `settings`, whose `num_return_sequences` only counts for beams.
    """
    ranks, size = engine.ranks, settings.batch_size
    if settings.engine == "continuous":  # its ranks make differently many forwards: none may wait for another's layers
        settings = settings.model_copy(update={"gather": "whole"})
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))  # like lengths: little padding
    batches = batches_of([len(requests[i].prompt_ids) for i in order], size, engine.module.reads_padding)
    batches = [[order[place] for place in places] for places in batches]
    lm = hugging_face(engine.module.model)
    config = generation_config(settings, encoder, lm)
    config.suppress_tokens = mask_token.suppressed_ids(encoder.tokenizer, lm) or None  # before tokens are drawn
    config.decoder_start_token_id = next(iter(engine.module.start_ids), None)
    if plain := settings.do_sample and settings.num_beams == 1:
        config.num_return_sequences = 1  # each row is one response, and draws with its own random numbers
    longest = max((len(request.prompt_ids) for request in requests), default=0)
    check_positions(lm, longest, settings.max_new_tokens, whole=False)
    cuda = [ranks.device] if ranks.device.type == "cuda" else []
    mine: dict[int, list[Completion]] = {}
    with engine.generating(settings.gather) as module, torch.no_grad(), torch.random.fork_rng(devices=cuda):
        if settings.engine == "continuous":
            batches, places = [], order[ranks.rank :: ranks.world]
            rows = continuous.respond(module, [requests[i] for i in places], settings, config, seed)
            mine = dict(zip(places, rows, strict=True))
        for place in range(0, len(batches), ranks.world):
            number = place + ranks.rank
            batch = batches[number] if number < len(batches) else batches[0]  # idle ranks keep in step
            torch.manual_seed((seed * 1_000_003 + number) % 2**63)  # for beams that sample
            chosen = [requests[i] for i in batch]
            sampler = row_sampler(chosen, settings, seed) if plain else None
            rows = _decoded(engine, module, encoder, chosen, config, sampler, number)
            if number < len(batches):
                mine |= dict(zip(batch, rows, strict=True))
    by_request = {i: rows for part in ranks.gather(mine) for i, rows in part.items()}
    stops = config.eos_token_id
    return [[_response(encoder, request, one, stops) for one in by_request[i]] for i, request in enumerate(requests)]


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


@dataclass
class RowSampler:
    """Draws each row's next token with that row's own random numbers, so that the rest of the batch changes nothing.

    transformers calls it with the scores (B, V) of one step after another; only the drawn token stays possible.
    """

    uniforms: Tensor  # (B, max_new_tokens) in [0, 1)
    temperatures: Tensor  # (B, 1), above 0
    warpers: LogitsProcessorList  # top_k, top_p
    # (B, 4) of each step: the drawn token's log-probability under the tempered policy; entropy in nats and largest
    # probability of the untempered one; largest probability of what was drawn from
    steps: list[Tensor] = field(default_factory=list)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        logps = scores.float().log_softmax(-1)  # of the untempered policy
        plain = not self.warpers and bool((self.temperatures == 1.0).all())
        tempered = logps if plain else (logps / self.temperatures.to(logps)).log_softmax(-1)
        shares = (self.warpers(ids, tempered.clone()).softmax(-1) if self.warpers else tempered.exp()).double()
        # the distribution function is inverted: in float64, in which a row's sum grows with every likely token
        sums = shares.cumsum(-1)  # (B, V)
        points = self.uniforms[:, len(self.steps), None].to(sums) * sums[:, -1:]
        drawn = torch.searchsorted(sums, points, right=True)  # (B, 1): the first token whose sum exceeds the point
        entropies = -torch.where(logps > -torch.inf, logps.exp() * logps, 0.0).sum(-1)
        peaks = logps.amax(-1).exp(), shares.amax(-1).float()
        self.steps.append(torch.stack((tempered.gather(1, drawn)[:, 0], entropies, *peaks), dim=1))
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)

    def stats(self, lengths: Sequence[int], batch: int) -> list[SampleStats]:
        """Of each row, whose responses have `lengths` tokens, in the batch of that number."""
        all_stats = []
        for steps, length in zip(torch.stack(self.steps, dim=1).cpu(), lengths, strict=True):  # (B, steps, 4)
            logps, entropies, peaks, _ = steps[:length].unbind(1)
            drop = capability.drop_score(steps[:, 3])  # every step of the batch, those after this row's end too
            entropy, confidence = float(entropies.double().mean()), capability.confidence(peaks)
            all_stats.append(SampleStats(logps.clone(), entropy, confidence, drop, batch))
        return all_stats


def row_sampler(requests: Sequence[Request], settings: GenerationSettings, seed: int) -> RowSampler:
    """Draws the responses to `requests`, row by row."""
    generators = [
        generator("response", seed, (request.example.id, request.prompt_ids, request.first + copy))
        for request in requests
        for copy in range(len(request.temperatures))
    ]
    uniforms = torch.stack([torch.rand(settings.max_new_tokens, generator=one) for one in generators])
    temperatures = torch.tensor([[level] for request in requests for level in request.temperatures])
    warpers = LogitsProcessorList()
    if settings.top_k > 0:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        warpers.append(TopPLogitsWarper(settings.top_p))
    return RowSampler(uniforms, temperatures, warpers)


def _decoded(
    engine: Engine,
    module: Policy,
    encoder: Encoder,
    requests: Sequence[Request],
    config: GenerationConfig,
    sampler: RowSampler | None,
    batch: int,
) -> list[list[Completion]]:
    """The completions of each request of the batch of that number."""
    lm, copies = hugging_face(module.model), [len(request.temperatures) for request in requests]
    inputs = _inputs(module, encoder, requests, copies if sampler is not None else [1] * len(requests), engine)
    with nothing_inherited(lm):
        out = lm.generate(
            **inputs,
            generation_config=config,
            logits_processor=LogitsProcessorList([] if sampler is None else [sampler]),
            synced_gpus=engine.stage == 3 and engine.ranks.world > 1,
        )
    start = len(module.start_ids) if module.encoder_decoder else inputs["attention_mask"].shape[1]
    rows = [_until_end(row, config.eos_token_id) for row in out[:, start:].tolist()]
    stats = [None] * len(rows) if sampler is None else sampler.stats([len(ids) for ids in rows], batch)
    results = iter(map(Completion, rows, stats))
    return [[next(results) for _ in range(k)] for k in copies]


def _inputs(
    module: Policy, encoder: Encoder, requests: Sequence[Request], copies: Sequence[int], engine: Engine
) -> dict[str, Tensor | BaseModelOutput]:
    """What generate() reads: each prompt `copies` times over; an encoder has read each of them once."""
    device = engine.ranks.device
    side = "right" if module.encoder_decoder else "left"
    ids, mask = pad([request.prompt_ids for request in requests], encoder.pad_id, side=side)
    places = torch.repeat_interleave(torch.tensor(copies)).to(device)
    ids, mask = ids.to(device), mask.long().to(device)
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
