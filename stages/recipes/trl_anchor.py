"""TRL's DPO or KTO on the rows, steps and adapter of one of our RL stages: an anchor for the tables of RESULTS.md.

    PEER/bin/python stages/recipes/trl_anchor.py runs/smollm2-seed1/rl/dpo-seed1 runs/trl/dpo-seed1

PEER is an environment with trl beside this project's packages. The stage, finished, says all: its command is read
again, so that both learn from the same token ids, in batches of as many, at the same learning rates. The adapter that
TRL leaves is a policy for `stage=evaluate`. What is TRL's own stays so: which rows are together in a batch, the z of
KTO, which goes by the rows of one call, and its weights of 1 for both labels.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.config.resolve import resolve
from pipeline.config.schema import RlStage
from pipeline.data import convert, dataset, encoding, pairs
from pipeline.data.tokenization import Encoder
from pipeline.models import build
from pipeline.rl.labels import with_labels
from pipeline.trainer.objective import objective_of
from stages import inputs

COMMAND = "bash run.sh "


class ReadyDPO(DPOTrainer):
    """DPO on rows that are token ids already; KTO's trainer takes them as they are."""

    def _prepare_dataset(self, dataset: Dataset, *others: Any) -> Dataset:
        return dataset


class ReadyKTO(KTOTrainer):
    """KTO on such rows; the mismatched response is that of the row before in the same call, as TRL has it."""

    def _prepare_dataset(self, dataset: Dataset, tokenizer: Any, args: KTOConfig, *others: Any) -> Dataset:
        size = args.per_device_train_batch_size
        rows = [dataset[i] for i in range(len(dataset))]
        turned = [rows[i - 1 if i % size else min(i + size, len(rows)) - 1] for i in range(len(rows))]
        return dataset.add_column("KL_completion_ids", [row["completion_ids"] for row in turned])


def pair_rows(settings: RlStage, encoder: Encoder) -> list[dict[str, list[int]]]:
    train, _ = dataset.splits(inputs.rl_data(settings), settings.seed)
    items = encoding.encode(pairs.paired(train), encoder, encoding.pair_rows)
    both = [item.rows for item in items]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        dict(zip(names, map(list, (good.prompt_ids, good.response_ids, bad.response_ids)), strict=True))
        for good, bad in both
    ]


def label_rows(settings: RlStage, encoder: Encoder) -> list[dict[str, Any]]:
    train, _ = dataset.splits(inputs.rl_data(settings), settings.seed)
    items = encoding.encode(convert.to_scored(train, "both"), encoder, encoding.completion_rows)
    _, algorithm, _ = objective_of(settings.algorithm)
    labelled, _, _ = with_labels(items, items, algorithm)
    rows = [item.rows[0] for item in items]
    return [
        {"prompt_ids": list(row.prompt_ids), "completion_ids": list(row.response_ids), "label": bool(label)}
        for row, label in zip(rows, labelled.numbers["desirable"], strict=True)
    ]


KINDS = {"dpo": (ReadyDPO, DPOConfig, pair_rows), "kto": (ReadyKTO, KTOConfig, label_rows)}


def train(stage: Path, out: Path) -> None:
    words = shlex.split((stage / "command.txt").read_text(encoding="utf-8").removeprefix(COMMAND))
    settings = resolve(words).settings
    if not isinstance(settings, RlStage) or settings.algo not in KINDS or settings.model.lora is None:
        sys.exit(f"{stage}: wanted a stage=rl of algo=dpo or algo=kto with adapters (lora_r=16)")
    trainer, configuration, rows_of = KINDS[settings.algo]
    model, lora = inputs.rl_model(settings), settings.model.lora
    encoder = build.encoder_of(settings, model, list)
    bf16 = settings.train.precision == "bf16"
    options = configuration(
        beta=settings.algorithm.settings["beta"],
        max_steps=settings.train.max_steps,
        per_device_train_batch_size=settings.train.batch_size,
        learning_rate=settings.optimizer.learning_rate,
        lr_scheduler_type=settings.optimizer.lr_scheduler_type,
        warmup_steps=settings.optimizer.warmup_ratio,
        adam_beta2=settings.optimizer.adam_beta2,
        max_grad_norm=settings.optimizer.max_grad_norm,
        seed=settings.seed,
        bf16=bf16,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        max_length=None,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        output_dir=str(out),
    )
    policy = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.bfloat16 if bf16 else torch.float32)
    shape = {"r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    adapter = LoraConfig(**shape, target_modules=lora.target_modules, task_type="CAUSAL_LM")
    rows = Dataset.from_list(rows_of(settings, encoder))
    taught = trainer(
        model=policy, args=options, train_dataset=rows, processing_class=encoder.tokenizer, peft_config=adapter
    )
    taught.train()
    taught.save_model(str(out))


if __name__ == "__main__":
    if len(sys.argv) != 3 or not (Path(sys.argv[1]) / "command.txt").is_file():
        sys.exit("wanted: the directory of a stage=rl that has run, with its command.txt, and one to write to")
    train(Path(sys.argv[1]), Path(sys.argv[2]))
