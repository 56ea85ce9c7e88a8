"""The classifiers that `reward=` names: DIR, DIR:label, or owner/name[@revision][:label] on the hub. Needs no torch.

transformers gives a classifier without labels in its config.json two, LABEL_0 and LABEL_1: it leaves them out there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline.errors import UserError, did_you_mean
from pipeline.files import fingerprint
from pipeline.models.place import read_object

_HUB = re.compile(r"(?P<path>(?P<owner>[\w-][\w.-]*)/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?::(?P<label>.+))?")
_WRITERS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel", "ForMaskedLM")
Means = Literal["score", "probability of all", "probability of each"]


class NamedModel(NamedTuple):
    """Where a classifier lies, a directory or a hub name, and which of its outputs is the reward."""

    path: str
    label: str | None = None
    revision: str | None = None


class Output(NamedTuple):
    """One of a classifier's `count` outputs: its number, and what it is."""

    index: int
    count: int
    means: Means


def parts(name: str) -> NamedModel | None:
    """The parts of a classifier's name; None for what names none: no such directory, nor formed like a hub name."""
    before, _, label = name.rpartition(":")
    if _is_model(name):
        return NamedModel(name)
    function = (Path(__file__).parent / f"{before}.py").is_file()  # rouge:rougeL, whatever else is called rouge
    if before and _is_model(before) and not function:
        return NamedModel(before, label)
    matched = _HUB.fullmatch(name)
    if matched is None or matched["path"].endswith(".py") or name.endswith(".py"):
        return None
    if Path(matched["path"]).exists() or Path(matched["owner"]).exists():
        return None
    return NamedModel(*matched.group("path", "label", "revision"))


def label_of(name: str) -> str | None:
    """The label that a classifier's name ends with."""
    model = parts(name)
    return None if model is None else model.label


def _is_model(place: str) -> bool:
    return (Path(place) / "config.json").is_file()


def located(model: NamedModel) -> NamedModel:
    """`model` with the commit that its revision is now, where it is on the hub. Raises UserError."""
    return model if Path(model.path).is_dir() else model._replace(revision=_config(model).parent.name)


def config(model: NamedModel) -> dict[str, Any]:
    """Its config.json; of a directory without one, which has adapters alone, nothing. Raises UserError."""
    place = Path(model.path)
    if not place.is_dir():
        return read_object(_config(model))
    return read_object(place / "config.json") if _is_model(model.path) else {}


def _config(model: NamedModel) -> Path:
    """The file in the hub's cache, in a folder named by its commit; fetched where need be. Raises UserError."""
    from huggingface_hub import hf_hub_download  # takes a while, and few need it
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model.path, "config.json", revision=model.revision))
    except LocalEntryNotFoundError:
        reason = "it is not in the hub's cache here, and the hub does not answer (or HF_HUB_OFFLINE is set)"
    except EntryNotFoundError:
        reason = "it has no config.json"
    except (OSError, ValueError) as error:  # not there, not allowed, no such revision, no such name
        reason = " ".join(str(error).split())[:200]
    at = f"@{model.revision}" if model.revision else ""
    cure = "a directory that is here, or a model on the hub that this machine can reach"
    raise UserError(
        f"reward {model.path}{at}: no such file or directory, and as a model on the hub: {reason}, wanted {cure}"
    )


def mark(name: str) -> str | None:
    """A fingerprint of a classifier: of a directory's files, or of a hub's name and commit. None for another reward."""
    if (model := parts(name)) is None:
        return None
    whole = located(model)
    return fingerprint(whole.path if whole.revision is None else f"{whole.path}@{whole.revision}")


def check(name: str) -> None:
    """Raises UserError where a classifier that is here has no such label. The hub is not asked."""
    model = parts(name)
    if model is not None and Path(model.path).is_dir():
        output(model)


def check_reads(reads: str | list | Mapping[str, Any], names: Collection[str], trained: Collection[str]) -> None:
    """Raises UserError where `rewards.reads` names what is none of the rewards `names`, or no classifier."""
    for name in reads if isinstance(reads, Mapping) else ():
        if name not in names:
            found = ", ".join(names) or "none"
            raise UserError(f"rewards.reads.{name}: no such reward, wanted one of {found}{did_you_mean(name, names)}")
        if name in trained or parts(name) is None:
            raise UserError(
                f"rewards.reads.{name}: no classifier from elsewhere, wanted it left out: its input is fixed"
            )


def output(model: NamedModel) -> Output:
    """Which output is the reward. Raises UserError, with the labels, where none or no such one is named."""
    found = config(model)
    labels = _labels(found)
    if model.label is None and len(labels) > 1:
        first = f"{model.path}:{labels[0]}"
        problem = f"a classifier with {len(labels)} labels ({_listed(labels)})"
        raise UserError(f"reward {model.path}: {problem}, wanted one of them: name it, as in reward={first}")
    return Output(0 if model.label is None else _index(model, labels), len(labels), _means(found, len(labels)))


def _labels(found: dict[str, Any]) -> list[str]:
    """The names of the outputs, in their order; a single one where nothing is said of a head."""
    written = [str(one) for one in found.get("architectures") or ()]
    if any(one.endswith(_WRITERS) for one in written):  # without a head, whatever labels it was saved with
        return ["LABEL_0"]
    if isinstance(named := found.get("id2label"), dict) and named:
        return [str(named[number]) for number in sorted(named, key=int)]
    heads = any(one.endswith("ForSequenceClassification") for one in written)
    return [f"LABEL_{i}" for i in range(found.get("num_labels") or (2 if heads else 1))]


def _index(model: NamedModel, labels: list[str]) -> int:
    """The number of a label by its name, in whatever case, or by its number."""
    asked = model.label or ""
    for same in (str, str.casefold):
        matching = [i for i, label in enumerate(labels) if same(label) == same(asked)]
        if len(matching) == 1:
            return matching[0]
    if asked.isdecimal() and int(asked) < len(labels):
        return int(asked)
    hint = did_you_mean(asked, labels)
    raise UserError(f"reward {model.path}:{asked}: no such label, wanted one of {_listed(labels)}{hint}")


def _means(found: dict[str, Any], count: int) -> Means:
    if found.get("problem_type") == "regression" or count == 1:
        return "score"
    return "probability of each" if found.get("problem_type") == "multi_label_classification" else "probability of all"


def _listed(labels: list[str]) -> str:
    return ", ".join(labels[:20]) + (f" ... {labels[-1]}" if len(labels) > 20 else "")
