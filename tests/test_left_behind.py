"""What a stage leaves for others: a card that works as pasted, names that transformers 4 knows, modes, generation."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, pipeline
from transformers import logging as hf_logging

from pipeline.config.sections import TemplateSettings
from pipeline.config.yaml_layers import ROOT
from pipeline.data.tokenization import Encoder
from pipeline.files import CARD, fingerprint, write_json
from pipeline.models import card, tokenizers, writing
from pipeline.models.trained_input import save_input
from pipeline.trainer import facts
from pipeline.trainer.checkpoint import Checkpoints, State
from pipeline.trainer.metrics import Interval, Metrics
from reward_models import learned
from tests import tiny
from tests.test_stages import train
from tests.test_trained_input import CHATML, chat_tokenizer, classifier_at

FEW = (
    "data.task_size=24",
    "max_steps=2",
    "data.max_prompt_length=40",
    "data.max_response_length=12",
)
CHAT = [{"role": "user", "content": "How do I plant a bean?"}]
MODELS = {
    "chat": "llama/sft",
    "encoder_decoder": "t5/sft",
    "adapters": "lora/sft",
    "reward": "llama/reward/helpfulness",
    "reward adapters": "lora/reward/helpfulness",
    "text": "plain/sft",
}


@contextlib.contextmanager
def masking(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each kind; those of `llama` and `lora` made where a group may read what others may not."""
    folder = tmp_path_factory.mktemp("runs")
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"A bean is number {i}."}) + "\n" for i in range(30)))
    start = f"model={folder}/llama/sft/model"
    with masking(0o027):
        train("sft", folder, "run=llama", *FEW, "learning_rate=1e-2", "do_sample=true", "temperature=0.7")
        train("reward", folder, "run=llama", "name=helpfulness", *FEW)
        train("sft", folder, "run=lora", *FEW[:-1], "data.max_response_length=9", start, "lora_r=2")
        train("reward", folder, "run=lora", "name=helpfulness", *FEW, start, "start_from=model", "lora_r=2")
    with masking(0o022):
        train("sft", folder, "run=t5", *FEW, "model.scratch.shape=t5")
        plain = ("run=plain", "task=null", "data.task_size=null", f"data.train={texts}")
        train("sft", folder, *plain, *FEW[1:])
    return folder


def modes(folder: Path) -> set[tuple[bool, str]]:
    """Of everything below `folder`: whether it is a directory, and its mode. Locks are their owner's."""
    paths = [path for path in folder.rglob("*") if path.name != ".lock"]
    return {(path.is_dir(), oct(stat.S_IMODE(path.stat().st_mode))) for path in paths}


def test_everything_has_the_modes_that_umask_gives(runs: Path, tmp_path: Path) -> None:
    for name in ("llama", "lora"):
        assert modes(runs / name) == {(True, "0o750"), (False, "0o640")}
    for name in ("t5", "plain"):
        assert modes(runs / name) == {(True, "0o755"), (False, "0o644")}
    with masking(0o027):
        write_json(tmp_path / "own" / "a.json", {})
        trained = tiny.trainer(tiny.language_model("llama"))
        Checkpoints(tmp_path / "own", trained.ranks, 2).save(trained, State(step=1, world=1), Interval(Metrics()))
    assert modes(tmp_path) == {(True, "0o750"), (False, "0o640")}


# the card


def said(directory: Path) -> tuple[dict, str]:
    """The front matter of a card, and the rest."""
    _, front, rest = (directory / CARD).read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(front), rest


@pytest.mark.parametrize("kind", MODELS)
def test_what_the_card_says_to_call_works_as_pasted(runs: Path, kind: str) -> None:
    directory = runs / MODELS[kind] / "model"
    front, rest = said(directory)
    (code,) = re.findall(r"```python\n(.*?)```", rest, re.DOTALL)
    printed, scope = io.StringIO(), {}
    with contextlib.redirect_stdout(printed):
        exec(code.replace("DIRECTORY", str(directory)), scope)
    assert printed.getvalue().strip()
    if kind in ("chat", "adapters"):  # as many tokens as the stage: of adapters, not as the model below them
        wanted = 9 if kind == "adapters" else 12
        assert len(scope["written"]) - scope["prompt"]["input_ids"].shape[1] == wanted
    assert front["library_name"] == ("peft" if "adapters" in kind else "transformers")
    assert front["pipeline_tag"] == card.PIPELINES["chat" if kind == "adapters" else kind.split(maxsplit=1)[0]]
    assert "tiffin" in front["tags"] and "base_model" not in front  # of new models and of places on this machine
    assert str(runs) not in rest and "More Information Needed" not in rest
    assert "the built-in task assistant" in rest or (kind == "text" and "- data: texts.jsonl" in rest)
    assert "`train.max_steps=2`" in rest and "| `eval/loss` |" in rest


def test_a_card_names_no_folder_and_no_host_and_leaves_the_template_as_it_is() -> None:
    rewards = "reward={http://gpu7.corp:8000/v1: 1.0, /home/ann lee/good: 0.5, owner/name: 2.0}"
    template = ["template.system=Say yes/no", "template.human=\n\nand/or: "]
    places = [f"zero={ROOT}/ds_configs/zero1.json", "data.exclude=[/home/ann/no]", rewards]
    given = facts.changed(tiny.settings("rl", "algo=reinforce", "lora_r=4", *places, *template), "rl")
    assert given == {
        "reward.a server": 1.0,
        "reward.good": 0.5,
        "reward.owner/name": 2.0,
        "template.system": "Say yes/no",
        "template.human": "\n\nand/or: ",
        "model.lora.r": 4,
        "train.zero": "zero1.json",
        "data.exclude": ["no"],
    }
    assert [*map(facts.nameless, ("reward /home/ann/it", "~/my rows/"))] == ["reward it", "my rows"]


