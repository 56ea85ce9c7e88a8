"""A model is read as it was trained, by whatever stage opens it: its template, its day, a user's word against it."""

from __future__ import annotations

import datetime
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification
from transformers.utils import chat_template_utils

from pipeline.data.tokenization import Encoder
from pipeline.errors import UserError
from pipeline.launch import run_dir
from pipeline.models import build, scratch, writing
from pipeline.models.trained_input import INPUT_FILE, save_input
from pipeline.records import Message
from reward_models import learned
from tests import tiny
from tests.test_stages import rows, run, train

FEW = ("data.task_size=24", "max_steps=1", "data.max_prompt_length=40")
SHORT = ("generation.max_new_tokens=4",)
ALONE = ("data.task_size=24", "max_rows=2", "data.max_prompt_length=40", *SHORT)
OWN = ("template.prompt='Q: {prompt} A:'", "template.response='-{response}'", "template.system='Be kind. '")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run whose SFT model was trained under a template of one's own; what comes after was not told of it."""
    folder = tmp_path_factory.mktemp("runs")
    lines: list[str] = []
    logger = logging.getLogger("tiffin")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    train("sft", folder, *FEW, *SHORT, *OWN)
    train("reward", folder, "name=helpfulness", *FEW)
    train("rl", folder, "algo=nll", "reward=length", *FEW, *SHORT)
    run("generate", folder, *ALONE)
    run("evaluate", folder, *ALONE)
    logger.removeHandler(handler)
    (folder / "said.json").write_text(json.dumps(lines))
    yield folder / "default"


def test_every_stage_reads_as_the_first_was_told(runs: Path) -> None:
    wanted = json.loads((runs / "sft" / "model" / INPUT_FILE).read_text())["template"]
    assert (wanted["kind"], wanted["prompt"], wanted["system"]) == ("text", "Q: {prompt} A:", "Be kind. ")
    models = ["sft/best", "sft/last", "reward/helpfulness/model", "reward/helpfulness/last", "rl/model", "rl/last"]
    assert all(json.loads((runs / one / INPUT_FILE).read_text())["template"] == wanted for one in models)
    shown = ["sft/samples/step-000001.jsonl", "rl/samples/step-000001.jsonl", "evaluate/samples/policies.jsonl"]
    prompts = [row["prompt"] for place in shown for row in rows(runs / place) if "prompt" in row]
    assert len(prompts) >= 4 and all(text.startswith("Be kind. Q: ") for text in prompts)


def test_each_model_says_once_how_it_reads(runs: Path) -> None:
    said = json.loads((runs.parent / "said.json").read_text())
    described = [line.rsplit("template: ", 1) for line in said if "template: " in line]
    places = [place.removeprefix(str(runs) + "/").rstrip(": ") for place, _ in described]
    sft, rl, reward = "sft/model", "rl/model", f"reward {runs}/reward/helpfulness/model"
    assert places == ["a new model", sft, sft, rl, reward, rl, sft]
    assert not any("trained under" in line for line in said)


