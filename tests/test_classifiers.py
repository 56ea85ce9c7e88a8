"""Classifiers as rewards: one label of several, what they read, models of the hub; transformers is the outside word."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, TextClassificationPipeline

from pipeline.config.resolve import resolve
from pipeline.config.rewards import Reads
from pipeline.errors import UserError
from pipeline.rewards.build import build_rewards
from pipeline.rewards.rewards import is_learned
from reward_models import _named, learned
from stages import faults, inputs
from tests import tiny

LABELS = ["fine", "toxic", "very toxic"]
TEXTS = ["the old cat ran", "a dog sat", "sat [SEP] sat"]  # what spells a special token is text
CPU = torch.device("cpu")


def classifier(directory: Path, problem: str | None = None, labels: list[str] = LABELS) -> TextClassificationPipeline:
    """A random BERT with these labels, saved as transformers does; what transformers itself makes of it."""
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[", "]", "SEP", *tiny.WORDS])}
    inner = Tokenizer(models.WordLevel(words, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, words[token]) for token in ("[CLS]", "[SEP]")]
    both = "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=both, special_tokens=ends)
    names = {name: f"[{name[:3].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    read = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=read, **names)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    numbered = dict(enumerate(labels))
    config = BertConfig(**sizes, vocab_size=tiny.V, pad_token_id=0, max_position_embeddings=40, id2label=numbered)
    config.problem_type = problem
    torch.manual_seed(0)
    model = tiny.spread(BertForSequenceClassification(config)).eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return TextClassificationPipeline(model=model, tokenizer=tokenizer, top_k=None)


def values(
    name: str, prompts: list[str], texts: list[str], reads: Reads = "auto", max_length: int = 40, **columns: list
) -> list[float]:
    model = tiny.settings("sft").model
    return learned.load(name, model, tiny.PLAIN, max_length, 2, CPU, reads)(prompts, texts, **columns)


def of_pipeline(own: TextClassificationPipeline, asked: list, label: str) -> list[float]:
    rows = [own([one])[0] for one in asked]
    return [next(one["score"] for one in row if one["label"] == label) for row in rows]


@pytest.mark.parametrize("problem", [None, "single_label_classification", "multi_label_classification", "regression"])
def test_a_label_is_what_transformers_says(tmp_path: Path, problem: str | None) -> None:
    """softmax, sigmoid or the output itself, of the completion alone."""
    own = classifier(tmp_path, problem)
    wanted = of_pipeline(own, TEXTS[:2], "toxic")
    for name in ("toxic", "TOXIC", "1"):
        tiny.close(values(f"{tmp_path}:{name}", ["ignored", "b"], TEXTS[:2]), wanted)
    assert abs(wanted[0] - wanted[1]) > 1e-3


def test_pairs_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    own = classifier(tmp_path)
    pairs = [{"text": "a cat", "text_pair": text} for text in TEXTS[:2]]
    found = values(f"{tmp_path}:fine", ["a cat"] * 2, TEXTS[:2], "pair")
    tiny.close(found, of_pipeline(own, pairs, "fine"))
    joined = values(f"{tmp_path}:fine", ["a cat"] * 2, TEXTS[:2], "conversation")
    alone = values(f"{tmp_path}:fine", ["a cat"] * 2, TEXTS[:2], "completion")
    assert min(abs(one - other) for one, other in zip(found * 2, joined + alone, strict=True)) > 1e-3
    # of 9 tokens 3 are [CLS], [SEP], [SEP]: the prompt keeps its last two beside four of the completion
    cut = values(f"{tmp_path}:fine", ["sat sat a cat"], TEXTS[:1], "pair", max_length=9)
    tiny.close(cut, of_pipeline(own, [{"text": "a cat", "text_pair": TEXTS[0]}], "fine"))
    full = values(f"{tmp_path}:fine", ["a cat"], ["the old cat ran away"], "pair", max_length=7)
    tiny.close(full, of_pipeline(own, [{"text": "", "text_pair": "the old cat ran"}], "fine"))


def test_texts_of_ones_own_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    """With special tokens where the setting spells them, and none where a row does; columns by name."""
    own, name = classifier(tmp_path), f"{tmp_path}:fine"
    facts = {"facts": ["the dog", "{completion}"], "id": ["r0", "r1"]}
    found = values(name, ["a cat"] * 2, TEXTS[:2], "{prompt} [SEP] {completion} {facts}", **facts)
    said = ["a cat [SEP] the old cat ran the dog", "a cat [SEP] a dog sat {completion}"]
    tiny.close(found, of_pipeline(own, said, "fine"))
    (spelled,), (token,) = (
        values(name, ["a"], TEXTS[2:], "[SEP] {completion}"),
        of_pipeline(own, ["[SEP] " + TEXTS[2]], "fine"),
    )
    assert abs(spelled - token) > 1e-3
    pairs = [{"text": one, "text_pair": text} for one, text in zip(facts["facts"], TEXTS, strict=False)]
    found = values(name, ["a"] * 2, TEXTS[:2], ["{facts}", "{completion}"], **facts)
    tiny.close(found, of_pipeline(own, pairs, "fine"))
    cut = values(name, ["sat sat a"], TEXTS[:1], "{prompt} [SEP] {completion}", max_length=8)  # without [CLS], [SEP]: 6
    tiny.close(cut, of_pipeline(own, ["a [SEP] the old cat ran"], "fine"))
    with pytest.raises(UserError, match=r"rewards\.reads\..*:fine: \{fact\}: row r0 has no such value, wanted one of"):
        values(name, ["a"] * 2, TEXTS[:2], ["{fact}", "{completion}"], **facts)


def test_a_column_that_a_classifier_reads_is_carried(tmp_path: Path) -> None:
    classifier(tmp_path)
    words = ["stage=score", "data.path=x", f"reward={tmp_path}:fine", f"runs_dir={tmp_path}"]
    for reads, carried in (("pair", False), ("'{prompt} {completion}'", False), ("['{facts}', '{completion}']", True)):
        settings = resolve([*words, f"rewards.reads={reads}"]).settings
        rewards = build_rewards(settings, settings.reward, settings.rewards, CPU)
        assert rewards is not None and rewards.reads_columns == carried
    with pytest.raises(UserError, match=r"rewards\.reads: 'pairs', wanted auto, .*did you mean 'pair'"):
        resolve([*words, "rewards.reads=pairs"])


def test_a_spelled_token_is_text(tmp_path: Path) -> None:
    classifier(tmp_path)
    one, other = values(f"{tmp_path}:fine", ["a", "a"], ["sat [SEP] sat", "sat [ SEP ] sat"])
    tiny.close(one, other)


def test_labels_are_told_where_none_or_another_is_named(tmp_path: Path) -> None:
    classifier(tmp_path)
    with pytest.raises(UserError, match=r"with 3 labels \(fine, toxic, very toxic\), wanted one of them: .*:fine"):
        _named.check(str(tmp_path))
    with pytest.raises(UserError, match=r"no such label, wanted one of fine, toxic, very toxic.*did you mean 'toxic'"):
        values(f"{tmp_path}:toxik", ["a"], ["b"])
    with pytest.raises(UserError, match="no such label"):
        _named.check(f"{tmp_path}:3")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    words = ["stage=score", f"data.train={rows}", f"runs_dir={tmp_path}", "splits=[train]"]
    told = faults.of([resolve([*words, f"reward={{'{tmp_path}:toxik': -1.0}}"])], {})
    assert len(told) == 1 and "toxik: no such label" in told[0]
    for reads, said in (("toxik", "no such reward, wanted one of length"), ("length", "no classifier from elsewhere")):
        told = faults.of([resolve([*words, "reward=length", f"rewards.reads={{{reads}: pair}}"])], {})
        assert len(told) == 1 and said in told[0]
    assert faults.of([resolve([*words, f"reward={{'{tmp_path}:toxic': -1.0}}"])], {}) == []


def test_a_probability_goes_through_no_sigmoid_and_a_score_does(tmp_path: Path) -> None:
    classifier(tmp_path / "three")
    classifier(tmp_path / "one", labels=["score"])
    settings = resolve(["stage=score", "data.path=x", f"runs_dir={tmp_path}", "reward=length"]).settings
    spec = {f"{tmp_path}/three:toxic": -1.0, f"{tmp_path}/one": 1.0}
    rewards = build_rewards(settings, spec, settings.rewards.model_copy(update={"max_length": 40}), CPU)
    assert [one.normalise for one in rewards.rewards] == ["none", "sigmoid"]
    scores = rewards.score(["the cat"], ["sat"], {})
    (toxic,), (one,) = scores.raw.values()
    assert scores.total == [pytest.approx(-toxic + 1 / (1 + 2.718281828**-one), rel=1e-5)]


def test_what_a_name_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for name in ("length", "rouge:rougeL", "my/brief.py", "my/brief.py:other", "here/typo", "a/b/c", "./x"):
        assert not is_learned(name, ())
    assert _named.parts("owner/name") == ("owner/name", None, None)
    assert _named.parts("owner/name@v1.0:very toxic") == ("owner/name", "very toxic", "v1.0")
    assert is_learned("owner/name:1", ())


def test_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub's cache, laid out by hand; another commit is another reward."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "hub" / "models--tiffin-test--judge"
    old, new = "a" * 40, "b" * 40
    own = classifier(folder / "snapshots" / new)
    shutil.copytree(folder / "snapshots" / new, folder / "snapshots" / old)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(new)
    tiny.close(values("tiffin-test/judge:toxic", ["a"], TEXTS[:1]), of_pipeline(own, TEXTS[:1], "toxic"))
    settings = resolve(["stage=score", "data.path=x", "reward=length"]).settings
    marks = [
        inputs.of_rewards(settings, name) for name in ("tiffin-test/judge:toxic", f"tiffin-test/judge@{old}:toxic")
    ]
    (one,), (other,) = (mark.values() for mark in marks)
    assert one != other
    (folder / "refs" / "main").write_text(old)
    assert inputs.of_rewards(settings, "tiffin-test/judge:toxic") == {"reward tiffin-test/judge:toxic": other}
    with pytest.raises(
        UserError, match=r"reward tiffin-test/absent: no such file or directory, and as a model on the hub"
    ):
        values("tiffin-test/absent", ["a"], ["b"])


def test_a_language_model_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["BartForConditionalGeneration"], "id2label": {"0": "a", "1": "b"}})
    )
    assert _named.output(_named.NamedModel(str(tmp_path))) == (0, 1, "score")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertForSequenceClassification"]}))
    assert _named.output(_named.NamedModel(str(tmp_path), "label_1")) == (1, 2, "probability of all")
