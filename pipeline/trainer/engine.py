"""The one DeepSpeed ZeRO wrapper, and the only file that knows deepspeed and torch.distributed.

Three decisions have their one owner here: the scale that turns sums into one exact mean, the clipping, the precision.
"""

from __future__ import annotations

import atexit
import copy
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline import errors
from pipeline.config import together
from pipeline.config.deepspeed import read_ds_config
from pipeline.config.sections import OptimizerSettings, TrainSettings
from pipeline.config.validate import one_complaint
from pipeline.errors import UserError
from pipeline.launch import extensions
from pipeline.launch.launcher import free_port
from pipeline.records import Batch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed  # asks for the accelerator when it is imported
import torch.distributed as dist
from deepspeed.ops.op_builder.builder import OpBuilder

logger = logging.getLogger("tiffin")

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# DeepSpeed would compile this operator at the first start on CPUs. Its tensor-parallel inference alone calls it: what
# training sends goes through gloo with it and without it.
SHARED_MEMORY = "deepspeed_shm_comm"

# DeepSpeed divides by this number and frees its accumulation buffers when it is 1; the true number of micro-batches
# varies from step to step, so the boundary is set by hand and the division is undone in `backward`.
NOMINAL_ACCUMULATION = 2

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


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def full_config(train: TrainSettings, optimizer: OptimizerSettings | None) -> dict[str, Any]:
    """The whole DeepSpeed configuration: the file's sharding, and ours for batch, clipping, precision, optimizer."""
    config = read_ds_config(train.zero)
    config["train_micro_batch_size_per_gpu"] = 1
    config["gradient_accumulation_steps"] = NOMINAL_ACCUMULATION
    for name in ("bf16", "fp16"):
        config[name] = {**config.get(name, {}), "enabled": train.precision == name}
    config["bf16"]["check_grad_overflow"] = True  # a step with a gradient that is not finite is left out
    if optimizer is None:
        return config
    config["gradient_clipping"] = optimizer.max_grad_norm
    if "offload_optimizer" in config["zero_optimization"]:
        config["optimizer"] = {"type": "AdamW", "params": adam_arguments(optimizer)}
    return config


