"""Where responses come from: here, from the policy.

One generation gathers ZeRO-3's weights once; ranks share the prompts, and all make the same number of steps. What is
sampled depends on the seed and on the example, never on its batch, its place or the rank (but for beams that sample,
and for the other engine, continuous.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_outputs import BaseModelOutput

from pipeline.algorithms import capability
from pipeline.config.sections import GenerationSettings
from pipeline.data.sampling import generator
from pipeline.data.tokenization import Encoder, pad
from pipeline.errors import UserError
from pipeline.models import mask_token
from pipeline.models.checks import check_positions
from pipeline.models.loading import hugging_face
from pipeline.records import Ask, Example, Response, Said, Seen
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
    asks = [Ask(example, tuple(encoder.encode_prompt(example.prompt)[0]), each) for example in examples]
    return [response for group in answer(engine, encoder, asks, settings, seed) for response in group]


def answer(
    engine: Engine, encoder: Encoder, asks: Sequence[Ask], settings: GenerationSettings, seed: int
) -> list[list[Response]]:
    """The responses to each ask; the same on all ranks. Stage 1 of two-stage sampling: no gradient, no dropout.

    `temperatures` of the asks stand for those of `settings`, whose `num_return_sequences` only counts for beams.
    """
    ranks, size = engine.ranks, settings.batch_size
    order = sorted(range(len(asks)), key=lambda i: len(asks[i].prompt_ids))  # like lengths together: little padding
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    config = generation_config(settings, encoder)
    lm = hugging_face(engine.module.model)
    config.suppress_tokens = mask_token.suppressed_ids(encoder.tokenizer, lm) or None  # before tokens are drawn
    longest = max((len(ask.prompt_ids) for ask in asks), default=0)
    check_positions(lm.config, longest, settings.max_new_tokens, whole=False)
    mine: dict[int, list[Said]] = {}
    with engine.generating() as module, torch.no_grad(), torch.random.fork_rng(devices=_cuda(engine)):
        if settings.engine == "continuous":
            batches, places = [], order[ranks.rank :: ranks.world]
            rows = continuous.answer(module, [asks[i] for i in places], settings, config, seed)
            mine = dict(zip(places, rows, strict=True))
        for place in range(0, len(batches), ranks.world):
            number = place + ranks.rank
            batch = batches[number] if number < len(batches) else batches[0]  # idle ranks keep in step
            torch.manual_seed((seed * 1_000_003 + number) % 2**63)  # beams that sample know no dice
            rows = _generate(module, encoder, [asks[i] for i in batch], settings, config, seed, engine, number)
            if number < len(batches):
                mine |= dict(zip(batch, rows, strict=True))
    answers = {i: rows for part in ranks.gather(mine) for i, rows in part.items()}
    return [[_response(encoder, asks[i], said) for said in answers[i]] for i in range(len(asks))]


def free(settings: GenerationSettings) -> GenerationSettings:
    """`settings` without all that changes the policy's own distribution: plain sampling, one response per prompt."""
    return settings.model_copy(
        update={"do_sample": True, "temperature": 1.0, "temperatures": None, "top_p": 1.0, "top_k": 0}
        | {"num_beams": 1, "length_penalty": 1.0, "early_stopping": False, "no_repeat_ngram_size": 0}
        | {"repetition_penalty": 1.0, "min_new_tokens": 0, "num_return_sequences": 1}
    )


def generation_config(settings: GenerationSettings, encoder: Encoder) -> GenerationConfig:
    """transformers' configuration of `settings`.

    Raises:
        UserError: several responses per prompt, but no way to make them differ.
    """
    n = settings.num_return_sequences
    if n > max(1, settings.num_beams) and not settings.do_sample:
        raise UserError(
            f"generation.num_return_sequences: {n} of {settings.num_beams} beam(s) without sampling, wanted fewer: "
            "set do_sample=true, or raise num_beams"
        )
    ways = {}
    if settings.do_sample:
        ways = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        if settings.num_beams > 1:
            ways = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    if settings.num_beams > 1:
        ways |= {"length_penalty": settings.length_penalty, "early_stopping": settings.early_stopping}
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens,
        do_sample=settings.do_sample,
        num_beams=settings.num_beams,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        repetition_penalty=settings.repetition_penalty,
        num_return_sequences=n,
        pad_token_id=encoder.pad_id,
        eos_token_id=encoder.eos_id,
        bos_token_id=encoder.tokenizer.bos_token_id,
        **ways,
    )


