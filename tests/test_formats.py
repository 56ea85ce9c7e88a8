"""Every format from literal rows, and every way in which a row can be wrong."""

import json

import pytest

from pipeline.data.formats import FORMATS
from pipeline.data.readers import read
from pipeline.errors import UserError
from pipeline.records import Example, Message

ASK, SAY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
USER, ASSISTANT = Message("user", "Hi"), Message("assistant", "Hello")
HH = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: A joke\n\nAssistant:"
HH_TURNS = (USER, Message("assistant", "Yes?"), Message("user", "A joke"))
ALOL = {
    "prefix": [["<|prompter|>Hi", "<|assistant|>Hello", "<|prompter|>A joke", "<|assistant|>"]] * 2,
    "suffix": ["Knock knock", "No"],
    "reward": [0.5, -1],
    "sft_index": 0,
    "meta": {"path": "harmless", "line_num": 4, "task": "dialogue"},
}
GEN = {
    "id": 12,
    "prompt_or_input_text": "Ask",
    "references": "Reply",
    "meta_data": {"score": 3},
    "reward_components": {"fluency": 0.25, "length": 0.5, "final_reward": 0.75},
}


def write(folder, *rows, name="train.jsonl"):
    path = folder / name
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def only(folder, row, format=None):
    """(the one Example of a file with this row, the format found)."""
    result = read(write(folder, row), format)
    (example,) = result.examples
    return example, result.format


