"""The squad reward by hand, against its plain definition, and its edges."""

from __future__ import annotations

import gzip
import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from reward_models import squad
from reward_models._released import question
from tests import plain_squad

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "squad_qg" / "test.jsonl.gz"
BOAT = ["what colour is the boat ?", "which colour does the old boat have ?"]
WORDS = (*"abcd", "who", "(b)", "it's", "50%", "a.b", "x,", "?", "-", "[1]", "$5", "<s>", "</s>", "É", "\0")


def parts(references: list[str], completion: str) -> tuple[float, float, float]:
    """ROUGE-L, BLEU-4 and the reward of one completion."""
    return tuple(
        function([""], [completion], references=[references])[0]
        for function in (squad.rougeL, squad.bleu4, squad.reward)
    )


def random_text(draw: random.Random) -> str:
    return "".join(draw.choice(WORDS) + draw.choice((" ", " ", " ", "  ", "")) for _ in range(draw.randint(0, 12)))


def test_two_references():
    # 7 words; LCS with the references is 4 (colour the boat ?) and 7 of 8: P = 7/7, R = 7/8, F = 2.44 PR / (R + 1.44 P)
    # = 2.135 / 2.315. n-grams found: 7/7, 5/6, 3/5, 1/4: (1 * .8333 * .6 * .25)^(1/4) = .594604; the closest length
    # is 6, so no penalty
    rouge_l, bleu_4, total = parts(BOAT, "which colour does the boat have ?")
    assert rouge_l == pytest.approx(2.135 / 2.315, abs=1e-12)
    assert [round(value, 6) for value in (rouge_l, bleu_4, total)] == [0.922246, 0.622333, 0.722304]


def test_the_reference_itself():
    # BLEU-4: (1 - 1e-9 / 7)(1 - 1e-9 / 6)(1 - 1e-9 / 5)(1 - 1e-9 / 4) to the 1/4 is 1 - 1.9e-10, and the penalty
    # exp(1 - (7 + 1e-9) / 7) = 1 - 1.4e-10: 2/3 of 3.3e-10 are missing
    text = "which colour does the boat have ?"
    rouge_l, bleu_4, total = parts([text], text)
    assert rouge_l == 1.0
    assert 1 - bleu_4 == pytest.approx(3.327e-10, rel=1e-3)
    assert 1 - total == pytest.approx(2.2e-10, rel=0.01)


def test_nothing_but_a_mark_in_common():
    # LCS 1 of 4 and 6 words: P = 1/4, R = 1/6, F = 2.44 / 24 / (1/6 + .36) = .193038; no pair is shared
    rouge_l, bleu_4, total = parts(["what colour is the boat ?"], "who painted it ?")
    assert [round(value, 6) for value in (rouge_l, total)] == [0.193038, 0.064346]
    assert bleu_4 == pytest.approx(1.5e-12, rel=0.05)


def test_the_closest_reference_decides_the_brevity_penalty_and_of_two_the_shorter():
    # 5 words; the closest lengths are 4 and 6: 4 is taken, no penalty; with 6 alone exp(1 - 6/5) = .818731
    short, long = "a b c d", "a b c d e f"
    assert squad.bleu4([""], ["a b c d e"], references=[[long, short]])[0] == pytest.approx(1.0, abs=1e-8)
    assert squad.bleu4([""], ["a b c d e"], references=[[long]])[0] == pytest.approx(0.818731, abs=1e-6)


def test_counts_are_clipped_by_the_reference_that_has_most():
    # a a a a: of four a, the references have 2 and 1: 2/4; pairs aa: 1/3; then nothing
    # (2/4 * 1/3 * 1e-15/2 * 1e-15/1)^(1/4)
    value = squad.bleu4([""], ["a a a a"], references=[["a a b c", "a b c d"]])[0]
    assert value == pytest.approx((0.5 / 3 * 0.5e-15 * 1e-15) ** 0.25, rel=1e-6)


def test_a_completion_is_put_into_the_words_of_the_references():
    # a blank before each hyphen that two characters follow, which are then passed over: -lr b -or, -rs b --r rb "- ?"
    assert question("<s>What's 5% of $9 (or [it])?</s>") == "what 's 5 % of $9 -lrb -or -lsb -it -rsb --rrb - ?"
    assert question('a twenty-first "big one" x-y') == "a twenty -first `` big one '' x-y"
    assert question("Mr. X, who ?") == "mr <sep>  x <sep2>  who ?"


