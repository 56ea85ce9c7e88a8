"""The docstrings task: splits by module, clean summaries, prompts without their docstring."""

import ast
import time

import pytest

from pipeline.data.prompts import gold
from pipeline.errors import UserError
from pipeline.tasks.docstrings import SPLIT_SHARES, examples, first_sentence
from pipeline.tasks.shares import split_of


@pytest.fixture(scope="module")
def rows():
    return {split: examples(split, 0) for split in SPLIT_SHARES}


def test_first_sentence_is_one_clean_line():
    assert first_sentence("Return the\n    sum. Raise if empty.") == "Return the sum."
    assert first_sentence("\n  Open it, e.g. a file.\n\n  More.") == "Open it, e.g. a file."
    assert first_sentence("No full stop\n\nNext paragraph.") == "No full stop"


def test_all_splits_together_are_read_in_seconds(rows):
    started = time.perf_counter()
    assert examples("test", 0) == rows["test"]  # the second reading comes from memory
    assert time.perf_counter() - started < 1
    assert len(rows["train"]) > 1000 and len(rows["validation"]) > 50 and len(rows["test"]) > 50


def test_a_module_is_in_one_split_and_ids_are_unique(rows):
    for split, members in rows.items():
        assert {split_of(row.source, SPLIT_SHARES) for row in members} == {split}
        assert all(row.id.startswith(row.source + ".") for row in members)
    ids = [row.id for members in rows.values() for row in members]
    assert len(ids) == len(set(ids))


def test_seed_orders_and_size_cuts(rows):
    assert examples("train", 0, 20) == rows["train"][:20]
    other = examples("train", 1)
    assert other != rows["train"] and {row.id for row in other} == {row.id for row in rows["train"]}


def test_rows_are_within_bounds_and_say_what_the_definition_says(rows):
    for row in rows["test"]:
        assert 4 <= len(row.completion.split()) <= 40 and row.completion.isascii() and "\n" not in row.completion
        assert row.references == () and gold(row) == (row.completion,)
        assert len(row.prompt) <= 1500 and 2 <= len(row.prompt.splitlines()) <= 60
        assert row.id.rsplit(".", 1)[1] in row.prompt


def test_the_docstring_is_not_in_the_prompt(rows):
    whole = [row for row in rows["test"] if len(row.prompt) < 1000 and len(row.prompt.splitlines()) < 50]
    docstrings = [ast.get_docstring(ast.parse(row.prompt).body[0]) for row in whole]
    assert len(whole) > 50 and not any(docstrings)


def test_the_summary_of_a_known_function_is_its_docstring():
    # textwrap.dedent belongs to one split; its docstring begins "Remove any common leading whitespace ..."
    found = {row.id: row for row in examples(split_of("textwrap", SPLIT_SHARES), 0)}["textwrap.dedent"]
    assert found.completion == "Remove any common leading whitespace from every line in `text`."
    assert found.prompt.startswith("def dedent(text):\n") and "Remove any common" not in found.prompt


def test_unknown_split_is_a_user_error():
    with pytest.raises(
        UserError, match="found split 'tran', wanted one of train, validation, test; did you mean 'train'"
    ):
        examples("tran", 0)
