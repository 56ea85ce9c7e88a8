"""What an evaluation tells of policies without a judge: from logged responses and the rewards that the rows bring."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pipeline.config.resolve import resolve
from pipeline.files import write_json, write_jsonl
from pipeline.records import Example, Response
from pipeline.report import gains as words
from pipeline.report.checks import of_policies
from pipeline.report.headline import headline
from pipeline.report.spec import FINE, LOOK, TROUBLE
from pipeline.report.stages import stages_of, verdicts
from pipeline.report.tables import policies_table
from pipeline.trainer import gains
from pipeline.trainer.evaluated import Read
from stages import evaluate, inputs
from tests import tiny

KNOWN = {"gain/known": 1.0, "gain/ess": 120.0, "gain/rows": 400.0, "gain/prompts": 400.0}
BETTER = {**KNOWN, "gain/estimate": 0.12, "gain/low": 0.08, "gain/high": 0.15}
SAME = {**KNOWN, "gain/estimate": 0.12, "gain/low": -0.01, "gain/high": 0.25}
WORSE = {**KNOWN, "gain/estimate": -0.12, "gain/low": -0.2, "gain/high": -0.05}
UNKNOWN = {**KNOWN, "gain/known": 0.0, "gain/ess": 7.0}
MINUS = "\N{MINUS SIGN}"


def test_every_response_that_a_row_holds_is_one_logged_row() -> None:
    rows = [
        Example("a", "p", "x", reward=1.0),
        Example("b", "p", "gold", candidates=("y", "z"), candidate_rewards=(2.0, 0.0)),
        Example("c", "q", chosen="good", rejected="bad", chosen_reward=3.0, rejected_reward=-1.0),
        Example("d", "q"),
    ]
    found = [(row.id, row.prompt, row.completion, row.reward) for row in gains.logged(rows)]
    assert found == [
        ("a", "p", "x", 1.0),
        ("b/candidate-1", "p", "y", 2.0),
        ("b/candidate-2", "p", "z", 0.0),
        ("c/chosen", "q", "good", 3.0),
        ("c/rejected", "q", "bad", -1.0),
    ]


def read(logps: list[list[float]], ids: list[tuple[int, ...]]) -> Read:
    responses = [Response(Example(str(i), "p"), "", "", (5,), own, True) for i, own in enumerate(ids)]
    return Read(responses, [torch.tensor(row) for row in logps], tiny.tokenizer())


def test_log_ratios_by_hand() -> None:
    ids = [(5, 2), (7, 8, 2)]
    one, first = read([[-1.0, -2.0], [-1.0, -1.0, -1.0]], ids), read([[-2.0, -2.5], [-0.5, -1.0, -1.0]], ids)
    assert gains.log_ratios(one, first).tolist() == [1.5, -0.5]  # -3 + 4.5 | -3 + 2.5
    assert gains.nll(one) == pytest.approx(6 / 5)
    # written in other tokens, or held for impossible: nothing is estimated
    assert gains.log_ratios(one, read([[-1.0, -1.0], [-1.0] * 3], [(5, 2), (7, 9, 2)])) is None
    assert gains.log_ratios(read([[-math.inf, -1.0], [-1.0] * 3], ids), first) is None


def test_named_rewards_are_of_the_rows_that_have_them_and_a_copy_is_left_out() -> None:
    rows = [
        Example("a", "p", "x", reward=1.0, rewards={"copy": 1.0, "brief": 5.0}),
        Example("b", "q", "y", reward=2.0, rewards={"copy": 2.0}),
        Example("c", "q", "z", reward=4.0, rewards={"copy": 4.0, "brief": 7.0}),
    ]
    found = gains.rewarded(rows)
    assert {name: one.places for name, one in found.items()} == {"": [0, 1, 2], "brief": [0, 2]}
    assert found["brief"].reward.tolist() == [5.0, 7.0] and found[""].prompt.tolist() == [0, 1, 1]
    assert gains.rewarded([Example("a", "p", "x")]) == {}


def rewarded(rewards: list[float], prompts: list[int]) -> gains.Rewarded:
    wanted, words = torch.tensor(rewards, dtype=torch.float64), torch.full((len(rewards),), 5)
    return gains.Rewarded(list(range(len(rewards))), wanted, torch.zeros_like(wanted), torch.tensor(prompts), words)


def test_a_gain_by_hand() -> None:
    """Half of the rows earn 1 and are three times as likely as the others, which earn 0: 3/4 - 1/2.

    Where all are 22,026 times less likely still, it says something else, and there is no number.
    """
    rewards, ratios = [1.0, 0.0] * 50, torch.tensor([math.log(3.0), 0.0] * 50, dtype=torch.float64)
    found = gains.gained(ratios, {"": rewarded(rewards, list(range(100)))})
    assert found["gain/known"] == 1.0 and found["gain/rows"] == found["gain/prompts"] == 100.0
    assert found["gain/estimate"] == pytest.approx(0.25)
    assert found["gain/ess"] == pytest.approx(200**2 / 500)  # (50 * 3 + 50)^2 / (50 * 9 + 50)
    assert 0.1 < found["gain/low"] < 0.25 < found["gain/high"] < 0.4
    assert found["gain/mass"] == pytest.approx(2.0)
    gone = gains.gained(ratios - 10, {"": rewarded(rewards, list(range(100)))})
    assert gone["gain/known"] == 0 and "gain/estimate" not in gone
    assert gone["gain/mass"] == pytest.approx(2 * math.exp(-10))
    assert words.said(gone) == f"not known (logged responses are 9.1e{MINUS}5 times as likely: it says other things)"


TOLD = ("known", "ess", "rows", "prompts", "length_correlation", "mass")


@pytest.mark.parametrize(("rows", "prompts"), [(6, 6), (100, 1)])  # too few rows; all of one prompt
def test_what_is_not_to_be_believed_has_no_number(rows: int, prompts: int) -> None:
    ratios = torch.linspace(0.0, 1.0, rows, dtype=torch.float64)
    found = gains.gained(
        ratios, {"brief": rewarded([float(i % 2) for i in range(rows)], [i % prompts for i in range(rows)])}
    )
    assert found.keys() == {f"gain/brief/{name}" for name in TOLD}
    assert found["gain/brief/known"] == 0.0
    assert words.said(found, "gain/brief/known").startswith("not known (ESS ")


def test_a_reward_that_counts_words_is_not_estimated() -> None:
    """Ratios say next to nothing of length, which the policy's own responses show."""
    rows = [Example(str(i), str(i), "w " * i, reward=-float(i)) for i in range(1, 41)]
    found = gains.gained(torch.zeros(40, dtype=torch.float64), gains.rewarded(rows))
    assert found["gain/length_correlation"] == pytest.approx(-1.0) and "gain/estimate" not in found
    assert words.said(found) == f"not known (it follows length, correlation {MINUS}1.00)"


