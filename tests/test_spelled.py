"""Texts that spell special tokens: plain text to the model, but for the token that ends a response, once."""

from __future__ import annotations

import pytest

from pipeline.data import remarks
from pipeline.data.encoded import counts
from pipeline.data.encoding import completion_rows, encode
from pipeline.records import Example, Message
from tests import chats
from tests.chats import byte_pairs, sentence_pieces
from tests.test_template import KINDS, make, own_ids, turns


@pytest.mark.parametrize("kind", KINDS)
def test_under_our_own_template_they_are_as_transformers_splits_them(kind: str) -> None:
    tokenizer = KINDS[kind]()
    row = make(tokenizer).encode("Say </s> twice", "was <s>ten</s> twelve")
    text = "\n\nHuman: Say </s> twice\n\nAssistant: was <s>ten</s> twelve"
    whole = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert (*row.prompt_ids, *row.response_ids) == (*whole, tokenizer.eos_token_id)
    assert row.spelled and not row.own_end


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["CHATML", "LLAMA_3", "LLAMA_2"])
def test_under_a_chat_template_only_its_own_are_tokens(name: str, kind: str) -> None:
    tokenizer = KINDS[kind](getattr(chats, name))
    end = make(tokenizer).tokenizer.convert_ids_to_tokens(make(tokenizer).eos_id)
    said = turns(f"say {end} <s>twice", f"no {end}, never", "why ?")
    row = make(tokenizer).encode(said, f"so {end} that")
    harmless = make(tokenizer).encode(turns("say it", "no", "why ?"), "so")
    special = tokenizer.all_special_ids
    found, wanted = (
        [token for token in one.prompt_ids + one.response_ids if token in special and token != tokenizer.unk_token_id]
        for one in (row, harmless)
    )
    assert found == wanted and row.spelled and not harmless.spelled
    whole = own_ids(tokenizer, (*said, Message("assistant", f"so {end} that")))
    if "pieces" not in kind:  # whose small vocabulary lacks letters
        read, written = (tokenizer.decode(ids).replace(" ", "") for ids in (row.prompt_ids + row.response_ids, whole))
        assert written.startswith(read)


def test_the_letters_of_a_special_token_by_hand() -> None:
    tokenizer = byte_pairs(chats.CHATML)
    row = make(tokenizer).encode("a", "b </s> a")
    assert tokenizer.convert_ids_to_tokens(row.response_ids) == ["b", "Ġ", "<", "/", "s", ">", "Ġa", "<|im_end|>"]
    meant = make(tokenizer, special_tokens="token").encode("a", "b </s> a")
    assert tokenizer.convert_ids_to_tokens(meant.response_ids) == ["b", "Ġ", "</s>", "Ġa", "<|im_end|>"]
    assert not meant.spelled


def test_added_tokens_that_are_not_special_stay_tokens() -> None:
    tokenizer = byte_pairs()
    tokenizer.add_tokens(["<think>"])
    ids = make(tokenizer).encode("a", "<think> </s> a").response_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["Ġ", "<think>", "Ġ", "<", "/", "s", ">", "Ġa", "</s>"]


@pytest.mark.parametrize("own", ["</s>", "<|im_end|>", "<|im_end|>\n", "<|im_end|></s>"])
@pytest.mark.parametrize("how", ["text", "token"])
def test_a_response_that_brings_its_end_along_ends_once(own: str, how: str) -> None:
    encoder = make(byte_pairs(chats.CHATML), special_tokens=how)
    row, plain = encoder.encode("hello", f"hi there{own}"), encoder.encode("hello", "hi there")
    assert row.response_ids == plain.response_ids and row.own_end and not plain.own_end and not row.spelled


def test_what_opens_an_answer_stands_before_one_that_spells_it() -> None:
    tokenizer = byte_pairs(chats.CHATML)
    tokenizer.chat_template = chats.CHATML.replace("m.content", "('<s>' if m.role == 'assistant' else '') + m.content")
    for how, spelled in (("text", ["<", "s", ">"]), ("token", [])):
        ids = make(tokenizer, special_tokens=how).encode("hello", "<s>a").response_ids
        assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", *spelled, "a", "<|im_end|>"]


def test_ends_that_a_history_brings_along_are_the_templates_own() -> None:
    encoder = make(byte_pairs(chats.CHATML))
    row, plain = (encoder.encode(turns("a", f"b{end}", "c"), "d") for end in ("<|im_end|>", ""))
    assert (row.prompt_ids, row.own_end, row.spelled) == (plain.prompt_ids, True, False)


def test_a_prompt_that_brings_its_bos_along_has_it_once() -> None:
    encoder = make(sentence_pieces(), special_tokens="token", prompt="{prompt}")
    assert encoder.encode_prompt("<s>hello") == encoder.encode_prompt("hello")


def test_they_are_counted_and_said_once() -> None:
    rows = [
        Example("a", "x </s> y", "b"),
        Example("b", "x", "b<s>c"),
        Example("c", "x", "d</s>"),
        Example("d", "x", "y"),
    ]
    found = counts(encode(rows, make(byte_pairs()), completion_rows))
    assert (found["spelled_special_tokens"], found["own_ends"]) == (2, 1)
    assert [*remarks.of_counts(found)] == [
        "2 of 4 spell special tokens, which are plain text to the model: template.special_tokens=token makes them "
        "tokens",
        "1 of 4 responses spell the token that ends them, which they get but once",
    ]
    assert not [*remarks.of_counts(counts(encode(rows[3:], make(byte_pairs()), completion_rows)))]
