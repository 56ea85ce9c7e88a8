"""Candidates: gathered from responses, judged and ranked, written and read back, chosen as static responses."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config.resolve import resolve
from pipeline.data import convert, dataset, encoding, pairs, readers, splits
from pipeline.data.prompts import gold, unique_prompts
from pipeline.data.tokenization import Encoder
from pipeline.data.write import write_rows
from pipeline.errors import UserError
from pipeline.records import Example, Message, Response, Row, Scores
from pipeline.rewards import candidates
from pipeline.rewards.rewards import Rewards, WeightedReward
from pipeline.rl import semi_offline
from reward_models import _trl, length, rouge
from stages import inputs, score
from tests import tiny

ROW = Example("a", "the cat", "sat on a mat", ("sat on a mat", "ran"), source="web")
RANKED = replace(ROW, candidates=("the old dog ran", "a cat", "mat"), candidate_rewards=(0.9, 0.5, 0.1))


def answers(row: Example, *texts: str) -> list[Response]:
    return [Response(row, row.prompt, text, (3,), (4, 2), True) for text in texts]


def test_candidates_are_each_text_once_and_the_row_keeps_its_reference() -> None:
    other = Example("b", (Message("user", "Hi"),))
    found = candidates.gathered([*answers(ROW, "x", "", "y", "x"), *answers(other, "", "", "", "")], 4)
    assert found.rows == [replace(ROW, candidates=("x", "y"))]  # four empty ones leave no row
    assert (found.empty, found.repeated) == (5, 1)


def test_what_was_cut_off_is_known_and_taught_without_an_end(tmp_path: Path) -> None:
    """From a policy's answers through files, scores and pairs to tokens."""
    said = [replace(one, finished=one.text != "y") for one in answers(ROW, "x", "y", "z")]
    (row,) = candidates.gathered(said, 3).rows
    assert row.unfinished == ("y",)

    def y_is_best(prompts: list, completions: list[str], **columns: list) -> list[float]:
        return [float(text == "y") for text in completions]

    judge = Rewards([WeightedReward("y", 1.0, y_is_best)])
    write_rows(tmp_path / "train.jsonl", candidates.judged(tiny.ranks(), judge, [row]).rows)
    (read,) = readers.read(str(tmp_path / "train.jsonl")).examples
    ends = {one.completion: encoding.completion_rows(one, tiny.encoder())[0] for one in convert.each_candidate(read)}
    assert {text: row.response_ids[-1] == tiny.EOS_ID for text, row in ends.items()} == {
        "y": False,
        "x": True,
        "z": True,
    }
    (pair,) = pairs.of_scored([read])
    assert [row.unfinished for row in encoding.pair_rows(pair, tiny.encoder())] == [True, False]
    (one,) = candidates.gathered(said[1:2], 1).rows
    assert one == replace(ROW, completion="y", unfinished=("y",))


@pytest.mark.parametrize(
    ("columns", "cut"),
    [
        ({"completion": "a", "unfinished": True}, ("a",)),
        ({"completion": "a", "unfinished": False}, ()),
        ({"completion": "a", "unfinished": None}, ()),
        ({"completion": "a", "unfinished": ["b"]}, "unfinished: 'b' is text, and no response of the row"),
        ({"candidates": ["a"], "unfinished": True}, "unfinished: true, in a row without a completion"),
    ],
)
def test_rows_of_others_may_say_what_was_cut_off(tmp_path: Path, columns: dict, cut: tuple | str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "p", **columns}) + "\n")
    if isinstance(cut, str):
        with pytest.raises(UserError, match=cut):
            readers.read(str(tmp_path / "a.jsonl"))
    else:
        assert readers.read(str(tmp_path / "a.jsonl")).examples[0].unfinished == cut


def test_one_response_is_the_completion() -> None:
    found = candidates.gathered(answers(ROW, "x"), 1)
    assert found.rows == [replace(ROW, completion="x")]
    assert candidates.gathered(answers(ROW, ""), 1) == ([], 1, 0)


def test_candidates_are_ranked_and_equal_ones_keep_their_order() -> None:
    judge = Rewards([WeightedReward("length", 0.5, length.reward)])
    alone, pick = Example("c", "p", "one two"), replace(ROW, candidates=("b", "one two three", "a", "one two"))
    judged = candidates.judged(tiny.ranks(), judge, [alone, pick, alone])
    # half of 3, 2, 1 and 1 words; the completion beside candidates gets no reward
    assert judged.rows[1] == replace(
        pick,
        candidates=("one two three", "one two", "b", "a"),
        candidate_rewards=(1.5, 1.0, 0.5, 0.5),
        candidate_scores={"length": (3.0, 2.0, 1.0, 1.0)},
    )
    assert judged.rows[0] == judged.rows[2] == replace(alone, reward=1.0, rewards={"length": 2.0})
    assert judged.texts == ["one two", "b", "one two three", "a", "one two", "one two"]
    assert [row.id for row in judged.of] == ["c", "a", "a", "a", "a", "c"]
    assert score.by_source(judged.of, judged.scores) == {"reward/web": 0.875}  # (0.5 + 1.5 + 0.5 + 1.0) / 4


