"""The one DeepSpeed ZeRO wrapper: with group.py and partitions.py the only file that knows deepspeed.

Three decisions have their one owner here: the scale that turns sums into one exact mean, the clipping, the precision.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.config import together
from pipeline.config.sections import OptimizerSettings, TrainSettings
from pipeline.config.validate import one_complaint
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.models.late import Late
from pipeline.models.policy import Policy, RewardModel
from pipeline.records import Batch
from pipeline.trainer import group, partitions
from pipeline.trainer.group import Ranks  # before deepspeed, for which it names the accelerator
from pipeline.trainer.optimizer import NOMINAL_ACCUMULATION, PRECISIONS, client_optimizer, full_config, parameter_groups
from pipeline.trainer.twin import hookless_twin, link_tensors, unlink_tensors

import deepspeed  # isort: skip
from deepspeed.utils import set_z3_leaf_module  # isort: skip

logger = logging.getLogger("tiffin")


class Engine:
    """A module under DeepSpeed: forward, backward of sums, step, generation, checkpoints, export.

    Without `optimizer` it only runs forward (evaluation, generation), sharded if the ZeRO stage is 3.
    """

    def __init__(self, module: nn.Module, ranks: Ranks, train: TrainSettings, optimizer: OptimizerSettings | None):
        config = full_config(train, optimizer)
        self.stage = config["zero_optimization"]["stage"]
        together.fp16_on_gpu(train, ranks.device.type != "cpu")
        if optimizer is not None:
            together.optimizer_fits(optimizer, train, config["zero_optimization"])
        self.ranks, self.module = ranks, module
        self.dtype = PRECISIONS[train.precision]
        self._twin = hookless_twin(module) if self.stage == 3 else None
        self._said_layers = False
        self.updates = 0  # how many times weights were changed or read since the start
        self._half = train.precision != "fp32"
        if optimizer is None and self.stage < 3:
            self._engine = module.to(ranks.device)
            for parameter in module.parameters():  # buffers (rotary frequencies) stay exact, as DeepSpeed leaves them
                if parameter.is_floating_point():  # weights of 4 bits are kept in bytes
                    parameter.data = parameter.data.to(self.dtype)
            return
        if self.stage == 3:
            mark_experts(module)
        client = None
        groups = None
        if optimizer is not None:
            if "optimizer" in config:
                groups = parameter_groups(module, optimizer.weight_decay)
            else:
                client = client_optimizer(module, optimizer)
        if self.stage == 3:
            cut(module, config, self.dtype, ranks.device)  # after its weights were told apart by their shapes
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
        self._engine.backward((total * scale).sum() * self._unscaled())

    def step(self, learning_rate: float) -> float:
        """One clipped optimizer step; the global gradient norm before clipping.

        Where the norm is not finite the weights and the optimizer stay as they are, and the gradient is dropped.
        """
        for part in self._engine.optimizer.param_groups:
            part["lr"] = learning_rate
        norm = None if self.stage else self._plain_norm()
        self.updates += 1
        if norm is not None and not norm.isfinite():  # every other optimizer of DeepSpeed looks for itself
            self._engine.zero_grad()
            return float(norm)
        unscaled = self._unscaled()  # before a step that may change it
        self._engine.step()
        return float(norm if norm is not None else self._engine.get_global_grad_norm()) / unscaled

    def _unscaled(self) -> float:
        """The loss scale, where DeepSpeed divides gradients by it and multiplies no loss: under ZeRO-0, in fp16."""
        return self._engine.optimizer.loss_scale_config.cur_scale if self._half and self.stage == 0 else 1.0

    def _plain_norm(self) -> Tensor | None:
        """The norm under ZeRO-0 in fp32, where DeepSpeed has no optimizer of its own to compute it."""
        if self._half:
            return None
        return nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])

    @contextmanager
    def generating(self, gather: str = "whole") -> Iterator[nn.Module]:
        """The module for many forwards without gradient.

        gather: of ZeRO-3's weights. whole: all, once, on every rank. layers: each layer's as it is read, so that all
        ranks must make the same forwards. auto: whole where that fits into the memory of every rank.
        """
        self.train(False)
        if self._twin is None or gather == "layers" or (gather == "auto" and not self._whole_fits()):
            with self.in_forward():
                yield self.module
            return
        with deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            link_tensors(self._twin, self.module)
            yield self._twin.eval()
            unlink_tensors(self._twin)

    @contextmanager
    def in_forward(self) -> Iterator[None]:
        """Parts of the module may be called by themselves, also those that read another's weight, as peft's tokens do.

        ZeRO-3 gathers what a part reads of another only where it knows to be in the forward of the whole.
        """
        parts = [*self.module.modules()] if self.stage == 3 else []
        for part in parts:
            part._parameters._in_forward = True
        try:
            yield
        finally:
            for part in parts:
                part._parameters._in_forward = False

    def _whole_fits(self) -> bool:
        """Whether all weights fit, on every rank, beside what is in memory now, with a tenth of the rest to spare."""
        needed = self.dtype.itemsize * sum(parameter.ds_numel for parameter in self.module.parameters())
        free = group.free_memory(self.ranks)
        fits = not self.ranks.any(needed > 0.9 * free)
        if not fits and not self._said_layers:
            sizes = f"all weights take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free here"
            logger.info(f"generation.gather: every token gathers layer by layer, since {sizes}")
            self._said_layers = True
        return fits

    def weights(self, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, Tensor]]:
        """The weights and saved buffers of `wanted` names on rank 0, one after the other, tied weights once.

        A weight is whole until the next is asked for, where it lives. Every rank must go through to the end; the others
        get nothing.
        """
        for name, parameter in self.module.named_parameters():
            if wanted(name):
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.stage == 3):
                    if self.ranks.main:
                        yield name, parameter.detach()
        saved = self.module.state_dict().keys() if self.ranks.main else ()
        for name, buffer in self.module.named_buffers():
            if name in saved and wanted(name):
                yield name, buffer.detach()

    def state_dict(self) -> dict[str, Tensor]:
        """All weights and saved buffers, whole, on the CPU of rank 0, tied weights once; empty on the other ranks."""
        return {name: weight.cpu().clone() for name, weight in self.weights()}

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
        write_json(directory / partitions.file_name(self.ranks.rank), partitions.note(self._engine, self.ranks))

    def load(self, directory: Path) -> bool:
        """What `save` wrote, bit for bit, also on other ranks or under another ZeRO stage; whether it is such.

        Raises UserError where such cannot read it.
        """
        self.updates += 1
        if not directory.is_dir():
            raise UserError(f"{directory}: no checkpoint to resume from, wanted one that this run saved")
        before = partitions.noted(directory, self.ranks.rank)
        noted = partitions.noted(directory, 0) is not None  # older versions did not, nor take others' parts over
        other = self.ranks.any(noted and before != partitions.note(self._engine, self.ranks))
        if other:
            partitions.take_over(self._engine, directory)
        else:
            self._load_own(directory)
        return other

    def _load_own(self, directory: Path) -> None:
        """What these ranks wrote under this ZeRO stage."""
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


def cut(module: nn.Module, config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """Leave each rank its part of every weight, in `dtype`; whole is one at a time. Buffers go to `device` whole.

    Weights that are memory-mapped or in another type become whole in memory only then.
    """
    known = isinstance(module, Policy | RewardModel) and module.late is not None
    late = module.late if known else Late(dtype)
    cutter = deepspeed.zero.Init(config_dict_or_path=config)
    for parameter in module.parameters():
        parameter.data = late.whole(parameter).to(dtype)
        cutter._convert_to_zero_parameters([parameter])
    for buffer in module.buffers():  # which DeepSpeed leaves where they are, of a module that comes in parts
        buffer.data = buffer.data.to(device)


def mark_experts(module: nn.Module) -> None:
    """Tell ZeRO-3 to gather each list of experts whole: ranks whose tokens go to other experts would wait for ever."""
    for part in module.modules():
        if any(isinstance(child, nn.ModuleList) and name == "experts" for name, child in part.named_children()):
            set_z3_leaf_module(part, True)
