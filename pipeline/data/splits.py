"""Where a stage's rows lie: which file, or which split of a hub data set, is for training, validation and test."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config.sections import DataSettings
from pipeline.data import hub
from pipeline.data.files import known_ending, stem
from pipeline.data.places import files_of, id_names
from pipeline.errors import UserError

SPLIT_WORDS = {"train": ("train",), "validation": ("validation", "val", "valid", "dev"), "test": ("test",)}
SPLITS = tuple(SPLIT_WORDS)
SHARD = re.compile(r"(?P<before>.*?)(?P<number>\d+)-of-(?P<count>\d+)(?P<ending>\D.*)")  # train-00000-of-00002.parquet

Places = dict[str, dict[str, float]]  # split -> file or hub name -> its weight


def split_places(data: DataSettings) -> Places:
    """The files or hub names of each split, from data.path and data.train, data.validation, data.test, in their order.

    Raises UserError where nothing is named, and as `files_of`.
    """
    given = {split: getattr(data, split) for split in SPLITS if getattr(data, split) is not None}
    named = {split: files_of(f"data.{split}", one) for split, one in given.items()}
    if data.path is not None:
        found = split_files(data.path, data.files)
        named = {**{split: dict.fromkeys(files, 1.0) for split, files in found.items()}, **named}
    if not named:
        raise UserError(
            "data: none is named, wanted rows to learn from: give data.train=FILE, data.path=DIRECTORY "
            "or data.task=assistant"
        )
    return named


def id_names_of(places: Places) -> dict[str, str]:
    """File -> what the ids of its rows begin with, whichever splits are asked for; the first that has it decides."""
    found: dict[str, str] = {}
    for files in reversed(places.values()):
        found |= id_names([*files])
    return found


def origins(data: DataSettings, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """split -> the files or hub names its rows are read from; validation is cut from train where it has none.

    Raises UserError as `split_places`, and for a split that is not there.
    """
    places = split_places(data)
    cut = "train" in places and data.validation_fraction > 0
    for name in names:
        if name not in places and not (cut and name == "validation"):
            raise UserError(f"data: there is no {name} split, only {', '.join(places)}: give data.{name}=")
    return {name: tuple(places[name] if name in places else places["train"]) for name in names}


def read_from(data: DataSettings, **places: str) -> DataSettings:
    """`data` with rows that an earlier stage left at `places` (path, or splits): they need no filter any more."""
    nowhere = {"path": None, "files": None, "task": None, "task_size": None, **dict.fromkeys(SPLITS)}
    return data.model_copy(
        update={
            **nowhere,
            "format": None,
            "columns": {},
            "exclude": [],
            "drop_abrupt": False,
            "sources": None,
            "streaming": False,
            **places,
        }
    )


def split_files(path: str, word: str | None = None) -> dict[str, tuple[str, ...]]:
    """{"train": files, "validation": files, "test": files}, the latter two where there are any; several only of shards.

    A file belongs to a split if its stem is the split's word, or else begins or ends with it as a word of its own
    (`pairs_train.jsonl.gz`, `train-00000-of-00001.parquet`). A file as `path` is the training file; a hub name without
    split is searched for its splits. With `word`, only files of a folder that have it as a word of their name count.
    Raises UserError, listing the folder, where there is no training file or where several would do, and for a `word`
    without a folder.
    """
    folder = Path(path)
    if word is not None and not folder.is_dir():
        raise UserError(f"data.files: {word} chooses among the files of a folder, but {path} is none: data.files=null")
    if hub.is_hub_name(path):
        return _hub_splits(path)
    if folder.is_file():
        return {"train": (path,)}
    if not folder.is_dir():
        raise UserError(f"{path}: no such file or folder, wanted data; name it with data.path= or data.train=")
    files = [file.name for file in folder.iterdir() if file.is_file() and known_ending(file.name)]
    names = sorted(name for name in files if word is None or word in _words(name))
    found = {split: _file_or_shards(path, split, names) for split in SPLIT_WORDS}
    splits = {split: tuple(str(folder / name) for name in some) for split, some in found.items() if some}
    if "train" not in splits:
        raise UserError(
            f"{path}: no training file among {_listed(names)}, wanted one called train.*; name it with data.train="
        )
    return splits


def _file_or_shards(path: str, split: str, names: Sequence[str]) -> list[str]:
    """The one file whose stem is a word of the split, or else the one that begins or ends with such a word, if any.

    All shards of one set count as one. Raises UserError for several others, and for shards of which some are missing.
    """
    words = {*SPLIT_WORDS[split]}
    exact = [name for name in names if stem(name).lower() in words]
    matching = exact or [name for name in names if words & {*_words(name)[:1], *_words(name)[-1:]}]
    sets = {
        name: shard.group("before", "count", "ending") if (shard := SHARD.fullmatch(name)) else name
        for name in matching
    }
    if len({*sets.values()}) > 1:
        some = ", ".join(str(Path(path) / name) for name in matching[:2])
        raise UserError(
            f"{path}: {len(matching)} files for {split} ({', '.join(matching)}) among {_listed(names)}, wanted one; "
            f"name it with data.{split}=, or several with data.{split}='[{some}]'"
        )
    if matching and matching[0] != sets[matching[0]]:
        _refuse_missing(path, split, matching)
    return matching


def _refuse_missing(path: str, split: str, shards: Sequence[str]) -> None:
    """Raises UserError where a set of shards, counted from 0 or from 1, has not all of them."""
    parts: list[Mapping[str, str]] = [SHARD.fullmatch(name).groupdict() for name in shards]
    numbers, count = [int(part["number"]) for part in parts], int(parts[0]["count"])
    first = 1 if count in numbers else 0
    missing = sorted({*range(first, first + count)} - {*numbers})
    if missing:
        raise UserError(
            f"{path}: {len(shards)} of the {count} shards of {split} ({', '.join(shards)}), number {missing[0]} is "
            f"missing, wanted all: fetch it, or name those that are there with data.{split}="
        )


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", stem(name).lower())


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "(no data files)"


def _hub_splits(path: str) -> dict[str, str]:
    if hub.parse(path).split:
        return {"train": (path,)}
    there = hub.split_names(path)
    names = {split: next((word for word in words if word in there), None) for split, words in SPLIT_WORDS.items()}
    if names["train"] is None:
        raise UserError(
            f"{path}: no split 'train' among {_listed(there)}; name one with data.train={hub.of_split(path, 'SPLIT')}"
        )
    return {split: (hub.of_split(path, name),) for split, name in names.items() if name}
