"""The benchmark: what it computes by hand, and every part at toy size."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.bench import (
    bare,
    bed,
    first_step,
    memory,
    overlap,
    peers,
    sampling,
    semi_offline,
    semi_parts,
    startup,
    steps,
)
from pipeline.bench.long_rows import Sizes, long_bed
from pipeline.bench.measure import Goal, Plan, Result, alternate, compared, peak, peak_megabytes, table
from pipeline.config.resolve import resolve
from pipeline.errors import UserError
from pipeline.records import Response, SampleStats
from pipeline.trainer import engine
from tests import tiny

TOY = [
    "stage=bench",
    "rounds=2",
    "steps=1",
    "batch_size=4",
    "train.max_tokens=256",
    "data.task_size=40",
    "model.scratch.hidden_size=16",
    "model.scratch.num_layers=1",
    "model.scratch.num_heads=2",
    "model.scratch.vocab_size=400",
]

SIZES = Sizes("assistant", 40, 24, 12, 4, 400, hidden_size=16, num_heads=2, num_layers={"t5": 1, "llama": 1})


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[bed.Bed]:
    """A bed of toy size; what starting a process group says of this process does not reach later tests."""
    before = dict(os.environ)
    folder = tmp_path_factory.mktemp("bench")
    yield bed.prepare(resolve(TOY).settings, tiny.ranks(), folder, folder)
    os.environ.clear()
    os.environ.update(before)


def test_rounds_take_turns_and_each_side_goes_first_half_the_time() -> None:
    said: list[str] = []
    plan = Plan(rounds=2, steps=2, clock="wall", warm=1)
    found = alternate(lambda step: said.append(f"a{step}"), lambda step: said.append(f"b{step}"), plan)
    assert said == ["a0", "b0", "b1", "a1", "a2", "b2", "b3", "a3", "a4", "b4"]
    assert len(found) == 2


def test_a_comparison_is_the_median_of_the_rounds_ratios() -> None:
    # ratios 3/2 = 1.5, 4/4 = 1, 5/4 = 1.25; medians: ours 4, other 4
    found = compared("a / b", "s", [(3.0, 2.0), (4.0, 4.0), (5.0, 4.0)], Goal(1.3))
    assert (found.ours, found.other, found.ratio, found.least, found.greatest) == (4.0, 4.0, 1.25, 1.0, 1.5)
    assert found.met is True and compared("", "s", [(3.0, 2.0)], Goal(1.3)).met is False


def test_goals_from_both_sides() -> None:
    assert Goal(5.0, at_least=True).met(5.0) and not Goal(5.0, at_least=True).met(4.9)
    assert Result("", "ms", ours=1.9, goal=Goal(2.0)).met and not Result("", "ms", ours=2.1, goal=Goal(2.0)).met
    assert Result("", "s", ours=1.0).met is None


def test_the_peak_is_the_greatest_running_sum() -> None:
    assert peak([3, -2, 4, -5, 1]) == 5  # 3, 1, 5, 0, 1
    assert peak([]) == 0


def test_the_profiler_sees_the_peak_of_tensors() -> None:
    def work() -> None:
        first = torch.zeros(1_000_000)  # 4 MB
        second = first + 1  # 8 MB together
        del first, second
        torch.zeros(500_000)  # 2 MB

    assert peak_megabytes(work) == pytest.approx(8.0, abs=0.1)


def test_the_table_holds_names_ratios_and_verdicts() -> None:
    lines = table([compared("a / b", "s", [(1.0, 2.0)], Goal(1.05), "note")]).splitlines()
    assert lines[0].split() == ["ours", "other", "ratio", "least", "..", "greatest", "goal", "met"]
    assert lines[1].split() == [
        "a",
        "/",
        "b",
        "1",
        "s",
        "2",
        "s",
        "0.500",
        "0.500",
        "..",
        "0.500",
        "<=",
        "1.05",
        "yes",
        "note",
    ]


def test_import_times_are_summed_by_library() -> None:
    report = "import time: self [us] | cumulative | imported package\n"
    report += "import time:      1500 |       1500 |   torch.nn\nimport time:       500 |       2000 | torch\n"
    report += "import time:      1000 |       1000 | json\n"
    assert startup.by_library(report) == [("torch", 0.002), ("json", 0.001)]


def test_even_rows_are_cut_and_repeated() -> None:
    item = tiny.items(1)[0]
    item = replace(item, rows=(tiny.row([5, 6, 7], [8]),))
    (row,) = bed.even([item], 2, 3)[0].rows
    assert (row.prompt_ids, row.response_ids) == ((5, 6), (8, 8, 8))


def test_the_peers_rows_are_ours(ground: bed.Bed) -> None:
    item = replace(tiny.items(1)[0], rows=(tiny.row([5, 6], [7, 2]), tiny.row([5, 6], [2])))
    assert peers.single_row(item) == {"input_ids": [5, 6, 7, 2], "completion_mask": [0, 0, 1, 1], "length": 4}
    pair = peers.pair_row(item)
    assert pair == {"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [2], "length": 4}
    assert peers.whole_pair(pair) == {"chosen_ids": [5, 6, 7, 2], "rejected_ids": [5, 6, 2], "length": 4}
    assert peers.speed([(30.0, 1.0), (10.0, 3.0)]) == 10.0  # 40 tokens in 4 seconds


def test_the_bare_loop_minimises_what_ours_does(ground: bed.Bed) -> None:
    work = bed.job(
        ground, bed.new_engine(ground, bed.new_policy(ground)), bed.algorithm_of("stage=sft"), ground.singles, 4
    )
    batch = work.windows.at(0)[0]
    policy = bed.new_policy(ground)
    ours = -policy(batch)[batch.response_mask].sum()
    torch.testing.assert_close(bare.response_nll(policy.model, batch), ours)


def test_steps(ground: bed.Bed) -> None:
    time, space = steps.measure(ground)
    assert math.isfinite(time.ratio) and time.goal.limit == 1.05
    assert space.ours > 0 and space.ratio < 1.1  # toy rows: the statistics weigh more than in earnest


def test_long_rows_are_as_long_as_asked(ground: bed.Bed) -> None:
    long = long_bed(ground, SIZES, "t5")
    for item in long.singles:
        (row,), (static,) = item.rows, item.static_rows
        assert (len(row.prompt_ids), len(row.response_ids), len(static.response_ids)) == (24, 12, 12)
        assert row.prompt_ids == static.prompt_ids and row.response_ids[:6] == static.response_ids[:6]
        assert item.example.references == (long.encoder.decode(row.response_ids),)


@pytest.mark.parametrize("shape", ["t5", "llama"])
def test_the_step_taken_apart_is_the_loops(ground: bed.Bed, shape: str) -> None:
    long = long_bed(ground, SIZES, shape)
    apart, whole = (semi_offline.semi_job(long, bed.new_engine(long, bed.new_policy(long)), 4) for _ in range(2))
    watch = semi_parts.Watch("wall")
    totals = semi_parts.one_step(apart, 0, watch)
    (batch,) = whole.job.windows.at(0)
    expected, _ = whole.job.objective.loss(whole.job.objective.ask(whole.job.engine, batch), batch)
    torch.testing.assert_close(totals, expected.detach())
    assert len(watch.seconds) == 9 and min(watch.seconds.values()) > 0


def test_semi_offline(ground: bed.Bed) -> None:
    found = {line.name.split(", ", 1)[1]: line for line in semi_offline.measure(ground, SIZES)}
    for n in (4, 16, 64):
        assert found[f"semi-offline step, n = {n} / M-FT step"].ratio > 0
        assert found[f"semi-offline step, n = {n}: policy forwards"].ours == 1
    # 12 tokens of 4 x 8 texts at once, then these in micro-batches of 4
    assert found["REINFORCE step, n = 8: policy forwards"].ours == 12 + 8
    shares = [
        line.ratio for name, line in found.items() if name.startswith("semi-offline step, n = 64: ") and line.ratio
    ]
    assert len(shares) == 9 and sum(shares) == pytest.approx(1.0)


TINY = sampling.Sizes(16, 1, 2, 400, "eager", 4, 2, (3, 6))


def test_both_ways_of_sampling_have_the_gradient_of_what_they_sampled(ground: bed.Bed) -> None:
    """The graph that is kept gives what one pass over the same ids gives."""
    small = sampling.shaped(ground, TINY)
    policy, length = small.engine.module, 6
    two = sampling.two_stages(small, length)
    one = sampling.one_stage(small, length)
    assert all(len(answer.response_ids) == length for group in sampling.sample(small, length) for answer in group)
    # a new model finds all of its V tokens alike: 2 rows of 6 tokens at about ln V each
    whole = 2 * length * math.log(policy.vocab_size)
    assert two.item() == pytest.approx(whole, rel=0.05) and one.item() == pytest.approx(whole, rel=0.05)
    for total in (two, one):
        total.backward()
        assert sum(float(weight.grad.abs().sum()) for weight in policy.parameters()) > 0
        policy.zero_grad()


def test_each_piece_of_saved_memory_counts_once() -> None:
    module = torch.nn.Linear(250, 1, bias=False)  # 1,000 bytes
    rows = torch.ones(4, 250, requires_grad=True)  # 4,000 bytes, which the product keeps beside the weights

    def work() -> torch.Tensor:
        return (module(rows) + module(rows[:2]).sum()).sum()  # a part of the same memory: no more

    assert sampling.saved_megabytes(module, work) == pytest.approx(0.005)


def test_row_steps_after_the_end() -> None:
    answers = [
        Response(None, "", "", (5,), (6,) * length, False, SampleStats(torch.zeros(length), 0.0, 0.0, 0.0, batch))
        for length, batch in ((4, 0), (2, 0), (1, 1))
    ]
    assert sampling.wasted(answers) == pytest.approx(2 / 9)  # 2 rows x 4 steps and 1 x 1, of which 2 come after an end


def test_sampling(ground: bed.Bed) -> None:
    ragged = TINY._replace(rows=4, lengths=(8,), copies=2, mean_length=3.0)
    *lines, time, after = sampling.measure(ground, TINY._replace(lengths=(4, 16)), ragged)
    assert [line.name.split(":")[0] for line in lines] == ["T = 4"] * 4 + ["T = 16"] * 4
    assert all(line.ours > 0 and math.isfinite(line.ratio) for line in lines)
    assert lines[4].ours < lines[4].other and lines[4].ratio > lines[0].ratio  # the graph of all steps costs the more
    assert time.ratio > 0 and 0 < after.ours < 1 and "2 of 8 responses at a time" in time.note


def test_loop(ground: bed.Bed) -> None:
    (found,) = bare.measure(ground)
    assert found.ratio > 0 and math.isfinite(found.ratio)


def test_memory_is_several_times_less(ground: bed.Bed) -> None:
    # 8 slices; naive: logits, log-probabilities and gradient are 3 x 2.1 MB; ours: 2 x 2.1 / 8
    space, time = memory.measure(ground, memory.Sizes(256, 8, 2048, 1 << 16))
    assert space.note.endswith("8 slices") and space.ratio > 5 and math.isfinite(time.ratio)


def test_rouge_is_that_of_the_package_and_squad_as_defined(ground: bed.Bed) -> None:
    alone, *beside = overlap.measure(ground)
    assert alone.ours > 0 and alone.ratio is None and alone.goal.limit == 2.0
    assert len(beside) == 3  # rouge-score, and squad of 16 and 64
    assert all(found.note == "identical values" and found.ratio < 1 for found in beside)


def test_the_parts_of_a_start(ground: bed.Bed) -> None:
    found = first_step.main("wall", startup.stage_words(ground))
    parts = ["imports", "settings", "process group", "data", "tokens", "model", "engine", "first step"]
    assert list(found) == parts and all(seconds >= 0 for seconds in found.values())


def test_peers_are_left_out_without_an_interpreter(ground: bed.Bed, capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.measure(ground) == []
    assert "peer_python names no interpreter" in capsys.readouterr().out


def test_a_peer_that_ends_is_named(ground: bed.Bed, tmp_path: Path) -> None:
    with peers.worker("/bin/true", tmp_path / "trl.log") as peer, pytest.raises(UserError, match="exit code 0"):
        peer.ask("go")
    with pytest.raises(UserError, match="cannot be started"), peers.worker("/no/python", tmp_path / "trl.log"):
        pass


def test_a_peers_job_is_json_and_starts_from_our_weights(ground: bed.Bed) -> None:
    match = next(peers.matches(ground))
    job = json.loads(json.dumps(peers.peer_job(ground, match, 3, {})))
    assert (job["batch_size"], job["max_steps"], job["bf16"]) == (4, 3, False)
    assert Path(job["rows"]).read_text().count("\n") == len(ground.singles)
    assert (Path(job["model"]) / "model.safetensors").is_file()


def test_on_a_gpu_the_shape_is_the_large_one() -> None:
    settings = bed.for_gpu(resolve(["stage=bench"]).settings)
    assert settings.train.precision == "bf16" and settings.model.scratch.hidden_size == 2048
    sizes = settings.model.scratch
    per_layer = 4 * sizes.hidden_size**2 + 3 * sizes.hidden_size * 5472  # 5472: 2048 * 8 / 3, rounded up to 32
    assert 0.9e9 < sizes.num_layers * per_layer < 1.1e9
    assert engine.PRECISIONS[settings.train.precision] is torch.bfloat16
