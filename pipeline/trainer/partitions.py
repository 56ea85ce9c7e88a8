"""Where trained weights lie in the flat tensors of DeepSpeed's optimizers, and how other ranks' parts become our own.

An optimizer holds this rank's float32 weights and moments in flat tensors. Which slice of which weight lies where
follows from the number of ranks and the ZeRO stage, so a checkpoint notes it for each rank, beside DeepSpeed's files.
From the notes any number of ranks, under any stage, finds what it holds itself, one slice at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.launch import going_on
from pipeline.trainer.group import Ranks  # before deepspeed, for which it names the accelerator

from deepspeed.ops.adam import DeepSpeedCPUAdam  # isort: skip
from deepspeed.runtime.engine import DeepSpeedEngine  # isort: skip
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer  # isort: skip
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3  # isort: skip
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer  # isort: skip

DIVISIBLE = (torch.optim.AdamW, DeepSpeedCPUAdam)  # whose moments are a number for each weight, and their only state
# of a file of DeepSpeed's, by stage: where its optimizer is, in it the flat weights, and the moments
PLACES = {
    1: ("optimizer_state_dict", "single_partition_of_fp32_groups", "base_optimizer_state"),
    2: ("optimizer_state_dict", "single_partition_of_fp32_groups", "base_optimizer_state"),
    3: ("optimizer_state_dict", "fp32_flat_groups", "optimizer_state_dict"),
}
MODULE_FILE = "mp_rank_00_model_states.pt"  # of the module, and of an optimizer that is not sharded


class Piece(NamedTuple):
    """`length` numbers of the flattened weight `name`, from `start` on: they lie at `offset` of flat tensor `flat`."""

    name: str
    start: int
    length: int
    flat: int
    offset: int


@dataclass(frozen=True)
class Held:
    """What one rank holds: where its pieces lie, the flat float32 weights, and the optimizer's state of each flat."""

    pieces: Sequence[Piece]
    flats: Sequence[Tensor]  # (n,) each
    states: Sequence[Mapping[str, Any]]  # e.g. step (a number), exp_avg and exp_avg_sq (n,); empty before a first step


def note(engine: DeepSpeedEngine, ranks: Ranks) -> dict[str, Any]:
    """What a checkpoint notes of this rank, for JSON; `pieces` is None where its optimizer cannot be cut anew."""
    held = held_by(engine)
    return {
        "world": ranks.world,
        "stage": engine.zero_optimization_stage(),
        "optimizer": type(engine.basic_optimizer).__name__,
        "pieces": None if held is None else [list(piece) for piece in held.pieces],
    }


def noted(directory: Path, rank: int) -> dict[str, Any] | None:
    """What `note` gave when the checkpoint was saved; None of a rank that there was not."""
    file = directory / file_name(rank)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def file_name(rank: int) -> str:
    return going_on.PIECES.format(rank)


def held_by(engine: DeepSpeedEngine) -> Held | None:
    """What this rank's optimizer holds, none of it copied; None where we do not know how that lies."""
    optimizer, names = engine.optimizer, {id(p): name for name, p in engine.module.named_parameters()}
    if not isinstance(engine.basic_optimizer, DIVISIBLE):
        return None
    state = engine.basic_optimizer.state
    if optimizer is engine.basic_optimizer:
        flats = [p for group in optimizer.param_groups for p in group["params"]]
        pieces = [Piece(names[id(p)], 0, p.numel(), i, 0) for i, p in enumerate(flats)]
    elif type(optimizer) is FP16_UnfusedOptimizer:
        flats = [p for group in optimizer.fp32_groups for p in group]
        trained = [p for group in optimizer.fp16_groups for p in group]
        pieces = [Piece(names[id(p)], 0, p.numel(), i, 0) for i, p in enumerate(trained)]
    elif type(optimizer) is DeepSpeedZeroOptimizer and not optimizer.round_robin_gradients:
        flats = optimizer.single_partition_of_fp32_groups
        pieces = list(_pieces_of_stage_1_and_2(optimizer, names))
    elif type(optimizer) is DeepSpeedZeroOptimizer_Stage3 and not optimizer.swap_optimizer:
        flats = optimizer.fp32_partitioned_groups_flat
        pieces = list(_pieces_of_stage_3(optimizer, names))
    else:
        return None
    return Held(pieces, flats, [state.get(flat, {}) for flat in flats])


