"""What can be wrong with rows."""

from __future__ import annotations

import gzip

from tests.mistakes import Mistake, all_with, answers, changed, lines, pairs, scored

ROWS = "data.train=HERE/rows.jsonl data.validation_fraction=0.3"
FROM = f"{ROWS} model=SFT"
SOUND = {"rows.jsonl": lines(answers())}


def rows(text: str | bytes) -> dict[str, str | bytes]:
    return {"rows.jsonl": text}


DATA = [
    Mistake("no file", "sft", ROWS, ("rows.jsonl", "no such file", "look into")),
    Mistake("nearly the name", "sft", "data.train=HERE/row.jsonl", ("row.jsonl", "no such", "did you mean"), SOUND),
    Mistake("a folder", "sft", "data.train=HERE", ("HERE", "a folder", "name one with data.train=")),
    Mistake("a folder without data", "sft", "data.path=HERE", ("HERE", "no training file", "name it with data.train=")),
    Mistake("an empty file", "sft", ROWS, ("rows.jsonl", "empty", "wanted at least one row"), rows("")),
    Mistake(
        "a gzip cut short",
        "sft",
        "data.train=HERE/r.jsonl.gz",
        (r"r\.jsonl\.gz:\d+", "cut short", "fetch it again"),
        {"r.jsonl.gz": gzip.compress(lines(answers(4000)).encode())[:300]},
    ),
    Mistake(
        "gzip without its ending",
        "sft",
        ROWS,
        ("rows.jsonl:1", "not UTF-8", "it is compressed: let its name end in .gz"),
        rows(gzip.compress(lines(answers()).encode())),
    ),
    Mistake(
        "Latin-1",
        "sft",
        ROWS,
        ("rows.jsonl:2", "byte 0xfc", "iconv -f LATIN1"),
        rows(b'{"prompt": "a", "completion": "b"}\n{"prompt": "Gr\xfcn", "completion": "x"}\n'),
    ),
    Mistake("UTF-16", "sft", ROWS, ("rows.jsonl:1", "0xff", "UTF-16"), rows(lines(answers()).encode("utf-16"))),
    Mistake(
        "a broken line",
        "sft",
        ROWS,
        ("rows.jsonl:41", "no JSON", "data.max_bad_rows=1"),
        rows(lines(answers()) + '{"prompt": "a", "comp\n' + lines(answers())),
    ),
    Mistake("nested beyond reason", "sft", ROWS, ("rows.jsonl:1", "no JSON", "check"), rows("[" * 100_000)),
    Mistake(
        "no column", "sft", ROWS, ("rows/1", "neither", "add the column"), rows('{"prompt": "a", "say": "b"}\n' * 9)
    ),
    Mistake(
        "a column missing later",
        "score",
        f"{ROWS} reward=length",
        ("rows.jsonl:41", "completion .*missing", "wanted text"),
        rows(lines(answers()) + '{"prompt": "a"}\n'),
    ),
    Mistake(
        "a wrong type in row 5,000 of 5,001",
        "sft",
        ROWS,
        ("rows.jsonl:5000", "completion: 7 is a number", "wanted text"),
        rows(changed(answers(5001), 4999, completion=7)),
    ),
    Mistake(
        "an empty answer",
        "sft",
        ROWS,
        ("rows.jsonl:8", "completion: empty", "wanted text"),
        rows(changed(answers(), 7, completion="  ")),
    ),
    Mistake(
        "an empty prompt",
        "sft",
        ROWS,
        ("rows.jsonl:8", "prompt: empty", "wanted text"),
        rows(changed(answers(), 7, prompt="")),
    ),
    Mistake(
        "unknown columns",
        "sft",
        ROWS,
        ("rows.jsonl:1", "foo", "say which is which with data.columns="),
        rows('{"foo": 1}\n' * 9),
    ),
    Mistake("no rewards", "rl", FROM, ("rows/1", "no reward", "add a `reward` column"), rows(lines(answers()))),
    Mistake("no pairs", "reward", ROWS, ("rows/1", "no reward", "add the column"), rows(lines(answers()))),
    Mistake(
        "no margins",
        "reward",
        f"{ROWS} algorithm.settings.use_margin=true",
        ("rows/1", "no margin.*40 of 40", "add the column"),
        rows(lines(pairs())),
    ),
    Mistake(
        "pairs of one text",
        "reward",
        ROWS,
        ("rows/1", "same text in all", "wanted two different responses"),
        rows(all_with(pairs(), chosen="No.")),
    ),
    Mistake(
        "no reward above 0",
        "rl",
        f"{FROM} algo=wbc",
        ("sampling", "none of .* positive reward", "raise the rewards"),
        rows(all_with(scored(), reward=-1.0)),
    ),
    Mistake(
        "rewards all equal",
        "rl",
        f"{FROM} algo=alol value.targets=data value.epochs=1",
        ("sampling weights", "none of .* positive", "sampling=all"),
        rows(all_with(scored(), reward=0.5)),
    ),
    Mistake(
        "a reward of NaN",
        "rl",
        FROM,
        ("rows.jsonl:8", "reward: nan", "wanted a finite number"),
        rows(changed(scored(), 7, reward=float("nan"))),
    ),
    Mistake(
        "a reward over float32",
        "rl",
        FROM,
        ("rows.jsonl:8", r"reward: 1e\+300", "wanted a finite number"),
        rows(changed(scored(), 7, reward=1e300)),
    ),
    Mistake(
        "a reward in words",
        "rl",
        FROM,
        ("rows.jsonl:8", "'good' is text", "wanted a finite number"),
        rows(changed(scored(), 7, reward="good")),
    ),
    Mistake(
        "no candidates to start from",
        "rl",
        f"{FROM} algo=semi_offline reward=rouge",
        ("rows/1: no candidates", "wanted some for static=best", "stage=generate .*stage=score of=generate"),
        rows(lines(answers())),
    ),
    Mistake(
        "nobody to judge compositions",
        "rl",
        f"{FROM} algo=semi_offline static=reference",
        ("algo=semi_offline", "nothing to judge new texts with", "give reward=NAME"),
        rows(lines(answers())),
    ),
    Mistake(
        "nobody to judge samples",
        "rl",
        f"{FROM} algo=reinforce",
        ("algo=reinforce", "nothing to judge new texts with", "give reward=NAME"),
        rows(lines(answers())),
    ),
    Mistake(
        "no reference to learn from",
        "rl",
        f"{FROM} algo=semi_offline reward=length",
        ("rows/1: no reference text", "wanted one to learn from", "`completion` or `references`"),
        rows(lines([{"prompt": row["prompt"], "candidates": ["Yes.", "No."]} for row in answers()])),
    ),
    Mistake(
        "one sample alone",
        "rl",
        f"{FROM} algo=semi_offline reward=rouge static=reference algorithm.settings.samples=1",
        ("algorithm.settings", "samples: 1", "wanted at least 2"),
        rows(lines(answers())),
    ),
    Mistake(
        "a control that online RL has not",
        "rl",
        f"{FROM} algo=reinforce reward=length shuffle_rewards=true",
        ("command line", "shuffle_rewards: algo=reinforce has no such", "belongs to algo=.*alol,.* dpo,.* nll"),
        rows(lines(answers())),
    ),
    Mistake(
        "a choice of rows that semi-offline RL has not",
        "rl",
        f"{FROM} algo=semi_offline reward=rouge static=reference rows=best_half",
        ("command line", "rows: algo=semi_offline has no such", "belongs to algo=a_lol_kl.*wbc"),
        rows(lines(answers())),
    ),
    Mistake(
        "a mask rate over 1",
        "sft",
        f"{ROWS} mask_rate=40",
        ("masking.rate", "40", "wanted .*1"),
        rows(lines(answers())),
    ),
    Mistake(
        "values with nobody to judge",
        "rl",
        f"{FROM} value.targets=policy",
        ("value.targets", "nothing can score", "value.targets=data"),
        rows(lines(scored())),
    ),
    Mistake(
        "validation: nothing in it",
        "sft",
        f"{ROWS} data.validation=HERE/v.jsonl",
        ("v.jsonl", "empty", "wanted at least one row"),
        {**SOUND, "v.jsonl": ""},
    ),
    Mistake(
        "validation: of one row",
        "sft",
        "data.train=HERE/rows.jsonl",
        ("validation split", "no rows", "one row cannot be cut in two: give data.validation="),
        rows(lines(answers(1))),
    ),
    Mistake(
        "validation: everything",
        "sft",
        "data.train=HERE/rows.jsonl data.validation_fraction=1.0",
        ("validation_fraction", r"1\.0", "wanted less than 1"),
        SOUND,
    ),
    Mistake(
        "no such part of the data",
        "generate",
        "data.train=HERE/rows.jsonl policy=SFT splits=[test]",
        ("data", "no test split, only train", "give data.test="),
        SOUND,
    ),
    Mistake(
        "parquet", "sft", "data.train=HERE/r.parquet", ("parquet:1", "no whole", "again"), {"r.parquet": b"PAR1 1"}
    ),
    Mistake(
        "another delimiter",
        "sft",
        "data.train=HERE/r.csv",
        ("r.csv:1", "one column, 'prompt;completion'", "write it anew"),
        {"r.csv": "prompt;completion\na;b\n"},
    ),
    Mistake(
        "a cell too few",
        "sft",
        "data.train=HERE/r.csv",
        ("r.csv:3", "1 cells", r"wanted 2 \(prompt, completion\)"),
        {"r.csv": "prompt,completion\na,b\nc\n"},
    ),
    Mistake("an ending", "sft", "data.train=HERE/r.docx", ("r.docx", "unknown ending", "rename"), {"r.docx": "x"}),
    Mistake("no flag", "sft", f"{ROWS} data.exclude=[tie]", ("rows.jsonl:1", "no column 'tie'", "leave it"), SOUND),
    Mistake(
        "everything excluded",
        "sft",
        f"{ROWS} data.exclude=[tie]",
        ("rows.jsonl", "all rows dropped", "loosen the filters"),
        rows(all_with(answers(), tie=True)),
    ),
    Mistake(
        "no such source",
        "sft",
        f"{ROWS} data.sources=[b]",
        ("rows.jsonl", "no row of source b", "wanted one of a 40"),
        rows(all_with(answers(), source="a")),
    ),
    Mistake("no such format", "sft", f"{ROWS} data.format=scord", ("format", "'scord'", "did you mean"), SOUND),
    Mistake(
        "references: none",
        "score",
        f"{ROWS} reward=rouge",
        ("rouge", "has no references", "give the data a column `references`"),
        SOUND,
    ),
    Mistake(
        "another task's oracle",
        "score",
        f"{ROWS} reward=oracle",
        ("oracle", "found", "wanted one with a request"),
        SOUND,
    ),
]
