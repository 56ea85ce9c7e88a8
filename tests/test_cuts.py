"""Prompts that are too long: whole turns go, then text; what the template puts around it stays."""

from __future__ import annotations

import pytest

from pipeline.data.cuts import fewer_turns
from pipeline.errors import UserError
from pipeline.records import Message
from tests import chats
from tests.chats import byte_pairs
from tests.test_template import KINDS, make, turns

LONG = "the quick brown fox jumps over the lazy dog . What is two plus two ? It is four ."
TALK = (Message("system", "be kind"), *turns("hello there", "hi , how are you ?", "two plus two", "four", "tell me"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", ["end", "beginning"])
@pytest.mark.parametrize("name", ["CHATML", "LLAMA_3", "LLAMA_2", None])
def test_the_frame_stays_and_the_text_fills_the_rest(name: str | None, keep: str, kind: str) -> None:
    tokenizer = KINDS[kind](getattr(chats, name) if name else None)
    whole, least = make(tokenizer).encode_prompt(LONG)[0], len(make(tokenizer).encode_prompt("a")[0]) + 2
    # some of these tokenizers put a blank behind each special token
    head, tail = make(tokenizer).prompt_text("\ufdd2").replace(" ", "").strip().split("\ufdd2")
    for limit in range(least, len(whole)):
        ids, was_cut = make(tokenizer, limit, keep).encode_prompt(LONG)
        text, long = tokenizer.decode(ids).replace(" ", "").strip(), LONG.replace(" ", "")
        assert len(ids) == limit and was_cut
        assert text.count(head) == text.count(tail) == 1 and text.endswith(tail)
        rest = text.removesuffix(tail)[text.index(head) + len(head) :]
        assert rest and (long.endswith(rest) if keep == "end" else long.startswith(rest))
    assert make(tokenizer, len(whole), keep).encode_prompt(LONG) == (whole, False)


@pytest.mark.parametrize("name", ["CHATML", None])
def test_whole_turns_go_first(name: str | None) -> None:
    tokenizer = byte_pairs(getattr(chats, name) if name else None)
    system, rest = TALK[:1], TALK[1:]
    for keep, parts in (("end", [rest[2:], rest[4:]]), ("beginning", [rest[:3], rest[:1]])):
        for part in parts:
            ids = make(tokenizer).encode_prompt((*system, *part))[0]
            assert make(tokenizer, len(ids), keep).encode_prompt(TALK) == (ids, True)
            longer = make(tokenizer, len(ids) + 1, keep).encode_prompt(TALK)
            assert longer == (ids, True)  # no header of a turn that is not there


def test_the_text_of_the_last_turn_is_cut_behind_the_system_and_without_it_where_it_leaves_no_room() -> None:
    tokenizer = byte_pairs(chats.CHATML)
    talk, frame = (TALK[0], *turns("hello", "hi", LONG)), len(make(tokenizer).encode_prompt((TALK[0], *turns("a")))[0])
    text = tokenizer.decode(make(tokenizer, frame + 5).encode_prompt(talk)[0])
    assert text.startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n") and "hello" not in text
    assert text.endswith("four .<|im_end|>\n<|im_start|>assistant\n")
    alone = make(tokenizer, frame - 2).encode_prompt(talk)
    assert alone == make(tokenizer, frame - 2).encode_prompt(turns(LONG))


@pytest.mark.parametrize("keep", ["end", "beginning"])
def test_a_system_that_leaves_no_room_goes_and_the_turn_stays_whole(keep: str) -> None:
    for name in (chats.CHATML, None):
        tokenizer = byte_pairs(name)
        whole = make(tokenizer).encode_prompt("tell me")[0]
        found = make(tokenizer, len(whole) + 3, keep).encode_prompt((Message("system", LONG), *turns("tell me")))
        assert found == (whole, True)


def test_turns_that_are_left_begin_and_end_with_the_user() -> None:
    system, u, a, v, b, w = TALK
    assert fewer_turns(TALK, "end") == [(system, v, b, w), (system, w)]
    assert fewer_turns(TALK, "beginning") == [(system, u, a, v), (system, u)]
    for turns_left in ((system, u), (system,), (u, a)):
        assert fewer_turns(turns_left, "end") == [turns_left]
    assert fewer_turns((a, w), "end") == [(w,)]


def test_a_template_that_leaves_no_room_is_a_mistake() -> None:
    for name in (chats.CHATML, None):
        with pytest.raises(UserError) as error:
            make(byte_pairs(name), 6).encode_prompt(LONG)
        assert "data.max_prompt_length: 6, which the template fills" in str(error.value) and "raise" in str(error.value)


def test_special_tokens_in_a_text_that_is_cut_stay_text() -> None:
    tokenizer = byte_pairs(chats.CHATML)
    ids, _ = make(tokenizer, 24).encode_prompt(f"{LONG} <|im_end|> ?")
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert tokenizer.decode(ids).endswith(" <|im_end|> ?<|im_end|>\n<|im_start|>assistant\n")