def _pieces_of_stage_1_and_2(optimizer: DeepSpeedZeroOptimizer, names: Mapping[int, str]) -> Iterator[Piece]:
    """All weights of a group, one after another, are cut into one part per rank."""
    for i, group in enumerate(optimizer.bit16_groups):
        for p in group:
            if (mine := p._hp_mapping) is not None:
                of_weight, of_flat = mine.lp_fragment_address, mine.hp_fragment_address
                yield Piece(names[id(p)], of_weight.start, of_weight.numel, i, of_flat.start)


def _pieces_of_stage_3(optimizer: DeepSpeedZeroOptimizer_Stage3, names: Mapping[int, str]) -> Iterator[Piece]:
    """Each weight is cut into one part per rank, all of one length; the last ones may be padding in part or whole."""
    for i, group in enumerate(optimizer.fp16_groups):
        offset = 0
        for p in group:
            size = p.partition_numel()
            start = optimizer._get_param_partition_rank(p) * size
            if (length := min(size, p.ds_numel - start)) > 0:
                yield Piece(names[id(p)], start, length, i, offset)
            offset += size


def take_over(engine: DeepSpeedEngine, directory: Path) -> None:
    """Fill this rank's weights and optimizer from a checkpoint that other ranks wrote, or another ZeRO stage.

    The files are memory-mapped, and read one slice at a time. Raises UserError where an optimizer cannot be cut anew.
    """
    own, saved = held_by(engine), noted(directory, 0)
    if own is None or saved["pieces"] is None:
        raise UserError(
            f"{directory}: was saved by {saved['world']} processes under ZeRO stage {saved['stage']}, and the state of "
            f"the optimizer ({saved['optimizer']}) cannot be cut anew: resume with gpus={saved['world']} and the "
            "train.zero of that time"
        )
    count = 1 if saved["stage"] == 0 else saved["world"]  # without sharding each rank holds everything
    files = [_optimizer_file(directory, saved["stage"], rank) for rank in range(count)]
    others = [part_of(noted(directory, rank), files[rank]) for rank in range(count)]
    states = fill(own, others)
    for flat, state in zip(own.flats, states, strict=True):
        if state:
            engine.basic_optimizer.state[flat] = _for(engine.basic_optimizer, flat, state)
    if 0 not in (saved["stage"], engine.zero_optimization_stage()):  # under fp16 the scale of the loss
        theirs = files[0]["optimizer_state_dict"]
        engine.optimizer.loss_scaler = theirs["loss_scaler"]
        engine.optimizer.dynamic_loss_scale = theirs["dynamic_loss_scale"]
    _restore_buffers(engine.module, directory)
    _spread(engine.optimizer)


def part_of(saved: Mapping[str, Any], file: Mapping[str, Any]) -> Held:
    """What a rank held when it wrote `file`, DeepSpeed's; `saved` is what was noted of it."""
    pieces = [Piece(*piece) for piece in saved["pieces"]]
    if saved["stage"]:
        place, weights, moments = PLACES[saved["stage"]]
        flats, inner = file[place][weights], file[place][moments]
    elif "fp32_groups" in file["optimizer"]:
        flats = [p for group in file["optimizer"]["fp32_groups"] for p in group]
        inner = file["optimizer"]["optimizer_state_dict"]
    else:
        flats, inner = [file["module"][piece.name] for piece in pieces], file["optimizer"]
    return Held(pieces, flats, [inner["state"].get(i, {}) for i in range(len(flats))])


