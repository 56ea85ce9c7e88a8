"""A policy held against its model's own forward, before anything is learned from it.

What is compared are log-probabilities of two short texts of different lengths: each read alone by the model itself,
both in one padded batch by our way to the logits, and token after token by `generate`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from pipeline.data.tokenization import pad
from pipeline.errors import UserError
from pipeline.models import attention
from pipeline.models.loading import body, hugging_face
from pipeline.models.policy import Policy, RewardModel, read_by_decoder
from pipeline.records import Batch

logger = logging.getLogger("tiffin")

LONG = 4096  # tokens of the longest row that is tried at the start
SURE = 15.0  # nats: half precision rounds log-probabilities beyond it by more, in proportion (bfloat16 has 8 bits)
OTHER = "wanted a model that writes text from left to right: name another model"


@torch.no_grad()
def check_policy(policy: Policy, batch: Batch, pad_id: int) -> None:
    """Check rows of different lengths; leaves in `policy.reads_padding` whether prompts may be padded to generate.

    Raises UserError where a number is not what the model itself gives, or there is none.
    """
    lm = hugging_face(policy.model)
    lm.eval()
    batch = batch.to(lm.device)
    with computing(lm):
        rows = own_logps(policy, batch)
        check_head(policy, batch, rows)
        exact = lm.dtype == torch.float32
        together = gaps(generated_logps(policy, batch, range(len(rows)), pad_id), rows, exact)
        policy.reads_padding = close(together, exact) and not pools_places(lm)
        if not policy.reads_padding:
            said = [generated_logps(policy, batch, [i], pad_id) for i in range(len(rows))]
            alone = [gaps(one, [row], exact)[0] for one, row in zip(said, rows, strict=True)]
    if policy.reads_padding:
        return
    if not close(alone, exact):
        problem = f"gives a token another probability after what is before it than in the whole text ({max(alone):.2g}"
        raise UserError(f"model.path: {type(lm).__name__} {problem} nats), {OTHER}")
    logger.info(f"{type(lm).__name__} takes padding for text: prompts of one length are generated from together")


@torch.no_grad()
def check_end_to_end(module: Policy | RewardModel, longest: int) -> None:
    """Hold states of rows read end to end against those of padded rows; `longest`: tokens that a row may have.

    Two rows share a prompt, and one is as long as rows may be, up to some thousand tokens: what a layer sees may end
    there. Where they differ `module.unpadded` becomes False, which is said.
    """
    if not module.unpadded:
        return
    lm = hugging_face(module.model)
    lm.eval()
    laid, ids = _three_rows(lm, max(4, min(longest, LONG)))
    why = "makes its attention masks by itself"
    try:
        read = attention.read(lm, laid)
        gap = math.inf if read is None else _gap(read.last_hidden_state[0], laid, body(lm)(ids, use_cache=False)[0])
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        gap, why = math.inf, f"asks for a mask of another form ({' '.join(str(error).split())[:100]})"
    if gap <= (1e-3 if lm.dtype == torch.float32 else 0.1):
        return
    module.unpadded = False
    why = why if gap == math.inf else f"then reads otherwise (by {gap:.2g} of its states)"
    logger.info(f"{type(lm).__name__} takes rows with padding, not end to end: it {why}")


def _three_rows(lm: PreTrainedModel, longest: int) -> tuple[attention.Laid, Tensor]:
    """Rows of any tokens, one of them of `longest` and two with one prompt; as they are laid, and padded (3, L)."""
    lengths = torch.tensor([longest, longest // 2 + 1, longest // 2 + 2])
    ids = torch.randint(
        lm.config.get_text_config().vocab_size, (3, longest), generator=torch.Generator().manual_seed(0)
    )
    prompts = lengths // 2
    ids[2, : prompts[1]] = ids[1, : prompts[1]]
    prompts[2] = prompts[1]
    mask = torch.arange(longest) < lengths[:, None]
    owners = torch.tensor([0, 1, 1 if attention.shares_prompts(lm) else 2])
    ids, mask, prompts, owners = (x.to(lm.device) for x in (ids, mask, prompts, owners))
    return attention.lay(ids, mask, prompts, owners), ids


def _gap(hidden: Tensor, laid: attention.Laid, padded: Tensor) -> float:
    """By how much of their size states (T, H) differ from those of padded rows (N, L, H): a row's median, at most."""
    found = []
    for at, length, wanted in zip(laid.at, laid.lengths.tolist(), padded, strict=True):
        ours, theirs = hidden[at[:length]].float(), wanted[:length].float()
        found.append(float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).median()))
    return max(found) if all(map(math.isfinite, found)) else math.inf


def check_config(lm: PreTrainedModel) -> None:
    """Raises UserError where rows cannot be independent of each other. Turns off, and says so, a loss of the router.

    Without that loss nobody reads the router's logits, for which some models cannot generate.
    """
    config = lm.config.get_text_config()
    named = config.to_dict()
    if (capacity := named.get("expert_capacity")) is not None:
        problem = f"experts take {capacity} tokens at a time, so that what a text gets depends on how it is read"
        raise UserError(f"model.path: the {type(lm).__name__}'s {problem}: name another model")
    if named.get("output_router_logits"):
        asked = f"output_router_logits, router_aux_loss_coef {named.get('router_aux_loss_coef')}"
        logger.info(
            f"model: a loss of the router is asked for ({asked}): training of this model adds it "
            "(train.router_aux_loss_coef=0: not); what is saved does not ask for it"
        )
        config.output_router_logits = False