def test_candidates_are_compared_with_all_references() -> None:
    row = replace(ROW, candidates=("dog", "ran", "sat on a mat"))
    judged = candidates.judged(tiny.ranks(), Rewards([WeightedReward("rouge", 1.0, rouge.rougeL)]), [row])
    assert judged.rows[0].candidates == ("ran", "sat on a mat", "dog")
    assert judged.rows[0].candidate_rewards == (1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    "row",
    [
        RANKED,
        replace(RANKED, candidate_rewards=()),
        replace(RANKED, completion=None),
        replace(RANKED, references=()),
        replace(RANKED, references=("sat on a mat",)),
        replace(RANKED, prompt=(Message("system", "Be kind"), Message("user", "Hi"))),
        replace(RANKED, candidates=("a\n\tb", "<#SEP#>", "é"), candidate_rewards=(0.1 + 0.2, 0.0, -1e-300)),
    ],
)
def test_rows_with_candidates_are_read_back_as_written(tmp_path, row: Example) -> None:
    write_rows(tmp_path / "train.jsonl", [row])
    read = readers.read(str(tmp_path / "train.jsonl"))
    assert (read.examples, read.format) == ([row], "candidates")


def test_rows_to_judge() -> None:
    data = resolve(["stage=score", "data.responses=both"]).settings.data
    bare, pair = replace(RANKED, completion=None), Example("p", "q", chosen="c", rejected="r")
    rows = dataset.judgeable([bare, RANKED, pair, ROW], data)
    assert rows[:2] == [bare, RANKED] and rows[-1] == ROW
    assert [(row.id, row.completion) for row in rows[2:4]] == [("p/chosen", "c"), ("p/rejected", "r")]
    with pytest.raises(UserError, match="a: neither a completion nor chosen"):
        dataset.judgeable([replace(ROW, completion=None)], data)


def test_a_prompt_asked_once_has_the_references_of_all_its_rows() -> None:
    second, other = Example("b", "the cat", "ran far", ("ran", "ran far")), Example("c", "a dog")
    asked = unique_prompts([ROW, other, second])
    assert asked == [replace(ROW, references=("sat on a mat", "ran", "ran far")), other]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (ROW, ("sat on a mat", "ran")),
        (Example("b", "p", "answer"), ("answer",)),
        (Example("b", "p", chosen="good", rejected="bad"), ("good",)),
        (Example("b", "p", "answer", chosen="good", rejected="bad"), ("answer",)),
        # responses of any quality: scored ones, and the rejected side of a pair without scores
        (Example("b", "p", "answer", reward=0.0), ()),
        (Example("b", "p", "answer", rewards={"safe": 1.0}), ()),
        (Example("b/rejected", "p", "bad"), ()),
        (Example("b", "p", "answer", ("gold",), reward=0.0), ("gold",)),
        (Example("b", "p"), ()),
    ],
)
def test_what_new_responses_are_compared_with(row: Example, wanted: tuple[str, ...]) -> None:
    assert gold(row) == wanted
    assert [asked.references for asked in unique_prompts([row])] == [wanted]


def test_a_completion_is_never_its_own_reference(caplog) -> None:
    judge = Rewards([WeightedReward("rouge", 1.0, _trl.load("rouge"))])
    alone = Example("b", "p", "the cat sat")
    with pytest.raises(UserError, match=r"completion 0 'the cat sat' has no references, which ROUGE compares with"):
        candidates.judged(tiny.ranks(), judge, [alone])
    # candidates are new responses, whose gold is the completion beside them: 2 of 3 words and 1 of 2 pairs found
    both = candidates.judged(tiny.ranks(), judge, [replace(alone, candidates=("a dog", "cat sat"))]).rows[0]
    assert both.candidates == ("cat sat", "a dog") and both.references == ()
    # F of 1 and L: 2 * 1 * 2/3 / (5/3) = .8; of pairs: 2 * 1 * 1/2 / (3/2) = 2/3
    assert both.candidate_rewards == pytest.approx(((0.8 + 2 / 3 + 0.8) / 3, 0.0))
    # references that hold the completion are the user's: scored, and said
    given = [replace(alone, references=("the cat sat", "a cat")), replace(alone, references=("a cat",))]
    assert candidates.judged(tiny.ranks(), judge, given).rows[0].reward == 1.0
    assert "1 of 2 completions stand among their own references" in caplog.text