ID = "train/1"
ACCEPTED = [
    ("scored", {"prompt": "p", "completion": "c", "reward": 1}, Example(ID, "p", "c", reward=1.0)),
    ("scored", {"prompt": "p", "response": "c", "score": "0.5"}, Example(ID, "p", "c", reward=0.5)),
    (
        "scored",
        {"prompt": "p", "completion": "c", "rewards": {"good": 1, "safe": 0.5, "none": None}, "references": ["r", "s"]},
        Example(ID, "p", "c", ("r", "s"), rewards={"good": 1.0, "safe": 0.5}),
    ),
    ("scored", {"messages": [ASK, SAY], "reward": -2}, Example(ID, (USER,), "Hello", reward=-2.0)),
    (
        "preference",
        {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 2, "id": "x", "source": "web", "other": 1},
        Example("x", "p", chosen="c", rejected="r", margin=2.0, source="web"),
    ),
    (
        "preference",
        {"prompt": "p", "chosen": "c", "rejected": "r", "chosen_gpt_score": 0.9, "rejected_gpt_score": 0.1},
        Example(ID, "p", chosen="c", rejected="r", chosen_reward=0.9, rejected_reward=0.1),
    ),
    (
        "preference",
        {"prompt": "p", "chosen": "c", "rejected": "r", "gpt_correctness": 1},
        Example(ID, "p", chosen="c", rejected="r", correctness=1.0),
    ),
    (
        "preference",
        {"prompt": "p", "response": "not read", "chosen": "c", "rejected": "r", "gpt_correctness": False},
        Example(ID, "p", chosen="c", rejected="r", correctness=0.0),
    ),
    (
        "preference",
        {"prompt": "Hi", "chosen": [ASK, SAY], "rejected": [ASK, {**SAY, "content": "No"}], "score_chosen": 8},
        Example(ID, (USER,), chosen="Hello", rejected="No", chosen_reward=8.0),
    ),
    (
        "preference",
        {"prompt": [ASK], "chosen": [SAY], "rejected": [{**SAY, "content": "No"}]},
        Example(ID, (USER,), chosen="Hello", rejected="No"),
    ),
    (
        "preference",
        {"chosen": [ASK, SAY], "rejected": [ASK, {**SAY, "content": "No"}]},
        Example(ID, (USER,), chosen="Hello", rejected="No"),
    ),
    (
        "hh",
        {"chosen": HH + " Knock", "rejected": HH + "  Know\n\nHuman: more\n\nAssistant: No"},
        Example(ID, HH_TURNS, chosen="Knock", rejected=" Know"),
    ),
    (
        "implicit_prompt",
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},  # they part within a word
        Example(ID, "The sky is", chosen=" blue.", rejected=" black."),
    ),
    (
        "implicit_prompt",
        {"chosen": "[INST] 1+1? [/INST] It is 2", "rejected": "[INST] 1+1? [/INST] It is 3"},
        Example(ID, "[INST] 1+1? [/INST]", chosen=" It is 2", rejected=" It is 3"),
    ),
    (
        "implicit_prompt",
        {"chosen": "Q: 1+1?\nAnswer: It is 2", "rejected": "Q: 1+1?\nAnswer: It is 3"},
        Example(ID, "Q: 1+1?\nAnswer:", chosen=" It is 2", rejected=" It is 3"),
    ),
    (
        "preference",
        {"prompt": "Be kind." + HH, "chosen": " Knock", "rejected": "No", "references": [" Knock"]},
        Example(ID, (Message("system", "Be kind."), *HH_TURNS), references=("Knock",), chosen="Knock", rejected="No"),
    ),
    (
        "scored",
        {"prompt": "Human: Hi\n\nAssistant: a\n\nAssistant:", "completion": " b", "reward": 1},
        Example(ID, (USER, Message("assistant", "a\n\n")), "b", reward=1.0),
    ),
    ("prompts", {"prompt": "A play\n\nAssistant:"}, Example(ID, "A play\n\nAssistant:")),
    ("supervised", {"prompt": "p", "completion": " c\n"}, Example(ID, "p", " c\n")),
    (
        "supervised",
        {"messages": [ASK, SAY, {**SAY, "content": "Again"}]},
        Example(ID, (USER, Message("assistant", "Hello\n\n")), "Again"),
    ),
    ("supervised", {"prompt": [ASK], "completion": [SAY]}, Example(ID, (USER,), "Hello")),
    (
        "supervised",
        {"messages": [{"role": "system", "content": "Be kind"}, ASK, SAY, ASK, SAY]},
        Example(ID, (Message("system", "Be kind"), USER, ASSISTANT, USER), "Hello"),
    ),
    (
        "supervised",
        {"instruction": "Add", "input": "1 2", "output": "3"},
        Example(ID, (Message("user", "Add\n1 2"),), "3"),
    ),
    (
        "supervised",
        {"instruction": "And now?", "input": "", "output": "3", "history": [["Hi", "Hello"]]},
        Example(ID, (USER, ASSISTANT, Message("user", "And now?")), "3"),
    ),
    (
        "prefix_suffix",
        ALOL,
        Example(
            ID,
            (USER, ASSISTANT, Message("user", "A joke")),
            chosen="Knock knock",
            rejected="No",
            chosen_reward=0.5,
            rejected_reward=-1.0,
            source="harmless",
        ),
    ),
    (
        "gen_task",
        GEN,
        Example("12", "Ask", "Reply", reward=0.75, rewards={"fluency": 0.25, "length": 0.5}),
    ),
    (
        "candidates",
        {"source": "s", "reference": "r", "candidates": [{"text": "b", "score": 1}, {"text": "a", "score": 2}]},
        Example(ID, "s", "r", ("r",), ("a", "b"), (2.0, 1.0)),
    ),
    (
        "candidates",
        {"prompt": "p", "source": "web", "references": ["r", "s"], "candidates": ["a", "b"]},
        Example(ID, "p", None, ("r", "s"), ("a", "b"), source="web"),
    ),
    (
        "published",
        {"id": "7", "article": "a", "highlights": "h\ni"},
        Example("7", "a", "h\ni"),
    ),
    ("published", {"document": "d", "summary": "s"}, Example(ID, "d", "s")),
    ("published", {"dialogue": "A: hi\nB: ho", "summary": "s"}, Example(ID, "A: hi\nB: ho", "s")),
    ("published", {"sentence": "s", "question": "q", "paragraph": "p"}, Example(ID, "s", "q")),
    ("text", {"text": "Once upon a time"}, Example(ID, "", "Once upon a time")),
    ("prompts", {"prompt": "p"}, Example(ID, "p")),
    ("prompts", {"prompt": "p", "references": "r"}, Example(ID, "p", references=("r",))),
    ("prompts", {"instruction": "Hi"}, Example(ID, (USER,))),
]


@pytest.mark.parametrize(("format", "row", "expected"), ACCEPTED)
def test_a_row_becomes_an_example_and_its_format_is_found(tmp_path, format, row, expected):
    assert only(tmp_path, row) == (expected, format)
    assert only(tmp_path, row, format) == (expected, format)


def test_transcripts_that_part_early_are_counted(tmp_path, caplog):
    caplog.set_level("INFO", logger="tiffin")
    early = {"chosen": HH + " a\n\nHuman: b\n\nAssistant: c", "rejected": HH + " d"}
    read(write(tmp_path, early, {"chosen": HH + " a", "rejected": HH + " d"}))
    assert "transcripts that part before their last turn 1, read up to the human's next" in caplog.messages[-1]


def test_every_format_but_the_table_is_tried_above():
    assert {format for format, _, _ in ACCEPTED} == set(FORMATS) - {"candidates_tsv"}


@pytest.mark.parametrize("given", [{}, {"references": None}, {"references": []}])
def test_references_are_those_given(tmp_path, given):
    assert only(tmp_path, {"prompt": "p", "completion": "c", **given})[0].references == ()


