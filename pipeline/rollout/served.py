"""Another engine that generates: an OpenAI-compatible server, generation.engine=http://HOST:PORT/v1.

Each response is one request to /completions with a seed of its own, so that it depends on none beside it. Requests are
shared out over the ranks. How a server wants to be asked is found out once, by asking for one token:

ids: prompts are token ids, and so are responses where it gives them (vLLM, SGLang, llama.cpp).
config: prompts are text, and everything else stands in transformers' own words (`transformers serve`).
text: prompts are text, and nothing is said that OpenAI's protocol does not have (TGI and others).

Sources: OpenAI's reference of /v1/completions; vLLM's, of its further fields; transformers/cli/serving/completion.py.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Sequence
from functools import cache
from threading import Event
from typing import Any, Literal, NamedTuple

from transformers import GenerationConfig, PreTrainedTokenizerBase

from pipeline.config.generation import GenerationSettings, ServerSettings
from pipeline.config.reward_spec import key_in
from pipeline.data.sampling import generator
from pipeline.data.tokenization import Encoder
from pipeline.errors import UserError
from pipeline.records import Completion, Example, Request
from pipeline.rewards import http
from pipeline.trainer.group import Ranks

logger = logging.getLogger("tiffin")

PURPOSE = http.Purpose("generation.engine", "generation.server", "one response: is this the address?", "")
LISTED = 8  # names of models in an error
PROBE = "some of the words that a model reads"
Manner = Literal["ids", "config", "text"]
TOLD = {
    "ids": "prompts go out as token ids",
    "config": "prompts go out as text, for it takes no token ids, the rest in the words of transformers",
    "text": "prompts go out as text, for it takes no token ids",
}


class Served(NamedTuple):
    """One that is there, and how it wants to be asked."""

    address: http.Address
    model: str
    manner: Manner
    told: set[str] | None = None  # remarks on one that writes for a training, which are made once; None: on each call


class Wanted(NamedTuple):
    """One response that is wanted: to which request, its number among those to that prompt, its temperature."""

    request: Request
    copy: int
    temperature: float


class Prompt(NamedTuple):
    """A prompt as text, and whether the tokenizer reads that as the tokens that it is."""

    text: str
    as_here: bool


class Choice(NamedTuple):
    """What came back; None is what the server does not say."""

    text: str
    ids: list[int] | None
    end: str | None  # stop | length, of sound servers
    read: int | None = None  # tokens of the prompt
    written: int | None = None


class Said(NamedTuple):
    """What a server wrote; whether it read the prompt as the very tokens that it is here, and drew these very ids."""

    ids: list[int]
    as_here: bool
    exact: bool


def respond(
    ranks: Ranks,
    encoder: Encoder,
    requests: Sequence[Request],
    settings: GenerationSettings,
    config: GenerationConfig,
    seed: int,
    server: Served | None = None,
) -> list[list[Completion]]:
    """The completions of each request, the same on all ranks; `config` says how they are drawn and end.

    Nothing is known of how likely they were. `server`: whom to ask; None: the model that `settings` say. Raises
    UserError, on all ranks, where the server is not there, cannot do what is asked, or does not give one whole response
    to each request.
    """
    refuse_encoder_decoder(settings.engine, encoder)
    if server is None:
        asked = settings.engine, settings.served_model, settings.server, encoder
        server = Served(address_of(settings.engine, settings.server), *ranks.on_main(lambda: found(*asked)))
    if server.manner == "text" and settings.do_sample and settings.top_k > 0:
        raise server.address.error(f"generation.top_k is {settings.top_k}, which it does not take, wanted top_k=0")
    config = copy.deepcopy(config)
    config.top_p, config.top_k = settings.top_p, settings.top_k  # which here are not transformers' to apply
    asks = [Wanted(one, copy, level) for one in requests for copy, level in enumerate(one.temperatures)]

    mine = ranks.agreed(lambda: _said(server, encoder, asks[ranks.rank :: ranks.world], config, seed))
    parts = [iter(part) for part in ranks.gather(mine)]
    answers = [next(parts[i % ranks.world]) for i in range(len(asks))]
    if unlike := sum(not one.as_here for one in answers):
        text = f"{unlike:,} of {len(answers):,} prompts are other tokens to the server than here"
        remark(server, "prompts", f"generation.engine: {text}: it takes them as text alone")
    if server.told is not None and (unlike := sum(not one.exact for one in answers)):
        text = (
            f"{unlike:,} of {len(answers):,} responses may have been drawn as other tokens than those that are learned"
        )
        remark(server, "ids", f"generation.engine: {text}: they came as text, which was tokenised anew")
    results = iter(answers)
    return [[Completion(next(results).ids, None) for _ in one.temperatures] for one in requests]


def remark(server: Served, kind: str, line: str) -> None:
    """A warning; of one that writes for a training only the first of its `kind`."""
    if server.told is not None:
        if kind in server.told:
            return
        server.told.add(kind)
    logger.warning(line)


def refuse_encoder_decoder(engine: str, encoder: Encoder) -> None:
    """Raises UserError for what no server reads."""
    if encoder.encoder_decoder:
        problem = f"{engine} with an encoder-decoder, wanted a causal model"
        raise UserError(f"generation.engine: {problem}: set generation.engine=generate")


def address_of(engine: str, how: ServerSettings) -> http.Address:
    """Where completions are asked for; nothing is sent yet."""
    variable = http.key_variable(engine, how.key_variable)
    key = key_in(variable, os.environ) if variable else ""
    opened = http.opened(f"{engine}/completions", how, key, variable or "generation.server.key_variable")
    return opened._replace(purpose=PURPOSE)


@cache
def found(engine: str, served: str | None, how: ServerSettings, encoder: Encoder) -> tuple[str, Manner]:
    """What the server calls its model, and how it wants to be asked: found out, and said, once. Raises UserError."""
    address = address_of(engine, how)
    model = model_of(address._replace(address=f"{engine}/models"), served)
    manner = manner_of(address, model, encoder)
    if manner == "ids":
        check_tokens(address._replace(address=engine.removesuffix("/v1") + "/tokenize"), model, encoder.tokenizer)
    logger.info(f"generation.engine: {engine}: {model} writes the responses; {TOLD[manner]}")
    return model, manner


def model_of(address: http.Address, served: str | None) -> str:
    """The name to ask for: `served`, else that of the only model there."""
    status, answer = http.answered(address)
    if served is not None:
        return served
    try:
        names = [one["id"] for one in json.loads(answer)["data"]]
    except (ValueError, LookupError, TypeError, RecursionError):
        problem = f"it answered {status} and no list of models ({http.first_line(answer)})"
        cure = "does the address end as it should, in /v1? If so, set generation.served_model=, what it calls the model"
        raise address.error(f"{problem}, wanted one: {cure}") from None
    if len(names) != 1:
        problem = f"it has {len(names)} models ({', '.join(map(str, names[:LISTED]))})"
        raise address.error(f"{problem}, wanted one, or its name: set generation.served_model=")
    return str(names[0])


def manner_of(address: http.Address, model: str, encoder: Encoder) -> Manner:
    """The first of the ways to ask that the server takes, tried with one token."""
    ids, refused = encoder.tokenizer(PROBE)["input_ids"], ""
    for manner in ("ids", "config", "text"):
        try:
            answer = http.patiently(address, probe(Served(address, model, manner), encoder), Event())
        except http.NotTakenError as error:
            refused = str(error)
            continue
        choice = _choice(address, answer)
        one = choice.written == 1 or (manner != "config" and choice.written is None)
        if one and (manner != "ids" or choice.read in (None, len(ids))):
            return manner
        refused = f"asked for one token, it read {choice.read} and wrote {choice.written}, wanted {len(ids)} and 1"
        refused = str(address.error(f"{refused}: does it serve this model?"))
    raise UserError(refused)


def probe(server: Served, encoder: Encoder) -> bytes:
    """A request for one token."""
    config = GenerationConfig(max_new_tokens=1, do_sample=False, eos_token_id=[encoder.eos_id], pad_token_id=0)
    config.top_k, config.top_p = 0, 1.0
    ids = tuple(encoder.tokenizer(PROBE)["input_ids"])
    content = body(server, Wanted(Request(Example("", PROBE), ids, (1.0,)), 0, 1.0), PROBE, config, 0)
    if server.manner == "config":
        content.pop("max_tokens")  # whoever does not read the configuration writes on
    return json.dumps(content).encode("ascii")


def check_tokens(address: http.Address, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError where the server says that it reads a text as other tokens; not all of them say anything."""
    asked = {"model": model, "prompt": PROBE, "content": PROBE, "add_special_tokens": False}
    status, answer = http.answered(address, json.dumps(asked).encode("ascii"))
    try:
        theirs = json.loads(answer)["tokens"] if status == 200 else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return
    ours = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    if isinstance(theirs, list) and all(isinstance(one, int) for one in theirs) and theirs != ours:
        problem = f"it reads {PROBE!r} as the tokens {theirs}, wanted {ours}"
        raise address.error(f"{problem}, as the policy here does: serve that model, or name it in policy=")