def static_rows(row: Example, encoder: Encoder, which: str) -> tuple[Row, ...]:
    items = encoding.encode([row], encoder, encoding.prompt_rows)
    return semi_offline.with_static_rows(items, encoder, which)[0].static_rows


def test_each_row_keeps_its_own_static_responses(tmp_path: Path) -> None:
    texts = [["mat"], ["a cat", "mat", "a mat"], ["mat", "ran"]]  # neighbours that end and begin alike
    given = [{"prompt": "p", "completion": "c", "candidates": some} for some in texts]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in given))
    data, encoder = (
        resolve(["stage=sft", f"data.train={tmp_path}/rows.jsonl", "data.validation_fraction=0"]),
        tiny.encoder(),
    )
    for folder in (None, tmp_path / "cache", tmp_path / "cache"):
        (rows,) = dataset.splits(data.settings.data, 1, ["train"], folder=folder)
        items = encoding.encode(rows, encoder, encoding.prompt_rows)
        found = semi_offline.with_static_rows(items, encoder, "random")
        assert [one.rows for one in found] == [one.rows for one in items]
        assert [len(one.static_rows) for one in found] == [1, 3, 2]
        said = [[encoder.decode(row.response_ids) for row in one.static_rows] for one in found]
        assert said == texts


def test_what_static_rl_starts_from() -> None:
    encoder = tiny.encoder()
    texts = {"worst": ["mat"], "best": ["the old dog ran"], "random": list(RANKED.candidates)}
    for which, wanted in {**texts, "reference": ["sat on a mat"]}.items():
        assert static_rows(RANKED, encoder, which) == tuple(encoder.encode("the cat", text) for text in wanted)
    without, other = replace(ROW, references=()), replace(ROW, completion="ran", references=("mat",))
    assert static_rows(without, encoder, "reference") == (encoder.encode("the cat", "sat on a mat"),)
    assert static_rows(other, encoder, "reference") == (encoder.encode("the cat", "mat"),)


def test_a_static_row_cut_at_the_limit_has_no_eos() -> None:
    whole = static_rows(RANKED, tiny.encoder(), "best")[0]
    cut = static_rows(RANKED, tiny.encoder(response_limit=3), "best")[0]
    assert whole.response_ids[-1] == tiny.EOS_ID and not whole.cut_response
    assert cut.response_ids == whole.response_ids[:3] and tiny.EOS_ID not in cut.response_ids and cut.cut_response


def test_static_rows_without_a_word_are_counted() -> None:
    odd = replace(RANKED, candidates=(" .", "mat", "?!"), candidate_rewards=())
    rows = static_rows(odd, tiny.encoder(), "random")
    assert len(rows) == 3 and semi_offline.wordless(rows, tiny.encoder()) == 2


@pytest.mark.parametrize(
    ("row", "which", "found"),
    [
        (ROW, "worst", r"^a: no candidates, wanted some for static=worst .*stage=generate.*stage=score.*reference$"),
        (ROW, "random", "^a: no candidates, wanted some for static=random"),
        (Example("b", "p", candidates=("x",)), "reference", "^b: no reference text, wanted one .*`completion`"),
    ],
)
def test_rows_that_static_rl_cannot_start_from(row: Example, which: str, found: str) -> None:
    with pytest.raises(UserError, match=found):
        static_rows(row, tiny.encoder(), which)


def test_splits_that_are_not_there_are_passed_by(tmp_path) -> None:
    settings = resolve(["stage=score", "splits=[train,validation,test]"]).settings
    (tmp_path / "t.jsonl").write_text('{"prompt": "p", "candidates": ["a"]}\n')
    only_test = splits.read_from(settings.data, test=str(tmp_path / "t.jsonl"))
    assert inputs.score_splits(settings, only_test) == ["test"]
    assert inputs.score_splits(settings, splits.read_from(settings.data, train="t.jsonl")) == ["train", "validation"]
    with pytest.raises(UserError, match=r"no validation split, only test: give data\.validation="):
        next(dataset.splits(only_test, 0, ["validation"]))


def test_rows_of_a_stage_need_no_filter() -> None:
    words = ["task=assistant", "data.task_size=9", "data.sources=[helpful]", "data.format=hh", "data.max_rows=3"]
    data = splits.read_from(resolve(["stage=score", *words]).settings.data, path="left")
    assert (data.path, data.task, data.task_size, data.sources, data.format) == ("left", None, None, None, None)
    assert data.max_rows == 3  # not how rows are read, but how many


