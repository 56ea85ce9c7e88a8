"""The process group: how ranks find and tell each other, and how DeepSpeed's operators come to be compiled.

The only file that knows torch.distributed.
"""

from __future__ import annotations

import atexit
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pipeline import errors
from pipeline.errors import UserError
from pipeline.launch import extensions, machine
from pipeline.launch.launcher import free_port

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed  # asks for the accelerator when it is imported
import torch.distributed as dist
from deepspeed.ops.op_builder.builder import OpBuilder

logger = logging.getLogger("tiffin")

# DeepSpeed would compile this operator at the first start on CPUs. Its tensor-parallel inference alone calls it: what
# training sends goes through gloo with it and without it.
SHARED_MEMORY = "deepspeed_shm_comm"

JIT_LOAD = OpBuilder.jit_load


@dataclass(frozen=True)
class Ranks:
    """The processes of this run and what they say to each other. Every rank must make every call."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this rank writes the files."""
        return self.rank == 0

    def all_sum(self, value: Tensor) -> Tensor:
        """The elementwise sum over ranks, as a new tensor where `value` lives."""
        total = value.detach().clone().to(self.device)
        dist.all_reduce(total)
        return total.to(value.device)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on some rank."""
        return bool(self.all_sum(torch.tensor(float(flag))))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable `value`, in rank order, on every rank."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """Rank 0's picklable `value`, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        dist.barrier()

    def on_main(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on rank 0, on every rank; a user's error there is raised on every rank."""
        result, error = None, None
        if self.main:
            result, error = _tried(work)
        result, error = self.from_main((result, error))
        if error is not None:
            raise UserError(error)
        return result

    def agreed(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on this rank; a user's error on any rank is raised on every rank."""
        result, error = _tried(work)
        if self.any(error is not None):
            raise UserError(next(one for one in self.gather(error) if one is not None))
        return result


def _tried(work: Callable[[], Any]) -> tuple[Any, str | None]:
    """What `work` returns and None; or None and the line of a user's error."""
    try:
        return work(), None
    except UserError as error:
        return None, str(error)
    except OSError as error:
        mistake = errors.as_user_error(error)
        if mistake is None:
            raise
        return None, str(mistake)


def start(timeout_seconds: int) -> Ranks:
    """Join the process group that the launcher described, or make one of a single process."""
    alone = {} if "RANK" in os.environ else {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if alone:
        alone["MASTER_PORT"] = str(free_port())
        os.environ.update(alone, LOCAL_RANK="0")  # which DeepSpeed goes on reading
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        deepspeed.ops.__compatible_ops__[SHARED_MEMORY] = False
    OpBuilder.jit_load = compile_in_turn
    deepspeed.utils.logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # in DeepSpeed's calls
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # in peft's calls
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_seconds)
        deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=timeout, verbose=False)
        atexit.register(stop)
    for name in alone:
        del os.environ[name]  # what this process starts is no rank of its group
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def compile_in_turn(builder: OpBuilder, verbose: bool = False) -> ModuleType:
    """An operator of DeepSpeed's, compiled where it is not yet: what `OpBuilder.jit_load` does, safe from its locks.

    DeepSpeed compiles in the middle of a start (for offload its CPU Adam), and nowhere else. Raises UserError where it
    cannot be compiled.
    """
    ours = extensions.PLACE not in os.environ
    folder = extensions.directory(os.environ) / builder.name
    with extensions.turn(folder, ours):
        if not (folder / f"{builder.name}.so").is_file():
            logger.info(f"compiling DeepSpeed's {builder.name} in {folder}: some minutes, once for this environment")
        os.environ[extensions.PLACE] = str(folder.parent)
        try:
            return JIT_LOAD(builder, verbose)
        except (RuntimeError, ImportError, OSError) as error:  # no compiler, no ninja, no CUDA toolkit, a failed build
            problem = f"DeepSpeed's {builder.name} cannot be compiled ({' '.join(str(error).split())[:300]})"
            raise UserError(
                f"train.zero: {problem}, wanted a C++ compiler, or a configuration without offload"
            ) from error
        finally:
            if ours:
                del os.environ[extensions.PLACE]


def free_memory(ranks: Ranks) -> float:
    """Bytes that are free now for this rank: of its GPU, else its share of the machine's."""
    if ranks.device.type == "cuda":
        return float(torch.cuda.mem_get_info(ranks.device)[0])
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
    return machine.free_ram() / beside


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
