"""Where responses come from: here, from the policy.

One generation gathers ZeRO-3's weights once; ranks share the prompts, and all make the same number of steps. What is
sampled depends on the seed and on the example, never on its batch, its place or the rank (but for beams that sample).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipeline import mask_token
from pipeline.engine import Engine
from pipeline.model_checks import check_positions
from pipeline.models import hugging_face
from pipeline.records import Example, Response, UserError
from pipeline.sampling import generator
from pipeline.settings import GenerationSettings
from pipeline.text import Encoder, pad


def generate(
    engine: Engine, encoder: Encoder, examples: Sequence[Example], settings: GenerationSettings, seed: int
) -> list[Response]:
    """`num_return_sequences` responses per example, those of one example side by side; the same list on all ranks."""
    ranks, size = engine.ranks, settings.batch_size
    prompts = [encoder.encode_prompt(example.prompt)[0] for example in examples]
    order = sorted(range(len(examples)), key=lambda i: len(prompts[i]))  # like lengths together: little padding
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    config = generation_config(settings, encoder)
    lm = hugging_face(engine.module.model)
    config.suppress_tokens = mask_token.silent(encoder.tokenizer, lm) or None  # the dice are thrown after it
    longest = max((len(prompt) for prompt in prompts), default=0)
    check_positions(lm.config, longest, settings.max_new_tokens, whole=False)
    mine: dict[int, list[list[int]]] = {}
    with engine.generating() as module, torch.no_grad(), torch.random.fork_rng(devices=_cuda(engine)):
        for place in range(0, len(batches), ranks.world):
            number = place + ranks.rank
            batch = batches[number] if number < len(batches) else batches[0]  # idle ranks keep in step
            torch.manual_seed(seed * 1_000_003 + number)  # beams that sample know no dice
            throws = dice([(examples[i].id, prompts[i]) for i in batch], settings, seed)
            rows = _generate(module, encoder, [prompts[i] for i in batch], config, throws, engine)
            if number < len(batches):
                mine |= dict(zip(batch, rows, strict=True))
    answers = {i: rows for part in ranks.gather(mine) for i, rows in part.items()}
    return [_response(encoder, examples[i], prompts[i], ids) for i in range(len(examples)) for ids in answers[i]]


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
    step: int = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        warped = self.warpers(ids, scores / self.temperatures.to(scores))
        shares = warped.softmax(-1).double().cumsum(-1)  # (B, V)
        points = self.uniforms[:, self.step, None].to(shares) * shares[:, -1:]
        drawn = torch.searchsorted(shares, points, right=True)  # (B, 1): the first token whose sum exceeds the point
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


def dice(rows: Sequence[tuple[str, tuple[int, ...]]], settings: GenerationSettings, seed: int) -> LogitsProcessorList:
    """Dice for the responses to `rows`, each an example's id and prompt; none without plain sampling.

    The j-th response to a prompt is drawn at the j-th of `temperatures`, cyclically, where these are given.
    """
    if not settings.do_sample or settings.num_beams > 1:
        return LogitsProcessorList()
    copies = range(settings.num_return_sequences)
    throws = [generator("response", seed, (*row, copy)) for row in rows for copy in copies]
    uniforms = torch.stack([torch.rand(settings.max_new_tokens, generator=throw) for throw in throws])
    levels = settings.temperatures or [settings.temperature]
    temperatures = torch.tensor([[levels[copy % len(levels)]] for _ in rows for copy in copies])
    warpers = LogitsProcessorList()
    if settings.top_k > 0:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        warpers.append(TopPLogitsWarper(settings.top_p))
    return LogitsProcessorList([Dice(uniforms, temperatures, warpers)])


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
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    throws: LogitsProcessorList,
    engine: Engine,
) -> list[list[list[int]]]:
    """The response ids, up to and with EOS, of each prompt: one list of `num_return_sequences` rows per prompt."""
    lm = hugging_face(module.model)
    ids, mask = pad(prompts, encoder.pad_id, side="right" if module.encoder_decoder else "left")
    device = engine.ranks.device
    if module.encoder_decoder:
        config.decoder_start_token_id = module.start_id
    with nothing_inherited(lm):
        out = lm.generate(
            input_ids=ids.to(device),
            attention_mask=mask.long().to(device),
            generation_config=config,
            logits_processor=throws,
            synced_gpus=engine.stage == 3 and engine.ranks.world > 1,
        )
    start = 1 if module.encoder_decoder else ids.shape[1]
    rows = [_until_eos(row, encoder.eos_id) for row in out[:, start:].tolist()]
    n = config.num_return_sequences
    return [rows[i * n : (i + 1) * n] for i in range(len(prompts))]


def _until_eos(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos in ids else ids


def _response(encoder: Encoder, example: Example, prompt_ids: tuple[int, ...], ids: list[int]) -> Response:
    return Response(
        example=example,
        prompt_text=encoder.prompt_text(example.prompt),
        text=encoder.decode(ids),
        prompt_ids=prompt_ids,
        response_ids=tuple(ids),
        finished=bool(ids) and ids[-1] == encoder.eos_id,
    )


def _cuda(engine: Engine) -> list[torch.device]:
    return [engine.ranks.device] if engine.ranks.device.type == "cuda" else []
