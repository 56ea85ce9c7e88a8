"""Rows under chat templates and under our own: the ids that the template itself makes, whatever the texts hold."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import sentencepiece
from transformers import MarianTokenizer, PreTrainedTokenizerBase

from pipeline.data import conversations, encoding, transcripts
from pipeline.data.encoding import completion_rows, encode
from pipeline.data.tokenization import Encoder
from pipeline.errors import UserError
from pipeline.records import Example, Message
from tests import chats, tiny
from tests.chats import byte_pairs, sentence_pieces

OWN_ENDS = {
    "CHATML": "<|im_end|>",
    "LLAMA_3": "<|eot|>",
    "GEMMA": "<end_of_turn>",
    "LLAMA_2": "</s>",
    "ZEPHYR": "</s>",
    "NO_OPENING": "</s>",
    "EMPTY_THOUGHTS": "<|im_end|>",
}
KINDS: dict[str, Callable[..., PreTrainedTokenizerBase]] = {
    "byte pairs": byte_pairs,
    "a blank first": lambda *about: byte_pairs(*about, prefix=True),
    "legacy pieces": sentence_pieces,
    "pieces": lambda *about: sentence_pieces(*about, legacy=False),
}


def make(tokenizer: PreTrainedTokenizerBase, limit: int = 256, keep: str = "end", **template) -> Encoder:
    chosen = tiny.settings("sft").template.model_copy(update=template)
    return Encoder(tokenizer, chosen, limit, 64, keep)


def turns(*texts: str) -> tuple[Message, ...]:
    """Messages of user and assistant in turn."""
    return tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))


def own_ids(tokenizer: PreTrainedTokenizerBase, messages: tuple[Message, ...]) -> tuple[int, ...]:
    """What transformers makes of a conversation."""
    listed = [turn._asdict() for turn in messages]
    return tuple(tokenizer.apply_chat_template(listed, tokenize=True, return_dict=False))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OWN_ENDS)
def test_a_row_is_what_the_template_makes_of_it_up_to_its_end_of_turn(name: str, kind: str) -> None:
    tokenizer = KINDS[kind](getattr(chats, name))
    encoder, whole = make(tokenizer), own_ids(tokenizer, turns("hello", "It is four ."))
    row = encoder.encode("hello", "It is four .")
    last = max(i for i, token in enumerate(whole) if token == encoder.eos_id)
    assert row.prompt_ids + row.response_ids == whole[: last + 1]
    assert row.prompt_ids == encoder.encode_prompt("hello")[0]
    assert tokenizer.convert_ids_to_tokens(encoder.eos_id) == OWN_ENDS[name]
    assert encoder.stop_ids == tuple(dict.fromkeys((encoder.eos_id, tokenizer.eos_token_id)))
    assert encoder.described() == f"template: the tokenizer's chat template, turns end with {OWN_ENDS[name]}"


@pytest.mark.parametrize(
    ("name", "why"),
    [("PLAIN_ENDS", "ends turns without a special token"), ("NO_ANSWERS", "writes no turn of the assistant")],
)
def test_templates_without_an_end_of_turn_end_with_eos_and_say_so(name: str, why: str) -> None:
    encoder = make(byte_pairs(getattr(chats, name)))
    assert encoder.encode("hello", "It is four .").response_ids[-1] == encoder.tokenizer.eos_token_id
    assert encoder.described() == f"template: the tokenizer's chat template, which {why}: responses end with </s>"


def test_auto_is_text_without_a_chat_template() -> None:
    encoder = make(byte_pairs())
    assert encoder.template.kind == "text" and encoder.described() == "template: text, responses end with </s>"
    assert make(byte_pairs(chats.CHATML), kind="text").template.kind == "text"
    undated = make(byte_pairs(chats.CHATML), date="2026-03-01").described()
    assert undated == "template: the tokenizer's chat template, turns end with <|im_end|>"  # it writes no date


@pytest.mark.parametrize("answer", [" hi there\n", "\n\nhi there ", "    hi there"])
@pytest.mark.parametrize("name", ["CHATML", "LLAMA_3", "LLAMA_2", "EMPTY_THOUGHTS"])
def test_blanks_around_an_answer_are_what_the_template_makes_of_them(name: str, answer: str) -> None:
    tokenizer = byte_pairs(getattr(chats, name))
    encoder, whole = make(tokenizer), own_ids(tokenizer, turns("hello", answer))
    row = encoder.encode("hello", answer)
    last = max(i for i, token in enumerate(whole) if token == encoder.eos_id)
    assert row.prompt_ids + row.response_ids == whole[: last + 1]
    stripped = {"LLAMA_3": answer.strip(), "EMPTY_THOUGHTS": answer.lstrip("\n")}  # the others keep all
    assert encoder.decode(row.response_ids) == stripped.get(name, answer)


@pytest.mark.parametrize("name", ["CHATML", "GEMMA", "LLAMA_2", "LLAMA_3"])
def test_turns_are_joined_whatever_ends_them(name: str) -> None:
    """ChatML's line end behind <|im_end|> is read with the next prompt, not learned."""
    tokenizer = byte_pairs(getattr(chats, name))
    encoder, talk = make(tokenizer), turns("hello", "hi there", "two plus two ?", "It is four .")
    rows = conversations.learned([Example("a", talk[:-1], talk[-1].content)], "all")
    (item,) = encoding.joined(encode(rows, encoder, completion_rows))
    row, whole, line_end = item.rows[0], own_ids(tokenizer, talk), tokenizer("\n").input_ids
    assert row.prompt_ids + row.response_ids == whole[: len(row)] and set(whole[len(row) :]) <= {*line_end}
    learned = [token for token, is_learned in zip(row.response_ids, row.learned, strict=True) if is_learned]
    end = OWN_ENDS[name]
    assert tokenizer.decode(learned).replace(" ", "") == f"hithere{end}Itisfour.{end}"


