"""An evaluation that was stopped goes on at the policy that it had not ended."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.config.resolve import resolve
from pipeline.config.sections import ModelSettings
from pipeline.errors import UserError
from pipeline.files import write_jsonl
from pipeline.launch import going_on, stopping
from pipeline.records import Example, Response
from pipeline.trainer.evaluated import Alone, Kept, Read
from stages import evaluate
from tests import tiny

# a judge that counts the texts that it hears, and is tired after as many as the file `most` says
JUDGE = """
from pathlib import Path

HEARD, MOST = (Path(__file__).parent / name for name in ("heard", "most"))


def reward(completions, **columns):
    count = len(completions) + int(HEARD.read_text() if HEARD.exists() else 0)
    if MOST.exists() and count > int(MOST.read_text()):
        raise ValueError("tired")
    HEARD.write_text(str(count))
    return [float(len(text)) for text in completions]
"""
PROMPTS = 4
ON = " evaluated, which is saved; the same command goes on from there"
SAVED = ["nothing is saved: the same command starts again", f"1 policy is{ON}", f"2 policies are{ON}"]


def words(tmp_path: Path, *more: str) -> list[str]:
    names = {"a": 0, "b/1": 1, "c": 2}
    places = [f"{name}: {tmp_path}/models/{seed}" for name, seed in names.items()]
    given = [f"runs_dir={tmp_path}", f"policies={{{', '.join(places)}}}", f"data.test={tmp_path}/test.jsonl"]
    given += ["data.max_prompt_length=40", "data.max_response_length=20", "generation.max_new_tokens=5"]
    return ["stage=evaluate", *given, f"reward={tmp_path}/judge.py", *more]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Three models, four prompts with scored responses, and the judge."""
    for seed in range(3):
        tiny.language_model("llama", seed).save_pretrained(tmp_path / "models" / str(seed))
        tiny.tokenizer().save_pretrained(tmp_path / "models" / str(seed))
    rows = [{"prompt": f"the dog {i}", "response": "the cat", "reward": float(i)} for i in range(PROMPTS)]
    write_jsonl(tmp_path / "test.jsonl", rows)
    (tmp_path / "judge.py").write_text(JUDGE)
    return tmp_path


def evaluated(place: Path, *more: str) -> dict[str, str]:
    """What an evaluation leaves, by the files' names."""
    step = resolve(words(place, *more))
    evaluate.main(step.settings, list(step.words))
    left = place / "default" / "evaluate"
    return {name: (left / name).read_text() for name in ("results.json", "rewards.jsonl", "samples/policies.jsonl")}


def heard(place: Path) -> int:
    """How many texts the judge has heard since the last time."""
    count = int((place / "heard").read_text())
    (place / "heard").unlink()
    return count


def stopped(place: Path, policies: int) -> list[str]:
    """The files that an evaluation keeps whose judge is tired when it has heard so many policies."""
    tried = heard(place) - 3 * PROMPTS  # by a whole evaluation of three
    (place / "most").write_text(str(tried + policies * PROMPTS))
    with pytest.raises(UserError, match="tired"):
        evaluated(place)
    (place / "most").unlink()
    left = place / "default" / "evaluate"
    assert not (left / "results.json").exists() and heard(place) == tried + policies * PROMPTS
    said = stopping.line(left, resolve(words(place)).settings).removeprefix("stopped by Ctrl-C: ")
    assert said == SAVED[policies]
    kept = said.split(",")[0]
    ahead = f"goes on: {kept}" if policies else "starts from nothing"
    assert going_on.standing(left, resolve(words(place)).settings) == ahead
    assert going_on.standing(left, resolve(words(place, "max_rows=2")).settings) == "starts from nothing"
    return sorted(file.name for file in left.glob("evaluated/*.pt"))


@pytest.mark.parametrize(("policies", "names"), [(0, []), (1, ["b%2F1.pt"]), (2, ["b%2F1.pt", "c.pt"])])
def test_what_was_evaluated_is_not_evaluated_again(place: Path, policies: int, names: list[str]) -> None:
    """Its files hold what those of an evaluation do that nothing stopped."""
    whole, left = evaluated(place), place / "default" / "evaluate"
    texts = int((place / "heard").read_text())
    shutil.rmtree(left)
    assert stopped(place, policies) == names
    assert evaluated(place) == whole
    assert heard(place) == texts - policies * PROMPTS and not (left / "evaluated").exists()


@pytest.mark.parametrize(("change", "judged"), [("max_rows=3", 3), ("", PROMPTS)])
def test_what_was_evaluated_otherwise_is_evaluated_again(place: Path, change: str, judged: int) -> None:
    """With another setting that counts, or other rows, nothing of the earlier start is taken."""
    evaluated(place)
    shutil.rmtree(place / "default" / "evaluate")
    tried = heard(place) - 3 * PROMPTS
    (place / "heard").write_text(str(tried + 3 * PROMPTS))
    stopped(place, 2)
    if not change:
        write_jsonl(place / "test.jsonl", [{"prompt": f"a cat {i}"} for i in range(PROMPTS)])
    evaluated(place, *([change] if change else []))
    assert heard(place) == tried + 3 * judged


def test_what_is_kept_is_what_was_found(place: Path) -> None:
    """Of other numbers than JSON has, too; texts are of the rows that are given again."""
    rows = [Example("0", "the cat", "a dog", reward=1.0), Example("1", "the dog")]
    drawn = [Response(row, "the", f"text {i}", (3, i), (4, 5, 2)[i:], bool(i)) for i, row in enumerate(rows)]
    logps = [torch.tensor([-0.5, -math.inf, -1e-9]), torch.tensor([-2.0, -3.0])]
    found = Alone({"reward": 0.1}, [{"id": "0", "rewards": {"x": None}}], Read(drawn, logps, tiny.tokenizer()), None)
    settings = resolve(words(place)).settings
    kept = Kept(tiny.ranks(), place, settings, {"data": "x"})
    model = ModelSettings.model_validate(settings.model.model_dump() | {"path": f"{place}/models/0"})
    assert kept.take("a", model, rows, []) is None
    kept.put("a", found)
    taken = kept.take("a", model, rows, [])
    assert (taken.results, taken.rows, taken.logged, taken.sampled.responses) == (*found[:2], None, drawn)
    assert [one.tolist() for one in taken.sampled.logps] == [one.tolist() for one in logps]
    assert Kept(tiny.ranks(), place, settings, {"data": "y"}).take("a", model, rows, []) is None
    kept.clear()
    assert kept.take("a", model, rows, []) is None
