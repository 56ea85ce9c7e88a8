"""What a start would refuse, of all its steps, told before any begins. Needs no torch.

A start raises the first of it, dry_run=true shows all. Of a later step it is what no earlier one makes: its rows, its
rewards by name, the settings that do not go together. What needs torch, the network or all rows is found by the stages
themselves, as what user's code does: none of it is run here.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from pipeline.config import together
from pipeline.config.deepspeed import offloads, read_ds_config, rounded
from pipeline.config.resolve import Resolved
from pipeline.config.reward_spec import (
    labels,
    parse,
)
from pipeline.config.schema import (
    AuditStage,
    CompareStage,
    EvaluateStage,
    ExportStage,
    GenerateStage,
    RewardStage,
    RlStage,
    SftStage,
    Training,
    WithModel,
)
from pipeline.config.sections import ModelSettings
from pipeline.config.yaml_layers import parse_overrides
from pipeline.errors import UserError
from pipeline.launch import comparison_plan, extensions, going_on, launcher, machine, run_dir
from pipeline.models import place
from stages import inputs
from stages.ahead import Ahead, told
from stages.export_faults import of_export
from stages.reward_faults import of_rewards
from stages.row_faults import of_rows, suits

READ_OF_TRAIN = {  # of train.* by stages that train nothing; the rest is there for those that do
    "generate": ("precision", "zero", "padding_free"),
    "evaluate": ("precision", "zero", "padding_free", "micro_batch_size", "max_tokens"),
}


def of(steps: Sequence[Resolved], environ: Mapping[str, str]) -> list[str]:
    """The lines of all faults, each once. None of a rank of someone's launcher: ranks find out together."""
    if launcher.is_rank(environ):
        return []
    made: list[Path] = []
    lines = of_words(steps[0]) if len(steps) == 1 else []  # of several, a word is for those that read it
    scored: list[str] = []
    for step in steps:
        lines += of_step(step, Ahead(made, environ, scored))
        made.append(run_dir.stage_dir(step.settings, step.stage))
        scored += labels(name for name, _ in parse(step.settings.reward)).values() if step.stage == "score" else []
    return [*dict.fromkeys(lines)]


def refuse(steps: Sequence[Resolved], environ: Mapping[str, str]) -> None:
    """Raises UserError with the first fault, and how many more there are."""
    if lines := of(steps, environ):
        more = f" (and {len(lines) - 1} more: dry_run=true shows them)" if len(lines) > 1 else ""
        raise UserError(lines[0] + more)


def notes(steps: Sequence[Resolved], environ: Mapping[str, str]) -> list[str]:
    """What is allowed, and perhaps not meant."""
    many = [step.settings.launch.processes for step in steps if step.stage in launcher.DISTRIBUTED]
    lines = []
    if machine.gpus(environ) == 0 and max(many, default=1) > 1:
        lines.append(f"launch.processes: no GPU is seen here, so that gpus={max(many)} means so many CPU processes")
    files = dict.fromkeys(step.settings.train.zero for step in steps if isinstance(step.settings, Training))
    for name in files:
        try:
            lines += rounded(name)
        except UserError:  # among the faults
            continue
    return lines


def of_step(step: Resolved, ahead: Ahead) -> list[str]:
    """The faults of one step; of one that is done only whether it may be so."""
    settings, stage = step.settings, step.stage
    if isinstance(settings, CompareStage):
        return of_comparison(settings, step.words, ahead.environ)
    if isinstance(settings, ExportStage):
        return [*of_export(settings, ahead)]
    if stage not in inputs.OF:
        return []
    directory = run_dir.stage_dir(settings, stage)
    found = told(partial(going_on.standing, directory, settings))
    if going_on.finished(directory) and (found or going_on.ended(directory, settings)):
        return found
    if settings.launch.nnodes == 1:  # else another host's command may have opened it for us
        found += told(partial(run_dir.refuse_taken, directory))
    if not found and going_on.begun(directory):
        ranks = partial(launcher.world, settings.launch, stage, ahead.environ)
        found += told(lambda: going_on.refuse_other_ranks(directory, settings, ranks()))
    if isinstance(settings, AuditStage):  # it opens no model, and judges nothing
        return [*found, *of_rows(settings, ahead, lambda rows: None)]
    checks = (of_launch(settings, stage, ahead.environ), of_models(settings, ahead), of_rewards(settings, ahead))
    rows = of_rows(settings, ahead, partial(suits, settings=settings, ahead=ahead))
    return [*found, *(line for lines in checks for line in lines), *rows]


