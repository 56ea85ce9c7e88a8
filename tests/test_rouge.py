"""ROUGE and the stemmer against the packages they must equal, and by hand."""

from __future__ import annotations

import gzip
import json
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer

from pipeline import stemmer
from pipeline.text_overlap import Words, clipped_matches, lcs_length, places, rouge, tokens
from reward_models import length as length_reward
from reward_models import rouge as rouge_reward

KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
THEIRS = {stemmed: RougeScorer(list(KINDS), use_stemmer=stemmed) for stemmed in (True, False)}
PORTER = PorterStemmer()
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

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
)
# One word and more for every rule of every step, and for the forms that NLTK adds.
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


def our_scores(references: list[str], candidate: str, stemmed: bool) -> dict[str, float]:
    return dict(zip(KINDS, rouge(KINDS, references, candidate, stemmed), strict=True))


def their_scores(references: list[str], candidate: str, stemmed: bool) -> dict[str, float]:
    scores = THEIRS[stemmed].score_multi(references, candidate)
    return {kind: scores[kind].fmeasure for kind in KINDS}


def random_text(draw: random.Random) -> str:
    """Up to 14 words, many of them repeated, with punctuation, line breaks and rule words."""
    words = [
        draw.choice((*"abcde", "the", "running", "runs", "42", "é", *RULE_WORDS)) for _ in range(draw.randint(0, 14))
    ]
    return "".join(word + draw.choice((" ", " ", " ", "\n", ", ", "-", ".\n\n")) for word in words)


def test_by_hand():
    # candidate: the cat sat on a mat = 6 words, reference: the cat is on the mat = 6 words
    # shared words the, cat, on, mat: P = R = 4/6; shared pairs: "the cat": P = R = 1/5; LCS the cat on mat: 4/6
    scores = our_scores(["the cat is on the mat"], "the cat sat on a mat", stemmed=True)
    assert scores == pytest.approx({"rouge1": 2 / 3, "rouge2": 1 / 5, "rougeL": 2 / 3, "rougeLsum": 2 / 3})


def test_bits_by_hand():
    # "a b a" stands at a: bits 0 and 2 = 5, b: bit 1 = 2; of the four tokens a, a, a, b of a candidate 3 find a place
    assert places("aba") == {"a": 5, "b": 2}
    assert clipped_matches([5, 5, 5, 2], 3) == 3
    # LCS of "aba" and "aaab" is aa or ab: 2 tokens; of "aba" and "bba" it is ba: 2; with nothing: 0
    assert lcs_length([5, 5, 5, 2], 3) == 2
    assert lcs_length([2, 2, 5], 3) == 2
    assert lcs_length([], 3) == 0


def test_tokens():
    assert tokens("The boys' 2 running-shoes", stemmed=True) == ["the", "boy", "2", "run", "shoe"]
    assert tokens("The boys' 2 running-shoes", stemmed=False) == ["the", "boys", "2", "running", "shoes"]


@pytest.mark.parametrize("stemmed", [True, False])
def test_odd_texts_equal_rouge_score(stemmed):
    for reference in ODD_TEXTS:
        for candidate in ODD_TEXTS:
            assert our_scores([reference], candidate, stemmed) == their_scores([reference], candidate, stemmed)


@pytest.mark.parametrize("stemmed", [True, False])
def test_random_texts_equal_rouge_score(stemmed):
    draw = random.Random(7)
    for _ in range(1200):
        references = [random_text(draw) for _ in range(draw.randint(1, 3))]
        candidate = random_text(draw)
        assert our_scores(references, candidate, stemmed) == their_scores(references, candidate, stemmed)


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
        assert our_scores(references, row[prompt], True) == their_scores(references, row[prompt], True)


def test_every_rule_of_the_stemmer_equals_nltk():
    rules = [ending for ending, _ in (*stemmer._STEP_2, *stemmer._STEP_3, *stemmer._STEP_4)]
    endings = [*rules, *"s ss sses ies ied eed ed ing y e ll logi ion sion tion at bl iz".split()]  # noqa: SIM905
    starts = "r tr gr ro con hopp fizz fil nat ol ab sy yy gener relat commun 1b".split()  # noqa: SIM905
    words = {start + ending for start in starts for ending in endings} | set(RULE_WORDS) | set(PORTER.pool)
    words |= {start + first + second for start in ("t", "con") for first in rules for second in endings}
    assert len(words) > 3000
    for word in words:
        if len(word) > 3:
            assert stemmer.stem(word) == PORTER.stem(word), word


def test_random_words_equal_nltk():
    draw = random.Random(3)
    for _ in range(20_000):
        word = "".join(draw.choice("aeioouylltssdbczrngi1") for _ in range(draw.randint(4, 11)))
        assert stemmer.stem(word) == PORTER.stem(word), word


def test_words_of_real_text_stem_like_nltk():
    file = DATA / "scitldr" / "test.jsonl.gz"
    if not file.exists():
        pytest.skip(f"no {file}")
    words = set(re.findall("[a-z0-9]{4,}", gzip.decompress(file.read_bytes()).decode().lower()))
    assert len(words) > 5000
    assert [word for word in words if stemmer.stem(word) != PORTER.stem(word)] == []


def test_short_words_are_not_stemmed():
    assert [stemmer.stem(word) for word in ("sky", "was", "ing", "is", "")] == ["sky", "was", "ing", "is", ""]


def test_words_does_not_share_stemmed_and_plain():
    assert Words("running", True).tokens == ["run"]
    assert Words("running", False).tokens == ["running"]
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


@pytest.mark.parametrize(
    ("references", "said"),
    [
        (None, "no column `references`"),
        ([["fine"], []], r"references\[1\] is \[\], wanted a list of at least one text"),
        ([["fine"], "text"], r"references\[1\] is 'text', wanted a list"),
    ],
)
def test_missing_references_are_an_error(references, said):
    with pytest.raises(ValueError, match=said):
        rouge_reward.reward(["", ""], ["a", "b"], references=references)


def test_length_counts_words():
    assert length_reward.reward(["", "", ""], ["", "one", "two  words\n"]) == [0.0, 1.0, 2.0]
