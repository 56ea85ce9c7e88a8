"""Muon for hidden matrices and AdamW for all else, as one optimizer with one learning rate.

Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; its step as large as one of AdamW's, so that a
rate and a decay that suit AdamW suit it: Liu et al. 2025, https://arxiv.org/abs/2502.16982, section 2.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.config.sections import OptimizerSettings
from pipeline.errors import UserError
from pipeline.models.checks import HEADS
from pipeline.models.loading import hugging_face

BY_MUON = "muon"  # a group's key: whether Muon steps it


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's two optimizers on one list of groups and one state; DeepSpeed takes one optimizer, which must be torch's.

    Each group says under BY_MUON who steps it. `adam` are AdamW's arguments. Raises UserError where torch has no Muon.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float, adam: dict[str, Any]):
        if "Muon" not in vars(torch.optim):
            raise UserError(f"optimizer.name: muon, but torch {torch.__version__} has none, wanted torch 2.9 or later")
        super().__init__(groups, {"lr": adam["lr"]})
        hidden, rest = (self._of(by_muon) for by_muon in (True, False))
        options = {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw"}
        self._muon = torch.optim.Muon(hidden, lr=adam["lr"], **options) if hidden else None
        self._adam = torch.optim.AdamW(rest, fused=True, **adam) if rest else None

    def _of(self, by_muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group[BY_MUON] == by_muon]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for inner, by_muon in ((self._muon, True), (self._adam, False)):
            if inner is not None:  # a checkpoint that is loaded, and DeepSpeed, put others in the place of both
                inner.param_groups, inner.state = self._of(by_muon), self.state
                inner.step()


def muon_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in three groups: hidden matrices, other matrices and vectors, which do not decay.

    Embeddings, heads and fused experts (which have three dimensions) are other matrices.
    """
    apart = _outer(hugging_face(module.model))
    trained = [p for p in module.parameters() if p.requires_grad]
    hidden = [p for p in trained if p.dim() == 2 and id(p) not in apart]
    others = [p for p in trained if p.dim() > 1 and (p.dim() > 2 or id(p) in apart)]
    vectors = [p for p in trained if p.dim() <= 1]
    groups = [
        {"params": hidden, "weight_decay": weight_decay, BY_MUON: True},
        {"params": others, "weight_decay": weight_decay, BY_MUON: False},
        {"params": vectors, "weight_decay": 0.0, BY_MUON: False},
    ]
    return [group for group in groups if group["params"]]


def _outer(lm: PreTrainedModel) -> set[int]:
    """The parameters by which a model reads and speaks: of embeddings, of the output matrix, of scalar heads."""
    outer = [part for part in lm.modules() if isinstance(part, nn.Embedding)]
    outer += [part for name, part in lm.named_children() if name in HEADS]
    outer += [] if lm.get_output_embeddings() is None else [lm.get_output_embeddings()]
    return {id(p) for part in outer for p in part.parameters()}


def muon(module: nn.Module, settings: OptimizerSettings, adam: dict[str, Any]) -> MuonAndAdamW:
    """The optimizer of `optimizer.name: muon`."""
    return MuonAndAdamW(muon_groups(module, settings.weight_decay), settings.muon_momentum, adam)