def test_a_card_names_the_start_by_its_run_or_by_its_last_folder(runs: Path, tmp_path: Path) -> None:
    assert facts.began(runs / "llama/sft/model") == ("llama/sft/model", None)
    shutil.copytree(runs / "llama/sft/model", tmp_path / "model")  # above it are folders of anybody
    assert facts.began(tmp_path / "model") == ("model", None)


def test_a_card_changes_no_fingerprint(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint(tmp_path)
    (tmp_path / CARD).write_text("words")
    assert fingerprint(tmp_path) == before
    assert (runs / "llama/sft/model" / CARD).is_file() and not (runs / "lora/sft/last" / CARD).exists()


def test_the_start_as_the_best_weights_does_not_look_like_success() -> None:
    facts = card.Facts(
        name="mine/rl",
        kind="chat",
        adapters=True,
        start="HuggingFaceTB/SmolLM2-135M",
        base="HuggingFaceTB/SmolLM2-135M",
        method="alol",
        described="A-LOL.",
        datasets=("Anthropic/hh-rlhf",),
        data={"data": "Anthropic/hh-rlhf"},
        settings={},
        results={"eval/loss": (1.0, None)},
        step=0,
        steps=40,
        reads="template: text",
        example="a",
        scale=None,
        versions={},
    )
    written = card.text(facts)
    assert "**No evaluation in 40 steps was better than the start: these weights are the start's.**" in written
    front = yaml.safe_load(written.split("---\n")[1])
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M" and front["datasets"] == ["Anthropic/hh-rlhf"]
    assert "adapter_config.json" not in written  # a name on the hub does not move


# generation


def test_generation_is_that_of_the_stage(runs: Path) -> None:
    found = GenerationConfig.from_pretrained(runs / "llama/sft/model")
    found.validate(strict=True)
    assert (found.do_sample, found.temperature, found.top_k, found.max_new_tokens) == (True, 0.7, 0, 12)
    assert (found.eos_token_id, found.pad_token_id) == (2, 0)
    greedy = GenerationConfig.from_pretrained(runs / "t5/sft/model")
    greedy.validate(strict=True)
    assert (greedy.do_sample, greedy.temperature, greedy.decoder_start_token_id) == (False, None, 0)


def test_a_pipeline_answers_as_trained_and_without_a_warning(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = str(runs / "llama/sft/model")
    hf_logging.enable_propagation()
    try:
        with warnings.catch_warnings(record=True) as caught, caplog.at_level("WARNING", "transformers"):
            answer = pipeline("text-generation", model=directory)
            torch.manual_seed(0)
            text = answer(CHAT)[0]["generated_text"][-1]["content"]
    finally:
        hf_logging.disable_propagation()
    assert not caplog.messages and not [one for one in caught if "generat" in str(one.message)]
    settings = tiny.settings("sft", f"model={directory}")
    encoder = Encoder(tokenizers.load_tokenizer(settings.model, []), settings.template, 40, 12)
    torch.manual_seed(0)
    prompt = torch.tensor([encoder.encode_prompt(CHAT[0]["content"])[0]])
    ids = answer.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt))[0, prompt.shape[1] :]
    assert text == answer.tokenizer.decode(ids, skip_special_tokens=True)


# transformers 4


def test_names_that_transformers_4_knows_too(tmp_path: Path) -> None:
    known = chat_tokenizer(CHATML)
    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled["original_max_position_embeddings"] = 64
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=tiny.V, rope_parameters=scaled, **sizes))
    writing.save(tmp_path / "m", model, model.state_dict(), known)
    told = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast" and "extra_special_tokens" not in told
    assert told["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["rope_theta"] == 5e5 and config["rope_scaling"]["factor"] == 8.0
    # and all of it is the same to the one that is installed
    again = AutoTokenizer.from_pretrained(tmp_path / "m")
    text = "<|im_start|>the cat\n sat</s> é"
    assert again(text).input_ids == known(text).input_ids and again.decode([5, 1]) == known.decode([5, 1])
    assert again.special_tokens_map == known.special_tokens_map
    assert again.extra_special_tokens == known.extra_special_tokens and again.all_special_ids == known.all_special_ids
    assert AutoConfig.from_pretrained(tmp_path / "m").rope_parameters == model.config.rope_parameters


# reward models


@pytest.mark.parametrize("own", [None, CHATML])
def test_a_reward_model_is_scored_elsewhere_as_here(tmp_path: Path, own: str | None) -> None:
    place = classifier_at(tmp_path / "c", chat_tokenizer(own))
    settings = tiny.settings("sft")
    template: TemplateSettings = settings.template.model_copy(update={"system": "Be kind. "})
    encoder = Encoder(
        tokenizers.load_tokenizer(settings.model.model_copy(update={"path": place}), []), template, 64, 24
    )
    save_input(Path(place), encoder, scalar=True)
    answers = ["sat on the mat", "ran"]
    reward = learned.load(place, settings.model, settings.template, 64, 2, torch.device("cpu"))
    wanted = reward(["the cat", "the cat"], answers)
    code = card.call("reward", adapters=False).replace("DIRECTORY", place).replace("How do I plant a bean?", "the cat")
    code = re.sub(r"answers = .*", f"answers = {answers}", code).replace("print(", "scores = (")
    scope: dict = {}
    exec(code, scope)
    tiny.close(scope["scores"].tolist(), wanted)
