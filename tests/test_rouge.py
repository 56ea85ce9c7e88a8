"""ROUGE against the package it must equal, and by hand."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path

import pytest
from nltk.stem.porter import PorterStemmer
from rapidfuzz.distance import LCSseq
from rouge_score.rouge_scorer import RougeScorer, lcs_ind
from rouge_score.tokenize import tokenize

from reward_models import length as length_reward
from reward_models import rouge as rouge_reward
from reward_models._released import punctuated
from reward_models._rouge import Split, all_words, ascii_words, lcs_positions, rouge, stem

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
THEIRS = {stemmed: RougeScorer(list(KINDS), use_stemmer=stemmed) for stemmed in (True, False)}
PORTER = PorterStemmer()
ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"

ODD_TEXTS = (
    "",
    " ",
    "\n",
    "\n\n \n",
    "...",
    "a",
    "A a a A",
    "the the the the",
    "don't can't won't, it's",
    "3.14 2,000 1e-5 007 10,000,000",
    "naïve café Straße ẞ ﬁne İstanbul ǅ K 日本語 русский текст",
    "emoji 🙂 in 🙂 the middle",
    "tabs\tand\u00a0spaces\u2028lines\x0bhere\x00end",
    "UPPER lower MiXeD",
    "snake_case kebab-case path/to/file.py https://example.org/?q=1",
    "one\ntwo\n\nthree two\n   \none",
    "yyyy yyyyyyyy sayyyying y",
    "x" * 300,
    "y" * 3000 + "ing",
    "a\nb\na\n" * 20,
    "the cat\r\nthe dog\rthe end",
)
# One word and more for every rule of every step of the stemmer, and for the forms that NLTK adds.
RULE_WORDS = """
    caresses ponies ties dies flies caress cats gas this agreed feed bleed seed plastered bled motoring sing king
    conflated troubled sized hopping tanned falling hissing fizzed failing filing died spied tried dried lied
    happy sky enjoy spy fly say toyy relational conditional rational valenci hesitanci digitizer conformabli radicalli
    differentli vileli analogousli vietnamization predication operator feudalism decisiveness hopefulness callousness
    formaliti sensitiviti sensibiliti wonderfulli geologi archaeologi theologi logi alli valli triplicate formative
    formalize electriciti electrical hopeful goodness revival allowance inference airliner gyroscopic adjustable
    defensible irritant replacement adjustment dependent adoption decision region lion onion homologou communism
    activate angulariti homologous effective bowdlerize probate rate cease controll roll hall skies dying lying tying
    news innings inning outings canning cannings howe proceed exceed succeed generalizations oscillators 1990s 3rd
    sssss eeee aaaa oily usably possibly nationally fully universally apologize apology ology ably ation ness ement
