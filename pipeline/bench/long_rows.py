"""Rows with long prompts and static responses, and the model that reads them: what semi-offline RL is measured on.

The text is that of an embedded task, neighbouring rows joined into one until prompt and reference are as long as
wanted. A static response begins as its row's reference does, and goes on with what later rows say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.bench.bed import Bed, even
from pipeline.data import dataset
from pipeline.data.tokenization import Encoder
from pipeline.models import build
from pipeline.records import Example, Item, Row
from pipeline.rl import semi_offline

JOINED = 16  # rows of the task in one row
STEPS = 12  # whose rows all differ; then they come again


@dataclass(frozen=True)
class Sizes:
    """Tokens and weights of what is measured."""

    task: str
    task_size: int  # rows, of which the vocabulary is made
    prompt: int  # tokens of each
    response: int  # tokens of each reference and static response
    rows: int  # of a step, read in one micro-batch
    vocabulary: int
    hidden_size: int
    num_heads: int
    num_layers: Mapping[str, int]  # by shape; twice, of encoder and decoder, for t5


def long_bed(bed: Bed, sizes: Sizes, shape: str) -> Bed:
    """`bed` with a model of that shape, and with rows of these sizes as its singles."""
    settings = bed.settings
    limits = {"max_prompt_length": sizes.prompt, "max_response_length": sizes.response, "keep_of_prompt": "beginning"}
    data = settings.data.model_copy(update={"task": sizes.task, "task_size": sizes.task_size, **limits})
    weights = {"shape": shape, "hidden_size": sizes.hidden_size, "num_layers": sizes.num_layers[shape]}
    weights |= {"num_heads": sizes.num_heads, "vocab_size": sizes.vocabulary}
    scratch = settings.model.scratch.model_copy(update=weights)
    whole = {"batch_size": sizes.rows, "micro_batch_size": sizes.rows, "max_tokens": None}
    parts = {"data": data, "model": settings.model.model_copy(update={"scratch": scratch})}
    settings = settings.model_copy(update={**parts, "train": settings.train.model_copy(update=whole)})
    (rows,) = dataset.splits(data, settings.seed, ["train"])
    encoder = build.encoder_of(settings, settings.model, lambda: dataset.texts(rows, settings.template), mask=True)
    longer = joined(rows)[: sizes.rows * STEPS]
    items = even(dataset.encode(longer, encoder, both_rows).items, sizes.prompt, sizes.response)
    return replace(bed, settings=settings, encoder=encoder, singles=[read_beside(i, encoder) for i in items], pairs=[])


def joined(rows: Sequence[Example]) -> list[Example]:
    """As many rows, each of the text of JOINED neighbours, with what the next ones say as its candidate."""
    ring = [*rows, *rows, *rows]
    made = []
    for i, row in enumerate(rows):
        first, second = ring[i : i + JOINED], ring[i + JOINED : i + 2 * JOINED]
        reference, other = (" ".join(one.completion for one in some) for some in (first, second))
        prompt = "\n".join(one.prompt for one in first)
        made.append(Example(f"{i} {row.id}", prompt, references=(reference,), candidates=(other,)))
    return made


def both_rows(example: Example, encoder: Encoder) -> tuple[Row, ...]:
    """The reference and the candidate."""
    return (
        encoder.encode(example.prompt, dataset.reference_text(example)),
        *semi_offline.static_rows(example, encoder, "worst"),
    )


def read_beside(item: Item, encoder: Encoder) -> Item:
    """`item` with the first row's own text as the reference; the static response is half of it, half the second row."""
    first, second = item.rows
    half = len(first.response_ids) // 2
    static = replace(second, response_ids=first.response_ids[:half] + second.response_ids[half:])
    example = replace(item.example, references=(encoder.decode(first.response_ids),))
    return replace(item, example=example, rows=(first,), statics=(static,))
