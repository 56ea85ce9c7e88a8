"""LoRA: fresh adapters on a model, also on one that came with adapters; and what a directory of them belongs to.

Adapters upon adapters are saved as one, which belongs to the model below all of them, so that peft needs nothing else.
While a model is trained or read, those it came with stay beside its weights, since bfloat16 weights would round away
part of a small change.
"""

from __future__ import annotations

import copy
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.config.sections import LoraSettings, ModelSettings
from pipeline.errors import UserError
from pipeline.models.checks import HEADS, reading
from pipeline.models.factors import Factors, factors_of, joined, placed, uniform
from pipeline.models.late import Late, as_if_read
from pipeline.models.place import check_files

logger = logging.getLogger("tiffin")

BASE = "lora_base"  # the directory beside adapters that belong to no other
TRAINED, BELOW = "default", "below"  # what peft calls the fresh adapters, and those that the model came with
# what adapters may differ in from peft's defaults and still be no more than a product of two matrices
SHAPES = {"r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"}
SHAPES |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
NAMES = {"peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"}
ALSO = {"inference_mode", "modules_to_save", "trainable_token_indices", "init_lora_weights"}
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # the others change the weights below, too


@dataclass(frozen=True)
class Base:
    """What fresh adapters belong to, and the adapters that lie on it already."""

    path: str | None  # a hub name or an absolute directory; None where no directory holds it
    revision: str | None = None
    factors: Factors = field(default_factory=dict)  # names are those within the model's body
    tokens: tuple[int, ...] = ()  # whose embeddings they trained: those lie in the model


def with_lora(
    model: PreTrainedModel,
    base: Base,
    lora: LoraSettings | None,
    task: str,
    tokens: Sequence[int] = (),
    late: Late | None = None,
) -> PreTrainedModel | PeftModel:
    """The model with its own adapters, if it came with some, and what `lora` asks for.

    Args:
        lora: r > 0: fresh adapters, the model's own weights frozen but for the embeddings of `tokens`; r = 0: all
            weights are trained, so that its own adapters are added to them; None: it is only read.
        late: weights are in their files still: what is added to them is noted there.
    """
    own = uniform(placed(base.factors, model))
    if lora is None:
        return _with_own(model, own, task) if own else model
    if lora.r == 0:
        return merged(model, base, late)
    with as_if_read(model, late):
        adapted = _with_fresh(model, base, lora, task, tokens)
    if base.path is None:
        logger.info(f"model.lora: no directory holds the model below the adapters: it is saved as {BASE}/ beside them")
    if own:
        ranks = f"{lora.r} new ranks are saved as one with the {len(next(iter(own.values()))[0])} it came with"
        logger.info(f"model.lora: {ranks}, for {base.path or BASE + '/'}")
        adapted.add_adapter(BELOW, _config_of(own, task))
        _fill(adapted, own)
        for layer in adapted.modules():
            if isinstance(layer, LoraLayer):
                layer.set_adapter([name for name in (BELOW, TRAINED) if name in layer.scaling])
        adapted.set_requires_grad(BELOW, requires_grad=False)
    return adapted


def merged(model: PreTrainedModel, base: Base, late: Late | None = None) -> PreTrainedModel:
    """The model with its own adapters added to its weights; with `late`, to be added."""
    own = uniform(placed(base.factors, model))
    if not own:
        return model
    warn_of_rounding(model.dtype if late is None else late.dtype, model.name_or_path)
    at_once = late or Late(model.dtype)
    at_once.sums.update(_sums(model, own))
    for parameter in list(at_once.sums) if late is None else ():
        parameter.data = at_once.whole(parameter)
    return model


def _sums(model: PreTrainedModel, factors: Factors) -> dict[nn.Parameter, tuple[Tensor, Tensor]]:
    """Weight -> two matrices whose product adapters add to it; some layers keep theirs transposed.

    Raises UserError where a weight is also that of another layer, which the adapters leave as it is.
    """
    found = {}
    owners = Counter(id(one) for _, one in model.named_parameters(remove_duplicate=False))
    for name, (down, up) in factors.items():
        layer = model.get_submodule(name)
        if owners[id(layer.weight)] > 1:
            problem = f"its adapters change {name} alone, whose weight is tied to another's"
            cure = "set lora_r=16 to train adapters beside them, or start from what stage=export makes of it"
            raise UserError(f"model.path: {model.name_or_path}: {problem}, so that they cannot be added to it: {cure}")
        found[layer.weight] = (down.T, up.T) if isinstance(layer, nn.Embedding | Conv1D) else (up, down)
    return found


