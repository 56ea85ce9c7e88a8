"""A trained reward model as a reward: what `stage=reward` leaves, or any Hugging Face classifier with one label.

The score is read at the last token, found by length, so it depends neither on the batch, nor on the padding, nor on the
rest of the batch. What `stage=reward` left reads prompt + response as it was trained to. A classifier from elsewhere
that has a chat template reads what that writes for the whole conversation, which often goes on after the end of turn.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from pipeline.config.sections import ModelSettings, TemplateSettings
from pipeline.data import messages
from pipeline.data.tokenization import Encoder, pad
from pipeline.errors import UserError
from pipeline.models.checks import positions
from pipeline.models.loading import hugging_face, load_scalar, load_tokenizer
from pipeline.models.policy import RewardModel
from pipeline.models.trained_input import saved_input
from pipeline.records import Answer, Message, RewardFunction

logger = logging.getLogger("tiffin")


def load(
    directory: str,
    model: ModelSettings,
    template: TemplateSettings,
    max_length: int,
    batch_size: int,
    device: torch.device,
) -> RewardFunction:
    """A function with the rewards' calling convention that runs the model in `directory`.

    Args:
        model: how to load it (attention kernel, trust_remote_code); its path and LoRA are not used.
        template, max_length: for classifiers that did not come from `stage=reward`; those that did read rows as they
            were trained to. The others read under their own chat template where they have one, unless kind is text.
            max_length is in tokens of prompt + response; the prompt loses its beginning first.

    Raises UserError where there is no such model, or it has no scalar head.
    """
    adapters = model.lora.model_copy(update={"r": 0})
    settings = model.model_copy(update={"path": directory, "revision": None, "dropout": 0.0, "lora": adapters})
    tokenizer = load_tokenizer(settings, [])
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token  # BERT and its kin end a text with [SEP]
    scorer = RewardModel(load_scalar(settings, tokenizer, seed=0, new_head=False, dtype="auto")).eval()
    trained = saved_input(settings)
    if trained is None:
        kind = template.model_copy(update={"kind": "text" if template.kind == "text" else "auto"})
        lengths = max_length, max_length, "end"
        encoder = Encoder(tokenizer, kind, *lengths, encoder_decoder=scorer.encoder_decoder)
    else:
        lengths = trained.max_prompt_length, trained.max_response_length, trained.keep_of_prompt
        encoder, max_length = Encoder(tokenizer, trained.template, *lengths, scorer.encoder_decoder), sum(lengths[:2])
    read = read_as_trained if trained or encoder.template.kind == "text" else read_conversation
    logger.info(f"reward {directory}: {encoder.described()}")
    limit = positions(hugging_face(scorer.model))

    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence) -> list[float]:
        # `raw_prompt`, which may be chat messages, goes before `prompts`, which is always text
        raw = columns.get("raw_prompt", prompts)
        beside = [columns.get(name, [None] * len(raw)) for name in messages.COLUMNS]
        asked = [messages.given_back(*one) for one in zip(raw, *beside, strict=True)]
        calls = columns.get("raw_completion", [None] * len(raw))  # of answers that are more than a text
        given = zip(completions, calls, strict=True)
        answers = [text if call is None else messages.given_back(call)[0] for text, call in given]
        rows = [read(encoder, prompt, answer, max_length) for prompt, answer in zip(asked, answers, strict=True)]
        longest = max(map(len, rows), default=0)
        if limit is not None and longest > limit:
            problem = f"{max_length} lets {longest} tokens through, but {directory} has {limit} positions"
            raise UserError(f"rewards.max_length: {problem}, wanted no more: set rewards.max_length={limit}")
        scores = score(scorer.to(device), rows, encoder.pad_id, batch_size, device)
        scorer.cpu()  # between two scorings the device belongs to the policy
        return scores

    return reward


def read_as_trained(
    encoder: Encoder, prompt: str | Sequence[Message], completion: Answer, max_length: int
) -> tuple[int, ...]:
    """The ids that are scored: the response, and as much of the prompt's end as `max_length` leaves room for."""
    row = encoder.encode(prompt, completion)
    room = max_length - len(row.response_ids)
    if len(row.prompt_ids) <= room:
        return row.prompt_ids + row.response_ids
    return (encoder.encode_prompt(prompt, room)[0] if room > 0 else ()) + row.response_ids


def read_conversation(
    encoder: Encoder, prompt: str | Sequence[Message], completion: Answer, max_length: int
) -> tuple[int, ...]:
    """The ids that are scored: the conversation as the chat template writes it, to its last token; its end if cut."""
    ids = encoder.encode_conversation(prompt, completion)
    if len(ids) <= max_length:
        return ids
    begin = ids[:1] if ids[0] == encoder.tokenizer.bos_token_id else ()
    return begin + ids[len(ids) - max_length + len(begin) :]


@torch.no_grad()
def score(
    scorer: RewardModel, rows: Sequence[Sequence[int]], pad_id: int, batch_size: int, device: torch.device
) -> list[float]:
    """One float per row, in the order given; rows of like length run together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    scores = [0.0] * len(rows)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, mask = pad([rows[i] for i in batch], pad_id)
        for i, value in zip(batch, scorer.score(ids.to(device), mask.to(device)).tolist(), strict=True):
            scores[i] = value
    return scores