def test_a_users_word_counts_and_one_line_says_so(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    start = str(runs / "sft" / "model")
    settings = tiny.settings("generate", f"model={start}", "template.system='Be brief. '")
    with caplog.at_level("WARNING", "tiffin"):
        encoder = build.encoder_of(settings, settings.model, list)
    assert encoder.prompt_text("why?") == "Be brief. Q: why? A:" and encoder.response_text("so") == "-so"
    (line,) = caplog.messages
    assert line == f"{start}: trained under template system='Be kind. ', read under system='Be brief. ' as given"


def test_adapters_are_read_as_the_model_below_them(runs: Path, tmp_path: Path) -> None:
    start = str(runs / "sft" / "model")
    train("sft", tmp_path, *FEW, *SHORT, f"model={start}", "lora_r=2")
    adapters = tmp_path / "default" / "sft" / "model"
    assert (adapters / "adapter_config.json").is_file()
    for _ in ("its own file", "that of the model below"):
        settings = tiny.settings("generate", f"model={adapters}")
        assert build.encoder_of(settings, settings.model, list).prompt_text("why?") == "Be kind. Q: why? A:"
        (adapters / INPUT_FILE).unlink(missing_ok=True)


# chat models


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_EOS = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
DATED = "\n{% if strftime_now is defined %}{{ strftime_now('%-d %b %Y') }}{% else %}never{% endif %}" + CHATML


def chat_tokenizer(template: str) -> Any:
    made = scratch.train_tokenizer([" ".join(tiny.WORDS)] * 4, tiny.V - 32)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


def policy_at(place: Path, tokenizer: Any) -> str:
    model = tiny.language_model("llama")
    writing.save(place, model, model.state_dict(), tokenizer)
    return str(place)


def encoder_at(stage: str, place: str, *words: str) -> Encoder:
    settings = tiny.settings(stage, f"model={place}", *words)
    return build.encoder_of(settings, settings.model, list)


def test_words_of_the_text_template_are_not_dropped_in_silence(tmp_path: Path, caplog) -> None:
    place = policy_at(tmp_path / "m", chat_tokenizer(CHATML))
    with caplog.at_level("WARNING", "tiffin"):
        encoder = encoder_at("sft", place, "template.human='You: '")
    (line,) = caplog.messages
    assert line.startswith("template.human: given, but ") and line.endswith(": set template.kind=text")
    assert encoder.prompt_text("a") == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_a_model_trained_under_text_stays_so_whatever_its_tokenizer_has(tmp_path: Path) -> None:
    place = policy_at(tmp_path / "m", chat_tokenizer(CHATML))
    trained = encoder_at("sft", place, "template.kind=text", "template.prompt='Q {prompt}'")
    save_input(Path(place), trained)
    assert encoder_at("rl", place).prompt_text("a") == "Q a"
    assert encoder_at("rl", place, "template.kind=chat").prompt_text("a").startswith("<|im_start|>")


def test_what_a_former_version_left_is_not_read_otherwise_in_silence(tmp_path: Path) -> None:
    place = classifier_at(tmp_path / "c", chat_tokenizer(CHATML))
    (tmp_path / "c" / "reward_input.json").write_text("{}")
    settings = tiny.settings("sft")
    with pytest.raises(UserError, match=r"has reward_input\.json, wanted trained_input\.json .*train it again"):
        learned.load(place, settings.model, settings.template, 64, 2, torch.device("cpu"))


def test_the_arguments_of_training_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    switched = CHATML + "{% if enable_thinking is defined and not enable_thinking %}at once: {% endif %}"
    place = policy_at(tmp_path / "m", chat_tokenizer(switched))
    save_input(Path(place), encoder_at("sft", place, "template.arguments={enable_thinking: false}"))
    assert encoder_at("rl", place).prompt_text("a").endswith("assistant\nat once: ")
    with caplog.at_level("WARNING", "tiffin"):
        assert (
            encoder_at("rl", place, "template.arguments.enable_thinking=true").prompt_text("a").endswith("assistant\n")
        )
    (line,) = caplog.messages
    found, given = "arguments={'enable_thinking': False}", "arguments={'enable_thinking': True}"
    assert line == f"{place}: trained under template {found}, read under {given} as given"


class Clock(datetime.datetime):
    """A clock that stands at `day`."""

    day = datetime.date(2026, 3, 1)

    @classmethod
    def now(cls, tz=None) -> datetime.datetime:
        return cls(cls.day.year, cls.day.month, cls.day.day)


class Calendar(datetime.date):
    """The same as a calendar."""

    @classmethod
    def today(cls) -> datetime.date:
        return Clock.day


def test_a_run_has_one_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that writes today's date: what is resumed, started later or judged on another day reads the same."""
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    monkeypatch.setattr(run_dir.datetime, "date", Calendar)
    monkeypatch.setattr(Clock, "day", datetime.date(2026, 3, 1))
    place, known = policy_at(tmp_path / "m", chat_tokenizer(DATED)), chat_tokenizer(DATED)
    settings = tiny.settings("sft", f"model={place}", f"runs_dir={tmp_path}")
    turns = [{"role": "user", "content": "why?"}]
    theirs = known.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    run_dir.open_stage(tmp_path / "default" / "sft", settings, [], {})
    first = build.encoder_of(settings, settings.model, list)
    assert first.prompt_text("why?") == theirs and theirs.startswith("\n1 Mar 2026<|im_start|>user")
    assert "2026-03-01" in first.described()
    save_input(tmp_path / "m", first)

    Clock.day = datetime.date(2026, 3, 2)
    assert known.apply_chat_template(turns, tokenize=False).startswith("\n2 Mar 2026")  # the clock went on
    again = build.encoder_of(settings, settings.model, list)
    assert again.encode("why?", "so") == first.encode("why?", "so")
    # the model keeps its day in another run, unless one is given
    assert encoder_at("evaluate", place, f"runs_dir={tmp_path / 'other'}").prompt_text("why?") == theirs
    assert encoder_at("evaluate", place, "template.date=2024-07-26").prompt_text("why?").startswith("\n26 Jul 2024<")
    (tmp_path / "m" / INPUT_FILE).unlink()
    (tmp_path / "m" / "chat_template.jinja").write_text(DATED)  # that of a model which nothing of ours has trained
    assert build.encoder_of(settings, settings.model, list).prompt_text("why?") == theirs  # the run's first day
    elsewhere = encoder_at("evaluate", place, f"runs_dir={tmp_path / 'other'}")
    assert elsewhere.prompt_text("why?").startswith("\n2 Mar 2026")


def test_a_date_that_is_none() -> None:
    with pytest.raises(UserError, match=r"template\.date: 'today', wanted a date as in 2026-03-01"):
        tiny.settings("sft", "template.date=today")


# classifiers from elsewhere


def classifier_at(place: Path, tokenizer: Any) -> str:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=tiny.V, **sizes, **ids, num_labels=1))
    tiny.spread(model).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


