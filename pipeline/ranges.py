"""What a single setting can be: numbers in their ranges, names that are folders."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

STAGE_FILES = ("model", "best", "last", "checkpoints", "tensorboard", "samples", "non_finite")  # in a stage directory


def folder_name(value: str) -> str:
    """`value`, which must name one visible folder. Raises ValueError."""
    if not value.strip() or value.startswith(".") or "/" in value or "\0" in value:
        raise ValueError(f"{value!r}, wanted the name of one folder: no '/', no dot at the beginning")
    return value


def result_name(value: str) -> str:
    """A folder's name that no file of a stage has. Raises ValueError."""
    if value in STAGE_FILES:
        raise ValueError(f"{value!r} is what a stage calls a folder of its own, wanted another name")
    return folder_name(value)


Fraction = Annotated[float, Field(ge=0, le=1)]
Dropped = Annotated[float, Field(ge=0, lt=1)]  # a share of which something must remain
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=10**9)]
Port = Annotated[int, Field(ge=1, le=65535)]
FolderName = Annotated[str, AfterValidator(folder_name)]
ResultName = Annotated[str, AfterValidator(result_name)]
Split = Literal["train", "validation", "test"]
