"""Another engine that generates: transformers' continuous batching, where a response's place is taken when it ends.

generate() decodes a batch until its longest response ends; here no step is spent on one that is done. What passes is
token ids and log-probabilities, nothing else, so that a server could stand here as well.

The same seed gives the same responses on the same machine: all are drawn from one stream of random numbers, in the
order in which their turns come. So each depends on which others are in the engine with it, and on the number of
ranks, which responses of generate() do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import transformers
from packaging.version import Version
from transformers import GenerationConfig

from pipeline.config.sections import GenerationSettings
from pipeline.data.sampling import generator
from pipeline.errors import UserError
from pipeline.models.loading import hugging_face
from pipeline.models.policy import Policy
from pipeline.records import Completion, Request, SampleStats

if TYPE_CHECKING:
    from transformers import ContinuousBatchingConfig
    from transformers.generation.continuous_batching import ContinuousBatchingManager

FIRST = "5.20"  # of transformers, whose continuous batching is as it is called here
PAGE = 32  # tokens of one response that are stored together
COLD = 0.5  # read by nobody: every request brings its own temperature
POLL_SECONDS = 1.0  # after which it is checked whether the engine still runs


def check_model(encoder_decoder: bool) -> None:
    """Raises UserError where there is no continuous batching for a model of this kind, or none in transformers."""
    cure = "set generation.engine=generate"
    if encoder_decoder:
        raise UserError(f"generation.engine: continuous with an encoder-decoder, wanted a causal model: {cure}")
    if Version(transformers.__version__) < Version(FIRST):
        raise UserError(
            f"generation.engine: continuous with transformers {transformers.__version__}, wanted {FIRST} or newer: "
            f"install that, or {cure}"
        )


def respond(
    module: Policy, requests: Sequence[Request], settings: GenerationSettings, config: GenerationConfig, seed: int
) -> list[list[Completion]]:
    """The completions of each request, sampled or greedy as `config` says; as many at a time as a batch of prompts has.

    Only the log-probabilities are known of what was sampled. At temperature 1, minus their mean is the entropy without
    bias; at others it is NaN, as confidence is at all. The program's random numbers are used: fork them.
    Raises RuntimeError where the engine failed, with what it says.
    """
    check_model(module.encoder_decoder)
    if not requests:
        return []
    singles = [(request.prompt_ids, level) for request in requests for level in request.temperatures]
    at_once = min(len(singles), settings.batch_size * max(len(request.temperatures) for request in requests))
    stream = generator("continuous", seed, [(request.example.id, request.first) for request in requests]).initial_seed()
    tempered = config.do_sample and any(level != 1.0 for _, level in singles)
    other = {"temperature": COLD} if tempered else {}  # at 1 the requests' own temperatures are refused
    config = GenerationConfig(**{**config.to_diff_dict(), **other})
    manager = hugging_face(module.model).init_continuous_batching(
        generation_config=config,
        continuous_batching_config=_batching(max(len(ids) for ids, _ in singles), config, at_once, stream),
    )
    results = iter(_run(manager, singles, config, tempered))
    return [[_completion(*next(results), level, config) for level in request.temperatures] for request in requests]


def _batching(longest: int, config: GenerationConfig, at_once: int, seed: int) -> ContinuousBatchingConfig:
    """Memory for `at_once` responses to prompts of the `longest` length, whatever the machine has."""
    from transformers import ContinuousBatchingConfig  # older versions have none, and need none for generate()

    return ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=at_once * (-(-(longest + config.max_new_tokens) // PAGE) + 1),
        max_batch_tokens=max(at_once, longest),
        max_requests_per_batch=at_once,
        return_logprobs=True,
        seed=seed,
        per_request_processors=True,
        auto_switch_to_flash=False,
        allow_block_sharing=False,
    )


def _run(
    manager: ContinuousBatchingManager,
    requests: Sequence[tuple[tuple[int, ...], float]],
    config: GenerationConfig,
    tempered: bool,
) -> list[tuple[list[int], list[float]]]:
    """Ids and log-probabilities of the response to each of `requests`, prompt ids and temperatures."""
    names = [  # all before the start: which of them wait together must not depend on the speed of this loop
        manager.add_request(list(ids), eos_token_id=config.eos_token_id, **({"temperature": level} if tempered else {}))
        for ids, level in requests
    ]
    manager.start()
    try:
        collected = _collected(manager, len(names))
    finally:
        manager.stop()
        manager.destroy()
    return [collected[name] for name in names]


def _collected(manager: ContinuousBatchingManager, count: int) -> dict[str, tuple[list[int], list[float]]]:
    results = {}
    while len(results) < count:
        result = manager.get_result(timeout=POLL_SECONDS)
        if result is None and not manager.is_running():
            raise RuntimeError(f"continuous batching stopped after {len(results)} of {count} responses")
        if result is None:
            continue
        if result.error is not None:
            raise RuntimeError(f"continuous batching: a prompt of {len(result.prompt_ids)} tokens: {result.error}")
        results[result.request_id] = (list(result.generated_tokens), list(result.logprobs))
    return results


def _completion(ids: list[int], logps: list[float], temperature: float, config: GenerationConfig) -> Completion:
    if not config.do_sample:
        return Completion(ids, None)
    entropy = -math.fsum(logps) / len(logps) if temperature == 1.0 else math.nan
    return Completion(ids, SampleStats(torch.tensor(logps), entropy, math.nan, math.nan, 0))
