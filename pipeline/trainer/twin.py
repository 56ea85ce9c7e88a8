"""A second set of modules that computes with the memory of the first, free of the hooks that ZeRO-3 put there."""

from __future__ import annotations

import copy

import torch
from torch import nn


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
