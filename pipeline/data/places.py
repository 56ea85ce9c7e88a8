"""Which files a setting such as data.train names: one, those that a pattern matches, a list, or some with weights."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.data import hub
from pipeline.data.files import stem
from pipeline.errors import UserError, did_you_mean

MAGIC = re.compile(r"[*?\[]")  # what makes a pattern of a name
LISTED = 12  # names in a message

Given = str | Sequence[str] | Mapping[str, float]


def files_of(setting: str, given: Given) -> dict[str, float]:
    """File or hub name -> its weight, 1 where none is given; in the order named, those of one pattern sorted.

    `setting` is what messages call it. Raises UserError for a pattern that nothing matches and a file named twice.
    """
    if isinstance(given, Mapping):
        named = [*given.items()]
    else:
        named = [(one, 1.0) for one in ([given] if isinstance(given, str) else given)]
    found: dict[str, float] = {}
    first: dict[str, str] = {}
    for name, weight in named:
        for file in matching(setting, name):
            real = file if hub.is_hub_name(file) else os.path.realpath(file)
            if real in first:
                what = "is named twice" if file == first[real] else f"is {first[real]}, which is named too"
                raise UserError(f"{setting}: {file} {what}, wanted each file once: leave one out")
            first[real], found[file] = file, weight
    return found


def matching(setting: str, name: str) -> list[str]:
    """`name` itself, or, where it is a pattern and no file is called so, the files that it matches, sorted.

    `**` stands for any number of folders. Raises UserError where none does, naming what lies there.
    """
    if not MAGIC.search(name) or Path(name).exists():
        return [name]
    files = sorted(file for file in glob.glob(name, recursive=True) if Path(file).is_file())
    if not files:
        raise UserError(f"{setting}: {name}: no file matches, {_there(name)}")
    return files


def _there(pattern: str) -> str:
    """What lies where a pattern's first sign stands, in words."""
    parts = Path(pattern).parts
    folder = Path(*parts[: next(i for i, part in enumerate(parts) if MAGIC.search(part))])
    if not folder.is_dir():
        names = [one.name for one in folder.parent.iterdir()] if folder.parent.is_dir() else []
        return f"wanted a pattern of files; {folder} is no folder{did_you_mean(folder.name, names)}"
    names = sorted(one.name + "/" * one.is_dir() for one in folder.iterdir())
    where = "this folder" if folder == Path() else folder
    return f"wanted a pattern of files; in {where}: {listed(names) or 'nothing'}"


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def id_names(files: Sequence[str]) -> dict[str, str]:
    """File -> what the ids of its rows begin with: its stem, with as much of the path as tells it from the others."""
    groups: dict[str, list[str]] = {}
    for file in files:
        groups.setdefault(stem(file), []).append(file)
    return {file: name for group in groups.values() for file, name in zip(group, _apart(group), strict=True)}


def _apart(files: Sequence[str]) -> Sequence[str]:
    """The shortest ends of the paths of files of one stem that differ; with endings where only these differ."""
    for last in (stem, os.path.basename):
        paths = [(*Path(file).parts[:-1], last(file)) for file in files]
        for count in range(1, max(map(len, paths)) + 1):
            ends = ["/".join(path[-count:]) for path in paths]
            if len({*ends}) == len(ends):
                return ends
    return files
