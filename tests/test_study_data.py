"""The data of the studies: rows as the hub's cards show them become files that our readers know."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from datasets import load_dataset

from pipeline.config.yaml_layers import ROOT
from pipeline.data.formats import detect
from tests.documents import DOCUMENTS

TRANSCRIPT = "\n\nHuman: Hello {0}\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant: {1}"
HUB = {  # the first columns of each set, under the names that its card gives them
    "Anthropic/hh-rlhf": [
        {"chosen": TRANSCRIPT.format(i, "Bye."), "rejected": TRANSCRIPT.format(i, "No")} for i in range(40)
    ],
    "trl-lib/tldr": [{"prompt": "POST: x\n\nTL;DR:", "completion": " y"}],
    "trl-lib/tldr-preference": [{"prompt": "POST: x\n\nTL;DR:", "chosen": " y", "rejected": " z"}],
    "lmqg/qg_squad": [
        {"sentence": "It is A.", "question": q, "answer": "A"} for q in ("What is it?", "Is it A?", "What is it?")
    ],
    "allenai/scitldr": [{"source": ["We do x.", "It works."], "target": ["X works.", "x"], "paper_id": "a"}],
    "bentrevett/multi30k": [{"en": "Two dogs.", "de": "Zwei Hunde."}],
    "McGill-NLP/FaithDial": [
        {"dialog_idx": 0, "response": "They climb. ", "history": ["Hi", "Beans?"], "knowledge": "Beans climb."}
    ],
}
WANTED = {
    "hh_preference": ("hh", {"source": "harmless-base"}),
    "tldr_reddit": ("supervised", {"completion": " y"}),
    "squad_qg": ("supervised", {"prompt": "it is a.", "references": ["what is it?", "is it a?", "what is it?"]}),
    "scitldr": (
        "supervised",
        {"prompt": "We do x. It works.", "completion": "X works.", "references": ["X works.", "x"]},
    ),
    "multi30k_de_en": ("supervised", {"prompt": "Zwei Hunde.", "completion": "Two dogs."}),
    "faith_dial": (
        "supervised",
        {
            "prompt": "Knowledge: Beans climb.<|endoftext|>Hi<|endoftext|>Beans?",
            "completion": "They climb.",
            "knowledge": "Beans climb.",
            "turns": "Hi<|endoftext|>Beans?",
        },
    ),
}


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study_data", ROOT / "stages" / "recipes" / "study_data.py")
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def load(repository: str, split: str, **options: str) -> list[Mapping[str, Any]]:
    assert split.split("[", maxsplit=1)[0] in ("train", "validation", "test") and set(options) <= {
        "data_dir",
        "revision",
    }
    return HUB[repository]


@pytest.mark.parametrize("name", WANTED)
def test_rows_become_files_of_a_known_format(name: str, module: ModuleType, tmp_path: Path) -> None:
    assert {*WANTED} == {*module.STUDIES}
    module.write(tmp_path / name, module.STUDIES[name](load))
    form, columns = WANTED[name]
    files = {path.stem: path.read_text().splitlines() for path in (tmp_path / name).iterdir()}
    first = json.loads(files["sft_train" if name == "tldr_reddit" else "train"][0])
    assert detect(first) == form and columns.items() <= first.items()
    assert {split.split("_")[-1] for split in files} == {"train", "validation", "test"}


def test_an_opening_is_in_one_split(module: ModuleType) -> None:
    openings = {
        split: {row["chosen"].split("\n\nAssistant:")[0] for row in rows}
        for split, rows in module.hh_preference(load).items()
    }
    assert not openings["train"] & (openings["test"] | openings["validation"]) and all(openings.values())


def test_a_configuration_of_the_hubs_parquet_files_is_found_by_its_folder(tmp_path: Path) -> None:
    """The layout of refs/convert/parquet, CONFIG/SPLIT/0000.parquet, read as the script and data.path= do."""
    for config in ("AIC", "Abstract"):
        for split in ("train", "validation", "test"):
            folder = tmp_path / config / split
            folder.mkdir(parents=True)
            load_dataset("json", data_files=_line(tmp_path, {"of": [config, split]}), split="train").to_parquet(
                folder / "0000.parquet"
            )
    found = load_dataset(str(tmp_path), data_dir="Abstract", split="validation", cache_dir=str(tmp_path / "cache"))
    assert found[0]["of"] == ["Abstract", "validation"]


def _line(folder: Path, row: Mapping[str, Any]) -> str:
    path = folder / f"{'-'.join(row['of'])}.json"
    path.write_text(json.dumps(row) + "\n")
    return str(path)


def test_the_commands_name_data_that_can_be_made(module: ModuleType) -> None:
    """Of every document: a bare name in data.path= is a study's folder, or one that stands for the reader's own."""
    bare = {word for text in DOCUMENTS.values() for word in _paths(text) if "_" in word or word == "scitldr"}
    assert bare - {"my_data"} == {*module.STUDIES}


def _paths(text: str) -> list[str]:
    return [part.split()[0].strip("`,.:;") for part in text.split("data.path=")[1:]]
