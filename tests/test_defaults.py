"""What the defaults do with a trained model, and what is said of it before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.resolve import resolve
from pipeline.data import encoding
from pipeline.data.batching import Packing
from pipeline.errors import UserError
from pipeline.models import plan
from pipeline.models.policy import Policy
from pipeline.records import Example
from pipeline.rewards.build import build_rewards
from pipeline.rl.values import ValueData, value_targets
from pipeline.trainer.model import Model, encode
from tests import tiny

TWO = "optimizer.learning_rate={full: 1e-3, lora: 1e-2}"


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        ("stage=sft", 2e-5),
        ("stage=sft|lora_r=16", 2e-4),
        ("stage=reward|lora_r=16", 1e-4),
        ("stage=rl|algo=dpo", 1e-5),
        ("stage=rl|algo=dpo|lora_r=16", 3e-5),
        ("stage=rl|lora_r=16|learning_rate=3e-6", 3e-6),  # the user's word, whatever is trained
        ("stage=sft|recipe=demo|lora_r=16", 2e-3),  # and a recipe's
        (f"stage=plan|{TWO}", 1e-3),
        (f"stage=plan|lora_r=8|{TWO}", 1e-2),
        ("stage=sft|lora_r=8|optimizer.learning_rate={lora: 1e-2}", 1e-2),  # the other as it ships
    ],
)
def test_adapters_learn_at_a_rate_of_their_own(words: str, rate: float) -> None:
    assert resolve(words.split("|")).settings.optimizer.learning_rate == rate


@pytest.mark.parametrize("rates", ["{full: 1e-3, lota: 1e-2}", "{full: 1e-3}"])
def test_rates_are_both_or_one(rates: str) -> None:
    with pytest.raises(
        UserError, match=r"command line: optimizer\.learning_rate: with full.*, wanted one number, or both"
    ):
        resolve(["stage=plan", f"optimizer.learning_rate={rates}"])


def model() -> Model:
    trained = tiny.trainer(Policy(tiny.language_model("llama"), 64))
    return Model(trained, tiny.encoder(response_limit=3), Packing(None, 256, False, tiny.PAD_ID))


def test_sampling_for_values_is_announced_with_its_price(capfd: pytest.CaptureFixture) -> None:
    """5 prompts are held out, and `max_prompts` takes 4 of them: 4 x 2 x 6 = 48."""
    words = ["value.max_prompts=4", "value.samples_per_prompt=2", "generation.max_new_tokens=6", "reward=length"]
    settings = tiny.settings("rl", "rewards.normalise=none", *words)
    asked = model()
    rewards = build_rewards(settings, settings.reward, settings.rewards, asked.ranks.device)
    prompts = [Example(str(i), f"the {word} sat") for i, word in enumerate(tiny.WORDS[:5])]
    found = value_targets(asked, settings, ValueData(prompts, [], rewards, None), "policy")
    said = capfd.readouterr()
    price = "values: 4 prompts x 2 responses x at most 6 tokens = 48 tokens to sample before the first step"
    assert price in said.out and len(found.items) == 4
    # a random model ends one response in some hundred: what is cut is judged without its end
    assert "generation.max_new_tokens=6 cuts" in said.err and "of 8 responses sampled for V" in said.err
    assert price in plan.estimate(settings)
    assert "sample" not in plan.estimate(tiny.settings("rl", *words, "value.targets=data"))


@pytest.mark.parametrize(("long", "told"), [(2, False), (3, True)])
def test_many_cut_responses_are_told(tmp_path: Path, capfd: pytest.CaptureFixture, long: int, told: bool) -> None:
    """3 tokens hold " cat" and EOS; a tenth of 20 rows is 2."""
    words = ["cat sat on a mat"] * long + ["cat"] * (20 - long)
    rows = [Example(str(i), "the", completion=word) for i, word in enumerate(words)]
    encode(model(), tmp_path, rows, rows[:1], encoding.completion_rows)
    said = capfd.readouterr().err
    wanted = f"tiffin: data.max_response_length=3 cuts {long} of 20 responses to learn from, which then teach no end"
    assert (wanted in said) == told and (told or not said)
