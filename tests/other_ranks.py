"""What test_other_ranks.py runs on two processes: `torchrun --nproc-per-node 2 -m tests.other_ranks FOLDER`.

Both go on with what one process saved in FOLDER, and save what one process goes on with. Rank 0 writes FOLDER/seen.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.data.batching import Packing
from pipeline.models import loading
from pipeline.models.policy import Policy
from pipeline.trainer.engine import Engine
from tests import tiny
from tests.test_loop import Toy

ROWS = tiny.items(9)


class Move(NamedTuple):
    """From which stage to which a training goes, and of what model: an architecture, or adapters in a directory."""

    before: str
    after: str
    precision: str = "fp32"
    kind: str = "llama"


MOVES = (
    Move("zero0", "zero3"),
    Move("zero3", "zero1", kind="adapters"),
    Move("zero2", "zero2", kind="t5"),
    Move("zero0", "zero2", "bf16"),
    Move("zero3", "zero0", "bf16"),
)


def made(move: Move, zero: str, folder: Path, seed: int) -> Engine:
    """An engine around the model that is moved, its trained weights drawn with `seed`."""
    if move.kind != "adapters":
        return tiny.trainer(Policy(tiny.language_model(move.kind, seed), 64), zero, move.precision)
    settings = tiny.settings("sft").model
    lora = settings.lora.model_copy(update={"r": 4})
    settings = settings.model_copy(update={"path": str(folder / "below"), "lora": lora})
    return tiny.trainer(Policy(loading.load_policy(settings, tiny.tokenizer(), seed), 64), zero, move.precision)


def steps(trained: Engine) -> list[float]:
    """Two steps; their gradient norms."""
    packing = Packing(None, 40, trained.module.encoder_decoder, tiny.PAD_ID)
    return [tiny.step(trained, ROWS, drawn, packing) for drawn in (range(7), [8, 1, 8])]


def leave(move: Move, place: Path, folder: Path) -> dict:
    """Save after two steps; the weights then, and two steps later."""
    trained = made(move, move.before, folder, seed=0)
    steps(trained)
    directory = place / "-".join(move) / "step-2"
    trained.ranks.on_main(lambda: directory.mkdir(parents=True))
    trained.save(directory)
    return {"saved": trained.state_dict(), "norms": steps(trained), "weights": trained.state_dict()}


def take(move: Move, place: Path, folder: Path, moves: bool = True) -> dict:
    """The same of what goes on from there, from other first weights; `moves`: otherwise than it was saved."""
    trained = made(move, move.after if moves else move.before, folder, seed=1)
    assert trained.load(place / "-".join(move) / "step-2") == moves
    return {"saved": trained.state_dict(), "norms": steps(trained), "weights": trained.state_dict()}


def main(folder: Path) -> None:
    ranks = tiny.ranks()
    taken = {"-".join(move): take(move, folder / "one", folder) for move in MOVES}
    left = {"-".join(move): leave(move, folder / "two", folder) for move in MOVES}
    adapters = next(move for move in MOVES if move.kind == "adapters")
    stays = {"left": left["-".join(adapters)], "taken": take(adapters, folder / "two", folder, moves=False)}
    stopped = Toy(folder / "moved", zero="zero3", seed=5, dropout=0.0, words={"logging_steps": 4})
    stopped.run()
    if ranks.main:
        torch.save({"taken": taken, "left": left, "stays": stays}, folder / "seen.pt")
    ranks.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