def adam_arguments(settings: OptimizerSettings) -> dict[str, Any]:
    """AdamW's arguments, but for the learning rate, which every step sets anew."""
    betas = (settings.adam_beta1, settings.adam_beta2)
    return {"lr": 0.0, "betas": betas, "eps": settings.adam_epsilon, "weight_decay": settings.weight_decay}


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: matrices, which decay, and vectors (norms, biases), which do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    vectors = [p for p in trained if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Engine:
    """A module under DeepSpeed: forward, backward of sums, step, generation, checkpoints, export.

    Without `optimizer` it only runs forward (evaluation, generation), sharded if the ZeRO stage is 3.
    """

    def __init__(self, module: nn.Module, ranks: Ranks, train: TrainSettings, optimizer: OptimizerSettings | None):
        config = full_config(train, optimizer)
        self.stage = config["zero_optimization"]["stage"]
        together.fp16_on_gpu(train, ranks.device.type != "cpu")
        if optimizer is not None:
            together.fp16_scaled(train, self.stage)
        self.ranks, self.module = ranks, module
        self.dtype = PRECISIONS[train.precision]
        self._twin = hookless_twin(module) if self.stage == 3 else None
        self._half = train.precision != "fp32"
        if optimizer is None and self.stage < 3:
            self._engine = module.to(ranks.device)
            for parameter in module.parameters():  # buffers (rotary frequencies) stay exact, as DeepSpeed leaves them
                parameter.data = parameter.data.to(self.dtype)
            return
        client = None
        groups = None
        if optimizer is not None:
            groups = parameter_groups(module, optimizer.weight_decay)
            if "optimizer" not in config:
                client = torch.optim.AdamW(groups, fused=True, **adam_arguments(optimizer))
                groups = None
        try:
            self._engine = deepspeed.initialize(
                model=module, optimizer=client, model_parameters=groups, config=config, dist_init_required=False
            )[0]
        except ValidationError as error:
            path, complaint = one_complaint(error)
            raise UserError(f"train.zero: {train.zero}: {'.'.join(path)}: {complaint}") from None
        if optimizer is not None and self.stage == 0:
            # under bf16 DeepSpeed makes these moments by a step on gradients of 0 (at our learning rate of 0, which
            # leaves the weights): the first true step would be Adam's second
            self._engine.optimizer.state.clear()

    def __call__(self, batch: Batch, **options: Any) -> Tensor:
        """The module's output for `batch`, which is moved to this rank's device."""
        return self._engine(batch.to(self.ranks.device), **options)

    def train(self, mode: bool = True) -> None:
        """Dropout on or off."""
        self._engine.train(mode)

    def backward(self, total: Tensor, n_terms: Tensor, last: bool) -> None:
        """Accumulate the gradient of (sum of `total` over ranks and micro-batches) / `n_terms`.

        Args:
            total: () this rank's sum over this micro-batch; or (k,), sums of k means that are added up.
            n_terms: () or (k,) float64, the global counts over all ranks and all micro-batches of the step; where one
                is 0 there is nothing to learn, and its total is 0.
            last: whether this is the step's last micro-batch; ranks must agree.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        # undoes DeepSpeed's two hidden averages: over accumulation steps and over ranks
        scale = (self.ranks.world * NOMINAL_ACCUMULATION / n_terms.clamp(min=1.0)).to(total)
        self._engine.backward((total * scale).sum())

    def step(self, learning_rate: float) -> float:
        """One clipped optimizer step; the global gradient norm before clipping.

        Where the norm is not finite the weights and the optimizer stay as they are, and the gradient is dropped.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = None if self.stage else self._plain_norm()
        if norm is not None and not norm.isfinite():  # every other optimizer of DeepSpeed looks for itself
            self._engine.zero_grad()
            return float(norm)
        self._engine.step()
        return float(norm if norm is not None else self._engine.get_global_grad_norm())

    def _plain_norm(self) -> Tensor | None:
        """The norm under ZeRO-0 in fp32, where DeepSpeed has no optimizer of its own to compute it."""
        if self._half:
            return None
        return nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])

    @contextmanager
    def generating(self) -> Iterator[nn.Module]:
        """The module with whole weights for many forwards: under ZeRO-3 gathered once, not once per token."""
        self.train(False)
        if self._twin is None:
            yield self.module
            return
        with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            link_tensors(self._twin, self.module)
            yield self._twin.eval()
            unlink_tensors(self._twin)

    def state_dict(self) -> dict[str, Tensor]:
        """All weights and saved buffers, whole, on the CPU of rank 0, tied weights once; empty on the other ranks."""
        weights = {}
        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                if self.ranks.main:
                    weights[name] = parameter.detach().cpu().clone()
        if not self.ranks.main:
            return {}
        buffers = {name: buffer.detach().cpu() for name, buffer in self.module.named_buffers()}
        saved = self.module.state_dict().keys()
        return weights | {name: buffer for name, buffer in buffers.items() if name in saved}

    def save(self, directory: Path) -> None:
        """Trained weights, optimizer and loss-scale state, each rank its part, into `directory`.

        Frozen weights, as those below adapters, are where they were read from, and are read from there again.
        """
        place, frozen = str(directory.parent), self._frozen()

        def leave_out(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
            for name in frozen & state.keys():
                del state[name]

        # DeepSpeed's own way to leave them out keeps the second names of tied ones
        hook = self.module.register_state_dict_post_hook(leave_out)
        self._engine.save_checkpoint(
            place, tag=directory.name, save_latest=False, exclude_frozen_parameters=bool(frozen)
        )
        hook.remove()

    def load(self, directory: Path) -> None:
        """What `save` wrote, bit for bit."""
        if not directory.is_dir():
            raise UserError(f"{directory}: no checkpoint to resume from, wanted one that this run saved")
        frozen = self._frozen()

        def need_not(module: nn.Module, found: Any) -> None:
            found.missing_keys[:] = [name for name in found.missing_keys if name not in frozen]

        hook = self.module.register_load_state_dict_post_hook(need_not)  # what is trained must all be there
        self._engine.load_checkpoint(str(directory.parent), tag=directory.name)
        hook.remove()

    def _frozen(self) -> set[str]:
        """The names of weights that are not trained, all names of tied ones."""
        named = self.module.named_parameters(remove_duplicate=False)
        return {name for name, parameter in named if not parameter.requires_grad}


def hookless_twin(module: nn.Module) -> nn.Module:
    """The same modules on the meta device, sharing no tensor and, made before DeepSpeed, free of its hooks."""
    tensors = [*module.parameters(), *module.buffers()]
    memo = {}
    for tensor in tensors:
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


def link_tensors(twin: nn.Module, module: nn.Module) -> None:
    """Let every tensor of `twin` be the memory of its namesake in `module`."""
    for (path, ours), (_, theirs) in zip(twin.named_modules(), module.named_modules(), strict=True):
        for name, parameter in theirs.named_parameters(recurse=False, remove_duplicate=False):
            ours.register_parameter(name, nn.Parameter(parameter.data, requires_grad=False))
        for name, buffer in theirs.named_buffers(recurse=False):
            assert name in dict(ours.named_buffers(recurse=False)), f"{path}: {name} appeared after construction"
            setattr(ours, name, buffer)


def unlink_tensors(twin: nn.Module) -> None:
    """Forget the memory lent by `link_tensors`."""
    for module in twin.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            module.register_parameter(name, nn.Parameter(torch.empty_like(parameter, device="meta"), False))