@pytest.mark.parametrize(
    ("values", "text", "level"),
    [
        (BETTER, "+0.120 (90 % interval +0.0800 .. +0.150, from 400 logged responses; ESS 120): better", FINE),
        (
            SAME,
            f"+0.120 (90 % interval {MINUS}0.0100 .. +0.250, from 400 logged responses; ESS 120): the same within",
            LOOK,
        ),
        (WORSE, f"{MINUS}0.120 (90 % interval {MINUS}0.200 .. {MINUS}0.0500, from 400 logged", TROUBLE),
        (UNKNOWN, "not known (ESS 7 of 400)", LOOK),
    ],
)
def test_the_sentence_never_calls_better_what_holds_0(tmp_path: Path, values: dict, text: str, level: str) -> None:
    write_json(tmp_path / "evaluate" / "results.json", {"sft": {}, "rl": values})
    (stage,) = stages_of(tmp_path)
    said = headline(stage)
    assert said.text.startswith(f"estimated gain over sft {text}") and said.level == level
    assert of_policies({}, values)["gain/known"].level == level
    trained = {
        f"eval/{tag}": value for tag, value in values.items() if tag not in ("gain/known", "gain/rows", "gain/prompts")
    }
    write_json(tmp_path / "rl" / "results.json", {**trained, "model_step": 20, "steps": 40, "eval/loss": 1.0})
    write_jsonl(tmp_path / "rl" / "metrics.jsonl", [{"step": 0, "eval/loss": 2.0}, {"step": 40, "eval/loss": 1.0}])
    rl = next(stage for stage in stages_of(tmp_path) if stage.kind == "rl")
    said = headline(rl)
    assert said.text.startswith("estimated gain over the start model at step 20 of 40 ") and said.level == level
    assert verdicts(rl)["estimated_gain"].level == level


