"""Preference rows to scored rows and back, and the round trip through a file."""

from dataclasses import replace

import pytest

from pipeline.data.convert import to_scored, to_supervised
from pipeline.data.pairs import of_scored
from pipeline.data.readers import read
from pipeline.data.write import row_of, write_rows
from pipeline.errors import UserError
from pipeline.records import Example, Message

PAIR = Example(
    "a",
    "p",
    references=("good",),
    chosen="good",
    rejected="bad",
    chosen_reward=0.75,
    rejected_reward=0.25,
    margin=0.5,
    source="web",
)
GOOD = Example("a/chosen", "p", "good", ("good",), reward=0.75, source="web")
BAD = Example("a/rejected", "p", "bad", ("good",), reward=0.25, source="web")
PLAIN = Example("b", (Message("user", "Hi"),), "Hello", reward=1.0)


def test_a_pair_becomes_one_row_or_two_and_scored_rows_pass():
    assert to_scored([PAIR, PLAIN], "chosen") == [GOOD, PLAIN]
    assert to_scored([PAIR, PLAIN], "both") == [GOOD, BAD, PLAIN]


def test_a_pair_without_rewards_becomes_rows_to_be_scored():
    rows = to_scored([replace(PAIR, chosen_reward=None, rejected_reward=None)], "both")
    assert rows == [replace(GOOD, reward=None), replace(BAD, reward=None)]


def test_supervised_rows_keep_the_id_and_the_chosen_response():
    assert to_supervised([PAIR, PLAIN]) == [replace(GOOD, id="a"), PLAIN]


def test_scored_pairs_come_back_from_their_rows():
    assert of_scored(to_scored([PAIR], "both")) == [PAIR]


def test_a_pair_is_turned_round_when_the_rewards_say_so():
    rows = [replace(GOOD, reward=-1.0), replace(BAD, reward=2.0)]
    turned = replace(PAIR, chosen="bad", rejected="good", chosen_reward=2.0, rejected_reward=-1.0, margin=3.0)
    assert of_scored(rows) == [turned]


def test_the_best_is_paired_with_the_worst_and_every_row_is_counted(capsys):
    def row(name, prompt, reward, text=None):
        return Example(name, prompt, text or name, (), reward=reward)

    rows = [
        row("x1", "x", 1.0),
        row("y1", "y", 5.0),
        row("x2", "x", 3.0),
        row("x3", "x", 0.5),
        row("x4", "x", 3.0),
        row("z1", "z", 2.0),
        row("z2", "z", 2.0),
        row("t1", "t", 2.0, "same"),
        row("t2", "t", 1.0, "same"),
        PAIR,
    ]
    # x: best x2 (the first of two with 3.0), worst x3, margin 3 - 0.5; x1 and x4 lie between
    best = Example("x2", "x", chosen="x2", rejected="x3", chosen_reward=3.0, rejected_reward=0.5, margin=2.5)
    assert of_scored(rows) == [PAIR, best]
    counts = "1 made of scored rows, 1 given, 1 rows without a second response, 4 tied, 2 between"
    assert capsys.readouterr().out == f"pairs: {counts}\n"
    assert len(rows) == 2 * 1 + 1 + 1 + 4 + 2


def test_chat_prompts_are_grouped_too():
    assert len(of_scored([PLAIN, replace(PLAIN, id="c", completion="Go", reward=0.0)])) == 1


@pytest.mark.parametrize(
    ("convert", "example", "message"),
    [
        (lambda rows: to_scored(rows, "both"), Example("q", "p"), "q: neither a completion nor chosen and rejected"),
        (to_supervised, Example("q", "p"), "q: neither a completion nor chosen and rejected"),
        (of_scored, Example("q", "p"), "q: no completion, wanted a scored row; add the column 'completion'"),
        (of_scored, Example("q", "p", "c"), "q: no reward, wanted a scored row; .* run stage=score"),
    ],
)
def test_rows_that_cannot_be_converted_are_named(convert, example, message):
    with pytest.raises(UserError, match=f"^{message}"):
        convert([example])


FULL = Example(
    "full",
    "p\n\u2028",
    "c",
    ("r", "s"),
    ("best", "worst"),
    (2.0, 1.0),
    "good",
    "bad",
    0.1 + 0.2,
    -1e-300,
    3.0,
    0.5,
    {"safe": 1.0},
    "web",
)
WRITTEN = [
    [GOOD, BAD, replace(PLAIN, references=("Hello",))],
    [replace(GOOD, reward=None, rewards={"safe": 0.1, "brief": 0.2})],  # of one alone the reader makes the reward
    [replace(GOOD, references=())],
    [replace(GOOD, reward=None)],
    [PAIR],
    [FULL],
    [replace(FULL, candidates=(), candidate_rewards=())],
    [Example("t", "", "Once upon a time", ("Once upon a time",), reward=1.0)],
    [Example("n", "p", references=("r",), candidates=("a", "b"))],
    [Example("n", "p", candidates=("a", "b"), candidate_rewards=(1.0, 0.0), candidate_scores={"safe": (0.5, None)})],
    [Example("n", (Message("system", "Be kind"), Message("user", "Hi")))],
]


@pytest.mark.parametrize("name", ["rows.jsonl", "deep/er/rows.jsonl"])
@pytest.mark.parametrize("examples", WRITTEN)
def test_written_rows_are_read_back_equal(tmp_path, examples, name):
    path = tmp_path / name
    write_rows(path, examples)
    assert read(str(path)).examples == examples
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_the_columns_are_the_documented_ones():
    assert row_of(GOOD) == {
        "id": "a/chosen",
        "source": "web",
        "prompt": "p",
        "completion": "good",
        "reward": 0.75,
        "references": ["good"],
    }
    assert row_of(PLAIN) == {
        "id": "b",
        "prompt": [{"role": "user", "content": "Hi"}],
        "completion": "Hello",
        "reward": 1.0,
    }


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [GOOD])
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_rows(path, [BAD, replace(BAD, reward=float("nan"))])
    assert read(str(path)).examples == [GOOD]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]
