"""A training goes on with another number of ranks, or under another ZeRO stage: the same steps, to rounding."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models import writing
from pipeline.models.policy import Policy
from pipeline.records import Stat
from pipeline.trainer import partitions
from pipeline.trainer.checkpoint import packed, shared_out
from pipeline.trainer.metrics import Interval, Metrics
from pipeline.trainer.partitions import Held, Piece
from tests import other_ranks, tiny
from tests.other_ranks import MOVES, Move
from tests.test_loop import KilledError, Toy, stop_at

# which numbers go where


def test_pieces_are_put_together_from_whoever_holds_them() -> None:
    """A weight of 6 numbers that two ranks had cut in 4 and 2, of which this one holds those from 3 on, at place 1."""
    one = Held([Piece("w", 0, 4, 0, 0)], [torch.tensor([0.0, 1, 2, 3])], [{"step": 7, "m": torch.ones(4)}])
    two = Held(
        [Piece("v", 0, 1, 0, 0), Piece("w", 4, 2, 0, 1)],
        [torch.tensor([9.0, 4, 5, -1])],  # the last is padding
        [{"step": torch.tensor(7.0), "m": torch.full((4,), 2.0)}],
    )
    own = Held([Piece("w", 3, 3, 0, 1)], [torch.zeros(5)], [{}])
    (state,) = partitions.fill(own, [one, two])
    assert own.flats[0].tolist() == [0, 3, 4, 5, 0]
    assert state["m"].tolist() == [0, 1, 2, 2, 0] and state["step"] == 7
    with pytest.raises(AssertionError, match="w: 1 of 3 numbers are saved"):
        partitions.fill(own, [one])


def test_before_the_first_step_there_are_no_moments() -> None:
    one = Held([Piece("w", 0, 2, 0, 0)], [torch.tensor([1.0, 2.0])], [{}])
    own = Held([Piece("w", 0, 2, 0, 0)], [torch.zeros(2)], [{}])
    assert partitions.fill(own, [one]) == [{}] and own.flats[0].tolist() == [1, 2]


def test_the_open_interval_of_the_log_is_shared_out() -> None:
    """Two ranks saw 3 and 5 tokens of a sum of 30 and 70; three ranks go on, the first of them with all of it."""
    saved = []
    for count, total in ((3, 30.0), (5, 70.0)):
        sums = torch.tensor([count, total, total**2], dtype=torch.float64)
        saved.append(packed(Interval(Metrics({"x": Stat("mean", sums)}), steps=2, seconds=1.5)))
    parts = [shared_out(saved, rank, torch.device("cpu")) for rank in range(3)]
    found = [part.metrics.stats["x"].sums.tolist() for part in parts]
    assert found == [[8, 100, 5800], [0, 0, 0], [0, 0, 0]]
    assert [(part.steps, part.seconds) for part in parts] == [(2, 1.5)] * 3


# trainings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other_ranks")
    below = tiny.language_model("llama")
    writing.save(folder / "below", below, below.state_dict(), tiny.tokenizer())
    return folder


@pytest.fixture(scope="module")
def left(folder: Path) -> dict[str, dict]:
    """What one process saved and was about to do, by move; and a training of one process that was stopped."""
    toy = Toy(folder / "moved", zero="zero2", dropout=0.0, words={"logging_steps": 4}, at_evaluation=stop_at(3))
    with pytest.raises(KilledError):
        toy.run()
    return {"-".join(move): other_ranks.leave(move, folder / "one", folder) for move in MOVES}


@pytest.fixture(scope="module")
def seen(folder: Path, left: dict) -> dict[str, dict]:
    """What two processes made of it, and left."""
    return tiny.on_two_processes("tests.other_ranks", folder)


def alike(move: Move, found: dict, wanted: dict) -> None:
    """The same weights after the move, bit for bit, and the same steps from there, up to the order of sums."""
    assert found["saved"].keys() == wanted["saved"].keys()
    assert all(torch.equal(weight, wanted["saved"][name]) for name, weight in found["saved"].items())
    if move.precision == "fp32":
        tiny.close(found["norms"], wanted["norms"])
        tiny.close(found["weights"], wanted["weights"], of=wanted["weights"])
    else:  # gradients are rounded to 8 bits before they are added
        assert found["norms"] == pytest.approx(wanted["norms"], rel=2e-2)
        for name, weight in found["weights"].items():
            assert torch.allclose(weight.float(), wanted["weights"][name].float(), atol=2**-6), name


@pytest.mark.parametrize("move", MOVES, ids="-".join)
def test_from_one_process_to_two(move: Move, left: dict, seen: dict) -> None:
    alike(move, seen["taken"]["-".join(move)], left["-".join(move)])


@pytest.mark.parametrize("move", MOVES, ids="-".join)
def test_from_two_processes_to_one(move: Move, folder: Path, seen: dict) -> None:
    alike(move, other_ranks.take(move, folder / "two", folder), seen["left"]["-".join(move)])


def test_adapters_go_on_bit_for_bit_where_nothing_moves(seen: dict) -> None:
    left, taken = seen["stays"]["left"], seen["stays"]["taken"]
    assert left["norms"] == taken["norms"]
    assert all(torch.equal(weight, taken["weights"][name]) for name, weight in left["weights"].items())


def test_a_training_goes_on_with_its_log(folder: Path, seen: dict, tmp_path: Path) -> None:
    """Stopped in the middle of a row of the log, on one process under ZeRO-2; then two processes, under ZeRO-3."""
    whole = Toy(tmp_path, dropout=0.0, words={"logging_steps": 4})
    whole.run()
    moved = Toy(folder / "moved")
    assert [row["step"] for row in moved.rows()] == [0, 3, 4, 6]
    for row, wanted in zip(moved.rows(), whole.rows(), strict=True):
        assert row == pytest.approx(wanted, rel=1e-5)
    tiny.close(moved.weights("last"), whole.weights("last"))


def test_a_stage_may_change_alone(tmp_path: Path) -> None:
    whole, toy = Toy(tmp_path / "whole", dropout=0.0), Toy(tmp_path / "moved", dropout=0.0, at_evaluation=stop_at(3))
    whole.run()
    with pytest.raises(KilledError):
        toy.run()
    toy.at_evaluation, toy.zero = (lambda step: None), "zero1"
    toy.run()
    tiny.close(toy.weights("last"), whole.weights("last"))


def test_what_cannot_be_cut_anew_is_told(tmp_path: Path) -> None:
    trained = tiny.trainer(Policy(tiny.language_model("llama"), 64))
    trained.save(tmp_path / "step-0")
    file = tmp_path / "step-0" / partitions.file_name(0)
    file.write_text('{"world": 4, "stage": 2, "optimizer": "Muon", "pieces": null}')
    with pytest.raises(UserError, match=r"4 processes under ZeRO stage 2.*\(Muon\) cannot be cut anew: .*gpus=4"):
        trained.load(tmp_path / "step-0")
    shutil.rmtree(tmp_path / "step-0")