def test_the_best_step_is_that_of_the_highest_estimate_where_nothing_judges(tmp_path: Path) -> None:
    """The loss, which falls to the end, chooses nothing; at step 20 nothing is known."""
    known = {0: 0.0, 10: 0.2, 20: None, 30: 0.1}
    rows = [{"step": s, "eval/loss": 2.0 - s / 100, "eval/gain/ess": 9.0, "eval/gain/dr": g} for s, g in known.items()]
    write_jsonl(tmp_path / "rl" / "metrics.jsonl", rows)
    (stage,) = stages_of(tmp_path)
    assert verdicts(stage)["best_step"].text == "10 of 30"


def test_without_judge_and_rewards_the_sentence_says_what_a_number_would_need(tmp_path: Path) -> None:
    write_json(tmp_path / "evaluate" / "results.json", {"sft": {"objective/kl": 0.0}, "rl": {"objective/kl": 1.5}})
    said = headline(stages_of(tmp_path)[0])
    assert said.level == LOOK and said.text.endswith("(data.test=FILE with rewards, or reward=NAME), KL 1.50")


def test_tables_show_the_interval_or_that_it_is_not_known() -> None:
    results = {"sft": {"logged/nll": 0.5}, "a": {"logged/nll": 0.6, **BETTER}, "b": {"logged/nll": 0.7, **UNKNOWN}}
    head, *lines = evaluate.table(results).splitlines()
    assert head.split() == ["policy", "nll", "gain"]
    assert [line.split("  ")[-1].strip() for line in lines] == [
        "-",
        "+0.120 (+0.0800 .. +0.150)",
        "not known (ESS 7 of 400)",
    ]
    found = {name: of_policies(results["sft"], results[name]) for name in ("a", "b")}
    page = policies_table("evaluate", results, found)
    (row,) = [row for row in page.rows if row[0].text.startswith("Estimated gain")]
    assert [(cell.text, cell.level) for cell in row[3::2]] == [
        ("+0.120 (+0.0800 .. +0.150)", FINE),
        ("not known (ESS 7 of 400)", LOOK),
    ]


def test_which_rows_are_held_out(tmp_path: Path) -> None:
    def of(*given: str) -> tuple[str, list[str]]:
        settings = resolve(["stage=evaluate", f"runs_dir={tmp_path}", *given]).settings
        split = inputs.evaluate_split(settings)
        return split, [*inputs.not_held_out(settings, split)]

    assert of("data.test=t") == ("test", [])
    split, (line,) = of("data.train=x")
    assert split == "validation" and line.startswith("there is no test split: evaluated on validation")
    assert of("data.train=x", "data.validation_fraction=0")[0] == "test"  # refused where the rows are read
    # the policy was trained on x, of which it held a part out
    write_json(tmp_path / "default" / "rl" / "config.yaml", {"data": {"train": "x", "validation_fraction": 0.05}})
    assert [line.split(":")[0] for line in of("data.test=x")[1]] == ["policy rl learned from rows of x"]
    assert len(of("data.train=x", "data.validation_fraction=0.05")[1]) == 1
    assert of("data.train=x", "data.validation_fraction=0.5")[1][1].startswith("policy rl learned from rows of x")