def test_score_of_generate_needs_generated_rows(tmp_path) -> None:
    settings = resolve(["stage=score", "of=generate", f"runs_dir={tmp_path}"]).settings
    with pytest.raises(UserError, match=r"of=generate: .*generate holds no finished rows.*stage=generate run=default"):
        inputs.score_data(settings)


@pytest.mark.parametrize("name", ["a.tsv", "a.txt"])
def test_files_to_predict_from_have_two_columns(tmp_path, name: str) -> None:
    (tmp_path / name).write_text('a "source<mask>b\treference\n\ns\tr\n')
    read = readers.read(str(tmp_path / name), "candidates_tsv")
    assert read.examples == [
        Example("a/1", 'a "source<mask>b', "reference"),
        Example("a/3", "s", "r"),
    ]


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (["s\tr\ta<#SCORE#>1", "s\tr"], "2: 2 cells, wanted 3 (data_src, data_gt, data_kd)"),
        (["s\tr\ta<#SCORE#>1", "s\tr\ta<#SCORE#>1\t"], "2: 4 cells, wanted 3 (data_src, data_gt, data_kd)"),
        (["s\tr\ta<#SCORE#>1", "s\tr\t"], "2: data_kd: null, wanted text"),
        (["s\tr", "s\tr\ta<#SCORE#>1"], "2: 3 cells, wanted 2 (data_src, data_gt)"),
    ],
)
def test_a_wrong_number_of_columns_names_file_and_line(tmp_path, lines: list[str], found: str) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(UserError) as caught:
        readers.read(str(path), "candidates_tsv")
    assert str(caught.value).startswith(f"{path}:{found}")


def test_each_row_of_ranked_candidates_has_its_own_wrappers(tmp_path) -> None:
    kinds = ["b<#SCORE#>1<#SEP#>c<#SCORE#>2", "q<#QUERY#>b<#SCORE#>1", "b<#SCORE#>-1.5e-1<#REFS#>r2<#REF#>r<#REF#>r3"]
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"s\tr\t{kind}\n" for kind in kinds))
    read = readers.read(str(path)).examples
    assert [row.candidates for row in read] == [("c", "b"), ("b",), ("b",)]
    assert [row.candidate_rewards for row in read] == [(2.0, 1.0), (1.0,), (-0.15,)]
    assert [row.references for row in read] == [("r",), ("r",), ("r", "r2", "r3")]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["temperatures=[0.5, 1.0]"], "temperatures are given, wanted plain sampling .* do_sample=true and num_beams"),
        (["temperatures=[0.5]", "do_sample=true", "num_beams=2"], "temperatures are given"),
        (["temperatures=[]", "do_sample=true"], "temperatures: .*wanted at least 1"),
        (["temperatures=[0.0]", "do_sample=true"], "temperatures.0: 0.0, wanted more than 0"),
        (["min_new_tokens=9", "max_new_tokens=8"], "min_new_tokens is 9, wanted at most max_new_tokens, 8"),
        (["no_repeat_ngram_size=-1"], "no_repeat_ngram_size: -1, wanted at least 0"),
        (["generation.early_stopping=never"], "early_stopping: 'never' is text, wanted true or false"),
        (["splits=[]"], r"splits: \[\], wanted at least 1"),
    ],
)
def test_impossible_ways_of_decoding(words: list[str], found: str) -> None:
    with pytest.raises(UserError, match=found):
        resolve(["stage=generate", *words])


def test_the_static_choice_is_a_setting_of_rl() -> None:
    words = ["stage=rl", "algo=semi_offline"]
    assert resolve(words).settings.static == "best"
    assert resolve([*words, "data.static=reference"]).settings.static == "reference"
    with pytest.raises(
        UserError, match="static: 'wurst', wanted worst, best, random or reference; did you mean 'worst'"
    ):
        resolve([*words, "static=wurst"])


def test_scores_of_ranked_rows_belong_to_their_texts() -> None:
    """The order of `rows` is the ranking, that of `texts` and `scores` the one in which they were judged."""
    row = replace(ROW, candidates=("b", "one two"))
    judged = candidates.judged(tiny.ranks(), Rewards([WeightedReward("length", 1.0, length.reward)]), [row])
    assert isinstance(judged.scores, Scores)
    assert Counter(zip(judged.texts, judged.scores.total, strict=True)) == Counter({("b", 1.0): 1, ("one two", 2.0): 1})
