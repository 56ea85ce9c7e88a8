"""First tries of users of other tools: each is accepted or answered with what to type, and that is accepted."""

from __future__ import annotations

import re

import pytest

from pipeline.config.aliases import ALIASES, SWITCHES
from pipeline.config.elsewhere import ADVICE, METHODS
from pipeline.config.hints import FIELDS, SECTIONS
from pipeline.config.resolve import CONTROL, resolve, resolve_steps
from pipeline.config.schema import STAGES
from pipeline.config.yaml_layers import parse_overrides
from pipeline.errors import UserError

WORD = re.compile(r"(?<![\w.])((?!stage|recipe|config|hostfile|slots)[a-z_0-9.]+=(?:'[^']+'|[\w./:-]+))")


def answer(*words: str) -> str:
    with pytest.raises(UserError) as error:
        resolve_steps(words)
    text = str(error.value)
    assert text.count("\n") == 0 and text.startswith("command line: ") and len(text) < 340  # all methods by name
    return text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("stage=dpo", "set stage=rl algo=dpo"),
        ("stage=a_lol", "set stage=rl algo=a_lol"),
        ("stage=demo", "set recipe=demo without stage="),
        ("stage=GRPO", "algo=reinforce algorithm.settings.baseline=group"),
        ("stage=rl algo=ppo", "scored already: stage=rl algo=alol"),
        ("stage=rl algo=sft", "set stage=sft"),
        ("stage=rl algo=rloo", "stage=rl algo=reinforce"),
        ("stage=sft wandb=true", "tensorboard --logdir runs"),
        ("stage=sft load_in_8bit=true", "bf16=true, on a GPU"),
        ("stage=sft optimizer=adamw", "optimizer: 'adamw'; set optim=adamw, adamw_8bit or muon"),
        ("stage=sft dtype=bfloat16", "it belongs to export; set bf16=true"),
        ("stage=rl trainer.n_gpus_per_node=8", "gpus=8"),
        ("stage=sft --load_in_8bit", "lora_r=16"),
        ("stage=sft --bf16", "write settings without dashes: bf16=true"),
        ("stage=sft --num-train-epochs 3", "write settings without dashes: num_train_epochs=3"),
        ("stage=sft learning_rate = 1e-5", "write learning_rate=1e-5"),
        ("stage=sft dry_run", "write dry_run=true"),
        ("stage=sft gradient_checkpointing bf16=true", "write gradient_checkpointing=true"),
        ("stage=sft data.train", "give it a value: data.train=..."),
        (
            "stage=rl algo=alol beta=0.1",
            "algo=alol has no such setting; it belongs to stage=rl algo=a_star_po, agro, bco, dpo, ",
        ),
        (
            "stage=sft beta=0.1",
            "stage=sft has no such setting; it belongs to stage=rl algo=a_star_po, agro, bco, dpo, ",
        ),
        ("stage=sft colour=red", "no such setting; see stage=help"),
        ("stage=compare recipe=demo algo=alol", "set algos="),
        ("stage=compare recipe=demo lerning_rate=1", "did you mean 'learning_rate'?"),
        ("stage=sft per_device_train_batch_size=4", "set train.batch_size=32, rows per step"),  # alone: 64
        ("stage=rl algo=dpo label_smoothing_factor=0.1", "of tokens in stage=sft, of pairs in stage=rl algo=dpo"),
        ("stage=sft early_stopping=true", "training never stops early"),
        ("stage=sft warmup=100", "set warmup_ratio=0.05"),
        ("stage=sft train.lr=0.1", "did you mean 'lr'?"),
        ("stage=sft epochs=3 max_steps=10", "num_train_epochs and max_steps are both given, wanted one"),
        ("stage=rl algo=A_LOL_KL", "did you mean 'a_lol_kl'?"),
        ("stage=plan parameters=8", "parameters: 8, wanted the number of weights, a million or more: 8B"),
        ("stage=plan parameters=7GB", "wanted the number of weights"),
        ("train", "set stage=sft"),
        ("grpo", "algo=reinforce"),
        ("stage=rl algo=nll ratio_tolerance.fp32=1", "it belongs to algo=a_lol_kl, a_lol_seq, a_star_po, agro, alol, "),
    ],
)
def test_a_first_try_is_answered(words: str, says: str) -> None:
    assert says in answer(*words.split())


def test_what_means_the_same_is_accepted() -> None:
    words = ["zero=2", "template=chat", "epochs=2", "model_name=x/y", "dataset_name=x/y", "num_gpus=2", "lora_rank=4"]
    found = resolve(["stage=sft", *words]).settings
    assert (found.train.zero, found.template.kind, found.train.num_train_epochs) == ("zero2", "chat", 2)
    assert (found.model.path, found.data.path, found.launch.processes, found.model.lora.r) == ("x/y", "x/y", 2, 4)


def test_names_are_settings_or_answered() -> None:
    assert not {*ADVICE} & {*ALIASES, *SWITCHES, *CONTROL}
    assert {*ADVICE} & {*FIELDS} <= SECTIONS | {
        "rl",
        "dtype",
    }  # a mapping goes through: `optimizer: {...}`; dtype is of stage=export
    assert parse_overrides(["algorithm.settings.epsilon=1", "policies.metric=x", "rl.static=best"])  # no others' names
    assert parse_overrides(["optimizer={learning_rate: 0.1}"]) and parse_overrides(["rl={algo: dpo}"])


@pytest.mark.parametrize("text", sorted({*ADVICE.values(), *METHODS.values()}))
def test_what_is_told_is_accepted(text: str) -> None:
    """Each word that a text tells to type is taken by a stage; those of one stage by that one."""
    parts = re.findall(r"stage=(?!help)\w+(?: [\w.]+=[\w.]+)*", text)
    for words in [part.split() for part in parts] + [[word.replace("'", "")] for word in WORD.findall(text)]:
        accepted = False
        for stage in [f"stage={stage}" for stage in STAGES] if "stage=" not in words[0] else [words.pop(0)]:
            try:
                resolve([stage, *words])
                accepted = True
            except UserError as error:
                last = str(error)
        assert accepted, last
