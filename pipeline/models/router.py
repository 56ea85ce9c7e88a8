"""The loss that keeps a router from sending all tokens to few experts: Switch Transformers, Fedus et al. 2021, eq. 4-6.

As transformers counts it for Mixtral, Qwen-MoE, OLMoE and gpt-oss: over the tokens of all layers together, with the k
experts that each token is sent to, so that it is k where all experts are alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import UserError


def balance_loss(logits: Sequence[Tensor], real: Tensor, chosen: int) -> Tensor:
    """() float32: E sum_e f_e P_e, where f_e is how often a token is sent to expert e, P_e its mean probability.

    logits: of each layer (B L, E), or (B, L, E). real: (B, L) bool, True where there is text; without any it is 0.
    chosen: the experts that each token is sent to.
    """
    rows = torch.stack([layer.reshape(-1, layer.shape[-1])[real.reshape(-1)] for layer in logits])  # (layers, N, E)
    probabilities = rows.float().softmax(-1)
    experts = rows.shape[-1]
    sent = torch.nn.functional.one_hot(probabilities.topk(chosen, -1).indices, experts).sum(2)  # (layers, N, E), 0 or 1
    count = max(1, rows.shape[0] * rows.shape[1])
    often, likely = sent.sum((0, 1)) / count, probabilities.sum((0, 1)) / count  # (E,) each
    return experts * (often * likely).sum()


def chosen_experts(lm: PreTrainedModel) -> int:
    """To how many experts `lm` sends each token. Raises UserError where its router's logits are not to be had."""
    named = lm.config.get_text_config().to_dict()
    if lm.config.is_encoder_decoder or "router_aux_loss_coef" not in named or "num_experts_per_tok" not in named:
        problem = f"{type(lm).__name__} has no router, or none that tells what it does"
        raise UserError(f"train.router_aux_loss_coef: {problem}, wanted 0")
    return named["num_experts_per_tok"]


def own_coefficient(lm: PreTrainedModel) -> float:
    """By what the checkpoint itself asks the loss to be weighted; 0 where it asks for none."""
    named = lm.config.get_text_config().to_dict()
    return float(named.get("router_aux_loss_coef") or 0.0) if named.get("output_router_logits") else 0.0
