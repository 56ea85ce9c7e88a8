"""What a model computes of a batch: log-probabilities of responses, states of prompts, scores of the whole.

Logits are never made for prompts, and never for all response tokens at once: see `logits.token_logps`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from pipeline.algorithms import functional
from pipeline.algorithms.logits import draw_tokens, smoothed_logps, token_entropies, token_logps, token_stats
from pipeline.errors import UserError
from pipeline.models import attention, router
from pipeline.models.checks import HEADS
from pipeline.models.late import Late
from pipeline.models.loading import body, hugging_face
from pipeline.records import Batch

CHUNK_ELEMENTS = 1 << 25  # logits alive at a time: 128 MB in float32


class LanguageHead(nn.Module):
    """Hidden states -> logits, with what some architectures do after their output matrix."""

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        config = lm.config.get_text_config()
        named = config.to_dict()
        self.output = lm.get_output_embeddings()
        self.bias = dict(lm.named_buffers()).get("final_logits_bias")  # BART and its kin
        tied = config.tie_word_embeddings if config.model_type == "umt5" else named.get("scale_decoder_outputs")
        self.before = config.d_model**-0.5 if tied else 1.0  # T5
        # MPT's logit_scale is in its configuration, and read nowhere
        scale = None if config.model_type == "mpt" else named.get("logit_scale") or named.get("lm_head_multiplier")
        base = named.get("dim_model_base")
        divisor = config.hidden_size / base if base else named.get("logits_scaling")
        self.after = float(scale or 1.0) / float(divisor or 1.0)  # Cohere, Falcon-H1; MiniCPM, Granite
        self.cap = named.get("final_logit_softcapping") or named.get("logits_soft_cap")  # Gemma; RecurrentGemma

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
    """A language model that gives numbers for its responses.

    `max_tokens` are the most response tokens of one call, the same on all ranks: they fix the number of slices the head
    works in, which under ZeRO-3 must not depend on the data.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, max_tokens: int, late: Late | None = None):
        """`late`: what is still to be done to the weights, which the engine does."""
        super().__init__()
        self.model, self.late = model, late
        lm = hugging_face(model)
        self.encoder_decoder: bool = lm.config.is_encoder_decoder
        self.unpadded = attention.reads_end_to_end(lm)  # the start check may find that it does not
        self.start_ids = start_of_decoder(lm)
        self.router_coefficient = router.own_coefficient(lm)
        self._balances: list[Tensor] | None = None  # of this forward, where they are wanted
        self.reads_padding = True  # whether prompts may be padded to generate from; the start check says
        self.vocab_size = lm.get_output_embeddings().weight.shape[0]
        self.chunks = max(1, math.ceil(max_tokens * self.vocab_size / CHUNK_ELEMENTS))
        object.__setattr__(self, "head", LanguageHead(lm))  # a view: its weights belong to the model alone

    def forward(self, batch: Batch, output: str = "logp", balance: bool = False) -> Tensor | tuple[Tensor, ...]:
        """What `output` names; with `balance` also, as the last, () float32: the loss of the router on these tokens.

        `output` is one of

        logp: (B, T) float32, log-probability of each response token, 0 where response_mask is False; of the
            tempered policy where the batch has the number `temperature`, among the ids that it does not suppress.
        smoothed: logp, and (B, T) float32, the mean log-probability over the vocabulary at each response token.
        drawn: both of smoothed, and the four of `logits.Drawn` at the masked tokens of the static responses.
        entropy: (B, T) float32, entropy in nats of the distribution each response token was drawn from.
        draws: three (B, T) float32, those of `logits.token_stats`, without gradient.
        logp_states: logp, and the states of `states`, of one pass.
        states: (B, P, H), last hidden states at prompt positions, P = L: mask them by prompt_lengths.
        heads: (B, T, H), the states that predict the response tokens; with static responses (B, S, H) beside them.
        """
        if not balance:
            return self._said(batch, output)
        self._balances = []
        said, found = self._said(batch, output), self._balances
        self._balances = None
        return (said, sum(found)) if isinstance(said, Tensor) else (*said, sum(found))

    def _said(self, batch: Batch, output: str) -> Tensor | tuple[Tensor, ...]:
        """What `forward` gives but for the router."""
        if output == "heads":
            return self.response_states(batch) if batch.static is None else self.both_states(batch)
        if output == "states":
            return self.input_states(batch)
        mask = batch.response_mask
        if output == "logp_states":
            prompts, states = self.all_states(batch)
            return self._of_tokens(states[mask], batch, "logp"), prompts
        if output == "drawn":
            states, static = self.both_states(batch)
            given = batch.static
            drawn = draw_tokens(static[given.masked], self.head, given.uniforms, given.suppressed, self.chunks)
            return *self._smoothed(states[mask], batch), *drawn
        return self._of_tokens(self.response_states(batch)[mask], batch, output)

    def _of_tokens(self, hidden: Tensor, batch: Batch, output: str) -> Tensor | tuple[Tensor, ...]:
        """What the head says of `hidden` (N, H), which predict the tokens of the responses, by the name `output`."""
        if output == "smoothed":
            return self._smoothed(hidden, batch)
        if output == "draws":
            found = token_stats(hidden, self.head, *self._drawn_from(batch))
            return tuple(spread(one, batch.response_mask) for one in found)
        if output == "entropy":
            found = token_entropies(hidden, self.head, self.chunks, batch.suppressed)
        else:
            found = token_logps(hidden, self.head, *self._drawn_from(batch))
        return spread(found, batch.response_mask)

    def begun(self, rows: int) -> dict[str, Tensor]:
        """What generate() is given besides prompts: how the decoder of each row begins."""
        if not self.encoder_decoder:
            return {}
        return {"decoder_input_ids": torch.tensor([self.start_ids] * rows, device=self.model.device)}

    def _smoothed(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        logps, means = smoothed_logps(hidden, self.head, *self._drawn_from(batch))
        return spread(logps, batch.response_mask), spread(means, batch.response_mask)

    def _drawn_from(self, batch: Batch) -> tuple[Tensor, int, Tensor | None, Tensor | None]:
        """What `logits.token_logps` asks for beside states and head."""
        return batch.response_ids[batch.response_mask], self.chunks, token_temperatures(batch), batch.suppressed

    def input_states(self, batch: Batch) -> Tensor:
        """(B, L, H): the last hidden states at `input_ids`, of the encoder where there is one."""
        if self.encoder_decoder:
            encoder, mask = hugging_face(self.model).get_encoder(), batch.input_mask.long()
            return encoder(input_ids=batch.input_ids, attention_mask=mask).last_hidden_state
        hidden, at = self._read(batch)
        return taken(hidden, at)

    def _read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(T, H) the last hidden states of a causal model, and (B, L) where those of each row are among them.

        Rows lie end to end, where the model can read them so; else one below the other, with padding on the right,
        where causal attention never goes: no mask, so the fast kernels apply.
        """
        lm, balanced = hugging_face(self.model), self._balances is not None
        options = {"output_router_logits": True} if balanced else {}
        if self.unpadded:
            laid = attention.lay(batch.input_ids, batch.input_mask, batch.prompt_lengths, batch.owners)
            at, read = laid.at, attention.read(lm, laid, **options)
            real = torch.full_like(laid.ids, bool(batch.items), dtype=torch.bool)
        else:
            ids, real = batch.input_ids, real_tokens(batch)
            at = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
            read = body(lm)(input_ids=ids, use_cache=False, **options)
        if balanced:
            self._balances.append(router.balance_loss(read.router_logits, real, router.chosen_experts(lm)))
        return read.last_hidden_state.flatten(0, 1), at

    def response_states(self, batch: Batch) -> Tensor:
        """(B, T, H): the state from which the head predicts each response token."""
        if self.encoder_decoder:
            return self._decoded(batch, self.input_states(batch))
        hidden, at = self._read(batch)
        return taken(hidden, before_each(at, batch.prompt_lengths, batch.response_ids.shape[1]))

    def all_states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, P, H) those at each prompt's places, of the encoder where there is one, and (B, T, H) as above."""
        if self.encoder_decoder:
            encoded = self.input_states(batch)
            return encoded, self._decoded(batch, encoded)
        hidden, at = self._read(batch)
        prompts = taken(hidden, at[:, : int(batch.prompt_lengths.max())])
        return prompts, taken(hidden, before_each(at, batch.prompt_lengths, batch.response_ids.shape[1]))

    def _decoded(self, batch: Batch, hidden: Tensor) -> Tensor:
        """(B, T, H) that predict the responses, of a decoder that sees what an encoder gave, (B, L, H)."""
        mask = batch.input_mask.long()
        if batch.owners is not None:  # each prompt was read once, whatever the number of its responses
            hidden, mask = hidden[batch.owners], mask[batch.owners]
        shown = batch.response_ids if batch.shown_ids is None else batch.shown_ids
        decoder, ids = hugging_face(self.model).get_decoder(), read_by_decoder(shown, self.start_ids)
        decoded = decoder(input_ids=ids, encoder_hidden_states=hidden, encoder_attention_mask=mask, use_cache=False)
        return decoded.last_hidden_state[:, len(self.start_ids) - 1 :]

    def both_states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, T, H) and (B, S, H): the states that predict the responses and the static responses, in one pass.

        An encoder reads each prompt once, and a decoder's keys and values of it are made once for both responses.
        """
        if self.encoder_decoder:
            return self._decoded_both(batch)
        hidden, at = self._read(batch)
        lengths = batch.prompt_lengths.chunk(2)
        widths = batch.response_ids.shape[1], batch.static.ids.shape[1]
        first, second = (before_each(*given) for given in zip(at.chunk(2), lengths, widths, strict=True))
        return taken(hidden, first), taken(hidden, second)

    def _decoded_both(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As `both_states`, of an encoder-decoder."""
        encoded, mask = self.input_states(batch), batch.input_mask.long()
        prompts = DynamicCache()  # filled by the first pass, read by the second
        states = []
        for shown in (batch.shown_ids, batch.static.shown_ids):
            decoded = hugging_face(self.model).get_decoder()(
                input_ids=read_by_decoder(shown, self.start_ids),
                encoder_hidden_states=encoded,
                encoder_attention_mask=mask,
                past_key_values=EncoderDecoderCache(DynamicCache(), prompts),
            )
            states.append(decoded.last_hidden_state[:, len(self.start_ids) - 1 :])
        return states[0], states[1]