def of_words(step: Resolved) -> list[str]:
    """Words that would make no difference to a step."""
    if (read := READ_OF_TRAIN.get(step.stage)) is None:
        return []
    given = [path for path in parse_overrides(step.words) if path[0] == "train" and path[-1] not in read]
    ours = f"stage={step.stage} reads {', '.join(f'train.{name}' for name in read)} alone"
    cure = f"leave it out; {step.settings.generation.batch_size} prompts are answered at once (generation.batch_size)"
    return [f"{'.'.join(path)}: {ours}: {cure}" for path in given]


def of_comparison(settings: CompareStage, words: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """Those of its steps."""
    try:
        plan = comparison_plan.plan(settings, words)
    except UserError as error:
        return [str(error)]
    return of([task.step for task in plan.tasks], environ)


def of_launch(settings: WithModel, stage: str, environ: Mapping[str, str]) -> Iterator[str]:
    """What the machine lacks, if it is this one that computes, or the settings do not agree about."""
    yield from told(lambda: launcher.command(settings.launch, stage, (), environ))
    unknown = told(partial(launcher.choose, settings.launch, stage, environ))
    here = bool(unknown) or launcher.is_here(settings.launch, stage, environ)
    if isinstance(settings, SftStage | RewardStage | RlStage):
        yield from told(lambda: together.whole_batches(settings.train, launcher.world(settings.launch, stage, environ)))
    gpus, wanted = machine.gpus(environ), settings.launch.processes
    if here and gpus and wanted > gpus and stage in launcher.DISTRIBUTED:
        yield f"launch.processes: gpus={wanted}, but this machine has {gpus} for it: wanted gpus={gpus} at most"
    if here and isinstance(settings, Training | GenerateStage | EvaluateStage):
        yield from told(lambda: together.fp16_on_gpu(settings.train, machine.has_gpu()))
    if isinstance(settings, RlStage | GenerateStage | EvaluateStage) and settings.generation.by_server:
        variable = settings.generation.server.key_variable
        if variable and not environ.get(variable, "").strip():
            problem = f"the environment has no {variable}, wanted the key of {settings.generation.engine}"
            yield f"generation.server.key_variable: {problem}: export {variable}=..."
    if isinstance(settings, EvaluateStage):
        yield from told(lambda: [inputs.spoken(settings, name) for name in inputs.policies(settings)])
    if isinstance(settings, RewardStage) and settings.train.router_aux_loss_coef:
        found = settings.train.router_aux_loss_coef
        yield f"train.router_aux_loss_coef: {found}, but a reward model's router is left as it is: set 0"
    if isinstance(settings, Training):
        zero = read_ds_config(settings.train.zero)["zero_optimization"]
        yield from told(lambda: together.optimizer_fits(settings.optimizer, settings.train, zero))
        if here and settings.model.load_in_4bit:
            yield from of_four_bits(settings, zero["stage"])
        if here and settings.optimizer.name == "adamw_8bit" and not importlib.util.find_spec("bitsandbytes"):
            yield f"optimizer.name: adamw_8bit: {together.NO_BITSANDBYTES}, or set optimizer.name=adamw"
        if here and offloads(zero, "offload_optimizer") and not can_offload(environ):
            yield (
                f"train.zero: {settings.train.zero} offloads the optimizer, for which DeepSpeed compiles code, and "
                f"there is no C++ compiler ({environ.get('CXX', 'c++')}): install one, or wanted a file without offload"
            )


def of_four_bits(settings: SftStage | RewardStage | RlStage, zero_stage: int) -> Iterator[str]:
    """Why a model cannot be read in 4 bits."""
    if isinstance(settings, RewardStage):
        yield "model.load_in_4bit: true, but only policies are read so, wanted false for a reward model"
        return
    if isinstance(settings, SftStage) or settings.start_from != "sft":  # else its path is that of the run's SFT model
        yield from told(lambda: together.four_bits(settings.model, settings.train, zero_stage, machine.has_gpu()))
    if not importlib.util.find_spec("bitsandbytes"):
        yield f"model.load_in_4bit: {together.NO_BITSANDBYTES}"


def can_offload(environ: Mapping[str, str]) -> bool:
    """Whether DeepSpeed's CPU Adam is compiled, or can be."""
    deepspeed = Path(str(importlib.util.find_spec("deepspeed").origin)).parent
    built = (deepspeed / "git_version_info_installed.py").is_file()  # with it perhaps: then it knows better
    compiler = shutil.which(environ.get("CXX", "c++").split()[0])
    return built or bool(compiler) or (extensions.directory(environ) / "cpu_adam/cpu_adam.so").is_file()


def of_models(settings: WithModel, ahead: Ahead) -> Iterator[str]:
    """Models that are not there; and settings of new ones that cannot be."""
    for given in models_of(settings, ahead):
        try:
            model = given()
        except UserError as error:
            yield str(error)
            continue
        if ahead.holds(model.path):
            continue
        if model.path is not None:
            unsound = told(partial(place.check, model.path))
            yield from unsound or of_served(settings, Path(model.path))
        else:
            yield from told(partial(together.heads, model.scratch))
            yield from told(partial(together.adapters, model))
        missing = not any(importlib.util.find_spec(name) for name in ("flash_attn", "kernels"))
        if model.attn_implementation == "flash_attention_2" and missing:
            problem = "flash_attention_2 is of the package flash-attn, which is not installed here"
            yield f"model.attn_implementation: {problem}: install it, or set sdpa"


def of_served(settings: WithModel, model: Path) -> Iterator[str]:
    """Why a server cannot write for a sound `model`; nothing is known of one on the hub."""
    if not isinstance(settings, RlStage | GenerateStage | EvaluateStage) or not settings.generation.by_server:
        return
    config = model / "config.json"
    if config.is_file() and place.read_object(config).get("is_encoder_decoder"):
        problem = f"{settings.generation.engine} with an encoder-decoder ({model}), wanted a causal model"
        yield f"generation.engine: {problem}: set generation.engine=generate"


Given = Callable[[], ModelSettings]  # may raise UserError


def _start(settings: RewardStage | RlStage, ahead: Ahead) -> list[Given]:
    if settings.start_from == "sft" and ahead.makes(settings, "sft"):
        return []
    find = inputs.rl_model if isinstance(settings, RlStage) else run_dir.start_model
    return [partial(find, settings)]


def _policies(settings: GenerateStage | EvaluateStage, ahead: Ahead) -> list[Given]:
    if isinstance(settings, EvaluateStage):
        try:
            places = _compared(settings, ahead)
        except UserError as error:
            return [partial(_refuse, str(error))]
    else:
        places = [settings.policy]
    made = {
        one: any(ahead.makes(settings, name) for name in (["rl", "sft"] if one is None else [one])) for one in places
    }
    return [partial(run_dir.policy_model, settings, one) for one in places if not (made[one] or ahead.holds(one))]


def _compared(settings: EvaluateStage, ahead: Ahead) -> Sequence[str]:
    """Where the policies of an evaluation are; where RL is ahead without sft, what it starts from is checked there."""
    own = ahead.makes(settings, "sft") or run_dir.model_of(settings, "sft") is not None
    if settings.policies is None and ahead.makes(settings, "rl"):
        return ["sft", "rl"] if own else ["rl"]
    return [*inputs.policies(settings).values()]


def _refuse(line: str) -> ModelSettings:
    raise UserError(line)


def models_of(settings: WithModel, ahead: Ahead) -> list[Given]:
    """What gives the models that a stage opens and no earlier step makes."""
    if isinstance(settings, SftStage):
        return [lambda: settings.model]
    if isinstance(settings, RewardStage | RlStage):
        return _start(settings, ahead)
    return _policies(settings, ahead) if isinstance(settings, GenerateStage | EvaluateStage) else []