@dataclass
class Dice:
    """Draws each row's next token with that row's own random numbers, so that batch mates change nothing.

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
        sums = shares.cumsum(-1)  # (B, V)
        points = self.uniforms[:, len(self.steps), None].to(sums) * sums[:, -1:]
        drawn = torch.searchsorted(sums, points, right=True)  # (B, 1): the first token whose sum exceeds the point
        entropies = -torch.where(logps > -torch.inf, logps.exp() * logps, 0.0).sum(-1)
        seen = (tempered.gather(1, drawn)[:, 0], entropies, logps.amax(-1).exp(), shares.amax(-1).float())
        self.steps.append(torch.stack(seen, dim=1))
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)

    def seen(self, lengths: Sequence[int], local: int) -> list[Seen]:
        """What was seen of each row, whose responses have `lengths` tokens, in the batch called `local`."""
        steps = torch.stack(self.steps, dim=1).cpu()  # (B, steps, 4)
        return [_seen(row, length, local) for row, length in zip(steps, lengths, strict=True)]


def _seen(steps: Tensor, length: int, local: int) -> Seen:
    logps, entropies, peaks, _ = steps[:length].unbind(1)
    return Seen(
        logps.clone(),
        float(entropies.double().mean()),
        capability.confidence(peaks),
        capability.drop_score(steps[:, 3]),  # every step of the batch, those after this row's end too
        local,
    )


def dice(asks: Sequence[Ask], settings: GenerationSettings, seed: int) -> Dice | None:
    """Dice for the responses to `asks`, row by row; none without plain sampling."""
    if not settings.do_sample or settings.num_beams > 1:
        return None
    throws = [
        generator("response", seed, (ask.example.id, ask.prompt_ids, ask.first + copy))
        for ask in asks
        for copy in range(len(ask.temperatures))
    ]
    uniforms = torch.stack([torch.rand(settings.max_new_tokens, generator=throw) for throw in throws])
    temperatures = torch.tensor([[level] for ask in asks for level in ask.temperatures])
    warpers = LogitsProcessorList()
    if settings.top_k > 0:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        warpers.append(TopPLogitsWarper(settings.top_p))
    return Dice(uniforms, temperatures, warpers)


@contextmanager
def nothing_inherited(lm: PreTrainedModel) -> Iterator[None]:
    """Keep generate() from filling what is not set with the checkpoint's own (forced tokens, forbidden n-grams ...)."""
    own, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = own


def _generate(
    module,
    encoder: Encoder,
    asks: Sequence[Ask],
    settings: GenerationSettings,
    config: GenerationConfig,
    seed: int,
    engine: Engine,
    local: int,
) -> list[list[Said]]:
    """What is said to each ask of the batch called `local`."""
    lm, throws = hugging_face(module.model), dice(asks, settings, seed)
    copies = [len(ask.temperatures) for ask in asks]
    if throws is not None:
        config = copy.deepcopy(config)
        config.num_return_sequences = 1  # each row is one response
    if module.encoder_decoder:
        config.decoder_start_token_id = module.start_id
    inputs = _inputs(module, encoder, asks, copies if throws is not None else [1] * len(asks), engine)
    with nothing_inherited(lm):
        out = lm.generate(
            **inputs,
            generation_config=config,
            logits_processor=LogitsProcessorList([throws] if throws is not None else []),
            synced_gpus=engine.stage == 3 and engine.ranks.world > 1,
        )
    start = 1 if module.encoder_decoder else inputs["attention_mask"].shape[1]
    rows = [_until_eos(row, encoder.eos_id) for row in out[:, start:].tolist()]
    seen = [None] * len(rows) if throws is None else throws.seen([len(ids) for ids in rows], local)
    said = iter(Said(ids, look) for ids, look in zip(rows, seen, strict=True))
    return [[next(said) for _ in range(k)] for k in copies]


def _inputs(
    module, encoder: Encoder, asks: Sequence[Ask], copies: Sequence[int], engine: Engine
) -> dict[str, Tensor | BaseModelOutput]:
    """What generate() reads: each prompt `copies` times over; an encoder has read each of them once."""
    device = engine.ranks.device
    side = "right" if module.encoder_decoder else "left"
    ids, mask = pad([ask.prompt_ids for ask in asks], encoder.pad_id, side=side)
    places = torch.repeat_interleave(torch.tensor(copies))
    ids, mask, places = ids.to(device), mask.long().to(device), places.to(device)
    if not module.encoder_decoder:
        return {"input_ids": ids[places], "attention_mask": mask[places]}
    states = hugging_face(module.model).get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    return {"encoder_outputs": BaseModelOutput(last_hidden_state=states[places]), "attention_mask": mask[places]}


def _until_eos(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos in ids else ids


def _response(encoder: Encoder, ask: Ask, said: Said) -> Response:
    return Response(
        example=ask.example,
        prompt_text=encoder.prompt_text(ask.example.prompt),
        text=encoder.decode(said.ids),
        prompt_ids=ask.prompt_ids,
        response_ids=tuple(said.ids),
        finished=bool(said.ids) and said.ids[-1] == encoder.eos_id,
        seen=said.seen,
    )


def _cuda(engine: Engine) -> list[torch.device]:
    return [engine.ranks.device] if engine.ranks.device.type == "cuda" else []