@pytest.mark.parametrize("text", ["a, b.", "the twenty-first one ?", 'who wrote "a b c" ?', "今天天气", "Is it (5%)?"])
def test_a_question_is_worth_1_against_itself(text):
    assert squad.reward([""], [text], references=[[text]]) == pytest.approx([1.0], abs=1e-9)


def test_spellings_of_the_references_are_those_of_a_question():
    gold = "who said `` it 's 5 % '' -lrb- or so -rrb- ?"
    assert squad.reward([""], ['Who said "it\'s 5%" (or so)?'], references=[[gold]]) == pytest.approx([1.0], abs=1e-9)


def test_released_prepares_the_completion_alone():
    # twenty -first against twenty-first: 5 of 7 and 6 words: P = 5/7, R = 5/6, F = 2.44 PR / (R + 1.44 P); no four
    # words in a row are shared, so BLEU-4 is the fourth root of some 1e-16, next to 0
    text = "what is the twenty-first one ?"
    wanted = 2.44 * (5 / 7) * (5 / 6) / (5 / 6 + 1.44 * 5 / 7) / 3
    assert squad.released([""], [text], references=[[text]]) == pytest.approx([wanted], abs=1e-3)
    assert squad.released([""], ["a , b"], references=[["a , b"]])[0] < 1 / 3  # its comma is the word <sep2>
    quoted, gold = 'who wrote "a song of fire" ?', "who wrote `` a song of fire '' ?"
    assert squad.released([""], [quoted], references=[[gold]]) == pytest.approx([1.0], abs=1e-9)


def test_an_empty_word_is_not_the_character_0():
    # a - b with "" and with the character 0 between them: 2 of 3 words are common, P = R = F = 2/3
    assert squad.released([""], ["a \0 b"], references=[["a  b"]])[0] == pytest.approx(2 / 9)


@pytest.mark.parametrize("function", [squad.reward, squad.released, squad.rougeL, squad.bleu4])
def test_nothing_is_worth_nothing(function):
    assert function(["", ""], ["", "x"], references=[["a b"], ["a b"]]) == pytest.approx([0.0, 0.0], abs=1e-6)


def test_random_texts_equal_the_plain_definition():
    draw = random.Random(13)
    for _ in range(300):
        references = [random_text(draw) or "a" for _ in range(draw.randint(1, 4))]
        found = [random_text(draw) for _ in range(draw.randint(1, 9))]
        columns = {"references": [references] * len(found)}
        assert squad.released([""] * len(found), found, **columns) == plain_squad.released(references, found)
        gold = [*map(squad.marked, references)]
        wanted = plain_squad.scores(gold, [*map(squad.marked, found)])
        assert squad.reward([""] * len(found), found, **columns) == wanted


def test_real_questions_equal_the_plain_definition():
    if not DATA.exists():
        pytest.skip(f"no {DATA}")
    with gzip.open(DATA, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(80), strict=False)]
    for row, other in pairwise(rows):
        found = [row["completion"], other["completion"], row["prompt"]]
        gold = row["references"]
        assert squad.released([""] * 3, found, references=[gold] * 3) == plain_squad.released(gold, found)


def test_order_and_batch_mates_do_not_matter():
    draw = random.Random(17)
    found = [random_text(draw) for _ in range(20)]
    gold = [[random_text(draw) or "a"] if i % 3 else BOAT for i in range(20)]
    alone = [squad.reward([""], [text], references=[texts])[0] for text, texts in zip(found, gold, strict=True)]
    order = draw.sample(range(20), 20)
    turned = squad.reward([""] * 20, [found[i] for i in order], references=[gold[i] for i in order])
    assert turned == [alone[i] for i in order]


def test_missing_references_are_an_error():
    with pytest.raises(ValueError, match="no column `references`, which squad compares with"):
        squad.reward([""], ["a"])
    with pytest.raises(ValueError, match=r"completion 1 'b' has no references, which squad compares with"):
        squad.bleu4(["", ""], ["a", "b"], references=[["a"], []])