@contextmanager
def frozen_as_before(model: PreTrainedModel) -> Iterator[None]:
    """Let peft leave no weight frozen that was not."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def _with_own(model: PreTrainedModel, own: Factors, task: str | None) -> PeftModel:
    """The model with its own adapters beside its weights, all frozen."""
    adapted = get_peft_model(model, _config_of(own, task), BELOW)
    _fill(adapted, own)
    return adapted.requires_grad_(False)


def _with_fresh(model: PreTrainedModel, base: Base, lora: LoraSettings, task: str, tokens: Sequence[int]) -> PeftModel:
    """The model with fresh adapters only, which belong to `base`."""
    carried = sorted({*tokens, *base.tokens})
    model.name_or_path = base.path or ""
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type=task,
        modules_to_save=[*HEADS] if task == "SEQ_CLS" else None,
        trainable_token_indices=carried or None,
        revision=base.revision,
    )
    try:
        adapted = get_peft_model(model, config)
    except (TypeError, ValueError) as error:  # the former where the embeddings are among the targets, beside `tokens`
        problem = str(error).splitlines()[0].split(". ")[0]
        matrices = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
        names = ", ".join(sorted({name.rpartition(".")[2] for name in matrices}))
        raise UserError(f"model.lora.target_modules: {problem}, wanted all-linear, or some of {names}") from None
    found = adapted.active_peft_config
    if isinstance(found.target_modules, set):  # whose order changes from process to process
        found.target_modules = sorted(found.target_modules)
    if not tokens:  # nothing to learn about embeddings that are only carried along
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "trainable_tokens_delta" not in name)
    return adapted


def warn_of_rounding(dtype: torch.dtype, path: str) -> None:
    """Adapters are added to weights in `dtype`, whose rounding may be larger than they are."""
    if dtype != torch.float32:
        kind = str(dtype).removeprefix("torch.")
        problem = f"{path}: its adapters are added to {kind} weights, and what is below their rounding is lost"
        logger.warning(f"{problem}: set precision=fp32, or lora_r to train adapters beside them")


def _config_of(factors: Factors, task: str | None) -> LoraConfig:
    """The description of adapters of these matrices; their scale is 1."""
    rank = len(next(iter(factors.values()))[0])
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=list(factors), task_type=task)


def _fill(model: PeftModel, factors: Factors) -> None:
    """Write `factors` into the adapters that the model came with."""
    for name, (down, up) in factors.items():
        layer = model.get_base_model().get_submodule(name)
        if BELOW in layer.lora_embedding_A:
            layer.lora_embedding_A[BELOW].data, layer.lora_embedding_B[BELOW].data = down, up
        else:
            layer.lora_A[BELOW].weight.data, layer.lora_B[BELOW].weight.data = down, up


# directories of adapters


def adapter_of(settings: ModelSettings) -> PeftConfig | None:
    """The description of the adapters in `settings.path`, if an earlier stage with LoRA left some there."""
    if settings.path is None or not (Path(settings.path) / "adapter_config.json").is_file():
        return None
    check_files(settings.path)
    with reading(settings.path, "adapter_config.json"):
        adapter = PeftConfig.from_pretrained(settings.path)
    if not any(Path(settings.path).glob("adapter_model.*")):
        problem = "has adapter_config.json, but no adapter_model.safetensors, wanted both: copy it again"
        raise UserError(f"model.path: {settings.path} {problem}")
    if adapter.base_model_name_or_path is None:
        raise UserError(f"model.path: the adapters of {settings.path} do not say what model they belong to")
    return adapter


def layers_of(settings: ModelSettings) -> tuple[list[tuple[str, PeftConfig]], ModelSettings]:
    """The directories of adapters that make up the model of `settings`, lowest first, and the model below them.

    Raises UserError where they name each other, or a directory that is not there.
    """
    layers: list[tuple[str, PeftConfig]] = []
    while (adapter := adapter_of(settings)) is not None:
        at, base = settings.path, adapter.base_model_name_or_path
        layers.insert(0, (at, adapter))
        if base in [path for path, _ in layers]:
            problem = f"the adapters of {at} name themselves as the model below them"
            raise UserError(f"model.path: {problem}, wanted another")
        if Path(base).is_absolute() and not Path(base).is_dir():
            problem = f"{base} does not exist, to which the adapters of {at} belong"
            raise UserError(f"model.path: {problem}, wanted it there: or write its new place into adapter_config.json")
        settings = settings.model_copy(update={"path": base, "revision": adapter.revision})
    return layers, settings


def place(path: str | None) -> str | None:
    """A hub name as it is, a directory so that it is found from everywhere."""
    return str(Path(path).absolute()) if path is not None and Path(path).is_dir() else path


def is_plain(adapter: PeftConfig) -> bool:
    """Whether adapters are nothing but a product of two matrices per layer, a scalar head and embeddings of tokens."""
    if not isinstance(adapter, LoraConfig):
        return False
    usual = LoraConfig()
    changed = {f.name for f in fields(adapter) if vars(adapter)[f.name] != vars(usual)[f.name]}
    return (
        changed <= SHAPES | NAMES | ALSO
        and {*(adapter.modules_to_save or ())} <= {*HEADS}
        and not isinstance(adapter.trainable_token_indices, dict)
        and adapter.init_lora_weights in PLAIN_STARTS
    )


def tokens_of(adapter: PeftConfig) -> list[int]:
    """The tokens whose embeddings adapters were trained with."""
    trained = adapter.to_dict().get("trainable_token_indices") or []
    lists = trained.values() if isinstance(trained, dict) else [trained]
    return [index for indices in lists for index in indices]


def taken_out(opened: PeftModel, base: Base) -> tuple[PreTrainedModel, Base]:
    """The model without the plain adapters (see `is_plain`) it was opened with, and those on top of `base`'s.

    The rest of what they brought, a scalar head and embeddings of tokens, stays in the model.
    """
    prefix = opened.get_base_model().base_model_prefix + "."
    own = factors_of(opened, opened.state_dict(), TRAINED)
    names = {name: name.removeprefix("base_model.model.").removeprefix(prefix) for name in own}
    for layer in list(opened.modules()):
        if isinstance(layer, LoraLayer):
            layer.delete_adapter(TRAINED)
    tokens = {*base.tokens, *tokens_of(opened.peft_config[TRAINED])}
    factors = joined(base.factors, {names[name]: pair for name, pair in own.items()})
    return opened.merge_and_unload(), replace(base, factors=factors, tokens=tuple(sorted(tokens)))


# what is saved


def exported(model: PeftModel, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], LoraConfig]:
    """`weights` of `model` with all its adapters in one, and what describes that one."""
    config = copy.deepcopy(model.peft_config[TRAINED])
    if BELOW not in model.peft_config:
        return dict(weights), config
    factors = uniform(joined(factors_of(model, weights, BELOW), factors_of(model, weights, TRAINED)))
    rest = {name: weight for name, weight in weights.items() if ".lora_" not in name}
    for name, (down, up) in factors.items():
        embedding = isinstance(model.get_submodule(name).get_base_layer(), nn.Embedding)
        kind, end = ("lora_embedding_", "") if embedding else ("lora_", ".weight")
        rest |= {f"{name}.{kind}A.{TRAINED}{end}": down, f"{name}.{kind}B.{TRAINED}{end}": up}
    config.r = config.lora_alpha = len(next(iter(factors.values()))[0])
    config.target_modules = _targets(model, [name.removeprefix("base_model.model.") for name in factors])
    return rest, config


def _targets(model: PeftModel, names: Sequence[str]) -> list[str]:
    """How peft and others name the layers: by their last words, if these mean no others."""
    words = {name.rpartition(".")[2] for name in names}
    matrices = (nn.Linear, nn.Embedding, LoraLayer)
    modules = (name for name, part in model.get_base_model().named_modules() if isinstance(part, matrices))
    meant = {name for name in modules if name.rpartition(".")[2] in words}
    return sorted(words if meant == {*names} else names)


def name_base(model: PreTrainedModel | PeftModel, directory: Path) -> None:
    """Let the adapters that are saved to `directory` belong to the model beside it, where they belong to no other."""
    if isinstance(model, PeftModel) and (own := model.peft_config[TRAINED]).base_model_name_or_path is None:
        own.base_model_name_or_path = str(directory.with_name(BASE).absolute())


def is_added(name: str) -> bool:
    """Whether a weight of a model with adapters is not one of the model below."""
    return any(part in name for part in (".lora_", ".trainable_tokens_", ".modules_to_save."))


def name_below(name: str) -> str:
    """What the model below adapters calls its weight `name`."""
    # experts have one wrapper in another, for each of their tensors that is adapted
    wrapper = r"(?:\.(?:token_adapter|base_layer|original_module))+\."
    return re.sub(wrapper, ".", name.removeprefix("base_model.model."))
