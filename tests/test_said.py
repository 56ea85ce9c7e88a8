"""What was said: the text of response ids, the same of logged and of generated ones, and where a response ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AddedToken, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from pipeline.data.tokenization import Encoder
from pipeline.models import loading, writing
from pipeline.records import Example, Message
from pipeline.rewards.candidates import gathered
from pipeline.rollout.generate import generate
from tests import tiny
from tests.test_rollout import generation, speaker

SPOKEN = ["It is four .", "    return x + 1\n", "\n\nno", " yes ", "", "€ 5 ?"]


def with_tags() -> PreTrainedTokenizerBase:
    made = tiny.tokenizer().__class__(tokenizer_object=Tokenizer.from_str(tiny.tokenizer()._tokenizer.to_str()))
    made.add_special_tokens({"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"})
    made.add_tokens([AddedToken(name, special=True, normalized=False) for name in ("<think>", "</think>")], True)
    return made


def llama_like() -> PreTrainedTokenizerBase:
    """Puts a blank before every text and takes one off again, as SentencePiece does for Llama."""
    made = with_tags()
    inner = made._tokenizer
    inner.pre_tokenizer = None
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    return made


def t5_like() -> PreTrainedTokenizerBase:
    """Puts a blank before a text that has none, and takes one off again: an opening blank leaves no trace."""
    made = with_tags()
    made._tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made._tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return made


@pytest.mark.parametrize("made", [with_tags, llama_like])
@pytest.mark.parametrize("response", ["{response}", " {response}", "### Say a word: {response}\n"])
def test_a_response_reads_as_it_was_written(made, response: str) -> None:
    encoder = Encoder(made(), tiny.PLAIN.model_copy(update={"response": response}), 64, 256)
    for text in SPOKEN:
        assert encoder.decode(encoder.encode("q", text).response_ids) == text


@pytest.mark.parametrize("made", [with_tags, llama_like])
def test_where_no_template_stands_between_the_first_blank_is_the_texts_own(made) -> None:
    encoder = Encoder(made(), tiny.PLAIN, 64, 64)
    for prompt in ("", (Message("user", "go on"), Message("assistant", "the old man walked"))):
        for text in (" home", "home", "  home"):
            assert encoder.decode(encoder.encode(prompt, text).response_ids, prompt) == text


def test_added_tokens_are_part_of_the_answer() -> None:
    encoder = Encoder(with_tags(), tiny.PLAIN, 64, 64)
    text = "<think>two plus two</think>\n\nIt is four ."
    assert encoder.decode(encoder.encode("q", text).response_ids) == text


def test_an_opening_blank_that_leaves_no_trace_is_not_taken_off_twice() -> None:
    encoder = Encoder(t5_like(), tiny.PLAIN, 64, 64)
    assert encoder.decode(encoder.encode("q", "yes").response_ids) == "yes"
    assert encoder.decode(encoder.encode("q", "  yes").response_ids) == "  yes"


def test_what_spells_nothing_is_no_text() -> None:
    known = with_tags()
    encoder, ids = Encoder(known, tiny.PLAIN, 64, 64), known(" the<think> cat")["input_ids"]
    odd = [known.bos_token_id, *ids[:1], known.unk_token_id, known.pad_token_id, *ids[1:], known.eos_token_id]
    assert encoder.decode(odd) == "the<think> cat"
    assert encoder.decode_all([], []) == [] and encoder.decode_all([odd, []], ["q"] * 2) == ["the<think> cat", ""]


def test_blanks_before_a_full_stop_stay_where_a_tokenizer_would_clean_them_up() -> None:
    inner = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "yes": 2, " ": 3, ".": 4, "a": 5}, unk_token="<pad>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Split(" ", "isolated"), decoders.Fuse()
    kind = type(tiny.tokenizer())
    words = kind(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", clean_up_tokenization_spaces=True)
    assert words.decode([2, 3, 4]) == "yes."
    assert Encoder(words, tiny.PLAIN, 64, 64).decode([3, 2, 3, 4, 1]) == "yes ."


def answer_of(text: str):
    example = Example("a", "q")
    made = generate(speaker("llama"), tiny.encoder(), [example], generation(max_new_tokens=1), 0)[0]
    return made._replace(text=text) if hasattr(made, "_replace") else made.__class__(**{**vars(made), "text": text})


def test_a_response_of_blanks_is_empty_and_another_keeps_its_own() -> None:
    found = gathered([answer_of(text) for text in ("\n \n", "    yes\n", "yes")], 3)
    assert found.rows[0].candidates == ("    yes\n", "yes") and (found.empty, found.repeated) == (1, 0)


@pytest.mark.parametrize("sampled", [False, True])
def test_responses_end_at_every_end_of_the_checkpoint(sampled: bool) -> None:
    """What the model says freely, cut after the first of the ends: in ids, in the text and in the statistics."""
    examples = [Example(str(i), text) for i, text in enumerate(tiny.WORDS[:6])]
    speaking, encoder = speaker("llama"), tiny.encoder()
    lm = speaking.module.model
    settings = generation(max_new_tokens=24, do_sample=sampled)
    free = generate(speaking, encoder, examples, settings, 3)
    own = lm.generation_config.eos_token_id
    # two more tokens that the model likes to say
    said = [token for answer in free for token in answer.response_ids[1:]]
    extra = sorted({*said} - {tiny.EOS_ID}, key=said.count)[-2:]
    try:
        lm.generation_config.eos_token_id = [tiny.EOS_ID, *extra]
        ended = generate(speaking, encoder, examples, settings, 3)
    finally:
        lm.generation_config.eos_token_id = own
    assert any(answer.response_ids[-1] in extra for answer in ended)
    for before, after in zip(free, ended, strict=True):
        place = next((i for i, token in enumerate(before.response_ids) if token in (tiny.EOS_ID, *extra)), None)
        cut = before.response_ids if place is None else before.response_ids[: place + 1]
        assert after.response_ids == cut and after.finished == (place is not None)
        assert after.text == encoder.decode(cut if place is None else cut[:-1])
        assert after.stats is None or len(after.stats.logps) == len(cut)


@pytest.mark.parametrize("lora", [0, 4])
def test_an_export_stops_where_training_ended_responses(tmp_path: Path, lora: int) -> None:
    model, tokenizer = tiny.language_model("llama"), tiny.tokenizer()
    writing.save(tmp_path / "start", model, model.state_dict(), tokenizer)
    # as some are published: what belongs to sampling, without sampling
    own = GenerationConfig(eos_token_id=tiny.EOS_ID, pad_token_id=0, do_sample=False, temperature=0.6)
    own.to_json_file(tmp_path / "start" / "generation_config.json")
    settings = tiny.settings("sft", f"model={tmp_path / 'start'}", f"lora_r={lora}").model
    policy = loading.load_policy(settings, tokenizer, seed=0)
    writing.save(tmp_path / "out", policy, policy.state_dict(), tokenizer, ends={tiny.EOS_ID, 300})
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [tiny.EOS_ID, 300] and written["temperature"] == 0.6
    if not lora:
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert opened.generation_config.eos_token_id == [tiny.EOS_ID, 300]