TURNS = (Message("user", "the cat"), Message("assistant", "sat"), Message("user", "and"))


@pytest.mark.parametrize("template", [CHATML, WITH_EOS])
@pytest.mark.parametrize("kind", ["auto", "chat"])
def test_a_classifier_is_read_where_its_own_conversation_ends(
    tmp_path: Path, template: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    known = chat_tokenizer(template)
    place = classifier_at(tmp_path / "c", known)
    settings = tiny.settings("sft", f"template.kind={kind}")
    with caplog.at_level("INFO", "tiffin"):
        reward = learned.load(place, settings.model, settings.template, 64, 2, torch.device("cpu"))
    said = f"reward {place}: reads prompt and completion as one text, template: the tokenizer's chat"
    assert [line for line in caplog.messages if line.startswith(said)]
    raw = ["the big cat", [turn._asdict() for turn in TURNS]]
    found = reward(["the big cat", "ignored"], ["ran away", " on\n"], raw_prompt=raw)
    theirs = AutoModelForSequenceClassification.from_pretrained(place).eval()
    asked = [[Message("user", "the big cat")], list(TURNS)]
    for score, turns, text in zip(found, asked, ["ran away", " on\n"], strict=True):
        whole = [{"role": one.role, "content": one.content} for one in (*turns, Message("assistant", text))]
        ids = known.apply_chat_template(whole, return_dict=False, return_tensors="pt")
        with torch.no_grad():
            tiny.close(score, float(theirs(input_ids=ids).logits[0, 0]), of=found)


def test_a_conversation_that_is_too_long_keeps_its_end(tmp_path: Path) -> None:
    known = chat_tokenizer(CHATML)
    encoder = Encoder(known, tiny.PLAIN.model_copy(update={"kind": "chat"}), 64, 64)
    whole = learned.read_conversation(encoder, "the cat", "sat", 64)
    assert learned.read_conversation(encoder, "the cat", "sat", 9) == whole[-9:]


def test_a_reward_model_of_ours_is_read_as_trained(tmp_path: Path) -> None:
    """Where its rows ended: with the token that ends the turn, although its template goes on after that."""
    known = chat_tokenizer(CHATML)
    place = classifier_at(tmp_path / "c", known)
    encoder = Encoder(known, tiny.PLAIN.model_copy(update={"kind": "chat"}), 48, 24)
    save_input(Path(place), encoder)
    settings = tiny.settings("sft")
    reward = learned.load(place, settings.model, settings.template, 64, 2, torch.device("cpu"))
    row = encoder.encode("the cat", "sat")
    assert known.convert_ids_to_tokens(row.response_ids[-1]) == "<|im_end|>"
    ids = torch.tensor([row.prompt_ids + row.response_ids])
    with torch.no_grad():
        wanted = float(AutoModelForSequenceClassification.from_pretrained(place).eval()(input_ids=ids).logits[0, 0])
    tiny.close(reward(["the cat"], ["sat"])[0], wanted)
    shutil.rmtree(place)
