"""Static responses: what semi-offline RL starts from, chosen among a row's candidates and its reference."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.data.dataset import reference_text
from pipeline.data.tokenization import Encoder
from pipeline.errors import UserError
from pipeline.records import Example, Row


def static_rows(example: Example, encoder: Encoder, which: str) -> tuple[Row, ...]:
    """What static RL may start from: the `worst` or the `best` candidate, all of them (`random`), or the `reference`.

    A row without a single word stays. One cut at the limit has no EOS.
    Raises UserError where the example has no candidates, or no reference text.
    """
    return tuple(encoder.encode(example.prompt, text) for text in static_texts(example, which))


def static_texts(example: Example, which: str) -> tuple[str, ...]:
    """The texts of `static_rows`; candidates are taken to stand best first."""
    if which == "reference":
        return (reference_text(example),)
    if not example.candidates:
        raise UserError(
            f"{example.id}: no candidates, wanted some for static={which} to start from: make them with bash run.sh "
            "stage=generate num_return_sequences=8, rank them with stage=score of=generate, or say static=reference"
        )
    chosen = {"worst": example.candidates[-1:], "best": example.candidates[:1], "random": example.candidates}
    return chosen[which]


def wordless(rows: Sequence[Row], encoder: Encoder) -> int:
    """How many of `rows` hold no letter and no digit in what is left of the response."""
    return sum(not any(char.isalnum() for char in encoder.decode(row.response_ids)) for row in rows)
