"""Several rewards -> one: sums, normalisation, statistics by hand, and every mistake a reward can make."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from pipeline.config.resolve import resolve as resolve_words
from pipeline.config.reward_spec import parse
from pipeline.errors import UserError
from pipeline.rewards.build import build_rewards, normalisation
from pipeline.rewards.rewards import Rewards, WeightedReward, bounds, resolve
from pipeline.trainer.evaluation import length_correlation
from reward_models import length, rouge
from reward_models._values import shortened


def fixed(values):
    """A reward that returns `values` whatever it is given."""
    return lambda prompts, completions, **columns: values


def score(rewards: Rewards, completions: list[str], **columns: list):
    return rewards.score(["p"] * len(completions), completions, columns)


def words(prompts, completions, **columns):
    return [float(text) for text in completions]


def test_weighted_sum():
    rewards = Rewards([WeightedReward("a", 1.0, fixed([1.0, 2.0])), WeightedReward("b", -0.5, fixed([4.0, 0.0]))])
    scores = score(rewards, ["x", "y"])
    assert scores.raw == {"a": [1.0, 2.0], "b": [4.0, 0.0]}
    assert scores.normalised == scores.raw
    assert scores.total == [-1.0, 2.0]  # 1 - 0.5 * 4, 2 - 0.5 * 0


def test_sigmoid_values():
    scores = score(Rewards([WeightedReward("a", 2.0, fixed([-1.5441417694, 0.3059706092]), "sigmoid")]), ["x", "y"])
    assert scores.raw["a"] == [-1.5441417694, 0.3059706092]
    assert scores.normalised["a"] == pytest.approx([0.17593399, 0.57590143], abs=1e-8)
    assert scores.total == pytest.approx([2 * 0.17593399, 2 * 0.57590143], abs=2e-8)


def test_sigmoid_far_out():
    scores = score(Rewards([WeightedReward("a", 1.0, fixed([-1e4, 1e4, 0.0]), "sigmoid")]), ["x", "y", "z"])
    assert scores.total == [0.0, 1.0, 0.5]


def test_all_is_passed_by_keyword():
    def reward(completions, answer, **others):  # no `prompts`, as many do
        assert others == {"prompts": ["p", "p"], "source": ["s", "t"]}
        return [float(text == right) for text, right in zip(completions, answer, strict=True)]

    rewards = Rewards([WeightedReward("a", 1.0, reward)])
    assert score(rewards, ["x", "y"], answer=["x", "z"], source=["s", "t"]).total == [1.0, 0.0]


@pytest.mark.parametrize(
    "values",
    [
        [1, 0],
        (1.0, 0.0),
        [True, False],
        np.array([1.0, 0.0], dtype=np.float32),
        [np.float32(1), np.int64(0)],
        [np.bool_(True), np.bool_(False)],
        torch.tensor([1.0, 0.0], dtype=torch.bfloat16, requires_grad=True),
        [torch.tensor(1.0), torch.tensor(0)],
        [Fraction(1), Fraction(0)],
    ],
)
def test_kinds_of_numbers(values):
    total = score(Rewards([WeightedReward("a", 1.0, fixed(values))]), ["x", "y"]).total
    assert total == [1.0, 0.0]
    assert [type(value) for value in total] == [float, float]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (None, "reward mine: it returned a NoneType, wanted a list of one float per completion"),
        (1.0, "it returned a float, wanted a list"),
        ("12", "it returned a str, wanted a list"),
        ({0: 1.0}, "it returned a dict, wanted a list"),
        (torch.tensor(1.0), "it returned a float, wanted a list"),
        ([1.0], "reward mine: it returned 1 values for 2 completions"),
        ([1.0, 2.0, 3.0], "it returned 3 values for 2 completions"),
        ([1.0, None], r"^reward: completion 1: none of mine judges 'second\\ntext' \(all returned None\), wanted a"),
        ([math.nan, 1.0], "reward mine: nan for completion 0 'first', wanted a finite float; a reward that cannot"),
        ([1.0, -math.inf], "-inf for completion 1"),
        ([1.0, 10**400], "10000.* for completion 1"),
        ([1.0, "0.5"], "'0.5' for completion 1"),
        ([1.0, [2.0]], "a list for completion 1"),
        ([1.0, 1j], "a complex for completion 1"),
        (torch.ones(2, 1), "a list for completion 0"),
        ([torch.ones(1), torch.ones(1)], "a Tensor for completion 0"),
    ],
)
def test_wrong_values(values, said):
    with pytest.raises(UserError, match=said) as raised:
        score(Rewards([WeightedReward("mine", 1.0, fixed(values))]), ["first", "second\ntext"])
    assert "\n" not in str(raised.value)


def test_an_exception_names_the_reward_the_line_and_the_cause(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def reward(prompts, completions, **columns):\n    x = len(prompts)\n    return helper(x - 1)\n\n\n"
    )
    with file.open("a") as more:
        more.write("def helper(x):\n    return [1 / x]\n")
    function = resolve(str(file), learned=no_model, served=no_server, trained={})
    with pytest.raises(UserError) as raised:
        score(Rewards([WeightedReward("mine", 1.0, function)]), ["text"], source=["s"], id=["i"])
    wanted = f"reward mine, called with the columns source, id: ZeroDivisionError: division by zero ({file}:7)"
    assert str(raised.value) == wanted
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_a_missing_column_is_said():
    with pytest.raises(
        UserError, match=r"called with the columns \(none\): TypeError: .* missing 1 required .* 'answer'$"
    ):
        score(Rewards([WeightedReward("mine", 1.0, lambda completions, answer, **columns: [])]), ["x"])
    with pytest.raises(UserError, match=r"reward rouge, .*: ValueError: there is no column `references`"):
        score(Rewards([WeightedReward("rouge", 1.0, rouge.reward)]), ["x"])


def test_a_wrong_value_names_its_row():
    rewards = Rewards([WeightedReward("mine", 1.0, fixed([0.0, math.inf]))])
    with pytest.raises(UserError, match="reward mine: inf for completion 1 of row data/7 'y', wanted"):
        score(rewards, ["x", "y"], id=["data/3", "data/7"])


def test_none_is_left_out_of_its_rows_sum_and_a_row_of_nones_is_an_error():
    maths, code = fixed([1.0, None, 0.5]), fixed([None, -2.0, 4.0])
    rewards = Rewards([WeightedReward("maths", 2.0, maths), WeightedReward("code", 0.5, code, "sigmoid")])
    scores = score(rewards, ["x", "y", "z"])
    assert scores.raw == {"maths": [1.0, None, 0.5], "code": [None, -2.0, 4.0]}
    # sigmoid(-2) = .119203, sigmoid(4) = .982014: 2 * 1; .5 * .119203; 2 * .5 + .5 * .982014
    assert scores.normalised["code"] == pytest.approx([None, 0.1192029, 0.9820138])
    assert scores.total == pytest.approx([2.0, 0.0596015, 1.4910069])
    watched = Rewards([WeightedReward("code", 1.0, fixed([None, 1.0])), WeightedReward("m", 0.0, fixed([3.0, 4.0]))])
    with pytest.raises(UserError, match=r"^reward: row b/1: none of code judges 'x' \(all returned None\), wanted a"):
        score(watched, ["x", "y"], id=["b/1", "b/2"])  # a monitor's judgement is not learned from
    assert score(Rewards([WeightedReward("m", 0.0, fixed([None]))]), ["x"]).total == [0.0]


def test_a_reward_that_gives_all_texts_the_same_is_named_once(capsys):
    flat = WeightedReward("flat", 1.0, lambda completions, **columns: [0.3 + 1e-9 * len(x) for x in completions])
    far = WeightedReward("far", 1.0, lambda completions, **columns: [20.0 + len(x) for x in completions], "sigmoid")
    fine = WeightedReward("fine", 1.0, lambda completions, **columns: [float(len(x) > 15) for x in completions])
    rewards = Rewards([flat, far, fine])
    texts = ["x" * i for i in range(1, 17)]
    score(rewards, texts[:9] + texts[:9])
    score(rewards, texts[5:15])
    assert not capsys.readouterr().err  # 15 different texts
    for _ in range(2):
        score(rewards, texts)
    end = "), wanted values that tell good from bad"
    assert capsys.readouterr().err.splitlines() == [
        f"tiffin: reward flat: 0.3 for each of 16 different texts (standard deviation 4e-09{end}",
        f"tiffin: reward far: 1 for each of 16 different texts (standard deviation 2e-10{end}",
    ]


def test_a_reward_that_judges_nothing_is_named_once(capsys):
    other = WeightedReward("other", 1.0, lambda completions, **columns: [float(len(x)) for x in completions])
    none = WeightedReward("none", 1.0, lambda completions, **columns: [None for _ in completions])
    some = WeightedReward("some", 1.0, lambda completions, **columns: [1.0 if x == "x" else None for x in completions])
    rewards = Rewards([other, none, some])
    for texts in (["x" * i for i in range(1, 16)], ["y"] * 9, ["z"]):
        score(rewards, texts)
    assert capsys.readouterr().err == (
        "tiffin: reward none: None for each of 16 different texts, wanted some of them judged\n"
    )


def test_long_texts_are_shortened():
    assert shortened("a\tb\n\x1b[31m") == r"a\tb\n\x1b[31m"
    assert shortened("x" * 80) == "x" * 80
    assert shortened("\n" * 60) == "\\n" * 38 + "\\..."
    assert len(shortened("\n" * 60)) == 80


def test_length_correlation():
    texts = ["a", "a a", "a a a"]
    assert length_correlation([1.0, 2.0, 3.0], texts) == pytest.approx(1.0)
    # words 1, 2, 3 (deviations -1, 0, 1), values 0, 3, 0 (-1, 2, -1): covariance 1 + 0 - 1 = 0
    assert length_correlation([0.0, 3.0, 0.0], texts) == pytest.approx(0.0)
    # values 3, 1, 2 (1, -1, 0): -1 + 0 + 0 over sqrt(2 * 2)
    assert length_correlation([3.0, 1.0, 2.0], texts) == pytest.approx(-0.5)
    for values, completions in (
        ([0.1] * 3, texts),
        ([1.0, 2.0], ["a", "b"]),
        ([1.0], ["a"]),
        ([], []),
        ([0, 1e-300, 0], texts),
    ):
        assert math.isnan(length_correlation(values, completions))


@pytest.mark.parametrize(
    ("setting", "found"),
    # a trained model, a function, a monitored model, a monitored function
    [
        ("auto", ["sigmoid", "none", "sigmoid", "none"]),
        ("none", ["none", "none", "none", "none"]),
        ("sigmoid", ["sigmoid", "sigmoid", "sigmoid", "none"]),
    ],
)
def test_learned_scores_alone_are_normalised_by_default(setting, found):
    read = resolve_words(["stage=rl", f"rewards.normalise={setting}"]).settings.rewards
    given = [(1.0, True), (1.0, False), (0.0, True), (0.0, False)]
    assert [normalisation(read, ("a", "a"), weight, model) for weight, model in given] == found


@pytest.mark.parametrize("stage", ["rl", "score", "evaluate", "generate"])
def test_values_of_a_function_stay_as_they_are_by_default(stage, tmp_path):
    file = tmp_path / "brief.py"
    file.write_text("def reward(completions, **columns):\n    return [-len(text.split()) for text in completions]\n")
    settings = resolve_words([f"stage={stage}", f"runs_dir={tmp_path}", f"reward={file}"]).settings
    built = build_rewards(settings, settings.reward, settings.rewards, torch.device("cpu"))
    assert score(built, ["one two", "a b c"]).total == [-2.0, -3.0]


def test_bounds():
    squashed = [
        WeightedReward("a", 2.0, words, "sigmoid"),
        WeightedReward("b", -0.5, words, "sigmoid"),
        WeightedReward("c", 1.0, words, "sigmoid"),
    ]
    assert bounds(squashed) == (-0.5, 3.0)
    assert bounds([*squashed, WeightedReward("d", 1.0, words)]) is None
    assert bounds(squashed[:1]) == (0.0, 2.0)


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (None, []),
        ("helpfulness", [("helpfulness", 1.0)]),
        (" my/file.py:function ", [("my/file.py:function", 1.0)]),
        ({"helpfulness": 1, "my/file.py": -0.25}, [("helpfulness", 1.0), ("my/file.py", -0.25)]),
    ],
)
def test_parse(spec, wanted):
    assert parse(spec) == wanted


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({}, "reward: {}, wanted a name, a path, or names with weights"),
        ("", "reward: '', wanted a name"),
        (["a"], r"reward: \['a'\], wanted a name"),
        (1.0, "reward: 1.0, wanted a name"),
        ({"a": 0}, "reward.a: the weight is 0, wanted a finite number other than 0"),
        ({"a": math.nan}, "reward.a: the weight is nan"),
        ({"a": math.inf}, "reward.a: the weight is inf"),
        ({"a": "1e-5"}, "reward.a: the weight is '1e-5'"),
        ({"a": True}, "reward.a: the weight is True"),
        ({"a": None}, "reward.a: the weight is None"),
        ({3: 1.0}, "reward.3: "),
    ],
)
def test_parse_errors(spec, said):
    with pytest.raises(UserError, match=said):
        parse(spec)


def no_model(directory: str):
    raise AssertionError(f"asked for the model of {directory}")


def no_server(address: str):
    raise AssertionError(f"asked for the server at {address}")


def test_resolve_in_order(tmp_path, monkeypatch):
    directories = []

    def learned(directory: str):
        directories.append(directory)
        return fixed([0.5])

    monkeypatch.chdir(tmp_path)
    for name in ("judge", "length", "rouge"):
        (tmp_path / name).mkdir()
    (tmp_path / "judge" / "config.json").write_text("{}")
    (tmp_path / "rouge" / "config.json").write_text("{}")
    trained = {"helpfulness": "runs/demo/reward/helpfulness/model", "rouge": "runs/demo/reward/rouge/model"}
    resolve("helpfulness", learned, no_server, trained)
    resolve("rouge", learned, no_server, trained)  # trained in this run comes before a directory and before the folder
    resolve("judge", learned, no_server, trained)
    resolve("rouge", learned, no_server, {})
    assert directories == [trained["helpfulness"], trained["rouge"], "judge", "rouge"]
    # a directory that holds no model hides nothing
    assert resolve("length", no_model, no_server, {}).function is length.reward
    assert resolve("rouge:rougeL", no_model, no_server, {}).function is rouge.rougeL


def test_resolve_a_file_and_score(tmp_path):
    (tmp_path / "brief.py").write_text(
        "def reward(prompts, completions, **columns):\n    return [-len(x) for x in completions]\n"
    )
    function = resolve(f"{tmp_path}/brief.py", no_model, no_server, {})
    assert score(Rewards([WeightedReward("brief", 0.5, function)]), ["four", ""]).total == [-2.0, 0.0]


def test_resolve_unknown_name():
    with pytest.raises(UserError) as raised:
        resolve("helpfullness", no_model, no_server, {"helpfulness": "x", "harmlessness": "y"})
    said = str(raised.value)
    assert said.startswith(
        "reward 'helpfullness': neither a reward model trained in this run (harmlessness, helpfulness) nor"
    )
    assert "length" in said and "rouge" in said and "learned" not in said
    assert "; did you mean 'helpfulness'?" in said
    assert "`bash run.sh stage=reward name=NAME` trains one" in said
    with pytest.raises(UserError, match=r"trained in this run \(none yet\)"):
        resolve("helpfulness", no_model, no_server, {})


def test_resolve_directory_without_a_model(tmp_path):
    with pytest.raises(UserError, match=r"this directory has no config.json"):
        resolve(str(tmp_path), no_model, no_server, {})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("main", "it takes nothing"),
        ("helper", "it takes text, pattern"),
        ("position", "it takes completions by position only"),
        ("builtin", "a builtin that does not say what it takes"),
    ],
)
def test_resolve_refuses_what_cannot_be_called_as_a_reward(tmp_path, name, said):
    (tmp_path / "odd.py").write_text(
        "def main():\n    raise SystemExit\ndef helper(text, pattern=''):\n    return text\n"
        "def position(completions, /, **columns):\n    return []\nbuiltin = max\n"
    )
    with pytest.raises(UserError, match=rf"{said}, wanted def reward\(prompts, completions, \*\*columns\)"):
        resolve(f"{tmp_path}/odd.py:{name}", no_model, no_server, {})


def test_length_counts_characters_where_words_have_no_blanks():
    # 2, 1 and 3 characters against 2, 1, 3: all of them would be one word between blanks
    assert length_correlation([2.0, 1.0, 3.0], ["你好", "好", "ดีคก"]) == pytest.approx(1.0)


def test_what_is_nearer_to_a_reference_is_worth_more(tmp_path, monkeypatch):
    """Embeddings by hand: a text's is the mean of its words', red (1, 0), fox (0, 1), old (-1, 0)."""
    words = {"red": 0, "fox": 1, "old": 2, "[UNK]": 3}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    vectors = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 0.0]], dtype=np.float32)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=vectors)]).save(str(tmp_path / "near"))
    monkeypatch.chdir(tmp_path)
    text = 'from reward_models.similarity import judged_by\n\nreward = judged_by("near")\n'
    (tmp_path / "mine.py").write_text(text)
    reward = resolve("mine.py", no_model, no_server, {})
    texts = ["red", "old", "red fox", [{"role": "assistant", "content": "fox"}]]
    references = [["red fox"], ["red fox"], ["fox", "old red fox fox"], ["old", "fox"]]
    # cos 45, cos 135, the better of cos 45 and that to (0, 1/2), which is cos 45 too, and 1
    expected = [0.5**0.5, -(0.5**0.5), 0.5**0.5, 1.0]
    assert reward(["p"] * 4, texts, references=references) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="completion 1 'fox' has no references, which similarity compares with"):
        reward(["p"] * 2, ["red", "fox"], references=[["red"], []])


def test_words_that_tell_more_are_worth_more(tmp_path, monkeypatch):
    """TF-IDF by hand: of 3 responses, ln(4 / 3) + 1 = 1.287682 of a word that two have, ln(4 / 2) + 1 = 1.693147."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("completion\nRed fox\nred hen\naa bb cc dd ee\n")
    for name, given in (("mine", '"rows.csv"'), ("other", '"rows.csv", "answer"')):
        text = f"from reward_models.tfidf import learned_from\n\nreward = learned_from({given})\n"
        (tmp_path / f"{name}.py").write_text(text)
    reward = resolve("mine.py", no_model, no_server, {})
    texts = ["red fox!", "dd aa bb ee cc", "none of it", [{"role": "assistant", "content": "hen"}]]
    # (1.287682 + 1.693147) / 2 / sqrt(1.287682^2 + 1.693147^2) = 0.700655, 2 / 10 of it; 1 / sqrt(5), all of it
    assert reward(["p"] * 4, texts) == pytest.approx([0.140131, 0.447214, 0.0, 0.1], abs=1e-6)
    with pytest.raises(UserError, match=r"rows\.csv: no row has a text in the column 'answer'"):
        resolve("other.py", no_model, no_server, {})(["p"], ["red"])