def real_tokens(batch: Batch) -> Tensor:
    """(B, L) bool: where `input_ids` has text that counts; nowhere in fillers."""
    return batch.input_mask & bool(batch.items)


def start_of_decoder(lm: PreTrainedModel) -> tuple[int, ...]:
    """The tokens that a decoder reads first: its start, and what generation then forces, as BART's BOS.

    None of a causal model. Raises UserError where an encoder-decoder does not say.
    """
    if not lm.config.is_encoder_decoder:
        return ()
    start, forced = lm.config.to_dict().get("decoder_start_token_id"), lm.generation_config.forced_bos_token_id
    if start is None:
        problem = "its config.json has no decoder_start_token_id, wanted the token that every response follows"
        cure = "write it there (of mBART's kin: the id of the target language)"
        raise UserError(f"model.path: {lm.name_or_path}: {problem}: {cure}")
    return (start,) if forced in (None, start) else (start, forced)


def read_by_decoder(ids: Tensor, start_ids: Sequence[int]) -> Tensor:
    """What a decoder reads to predict `ids` (B, T), in its last T places: the start, then each token but the last."""
    return torch.cat([ids.new_tensor(start_ids).expand(len(ids), -1), ids[:, :-1]], dim=1)


def token_temperatures(batch: Batch) -> Tensor | None:
    """(N,) float32, the temperature that each response token was drawn at; None where the batch has none."""
    if "temperature" not in batch.numbers:
        return None
    each = functional.item_numbers(batch, "temperature", like=batch.response_mask.float()[:, 0])  # 0 for fillers
    return each[:, None].expand_as(batch.response_mask)[batch.response_mask]


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """`values` (N,) at the True places of `mask`, in row-major order, and 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def before_each(at: Tensor, prompt_lengths: Tensor, count: int) -> Tensor:
    """(B, count): of `at` (B, L) what stands one place before each of `count` tokens after each prompt."""
    places = prompt_lengths[:, None] - 1 + torch.arange(count, device=at.device)
    return at.gather(1, places.clamp(max=at.shape[1] - 1))


def taken(hidden: Tensor, at: Tensor) -> Tensor:
    """(B, L, H): of `hidden` (T, H) the states at (B, L)."""
    return hidden.index_select(0, at.flatten()).unflatten(0, at.shape)


class ExactLinear(nn.Linear):
    """A matrix that multiplies in float32 whatever it is kept in."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(x.float(), self.weight.float(), bias)


