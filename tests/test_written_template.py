"""The chat template that is saved for other tools: the ids of a chat are those that training made of its turns."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data.tokenization import Encoder
from pipeline.data.written_template import for_others
from pipeline.models import build
from pipeline.models.trained_input import INPUT_FILE, save_input
from pipeline.records import Message
from tests import chats, tiny
from tests.test_template import KINDS, turns
from tests.test_trained_input import CHATML, DATED, chat_tokenizer, encoder_at, policy_at

SYSTEM = Message("system", "S.")
# name -> what our encoder is given, and the same as a chat
CHATS = {
    "one text": ("why me?", turns("why me?")),
    "a text with a blank": (" why me? ", turns(" why me? ")),
    "turns": (turns("a b", "c d", "e?"),) * 2,
    "a system": ((SYSTEM, *turns("a")),) * 2,
    "an answer with its blank": (turns("a b", " c d", "e?"),) * 2,
    "an answer with two": (turns("a b", "  c d", "e?"),) * 2,
}
TEMPLATES = {
    "shipped": {},
    "system": {"system": "Be kind. "},
    "prompt": {"prompt": "Q: {prompt} A:"},
    "all": {"prompt": "Q: {prompt} A:", "response": "-{response}!", "system": 'é🙂 "x" \\n {{ }}'},
    "response": {"response": "-{response}!"},
    "lines": {"assistant": "\nBot:\n", "human": "\nYou: "},
}
ANSWER = "It is four ."


def ids_of(encoder: Encoder, chat: tuple[Message, ...], written: str | None, **how) -> tuple[int, ...]:
    """What transformers makes of a chat with the template that is saved."""
    listed = [turn._asdict() for turn in chat]
    return tuple(encoder.tokenizer.apply_chat_template(listed, chat_template=written, return_dict=False, **how))


def encoder_of(kind: str, own: str | None, **template) -> Encoder:
    changed = {"kind": "text" if own is None else "chat", **template}
    return Encoder(KINDS[kind](own), tiny.settings("sft").template.model_copy(update=changed), 400, 64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_our_own_lines_as_a_chat_template(kind: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    encoder = encoder_of(kind, None, **TEMPLATES[name])
    written = for_others(encoder)
    for prompt, chat in CHATS.values():
        row = encoder.encode(prompt, ANSWER)
        assert ids_of(encoder, chat, written, add_generation_prompt=True) == row.prompt_ids
        answered = (*chat, Message("assistant", ANSWER))
        assert ids_of(encoder, answered, written) == row.prompt_ids + row.response_ids
        begun = ids_of(encoder, (*chat, Message("assistant", "It is")), written, continue_final_message=True)
        whole = row.prompt_ids + row.response_ids
        assert len(begun) > len(row.prompt_ids) and begun == whole[: len(begun)]
    assert not caplog.messages


@pytest.mark.parametrize("own", ["CHATML", "NO_OPENING"])
@pytest.mark.parametrize("name", ["shipped", "system", "prompt", "all", "response"])
def test_a_chat_template_with_what_was_set(own: str, name: str) -> None:
    encoder = encoder_of("byte pairs", getattr(chats, own), **TEMPLATES[name])
    written = for_others(encoder)
    assert (written is None) == (own == "CHATML" and name == "shipped")
    for prompt, chat in CHATS.values():
        row = encoder.encode(prompt, ANSWER)
        assert ids_of(encoder, chat, written, add_generation_prompt=True) == row.prompt_ids
        answered = ids_of(encoder, (*chat, Message("assistant", ANSWER)), written)
        assert answered[: len(row.prompt_ids + row.response_ids)] == row.prompt_ids + row.response_ids


@pytest.mark.parametrize("own", [CHATML, DATED, None])
def test_a_reward_model_reads_to_the_end_of_the_answer(own: str | None) -> None:
    date = {"date": "2026-03-01"} if own == DATED else {}
    kind = "text" if own is None else "chat"
    encoder = Encoder(chat_tokenizer(own), tiny.PLAIN.model_copy(update={"kind": kind, **date}), 64, 64)
    row = encoder.encode("the cat", "sat")
    chat = (*turns("the cat"), Message("assistant", "sat"))
    assert ids_of(encoder, chat, for_others(encoder, scalar=True)) == row.prompt_ids + row.response_ids


def test_an_encoder_reads_the_prompt_to_its_end() -> None:
    tokenizer = chats.sentence_pieces(around="$A </s>")
    template = tiny.PLAIN.model_copy(update={"system": "S. "})
    encoder = Encoder(tokenizer, template, 400, 64, encoder_decoder=True)
    prompt = encoder.encode_prompt(turns("a b", "c", "d"))[0]
    assert ids_of(encoder, turns("a b", "c", "d"), for_others(encoder), add_generation_prompt=True) == prompt
    assert prompt[-1] == tokenizer.eos_token_id


def test_a_saved_date_stands_still() -> None:
    encoder = Encoder(
        chat_tokenizer(DATED), tiny.PLAIN.model_copy(update={"kind": "chat", "date": "2024-02-09"}), 64, 64
    )
    ids = ids_of(encoder, turns("why?"), for_others(encoder), add_generation_prompt=True)
    assert ids == encoder.encode_prompt("why?")[0] and encoder.tokenizer.decode(ids).startswith("\n9 Feb 2024")


def saved(place: Path, own: str | None, **template) -> tuple[str, Encoder]:
    """A model directory whose tokenizer has the chat template `own`, as training under `template` leaves it."""
    directory = policy_at(place, chat_tokenizer(own))
    encoder = encoder_at("sft", directory, *(f"template.{name}={value}" for name, value in template.items()))
    save_input(Path(directory), encoder)
    return directory, encoder


@pytest.mark.parametrize("own", [None, CHATML])
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_our_own_loader_reads_on_as_trained(tmp_path: Path, own: str | None, kind: str) -> None:
    """Neither under the template that was written for others, nor with its system twice."""
    if (own, kind) == (None, "chat"):
        pytest.skip("there is no chat template to train under")
    directory, trained = saved(tmp_path / "m", own, kind=kind, system="Be kind. ")
    wanted = trained.encode("why?", "so")
    for stage in ("rl", "evaluate", "reward"):
        again = encoder_at(stage, directory)
        assert again.encode("why?", "so") == wanted and again.template == trained.template
        assert again.tokenizer.chat_template == own
    # saved by the next stage, it is the same directory again
    save_input(tmp_path, again)
    assert (tmp_path / INPUT_FILE).read_bytes() == (tmp_path / "m" / INPUT_FILE).read_bytes()
    assert (tmp_path / "chat_template.jinja").read_bytes() == (tmp_path / "m" / "chat_template.jinja").read_bytes()
    # where only the tokenizer is left, as behind a name on the hub, it says the same
    (tmp_path / "m" / INPUT_FILE).unlink()
    elsewhere = encoder_at("rl", directory)
    assert elsewhere.template.kind == "chat" and elsewhere.encode("why?", "so") == wanted


def test_a_chat_template_is_asked_for_after_training_as_text(tmp_path: Path) -> None:
    directory, _ = saved(tmp_path / "chat", CHATML, kind="text")
    assert encoder_at("sft", directory, "template.kind=chat").prompt_text("a").startswith("<|im_start|>user\na")
    directory, _ = saved(tmp_path / "none", None)
    with pytest.raises(build.UserError, match="the tokenizer has no chat template"):
        encoder_at("sft", directory, "template.kind=chat")


def test_plain_texts_teach_no_chats(tmp_path: Path) -> None:
    encoder = tiny.encoder()
    save_input(tmp_path, encoder, asked=False)
    assert [file.name for file in tmp_path.iterdir()] == [INPUT_FILE]
