"""Tokenizing: prompts as in generation, EOS and masks, cuts, templates, scratch vocabularies, real tokenizers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast, T5Tokenizer

from pipeline.config.sections import ModelSettings
from pipeline.data.tokenization import Encoder, pad
from pipeline.errors import UserError
from pipeline.models import scratch, tokenizers
from pipeline.records import Message
from pipeline.trainer.model import coloured
from tests import tiny

DATA = Path(__file__).parents[2] / "shared" / "data" / "tokenizers"
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ALTERNATING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"


def bart_like(before: str = "<s>", after: str = "</s>") -> PreTrainedTokenizerFast:
    """A scratch tokenizer that puts `before` and `after` around what it is asked to make special."""
    made = scratch.train_tokenizer([" ".join(tiny.WORDS)] * 4, tiny.V)
    inner = made._tokenizer
    ids = {token: made.convert_tokens_to_ids(token) for token in (before, after) if token}
    inner.post_processor = TemplateProcessing(single=f"{before} $A {after}".strip(), special_tokens=list(ids.items()))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    made = scratch.train_tokenizer([" ".join(tiny.WORDS)] * 4, tiny.V)
    made.chat_template = template
    return made


def make(tokenizer, prompt_limit: int = 64, response_limit: int = 64, seq2seq: bool = False, **template) -> Encoder:
    chosen = tiny.PLAIN.model_copy(update=template)
    return Encoder(tokenizer, chosen, prompt_limit, response_limit, encoder_decoder=seq2seq)


@pytest.mark.parametrize("completion", ["sat on a mat", "", " sat", "\nsat", "€uro", "a" * 30])
def test_a_prompt_in_training_is_the_prompt_of_generation(completion: str) -> None:
    encoder = make(bart_like(after=""))
    row = encoder.encode("the cat", completion)
    assert row.prompt_ids == encoder.encode_prompt("the cat")[0]
    assert row.prompt_ids[0] == encoder.tokenizer.bos_token_id
    assert row.response_ids[-1] == encoder.eos_id and row.response_ids.count(encoder.eos_id) == 1
    assert encoder.tokenizer.bos_token_id not in row.response_ids
    assert encoder.decode(row.response_ids) == completion.removeprefix(" ")  # which opens the response as it is


def test_without_a_completion_there_is_no_response() -> None:
    assert tiny.encoder().encode("the cat", None).response_ids == ()


def test_prompts_are_cut_on_the_left_and_keep_bos() -> None:
    whole = make(bart_like(after="")).encode_prompt("the cat sat on a mat")[0]
    for limit in range(2, len(whole)):
        cut, was_cut = make(bart_like(after=""), limit).encode_prompt("the cat sat on a mat")
        assert cut == (whole[0], *whole[len(whole) - limit + 1 :]) and len(cut) == limit and was_cut
    assert make(bart_like(after=""), len(whole)).encode_prompt("the cat sat on a mat") == (whole, False)


def test_prompts_without_bos_are_cut_on_the_left() -> None:
    whole = tiny.encoder().encode_prompt("the cat sat on a mat")[0]
    assert tiny.encoder(3).encode_prompt("the cat sat on a mat") == (whole[-3:], True)


def test_the_beginning_of_a_prompt_can_be_kept() -> None:
    encoder = tiny.encoder(3)
    whole = tiny.encoder().encode_prompt("the cat sat on a mat")[0]
    encoder.keep = "beginning"
    assert encoder.encode_prompt("the cat sat on a mat") == (whole[:3], True)


def test_responses_are_cut_on_the_right_and_lose_eos() -> None:
    whole = tiny.encoder().encode("the", "cat sat on").response_ids
    n = len(whole)
    cut = tiny.encoder(response_limit=n - 1).encode("the", "cat sat on")
    assert cut.response_ids == whole[:-1] and cut.cut_response  # only EOS did not fit: the response is not finished
    assert not tiny.encoder(response_limit=n).encode("the", "cat sat on").cut_response


def test_an_unfinished_response_has_no_end_and_loses_none() -> None:
    whole = tiny.encoder().encode("the", "cat sat on").response_ids
    for limit, kept, cut, cut_text in ((len(whole), -1, False, False), (len(whole) - 2, -2, True, True)):
        row = tiny.encoder(response_limit=limit).encode("the", "cat sat on", unfinished=True)
        assert (row.response_ids, row.cut_response, row.cut_text) == (whole[:kept], cut, cut_text)
    assert not tiny.encoder(response_limit=len(whole) - 1).encode("the", "cat sat on").cut_text  # the end alone


def test_cuts_are_counted() -> None:
    from pipeline.data.encoded import counts
    from pipeline.data.encoding import completion_rows, encode
    from pipeline.records import Example

    rows = [Example("a", "the cat sat on a mat", "ran"), Example("b", "the", "cat sat on a mat and ran")]
    items = encode(rows, tiny.encoder(3, 4), completion_rows)
    found = counts(items)
    assert (found["cut_prompts"], found["cut_responses"]) == (1, 1)
    assert found["response_tokens"] == sum(len(item.rows[0].response_ids) for item in items)


def test_masks_come_from_lengths_even_where_pad_is_eos() -> None:
    ids, mask = pad([(5, 2), (6, 7, 2), ()], value=2)
    assert ids.tolist() == [[5, 2, 2], [6, 7, 2], [2, 2, 2]]
    assert mask.tolist() == [[True, True, False], [True, True, True], [False, False, False]]


def test_padding_on_the_left() -> None:
    ids, mask = pad([(5,), (6, 7)], value=0, side="left")
    assert ids.tolist() == [[0, 5], [6, 7]]
    assert mask.tolist() == [[False, True], [True, True]]
    assert pad([], 0)[0].shape == (0, 1) and ids.dtype == torch.int64


def test_a_gpt2_like_tokenizer_gets_a_pad_token_it_already_has() -> None:
    made = scratch.train_tokenizer(["the cat"] * 3, tiny.V)
    gpt2_like = PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token="</s>")
    assert gpt2_like.pad_token is None
    size = len(gpt2_like)
    assert tokenizers.with_pad(gpt2_like).pad_token == "<pad>" and len(gpt2_like) == size


def test_multi_turn_text() -> None:
    encoder = tiny.encoder(system="Be kind.")
    turns = (Message("user", "hello"), Message("assistant", "hi"), Message("user", "bye"))
    # the open turn of the assistant ends without the blank, which opens the response
    assert encoder.prompt_text(turns) == "Be kind.\nHuman: hello\nAssistant: hi\nHuman: bye\nAssistant:"
    assert encoder.prompt_text((Message("system", "Rules."), *turns[:1])) == "Be kind.Rules.\nHuman: hello\nAssistant:"
    assert encoder.prompt_text("hello") == "Be kind.hello"
    assert encoder.response_text("yes") == " yes"


def test_braces_in_the_texts_are_left_alone() -> None:
    encoder = tiny.encoder(prompt="Q: {prompt} A:")
    assert encoder.prompt_text("a {response} {prompt} {}") == "Q: a {response} {prompt} {} A:"
    assert encoder.response_text("{response} {x}") == " {response} {x}"


def test_chat_templates() -> None:
    encoder = make(chat_tokenizer(CHATML), kind="chat", system="Be kind.")
    turns = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    assert encoder.prompt_text("the cat") == "<system>Be kind.</s><user>the cat</s><assistant>"
    assert encoder.prompt_text(turns).endswith("<user>a</s><assistant>b</s><user>c</s><assistant>")
    row = encoder.encode("the cat", "sat")
    assert row.prompt_ids.count(encoder.eos_id) == 2  # the template's own tokens, one id each, and none added
    assert encoder.decode(row.response_ids) == "sat" and row.response_ids[-1] == encoder.eos_id


def one_line(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_a_chat_template_that_refuses_is_a_user_error() -> None:
    encoder = make(chat_tokenizer(ALTERNATING), kind="chat", system="Be kind.")
    with pytest.raises(UserError) as error:
        encoder.prompt_text("the cat")
    one_line(error, "system, user", "no system here", "template.kind=text")


def test_template_mistakes() -> None:
    with pytest.raises(UserError) as error:
        tiny.encoder(prompt="Q: {promt}")
    one_line(error, "template.prompt", "{prompt}")
    with pytest.raises(UserError) as error:
        tiny.encoder(response="none")
    one_line(error, "template.response", "{response}")
    with pytest.raises(UserError) as error:
        tiny.encoder(kind="chat")
    one_line(error, "no chat template", "template.kind=text")


def test_a_tokenizer_without_eos() -> None:
    made = PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer()._tokenizer, pad_token="<pad>")
    with pytest.raises(UserError) as error:
        make(made)
    one_line(error, "no EOS")


def test_an_empty_prompt_is_bos_or_where_there_is_none_eos() -> None:
    assert tiny.encoder().encode_prompt("")[0] == (tiny.tokenizer().bos_token_id,)
    made = PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer()._tokenizer, pad_token="<pad>", eos_token="</s>")
    assert make(made).encode_prompt("")[0] == (tiny.EOS_ID,)


AWKWARD = [
    "plain",
    "zwölf €, 😀 漢字",
    "a\nb\n\n c",
    "two  blanks   three",
    " lead and trail ",
    "<0x41> is A",
    "\ttab",
    "",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_scratch_tokenizers_lose_nothing(text: str) -> None:
    ids = tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert tiny.tokenizer().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


def test_scratch_vocabularies(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<pad>", "<s>", "</s>", "<unk>"]
    assert len(tokenizer) <= tiny.V
    assert len(tokenizer(" cat", add_special_tokens=False)["input_ids"]) == 1  # a word of the texts, with its blank
    assert tokenizer.unk_token_id not in tokenizer("Ω 漢 \x00", add_special_tokens=False)["input_ids"]
    tokenizer.save_pretrained(tmp_path)
    loaded = tokenizers.load_tokenizer(model_settings(path=str(tmp_path)), [])
    for text in AWKWARD:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def model_settings(**changes) -> ModelSettings:
    return tiny.settings("sft").model.model_copy(update=changes)


def test_scratch_mistakes() -> None:
    with pytest.raises(UserError, match="no text"):
        scratch.train_tokenizer([], 500)
    with pytest.raises(UserError, match="wanted over 260"):
        scratch.train_tokenizer(["text"], 260)
    odd = tiny.settings("sft").model.scratch.model_copy(update={"hidden_size": 30, "num_heads": 4})
    with pytest.raises(UserError, match="no multiple of twice num_heads"):
        scratch.small_config(odd, tiny.tokenizer())


@pytest.mark.parametrize(("before", "after"), [("<s>", "</s>"), ("", "</s>")])  # as BART's, as T5's
def test_encoder_side_specials_stay_on_the_prompt(before: str, after: str) -> None:
    encoder = make(bart_like(before, after), seq2seq=True)
    row = encoder.encode("the cat", "sat")
    assert row.prompt_ids[-1] == encoder.eos_id
    assert (row.prompt_ids[0] == 1) == (before == "<s>")
    assert row.response_ids.count(encoder.eos_id) == 1 and 1 not in row.response_ids
    whole, short = encoder.encode_prompt("the cat sat on a mat")[0], make(bart_like(before, after), 4, seq2seq=True)
    start = whole[:1] if before else ()
    words, n = whole[len(start) : -1], 3 - len(start)
    assert short.encode_prompt("the cat sat on a mat") == ((*start, *words[-n:], encoder.eos_id), True)
    short.keep = "beginning"
    assert short.encode_prompt("the cat sat on a mat") == ((*start, *words[:n], encoder.eos_id), True)


@pytest.mark.parametrize(
    ("terminal", "no_color", "colours"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_the_coloured_example_shows_all(monkeypatch, terminal: bool, no_color: str, colours: bool) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    encoder = tiny.encoder()
    row = encoder.encode("the cat", "sat on")
    shown = coloured(encoder, row)
    assert shown.count("\033") == (4 if colours else 0)
    assert not colours or shown.index("the cat") < shown.index("\033[32m") < shown.index("</s>")
    assert "the cat" in shown
    assert "</s>" in shown and f"{len(row.response_ids)} response tokens (learned)" in shown


def real(folder: str, load, seq2seq: bool = False) -> Encoder:
    if not (DATA / folder).is_dir():
        pytest.skip(f"{folder} of the shared data folder is not here")
    return make(tokenizers.with_pad(load(DATA / folder)), seq2seq=seq2seq)


@pytest.mark.parametrize("text", ["plain words", "zwölf €, 😀", "two  blanks", "line\nbreak"])
def test_gpt2(text: str) -> None:
    encoder = real("gpt2", lambda folder: GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")))
    assert encoder.pad_id == encoder.eos_id  # GPT-2 has but one special token
    row = encoder.encode("The prompt:", text)
    assert row.prompt_ids == encoder.encode_prompt("The prompt:")[0]
    assert encoder.decode(row.response_ids) == text
    _, mask = pad([row.response_ids, row.response_ids[:1]], encoder.pad_id)
    assert mask.sum(1).tolist() == [len(row.response_ids), 1]


def test_t5() -> None:
    encoder = real("t5-v1_1", lambda folder: T5Tokenizer.from_pretrained(str(folder)), seq2seq=True)
    row = encoder.encode("translate: hello", "a plain answer")
    assert row.prompt_ids[-1] == encoder.eos_id == 1 and encoder.pad_id == 0
    assert encoder.decode(row.response_ids) == "a plain answer"
    assert row.response_ids.count(1) == 1