@pytest.mark.parametrize("name", ["data.tsv", "data.txt"])
def test_ranked_candidates_with_both_wrappers(tmp_path, name):
    listed = "left out<#QUERY#>good<#SCORE#>0.5<#SEP#>best<#SCORE#>0.75<#SEP#>bad<#SCORE#>-1<#REFS#>r<#REF#>r2"
    path = write(tmp_path, f"s\tr\t{listed}", 's "x\tt\ta<#SCORE#>1', name=name)
    expected = [
        # ordered by score; the reference of the line comes first among the references, once
        Example("data/1", "s", "r", ("r", "r2"), ("best", "good", "bad"), (0.75, 0.5, -1.0)),
        Example("data/2", 's "x', "t", ("t",), ("a",), (1.0,)),
    ]
    for format in (None, "candidates_tsv"):
        result = read(path, format)
        assert (result.examples, result.format) == (expected, "candidates_tsv")


def test_a_csv_file_holds_numbers_as_text(tmp_path):
    path = write(tmp_path, "prompt,completion,score,margin", "p,c,0.25,", "q,d,1e1,2", name="a.csv")
    assert read(path).examples == [
        Example("a/2", "p", "c", reward=0.25),
        Example("a/3", "q", "d", reward=10.0, margin=2.0),
    ]


SCORED, PAIR = {"prompt": "p", "completion": "c", "reward": 1}, {"prompt": "p", "chosen": "c", "rejected": "r"}
TURNS = {"messages": [ASK, SAY]}
LISTED = {"prompt": "p", "candidates": [{"text": "a", "score": 1}]}
BAD = [
    ("scored", {**SCORED, "reward": "high"}, "reward: 'high' is text, wanted a finite number"),
    ("scored", '{"prompt": "p", "completion": "c", "reward": NaN}', "reward: nan is a number, wanted a finite number"),
    ("scored", '{"prompt": "p", "completion": "c", "reward": -1e999}', "reward: -inf is a number, wanted a finite"),
    ("scored", {**SCORED, "reward": 10**400}, "reward: 1000"),
    ("scored", {**SCORED, "reward": True}, "reward: True is a truth value, wanted a finite number"),
    ("scored", {**SCORED, "reward": None}, "reward: null, wanted a finite number"),
    ("scored", {"prompt": "p", "completion": "c", "rewrad": 1}, "reward (or score): missing.*did you mean 'rewrad'?"),
    ("scored", {**SCORED, "rewards": [1]}, "rewards: [1] is a list, wanted a mapping"),
    ("scored", {**SCORED, "rewards": {"good": "x"}}, "rewards.good: 'x' is text, wanted a finite number"),
    ("scored", {**SCORED, "completion": ""}, "completion: empty, wanted text"),
    ("scored", {**SCORED, "completion": " \n"}, "completion: empty, wanted text"),
    ("scored", {**SCORED, "prompt": ""}, "prompt: empty, wanted text"),
    ("scored", {**SCORED, "prompt": 3}, "prompt: 3 is a number, wanted text"),
    ("scored", {**SCORED, "completion": {"a": 1}}, "completion: {'a': 1} is a mapping, wanted text"),
    ("scored", {**SCORED, "references": ["a", 2]}, "references[1]: 2 is a number, wanted text"),
    ("scored", {**SCORED, "id": [1]}, "id: [1] is a list, wanted text"),
    ("scored", {**SCORED, "completion": "\ud83d"}, "completion: half a surrogate pair at character 1"),
    ("scored", [1], "JSON of type list, wanted an object with named columns"),
    ("scored", '{"prompt": "p", ', "no JSON"),
    ("preference", {"prompt": "p", "chosen": "c"}, "rejected: missing, wanted text"),
    ("preference", {**PAIR, "margin": "wide"}, "margin: 'wide' is text, wanted a finite number"),
    ("preference", {**PAIR, "chosen": 7}, "chosen: 7 is a number, wanted text"),
    ("preference", {**PAIR, "chosen": [ASK, SAY], "rejected": [SAY]}, "chosen, rejected: differ before their last"),
    ("preference", {"prompt": [ASK], "chosen": [SAY]}, "rejected: null, wanted a list of"),
    ("hh", {"chosen": HH + "a", "rejected": "\n\nHuman: Bye\n\nAssistant: b"}, "chosen, rejected: share no beginning"),
    ("hh", {"chosen": HH + " a", "rejected": HH}, "rejected, its last answer: empty"),
    (
        "implicit_prompt",
        {"chosen": "Yes sir", "rejected": "No sir"},
        "chosen, rejected: share no beginning, wanted two",
    ),
    ("implicit_prompt", {"chosen": "A: so", "rejected": "A:"}, "rejected, its answer: empty, wanted text"),
    ("supervised", {"messages": [ASK]}, "messages: the last message is from 'user', wanted one from 'assistant'"),
    ("supervised", {"messages": [SAY]}, "messages: one message, wanted a prompt"),
    ("supervised", {"messages": []}, "messages: empty, wanted at least one message"),
    ("supervised", {"messages": [ASK, {**SAY, "role": "asistant"}]}, "messages[1].role: .*did you mean 'assistant'?"),
    ("supervised", {"messages": [ASK, {"role": "assistant"}]}, "messages[1].content: null, wanted text"),
    ("supervised", {"messages": ["Hi"]}, "messages[0]: 'Hi' is text, wanted {"),
    ("supervised", {"prompt": "p", "completion": [ASK, SAY]}, "completion: 2 messages, wanted one from the assistant"),
    ("supervised", {"instruction": "a", "output": "b", "history": [["q"]]}, "history[0]: 1 entries, wanted [query"),
    ("prefix_suffix", {**ALOL, "prefix": [["<|prompter|>a", "<|assistant|>"]]}, "prefix: 1 entries, wanted two lists"),
    ("prefix_suffix", {**ALOL, "prefix": [["<|assistant|>"], ["x"]]}, "prefix: the two lists of turns differ"),
    ("prefix_suffix", {**ALOL, "prefix": [["<|prompter|>a"]] * 2}, "prefix[0]: wanted turns of which the last is"),
    ("prefix_suffix", {**ALOL, "prefix": [["a", "<|assistant|>"]] * 2}, "prefix[0][0]: 'a' is text, wanted text that"),
    ("prefix_suffix", {**ALOL, "suffix": ["a", ""]}, "suffix[1]: empty, wanted text"),
    ("prefix_suffix", {**ALOL, "reward": [1, None]}, "reward[1]: null, wanted a finite number"),
    ("gen_task", {**GEN, "references": ["a"]}, "references: ['a'] is a list, wanted text"),
    ("gen_task", {**GEN, "reward_components": {"fluency": 1}}, "reward_components: no final_reward"),
    ("candidates", {**LISTED, "candidates": []}, "candidates: empty, wanted at least one"),
    ("candidates", {**LISTED, "candidates": [{"text": "a", "score": 1}, {"text": "b"}]}, "1 scores for 2 candidates"),
    ("candidates", {**LISTED, "candidates": [{"text": "a", "score": "x"}]}, "candidates[0].score: 'x' is text"),
    ("candidates", {**LISTED, "candidates": [{"text": "a"}, "b"]}, "candidates[1]: 'b' is text, wanted {"),
    ("candidates", {"prompt": "p"}, "candidates: missing, wanted a list"),
    ("published", {"article": "a", "highlights": " "}, "highlights: empty, wanted text"),
    ("published", {"dialogue": None, "summary": "s"}, "dialogue: null, wanted text"),
    ("text", {"text": ""}, "text: empty, wanted text"),
    ("prompts", {"prompt": None}, "prompt: null, wanted text"),
]


