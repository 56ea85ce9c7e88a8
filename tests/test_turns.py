"""Every assistant turn of a conversation: which rows there are, and that reading them in one row changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch

from pipeline.algorithms import supervised
from pipeline.data import conversations
from pipeline.data.batching import Packing, collate
from pipeline.data.dataset import completion_rows
from pipeline.data.encoded import encode
from pipeline.data.tokenization import Encoder
from pipeline.errors import UserError
from pipeline.models.policy import Policy
from pipeline.records import Example, Message, Row
from tests import tiny

# user turns stand between marks of their own, assistant turns end with EOS
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ bos_token + m['content'] + bos_token }}{% endif %}{% endfor %}"
)


def talk(*texts: str, id: str = "a") -> Example:
    """A conversation in which user and assistant take turns; the last text is the completion."""
    roles = ("user", "assistant")
    prompt = tuple(Message(roles[i % 2], text) for i, text in enumerate(texts[:-1]))
    return Example(id, prompt, texts[-1], (texts[-1],), source="s")


LONG = talk("the cat", "sat on", "a mat", "and ran far", "away", "from this")
SHORT = talk("old big dog", "the cat ran", id="b")


def encoder(kind: str = "chat", prompt_limit: int = 64, response_limit: int = 64) -> Encoder:
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = CHAT
    template = tiny.PLAIN.model_copy(update={"kind": kind})
    return Encoder(tokenizer, template, prompt_limit, response_limit)


def items(made: Encoder, *examples: Example) -> list:
    return encode(conversations.learned(examples, "all"), made, completion_rows)


def test_a_row_for_each_assistant_turn():
    rows = conversations.learned([LONG, SHORT], "all")
    assert [(row.id, row.completion, len(row.prompt)) for row in rows] == [
        ("a/turn-1", "sat on", 1),
        ("a/turn-2", "and ran far", 3),
        ("a", "from this", 5),
        ("b", "the cat ran", 1),
    ]
    assert rows[0] == Example("a/turn-1", LONG.prompt[:1], "sat on", source="s")
    assert conversations.learned([LONG, SHORT], "last") == [LONG, SHORT]


def test_text_prompts_and_first_words_of_an_assistant_are_left_alone():
    text = Example("t", "Human: Hi", "Hello")
    greeted = Example("g", (Message("assistant", "Hello"), Message("user", "Hi")), "Yes")
    begun = Example("b", (Message("user", "Hi"), Message("assistant", "Hel")), "lo")
    for one in (text, greeted, begun):
        assert conversations.turns_of(one) == [one]
    with pytest.raises(UserError, match=r"train_on: all, but none of 2 rows has an assistant turn .*`history`"):
        conversations.learned([text, greeted], "all")


def test_rows_are_joined_where_one_begins_the_next():
    apart = items(encoder(), LONG, SHORT)
    whole = conversations.joined(apart)
    assert [item.example.id for item in whole] == ["a", "b"]
    row, last = whole[0].rows[0], apart[2].rows[0]
    assert row.prompt_ids + row.response_ids == last.prompt_ids + last.response_ids  # what generation would read
    learned_ids = [token for token, learned in zip(row.response_ids, row.learned, strict=True) if learned]
    assert tuple(learned_ids) == sum((item.rows[0].response_ids for item in apart[:3]), ())
    assert learned_ids.count(tiny.EOS_ID) == 3
    assert whole[1].rows[0].learned == ()


@pytest.mark.parametrize("made", [encoder("text"), encoder(prompt_limit=5)], ids=["no EOS in the history", "cut"])
def test_rows_that_do_not_begin_one_another_stay_apart(made: Encoder):
    apart = items(made, LONG)
    assert len(apart) == 3 and conversations.joined(apart)[-1] == apart[-1]


def test_a_cut_response_is_learned_as_far_as_it_goes():
    """ "and ran far" without its end and EOS: what follows in the history is read and not learned."""
    apart = items(encoder(response_limit=2), LONG)
    assert apart[1].rows[0].cut_response
    (whole,) = conversations.joined(apart)
    assert sum(whole.rows[0].learned) == sum(len(item.rows[0].response_ids) for item in apart) == 6


def one_pass(shape: str, rows: list, size: int) -> tuple[float, list[torch.Tensor]]:
    """The summed loss of `rows` in micro-batches of `size`, and its gradient."""
    policy = Policy(tiny.language_model(shape), 64)
    packing, total = Packing(size, None, policy.encoder_decoder, tiny.PAD_ID), torch.zeros(())
    for start in range(0, len(rows), size):
        batch = collate(rows, range(start, min(start + size, len(rows))), packing)
        total = total + supervised.loss(policy(batch), batch, supervised.Settings(0.0))[0]
    total.backward()
    return float(total), [p.grad for p in policy.parameters()]


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@pytest.mark.parametrize("size", [1, 2])
def test_joined_rows_have_the_loss_and_gradient_of_rows_apart(shape: str, size: int):
    apart = items(encoder(), LONG, SHORT)
    wanted, found = one_pass(shape, apart, 1), one_pass(shape, conversations.joined(apart), size)
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    tiny.close(found[1], wanted[1])


def test_masks_by_hand():
    rows = [Row((3, 4), (5, 2, 6, 7, 2), learned=(True, True, False, True, True)), Row((3,), (8, 2))]
    made = [encode([SHORT], encoder(), lambda example, _, row=row: (row,))[0] for row in rows]
    mask = collate(made, [0, 1], Packing(2, None, False, tiny.PAD_ID)).response_mask
    assert mask.tolist() == [[True, True, False, True, True], [True, True, False, False, False]]
    assert not collate(made, [], Packing(2, None, False, tiny.PAD_ID)).response_mask.any()
