"""A trained reward model as a reward: what `stage=reward` leaves, or any Hugging Face classifier, here or on the hub.

The score is read at the last token, found by length, so it depends neither on the batch, nor on the padding, nor on the
rest of the batch. What `stage=reward` left reads prompt + response as it was trained to. A classifier from elsewhere
that has a chat template reads what that writes for the whole conversation, which often goes on after the end of turn.
Of a classifier with several labels the one that is named gives a probability, or its output if it learned scores.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pipeline.config.rewards import READ, Reads
from pipeline.config.sections import ModelSettings, TemplateSettings
from pipeline.data import messages
from pipeline.data.text_ids import TextIds
from pipeline.data.tokenization import Encoder, pad
from pipeline.errors import UserError
from pipeline.models.checks import positions
from pipeline.models.loading import hugging_face, load_scalar
from pipeline.models.policy import RewardModel
from pipeline.models.tokenizers import load_tokenizer
from pipeline.models.trained_input import saved_input
from pipeline.records import Answer, Message, RewardFunction, text_of
from reward_models import _named
from reward_models._apart import Ids, completion_ids, cut_ids, pair_ids, refuse_no_pairs, said
from reward_models._filled import filled, texts_of

logger = logging.getLogger("tiffin")

SAID = {  # of what an output means
    "score": "",
    "probability of all": ", the probability among all labels",
    "probability of each": ", the probability of this label",
}


def load(
    name: str,
    model: ModelSettings,
    template: TemplateSettings,
    max_length: int,
    batch_size: int,
    device: torch.device,
    reads: Reads = "auto",
) -> RewardFunction:
    """A function with the rewards' calling convention that runs the model `name`: see `_named`.

    Args:
        model: how to load it (attention kernel, trust_remote_code); its path and LoRA are not used.
        template, max_length: for classifiers that did not come from `stage=reward`; those that did read rows as they
            were trained to. The others read under their own chat template where they have one, unless kind is text.
            max_length is in tokens of prompt + response; the prompt loses its beginning first.
        reads: what those others read; texts with {fields} get the columns of the data.

    Raises UserError where there is no such model, or it has no such output.
    """
    named = _named.located(_named.parts(name) or _named.NamedModel(name))
    output = _named.output(named)
    settings = _settings_of(named, model)
    tokenizer = load_tokenizer(settings, [])
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token  # BERT and its kin end a text with [SEP]
    weights = load_scalar(settings, tokenizer, seed=0, new_head=False, dtype="auto", outputs=output.count)
    scorer = RewardModel(weights).eval()
    reader = _reader(name, settings, tokenizer, template, max_length, scorer.encoder_decoder, reads)
    logger.info(f"reward {name}: {reader.described}{SAID[output.means]}")
    limit = positions(hugging_face(scorer.model))

    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence) -> list[float]:
        given = ({name: values[i] for name, values in columns.items()} for i in range(len(prompts)))
        texts = zip(_as_messages(prompts, completions, columns), given, strict=True)
        rows = [reader.read(*both, row) for both, row in texts]
        refuse_longer(name, rows, limit, reader.max_length)
        scores = score(scorer.to(device), rows, tokenizer.pad_token_id, batch_size, device, output)
        scorer.cpu()  # between two scorings the device belongs to the policy
        return scores

    return reward


def _settings_of(named: _named.NamedModel, model: ModelSettings) -> ModelSettings:
    """`model` for one that is only read: without dropout and new adapters."""
    lora = model.lora.model_copy(update={"r": 0})
    return model.model_copy(update={"path": named.path, "revision": named.revision, "dropout": 0.0, "lora": lora})


def refuse_longer(name: str, rows: Sequence[Ids], limit: int | None, max_length: int) -> None:
    """Raises UserError where a row has more tokens than the model has positions, None for any number."""
    longest = max((len(row.ids) for row in rows), default=0)
    if limit is not None and longest > limit:
        problem = f"{max_length} lets {longest} tokens through, but {name} has {limit} positions"
        raise UserError(f"rewards.max_length: {problem}, wanted no more: set rewards.max_length={limit}")


def _as_messages(
    prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence]
) -> Iterator[tuple[messages.Prompt, Answer]]:
    """Each prompt and answer as the row has them: `raw_prompt` and `raw_completion` hold what is more than a text."""
    nothing = [None] * len(prompts)
    asked = (columns.get("raw_prompt", prompts), *(columns.get(name, nothing) for name in messages.COLUMNS))
    answered = zip(completions, columns.get("raw_completion", nothing), strict=True)
    for prompt, (text, call) in zip(zip(*asked, strict=True), answered, strict=True):
        yield messages.given_back(*prompt), text if call is None else messages.given_back(call)[0]


class _Reader(NamedTuple):
    """How a model reads a prompt, a completion and a row's columns, in words too, and its longest row in tokens."""

    read: Callable[[str | Sequence[Message], Answer, Mapping[str, Any]], Ids]
    max_length: int
    described: str