def test_what_the_prompt_opened_is_not_opened_again() -> None:
    encoder = make(byte_pairs(chats.THINKING))
    assert encoder.described().endswith("; prompts end with <think>, which responses have to close")
    assert encoder.prompt_text("hello").endswith("assistant\n<think>\n")
    wanted = encoder.encode("hello", "two</think>four").response_ids
    for completion in ("<think>\ntwo</think>four", "<think>two</think>four"):
        assert encoder.encode("hello", completion).response_ids == wanted
    assert make(byte_pairs(chats.ZEPHYR)).response_text("<|assistant|>\nhi") == "\nhi"
    empty = make(byte_pairs(chats.EMPTY_THOUGHTS))
    assert empty.response_text("<think>two</think>four") == "<think>two</think>four"
    never = make(byte_pairs(chats.THINKING.replace("<think>\n", "<think>\n\n</think>\n\n")))
    assert never.response_text("<think>\n</think>\n\nfour") == never.response_text("four") == "four"


def test_a_prompt_that_ends_with_the_assistant_is_gone_on_with() -> None:
    talk = turns("hello", "the old man")
    for encoder in (make(byte_pairs(chats.CHATML)), make(byte_pairs())):
        row, whole = encoder.encode(talk, " walked"), encoder.encode("hello", "the old man walked")
        assert row.prompt_ids + row.response_ids == whole.prompt_ids + whole.response_ids


@pytest.mark.parametrize("kind", ["byte pairs", "legacy pieces"])
def test_a_causal_prompt_has_no_eos_at_its_end(kind: str) -> None:
    tokenizer = KINDS[kind](None, "<s> $A </s>")
    row = make(tokenizer).encode("hello", "hi there")
    assert (*row.prompt_ids, *row.response_ids) == tuple(
        tokenizer("\n\nHuman: hello\n\nAssistant: hi there")["input_ids"]
    )
    assert row.prompt_ids[0] == 1 and 1 not in row.prompt_ids[1:] and 2 not in row.prompt_ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("completion", ["hi there", " hi there"])
def test_one_blank_opens_a_response_under_every_tokenizer(kind: str, completion: str) -> None:
    tokenizer = KINDS[kind]()
    row = make(tokenizer).encode("hello", completion)
    whole = tokenizer("\n\nHuman: hello\n\nAssistant: hi there")["input_ids"]
    assert (*row.prompt_ids, *row.response_ids) == (*whole, tokenizer.eos_token_id)


def test_indented_text_keeps_its_blanks() -> None:
    assert make(byte_pairs()).response_text("    return x") == "     return x"


