"""The recipes of the papers' other tasks, run as they ship on stand-ins of the same kinds, under the same names.

A hub cache laid by hand has tiny models where the recipes' names lead; rows have the columns that the recipes ask for.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from pipeline.config.resolve import resolve
from stages import faults, rl
from tests import tiny

COMMIT = "c" * 40
END = "<|endoftext|>"
SENTENCES = ["the cat sat", "the old dog ran far away", "a big cat sat on this mat", "a dog ran", "the mat and the dog"]
WORDS = ["train.max_steps=1", "train.num_train_epochs=null", "batch_size=2", "micro_batch_size=2", "eval.max_rows=3"]
WORDS += ["eval.num_samples=1", "generation.max_new_tokens=4", "train.keep_checkpoint=false", "train.logging_steps=1"]
VALUES = ["value.max_prompts=4", "value.epochs=1"]
MADE = [f"{i} {one}" for i, one in enumerate(SENTENCES * 3)]  # 15 different texts


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and one end token, which begins, ends and pads: as GPT-2's."""
    alphabet = {sign: i for i, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab={**alphabet, END: len(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, bos_token=END, unk_token=END)


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    """Words, with RoBERTa's marks around a text and between two."""
    marks = ["<s>", "<pad>", "</s>", "<unk>"]
    words = {word: i for i, word in enumerate([*marks, *tiny.WORDS])}
    inner = Tokenizer(models.WordLevel(words, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(mark, words[mark]) for mark in ("<s>", "</s>")]
    both = "<s> $A </s> </s> $B </s>"
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair=both, special_tokens=ends)
    names = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", **names)


def roberta() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    return RobertaForSequenceClassification(RobertaConfig(**sizes, **ids, vocab_size=32, max_position_embeddings=66))


def gpt2_scalar() -> PreTrainedModel:
    ids = {"eos_token_id": 256, "bos_token_id": 256, "pad_token_id": 256}
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 640, "vocab_size": 260}
    return GPT2ForSequenceClassification(GPT2Config(**sizes, **ids, num_labels=1))


def gpt2() -> PreTrainedModel:
    return tiny.language_model("gpt2", n_positions=660, eos_token_id=256, bos_token_id=256)


COLA, SAFE = "textattack/roberta-base-CoLA", "cardiffnlp/twitter-roberta-base-offensive"
CRITIC, DEPTH, UPDOWN = (
    "McGill-NLP/roberta-large-faithcritic",
    "microsoft/DialogRPT-depth",
    "microsoft/DialogRPT-updown",
)
KINDS = {
    "microsoft/DialoGPT-medium": (gpt2, gpt2_tokenizer),
    "comet-distill": (gpt2, gpt2_tokenizer),
    "huggyllama/llama-7b": (partial(tiny.language_model, "llama", max_position_embeddings=768), tiny.tokenizer),
    "facebook/bart-base": (partial(tiny.language_model, "bart", max_position_embeddings=768), tiny.tokenizer),
    **dict.fromkeys((COLA, SAFE, CRITIC), (roberta, roberta_tokenizer)),
    **dict.fromkeys((DEPTH, UPDOWN), (gpt2_scalar, gpt2_tokenizer)),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, with a hub cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def lay(here: Path, *names: str) -> None:
    """Stand-ins under these names: in the hub's cache, or as a folder."""
    for i, name in enumerate(names):
        torch.manual_seed(i)
        model, tokenizer = (make() for make in KINDS[name])
        place = placed(here, name)
        tiny.spread(model).save_pretrained(place)
        tokenizer.save_pretrained(place)
        if "/" in name:
            (place.parent.parent / "refs").mkdir()
            (place.parent.parent / "refs" / "main").write_text(COMMIT)


def placed(here: Path, name: str) -> Path:
    folder = here / "hub" / f"models--{name.replace('/', '--')}"
    return folder / "snapshots" / COMMIT if "/" in name else here / name


def write(name: str, rows: Sequence[Mapping]) -> None:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def learned_words(given: str) -> None:
    """The file of two lines that the recipes ask for."""
    text = f"from reward_models.tfidf import learned_from\n\nreward = learned_from({given})\n"
    Path("tfidf.py").write_text(text)


def run(recipe: str, *words: str) -> list[dict]:
    """The RL step of a recipe in this process; what it noted of each held-out row."""
    resolved = resolve(["stage=rl", f"recipe={recipe}", "runs_dir=runs", *words, *WORDS])
    rl.main(resolved.settings, list(resolved.words))
    left = Path("runs") / recipe / "rl"
    assert json.loads((left / "results.json").read_text())["steps"] == 1
    held_out = left / "held_out" / "step-000001.jsonl"
    return [json.loads(line) for line in held_out.read_text().splitlines()] if held_out.is_file() else []


def judged(here: Path, name: str, *texts: str) -> Tensor:
    """(N,) outputs of a stand-in for a text or a pair, as their code asks it."""
    tokenizer = AutoTokenizer.from_pretrained(placed(here, name))
    model = AutoModelForSequenceClassification.from_pretrained(placed(here, name)).eval()
    with torch.no_grad():
        return model(**tokenizer(*texts, return_tensors="pt")).logits[0]


def tfidf(learned: Sequence[str], text: str) -> float:
    """As their code has it: the mean of what is not 0, and less where few words are."""
    counts = CountVectorizer()
    weights = TfidfTransformer(smooth_idf=True, use_idf=True).fit(counts.fit_transform(learned))
    found = weights.transform(counts.transform([text]))
    return float(found.data.mean()) * (found.nnz / 10 if found.nnz < 5 else 1.0)


def test_replies_on_reddit(here: Path) -> None:
    """The columns of Kaggle's file; four classifiers by name, and words learned from the replies."""
    lay(here, "microsoft/DialoGPT-medium", COLA, SAFE, DEPTH, UPDOWN)
    with Path("comments_positive.csv").open("w", newline="") as stream:
        lines = csv.writer(stream)
        lines.writerow(["id", "parent_id", "text", "score", "parent_text", "parent_score"])
        lines.writerows([f"c{i}", f"p{i}", text, 70 + i, f"and {text}", 5] for i, text in enumerate(MADE))
    learned_words('"comments_positive.csv", "text"')
    words = ["data.train=comments_positive.csv", "data.validation_fraction=0.3", "start_from=model"]
    rows = run("reddit", *words, *VALUES)
    assert len(rows) == 3
    for row in rows:
        text = MADE[int(row["id"].removeprefix("c"))]
        parts = [judged(here, COLA, text).softmax(0)[1], judged(here, SAFE, text).softmax(0)[0], tfidf(MADE, text)]
        parts += [judged(here, name, f"and {text}{END}{text}").sigmoid() for name in (DEPTH, UPDOWN)]
        assert row["reward"] == pytest.approx(sum(map(float, parts)), abs=1e-5)


def test_dialogue_that_keeps_to_what_it_knows(here: Path) -> None:
    """Two rewards read columns: knowledge and answer as a pair, the turns so far before the answer."""
    lay(here, "microsoft/DialoGPT-medium", COLA, CRITIC, DEPTH)
    made = []
    for i, text in enumerate(MADE):
        known, turns = SENTENCES[i % 5], f"the cat{END}sat {i}"
        given = {"prompt": f"Knowledge: {known}{END}{turns}", "knowledge": known, "turns": turns}
        made.append({"id": str(i), "completion": text, **given})
    write("faith_dial/train.jsonl", made[:10])
    write("faith_dial/validation.jsonl", made[10:])
    learned_words('"faith_dial/train.jsonl"')
    rows = run("dialogue", "data.path=faith_dial", "start_from=model", *VALUES)
    assert [row["id"] for row in rows] == ["10", "11", "12"]
    for row, one in zip(rows, made[10:], strict=False):
        text = one["completion"]
        parts = [judged(here, COLA, text).softmax(0)[1], judged(here, CRITIC, one["knowledge"], text).softmax(0)[0]]
        parts += [judged(here, DEPTH, f"{one['turns']}{END}{text}").sigmoid(), tfidf(MADE[:10], text)]
        assert row["reward"] == pytest.approx(sum(map(float, parts)), abs=1e-5)


def test_commonsense_by_what_its_critic_said(here: Path) -> None:
    lay(here, "comet-distill")
    heads = [f"<head> PersonX {text} </head> <relation> xEffect </relation> [GEN] " for text in SENTENCES]
    made = [
        {"prompt": head, "completion": text, "p_valid_model": len(text) / 100} for head in heads for text in MADE[:2]
    ]
    write("atomic/train.jsonl", made)
    write("atomic/validation.jsonl", made[:3])
    rows = run("commonsense", "data.path=atomic", *VALUES)
    assert [row["reward"] for row in rows] == pytest.approx([row["p_valid_model"] for row in made[:3]])


def test_an_assistant_by_adapters(here: Path) -> None:
    """All but the 4 bits, for which there must be a GPU: without one that is a line before anything starts."""
    lay(here, "huggyllama/llama-7b")
    asked = [[[f"<|prompter|>the cat {i}", "<|assistant|>"]] * 2 for i in range(8)]
    made = [{"prefix": asked[i], "suffix": [f"sat {i}", "ran"], "reward": [i / 4, -1.0]} for i in range(8)]
    write("train.json", made)
    write("dev.json", made[:3])
    words = ["data.train=train.json", "data.validation=dev.json", "start_from=model", *VALUES]
    shipped = faults.of([resolve(["stage=rl", "recipe=hh_qlora", "runs_dir=runs", *words])], {})
    assert torch.cuda.is_available() or any("model.load_in_4bit: needs a GPU" in told for told in shipped)
    rows = run("hh_qlora", *words, "load_in_4bit=false", "precision=fp32")
    assert [row["reward"] for row in rows] == pytest.approx([1 / (1 + math.exp(-i / 4)) for i in range(3)])
    assert (Path("runs") / "hh_qlora" / "rl" / "model" / "adapter_config.json").is_file()


def test_summaries_by_few_samples(here: Path) -> None:
    lay(here, "facebook/bart-base")
    made = [{"article": f"{text} and {text}", "highlights": text} for text in MADE]
    write("news/train.jsonl", made[:10])
    write("news/validation.jsonl", made[10:])
    run("summaries", "data.path=news", "start_from=model")
    lines = (Path("runs") / "summaries" / "rl" / "metrics.jsonl").read_text().splitlines()
    assert 2 <= json.loads(lines[-1])["esrl/samples_per_prompt"] <= 5
