"""Whether a server that writes responses says what the policy says that is open here."""

from __future__ import annotations

import logging

from pipeline.config.generation import GenerationSettings
from pipeline.data.tokenization import Encoder
from pipeline.records import Example
from pipeline.rollout.generate import generate, plain_sampling
from pipeline.rollout.served import Served
from pipeline.trainer.engine import Engine

logger = logging.getLogger("tiffin")

TOKENS = 8  # of the one answer that is compared: enough to tell models apart, few for rounding to do so


def compare(
    engine: Engine, encoder: Encoder, example: Example, settings: GenerationSettings, server: Served | None = None
) -> bool:
    """Whether both answer `example` alike, greedily; a word about it where they do not. True without a server."""
    if not settings.by_server:
        return True
    asked = plain_sampling(settings).model_copy(
        update={"do_sample": False, "max_new_tokens": min(TOKENS, settings.max_new_tokens)}
    )
    (theirs,) = generate(engine, encoder, [example], asked, 0, server)
    (ours,) = generate(engine, encoder, [example], asked.model_copy(update={"engine": "generate"}), 0)
    if theirs.text == ours.text:
        return True
    logger.warning(
        f"generation.engine: {settings.engine} begins its likeliest answer to row {example.id} with {theirs.text!r}, "
        f"the policy here with {ours.text!r}: does it serve these weights? (rounding, as of bf16, may do that too)"
    )
    return False