def pools_places(lm: PreTrainedModel) -> bool:
    """Whether layers pool the keys of so many places, padding among them: more of them than two short texts have."""
    return "compress_rates" in lm.config.get_text_config().to_dict()  # DeepSeek V4


@contextmanager
def computing(lm: PreTrainedModel) -> Iterator[None]:
    """Raises UserError where `lm` does not compute from ids and a mask as language models do."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, ArithmeticError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"model.path: {type(lm).__name__} cannot be read as text ({reason}), {OTHER}") from None


def own_logps(policy: Policy, batch: Batch) -> list[Tensor]:
    """(T,) float32 each: the log-probabilities of a row's response tokens by the model's own forward on it alone."""
    lm, found = hugging_face(policy.model), []
    for ids, mask, start, response, there in zip(
        batch.input_ids, batch.input_mask, batch.prompt_lengths, batch.response_ids, batch.response_mask, strict=True
    ):
        read, targets = ids[mask][None], response[there]
        if policy.encoder_decoder:
            decoder_ids = read_by_decoder(targets[None], policy.start_ids)
            whole = lm(input_ids=read, attention_mask=torch.ones_like(read), decoder_input_ids=decoder_ids).logits[0]
            logits = whole[len(policy.start_ids) - 1 :]
        else:
            logits = lm(input_ids=read, use_cache=False).logits[0, int(start) - 1 : -1]
        found.append(logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0])
    return found


@torch.no_grad()
def check_head(policy: Policy, batch: Batch, rows: Sequence[Tensor] | None = None) -> None:
    """Compare our path to the logits with the model's own; `rows`: what `own_logps` gives, where that is known.

    Raises UserError where they differ, so that the architecture does something that is not known here.
    """
    exact = hugging_face(policy.model).dtype == torch.float32
    expected = own_logps(policy, batch) if rows is None else rows
    found = [said[mask] for said, mask in zip(policy(batch), batch.response_mask, strict=True)]
    both = list(zip(found, expected, strict=True))
    # rounding to half precision grows over many layers, and one token among others takes most of it
    differences = [float(apart(*one, exact).max()) for one in both] if exact else gaps(found, expected, exact)
    if any((ours - row).isnan().any() for ours, row in both):
        raise UserError("model.path: the model gives NaN on two words: its weights are damaged, wanted finite numbers")
    if not close(differences, exact):
        difference = max(float((ours - row).abs().max()) for ours, row in both)
        lm = hugging_face(policy.model)
        problem = f"in a way that is not known here (log-probabilities differ by {difference:.3g} nats), {OTHER}"
        raise UserError(f"model.path: {type(lm).__name__} changes its logits, or reads a padded batch, {problem}")


def gaps(found: Iterable[Tensor], rows: Sequence[Tensor], exact: bool) -> list[float]:
    """The median difference in each row: what rounding tips over, such as the choice of an expert, is a token's."""
    return [float(apart(ours[: len(row)], row, exact).median()) for ours, row in zip(found, rows, strict=True)]


def apart(ours: Tensor, row: Tensor, exact: bool) -> Tensor:
    """(T,) by how much log-probabilities differ, in half precision as if none were beyond `SURE`."""
    return (ours - row).abs() / (1.0 if exact else (row.abs() / SURE).clamp(min=1.0))


def close(differences: Sequence[float], exact: bool) -> bool:
    """Whether these are rounding: in half precision a padded row's is larger."""
    return all(one <= (1e-3 if exact else 0.3) for one in differences)


def generated_logps(policy: Policy, batch: Batch, rows: Sequence[int], pad_id: int) -> Tensor:
    """(B, T) float32: the log-probabilities of the response tokens of `rows` as `generate` sees them, one by one."""
    lm, found = hugging_face(policy.model), []
    ids = [batch.input_ids[i][: int(batch.prompt_lengths[i])].tolist() for i in rows]
    prompts, mask = pad(ids, pad_id, side="right" if policy.encoder_decoder else "left")
    targets = batch.response_ids[list(rows)]

    def force(_: Tensor, scores: Tensor) -> Tensor:
        token = targets[:, len(found), None]
        found.append(scores.float().log_softmax(-1).gather(1, token)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)

    config = GenerationConfig(max_new_tokens=targets.shape[1], do_sample=False, pad_token_id=pad_id)
    config.decoder_start_token_id = next(iter(policy.start_ids), None)
    with nothing_inherited(lm):
        lm.generate(
            input_ids=prompts.to(lm.device),
            attention_mask=mask.long().to(lm.device),
            **policy.begun(len(rows)),
            generation_config=config,
            logits_processor=LogitsProcessorList([force]),
        )
    return torch.stack(found, dim=1)


@contextmanager
def nothing_inherited(lm: PreTrainedModel) -> Iterator[None]:
    """Keep generate() from filling what is not set with the checkpoint's own (forced tokens, banned n-grams ...)."""
    own, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = own
