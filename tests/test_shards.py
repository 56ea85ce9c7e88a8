"""Sharded safetensors against safetensors' own reader, and against what transformers writes and opens."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel, T5Config
from transformers import AutoModelForSeq2SeqLM as Seq2Seq

from pipeline.models import shards
from pipeline.models.shards import write_shards, written_once

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = [
    (AutoModelForCausalLM, LlamaConfig(vocab_size=70, tie_word_embeddings=True, **SMALL)),
    (AutoModelForCausalLM, LlamaConfig(vocab_size=70, tie_word_embeddings=False, **SMALL)),
    (AutoModelForCausalLM, GPT2Config(vocab_size=70, n_embd=16, n_layer=2, n_head=2)),
    (Seq2Seq, T5Config(vocab_size=70, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)),
]


def of_all_types() -> dict[str, Tensor]:
    """Tensors of every kind of length and layout: scalars, none at all, odd ones before wide ones, transposed."""
    torch.manual_seed(0)
    return {
        "odd.bf16": torch.randn(3, 5).bfloat16(),  # 30 bytes: what follows would begin at no multiple of 4
        "wide": torch.randn(4, 6, dtype=torch.float64),
        "flag": torch.tensor([True, False, True]),
        "count": torch.tensor(7),
        "turned": torch.randn(6, 8).T,
        "half": torch.randn(2, 2).half(),
        "part": torch.arange(20)[5:9],
        "odd.fp32": torch.randn(3),
        "nothing": torch.zeros(0, 4),
        "byte": torch.arange(9, dtype=torch.uint8),
    }


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("held", [1 << 25, 64], ids=["in memory first", "on the disk at once"])
def test_safetensors_reads_every_type_and_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    monkeypatch.setattr(shards, "HELD", held)
    monkeypatch.setattr(shards, "ROOM", 4096)
    shapes = write_shards(tmp_path, of_all_types().items(), most_bytes=1 << 20)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]  # an index only where there are several
    same(load_file(tmp_path / "model.safetensors"), of_all_types())
    assert shapes["turned"] == (8, 6)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o666 & ~mask


def test_shards_hold_no_more_than_they_may_but_for_one_tensor_of_more(tmp_path: Path) -> None:
    sizes = {"a": 40, "b": 40, "c": 30, "large": 200, "d": 8}  # bytes; at most 100 a shard: a b | c | large | d
    tensors = {name: torch.full((size // 2,), len(name), dtype=torch.int16) for name, size in sizes.items()}
    write_shards(tmp_path, tensors.items(), most_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    wanted = {"a": 1, "b": 1, "c": 2, "large": 3, "d": 4}
    assert index["weight_map"] == {name: f"model-0000{shard}-of-00004.safetensors" for name, shard in wanted.items()}
    assert index["metadata"]["total_size"] == 318
    same({k: v for file in tmp_path.glob("*.safetensors") for k, v in load_file(file).items()}, tensors)


def test_a_header_that_has_no_more_room_begins_another_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROOM", 1024)
    monkeypatch.setattr(shards, "HELD", 0)
    tensors = {f"layer.{number}.weight": torch.full((4,), float(number)) for number in range(20)}
    write_shards(tmp_path, tensors.items(), most_bytes=1 << 20)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    same({k: v for file in files for k, v in load_file(file).items()}, tensors)


def test_a_tensor_may_be_written_over_once_the_next_is_asked_for(tmp_path: Path) -> None:
    buffer = torch.zeros(3)

    def reused() -> Iterator[tuple[str, Tensor]]:
        for number in range(3):
            yield f"t{number}", buffer.fill_(number)

    write_shards(tmp_path, reused(), most_bytes=1 << 20)
    assert [tensor[0].item() for _, tensor in sorted(load_file(tmp_path / "model.safetensors").items())] == [0, 1, 2]


def test_a_save_that_fails_leaves_the_earlier_one_and_one_that_ends_leaves_only_itself(tmp_path: Path) -> None:
    write_shards(tmp_path, [("old", torch.ones(4)), ("older", torch.ones(4))], most_bytes=16)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.zeros(4)
        yield "b", torch.zeros(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, broken(), most_bytes=16)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    (tmp_path / "adapter_model.safetensors").write_bytes(b"another's")
    write_shards(tmp_path, [("new", torch.zeros(4))], most_bytes=16)
    assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors", "adapter_model.safetensors"}


def test_the_file_is_named_where_the_disk_refuses() -> None:
    full = Path("/dev/full")
    shard = shards._Shard(full)
    shard.add("a", torch.zeros(1 << 20))
    with pytest.raises(OSError, match="/dev/full"):
        shard.close()


def once(model: PreTrainedModel) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: state[name] for name in written_once(state, model.all_tied_weights_keys)}


@pytest.mark.parametrize(("auto", "config"), MODELS, ids=["tied Llama", "Llama", "GPT-2", "T5"])
def test_transformers_opens_what_it_would_have_written_itself(tmp_path: Path, auto: type, config: object) -> None:
    torch.manual_seed(1)
    model = auto.from_config(config)
    model.save_pretrained(tmp_path / "theirs")
    for file in (tmp_path / "theirs").glob("*.json"):
        (tmp_path / "ours").mkdir(exist_ok=True)
        (tmp_path / "ours" / file.name).write_bytes(file.read_bytes())
    shapes = write_shards(tmp_path / "ours", once(model).items(), most_bytes=3000)
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert shapes == {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    opened, report = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    same(dict(opened.state_dict()), dict(model.state_dict()))
    assert sum(map(math.prod, shapes.values())) == model.num_parameters()
