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
