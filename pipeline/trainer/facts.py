"""What a model's card says, gathered from the stage that trained it: settings, rows, fingerprints, numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from peft import PeftModel

from pipeline.config.reward_spec import is_address
from pipeline.config.schema import STAGES, RewardStage, RlStage, Training
from pipeline.config.sections import DataSettings
from pipeline.config.shipped import shipped
from pipeline.config.yaml_layers import ROOT, first_comment
from pipeline.data import hub
from pipeline.files import CARD, flatten, read_metrics
from pipeline.launch.going_on import CONFIG, INPUTS
from pipeline.launch.provenance import PACKAGES
from pipeline.models.card import Facts
from pipeline.models.loading import hugging_face
from pipeline.models.trained_input import INPUT_FILE
from pipeline.trainer.model import Model

UNSAID = ("run", "name", "runs_dir", "algo", "scored", "launch.", "model.path", "model.revision", "data.task")
PLACES = ("path", "train", "validation", "test")  # of data
UNSAID += tuple(f"data.{name}" for name in PLACES)
SHOWN = ("loss", "perplexity", "accuracy", "accuracies", "scores/mean", "scores/std")  # the ends of tags
SHOWN += ("eval/reward", "completions/clipped_ratio")
BASE = re.compile(r"^base_model: (\S+)$", re.MULTILINE)  # in a card
SHARE = 12  # characters of a fingerprint that people compare


def facts_of(settings: Training, model: Model, directory: Path, results: Mapping[str, Any], asked: bool) -> Facts:
    """The facts of what `model` has become; `results` are those of the kept weights, `asked`: see `save_input`."""
    stage = next(name for name, records in STAGES.items() if type(settings) in records)
    lm, encoder = model.engine.module.model, model.encoder
    method = settings.algo if isinstance(settings, RlStage) else stage
    file = ROOT / "stages" / ("algo" if stage == "rl" else "") / f"{method}.yaml"
    kind = "encoder_decoder" if encoder.encoder_decoder else "chat" if asked else "text"
    start, base = began(Path(hugging_face(lm).name_or_path or "."))
    end = encoder.tokenizer.convert_ids_to_tokens(encoder.eos_id)
    return Facts(
        name="/".join(directory.parts[-2 if settings.name is None else -3 :]),
        kind="reward" if stage == "reward" else kind,
        adapters=isinstance(lm, PeftModel),
        start=start,
        base=base,
        method=nameless(method),
        described=first_comment(file) if file.is_file() else "",
        datasets=tuple(
            dict.fromkeys(hub.parse(one).repository for one in _places(settings.data) if hub.is_hub_name(one))
        ),
        data=_data(settings, directory),
        settings=changed(settings, stage),
        results=_numbers(directory, results),
        step=results["model_step"],
        steps=results["steps"],
        reads=encoder.described(),
        example=encoder.prompt_text("PROMPT") + encoder.response_text("RESPONSE") + end,
        scale=_scale(settings, results, encoder.tokenizer.pad_token) if stage == "reward" else None,
        versions={name: metadata.version(name) for name in PACKAGES},
    )


def began(start: Path) -> tuple[str, str | None]:
    """What training began with, in words; and the hub name of that, or of what it was made of by stages of ours."""
    if start == Path():
        return "a small new model, made for these rows", None
    if not start.exists():
        return str(start), str(start)
    if not (start / INPUT_FILE).is_file():
        return start.name, None
    found = BASE.search((start / CARD).read_text("utf-8")) if (start / CARD).is_file() else None
    ours = (start.parent / CONFIG).is_file()  # else it was moved, and the folders above are somebody's own
    return "/".join(start.parts[-3:]) if ours else start.name, found and found.group(1)


def _places(data: DataSettings) -> list[str]:
    given = [place for name in PLACES if (place := getattr(data, name)) is not None]
    return [place for one in given for place in ([one] if isinstance(one, str) else one)]


def _data(settings: Training, directory: Path) -> dict[str, str]:
    """The rows by the names of their files, how many, and the beginnings of the fingerprints of what went in."""
    rows = settings.data.task and f"the built-in task {nameless(settings.data.task)}"
    if isinstance(settings, RlStage) and settings.scored is not None:
        rows = nameless(settings.scored)
    named = dict.fromkeys(map(nameless, _places(settings.data)))
    said = {"data": rows or ", ".join(named) or "rows of the run's earlier stages"}
    if (counted := directory / "data.json").is_file():
        counts = json.loads(counted.read_text("utf-8"))
        said["rows"] = ", ".join(f"{split} {one['rows']:,} ({one['tokens']:,} tokens)" for split, one in counts.items())
    noted = directory / INPUTS
    marks = json.loads(noted.read_text("utf-8")) if noted.is_file() else {}
    sha = [(nameless(name), mark) for name, mark in marks.items() if re.fullmatch("[0-9a-f]{64}", mark)]
    return said | ({"sha256": ", ".join(f"{name} `{mark[:SHARE]}`" for name, mark in sha)} if sha else {})


def changed(settings: Training, stage: str) -> dict[str, object]:
    """The settings that are not what ships for the stage and its algorithm."""
    now = flatten(settings.model_dump(), ".")
    defaults = shipped(stage, now)
    given = {name: value for name, value in now.items() if value != defaults.get(name)}
    given = {name: value for name, value in given.items() if not name.startswith(UNSAID)}
    # the template is text, in which a / is no folder's
    return {nameless(name): value if name.startswith("template.") else nameless(value) for name, value in given.items()}


def nameless(value: Any) -> Any:
    """Without folders and hosts of this machine where it is a path or an address, or a reward's name with one."""
    if isinstance(value, list):
        return [nameless(one) for one in value]
    if not isinstance(value, str):
        return value
    before, place = re.fullmatch(r"(reward[. ])?(.*)", value, re.DOTALL).groups("")
    if is_address(place):
        place = "a server"
    return before + (place if hub.is_hub_name(place) else place.rstrip("/").rpartition("/")[2])


def _numbers(directory: Path, results: Mapping[str, Any]) -> dict[str, tuple[float | None, float | None]]:
    """Held-out numbers before the first step, and of these weights."""
    first = next((row for row in read_metrics(directory / "metrics.jsonl") if row["step"] == 0), {})
    tags = [tag for tag in results if tag.startswith("eval/") and tag.endswith(SHOWN)]
    return {tag: (first.get(tag), results[tag]) for tag in tags}


def _scale(settings: RewardStage, results: Mapping[str, Any], pad: str) -> str:
    """What a score means."""
    means = "the reward that the rows were annotated with"
    if settings.algorithm.settings["objective"] != "regression":
        means = "without a unit: the sigmoid of a difference is the chance that people prefer the one to the other"
    spread = ""
    if "eval/scores/mean" in results:
        spread = " On held-out answers it is {eval/scores/mean:.3g} on average, with a standard deviation of "
        spread = (spread + "{eval/scores/std:.3g}.").format_map(results)
    raw = "Give it whole texts, the end included, alone or padded with"
    return f"The score is the raw logit (`num_labels` 1), {means}.{spread} {raw} `{pad}` on the right."
