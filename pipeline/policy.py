"""What a model says of a batch: log-probabilities of the responses, states of the prompts, scores of the whole.

Logits are never made for prompts, and never for all response tokens at once: see `functional.token_logps`.
"""

from __future__ import annotations

import math

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.algorithms import functional
from pipeline.models import hugging_face
from pipeline.records import Batch, UserError

CHUNK_ELEMENTS = 1 << 25  # logits alive at a time: 128 MB in float32


class LanguageHead(nn.Module):
    """Hidden states -> logits, with what some architectures do after their output matrix."""

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        config = lm.config.get_text_config()
        named = config.to_dict()
        self.output = lm.get_output_embeddings()
        self.bias = dict(lm.named_buffers()).get("final_logits_bias")  # BART and its kin
        self.before = config.d_model**-0.5 if named.get("scale_decoder_outputs") else 1.0  # T5, tied
        self.after = float(named.get("logit_scale") or 1.0) / float(named.get("logits_scaling") or 1.0)
        self.cap = named.get("final_logit_softcapping")  # Gemma

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.output(hidden * self.before if self.before != 1.0 else hidden)
        if self.bias is not None:
            logits = logits + self.bias.to(logits)
        if self.after != 1.0:
            logits = logits * self.after
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


class Policy(nn.Module):
    """A language model seen through its responses.

    Args:
        max_tokens: the most response tokens of one call, the same on all ranks: it fixes the number of slices the
            head works in, which under ZeRO-3 must not depend on the data.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, max_tokens: int):
        super().__init__()
        self.model = model
        lm = hugging_face(model)
        self.encoder_decoder: bool = lm.config.is_encoder_decoder
        self.start_id = lm.config.to_dict().get("decoder_start_token_id")
        self.vocab_size = lm.get_output_embeddings().weight.shape[0]
        self.chunks = max(1, math.ceil(max_tokens * self.vocab_size / CHUNK_ELEMENTS))
        object.__setattr__(self, "head", LanguageHead(lm))  # a view: its weights belong to the model alone

    def forward(self, batch: Batch, output: str = "logp") -> Tensor:
        """`output` is one of

        logp: (B, T) float32, log-probability of each response token, 0 where response_mask is False.
        entropy: (B, T) float32, entropy in nats of the distribution each response token was drawn from.
        states: (B, P, H), last hidden states at prompt positions, P = L: mask them by prompt_lengths.
        """
        if output == "states":
            return self.prompt_states(batch)
        hidden = self.response_states(batch)[batch.response_mask]  # (N, H)
        head = self.head
        if output == "entropy":
            values = functional.token_entropies(hidden, head, self.chunks)
        else:
            values = functional.token_logps(hidden, head, batch.response_ids[batch.response_mask], self.chunks)
        empty = torch.zeros(batch.response_mask.shape, dtype=values.dtype, device=values.device)
        return empty.masked_scatter(batch.response_mask, values)

    def prompt_states(self, batch: Batch) -> Tensor:
        lm = hugging_face(self.model)
        if self.encoder_decoder:
            return lm.get_encoder()(input_ids=batch.input_ids, attention_mask=batch.input_mask.long()).last_hidden_state
        return lm.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state

    def response_states(self, batch: Batch) -> Tensor:
        """(B, T, H): the state from which the head predicts each response token."""
        lm = hugging_face(self.model)
        if self.encoder_decoder:
            mask = batch.input_mask.long()
            encoded = lm.get_encoder()(input_ids=batch.input_ids, attention_mask=mask).last_hidden_state
            start = torch.full_like(batch.response_ids[:, :1], self.start_id)
            return lm.get_decoder()(
                input_ids=torch.cat([start, batch.response_ids[:, :-1]], dim=1),
                encoder_hidden_states=encoded,
                encoder_attention_mask=mask,
                use_cache=False,
            ).last_hidden_state
        # padding is on the right, where causal attention never looks: no mask, so the fast kernels apply
        hidden = lm.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state  # (B, L, H)
        steps = torch.arange(batch.response_ids.shape[1], device=hidden.device)
        before = batch.prompt_lengths[:, None] - 1 + steps  # token t of the response is predicted one place earlier
        before = before.clamp(max=hidden.shape[1] - 1)
        return hidden.gather(1, before[:, :, None].expand(-1, -1, hidden.shape[2]))


class RewardModel(nn.Module):
    """A scalar head read at each sequence's last token, whatever the padding and the batch mates."""

    def __init__(self, model: PreTrainedModel | PeftModel):
        super().__init__()
        self.model = model
        self.encoder_decoder: bool = hugging_face(model).config.is_encoder_decoder

    def forward(self, batch: Batch) -> Tensor:
        """(B,) float32 scores of prompt + response; `input_ids` holds both, for every architecture."""
        return self.score(batch.input_ids, batch.input_mask)

    def score(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B,) float32 scores of right-padded `ids` (B, L) with `mask` (B, L) bool."""
        model = hugging_face(self.model)
        heads = dict(model.named_children())
        if "score" in heads:
            head, hidden = heads["score"], model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        elif self.encoder_decoder:
            head, hidden = heads["classification_head"], self._decoder_states(ids, mask)
        else:  # encoders read their first token
            return model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].float()
        last = mask.sum(1) - 1
        return head(hidden[torch.arange(len(last), device=last.device), last])[:, 0].float()

    def _decoder_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L, H) of a decoder that reads `ids` one place later, as BART and T5 classifiers do.

        Those look for EOS to find a sequence's end, and fail where a cut response has lost its own.
        """
        model = hugging_face(self.model)
        start = torch.full_like(ids[:, :1], model.config.decoder_start_token_id)
        return model.base_model(
            input_ids=ids,
            attention_mask=mask.long(),
            decoder_input_ids=torch.cat([start, ids[:, :-1]], dim=1),
            use_cache=False,
        ).last_hidden_state


@torch.no_grad()
def check_head(policy: Policy, batch: Batch) -> None:
    """Compare our path to the logits with the model's own on one short row.

    Raises:
        UserError: there is no number to compare.
        RuntimeError: they differ, so the architecture does something to its logits that LanguageHead does not know.
    """
    lm = hugging_face(policy.model)
    lm.eval()
    if policy.encoder_decoder:
        start = torch.full_like(batch.response_ids[:, :1], policy.start_id)
        decoder_ids = torch.cat([start, batch.response_ids[:, :-1]], dim=1)
        logits = lm(input_ids=batch.input_ids, attention_mask=batch.input_mask.long(), decoder_input_ids=decoder_ids)
        theirs = logits.logits[0]
    else:
        first = int(batch.prompt_lengths[0]) - 1
        theirs = lm(input_ids=batch.input_ids, use_cache=False).logits[0, first : first + batch.response_ids.shape[1]]
    expected = theirs.float().log_softmax(-1).gather(1, batch.response_ids[0][:, None])[:, 0]
    difference = float((policy(batch)[0] - expected).abs().max())
    if math.isnan(difference):
        raise UserError("model.path: the model gives NaN on two words: its weights are damaged, wanted finite numbers")
    if not difference <= (1e-3 if theirs.dtype == torch.float32 else 0.1):
        raise RuntimeError(
            f"model: {type(lm).__name__} changes its logits in a way that is not known here "
            f"(log-probabilities differ by {difference:.3g} nats)"
        )
