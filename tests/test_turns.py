"""Every assistant turn of a conversation: which rows there are, and that reading them in one row changes nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from pipeline.algorithms import supervised
from pipeline.config.resolve import resolve
from pipeline.data import conversations, dataset, encoding
from pipeline.data.batching import Packing, collate
from pipeline.data.encoding import completion_rows, encode
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
    whole = encoding.joined(apart)
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
    assert len(apart) == 3 and encoding.joined(apart)[-1] == apart[-1]


def test_a_cut_response_is_learned_as_far_as_it_goes():
    """ "and ran far" without its end and EOS: what follows in the history is read and not learned."""
    apart = items(encoder(response_limit=2), LONG)
    assert apart[1].rows[0].cut_response
    (whole,) = encoding.joined(apart)
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
    wanted, found = one_pass(shape, apart, 1), one_pass(shape, encoding.joined(apart), size)
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    tiny.close(found[1], wanted[1])


def test_masks_by_hand():
    rows = [Row((3, 4), (5, 2, 6, 7, 2), learned=(True, True, False, True, True)), Row((3,), (8, 2))]
    made = [encode([SHORT], encoder(), lambda example, _, row=row: (row,))[0] for row in rows]
    mask = collate(made, [0, 1], Packing(2, None, False, tiny.PAD_ID)).response_mask
    assert mask.tolist() == [[True, True, False, True, True], [True, True, False, False, False]]
    assert not collate(made, [], Packing(2, None, False, tiny.PAD_ID)).response_mask.any()


def test_joined_rows_are_kept_in_the_cache_and_the_same(tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(3) for role in ("user", "assistant")]
    lines = [json.dumps({"messages": turns[: 2 + 2 * (i % 3)]}) + "\n" for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    data = resolve(["stage=sft", f"data.train={tmp_path}/rows.jsonl"]).settings.data
    found, written = [], []
    for folder in (None, tmp_path / "cache", tmp_path / "cache"):
        train, _ = dataset.splits(data, 3, folder=folder)
        apart = encode(conversations.learned(train, "all"), encoder(), completion_rows)
        found.append(encoding.joined(apart))
        written.append({place.name: place.stat().st_mtime_ns for place in tmp_path.glob("cache/tokens-*")})
        assert len(found[-1]) == len(train) < len(apart)
    assert [[*some] for some in found[1:]] == [[*found[0]]] * 2 and written[1] == written[2] and len(written[2]) == 2