def two_models(tmp_path: Path) -> str:
    """`policies=` of two models of other weights."""
    for name, seed in (("sft", 0), ("rl", 1)):
        place = tmp_path / "models" / name
        tiny.language_model("llama", seed).save_pretrained(place)
        tiny.tokenizer().save_pretrained(place)
    return f"policies={{sft: {tmp_path}/models/sft, rl: {tmp_path}/models/rl}}"


def test_a_greedy_evaluation_judges_its_plain_samples_too(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "test.jsonl", [{"prompt": f"the dog {i}"} for i in range(6)])
    given = [two_models(tmp_path), f"data.test={tmp_path}/test.jsonl", "reward=length", "generation.max_new_tokens=9"]
    given += ["data.max_prompt_length=40"]
    found = {}
    for name, own in {"greedy": ["judge_samples=true"], "drawn": ["do_sample=true", "judge_samples=true"]}.items():
        step = resolve(["stage=evaluate", f"runs_dir={tmp_path}", f"name={name}", *given, *own])
        evaluate.main(step.settings, list(step.words))
        (file,) = tmp_path.glob(f"default/evaluate*/{name}/results.json")
        found[name] = json.loads(file.read_text())
    greedy, drawn = found["greedy"]["rl"], found["drawn"]["rl"]
    assert greedy["reward"] != greedy["sampled/reward"]
    sampled = {tag: value for tag, value in greedy.items() if tag.startswith("sampled/")}
    assert sampled == {f"sampled/{tag}": drawn[tag] for tag in drawn if tag.startswith("reward")}


def test_an_evaluation_without_a_judge(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two models of other weights, 40 scored rows: samples, KL, and an estimate by each reward of the rows.

    The limit holds the longest response without its end: no text is lost, and no warning said.
    """
    policies = two_models(tmp_path)
    texts = ("the cat", "a dog and a cat", "the")
    rows = [
        {
            "prompt": f"the dog {i}",
            "response": texts[i % 3],
            "reward": float(i % 3),
            "rewards": {"brief": -float(i % 2)},
        }
        for i in range(40)
    ]
    write_jsonl(tmp_path / "test.jsonl", rows)
    given = [policies, f"data.test={tmp_path}/test.jsonl", "max_rows=4", "num_samples=2", "generation.max_new_tokens=5"]
    whole = len(tiny.encoder().encode("the dog", texts[1]).response_ids)
    given += ["data.max_prompt_length=40", f"data.max_response_length={whole - 1}"]
    step = resolve(["stage=evaluate", f"runs_dir={tmp_path}", *given])
    evaluate.main(step.settings, list(step.words))
    left = tmp_path / "default" / "evaluate"
    results = json.loads((left / "results.json").read_text())
    assert "reward" not in results["rl"] and results["rl"]["objective/kl"] > 0 < results["sft"]["logged/nll"]
    assert not any(tag.startswith("gain/") for tag in results["sft"])
    for head in ("gain/", "gain/brief/"):
        assert results["rl"][f"{head}rows"] == 40.0 and 1 <= results["rl"][f"{head}ess"] <= 40
        assert (f"{head}estimate" in results["rl"]) == bool(results["rl"][f"{head}known"])
    samples = [json.loads(line) for line in (left / "samples" / "policies.jsonl").read_text().splitlines()]
    assert [row["policy"] for row in samples] == ["sft", "sft", "rl", "rl"] and "reward" not in samples[0]
    said = capfd.readouterr()
    assert "gain in brief" in said.out and "lose text" not in said.err
    cut = Read([Response(Example("a", "p", "x"), "", "x", (3,), (4,), finished=False)], [], tiny.tokenizer())
    gains.say_of_rows(cut.responses, {"rl": cut}, {})
    assert "policy rl: 1 of 1 logged responses lose text to data.max_response_length" in capfd.readouterr().err