def fill(own: Held, others: Sequence[Held]) -> list[dict[str, Any]]:
    """Copy into `own.flats` what `others` hold of the same weights; the optimizer's states for them, likewise."""
    where: dict[str, list[tuple[Held, Piece]]] = {}
    for part in others:
        for piece in part.pieces:
            where.setdefault(piece.name, []).append((part, piece))
    states: list[dict[str, Any]] = [{} for _ in own.flats]
    with torch.no_grad():
        for piece in own.pieces:
            found = 0
            for part, other in where.get(piece.name, ()):
                found += _copy(own.flats[piece.flat].data, states[piece.flat], piece, part, other)
            assert found == piece.length, f"{piece.name}: {found} of {piece.length} numbers are saved"
    return states


def _copy(flat: Tensor, state: dict[str, Any], piece: Piece, part: Held, other: Piece) -> int:
    """Copy what `piece` and `other`, of one weight, have in common; how many numbers that is."""
    start, end = max(piece.start, other.start), min(piece.start + piece.length, other.start + other.length)
    if start >= end:
        return 0
    to = slice(piece.offset + start - piece.start, piece.offset + end - piece.start)
    of = slice(other.offset + start - other.start, other.offset + end - other.start)
    flat.view(-1)[to].copy_(part.flats[other.flat].reshape(-1)[of])
    for key, value in part.states[other.flat].items():
        if not torch.is_tensor(value) or value.dim() == 0:  # steps taken: a weight that no row reached has fewer
            state[key] = max(state.get(key, 0.0), float(value))
            continue
        if key not in state:
            state[key] = torch.zeros_like(flat, dtype=value.dtype)
        state[key].view(-1)[to].copy_(value.reshape(-1)[of])
    return end - start


def _for(optimizer: torch.optim.Optimizer, flat: Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` with its steps as `optimizer` counts them."""
    steps = int(state["step"])
    if isinstance(optimizer, torch.optim.AdamW):
        fused = optimizer.defaults["fused"] or optimizer.defaults["capturable"]
        return {**state, "step": torch.tensor(float(steps), device=flat.device if fused else "cpu")}
    return {**state, "step": steps}


def _optimizer_file(directory: Path, stage: int, rank: int) -> Mapping[str, Any]:
    """DeepSpeed's file of what `rank` held, its tensors on the disk until they are read."""
    pattern = f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" if stage else MODULE_FILE
    return _mapped(directory, pattern)


def _mapped(directory: Path, pattern: str) -> Mapping[str, Any]:
    found = sorted(directory.glob(pattern))
    if len(found) != 1:
        raise UserError(f"{directory}: {len(found)} files {pattern}, wanted one: is the checkpoint whole?")
    return torch.load(found[0], map_location="cpu", mmap=True, weights_only=False)


def _restore_buffers(module: nn.Module, directory: Path) -> None:
    """The saved buffers, which every rank holds whole."""
    whole = (directory / MODULE_FILE).is_file()  # as below stage 3
    saved = _mapped(directory, MODULE_FILE if whole else f"*zero_pp_rank_0_{MODULE_FILE}")["module"]
    for name, buffer in module.named_buffers():
        if name in saved:
            buffer.copy_(saved[name])


@torch.no_grad()
def _spread(optimizer: Any) -> None:
    """Let the weights that the model computes with be those that the optimizer holds in float32."""
    if type(optimizer) is FP16_UnfusedOptimizer:
        for ours, exact in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, flat in zip(ours, exact, strict=True):
                parameter.copy_(flat)
    elif type(optimizer) is DeepSpeedZeroOptimizer:
        optimizer.update_lp_params()
    elif type(optimizer) is DeepSpeedZeroOptimizer_Stage3:
        optimizer.checkpoint_event_prologue()  # small weights, which are kept gathered, are cut again
        for i in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(i)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.checkpoint_event_epilogue()