def test_an_instruction_stands_in_the_users_message() -> None:
    chat, text = (make(byte_pairs(chats.CHATML), prompt="Sum up: {prompt}", kind=kind) for kind in ("auto", "text"))
    assert chat.prompt_text("a {x}") == "<|im_start|>user\nSum up: a {x}<|im_end|>\n<|im_start|>assistant\n"
    assert text.prompt_text("a {x}") == "Sum up: a {x}"
    assert make(byte_pairs(chats.CHATML)).prompt_text("a") == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert make(byte_pairs()).prompt_text("a") == "\n\nHuman: a\n\nAssistant:"


def test_the_system_of_the_settings_and_of_a_row_are_one_message() -> None:
    encoder = make(byte_pairs(chats.CHATML), system="Be kind.")
    own = (Message("system", "Be brief."), Message("user", "a"))
    assert encoder.prompt_text(own).startswith(
        "<|im_start|>system\nBe kind.\n\nBe brief.<|im_end|>\n<|im_start|>user\na"
    )
    with pytest.raises(UserError, match=r"cannot write the roles system, user \(System role not supported\)"):
        make(byte_pairs(chats.GEMMA), system="Be kind.").encode_prompt("a")


@pytest.mark.parametrize("name", ["CHATML", "GEMMA", None])
def test_plain_text_has_no_template_but_bos_and_eos(name: str | None) -> None:
    tokenizer = byte_pairs(getattr(chats, name) if name else None)
    row = make(tokenizer, system="Be kind.").encode("", "once upon a time")
    assert row.prompt_ids == (1,)
    assert row.response_ids == (*tokenizer("once upon a time", add_special_tokens=False)["input_ids"], 2)


@pytest.fixture(scope="module")
def marian(tmp_path_factory) -> MarianTokenizer:
    """Two vocabularies of pieces, English and German, in one table of ids."""
    folder, table = tmp_path_factory.mktemp("marian"), {"</s>": 0, "<unk>": 1}
    texts = {
        "source": ["the house is red", "where is the old man"],
        "target": ["das Haus ist rot", "wo ist der alte Mann"],
    }
    for name, lines in texts.items():
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines * 20),
            model_prefix=str(folder / name),
            vocab_size=40,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{name}.model"))
        for i in range(pieces.get_piece_size()):
            table.setdefault(pieces.id_to_piece(i), len(table))
    table["<pad>"] = len(table)
    (folder / "vocab.json").write_text(json.dumps(table), encoding="utf-8")
    return MarianTokenizer(str(folder / "source.model"), str(folder / "target.model"), str(folder / "vocab.json"))


@pytest.mark.parametrize("response", ["wo ist der alte Mann", "der alte </s> Mann"])
def test_a_translation_is_in_pieces_of_its_own_language(marian: MarianTokenizer, response: str) -> None:
    template = tiny.settings("sft").template.model_copy(update={"prompt": "{prompt}"})
    row = Encoder(marian, template, 64, 64, encoder_decoder=True).encode("where is the old man", response)
    assert row.prompt_ids == tuple(marian("where is the old man")["input_ids"])
    assert row.response_ids == tuple(marian(text_target=response, split_special_tokens=True)["input_ids"])
    assert row.response_ids != tuple(marian(response, split_special_tokens=True)["input_ids"])


def test_transcripts_are_turns_and_no_mark_comes_twice() -> None:
    text = "\n\nHuman: a?\n\nAssistant: b\n\nHuman: c?\n\nAssistant:"
    said = transcripts.turns_of(text)
    assert make(byte_pairs()).prompt_text(said) == text and make(byte_pairs()).response_text("d", said) == " d"
    # as a row of hh, which asks for its text as it is
    assert make(byte_pairs(), prompt="{prompt}", response="{response}").response_text("d", said) == " d"
    tokenizer = byte_pairs(chats.CHATML)
    row, whole = make(tokenizer).encode(said, "d"), own_ids(tokenizer, turns("a?", "b", "c?", "d"))
    assert row.prompt_ids + row.response_ids == whole[:-1]


def test_a_transcript_of_which_the_assistant_goes_on() -> None:
    text = "\n\nHuman: a?\n\nAssistant: b\n\nAssistant:"
    assert transcripts.turns_of(text) == (Message("user", "a?"), Message("assistant", "b\n\n"))
    assert make(byte_pairs()).prompt_text(transcripts.turns_of(text)) == "\n\nHuman: a?\n\nAssistant: b\n\n"
    assert transcripts.turns_of("a play\n\nAssistant:") is transcripts.turns_of(text + " c") is None
