"""Rows in the layouts of public data sets, each with the meaning that its makers give it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pipeline.data import convert, pairs
from pipeline.data.readers import Filters, read
from pipeline.errors import UserError
from pipeline.records import Example, Message

SHARED = Path(__file__).parents[2] / "shared" / "cases" / "layouts"
ID, USER, SYSTEM = "train/1", Message("user", "Hi"), Message("system", "Be kind")
PKU = {
    "prompt": "Hi",
    "response_0": "zero",
    "response_1": "one",
    "prompt_source": "x",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
}
STRENGTH = {"split": "train", "prompt": "Hi", "response_1": "one", "response_2": "two", "preference_strength": -2}
SHP = {
    "post_id": "p1",
    "domain": "askculinary_train",
    "upvote_ratio": 0.98,
    "history": "Hi",
    "c_root_id_A": "a",
    "c_root_id_B": "b",
    "created_at_utc_A": 1,
    "created_at_utc_B": 2,
    "score_A": 3,
    "score_B": 15,
    "human_ref_A": "first",
    "human_ref_B": "second",
    "labels": 0,
    "seconds_difference": 9.0,
    "score_ratio": 5.0,
}
NECTAR = {
    "prompt": "\n\nHuman: Hi\n\nAssistant: ",
    "answers": [{"answer": text, "model": "m", "rank": rank} for text, rank in (("b", 2.0), ("a", 1.0), ("c", 3.0))],
    "turns": 1,
    "num_responses": 3,
    "source": ["lmsys", "sharegpt"],
    "good_natured": True,
}
RATED = {
    "source": "evol_instruct",
    "instruction": "Hi",
    "models": ["x", "y"],
    "completions": [
        {
            "model": "x",
            "response": "low",
            "overall_score": 3.0,
            "fine-grained_score": 4.5,
            "annotations": {"honesty": {"Rating": "2", "Rationale": "r"}, "helpfulness": {"Rating": "N/A"}},
        },
        {
            "model": "y",
            "response": "high",
            "overall_score": 8.0,
            "fine-grained_score": 4.0,
            "annotations": {"honesty": {"Rating": "5", "Rationale": "r"}},
        },
    ],
}
INFO = {"id": "t3_0", "post": "Long", "title": "T", "subreddit": "r", "site": None, "article": None}
POST = "SUBREDDIT: r/r\n\nTITLE: T\n\nPOST: Long\n\nTL;DR:"
GRADED = {"info": INFO, "summary": {"text": "short", "axes": {"overall": 6, "accuracy": 5, "coverage": None}}}
COMPARED = {"info": INFO, "summaries": [{"text": "s0"}, {"text": "s1"}], "choice": 1, "split": "train"}
HELPSTEER = {"prompt": "Hi", "response": "Hello", "helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 2}
ASK, SAY, NO = ({"from": who, "value": said} for who, said in (("human", "Hi"), ("gpt", "Hello"), ("gpt", "No")))
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def write(folder: Path, *rows: dict) -> str:
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "train.jsonl")


READ = [
    (PKU, "preference", Example(ID, "Hi", chosen="one", rejected="zero"), "chosen is the response of better_response"),
    (
        STRENGTH,
        "preference",
        Example(ID, "Hi", chosen="one", rejected="two", margin=2.0),
        "below 0 prefers the first response",
    ),
    (
        {**STRENGTH, "preference_strength": 1},
        "preference",
        Example(ID, "Hi", chosen="two", rejected="one", margin=1.0),
        "",
    ),
    (
        {"context": CHAT[:1], "response1": "one", "response2": "two", "overall_preference": 3, "domain": "code"},
        "preference",
        Example(ID, (USER,), chosen="two", rejected="one", margin=3.0),
        "layout HelpSteer preference",
    ),
    (
        SHP,
        "preference",
        Example(
            ID,
            "Hi",
            chosen="second",
            rejected="first",
            chosen_reward=math.log(16),
            rejected_reward=math.log(4),
            source="askculinary_train",
        ),
        "rewards of the two are ln(1 + votes)",
    ),
    (
        NECTAR,  # of three answers the second is in the middle: (3 - 2) / 2
        "candidates",
        Example(
            ID,
            (USER,),
            candidates=("a", "b", "c"),
            candidate_rewards=(1.0, 0.5, 0.0),
            source="lmsys, sharegpt",
        ),
        "the reward of an answer is (K - rank) / (K - 1)",
    ),
    (
        RATED,
        "candidates",
        Example(
            ID,
            (USER,),
            candidates=("high", "low"),
            candidate_rewards=(8.0, 3.0),
            candidate_scores={"overall_score": (8.0, 3.0), "fine-grained_score": (4.0, 4.5), "honesty": (5.0, 2.0)},
            source="evol_instruct",
        ),
        "the reward is overall_score (data.columns='{candidate_rewards: completions.fine-grained_score}' is another); "
        "rewards 3..8, levels 2",
    ),
    (
        {"prompt": "Hi", "responses": ["a", "b"], "scores": [0.5, 2]},
        "candidates",
        Example(ID, "Hi", candidates=("b", "a"), candidate_rewards=(2.0, 0.5)),
        "layout responses + scores: each response has the reward in its place of the other list; rewards 0.5..2",
    ),
    (
        GRADED,
        "scored",
        Example(ID, POST, "short", reward=6.0, rewards={"overall": 6.0, "accuracy": 5.0}),
        "the reward is the overall grade; rewards 6..6, levels 1",
    ),
    (
        {**GRADED, "info": {"id": "c", "post": None, "article": "News"}},
        "scored",
        Example(ID, "Article:\n\nNews\n\nTL;DR:", "short", reward=6.0, rewards={"overall": 6.0, "accuracy": 5.0}),
        "",
    ),
    (COMPARED, "preference", Example(ID, POST, chosen="s1", rejected="s0"), ""),
    (
        HELPSTEER,
        "scored",
        Example(
            ID, "Hi", "Hello", rewards={"helpfulness": 3.0, "correctness": 4.0, "coherence": 4.0, "complexity": 2.0}
        ),
        "no reward, but scores by name (helpfulness, correctness, coherence, complexity): choose with "
        "reward='{helpfulness: 1.0}' or data.columns='{reward: helpfulness}'",
    ),
    (
        {
            **HELPSTEER,
            "prompt": "Hi\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\nA joke",
            "helpfulness": 1,
            "reward": 7,
        },
        "scored",
        Example(
            ID,
            (USER, Message("assistant", "Yes?"), Message("user", "A joke")),
            "Hello",
            reward=7.0,
            rewards={"helpfulness": 1.0, "correctness": 4.0, "coherence": 4.0, "complexity": 2.0},
        ),
        "",
    ),
    ({"id": "x", "conversations": [ASK, SAY]}, "supervised", Example("x", (USER,), "Hello"), "layout conversations"),
    (
        {"system": "Be kind", "conversations": [ASK, SAY], "label": True},
        "scored",
        Example(ID, (SYSTEM, USER), "Hello", reward=1.0, rewards={"label": 1.0}),
        "the reward is label, true or false; rewards 1..1, levels 1",
    ),
    (
        {"conversations": [ASK], "chosen": SAY, "rejected": NO},
        "preference",
        Example(ID, (USER,), chosen="Hello", rejected="No"),
        "",
    ),
    (
        {"conversations": [{**one, "input": None, "weight": None} for one in (ASK, SAY)]},  # as tables give them
        "supervised",
        Example(ID, (USER,), "Hello"),
        "",
    ),
    ({"conversation": CHAT, "language": "English"}, "supervised", Example(ID, (USER,), "Hello"), ""),
    (
        {"source": "x", "conversation": [{"input": "Hi", "output": "Hello"}, {"input": "Hi", "output": "Again"}]},
        "supervised",
        Example(ID, (USER, Message("assistant", "Hello"), USER), "Again", source="x"),
        "",
    ),
    ({"question": "Hi", "answer": "So #### 4"}, "supervised", Example(ID, "Hi", "So #### 4"), "which stays a column"),
    (
        {"system": "Be kind", "question": "Hi", "chosen": "Hello", "rejected": "No"},
        "preference",
        Example(ID, (SYSTEM, USER), chosen="Hello", rejected="No"),
        "",
    ),
    ({"input": "Hi", "output": "Hello"}, "supervised", Example(ID, "Hi", "Hello"), "layout question"),
    ({"query": "Hi", "response": "Hello", "score": 2}, "scored", Example(ID, "Hi", "Hello", reward=2.0), ""),
    (
        {"prompt": "Hi", "chosen": CHAT, "rejected": CHAT, "chosen-rating": 4.5, "rejected-rating": 2},
        "preference",
        Example(ID, (USER,), chosen="Hello", rejected="Hello", chosen_reward=4.5, rejected_reward=2.0),
        "",
    ),
    (
        {"system_prompt": "", "question": "Hi", "response": "Hello", "rating": "👎"},
        "scored",
        Example(ID, "Hi", "Hello", reward=0.0, rewards={"rating": 0.0}),
        "the reward is rating, thumbs up or down",
    ),
    (
        {"instruction": "Hi", "context": "of old", "response": "Hello", "category": "qa"},
        "supervised",
        Example(ID, (Message("user", "Hi\nof old"),), "Hello"),
        "the context stands in the prompt",
    ),
    ({"instruction": "Hi", "context": "", "response": "Hello"}, "supervised", Example(ID, (USER,), "Hello"), ""),
]


@pytest.mark.parametrize(("row", "format", "expected", "said"), READ)
def test_a_layout_is_read_as_its_makers_mean_it(tmp_path, capsys, row, format, expected, said) -> None:
    result = read(write(tmp_path, row))
    assert (result.format, result.examples) == (format, [expected])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and said in lines[0]


def test_further_columns_stay_and_consumed_ones_do_not(tmp_path) -> None:
    path = write(tmp_path, {"question": "Hi", "answer": "So #### 4", "level": 2})
    assert read(path, carry=True).examples[0].columns == {"answer": "So #### 4", "level": 2}
    kept = read(write(tmp_path, PKU), carry=True).examples[0].columns
    assert kept == {"prompt_source": "x", "is_response_0_safe": True, "is_response_1_safe": False}


def test_the_other_id_of_two_is_chosen_by_name(tmp_path, capsys) -> None:
    result = read(write(tmp_path, PKU), columns={"better": "safer_response_id"})
    assert (result.examples[0].chosen, result.examples[0].rejected) == ("zero", "one")
    assert "better is safer_response_id; layout PKU-SafeRLHF" in capsys.readouterr().out
    alone = {name: value for name, value in PKU.items() if name != "better_response_id"}
    assert read(write(tmp_path, alone)).examples[0].chosen == "zero"


def test_another_score_of_completions_is_chosen_by_its_path(tmp_path) -> None:
    path = write(tmp_path, RATED)
    (row,) = read(path, columns={"candidate_rewards": "completions.fine-grained_score"}).examples
    assert (row.candidates, row.candidate_rewards) == (("low", "high"), (4.5, 4.0))
    assert row.candidate_scores["honesty"] == (2.0, 5.0)


def test_a_tie_is_counted_and_left_out(tmp_path, capsys) -> None:
    result = read(write(tmp_path, {**STRENGTH, "preference_strength": 0}, STRENGTH))
    assert ([one.id for one in result.examples], result.dropped, result.rows_read) == (["train/2"], {"tie": 1}, 2)
    assert "dropped tie 1" in capsys.readouterr().out


def test_equal_ranks_share_the_middle_of_their_places(tmp_path) -> None:
    answers = [{"answer": text, "rank": rank} for text, rank in (("a", 1), ("b", 2), ("c", 2), ("d", 4))]
    (row,) = read(write(tmp_path, {**NECTAR, "answers": answers})).examples
    # places 1, 2.5, 2.5 and 4 of four: 3/3, 1.5/3, 1.5/3, 0/3
    assert row.candidate_rewards == (1.0, 0.5, 0.5, 0.0)


@pytest.mark.parametrize(
    ("good", "bad", "found"),
    [
        (PKU, {"better_response_id": 2}, "better_response_id: 2 is a number, wanted 0 or 1 (read as PKU-SafeRLHF)"),
        (PKU, {"better_response_id": [0]}, "better_response_id: [0] is a list, wanted 0 or 1"),
        (GRADED, {"summary": None}, "summary: null, wanted a mapping"),
        (PKU, {"response_1": ""}, "chosen: empty, wanted text (read as PKU-SafeRLHF)"),
        (STRENGTH, {"preference_strength": None}, "preference_strength: null, wanted a finite number"),
        (SHP, {"labels": 2}, "labels: 2 is a number, wanted 1 (A is preferred) or 0"),
        (SHP, {"score_A": None}, "score_A: null, wanted a finite number"),
        (NECTAR, {"answers": [{"answer": "a", "rank": 1}]}, "answers: 1, wanted two or more, which are ranked"),
        (
            NECTAR,
            {"answers": [{"answer": "a", "rank": 1}, {"answer": "b"}]},
            "answers[1].rank: missing, wanted a finite number",
        ),
        (RATED, {"completions": [{"response": "a"}]}, "completions[0].overall_score: missing, wanted a finite number"),
        (
            RATED,
            {"completions": [{"response": "a", "overall_score": 1, "annotations": {"honesty": {"Rating": "good"}}}]},
            "candidates[0].rewards.honesty: 'good' is text, wanted a finite number",
        ),
        (
            {"prompt": "Hi", "responses": ["a", "b"], "scores": [1, 2]},
            {"scores": [1]},
            "candidates: 1 scores for 2 candidates, wanted one each, or none (read as responses + scores)",
        ),
        (GRADED, {"summary": {"text": "s", "axes": {}}}, "summary.axes: no overall, wanted {"),
        (COMPARED, {"choice": 2}, "choice: 2 is a number, wanted 0 or 1"),
        (COMPARED, {"summaries": [{"text": "s"}]}, "summaries: 1 entries, wanted two summaries"),
        ({"conversations": [ASK, SAY]}, {"conversations": ["Hi"]}, "conversations[0]: 'Hi' is text, wanted {"),
        ({"conversations": [ASK, SAY]}, {"conversations": [ASK]}, "the last message is from 'user'"),
        (
            {"conversations": [ASK, SAY]},
            {"conversations": [{"from": "elf", "value": "Hi"}]},
            "messages[0].role: 'elf' is text, wanted one of",
        ),
    ],
)
def test_a_bad_row_of_a_layout(tmp_path, good, bad, found) -> None:
    path = write(tmp_path, good, {**good, **bad})
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:2: ") and found in str(caught.value)
    assert len(read(path, max_bad_rows=1).examples) == 1


def test_a_layout_without_one_sound_row_says_why(tmp_path) -> None:
    path = write(tmp_path, {**PKU, "better_response_id": 2})
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value) == (
        f"{path}:1: better_response_id: 2 is a number, wanted 0 or 1 (read as PKU-SafeRLHF; none of the first 1 rows "
        "is sound)"
    )


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"prompt": "p", "completion": "c", "answers": ["a"]}, "supervised"),
        ({"prompt": "p", "completion": "c", "question": "q", "answer": "a"}, "supervised"),
        ({"sentence": "s", "question": "q", "answer": "a"}, "published"),
        ({"prompt": "p", "answer": "a"}, "prompts"),
        ({"instruction": "i", "input": "about", "output": "o"}, "supervised"),
        ({"question": "q", "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, "hh"),
        ({"question": "q", "source": "s", "candidates": ["a"]}, "candidates"),
        ({"prompt": "p", "context": "about", "completion": "c"}, "supervised"),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "label": 1}, "preference"),
        ({"text": "t", "label": 1}, "text"),
        ({"prompt": "p", "label": 1, "rating": 5}, "prompts"),
    ],
)
def test_no_layout_is_seen_where_there_is_none(tmp_path, row, format) -> None:
    result = read(write(tmp_path, row))
    assert result.format == format
    assert (result.examples[0].reward, result.examples[0].rewards) == (None, {})


def test_flagged_rows_go_before_they_are_read_as_a_layout(tmp_path) -> None:
    rows = [{**PKU, "tie": False}, {**PKU, "tie": True, "better_response_id": 7}, {**PKU, "tie": False}]
    rows[2]["response_0"] = "such as:"
    path = write(tmp_path, *rows)
    assert read(path, filters=Filters(exclude=["tie"], drop_abrupt=True)).dropped == {"tie": 1, "abrupt ending": 1}


def test_candidates_serve_every_stage(tmp_path) -> None:
    rows = read(write(tmp_path, RATED, {**RATED, "instruction": "Ho"})).examples
    scored = convert.to_scored(rows[:1], "chosen")
    assert scored == [
        Example(
            f"{ID}/candidate-1",
            (USER,),
            "high",
            reward=8.0,
            rewards={"overall_score": 8.0, "fine-grained_score": 4.0, "honesty": 5.0},
            source="evol_instruct",
        ),
        Example(
            f"{ID}/candidate-2",
            (USER,),
            "low",
            reward=3.0,
            rewards={"overall_score": 3.0, "fine-grained_score": 4.5, "honesty": 2.0},
            source="evol_instruct",
        ),
    ]
    assert [(one.chosen, one.rejected, one.margin) for one in pairs.paired(rows)] == [("high", "low", 5.0)] * 2
    assert [(one.id, one.completion) for one in convert.to_supervised(rows)] == [(ID, "high"), ("train/2", "high")]


def test_a_completion_beside_scored_candidates_is_their_reference_unless_it_has_a_reward() -> None:
    row = Example("a", "p", "gold", candidates=("x", "y"), candidate_rewards=(2.0, 1.0))
    found = convert.to_scored([row], "both")
    assert [(one.id, one.completion, one.reward, one.references) for one in found] == [
        ("a/candidate-1", "x", 2.0, ("gold",)),
        ("a/candidate-2", "y", 1.0, ("gold",)),
    ]
    rewarded = convert.to_scored(
        [Example("a", "p", "own", reward=0.5, candidates=("x",), candidate_rewards=(2.0,))], "both"
    )
    assert [(one.id, one.completion, one.reward) for one in rewarded] == [
        ("a", "own", 0.5),
        ("a/candidate-1", "x", 2.0),
    ]


def test_candidates_with_scores_by_name_alone_are_rows_without_a_reward() -> None:
    row = Example("a", "p", candidates=("x", "y"), candidate_scores={"good": (1.0, 2.0), "brief": (None, 0.5)})
    found = convert.to_scored([row], "both")
    assert [(one.completion, one.reward, one.rewards) for one in found] == [
        ("x", None, {"good": 1.0}),
        ("y", None, {"good": 2.0, "brief": 0.5}),
    ]
    with pytest.raises(UserError, match=r"data.columns='\{candidate_rewards: candidates.rewards.good\}'"):
        pairs.paired([row])


ASKED = "How do I plant a bean number 0?"
SERVES = {  # file -> format, a prompt's last words, and what a row holds: completion, reward, chosen, candidates
    "alpaca": ("supervised", "in the garden", "completion"),
    "alpaca_text": ("supervised", ASKED, "completion"),
    "capybara": ("supervised", ASKED, "completion"),
    "dolly": ("supervised", ASKED, "completion"),
    "gsm8k": ("supervised", ASKED, "completion"),
    "helpsteer2": ("scored", ASKED, "completion rewards"),
    "helpsteer2_pref": ("preference", ASKED, "chosen rejected margin"),
    "hh_rlhf": ("hh", ASKED, "chosen rejected"),
    "openai_ft_weight": ("supervised", "Again please.", "completion"),
    "openai_parts": ("supervised", ASKED, "completion"),
    "pku_saferlhf": ("preference", ASKED, "chosen rejected"),
    "sharegpt": ("supervised", ASKED, "completion"),
    "summarize_axis": ("scored", f"{ASKED}\n\nTL;DR:", "completion reward rewards"),
    "summarize_comparisons": ("preference", f"{ASKED}\n\nTL;DR:", "chosen rejected"),
    "trl_lib_ultrafeedback": ("preference", ASKED, "chosen rejected chosen_reward rejected_reward"),
    "trl_lm_conv": ("supervised", ASKED, "completion"),
    "trl_lm_std": ("text", "", "completion"),
    "trl_pc_conv": ("supervised", ASKED, "completion"),
    "trl_pc_std": ("supervised", ASKED, "completion"),
    "trl_pref_conv": ("preference", ASKED, "chosen rejected"),
    "trl_pref_implicit_conv": ("preference", ASKED, "chosen rejected"),
    "trl_pref_implicit_std": ("implicit_prompt", ASKED, "chosen rejected"),
    "trl_pref_std": ("preference", ASKED, "chosen rejected"),
    "trl_prompt_only_conv": ("prompts", ASKED, ""),
    "trl_tools": ("supervised", "3", "completion"),  # what the tool said
    "trl_unpaired_conv": ("scored", ASKED, "completion reward rewards"),
    "trl_unpaired_std": ("scored", ASKED, "completion reward rewards"),
    "ultrafeedback_binarized": ("preference", ASKED, "chosen rejected chosen_reward rejected_reward"),
    "ultrafeedback_raw": ("candidates", ASKED, "candidates candidate_rewards candidate_scores"),
}
READ_AS = {"chosen": "First prepare", "rejected": "I do not know"}


@pytest.mark.parametrize("path", sorted(SHARED.glob("*")) or [None], ids=lambda path: path.stem if path else "none")
def test_files_of_many_layouts(path: Path | None) -> None:
    if path is None:
        pytest.skip("the shared layouts are not here")
    format, prompt, holds = SERVES[path.stem]
    result = read(str(path))
    assert (result.format, len(result.examples)) == (format, 60)
    first = result.examples[0]
    said = first.prompt if isinstance(first.prompt, str) else first.prompt[-1].content
    assert said.endswith(prompt) and bool(said) == bool(prompt)
    names = ("completion", "reward", "rewards", "chosen", "rejected", "chosen_reward", "rejected_reward", "margin")
    held = [name for name in (*names, "candidates", "candidate_rewards", "candidate_scores") if getattr(first, name)]
    assert set(held) | ({"reward"} if first.reward == 0 else set()) == set(holds.split())
    assert all(getattr(first, name).strip().startswith(text) for name, text in READ_AS.items() if name in held)
