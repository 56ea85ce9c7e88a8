"""The data of the studies in RESULTS.md from the Hugging Face hub: `python stages/recipes/study_data.py hh_preference`.

Makes a folder of that name where you are. Rows, sizes and splits are like those of the studies, not the same bytes:
RESULTS.md says how they differ. Needs only the package `datasets`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
Load = Callable[..., Iterable[Mapping[str, Any]]]  # datasets.load_dataset
PARQUET = "refs/convert/parquet"  # where the hub keeps the rows of sets that want code of their own to be run


def hh_preference(load: Load) -> dict[str, Rows]:
    """Pairs of the test files of Anthropic's hh-rlhf; all conversations with one opening are in one split."""
    parts = {"harmless-base": "test", "helpful-base": "test", "helpful-online": "test"}
    parts["helpful-rejection-sampled"] = "test[:99]"
    made: dict[str, Rows] = {"train": [], "validation": [], "test": []}
    for source, split in parts.items():
        for row in load("Anthropic/hh-rlhf", data_dir=source, split=split):
            opening = row["chosen"].split("\n\nAssistant:")[0]
            number = int(hashlib.sha1(opening.encode()).hexdigest(), 16) % 10
            made[{0: "test", 1: "validation"}.get(number, "train")].append({**row, "source": source})
    return made


def tldr_reddit(load: Load) -> dict[str, Rows]:
    """Posts with their own summaries, and pairs of summaries that people compared."""
    sft = {"train": "train[:1553]", "validation": "validation[:209]", "test": "test[:183]"}
    pairs = {"train": "train[:808]", "validation": "validation[:96]", "test": "validation[96:192]"}
    made = {f"sft_{name}": [*map(dict, load("trl-lib/tldr", split=split))] for name, split in sft.items()}
    judged = {name: [*map(dict, load("trl-lib/tldr-preference", split=split))] for name, split in pairs.items()}
    return made | {f"preference_{name}": rows for name, rows in judged.items()}


def squad_qg(load: Load) -> dict[str, Rows]:
    """Sentences of SQuAD in small letters with the questions that people asked about them."""
    splits = {"train": "test", "validation": "validation[:5137]", "test": "validation[5137:]"}
    made = {}
    for name, split in splits.items():
        asked: dict[str, list[str]] = {}
        for row in load("lmqg/qg_squad", revision=PARQUET, split=split):
            asked.setdefault(row["sentence"].lower(), []).append(row["question"].lower())
        made[name] = [
            {"prompt": sentence, "completion": question, "references": questions}
            for sentence, questions in asked.items()
            for question in dict.fromkeys(questions)
        ]
    return made


def scitldr(load: Load) -> dict[str, Rows]:
    """Abstracts with sentences that sum them up."""
    made = {}
    for split in ("train", "validation", "test"):
        rows = load("allenai/scitldr", data_dir="Abstract", revision=PARQUET, split=split)
        made[split] = [
            {"prompt": " ".join(row["source"]), "completion": row["target"][0], "references": list(row["target"])}
            for row in rows
        ]
    return made


def multi30k_de_en(load: Load) -> dict[str, Rows]:
    """German captions with English ones."""
    return {
        split: [{"prompt": row["de"], "completion": row["en"]} for row in load("bentrevett/multi30k", split=split)]
        for split in ("train", "validation", "test")
    }


def faith_dial(load: Load) -> dict[str, Rows]:
    """Answers that keep to a piece of knowledge: it and the turns so far make the prompt, and are columns too."""
    end = "<|endoftext|>"  # of a turn, in DialoGPT's texts
    made = {}
    for split in ("train", "validation", "test"):
        made[split] = []
        for row in load("McGill-NLP/FaithDial", revision=PARQUET, split=split):
            knowledge, turns = row["knowledge"].strip(), end.join(row["history"]).strip()
            prompt = f"Knowledge: {knowledge}{end}{turns}"
            given = {"knowledge": knowledge, "turns": turns}
            made[split].append({"prompt": prompt, "completion": row["response"].strip(), **given})
    return made


STUDIES = {
    study.__name__: study for study in (hh_preference, tldr_reddit, squad_qg, scitldr, multi30k_de_en, faith_dial)
}


def write(folder: Path, made: Mapping[str, Rows]) -> None:
    """One JSON Lines file per split."""
    folder.mkdir(exist_ok=True)
    for name, rows in made.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(rows):,} rows")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in STUDIES:
        sys.exit(f"python stages/recipes/study_data.py NAME, wanted one of {', '.join(STUDIES)}")
    from datasets import load_dataset

    write(Path(sys.argv[1]), STUDIES[sys.argv[1]](load_dataset))
