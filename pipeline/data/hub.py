"""Rows of a Hugging Face hub data set, named `owner/name[/folder][@revision][:split]`; without a split, of `train`.

A set of several configurations is named with one, `owner/name:config:split`; `owner/name:config:` is of no split.

A set that wants code of its own to be run is not read. The hub keeps the rows of most such sets as files, too, under
the revision `refs/convert/parquet`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError

_NAME = re.compile(
    r"(?P<owner>[\w-][\w.-]*)/(?P<name>[\w.-]+)(?:/(?P<folder>[\w./-]+))?"
    r"(?:@(?P<revision>[\w./-]+))?(?::(?P<first>[\w.-]+)(?::(?P<second>[\w.-]*))?)?"
)
UNREADABLE = (OSError, ValueError, RuntimeError)  # the last of sets that want code of their own to be run
COMMIT = re.compile("[0-9a-f]{40}")  # a revision that names the content for ever
_FILE_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".gz", ".zst", ".zip", ".arrow")


class HubName(NamedTuple):
    """`Anthropic/hh-rlhf/harmless-base:test` in its parts."""

    repository: str
    folder: str | None
    split: str | None
    revision: str | None = None
    config: str | None = None


def is_hub_name(path: str) -> bool:
    """True if nothing local has this name or its first part, and it is formed like `owner/name`, not like a file."""
    matched = _NAME.fullmatch(path)
    if matched is None or path.endswith(_FILE_ENDINGS):
        return False
    return not Path(path).exists() and not Path(matched["owner"]).exists()


def parse(path: str) -> HubName:
    """The parts of a hub name."""
    matched = _NAME.fullmatch(path)
    assert matched, path
    folder, revision, first, second = matched.group("folder", "revision", "first", "second")
    config, split = (None, first) if second is None else (first, second or None)
    return HubName(f"{matched['owner']}/{matched['name']}", folder, split, revision, config)


def folders(path: str, sources: Iterable[str]) -> dict[str, str]:
    """source -> hub name of the folder called like it; empty where `path` names a folder, or a configuration."""
    name = parse(path)
    if name.folder is not None or name.config is not None:
        return {}
    rest = (f"@{name.revision}" if name.revision else "") + (f":{name.split}" if name.split else "")
    return {source: f"{name.repository}/{source}{rest}" for source in sources}


def rows(path: str, streaming: bool = False) -> Iterator[tuple[int, Mapping[str, object]]]:
    """(row number from 1, columns). Raises UserError when the hub cannot be reached or knows no such data.

    With `streaming` they are fetched as they are read, and what is fetched is not kept; else all are downloaded first.
    """
    split = parse(path).split or "train"
    if streaming:
        yield from _streamed(path, _ask(path, "load_dataset", split=split, streaming=True))
    else:
        yield from enumerate(_ask(path, "load_dataset", split=split), start=1)


def _streamed(path: str, found: Iterable[Mapping[str, object]]) -> Iterator[tuple[int, Mapping[str, object]]]:
    """The numbered rows as they come. Raises UserError where they break off; the library has tried again by then."""
    from huggingface_hub.errors import HTTPError  # also what has no network

    number = 0
    try:
        for number, row in enumerate(found, start=1):
            yield number, row
    except (*UNREADABLE, HTTPError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path}: the stream broke off after {number:,} rows ({reason}), wanted to read on: is the hub reachable? "
            "Start again"
        ) from error


def split_names(path: str) -> list[str]:
    """The splits that a hub data set has. Raises as `rows`."""
    return _ask(path, "get_dataset_split_names")


def of_split(path: str, split: str) -> str:
    """The name of a split of the data set `path`, which names none."""
    return f"{path.removesuffix(':')}:{split}"


def _ask(path: str, function: str, **options: str | bool) -> Any:
    """What a function of the hub's library says of the data set."""
    import datasets  # takes seconds

    name = parse(path)
    try:
        place = {"data_dir": name.folder, "revision": name.revision}
        return getattr(datasets, function)(name.repository, name.config, **place, **options)
    except UNREADABLE as error:
        reason = " ".join(str(error).split())
        files = f"name its files with {name.repository}@refs/convert/parquet, or " if "scripts" in reason else ""
        files = f"name one with {name.repository}:CONFIG:SPLIT, or " if "Config name is missing" in reason else files
        raise UserError(
            f"{path}: neither a local file nor readable from the hub ({reason}), wanted one of them; "
            f"{files}bring the data as files with data.path= or data.train="
        ) from error


def mark(path: str, streaming: bool = False) -> str:
    """What names the content of the data set, as its library says: of its files and their revision.

    With `streaming` nothing is downloaded for it, and nobody asked where the revision is a whole commit hash.
    """
    name = parse(path)
    split = name.split or "train"
    if streaming and name.revision is not None and COMMIT.fullmatch(name.revision):
        return name.revision
    if streaming:
        builder = _ask(path, "load_dataset_builder")
        return f"{builder.hash} {builder.config_id}"
    return _ask(path, "load_dataset", split=split)._fingerprint  # as the library's documentation calls it
