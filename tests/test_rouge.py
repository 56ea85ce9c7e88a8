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
from pipeline.lanes import Places, places, shared, shared_pairs, side_by_side, subsequences
from pipeline.text_overlap import Reference, rouge, tokens
from reward_models import length as length_reward
from reward_models import rouge as rouge_reward
from reward_models._released import punctuated

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
    return all_scores(references, [candidate], stemmed)[0]


def all_scores(references: list[str], candidates: list[str], stemmed: bool) -> list[dict[str, float]]:
    return [dict(zip(KINDS, scores, strict=True)) for scores in rouge(KINDS, references, candidates, stemmed)]


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


def test_lanes_by_hand():
    # "a b a" stands at a: bits 0 and 2 = 5, b: bit 1 = 2
    assert places("aba") == {"a": 5, "b": 2}
    lanes = side_by_side(Places("aba"), ["aaab", "bba", "", "xab"])
    # bytes of the lanes side by side, the first text in the lowest: a, b, -, x = 5, 2, 0, 0 = 5 + 2 * 256
    assert lanes.steps[0] == 5 + 2 * 256
    # of a, a, a, b two a and the b find a place; of b, b, a one b and the a; of x, a, b two
    assert shared(lanes) == [3, 2, 0, 2]
    # pairs of the reference: ab, ba. aa aa ab: 1; bb ba: 1; none; xa ab: 1
    assert shared_pairs(lanes) == [1, 1, 0, 1]
    # aa or ab; ba; nothing; ab
    assert subsequences(lanes) == [2, 2, 0, 2]


def test_lanes_do_not_spill_at_any_length():
    # n times a against n, n + 1 and 1 of them: the masks fill each lane to its last bit
    for n in (1, 7, 8, 9, 15, 16, 17, 63, 64, 65):
        lanes = side_by_side(Places("a" * n), ["a" * n, "a" * (n + 1), "a", "b"])
        assert shared(lanes) == [n, n, 1, 0]
        assert shared_pairs(lanes) == [n - 1, n - 1, 0, 0]
        assert subsequences(lanes) == [n, n, 1, 0]


def test_lanes_without_texts_or_reference():
    assert subsequences(side_by_side(Places("ab"), [])) == []
    assert shared(side_by_side(Places(""), ["ab", ""])) == [0, 0]


def test_tokens():
    assert tokens("The boys' 2 running-shoes", stemmed=True) == ["the", "boy", "2", "run", "shoe"]
    assert tokens("The boys' 2 running-shoes", stemmed=False) == ["the", "boys", "2", "running", "shoes"]


@pytest.mark.parametrize("stemmed", [True, False])
def test_odd_texts_equal_rouge_score(stemmed):
    for reference in ODD_TEXTS:
        wanted = [their_scores([reference], candidate, stemmed) for candidate in ODD_TEXTS]
        assert all_scores([reference], [*ODD_TEXTS], stemmed) == wanted


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


def test_stemmed_and_plain_are_kept_apart():
    assert Reference("running", True).tokens == ["run"]
    assert Reference("running", False).tokens == ["running"]
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
        ([["fine"], []], r"references\[1\] is \[\], wanted a list of at least one text"),
        ([["fine"], "text"], r"references\[1\] is 'text', wanted a list"),
    ],
)
def test_missing_references_are_an_error(references, said):
    with pytest.raises(ValueError, match=said):
        rouge_reward.reward(["", ""], ["a", "b"], references=references)


def test_length_counts_words():
    assert length_reward.reward(["", "", ""], ["", "one", "two  words\n"]) == [0.0, 1.0, 2.0]
