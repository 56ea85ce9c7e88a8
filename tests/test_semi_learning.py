"""Semi-offline RL learns what the rewards say, and nothing from rewards that have changed places.

The task is to say the prompt's word three times. The logged responses mostly say the next word of the list instead, so
that likelihood alone, greedily decoded, is wrong; a word is right in 30 of 100 cases.
"""

from __future__ import annotations

import random
from functools import cache

from torch import Tensor

from pipeline.algorithms import semi_offline, supervised
from pipeline.data.batching import Windows
from pipeline.models.policy import Policy
from pipeline.records import Example, Item
from pipeline.rewards.rewards import Rewards, WeightedReward
from pipeline.rl.compositions import Composer
from pipeline.rollout.generate import generate
from pipeline.trainer.engine import Engine
from pipeline.trainer.objective import Objective
from pipeline.trainer.schedule import epochs
from tests import masked, tiny

WORDS = ["cat", "sat", "on", "mat", "and", "ran"]
LENGTH, SEED, BATCH = 3, 1, 24
FINE_TUNING, LEARNING = 120, 60  # steps
SETTINGS = semi_offline.Settings(samples=16, rl_weight=4.0, baseline="mean", length_penalty=1.0, label_smoothing=0.0)


@cache
def rows() -> tuple[Item, ...]:
    """Each prompt eight times, with the response that was logged as its own static response."""
    rng, encoder, found = random.Random(SEED), masked.encoder(), []
    for i in range(8 * len(WORDS)):
        place = i % len(WORDS)
        other = WORDS[(place + 1) % len(WORDS)]
        text = " ".join(WORDS[place] if rng.random() < 0.3 else other for _ in range(LENGTH))
        row = encoder.encode(WORDS[place], text)
        found.append(Item(Example(f"row {i}", WORDS[place], completion=text), (row,), static_rows=(row,)))
    return tuple(found)


def right(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
    """The share of words that are the prompt's."""
    return [text.split().count(prompt) / LENGTH for prompt, text in zip(prompts, completions, strict=True)]


def learn(trained: Engine, windows: Windows, objective: Objective, steps: int, rate: float) -> None:
    for step in range(steps):
        window = windows.at(step)
        trained.train()
        n_terms = objective.terms(window)
        for place, batch in enumerate(window):
            total, _ = objective.loss(objective.ask(trained, batch), batch)
            trained.backward(total, n_terms, last=place == len(window) - 1)
        trained.step(rate)


def windows(policy: Policy, samples: int) -> Windows:
    packing = masked.packing(policy, samples, rate=0.5, seed=SEED)
    return Windows(rows(), epochs(len(rows()), BATCH, SEED), packing, 0, 1)


def greedy_reward(trained: Engine) -> float:
    """Of responses that are really decoded, one for each prompt."""
    generation = tiny.settings("rl").generation.model_copy(update={"max_new_tokens": 6})
    answers = generate(trained, masked.encoder(), [Example(word, word) for word in WORDS], generation, SEED)
    return sum(right([a.example.prompt for a in answers], [a.text for a in answers])) / len(answers)


def engine_of(weights: dict[str, Tensor]) -> Engine:
    """An engine around a model of one layer; with `weights`, where there are any."""
    policy = Policy(tiny.language_model("llama", num_hidden_layers=1), 256)
    policy.load_state_dict(weights, strict=bool(weights))
    return tiny.trainer(policy, optimizer={"adam_epsilon": 1e-8, "weight_decay": 0.0})


def fine_tuned() -> Engine:
    """M-FT: what was logged is learned."""
    trained = engine_of({})
    objective = Objective(lambda output, batch: supervised.loss(output, batch, supervised.Settings(0.0)), "tokens")
    learn(trained, windows(trained.module, 0), objective, FINE_TUNING, 0.01)
    return trained


def reinforced(weights: dict[str, Tensor], shuffled: int | None) -> Engine:
    """Semi-offline RL from `weights`; with a seed `shuffled`, from rewards that have changed places."""
    trained, judge = engine_of(weights), Rewards([WeightedReward("right", 1.0, right)])
    composer = Composer(trained.ranks, masked.encoder(), judge, rows(), semi_offline, shuffled)
    objective = Objective(
        lambda output, batch: composer.loss(output, batch, SETTINGS), semi_offline.MEAN_OVER, output="drawn"
    )
    learn(trained, windows(trained.module, SETTINGS.samples), objective, LEARNING, 0.005)
    return trained


def test_t17_rewards_are_learned_and_shuffled_ones_are_not() -> None:
    trained = fine_tuned()
    before, weights = greedy_reward(trained), trained.module.state_dict()
    after, shuffled = (greedy_reward(reinforced(weights, seed)) for seed in (None, SEED))
    assert before < 0.4 and shuffled < 0.5 and after > 0.9, (before, shuffled, after)