@pytest.mark.parametrize(("format", "row", "found"), BAD)
def test_a_bad_row_names_file_line_field_and_cure(tmp_path, format, row, found):
    good = next(row for name, row, _ in ACCEPTED if name == format)
    path = write(tmp_path, good, row)
    with pytest.raises(UserError) as caught:
        read(path, format)
    message = str(caught.value)
    first, *rest = found.split(".*")
    assert message.startswith(f"{path}:2: ")
    assert all(part in message for part in (first, *rest))
    assert message.endswith("(1 bad row of 2); fix the data, or allow them with data.max_bad_rows=1")
    assert "\n" not in message
    allowed = read(path, format, max_bad_rows=1)
    assert (len(allowed.examples), len(allowed.bad_rows), allowed.rows_read) == (1, 1, 2)


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        ("a", "data_kd, candidate 1: no <#SCORE#>"),
        ("a<#SCORE#>1<#SEP#>", "data_kd, candidate 2: no <#SCORE#>"),
        ("a<#SCORE#>high", "data_kd, candidate 1, score: 'high' is text, wanted a finite number"),
        ("a<#SCORE#>1<#SCORE#>2", "data_kd: <#SCORE#> stands 2 times in one place, wanted once"),
        ("a<#SCORE#>1<#REFS#>", "data_kd, references: empty"),
    ],
)
def test_bad_ranked_candidates(tmp_path, listed, found):
    path = write(tmp_path, "s\tr\ta<#SCORE#>1", f"s\tr\t{listed}", name="a.tsv")
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:2: {found}")