def sent(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Prompt:
    """The text that a server's tokenizer, which puts its BOS before it, should read as `ids`."""
    whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    texts = (whole, whole.removeprefix(tokenizer.bos_token or ""))
    fit = next((text for text in texts if list(tokenizer(text)["input_ids"]) == list(ids)), None)
    return Prompt(texts[-1] if fit is None else fit, fit is not None)


def body(server: Served, ask: Wanted, text: str, config: GenerationConfig, seed: int) -> dict[str, Any]:
    """One request, in the server's manner. Nothing is left to what its model's own configuration says."""
    sampled = config.do_sample
    own = generator("response", seed, (ask.request.example.id, ask.request.prompt_ids, ask.request.first + ask.copy))
    content = {"model": server.model, "max_tokens": config.max_new_tokens, "seed": own.initial_seed() % 2**31}
    content["temperature"] = ask.temperature if sampled else 0.0
    banned = config.suppress_tokens or []
    if server.manner == "config":
        how = {"max_new_tokens": config.max_new_tokens, "do_sample": sampled, "eos_token_id": config.eos_token_id}
        how |= {"pad_token_id": config.pad_token_id, "suppress_tokens": banned or None}
        how |= {"temperature": ask.temperature, "top_p": config.top_p, "top_k": config.top_k} if sampled else {}
        return content | {"prompt": text, "generation_config": json.dumps(how)}
    content |= {"top_p": config.top_p} if sampled else {}
    content |= {"logit_bias": {str(i): -100 for i in banned}} if banned else {}
    if server.manner == "text":
        return content | {"prompt": text}
    content |= {"top_k": config.top_k or -1, "min_p": 0.0} if sampled else {}
    return content | {
        "prompt": list(ask.request.prompt_ids),
        "stop_token_ids": config.eos_token_id,
        "return_token_ids": True,
        "repetition_penalty": 1.0,
    }


def _said(server: Served, encoder: Encoder, asks: Sequence[Wanted], config: GenerationConfig, seed: int) -> list[Said]:
    """What the server writes to each of `asks`. Tokenizers are not for threads: only requests go out in them."""
    written = server.manner != "ids"
    prompts = [sent(encoder.tokenizer, ask.request.prompt_ids) if written else Prompt("", True) for ask in asks]
    bodies = [body(server, ask, prompt.text, config, seed) for ask, prompt in zip(asks, prompts, strict=True)]

    def answered(one: tuple[Wanted, dict[str, Any]], over: Event) -> Choice:
        choice = _choice(server.address, http.patiently(server.address, json.dumps(one[1]).encode("ascii"), over))
        _check_whole(server, one[0], choice, config.max_new_tokens)
        return choice

    choices = http.at_once(server.address, answered, list(zip(asks, bodies, strict=True)))
    said = []
    for ask, prompt, choice in zip(asks, prompts, choices, strict=True):
        as_text = written or choice.ids is None
        ids = _ids_of(encoder, prompt.text, choice.text) if as_text else choice.ids
        # transformers calls it length, too, where the last token that there was room for is the end, which is no text
        ended = choice.end == "stop" or (server.manner == "config" and choice.written == len(ids) + 1)
        if ended and (not ids or ids[-1] not in config.eos_token_id):
            ids = [*ids, encoder.eos_id]
        if not ids:
            problem = f"row {ask.request.example.id}: it wrote nothing that could be read, and no end"
            raise server.address.error(f"{problem}, wanted a token at least: does it leave special tokens out?")
        one_end = not ended or len(config.eos_token_id) == 1  # else which it was is not said
        exact = not as_text or (one_end and choice.written == len(ids))
        said.append(Said(ids, prompt.as_here and choice.read in (None, len(ask.request.prompt_ids)), exact))
    return said


def _check_whole(server: Served, ask: Wanted, choice: Choice, most: int) -> None:
    """Raises UserError where the server left something out of the prompt, or out of a response of `most` tokens."""
    length, whose = len(ask.request.prompt_ids), f"row {ask.request.example.id}"
    if server.manner == "ids" and choice.read not in (None, length):
        problem = f"it read {choice.read} tokens of a prompt of {length}, wanted all"
        raise server.address.error(f"{whose}: {problem}: raise its context")
    if choice.end not in ("stop", "length"):
        raise server.address.error(f"{whose}: its response ended by {choice.end!r}, wanted stop or length")
    if choice.end == "length" and choice.written is not None and choice.written < most:
        problem = f"its response was cut after {choice.written} tokens, wanted room for {most}"
        raise server.address.error(f"{whose}: {problem}: raise its context, or lower generation.max_new_tokens")


def _choice(address: http.Address, answer: bytes) -> Choice:
    """The only response of an answer. Raises UserError."""
    try:
        whole = json.loads(answer)
        usage = whole.get("usage") or {}
        found = [Choice(one["text"], one.get("token_ids"), one.get("finish_reason")) for one in whole["choices"]]
        counted = {"read": usage.get("prompt_tokens"), "written": usage.get("completion_tokens")}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        wanted = 'wanted {"choices": [{"text": "..."}]}: is this an OpenAI-compatible address?'
        raise address.error(f"its answer is no completion ({http.first_line(answer)}), {wanted}") from None
    if len(found) != 1 or not isinstance(found[0].text, str):
        raise address.error(f"it gave {len(found)} responses to one request, wanted one text")
    return found[0]._replace(**counted)


def _ids_of(encoder: Encoder, prompt: str, text: str) -> list[int]:
    """The ids of a response that came as text, as they follow the prompt."""
    before, whole = (list(encoder.tokenizer(one)["input_ids"]) for one in (prompt, prompt + text))
    if whole[: len(before)] == before:
        return whole[len(before) :]
    return list(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])
