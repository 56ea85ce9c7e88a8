"""What this machine has, from the system's own files: needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path

SYSTEM = Path("/")
GPU_FILES = ("nvidia[0-9]*", "dxg", "kfd", "davinci*", "accel*")  # in /dev: CUDA, WSL, ROCm, Ascend, Gaudi
BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86, and of ARM


def has_gpu(system: Path = SYSTEM) -> bool:
    return any(next((system / "dev").glob(pattern), None) for pattern in GPU_FILES)


def gpus(environ: Mapping[str, str], system: Path = SYSTEM) -> int | None:
    """How many GPUs a process may take, of those there are or CUDA_VISIBLE_DEVICES names; None where none can say.

    Only NVIDIA's are counted.
    """
    count = len([*(system / "dev").glob("nvidia[0-9]*")])
    if not count:
        return None if has_gpu(system) else 0
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return count
    return len([*takewhile(lambda one: one.strip() and not one.strip().startswith("-"), named.split(","))])  # as CUDA


def ram(system: Path = SYSTEM) -> int:
    """Bytes of memory for this process and those beside it: the machine's, or what its control groups allow."""
    meminfo = (system / "proc/meminfo").read_text()
    limits = [1024 * int(re.search(r"MemTotal:\s+(\d+) kB", meminfo)[1])]
    groups = system / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        _, kinds, place = line.split(":", 2)
        if kinds == "":  # version 2
            root, name = system / "sys/fs/cgroup", "memory.max"
        elif "memory" in kinds.split(","):
            root, name = system / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        inner = root / place.strip("/")
        for folder in (inner, *inner.parents):  # a group has no more than those around it
            if folder.is_relative_to(root) and (file := folder / name).is_file():
                limits += [int(text) for text in file.read_text().split() if text.isdecimal()]  # or "max"
    return min(limits)


def free_ram(system: Path = SYSTEM) -> int:
    """Bytes of memory that are free now, or would be if files were no longer kept in it."""
    meminfo = (system / "proc/meminfo").read_text()
    return min(1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo)[1]), ram(system))


def computes_bf16(system: Path = SYSTEM) -> bool | None:
    """Whether the processor has instructions for bf16; None where it does not say what it has."""
    lines = (system / "proc/cpuinfo").read_text().splitlines()
    found = [line.partition(":")[2].split() for line in lines if re.match(r"(flags|Features)\s*:", line)]
    return bool(BF16 & set(found[0])) if found else None
