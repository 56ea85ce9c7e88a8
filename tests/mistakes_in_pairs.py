"""What can be wrong with pairs, scores and conversations."""

from __future__ import annotations

from tests.mistakes import Mistake, all_with, answers, lines, pairs
from tests.mistakes_in_data import FROM, ROWS, rows

PAIRS = [
    Mistake(
        "no pairs to prefer",
        "rl",
        f"{FROM} algo=dpo",
        ("rows/1: no reward", "wanted a scored row", "chosen and rejected"),
        rows(lines(answers())),
    ),
    Mistake(
        "a beta of nothing",
        "rl",
        f"{FROM} algo=dpo beta=0.0",
        ("algorithm.settings", "beta: 0.0", "wanted a number > 0"),
        rows(lines(pairs())),
    ),
    Mistake(
        "a choice of pairs that DPO has not",
        "rl",
        f"{FROM} algo=dpo rows=best_half",
        ("command line", "rows: algo=dpo has no such setting", "belongs to algo=a_lol_kl"),
        rows(lines(pairs())),
    ),
    Mistake(
        "rows without a label",
        "rl",
        f"{FROM} algo=kto",
        ("rows/1: no reward, and nothing to score it with", "add a `reward` column"),
        rows(lines(answers())),
    ),
    Mistake(
        "labels that are all alike",
        "rl",
        f"{FROM} algo=bco",
        ("algorithm.settings.threshold: null", "have the reward 1", "wanted different ones"),
        rows(all_with(answers(), label=True)),
    ),
    Mistake(
        "no responses to compare",
        "rl",
        f"{FROM} algo=nca",
        ("algorithm.settings.group_size: 4", "the most have 2", "set algorithm.settings.group_size=2"),
        rows(all_with(answers(), reward=0.5)),
    ),
    Mistake(
        "a group of one",
        "rl",
        f"{FROM} algo=agro algorithm.settings.group_size=1",
        ("algorithm.settings", "group_size: 1, wanted at least 2"),
        rows(all_with(answers(), reward=0.5)),
    ),
    Mistake(
        "pairs without scores",
        "reward",
        f"{ROWS} objective=regression",
        ("rows/1: no chosen_reward", "regression wants in every row", "add the column"),
        rows(lines(pairs())),
    ),
    Mistake(
        "responses without scores",
        "reward",
        f"{ROWS} objective=regression",
        ("rows/1: no reward", "regression wants in every row", "add the column"),
        rows(lines(answers())),
    ),
    Mistake(
        "scores that nobody vouches for",
        "reward",
        f"{ROWS} objective=mixed",
        ("rows/1: no correctness", "mixed wants in every row", "add the column"),
        rows(all_with(pairs(), chosen_reward=1.0, rejected_reward=0.0)),
    ),
    Mistake(
        "conversations of one turn",
        "sft",
        f"{ROWS} train_on=all",
        ("train_on: all", "none of 30 rows", "`messages` or `history`", "train_on=last"),
        rows(lines(answers())),
    ),
]
