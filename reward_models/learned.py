"""A trained reward model as a reward: what `stage=reward` leaves, or any Hugging Face classifier with one label.

The score is read at the last token of prompt + response, found by length, so it depends neither on the batch, nor on
the padding, nor on the rest of the batch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError

from pipeline.config.sections import Count, ModelSettings, Section, TemplateSettings
from pipeline.config.validate import one_complaint
from pipeline.data.tokenization import Encoder, pad
from pipeline.errors import UserError
from pipeline.models.checks import positions, read_object
from pipeline.models.loading import hugging_face, load_scalar, load_tokenizer
from pipeline.models.policy import RewardModel
from pipeline.records import RewardFunction

INPUT_FILE = "reward_input.json"


class Input(Section):
    """How a reward model was trained to read: the template, and where prompt and response were cut."""

    template: TemplateSettings
    max_prompt_length: Count
    keep_of_prompt: Literal["end", "beginning"]
    max_response_length: Count


def save_input(directory: Path, encoder: Encoder) -> None:
    """Keep beside the weights how the rows were made that the model was trained on."""
    lengths = {"max_prompt_length": encoder.max_prompt_length, "max_response_length": encoder.max_response_length}
    content = Input(template=encoder.template, keep_of_prompt=encoder.keep, **lengths).model_dump()
    (directory / INPUT_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def saved_input(directory: Path) -> Input | None:
    """What `save_input` left, None where it left nothing. Raises UserError where it is no such thing."""
    file = directory / INPUT_FILE
    if not file.is_file():
        return None
    try:
        return Input(**read_object(file))
    except ValidationError as error:
        path, complaint = one_complaint(error)
        raise UserError(f"{file}: {'.'.join(path)}: {complaint}; train the reward model again") from None


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
            were trained to. max_length is in tokens of prompt + response; the prompt loses its beginning first.

    Raises UserError where there is no such model, or it has no scalar head.
    """
    adapters = model.lora.model_copy(update={"r": 0})
    settings = model.model_copy(update={"path": directory, "revision": None, "dropout": 0.0, "lora": adapters})
    tokenizer = load_tokenizer(settings, [])
    scorer = RewardModel(load_scalar(settings, tokenizer, seed=0, new_head=False, dtype="auto")).eval()
    trained = saved_input(Path(directory))
    if trained is not None:
        template, max_length = trained.template, trained.max_prompt_length + trained.max_response_length
        encoder = Encoder(
            tokenizer, template, trained.max_prompt_length, trained.max_response_length, trained.keep_of_prompt
        )
    else:
        encoder = Encoder(tokenizer, template, max_length, max_length, "end")
    limit = positions(hugging_face(scorer.model).config)

    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence) -> list[float]:
        # `raw_prompt`, which may be chat messages, goes before `prompts`, which is always text
        asked = columns.get("raw_prompt", prompts)
        rows = [read(encoder, prompt, text, max_length) for prompt, text in zip(asked, completions, strict=True)]
        longest = max(map(len, rows), default=0)
        if limit is not None and longest > limit:
            problem = f"{max_length} lets {longest} tokens through, but {directory} has {limit} positions"
            raise UserError(f"rewards.max_length: {problem}, wanted no more: set rewards.max_length={limit}")
        scores = score(scorer.to(device), rows, encoder.pad_id, batch_size, device)
        scorer.cpu()  # between two scorings the device belongs to the policy
        return scores

    return reward


def read(encoder: Encoder, prompt: str | Sequence, completion: str, max_length: int) -> tuple[int, ...]:
    """The ids that are scored: the response, and as much of the prompt's end as `max_length` leaves room for."""
    row = encoder.encode(prompt, completion)
    room = max_length - len(row.response_ids)
    if len(row.prompt_ids) <= room:
        return row.prompt_ids + row.response_ids
    return (encoder.encode_prompt(prompt, room)[0] if room > 0 else ()) + row.response_ids


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
