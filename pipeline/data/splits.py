"""Where a stage's rows lie: which file, or which split of a hub data set, is for training, validation and test."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.sections import DataSettings
from pipeline.data import hub
from pipeline.data.files import known_ending, stem
from pipeline.errors import UserError

SPLIT_WORDS = {"train": ("train",), "validation": ("validation", "val", "valid", "dev"), "test": ("test",)}
SPLITS = tuple(SPLIT_WORDS)


def split_places(data: DataSettings) -> dict[str, str]:
    """split -> file or hub name, from data.path and data.train, data.validation, data.test.

    Raises UserError where nothing is named.
    """
    named = {split: getattr(data, split) for split in SPLITS if getattr(data, split) is not None}
    if data.path is not None:
        named = {**split_files(data.path, data.files), **named}
    if not named:
        raise UserError(
            "data: none is named, wanted rows to learn from: give data.train=FILE, data.path=DIRECTORY "
            "or data.task=assistant"
        )
    return named


def origins(data: DataSettings, names: Sequence[str]) -> dict[str, str]:
    """split -> the file or hub name that its rows are read from; validation is cut from train where it has none.

    Raises UserError as `split_places`, and for a split that is not there.
    """
    places = split_places(data)
    cut = "train" in places and data.validation_fraction > 0
    for name in names:
        if name not in places and not (cut and name == "validation"):
            raise UserError(f"data: there is no {name} split, only {', '.join(places)}: give data.{name}=")
    return {name: places.get(name, places.get("train")) for name in names}


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
            **places,
        }
    )


def split_files(path: str, word: str | None = None) -> dict[str, str]:
    """{"train": file, "validation": file, "test": file}, the latter two where there are any.

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
        return {"train": path}
    if not folder.is_dir():
        raise UserError(f"{path}: no such file or folder, wanted data; name it with data.path= or data.train=")
    files = [file.name for file in folder.iterdir() if file.is_file() and known_ending(file.name)]
    names = sorted(name for name in files if word is None or word in _words(name))
    splits = {split: str(folder / name) for split in SPLIT_WORDS if (name := _only_file(path, split, names))}
    if "train" not in splits:
        raise UserError(
            f"{path}: no training file among {_listed(names)}, wanted one called train.*; name it with data.train="
        )
    return splits


def _only_file(path: str, split: str, names: Sequence[str]) -> str | None:
    """The one file whose stem is a word of the split, or else the one that begins or ends with such a word."""
    words = {*SPLIT_WORDS[split]}
    exact = [name for name in names if stem(name).lower() in words]
    matching = exact or [name for name in names if words & {*_words(name)[:1], *_words(name)[-1:]}]
    if len(matching) > 1:
        raise UserError(
            f"{path}: {len(matching)} files for {split} ({', '.join(matching)}) among {_listed(names)}, wanted one; "
            f"name it with data.{split}="
        )
    return matching[0] if matching else None


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", stem(name).lower())


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "(no data files)"


def _hub_splits(path: str) -> dict[str, str]:
    if hub.parse(path).split:
        return {"train": path}
    there = hub.split_names(path)
    names = {split: next((word for word in words if word in there), None) for split, words in SPLIT_WORDS.items()}
    if names["train"] is None:
        raise UserError(f"{path}: no split 'train' among {_listed(there)}; name one with data.train={path}:split")
    return {split: f"{path}:{name}" for split, name in names.items() if name}
