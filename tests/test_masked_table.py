"""The sample table of compositions: pieces of texts, the ranking, the credit of tokens; and how it reads."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from pipeline.algorithms.logits import Drawn
from pipeline.records import Example, Scores
from pipeline.rl import composition_samples
from pipeline.rl.compositions import Compositions, composed_ids
from pipeline.trainer import markdown
from tests import masked

ENCODER = masked.encoder()


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor(ENCODER.encode("p", text).response_ids)


def places_of(ids: torch.Tensor, *places: int) -> torch.Tensor:
    return torch.isin(torch.arange(len(ids)), torch.tensor(places))


def test_masked_tokens_stand_alone_and_the_rest_together():
    ids = ids_of("on a mat, far")  # ▁on ▁a ▁mat <0x2C> ▁far </s>
    assert composition_samples.parts(ENCODER, ids, places_of(ids, 0, 2), "q") == [
        ["on", True],
        [" a", False],
        [" mat", True],
        [", far", False],
    ]
    assert composition_samples.parts(ENCODER, ids, places_of(ids), "q") == [["on a mat, far", False]]
    assert composition_samples.parts(ENCODER, ids[:0], places_of(ids)[:0], "q") == []


def test_a_character_of_two_tokens_stands_at_its_last():
    ids = ids_of("cat é")  # ▁cat ▁ <0xC3> <0xA9> </s>
    assert composition_samples.parts(ENCODER, ids, places_of(ids, 2, 3), "q") == [
        ["cat ", False],
        ["", True],
        ["é", True],
    ]
    assert composition_samples.written(ENCODER, ids[[0, 2]].tolist()) == [" cat", "<0xC3>"]  # half of one has no text
    assert composition_samples.written(ENCODER, []) == []


def test_credit_is_added_up_by_place_and_token():
    cat, sat, on, mat = (int(ids_of(word)[0]) for word in ("cat", "sat", "on", "mat"))
    tokens = torch.tensor([[cat, sat, cat, on]])
    credit = torch.tensor([[0.5, 0.0, -0.25, -0.25]])  # cat: 0.5 - 0.25; sat has neither praise nor blame
    assert composition_samples.by_credit(ENCODER, [mat], tokens, credit) == {
        "praised": [{"token": " cat", "instead_of": " mat", "credit": 0.25}],
        "blamed": [{"token": " on", "instead_of": " mat", "credit": -0.25}],
    }


def table() -> list[dict]:
    """Two rows of two texts each: `on a mat` with its last word masked, and `cat` with nothing masked."""
    given = [ids_of("on a mat"), ids_of("cat")]
    width = len(given[0])
    ids, mask, chosen = torch.zeros(2, width).long(), torch.zeros(2, width).bool(), torch.zeros(2, width).bool()
    for i, row in enumerate(given):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    chosen[0, 2] = True
    static = SimpleNamespace(ids=ids, mask=mask, masked=chosen)
    cat, dog = int(ids_of("cat")[0]), int(ids_of("dog")[0])
    drawn = Drawn(torch.zeros(1, 2), torch.tensor([[cat, dog]]), torch.tensor([cat]), torch.zeros(1))
    composed = composed_ids(static, drawn)
    texts = [[ENCODER.decode(row.tolist()) for row in group] for group in composed]
    examples = [Example("a", "Where?", completion="a dog"), Example("b", "Who?", references=("cat",))]
    rewards = torch.tensor([[0.25, 0.75, 0.5], [0.5, 0.5, 0.5]])
    found = Compositions(examples, composed, texts, Scores({}, {}, []), rewards)
    weights = torch.tensor([[-0.25, 0.25], [0.0, 0.0]])
    return composition_samples.samples_of(ENCODER, SimpleNamespace(static=static), drawn, found, weights)


def test_rows_hold_the_texts_best_first_and_the_greedy_one():
    first, second = table()
    kept = ["on a", False]
    assert first == {
        "id": "a",
        "prompt": "Where?",
        "reference": "a dog",
        "static": {"text": "on a mat", "parts": [kept, [" mat", True]]},
        "samples": 2,
        "mean": 0.5,
        "greedy": {"reward": 0.5, "text": "on a cat", "parts": [kept, [" cat", True]]},
        "compositions": [
            {"reward": 0.75, "text": "on a dog", "parts": [kept, [" dog", True]]},
            {"reward": 0.25, "text": "on a cat", "parts": [kept, [" cat", True]]},
        ],
        "praised": [{"token": " dog", "instead_of": " mat", "credit": 0.25}],
        "blamed": [{"token": " cat", "instead_of": " mat", "credit": -0.25}],
    }
    assert second["static"]["parts"] == [["cat", False]] and second["praised"] == second["blamed"] == []


def test_a_row_reads_well_in_tensorboard():
    row = {
        "id": "a|1",
        "prompt": "Why <b>?",
        "reference": "so",
        "static/text": "on mat",
        "static/parts": [["on", False], [" mat", True]],
        "samples": 64,
        "mean": 0.5,
        "greedy/reward": 0.25,
        "greedy/parts": [["on", False], [" *", True]],
        "compositions": [{"reward": 0.75, "text": "on |", "parts": [["on", False], [" |", True]]}],
        "praised": [{"token": " |", "instead_of": " mat", "credit": 0.125}],
        "blamed": [],
    }
    pages = markdown.pages([{"id": "b", "response": "yes"}, row])
    assert pages["samples"].splitlines() == ["| id | response |", "| --- | --- |", "| b | yes |"]
    assert pages["compositions"].splitlines() == [
        "### a&#124;1",
        "",
        "**prompt:** Why &lt;b&gt;?",
        "",
        "**reference:** so",
        "",
        "**static response, 1 tokens masked:** on<code> mat</code>",
        "",
        "**64 compositions, mean reward 0.5:** the best and the worst",
        "",
        "| reward |  | text |",
        "| --- | --- | --- |",
        r"| 0.25 | greedy | on<code> \*</code> |",
        "| 0.75 |  | on<code> &#124;</code> |",
        "",
        "|  | credit | token | instead of |",
        "| --- | --- | --- | --- |",
        "| praised | 0.125 | <code> &#124;</code> | <code> mat</code> |",
    ]
    assert markdown.pages([row]).keys() == {"compositions"} and markdown.pages([]) == {}