def _reader(
    name: str,
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    template: TemplateSettings,
    max_length: int,
    encoder_decoder: bool,
    reads: Reads,
) -> _Reader:
    """How the model `name` reads. Raises UserError where it cannot read as it should."""
    trained = saved_input(settings)
    if trained is not None:
        if reads != "auto":
            raise UserError(f"rewards.reads: {reads} for {name}, which reads as it was trained to: wanted auto for it")
        lengths = trained.max_prompt_length, trained.max_response_length, trained.keep_of_prompt
        encoder, limit = Encoder(tokenizer, trained.template, *lengths, encoder_decoder), sum(lengths[:2])
        return _Reader(lambda *row: Ids(read_as_trained(encoder, *row[:2], limit)), limit, encoder.described())
    if reads not in READ:
        return _of_texts(name, tokenizer, template, max_length, reads)
    alone = _named.label_of(name) is not None and tokenizer.chat_template is None and not encoder_decoder
    if reads == "completion" or (reads == "auto" and alone):
        told = "reads the completion alone"
        return _Reader(lambda _, text, __: completion_ids(tokenizer, text, max_length), max_length, told)
    if reads == "pair":
        refuse_no_pairs(name, tokenizer)
        told = "reads prompt and completion as a pair"
        return _Reader(lambda *row: pair_ids(tokenizer, *row[:2], max_length), max_length, told)
    kind = template.model_copy(update={"kind": "text" if template.kind == "text" else "auto"})
    encoder = Encoder(tokenizer, kind, max_length, max_length, "end", encoder_decoder=encoder_decoder)
    read = read_as_trained if encoder.template.kind == "text" else read_conversation
    told = f"reads prompt and completion as one text, {encoder.described()}"
    return _Reader(lambda *row: Ids(read(encoder, *row[:2], max_length)), max_length, told)


def _of_texts(
    name: str, tokenizer: PreTrainedTokenizerBase, template: TemplateSettings, max_length: int, reads: str | list[str]
) -> _Reader:
    """Reads the texts that `rewards.reads` gives it, one or a pair, with what the row has in their fields.

    Special tokens spelled in these texts are tokens in a single one; those in a row's are if `template` says so.
    """
    setting, ids = f"rewards.reads.{name}", TextIds(tokenizer)
    kept = str if template.special_tokens == "token" else ids.marked
    if not isinstance(reads, str):
        refuse_no_pairs(name, tokenizer)

    def read(prompt: str | Sequence[Message], answer: Answer, row: Mapping[str, Any]) -> Ids:
        texts = texts_of(said(prompt), text_of(answer), row)
        if isinstance(reads, str):
            return cut_ids(ids, filled(reads, texts, setting, kept), max_length)
        return pair_ids(tokenizer, *(filled(one, texts, setting) for one in reads), max_length)

    told = repr(reads) if isinstance(reads, str) else f"{reads[0]!r} and {reads[1]!r} as a pair"
    return _Reader(read, max_length, f"reads {told}")


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
    scorer: RewardModel,
    rows: Sequence[Ids],
    pad_id: int,
    batch_size: int,
    device: torch.device,
    output: _named.Output,
) -> list[float]:
    """One float per row, in the order given; rows of like length run together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    scores = [0.0] * len(rows)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, mask = pad([rows[i].ids for i in batch], pad_id)
        types = pad([rows[i].types for i in batch], 0)[0].to(device) if rows[batch[0]].types else None
        outputs = scorer.outputs(ids.to(device), mask.to(device), types)  # (B, N)
        for i, value in zip(batch, meant(outputs, output).tolist(), strict=True):
            scores[i] = value
    return scores


def meant(outputs: Tensor, output: _named.Output) -> Tensor:
    """(B,) what is meant by one of a classifier's `outputs` (B, N): itself or a probability."""
    if output.means == "probability of all":
        return outputs.softmax(1)[:, output.index]
    column = outputs[:, output.index]
    return column.sigmoid() if output.means == "probability of each" else column
