"""What an evaluation found of each policy by itself, kept until the evaluation ends.

An evaluation that was stopped goes on at the first policy that it had not ended, with the same numbers: nothing is
sampled, read or judged twice.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.config.schema import EvaluateStage
from pipeline.config.sections import ModelSettings
from pipeline.files import flatten, write_bytes, write_text
from pipeline.launch.going_on import EVALUATED, FREE
from pipeline.models import build
from pipeline.records import Example, Response
from pipeline.trainer.group import Ranks

OWN = ("prompt_text", "text", "prompt_ids", "response_ids", "finished")  # what is a response's own, without its row


class Read(NamedTuple):
    """Responses as a policy reads them: its plain samples, or logged ones, `finished` where all of the text is."""

    responses: list[Response]
    logps: list[Tensor]  # (T,) float32 each
    tokenizer: PreTrainedTokenizerBase


class Alone(NamedTuple):
    """What is known of a policy before it is compared with another."""

    results: dict[str, float]
    rows: list[dict[str, Any]]  # its answers, with their rewards where they were judged
    sampled: Read
    logged: Read | None  # None without logged responses


class Kept:
    """The files of what was found, in the evaluation's directory; rank 0 reads and writes them.

    What a start of other settings or inputs left there is removed.
    """

    def __init__(self, ranks: Ranks, directory: Path, settings: EvaluateStage, inputs: Mapping[str, str]) -> None:
        self.ranks, self.settings, self.folder = ranks, settings, directory / EVALUATED
        counts = {key: v for key, v in flatten(settings.model_dump(), ".").items() if not key.startswith(FREE)}
        ranks.on_main(lambda: self._open({"settings": counts, "inputs": dict(inputs)}))

    def put(self, name: str, found: Alone) -> None:
        """Keep what was found of policy `name`, complete or not at all."""
        self.ranks.on_main(lambda: self._write(self._file(name), found))

    def take(
        self, name: str, model: ModelSettings, prompts: Sequence[Example], logged: Sequence[Example]
    ) -> Alone | None:
        """What an earlier start found of policy `name`, which is `model`; None where there is nothing."""
        kept = self.ranks.on_main(lambda: self._read(self._file(name)))
        if kept is None:
            return None
        tokenizer = build.encoder_of(self.settings, model, list).tokenizer
        read = kept["logged"] and _whole(*kept["logged"], logged, tokenizer)
        return Alone(kept["results"], kept["rows"], _whole(*kept["sampled"], prompts, tokenizer), read)

    def clear(self) -> None:
        """Remove all: the evaluation has ended."""
        self.ranks.on_main(lambda: shutil.rmtree(self.folder, ignore_errors=True))

    def _open(self, made_of: Mapping[str, Any]) -> None:
        mark, text = self.folder / "made_of.json", json.dumps(made_of, sort_keys=True)
        if not mark.is_file() or mark.read_text(encoding="utf-8") != text:
            shutil.rmtree(self.folder, ignore_errors=True)
            write_text(mark, text)

    def _file(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe='')}.pt"

    def _write(self, file: Path, found: Alone) -> None:
        kept = {"results": found.results, "rows": found.rows, "sampled": _plain(found.sampled)}
        torch.save(kept | {"logged": found.logged and _plain(found.logged)}, held := io.BytesIO())
        write_bytes(file, held.getvalue())

    def _read(self, file: Path) -> dict[str, Any] | None:
        return torch.load(file, weights_only=True) if file.is_file() else None


def _plain(read: Read) -> tuple[list[tuple], list[Tensor]]:
    return [tuple(getattr(one, name) for name in OWN) for one in read.responses], read.logps


def _whole(
    own: Sequence[tuple], logps: list[Tensor], rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> Read:
    """What `_plain` took apart; the i-th response is to the i-th row."""
    paired = zip(rows, own, strict=True)
    return Read([Response(row, **dict(zip(OWN, values, strict=True))) for row, values in paired], logps, tokenizer)
