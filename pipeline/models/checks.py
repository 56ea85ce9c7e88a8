"""Checks of a checkpoint before anything is computed with it; each mistake is one line."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import UserError
from pipeline.models.place import problem_of

Shapes = dict[str, tuple[int, ...]]  # by the names of weights

HEADS = ("score", "classifier", "classification_head")  # what architectures call their scalar head
NO_LANGUAGE_MODEL = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM", "ForQuestionAnswering")
NO_REWARD_MODEL = "wanted a reward model: train one with bash run.sh stage=reward"
NO_KERNEL = re.compile("does not support (an attention|Flash Attention)")
NO_CLASS = re.compile(r"Unrecognized configuration class <class '(?:\w+\.)*(\w+)Config'>.* AutoModel: (\w+)\.")
# what transformers, tokenizers and peft raise over files that are missing, cut short, or of another kind
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, EOFError)
READ_ERRORS += (SafetensorError, pickle.UnpicklingError)


@contextmanager
def reading(path: str, what: str) -> Iterator[None]:
    """Raises UserError where `what` of the checkpoint at `path` cannot be read."""
    try:
        yield
    except READ_ERRORS as error:
        raise UserError(_unreadable(path, what, error)) from None


def _unreadable(path: str, what: str, error: Exception) -> str:
    """One line for a checkpoint that cannot be read."""
    if problem := problem_of(path):
        return problem
    place = Path(path)
    if not place.exists() and path.count("/") != 1:
        return f"model.path: {path} does not exist, wanted a directory or a Hugging Face name"
    reason = " ".join(str(error).split()) or type(error).__name__
    if NO_KERNEL.search(reason):
        problem = f"{path} cannot be read with this one ({reason[:100]} ...)"
        return f"model.attn_implementation: {problem}, wanted one that its architecture has: set it to eager"
    if found := NO_CLASS.search(reason):
        problem = f"{path} is a {found.group(1)}, of which transformers has no {found.group(2)}"
        return f"model.path: {problem}, wanted an architecture that has one: name another model"
    wanted = "a whole Hugging Face model: save it again, or name another"
    if isinstance(error, ImportError):
        wanted = "the package installed, or model.attn_implementation=sdpa where it is for attention"
    elif "trust_remote_code" in str(error):
        wanted = "a model without code of its own, or trust_remote_code=true if you trust whose it is"
    elif not place.exists():
        wanted = "a directory here, or a Hugging Face name that this machine can reach"
        wanted += " (to see what memory one takes: stage=plan parameters=8B)"
        if "couldn't connect" in reason:
            reason = "huggingface.co does not answer, and no copy is here"
    return f"model.path: the {what} of {path} cannot be read ({reason[:200]}), wanted {wanted}"


def check_kind(path: str, config: PretrainedConfig) -> None:
    """Raises UserError where a language model is wanted and the checkpoint says it is something else."""
    names = config.architectures or []
    if any(name.endswith(NO_LANGUAGE_MODEL) for name in names):
        reward = names[0].endswith("ForSequenceClassification")
        cure = "it may be a reward model: name it in reward=, and here" if reward else "name"
        raise UserError(f"model.path: {path} is a {names[0]}, wanted a language model: {cure} a model that writes text")


def check_report(path: str, report: Mapping[str, Any], model: PreTrainedModel, new_head: bool) -> bool:
    """Whether the scalar head is new, by the report of `from_pretrained`.

    Raises UserError where weights are missing, of another shape, or of layers that the configuration does not have; or
    where the head is missing and a new one is not welcome.
    """
    missing, other = sorted(report["missing_keys"]), "is config.json another model's?"
    heads = [name for name in missing if name.split(".")[0] in HEADS]
    if lost := [name for name in missing if name not in heads]:
        problem = f"lacks {len(lost)} weights ({lost[0]}, ...), wanted all of a {type(model).__name__}: is it whole?"
        raise UserError(f"model.path: {path} {problem}")
    for name, saved, wanted in sorted(report["mismatched_keys"]):
        cure = "a reward model has one output" if name.split(".")[0] in HEADS else other
        raise UserError(f"model.path: {path}: {name} has shape {tuple(saved)}, wanted {tuple(wanted)}: {cure}")
    # of an unexpected weight, a namesake in another layer is expected: the checkpoint has more layers
    layers = {_numberless(name) for name in model.state_dict()}
    if beyond := sorted(name for name in report["unexpected_keys"] if _numberless(name) in layers - {name}):
        problem = f"has weights of more layers than config.json says ({beyond[0]}, ...), wanted as many: {other}"
        raise UserError(f"model.path: {path} {problem}")
    if heads and not new_head:
        raise UserError(f"{path}: no scalar head ({heads[0]} is missing), {NO_REWARD_MODEL}")
    return bool(heads)


def _numberless(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name)


def check_vocabulary(path: str | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError where the tokenizer has tokens that the model has no embedding for."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        problem = f"has {rows} embeddings but its tokenizer has {len(tokenizer)} tokens"
        raise UserError(f"model.path: {path} {problem}, wanted no more tokens than embeddings: is it another model's?")


def positions(model: PreTrainedModel) -> int | None:
    """The longest text that `model` reads as it reads it alone, in tokens; None where there is no end.

    RoBERTa and its kin count from the place after their padding token's, so that the first ones of their table are
    never used. With longrope (Phi-3) one row beyond the places of pretraining turns all others of its batch.
    """
    text = model.config.get_text_config()
    named = text.to_dict()
    limit = named.get(text.attribute_map.get("max_position_embeddings", "max_position_embeddings"))
    if limit is None:
        return None
    if rotates_by_batch(model):
        return min(limit, named["rope_parameters"].get("original_max_position_embeddings", limit))
    tables = (vars(part) for name, part in model.named_modules() if name.endswith("position_embeddings"))
    before = [table["padding_idx"] + 1 for table in tables if table.get("padding_idx") is not None]
    return limit - max(before, default=0)


def rotates_by_batch(model: PreTrainedModel) -> bool:
    """Whether the longest row of a batch decides how all of them are read."""
    return (model.config.get_text_config().to_dict().get("rope_parameters") or {}).get("rope_type") == "longrope"


def check_positions(model: PreTrainedModel, prompt: int, response: int, whole: bool) -> None:
    """Raises UserError where rows may be longer than the model's positions.

    `whole`: prompt and response are read as one text even by an encoder-decoder.
    """
    limit = positions(model)
    apart = model.config.is_encoder_decoder and not whole
    # a decoder reads what generation forces before the response
    forced = int(apart and model.generation_config.forced_bos_token_id is not None)
    longest = max(prompt, response + forced) if apart else prompt + response
    if limit is not None and longest > limit:
        beyond = (
            ", beyond which its longrope reads a row by the longest of its batch" if rotates_by_batch(model) else ""
        )
        read = f"{response} tokens of response{' and BOS' * forced}"
        raise UserError(
            f"data.max_prompt_length: {prompt} and up to {read} are {longest} to read at once, but the model has "
            f"{limit} positions{beyond}, wanted no more: lower data.max_prompt_length, data.max_response_length or "
            "generation.max_new_tokens"
        )


def verify(directory: Path, model: PreTrainedModel | PeftModel, handed: Shapes) -> None:
    """Reopen saved weights: none empty, as many elements as were handed over, and of one name in one shape.

    transformers may write what it holds as one tensor in pieces, such as the experts of a layer. Of adapters each must
    have a shape that was handed over. Raises RuntimeError.
    """
    saved = saved_shapes(directory)
    adapters = isinstance(model, PeftModel)
    for name, shape in saved.items():
        known = shape in handed.values() if adapters else shape == handed.get(name, shape)
        if 0 in shape or not known:
            raise RuntimeError(f"{directory}: {name} was saved with shape {shape}, which no weight of the model has")
    found, wanted = (sum(map(math.prod, shapes.values())) for shapes in (saved, handed))
    if not adapters and found != wanted:
        raise RuntimeError(f"{directory}: {found:,} elements were saved of {wanted:,}")


def saved_shapes(directory: Path) -> Shapes:
    """The shapes of the tensors in a directory's safetensors. Raises RuntimeError where there is none."""
    shapes: Shapes = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as saved:
            shapes |= {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
    if not shapes:
        raise RuntimeError(f"{directory}: no weights were written")
    return shapes
