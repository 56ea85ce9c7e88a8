"""What test_unspoken.py runs on two processes: `torchrun --nproc-per-node 2 -m tests.unspoken FOLDER`.

Rank 0 writes FOLDER/seen.pt: the most weights that were whole at once, beside those of the largest matrix and of all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import deepspeed
import torch

from pipeline.config.resolve import resolve
from pipeline.config.sections import ModelSettings
from pipeline.models import loading, writing
from pipeline.models.policy import Policy
from pipeline.trainer.engine import Engine
from stages import rl
from tests import tiny
from tests.two_ranks import speak

SHAPES = {"llama": 2, "t5": 0, "bart": 0}  # and the rank of their adapters


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many weights each gathering of whole tensors asks for, while DeepSpeed does it; its layers' hooks ask not."""
    asked: list[int] = []
    real = deepspeed.zero.GatheredParameters

    def gathered(parameters: Sequence[torch.nn.Parameter], *args: object, **options: object) -> object:
        asked.append(sum(parameter.ds_numel for parameter in parameters if hasattr(parameter, "ds_numel")))
        return real(parameters, *args, **options)

    with mock.patch.object(deepspeed.zero, "GatheredParameters", gathered):
        yield asked


def model(folder: Path, shape: str) -> ModelSettings:
    """Of a saved model of that shape, with adapters where SHAPES says so."""
    settings = tiny.settings("sft").model
    lora = settings.lora.model_copy(update={"r": SHAPES[shape]})
    return settings.model_copy(update={"path": str(folder / shape), "lora": lora})


def speak_both_ways(folder: Path, shape: str) -> dict[str, int]:
    """The same tokens, greedy, sampled and of beams, whether all weights are gathered or none; five prompts in batches
    of two, so that one rank has no prompt of the last."""
    policy = Policy(loading.load_policy(model(folder, shape), tiny.tokenizer(), 0), 64)
    loading.hugging_face(policy.model).generation_config.eos_token_id = [*range(tiny.EOS_ID, 100)]  # so that some end
    train = tiny.train_settings(zero=str(folder / "cut_whole.json"))
    engine = Engine(policy, tiny.ranks(), train, None)
    numbers = {"all": sum(parameter.ds_numel for parameter in policy.parameters())}
    for way in (
        {"do_sample": False},
        {"do_sample": True, "temperature": 9.0, "max_new_tokens": 12},
        {"do_sample": False, "num_beams": 2},
    ):
        with counted() as whole:
            wanted = speak(engine, gather="whole", **way)
        with counted() as layers:
            assert speak(engine, gather="layers", **way) == wanted
        if way["do_sample"]:
            assert len({len(ids) for ids in wanted}) > 2, wanted  # ranks end at different steps
        numbers |= {"whole": max(whole), "layers": max(layers, default=0)}
    return numbers


def learn(folder: Path) -> dict[str, int]:
    """A-LOL from the first look at the start to the export, never speaking: V is learned from the rows."""
    words = [f"runs_dir={folder / 'runs'}", f"model={folder / 'llama'}", f"data.train={folder / 'rows.jsonl'}"]
    words += [f"zero={folder / 'cut_whole.json'}", "algo=alol", "eval.generate=false", "value.targets=data"]
    words += ["max_steps=2", "eval_steps=1", "batch_size=4", "scale_steps=false", "data.validation_fraction=0.5"]
    words += ["data.max_prompt_length=32", "data.max_response_length=32"]
    resolved = resolve(["stage=rl", *words])
    with counted() as asked:
        rl.main(resolved.settings, list(resolved.words))
    return {"most": max(asked)}


def main(folder: Path) -> None:
    ranks = tiny.ranks()
    if ranks.main:
        tiny.cut_whole(folder)
        for shape in SHAPES:
            start = tiny.language_model(shape)
            writing.save(folder / shape, start, start.state_dict(), tiny.tokenizer())
        rows = [
            {"prompt": f"{tiny.WORDS[i % 7]} {i}", "completion": tiny.WORDS[i % 11], "reward": i % 5} for i in range(60)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ranks.barrier()
    seen = {shape: speak_both_ways(folder, shape) for shape in SHAPES}
    largest = max(parameter.numel() for parameter in tiny.language_model("llama").parameters())
    seen["alol"] = learn(folder) | {"largest": largest}
    if ranks.main:
        torch.save(seen, folder / "seen.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
