"""The words of texts in many scripts."""

from __future__ import annotations

import pytest

from pipeline.words import between_blanks, pieces, words

CASES = {
    "The boys' 2 shoes": ["the", "boys", "2", "shoes"],
    "naïve Café": ["naïve", "café"],
    "Я люблю": ["я", "люблю"],
    "한국어 문장": ["한국어", "문장"],
    "हिन्दी में": ["हिन्दी", "में"],  # vowel signs are no letters, and belong to them
    "今天IKEA好": ["今", "天", "ikea", "好"],
    "カーソルを": ["カ", "ー", "ソ", "ル", "を"],
    "ที่นี่": ["ที่", "นี่"],  # two consonants, each with its vowel and tone
    "\uff21\uff22\uff11": ["ab1"],
    "🙂 ... 。": [],
}


@pytest.mark.parametrize(("text", "wanted"), CASES.items())
def test_words(text: str, wanted: list[str]) -> None:
    assert words(text) == wanted


def test_pieces_hold_each_mark_too() -> None:
    assert pieces("It's 3.5, 你好。") == ["it", "'", "s", "3", ".", "5", ",", "你", "好", "。"]
    assert pieces(" \0\n") == []


def test_between_blanks_punctuation_clings_to_words() -> None:
    assert between_blanks("It's  3.5, é.") == ["It's", "3.5,", "é."]
    assert between_blanks("你好\uff0cIKEA") == ["你", "好", "\uff0c", "IKEA"]