""".split()  # noqa: SIM905


ASCII_TEXTS = [text for text in ODD_TEXTS if text.isascii()]


def tokens(text: str, stemmed: bool = True) -> list[str]:
    return [*map(stem, ascii_words(text))] if stemmed else ascii_words(text)


def our_scores(references: list[str], candidate: str, stemmed: bool) -> dict[str, float]:
    return all_scores(references, [candidate], stemmed)[0]


def all_scores(
    references: list[str], candidates: list[str], stemmed: bool, split: Split = all_words
) -> list[dict[str, float]]:
    return [dict(zip(KINDS, scores, strict=True)) for scores in rouge(KINDS, references, candidates, stemmed, split)]


def their_scores(references: list[str], candidate: str, stemmed: bool) -> dict[str, float]:
    scores = THEIRS[stemmed].score_multi(references, candidate)
    return {kind: scores[kind].fmeasure for kind in KINDS}


def random_text(draw: random.Random, longest: int = 14) -> str:
    """Up to so many words, many of them repeated, with punctuation, line breaks and rule words."""
    kinds = (*"abcde", "the", "running", "runs", "42", *RULE_WORDS)
    words = [draw.choice(kinds) for _ in range(draw.randint(0, longest))]
    return "".join(word + draw.choice((" ", " ", " ", "\n", ", ", "-", ".\n\n")) for word in words)


def test_by_hand():
    # candidate: the cat sat on a mat = 6 words, reference: the cat is on the mat = 6 words
    # shared words the, cat, on, mat: P = R = 4/6; shared pairs: "the cat": P = R = 1/5; LCS the cat on mat: 4/6
    scores = our_scores(["the cat is on the mat"], "the cat sat on a mat", stemmed=True)
    assert scores == pytest.approx({"rouge1": 2 / 3, "rouge2": 1 / 5, "rougeL": 2 / 3, "rougeLsum": 2 / 3})


def test_tokens():
    assert tokens("The boys' 2 running-shoes", stemmed=True) == ["the", "boy", "2", "run", "shoe"]
    assert tokens("The boys' 2 running-shoes", stemmed=False) == ["the", "boys", "2", "running", "shoes"]


def test_tokens_equal_rouge_score():
    draw = random.Random(3)
    alphabet = [chr(i) for i in range(0x250)] + [*"aeiouylltssdbczrngi1  \n\u212a\u0130\ufb01\u2028\ud7ff\U0001f642"]
    texts = [*ODD_TEXTS, *RULE_WORDS, " ".join(PORTER.pool), "".join(map(chr, range(0x3000)))]
    texts += ["".join(draw.choices(alphabet, k=60)) for _ in range(300)]
    texts += ["".join(draw.choices("aeioouylltssdbczrngi1 ", k=200)) for _ in range(300)]
    for text in texts:
        assert tokens(text) == tokenize(text, PORTER), text
        assert tokens(text, stemmed=False) == tokenize(text, None), text


def test_short_words_are_not_stemmed():
    assert [stem(word) for word in ("sky", "was", "ing", "is", "")] == ["sky", "was", "ing", "is", ""]


def test_the_subsequence_is_the_one_rouge_score_takes():
    # every pair of lines of up to six tokens of two kinds, and of up to four of three: ties of every sort
    for kinds, longest in (("ab", 6), ("abc", 4)):
        lines = ["".join(line) for n in range(longest + 1) for line in product(kinds, repeat=n)]
        for line, other in product(lines, repeat=2):
            assert [*lcs_positions(line, other)][::-1] == lcs_ind(line, other), (line, other)


def test_long_subsequences_are_the_ones_rouge_score_takes():
    draw = random.Random(21)
    for length in (31, 32, 33, 63, 64, 65, 130):
        for kinds in ("ab", "abcdefgh", [*map(str, range(99))]):
            line, other = draw.choices(kinds, k=length), draw.choices(kinds, k=draw.randint(1, 2 * length))
            positions = [*lcs_positions(line, other)][::-1]
            assert positions == lcs_ind(line, other)
            assert len(positions) == LCSseq.similarity(line, other)


def test_which_subsequence_is_taken_decides_the_union():
    # a b a b against the lines "a" and "b a b": of the a's the last is taken, position 2, and b a b stands at 1, 2, 3:
    # the union is 3 of 4 tokens. The first a instead, position 0, would have made it 4 of 4
    reference, candidate = "a b a b", "a\nb a b"
    assert [*lcs_positions("abab", "a")] == [2]
    # hits 3 of 4 and 4: F = 3/4
    assert our_scores([reference], candidate, stemmed=False)["rougeLsum"] == pytest.approx(3 / 4)
    assert our_scores([reference], candidate, stemmed=False) == their_scores([reference], candidate, stemmed=False)


@pytest.mark.parametrize("stemmed", [True, False])
def test_lines_of_few_words_equal_rouge_score(stemmed):
    draw = random.Random(11)
    for _ in range(200):
        kinds = draw.choice((["a", "b"], ["a", "b", "c", "d"], ["run", "runs", "running", "ran", "skies", "sky"]))
        references, candidates = ([lines_of(draw, kinds) for _ in range(3)] for _ in range(2))
        wanted = [their_scores(references, candidate, stemmed) for candidate in candidates]
        assert all_scores(references, candidates, stemmed) == wanted


def lines_of(draw: random.Random, kinds: list[str]) -> str:
    """Up to six lines of up to nine words, empty ones among them."""
    lines = [" ".join(draw.choices(kinds, k=draw.randint(0, 9))) for _ in range(draw.randint(0, 6))]
    return "\n".join(lines)


def test_long_texts_equal_rouge_score():
    draw = random.Random(19)
    for longest in (70, 300):
        texts = [random_text(draw, longest) for _ in range(6)]
        wanted = [their_scores(texts[:2], candidate, True) for candidate in texts[2:]]
        assert all_scores(texts[:2], texts[2:], True) == wanted


def test_nothing_is_downloaded(tmp_path: Path):
    code = (
        "import socket\n"
        "def connect(*_): raise SystemExit('a connection was opened')\n"
        "socket.socket.connect = connect\n"
        "from reward_models._rouge import rouge\n"
        "assert rouge(['rouge1', 'rougeLsum'], ['connections'], ['connected']) == [[1.0, 1.0]]\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "NLTK_DATA": str(tmp_path / "data")}
    subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, check=True, timeout=120)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("stemmed", [True, False])
def test_odd_texts_equal_rouge_score(stemmed):
    for texts, split in ((ASCII_TEXTS, all_words), (ODD_TEXTS, ascii_words)):
        for reference in texts:
            wanted = [their_scores([reference], candidate, stemmed) for candidate in texts]
            assert all_scores([reference], [*texts], stemmed, split) == wanted


def test_words_of_other_scripts_count():
    # Chinese: 6 characters, of which 4 are shared in order; pairs 2 of 5
    assert our_scores(
        ["\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002"], "\u4eca\u5929\u5f88\u51b7\u5929\u597d", True
    ) == pytest.approx({"rouge1": 5 / 6, "rouge2": 1 / 5, "rougeL": 4 / 6, "rougeLsum": 4 / 6})
    # Russian: two of three words; Hindi with its vowel signs: one of two; French: rouge-score sees "caf" in both
    for reference, candidate, wanted in (
        (
            "\u042f \u043b\u044e\u0431\u043b\u044e \u043a\u043e\u0442\u0430",
            "\u044f \u043b\u044e\u0431\u043b\u044e \u043f\u0441\u0430",
            2 / 3,
        ),
        (
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902",
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u092a\u0930",
            1 / 2,
        ),
        ("caf\u00e9", "caf\u00e8", 0.0),
        ("caf\u00e9s running", "cafe\u0301s runs", 1.0),  # composed or not; English words are stemmed as ever
    ):
        assert our_scores([reference], candidate, True)["rouge1"] == pytest.approx(wanted)


@pytest.mark.parametrize("function", [rouge_reward.reward, rouge_reward.released, rouge_reward.rougeL])
def test_references_without_a_word_are_refused(function):
    with pytest.raises(ValueError, match=r"hold no word, wanted one to compare with: leave the row out"):
        function([""], ["a"], references=[["!!", "\U0001f642"]])
    assert function([""], ["a"], references=[["!!", "a"]]) == pytest.approx(
        [2 / 3 if function != rouge_reward.rougeL else 1.0]
    )


@pytest.mark.parametrize("stemmed", [True, False])
def test_random_texts_equal_rouge_score(stemmed):
    draw = random.Random(7)
    for _ in range(300):
        references = [random_text(draw) for _ in range(draw.randint(1, 3))]
        candidates = [random_text(draw) for _ in range(draw.randint(1, 7))]
        wanted = [their_scores(references, candidate, stemmed) for candidate in candidates]
        assert all_scores(references, candidates, stemmed) == wanted


def test_a_score_does_not_depend_on_the_other_candidates():
    draw = random.Random(5)
    references, candidates = [random_text(draw)], [random_text(draw) for _ in range(40)]
    alone = [our_scores(references, candidate, True) for candidate in candidates]
    order = draw.sample(range(40), 40)
    assert all_scores(references, [candidates[i] for i in order], True) == [alone[i] for i in order]


def test_no_references_are_an_error():
    with pytest.raises(ValueError, match="no references"):
        rouge(KINDS, [], ["a"])


@pytest.mark.parametrize(
    ("path", "prompt", "completion"),
    [("scitldr/test", "prompt", "completion"), ("multi30k_de_en/test", "prompt", "completion")],
)
def test_real_texts_equal_rouge_score(path, prompt, completion):
    file = DATA / f"{path}.jsonl.gz"
    if not file.exists():
        pytest.skip(f"no {file}")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(60), strict=False)]
    for row, other in pairwise(rows):
        references = [row[completion], other[completion]]
        wanted = their_scores(references, row[prompt], True)
        assert all_scores(references, [row[prompt]], True, ascii_words) == [wanted]
        if all(map(str.isascii, (*references, row[prompt]))):
            assert our_scores(references, row[prompt], True) == wanted


def test_stemmed_and_plain_are_kept_apart():
    assert our_scores(["running"], "runs", True)["rouge1"] == 1.0
    assert our_scores(["running"], "runs", False)["rouge1"] == 0.0


def test_reward_is_the_mean_of_the_best_of_each_kind():
    references = [["the cat is on the mat", "a dog sat"], ["nothing shared"]]
    # row 0: the first reference is best for each kind: (2/3 + 1/5 + 2/3) / 3 = 23/45
    values = rouge_reward.reward(["", ""], ["the cat sat on a mat", "zebra"], references=references)
    assert values == pytest.approx([23 / 45, 0.0])


def test_each_kind_can_be_chosen_alone():
    references = [["the cat is on the mat"]]
    for name, wanted in (("rouge1", 2 / 3), ("rouge2", 1 / 5), ("rougeL", 2 / 3), ("rougeLsum", 2 / 3)):
        function = {kind: getattr(rouge_reward, kind) for kind in KINDS}[name]
        assert function([""], ["the cat sat on a mat"], references=references, id=["x"]) == pytest.approx([wanted])


def test_released_counts_full_stops_and_commas():
    # the cats sat on the mat . = 7 words, a cat sat , on the mat . = 8; shared cat sat on the mat . = 6: F = 12/15
    # shared pairs cat-sat, on-the, the-mat, mat-. = 4 of 6 and 7: F = 8/13; LCS as the words: 12/15
    found, gold = ["<s>the cats sat on the mat.</s>"], [["<s>a cat sat, on the mat.</s>"]]
    assert rouge_reward.released([""], found, references=gold) == pytest.approx([(0.8 + 8 / 13 + 0.8) / 3], abs=1e-12)
    assert round(rouge_reward.released([""], found, references=gold)[0], 6) == 0.738462
    # without them 5 of 6 and 6 words, 4 of 5 and 5 pairs: (5/6 + 4/5 + 5/6) / 3 = .822222
    plain = rouge_reward.reward([""], ["the cats sat on the mat."], references=[["a cat sat, on the mat."]])
    assert round(plain[0], 6) == 0.822222


def test_released_takes_special_tokens_and_case_out():
    assert punctuated("<pad><s>A cat, 3.5</s><pad>") == "a cat <sep2>  3 <sep> 5"


def test_released_equals_rouge_score_on_the_prepared_texts():
    draw = random.Random(9)
    for _ in range(50):
        gold, found = ([random_text(draw) for _ in range(4)] for _ in range(2))
        prepared = [*map(punctuated, gold)]
        scores = [THEIRS[True].score_multi(prepared, punctuated(text)) for text in found]
        wanted = [sum(of_text[kind].fmeasure for kind in ("rouge1", "rouge2", "rougeL")) / 3 for of_text in scores]
        assert rouge_reward.released([""] * 4, found, references=[gold] * 4) == wanted


@pytest.mark.parametrize("function", [rouge_reward.reward, rouge_reward.released, rouge_reward.rougeLsum])
def test_the_reference_itself_is_worth_1_and_order_does_not_matter(function):
    texts = ["The first one, here.", "something else", "A third text: longer than others, and odd."]
    references = [[texts[0], texts[1]], [texts[1]], [texts[0], texts[2]]]
    assert function([""] * 3, texts, references=references) == [1.0, 1.0, 1.0]
    found = function([""] * 3, ["first here", "else", "third"], references=references)
    turned = function([""] * 3, ["third", "first here", "else"], references=[references[i] for i in (2, 0, 1)])
    assert turned == [found[2], found[0], found[1]]


@pytest.mark.parametrize(
    ("references", "said"),
    [
        (None, "no column `references`"),
        ([["fine"], []], r"completion 1 'b' has no references, which ROUGE compares with"),
        ([["fine"], "text"], r"references\[1\] is 'text', wanted a list"),
    ],
)
def test_missing_references_are_an_error(references, said):
    with pytest.raises(ValueError, match=said):
        rouge_reward.reward(["", ""], ["a", "b"], references=references)


def test_length_counts_words():
    assert length_reward.reward(["", "", ""], ["", "one", "two  words\n"]) == [0.0, 1.0, 2.0]
    assert length_reward.reward(
        ["", ""], ["\u5f88\u597d", "\u043e\u0447\u0435\u043d\u044c \u0445\u043e\u0440\u043e\u0448\u043e"]
    ) == [2.0, 2.0]
