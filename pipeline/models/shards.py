"""Sharded safetensors written tensor by tensor: no more of them in memory than one, and HELD bytes.

A file is the length of a header (8 bytes), the header (JSON: name -> type, shape, place) and the tensors one after
another, without holes. Source: https://github.com/huggingface/safetensors#format. The header comes first and is known
last, so that a large file begins with room for it, filled up with spaces; a small one is as safetensors writes it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pipeline.files import write_json

HELD = 1 << 25  # bytes of a shard that wait in memory: a shard of no more needs no spare room
ROOM = 1 << 20  # bytes for the header of a larger one
LENGTH = 8  # bytes that hold the header's length; it and all tensors begin at multiples of 8
METADATA = {"format": "pt"}
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_shards(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], most_bytes: int, stem: str = "model"
) -> dict[str, tuple[int, ...]]:
    """Write `tensors` as <stem>.safetensors, or as <stem>-00001-of-0000N.safetensors with an index.

    All of them under their names, or none: what `tensors` raises leaves the directory as it was. What an earlier save
    left there under such names is gone then. A tensor is copied when it comes, so that it may be freed or written over
    before the next one is asked for. Of tensors that share their memory only one may come (see `written_once`).

    Args:
        tensors: on any device, of any layout in memory; names are unique.
        most_bytes: of the tensors of one shard; a tensor of more has a shard of its own.

    Returns the shapes by name. Raises OSError with the file's name where the disk refuses.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[_Shard] = []
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        for name, tensor in tensors:
            assert name not in shapes, f"{name}: comes twice"
            if not shards or not shards[-1].has_room(name, tensor, most_bytes):
                if shards:
                    shards[-1].close()
                shards.append(_Shard(directory / f"{stem}.safetensors.part{len(shards) + 1}"))
            shards[-1].add(name, tensor)
            shapes[name] = tuple(tensor.shape)
        assert shards, f"{directory}: no tensors to write"
        shards[-1].close()
    except BaseException:
        for shard in shards:
            shard.drop()
        raise
    _name(directory, shards, stem)
    return shapes


def written_once(weights: Iterable[str], tied: dict[str, str]) -> Iterator[str]:
    """The names of `weights` that are to be written: of tied ones the one that transformers makes the others from.

    Args:
        tied: `all_tied_weights_keys` of the model: name -> the name of the tensor that it shares.
    """
    names = list(weights)
    return (name for name in names if tied.get(name, name) == name or tied[name] not in names)


def _name(directory: Path, shards: list[_Shard], stem: str) -> None:
    """Give whole shards their names, the index first removed and last written, and remove those of an earlier save."""
    index = directory / f"{stem}.safetensors.index.json"
    index.unlink(missing_ok=True)
    older = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors")
    for file in directory.iterdir():
        if older.fullmatch(file.name):
            file.unlink()
    places = {}
    for number, shard in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        name = f"{stem}{part}.safetensors"
        os.replace(shard.path, directory / name)
        places |= dict.fromkeys(shard.entries, name)
    if len(shards) > 1:
        sizes = {"total_size": sum(shard.size for shard in shards)}
        write_json(index, {"metadata": sizes, "weight_map": places})


class _Shard:
    """One file that grows: in memory up to HELD bytes, then on the disk behind room for its header."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        self.size = 0  # bytes of all tensors so far
        self._words = len(_header({}))  # bytes of the header so far, and some more
        self._placed = 0  # bytes of those that have their place
        self._held = bytearray()  # the beginning of the file, until it is opened
        self._odd: list[tuple[str, bytes]] = []  # tensors that end at no multiple of 8: they come last
        self._file: BinaryIO | None = None

    def has_room(self, name: str, tensor: Tensor, most_bytes: int) -> bool:
        """Whether the tensor fits, by its bytes and by its line in the header."""
        return self.size + tensor.nbytes <= most_bytes and self._words + _line(name, tensor) <= ROOM - LENGTH

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, or hold it."""
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self.entries[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape)}
        self.size += len(raw)
        self._words += _line(name, tensor)
        if len(raw) % LENGTH:
            self._odd.append((name, bytes(raw)))
        else:
            self._place(name, raw)

    def _place(self, name: str, raw: memoryview | bytes) -> None:
        self.entries[name]["data_offsets"] = [self._placed, self._placed + len(raw)]
        self._placed += len(raw)
        if self._file is None and self._placed <= HELD:
            self._held += raw
            return
        if self._file is None:
            self._open(ROOM)
        with naming(self.path):
            self._file.write(raw)

    def _open(self, room: int) -> None:
        with naming(self.path):
            self._file = open(self.path, "wb")  # noqa: SIM115 - until `close` or `drop`
            self._file.seek(room)
            self._file.write(self._held)
        self._held = bytearray()

    def close(self) -> None:
        """Write what is left and the header, and have it on the disk."""
        wide = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
        for name, raw in sorted(self._odd, key=lambda one: -wide.get(self.entries[one[0]]["dtype"], 1)):
            self._place(name, raw)
        self._odd = []
        header = _header(self.entries)
        room = ROOM if self._file is not None else len(header) + -len(header) % LENGTH
        if self._file is None:
            self._open(room)
        with naming(self.path):
            self._file.seek(0)
            self._file.write((room - LENGTH).to_bytes(LENGTH, "little"))
            self._file.write(header[LENGTH:].ljust(room - LENGTH))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def drop(self) -> None:
        """Leave nothing of it."""
        if self._file is not None:
            with suppress(OSError):  # a full disk refuses what the file still holds back
                self._file.close()
        self.path.unlink(missing_ok=True)


def _header(entries: dict[str, dict[str, Any]]) -> bytes:
    """The header behind the place of its length."""
    return bytes(LENGTH) + json.dumps({"__metadata__": METADATA, **entries}, separators=(",", ":")).encode()


def _line(name: str, tensor: Tensor) -> int:
    """The most bytes that the tensor takes in the header: its name and shape, and two places of up to 19 digits."""
    return len(json.dumps(name)) + sum(len(str(side)) + 1 for side in tensor.shape) + 100


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say of what file the system's error is; a full disk does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