class RewardModel(nn.Module):
    """A scalar head read at each sequence's last token, whatever the padding and the rest of the batch.

    The head multiplies in float32: bfloat16 has 8 bits for a score, in which most of like texts would be equal.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, late: Late | None = None):
        """`late`: what is still to be done to the weights, which the engine does."""
        super().__init__()
        self.model, self.late = model, late
        for name, part in hugging_face(model).named_children():
            for matrix in part.modules() if name in HEADS else ():
                if type(matrix) is nn.Linear:
                    matrix.__class__ = ExactLinear
        lm = hugging_face(model)
        self.encoder_decoder: bool = lm.config.is_encoder_decoder
        self.unpadded = "score" in dict(lm.named_children()) and attention.reads_end_to_end(lm)

    def forward(self, batch: Batch) -> Tensor:
        """(B,) float32 scores of prompt + response; `input_ids` holds both, for every architecture."""
        if not self.unpadded:
            return self.score(batch.input_ids, batch.input_mask)
        lm = hugging_face(self.model)
        laid = attention.lay(batch.input_ids, batch.input_mask, batch.prompt_lengths, batch.owners)
        hidden = attention.read(lm, laid).last_hidden_state[0]
        last = laid.at.gather(1, laid.lengths[:, None] - 1)[:, 0]
        return lm.score(hidden.index_select(0, last)).float()[:, 0]

    def score(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B,) float32 scores of right-padded `ids` (B, L) with `mask` (B, L) bool."""
        return self.outputs(ids, mask)[:, 0]

    def outputs(self, ids: Tensor, mask: Tensor, token_types: Tensor | None = None) -> Tensor:
        """(B, N) float32, all outputs of the head; `token_types` (B, L) are of encoders that are told pairs by them."""
        model = hugging_face(self.model)
        heads = dict(model.named_children())
        if "score" in heads:
            head, hidden = heads["score"], body(model)(input_ids=ids, use_cache=False).last_hidden_state
        elif self.encoder_decoder:
            head, hidden = heads["classification_head"], self._decoder_states(ids, mask)
        else:  # encoders read their first token
            told = {} if token_types is None else {"token_type_ids": token_types}
            return model(input_ids=ids, attention_mask=mask.long(), **told).logits.float()
        last = mask.sum(1) - 1
        return head(hidden[torch.arange(len(last), device=last.device), last]).float()

    def _decoder_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L, H) of a decoder that reads `ids` one place later, as BART and T5 classifiers do.

        Those search for EOS to find a sequence's end, and fail where a cut response has lost its own.
        """
        model = hugging_face(self.model)
        shown = read_by_decoder(ids, [model.config.decoder_start_token_id])
        whole = body(model)(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=shown, use_cache=False)
        return whole.last_hidden_state
