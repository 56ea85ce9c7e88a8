"""BLEU and chrF against the package, and their edges."""

from __future__ import annotations

import random

import pytest
from sacrebleu import sentence_bleu, sentence_chrf

from reward_models import bleu, chrf

WORDS = ("the", "cat", "cats", "sat", "on", "mat", "3.5", "it's", "été", ",", ".", "мат")
THEIRS = {bleu: sentence_bleu, chrf: sentence_chrf}
METRICS = pytest.mark.parametrize("metric", THEIRS)


def random_text(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(0, 9)))


def test_bleu_of_chinese_is_that_of_the_package_for_chinese():
    texts = ["今天天气很好。我们去公园,好吗?", "今天天气不好,我们去 IKEA 商店。", "Das ist 3.5 gut", "今天"]
    for found in texts:
        for gold in texts:
            wanted = sentence_bleu(found, [gold], tokenize="zh").score / 100
            assert bleu.reward([""], [found], references=[[gold]]) == pytest.approx([wanted], abs=1e-9)


def test_bleu_by_hand():
    # 3 words of 3 found, pairs 1 of 2, triples 0 of 1, smoothed to 1/2 / 1; effective order: there are no quadruples
    # (1 * 1/2 * 1/2)^(1/3) = .629961, and of 5 words 3: exp(1 - 5/3) = .513417
    assert bleu.reward([""], ["a b d"], references=[["a b c d e"]]) == pytest.approx([0.629961 * 0.513417], abs=1e-5)


def test_chrf_by_hand():
    # ab against abc: characters P = 2/2, R = 2/3; pairs P = 1/1, R = 1/2; no triples in ab: two orders are counted.
    # mean P = 1, mean R = 7/12; F = 5 P R / (4 P + R) = 35/12 / (55/12) = 7/11
    assert chrf.reward([""], ["ab"], references=[["abc"]]) == pytest.approx([7 / 11])


@METRICS
def test_equal_to_the_package(metric):
    draw = random.Random(23)
    found = [random_text(draw) for _ in range(60)]
    gold = [[random_text(draw) or "the" for _ in range(draw.randint(1, 3))] for _ in range(20) for _ in range(3)]
    wanted = [min(THEIRS[metric](text, texts).score / 100, 1.0) for text, texts in zip(found, gold, strict=True)]
    assert metric.reward([""] * 60, found, references=gold) == wanted
    gold = [texts for texts in gold[::6] for _ in range(6)]  # neighbours with the same references
    wanted = [min(THEIRS[metric](text, texts).score / 100, 1.0) for text, texts in zip(found, gold, strict=True)]
    assert metric.reward([""] * 60, found, references=gold) == wanted


@METRICS
def test_the_reference_itself_is_worth_1_nothing_0(metric):
    texts = ["the cat sat on the mat .", "a", "one more text, somewhat longer"]
    gold = [["something else", text] for text in texts]
    assert metric.reward([""] * 3, texts, references=gold) == [1.0, 1.0, 1.0]
    assert metric.reward([""], [""], references=[["a"]]) == [0.0]


@METRICS
def test_order_does_not_matter(metric):
    found, gold = ["the cat", "sat on", "a mat"], [["the cat sat"], ["sat on a mat"], ["the mat"]]
    values = metric.reward([""] * 3, found, references=gold)
    turned = metric.reward([""] * 3, [found[i] for i in (2, 0, 1)], references=[gold[i] for i in (2, 0, 1)])
    assert turned == [values[2], values[0], values[1]]


@METRICS
def test_missing_references_are_an_error(metric):
    with pytest.raises(ValueError, match="no column `references`"):
        metric.reward([""], ["a"])
    with pytest.raises(ValueError, match=r"references\[0\] is 'a', wanted a list"):
        metric.reward([""], ["a"], references=["a"])


@METRICS
def test_blank_references_are_an_error(metric):
    with pytest.raises(ValueError, match=r"completion 1 'b' has blank references alone, wanted one with text"):
        metric.reward(["", ""], ["a", "b"], references=[["a", ""], ["", " \n"]])
