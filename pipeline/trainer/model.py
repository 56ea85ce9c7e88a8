"""A model ready to run: its engine, its tokenizer with template and limits, and how its rows become micro-batches."""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.config import together
from pipeline.config.deepspeed import read_ds_config
from pipeline.config.generation import GenerationSettings
from pipeline.config.schema import EvaluateStage, GenerateStage, Masking, RewardStage, RlStage, SftStage, Training
from pipeline.config.sections import ModelSettings, OptimizerSettings, TrainSettings
from pipeline.data import dataset, encoded, encoding, remarks
from pipeline.data.batching import Packing, packing_of
from pipeline.data.encoded import Items
from pipeline.data.masking import Masker
from pipeline.data.tokenization import Encoder
from pipeline.data.vocabulary import token_tables
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.models import attention, build, loading, lora, mask_token, memory, writing
from pipeline.models.policy import Policy, RewardModel
from pipeline.models.start_check import check_end_to_end
from pipeline.models.trained_input import save_input
from pipeline.records import Example, Row
from pipeline.trainer.engine import Engine
from pipeline.trainer.group import Ranks

logger = logging.getLogger("tiffin")


@dataclass(frozen=True)
class Model:
    """What a stage trains or asks. Every rank holds one and makes the same calls."""

    engine: Engine
    encoder: Encoder
    packing: Packing
    saved_type: torch.dtype | None = None  # of all weights on the disk; None: as they are
    generation: GenerationSettings | None = None  # how a policy answers where a stage looks at it, and whoever opens it

    @property
    def ranks(self) -> Ranks:
        return self.engine.ranks

    def export(self, directory: Path, asked: bool = True) -> None:
        """Write weights, tokenizer and how rows are read as a Hugging Face (or PEFT) directory.

        `asked`: the rows have prompts, see `save_input`.
        """
        encoder, lm, kind = self.encoder, self.engine.module.model, self.saved_type
        if self.ranks.main:
            scalar = isinstance(self.engine.module, RewardModel)
            then = partial(save_input, encoder=encoder, asked=asked, scalar=scalar)
            writing.save(directory, lm, self._weights, encoder.tokenizer, then, encoder.stop_ids, kind, self.generation)
        else:
            for wanted in writing.passes(lm):
                deque(self._weights(wanted), maxlen=0)
            lora.name_base(lm, directory)
        self.ranks.barrier()

    def _weights(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
        """As `Engine.weights`, by the names of the model within the module."""
        for name, weight in self.engine.weights(lambda name: wanted(name.removeprefix("model."))):
            yield name.removeprefix("model."), weight


def build_policy(
    settings: SftStage | RlStage,
    ranks: Ranks,
    start: ModelSettings,
    *,
    texts: Callable[[], list[str]] = list,
    mask: bool = False,
    longest: int | None = None,
) -> Model:
    """The policy to train.

    Args:
        start: the model to start from; where it names none, a new one, its vocabulary made from `texts()`.
        mask: the policy reads a mask token.
        longest: tokens of the longest response, where that is not data.max_response_length.
    """
    stage = read_ds_config(settings.train.zero)["zero_optimization"]["stage"]
    together.four_bits(start, settings.train, stage, ranks.device.type != "cpu")
    encoder = build.encoder_of(settings, start, texts, mask)
    say(start, encoder)
    longest = longest or settings.data.max_response_length
    policy = build.policy_module(start, encoder, settings.train, longest, settings.seed, mask)
    memory.warn_where_short(policy.model, settings, ranks.world)
    saved = build.saved_type(settings, start, encoder)
    engine = engine_of(policy, encoder, longest, ranks, settings.train, settings.optimizer)
    packing = packing_for(policy, encoder, settings.train, ranks)
    return Model(engine, encoder, packing, saved, generation_of(settings))


def engine_of(
    policy: Policy,
    encoder: Encoder,
    longest: int,
    ranks: Ranks,
    train: TrainSettings,
    optimizer: OptimizerSettings | None,
) -> Engine:
    """The policy's engine. One that was cut into parts is checked now, see `build.start_check`."""
    engine = Engine(policy, ranks, train, optimizer)
    if policy.late is not None:
        with engine.in_forward():
            ranks.agreed(lambda: build.start_check(policy, encoder, longest))
    return engine


def generation_of(settings: SftStage | RlStage) -> GenerationSettings:
    """How the stage generates where it evaluates: after fine-tuning, as many tokens as responses had."""
    if isinstance(settings, SftStage):
        return settings.generation.model_copy(update={"max_new_tokens": settings.data.max_response_length})
    return settings.generation


def frozen_policy(settings: Training, model: Model, start: ModelSettings, longest: int) -> Engine:
    """The policy that `model` started from, beside it, and only read: without an optimizer."""
    module = build.policy_module(start, model.encoder, settings.train, longest, settings.seed, frozen=True)
    return engine_of(module, model.encoder, longest, model.ranks, settings.train, None)


def build_reward_model(
    settings: RewardStage, ranks: Ranks, start: ModelSettings, texts: Callable[[], list[str]]
) -> Model:
    """The reward model to train; arguments as of `build_policy`."""
    encoder = build.encoder_of(settings, start, texts, scalar=True)
    say(start, encoder)
    scorer = build.reward_module(start, encoder, settings.train, settings.seed)
    memory.warn_where_short(scorer.model, settings, ranks.world)
    saved = build.saved_type(settings, start, encoder)
    engine = Engine(scorer, ranks, settings.train, settings.optimizer)
    if scorer.late is not None:
        longest = encoder.max_prompt_length + encoder.max_response_length
        with engine.in_forward():
            ranks.agreed(lambda: check_end_to_end(scorer, longest))
    return Model(engine, encoder, packing_for(scorer, encoder, settings.train, ranks), saved)


def build_inference(
    settings: EvaluateStage | GenerateStage, ranks: Ranks, policy: ModelSettings, logged: bool = False
) -> Model:
    """A policy that only generates and is read, with `logged` also logged responses; sharded where train.zero says
    stage 3."""
    encoder = build.encoder_of(settings, policy, list)
    say(policy, encoder)
    longest = max(settings.generation.max_new_tokens, settings.data.max_response_length if logged else 0)
    module = build.policy_module(policy, encoder, settings.train, longest, settings.seed, frozen=True)
    train = settings.train.model_copy(update={"batch_size": ranks.world * (settings.train.micro_batch_size or 1)})
    engine = engine_of(module, encoder, longest, ranks, train, None)
    return Model(engine, encoder, packing_for(module, encoder, train, ranks))


def packing_for(module: Policy | RewardModel, encoder: Encoder, train: TrainSettings, ranks: Ranks) -> Packing:
    """The packing that `train` asks for, as `module` reads rows."""
    whole = isinstance(module, RewardModel)
    packing = packing_of(train, ranks.world, module.encoder_decoder, encoder.pad_id, whole)
    if not module.unpadded:
        return packing
    return replace(packing, unpadded=True, prompts_once=attention.shares_prompts(loading.hugging_face(module.model)))


def say(model: ModelSettings, encoder: Encoder) -> None:
    """One line about how `model` reads rows."""
    logger.info(f"{model.path or 'a new model'}: {encoder.described()}")


def masked_packing(model: Model, masking: Masking, seed: int, *, samples: int = 0, spans: bool = False) -> Packing:
    """The model's packing, for batches whose responses are partly masked; the arguments are those of `Masker`."""
    tables = token_tables(model.encoder.tokenizer, model.engine.module.vocab_size)
    if masking.span != "token":
        tables.require_words()
    return replace(model.packing, masker=Masker(tables, masking, seed, spans, samples))


def spoken_packing(model: Model) -> Packing:
    """The model's packing, for batches of what it says: probabilities are those that it samples with."""
    module, tokenizer = model.engine.module, model.encoder.tokenizer
    never = mask_token.suppressed_ids(tokenizer, loading.hugging_face(module.model))
    if not never:
        return model.packing
    suppressed = torch.zeros(module.vocab_size, dtype=torch.bool)
    suppressed[never] = True
    return replace(model.packing, suppressed=suppressed)


def encode(
    model: Model,
    directory: Path,
    train: Sequence[Example],
    held_out: Sequence[Example],
    rows_of: Callable[[Example, Encoder], tuple[Row, ...]],
) -> tuple[Items, Items]:
    """Both as items. Says what they come to, shows the first with its tokens, and leaves data.json in `directory`."""
    parts = {"train": train, "validation": held_out}
    learned, tested = (
        encoding.encode(rows, model.encoder, rows_of, f"{directory}/{split}") for split, rows in parts.items()
    )
    if len({repr(one) for one in model.ranks.gather([encoded.content(learned), encoded.content(tested)])}) > 1:
        raise UserError(
            "data: the ranks read different rows, wanted the same: did a file change, or differ by machine?"
        )
    counted = {"train": encoded.counts(learned), "validation": encoded.counts(tested)}
    for split, counts in counted.items():
        logger.info(
            "{}: {rows:,} rows, {tokens:,} tokens ({response_tokens:,} of responses), {cut_prompts:,} prompts and "
            "{cut_responses:,} responses cut".format(split, **counts)
        )
        for line in remarks.of_counts(counts):
            logger.info(f"{split}: {line}")
    limit = f"data.max_response_length={model.encoder.max_response_length}"
    cut, total = counted["train"]["cut_responses"], counted["train"]["responses"]
    dataset.warn_of_cuts(cut, total, limit, "to learn from, which then teach no end")
    logger.info("\n".join(coloured(model.encoder, row) for row in learned[0].rows))
    model.ranks.on_main(lambda: write_json(directory / "data.json", counted))
    return learned, tested


def coloured(encoder: Encoder, row: Row) -> str:
    """One row to read: the prompt, the response's tokens with their boundaries, EOS visible.

    On a terminal the prompt is dim and the response green, unless NO_COLOR is set (https://no-color.org).
    """
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    dim, green, plain = ("\033[2m", "\033[32m", "\033[0m") if colours else ("", "", "")
    pieces = encoder.tokenizer.convert_ids_to_tokens(list(row.response_ids))
    prompt = encoder.tokenizer.decode(list(row.prompt_ids))
    counts = f"{len(row.prompt_ids)} prompt tokens (not learned) + {len(row.response_ids)} response tokens (learned)"
    return f"{dim}{prompt}{plain}{green}{'|'.join(pieces)}{plain}\n{counts}"
