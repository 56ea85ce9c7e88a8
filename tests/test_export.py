"""Exports against what peft's own merge makes of the whole model, and as transformers opens them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from pipeline.config.sections import ModelSettings
from pipeline.errors import UserError
from pipeline.files import CARD, write_json
from pipeline.models import card, merging, writing
from pipeline.models.exporting import Form, export
from stages import export as stage
from stages import export_faults
from stages.ahead import Ahead
from tests import tiny
from tests.hub import hub

TASKS = {AutoModelForSeq2SeqLM: "SEQ_2_SEQ_LM", AutoModelForSequenceClassification: "SEQ_CLS"}
WHOLE = Form(merge=True, dtype=None, most_bytes=20_000)  # several shards of a tiny model


def auto_of(lm: PreTrainedModel) -> type:
    return AutoModelForSeq2SeqLM if lm.config.is_encoder_decoder else AutoModelForCausalLM


def base(directory: Path, lm: PreTrainedModel, dtype: torch.dtype = torch.float32) -> Path:
    lm = lm.to(dtype)
    writing.save(directory, lm, lm.state_dict(), tiny.tokenizer())
    return directory


def adapters(directory: Path, below: Path, auto: type, **lora: Any) -> Path:
    """Random adapters upon the model in `below`, saved as peft saves them; their scale is 7/3."""
    options = {"num_labels": 1} if auto is AutoModelForSequenceClassification else {}
    config = {"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "task_type": TASKS.get(auto, "CAUSAL_LM")}
    opened = auto.from_pretrained(below, dtype=torch.float32, **options)
    adapted = get_peft_model(opened, LoraConfig(**{**config, **lora}))
    torch.manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape) * (0.01 if "magnitude" in name else 0.2)
    adapted.peft_config["default"].base_model_name_or_path = str(below)
    adapted.save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory


def at(path: Path) -> ModelSettings:
    return tiny.settings("sft").model.model_copy(update={"path": str(path)})


def merged_by_peft(path: Path, auto: type) -> PreTrainedModel:
    """The whole model in float32, all adapters added by peft."""
    told = json.loads((path / "adapter_config.json").read_text())
    options = {"num_labels": 1} if auto is AutoModelForSequenceClassification else {}
    below = Path(told["base_model_name_or_path"])
    if (below / "adapter_config.json").is_file():
        opened = merged_by_peft(below, auto)
    else:
        opened = auto.from_pretrained(below, dtype=torch.float32, **options)
    return PeftModel.from_pretrained(opened, path).merge_and_unload().eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.tensor([[5, 6, 9, 30], [7, 5, 5, 11]])
    return model(input_ids=ids, **({"labels": ids} if model.config.is_encoder_decoder else {})).logits


def check_equal(directory: Path, auto: type, wanted: PreTrainedModel, dtype: torch.dtype) -> None:
    """`directory` opens without peft as `wanted`, cast but for what transformers reads in float32 all the same."""
    assert not list(directory.glob("adapter*"))
    opened, report = auto.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values())
    assert opened.dtype == dtype
    mine = opened.eval().state_dict()
    for name, weight in wanted.state_dict().items():
        assert torch.equal(mine[name], weight.to(mine[name].dtype)), name
    if dtype == torch.float32:
        assert torch.equal(logits(opened), logits(wanted))
    else:
        error = (logits(opened).float() - logits(wanted)).abs().max() / logits(wanted).abs().max()
        assert error < 0.1


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["fp32 base", "bf16 base"])
@pytest.mark.parametrize("shape", ["llama", "gpt2", "t5"])
def test_a_merge_is_that_of_peft_bit_for_bit(tmp_path: Path, shape: str, kind: torch.dtype) -> None:
    """Tied embeddings (Llama, T5), Conv1D (GPT-2), an encoder-decoder; with the trained embedding of a token."""
    lm = tiny.language_model(shape)
    below = base(tmp_path / "base", lm, kind)
    path = adapters(tmp_path / "adapters", below, auto_of(lm), trainable_token_indices=[5])
    wanted = merged_by_peft(path, auto_of(lm))
    for name in ("float32", "bfloat16", "float16"):
        said = export(at(path), tmp_path / name, Form(True, getattr(torch, name), 20_000))
        assert "merged" in said and name in said
        assert len(list((tmp_path / name).glob("model-*.safetensors"))) > 1
        check_equal(tmp_path / name, auto_of(lm), wanted, getattr(torch, name))


def test_a_reward_model_keeps_its_head(tmp_path: Path) -> None:
    auto = AutoModelForSequenceClassification
    below = base(tmp_path / "base", tiny.language_model("llama"), torch.bfloat16)
    path = adapters(tmp_path / "adapters", below, auto, modules_to_save=["score"])
    export(at(path), tmp_path / "out", Form(True, torch.float32, 20_000))  # the head is not rounded to the base's type
    assert not (tmp_path / "out" / "generation_config.json").exists()
    check_equal(tmp_path / "out", auto, merged_by_peft(path, auto), torch.float32)
    assert load_file(path / "adapter_model.safetensors")["base_model.model.score.weight"].abs().sum() > 0


def test_other_kinds_of_adapters_are_merged_as_peft_merges_them(tmp_path: Path) -> None:
    lm = tiny.language_model("llama", tie_word_embeddings=False)
    below = base(tmp_path / "base", lm)
    dora = adapters(tmp_path / "dora", below, AutoModelForCausalLM, use_dora=True, use_rslora=True)
    export(at(dora), tmp_path / "out", WHOLE)
    check_equal(tmp_path / "out", AutoModelForCausalLM, merged_by_peft(dora, AutoModelForCausalLM), torch.float32)


def test_adapters_upon_adapters_are_merged_together(tmp_path: Path) -> None:
    below = base(tmp_path / "base", tiny.language_model("llama"))
    first = adapters(tmp_path / "first", below, AutoModelForCausalLM)
    second = adapters(tmp_path / "second", below, AutoModelForCausalLM)
    told = json.loads((second / "adapter_config.json").read_text())
    write_json(second / "adapter_config.json", {**told, "base_model_name_or_path": str(first)})
    export(at(second), tmp_path / "out", WHOLE)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, weight in merged_by_peft(second, AutoModelForCausalLM).state_dict().items():
        torch.testing.assert_close(opened[name], weight)  # both products at once: the order of sums differs


def test_an_adapted_head_that_was_tied_is_so_no_longer(tmp_path: Path) -> None:
    below = base(tmp_path / "base", tiny.language_model("llama"))
    path = adapters(tmp_path / "adapters", below, AutoModelForCausalLM, target_modules=["lm_head", "q_proj"])
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(below), path).eval()
    export(at(path), tmp_path / "out", WHOLE)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert opened.lm_head.weight.data_ptr() != opened.model.embed_tokens.weight.data_ptr()
    torch.testing.assert_close(logits(opened), logits(adapted), rtol=1e-5, atol=1e-5)
    t5 = base(tmp_path / "t5", tiny.language_model("t5"))
    tied = adapters(tmp_path / "tied", t5, AutoModelForSeq2SeqLM, target_modules=["lm_head"])
    with pytest.raises(UserError, match=r"tied to others.*merge=false"):
        export(at(tied), tmp_path / "never", WHOLE)
    assert not (tmp_path / "never").exists()


def test_experts_are_written_as_files_name_them(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": tiny.V, "pad_token_id": tiny.PAD_ID, "eos_token_id": tiny.EOS_ID}
    torch.manual_seed(0)
    lm = MixtralForCausalLM(MixtralConfig(**sizes, **ids, num_key_value_heads=2, num_local_experts=3))
    below = base(tmp_path / "base", lm)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    path = adapters(tmp_path / "ad", below, AutoModelForCausalLM, target_modules=["q_proj"], target_parameters=experts)
    export(at(path), tmp_path / "out", Form(True, None, 10**9))
    wanted = merged_by_peft(path, AutoModelForCausalLM)
    check_equal(tmp_path / "out", AutoModelForCausalLM, wanted, torch.float32)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == load_file(below / "model.safetensors").keys()


def test_the_model_below_stays_as_it_was_read(tmp_path: Path) -> None:
    """What a merge changed in place would no longer be the file that all processes share."""
    below = base(tmp_path / "base", tiny.language_model("llama"), torch.bfloat16)
    parts = merging.opened(at(adapters(tmp_path / "adapters", below, AutoModelForCausalLM)))
    assert len(parts.adapted) == 14  # 7 matrices of 2 layers
    for _ in merging.merged(parts, merging.written(parts), torch.bfloat16):
        pass
    saved = load_file(below / "model.safetensors")
    state = parts.lm.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in saved.items())


def test_numbers_that_float16_does_not_have_are_refused(tmp_path: Path) -> None:
    lm = tiny.language_model("llama")
    lm.model.embed_tokens.weight.data[3, 3] = 7e4
    below = base(tmp_path / "base", lm)
    with pytest.raises(UserError, match=r"float16, but model.embed_tokens.weight reaches 7e\+04.*bfloat16"):
        export(at(below), tmp_path / "out", Form(True, torch.float16, 10**9))
    assert not [*tmp_path.glob("out*")]


def test_adapters_that_stay_adapters_change_their_type_alone(tmp_path: Path) -> None:
    below = base(tmp_path / "base", tiny.language_model("llama"))
    path = adapters(tmp_path / "adapters", below, AutoModelForCausalLM)
    export(at(path), tmp_path / "out", Form(False, torch.bfloat16, 10**9))
    before, after = (load_file(place / "adapter_model.safetensors") for place in (path, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], weight.bfloat16()) for name, weight in before.items())
    opened = AutoModelForCausalLM.from_pretrained(below)
    assert torch.isfinite(logits(PeftModel.from_pretrained(opened, tmp_path / "out"))).all()


def test_the_card_of_training_becomes_that_of_the_whole_model() -> None:
    front = "---\nlibrary_name: peft\nbase_model: owner/name\ntags: [tiffin, sft, lora]\n---\n\n# a/sft\n\n"
    what = f"A language model{card.AS_ADAPTERS}. Training began with owner/name.{card.MOVED} {card.TRAINED}\n\n"
    text = f"{front}{what}## How to call it\n\n```python\n{card.call('chat', True)}```\n\n## Results\n\n| 1 | 2 |\n"
    made = card.exported(text, merged=True, said="It is merged.")
    assert "peft" not in made.lower() and "lora" not in made.lower() and card.MOVED not in made
    assert card.call("chat", False) in made and "Trained with Tiffin. It is merged." in made and "| 1 | 2 |" in made
    assert card.exported(text, False, "Cast.") == text.replace(card.TRAINED, f"{card.TRAINED} Cast.")
    assert card.exported("# another's", True, "Merged.") is None
    assert "num_labels" in card.call("reward", True) and "num_labels" not in card.call("reward", False)


# the stage


def settings(tmp_path: Path, *words: str) -> Any:
    return tiny.settings("export", f"runs_dir={tmp_path}", "run=r", *words)


def run_with_sft(tmp_path: Path) -> Path:
    """A run whose stage sft left adapters."""
    below = base(tmp_path / "base", tiny.language_model("llama"))
    left = adapters(tmp_path / "r" / "sft" / "model", below, AutoModelForCausalLM)
    (left / CARD).unlink()
    write_json(tmp_path / "r" / "sft" / "results.json", {})
    return left


def test_the_stage_writes_what_the_run_left_and_does_not_write_it_twice(tmp_path: Path) -> None:
    left = run_with_sft(tmp_path)
    stage.main(settings(tmp_path), [])
    out = tmp_path / "r" / "export" / "model"
    check_equal(out, AutoModelForCausalLM, merged_by_peft(left, AutoModelForCausalLM), torch.float32)
    assert "merged" in (out / CARD).read_text()
    written = (out / "model.safetensors").stat().st_mtime_ns
    stage.main(settings(tmp_path), [])
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    stage.main(settings(tmp_path, "dtype=bfloat16"), [])
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_no_directory_of_somebody_is_written_over(tmp_path: Path) -> None:
    run_with_sft(tmp_path)
    mine = tmp_path / "mine"
    mine.mkdir()
    stage.main(settings(tmp_path, f"to={mine}"), [])  # an empty one
    stage.main(settings(tmp_path, f"to={mine}", "dtype=float16"), [])  # its own
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    (mine / "notes.txt").write_text("on what is there")
    for place, problem in ((other, "is there already"), (mine, "holds notes.txt, which no export wrote")):
        with pytest.raises(UserError, match=problem):
            stage.main(settings(tmp_path, f"to={place}"), [])
    assert [file.name for file in other.iterdir()] == ["thesis.txt"] and (mine / "notes.txt").is_file()


def test_a_relative_directory_is_that_of_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_with_sft(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "there" / "a" / "out").mkdir(parents=True)
    (tmp_path / "there" / "a" / "out" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "here")
    stage.main(settings(tmp_path, "to=a/out"), [])  # `a` is made
    (tmp_path / "here" / "a" / "out" / "model.safetensors").unlink()
    stage.main(settings(tmp_path, "to=a/out"), [])  # what is not whole is written again
    assert (tmp_path / "here" / "a" / "out" / "model.safetensors").is_file()
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(UserError, match="is there already"):
        stage.main(settings(tmp_path, "to=a/out", "dtype=float16"), [])


def test_a_start_tells_what_is_wrong_before_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = Ahead([], {})
    (line,) = export_faults.of_export(settings(tmp_path), ahead)
    assert "holds none" in line
    left = run_with_sft(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "t")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert [*export_faults.of_export(settings(tmp_path, "push_to=me/x"), ahead)] == []
    (line,) = export_faults.of_export(settings(tmp_path, "push_to=me/x", "merge=false"), ahead)
    assert f"adapters of {left} belong to {tmp_path / 'base'}" in line
    write_json(tmp_path / "r" / "rl" / "checkpoints" / "step-000002" / "state.json", {})
    (line,) = export_faults.of_export(settings(tmp_path, f"policy={tmp_path}/r/rl/checkpoints/step-000002"), ahead)
    assert "is a checkpoint to go on from" in line and f"{tmp_path / 'r' / 'rl' / 'best'}" in line
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (line,) = export_faults.of_export(settings(tmp_path, "push_to=me/x"), ahead)
    assert "HF_HUB_OFFLINE" in line


@pytest.mark.parametrize(
    ("given", "size"), [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("1.5GiB", 3 * 2**29), (12, 12)]
)
def test_sizes_are_read_as_others_read_them(tmp_path: Path, given: str | int, size: int) -> None:
    assert settings(tmp_path, f"max_shard_size={given}").max_shard_size == size


@pytest.mark.parametrize("word", ["max_shard_size=5 apples", "max_shard_size=0", "push_to=name", "dtype=int8"])
def test_what_means_nothing_is_refused(tmp_path: Path, word: str) -> None:
    with pytest.raises(UserError, match=word.partition("=")[0]):
        settings(tmp_path, word)


PUSH = "import sys; from pathlib import Path; from pipeline.models.publish import push; print(push(Path(sys.argv[1]), "
PUSH += "'me/x', sys.argv[2] == 'private'))"


def test_a_push_sends_the_directory_and_only_where_it_is_as_private_as_wanted(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / CARD).write_text("---\ntags: [x]\n---\n# a\n")
    (model / "model.safetensors").write_bytes(b"weights")
    with hub("secret") as server:
        environ = {**os.environ, "HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "h")}

        def push(token: str, kind: str) -> subprocess.CompletedProcess[str]:
            argv = [sys.executable, "-c", PUSH, str(model), kind]
            return subprocess.run(argv, env={**environ, "HF_TOKEN": token}, capture_output=True, text=True, check=False)

        assert "401" in push("wrong", "private").stderr and server.files == {}
        assert push("secret", "private").returncode == 0
        assert server.private == {"me/x": True}
        assert server.files["me/x"]["model.safetensors"] == b"weights"
        server.files["me/x"] |= {"model-00001-of-00002.safetensors": b"older", "notes.txt": b"mine"}
        (model / "model.safetensors").write_bytes(b"better")
        assert push("secret", "private").returncode == 0
        assert {*server.files["me/x"]} == {CARD, "model.safetensors", "notes.txt"}  # no weights of before are left
        server.private["me/x"] = False
        assert "is public, wanted a private one" in push("secret", "private").stderr
        assert push("secret", "public").returncode == 0
