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

from pipeline.bench import drawing, memory, peers, rouge, sampling, semi_offline, startup, steps, utilisation
from pipeline.bench.measure import Goal, Result, Timing, alternate, compared, peak_megabytes, speed, table
from pipeline.bench.setup import Setup, even, for_gpu, new_policy, prepare, sft_trainer, singles, with_settings
from pipeline.config.resolve import resolve
from pipeline.data.batching import Packing, collate
from pipeline.errors import UserError
from pipeline.models.policy import Policy
from pipeline.records import Item
from pipeline.trainer import optimizer
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

LONG = {
    "data": {"task": "assistant", "task_size": 40, "max_prompt_length": 24, "max_response_length": 12},
    "scratch": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 400},
    "rows": 4,
}


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    """A setup of toy size; what starting a process group says of this process does not reach later tests."""
    before = dict(os.environ)
    folder = tmp_path_factory.mktemp("bench")
    yield prepare(resolve(TOY).settings, tiny.ranks(), folder, folder)
    os.environ.clear()
    os.environ.update(before)


def test_rounds_take_turns_and_each_side_goes_first_half_the_time() -> None:
    said: list[str] = []
    timing = Timing(rounds=2, steps=2, clock="wall", warm=1)
    found = alternate(lambda step: said.append(f"a{step}"), lambda step: said.append(f"b{step}"), timing)
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


def test_even_rows_are_cut_and_repeated() -> None:
    item = tiny.items(1)[0]
    item = replace(item, rows=(tiny.row([5, 6, 7], [8]),))
    (row,) = even([item], 2, 3)[0].rows
    assert (row.prompt_ids, row.response_ids) == ((5, 6), (8, 8, 8))


def test_the_peers_rows_are_ours(setup: Setup) -> None:
    item = replace(tiny.items(1)[0], rows=(tiny.row([5, 6], [7, 2]), tiny.row([5, 6], [2])))
    assert peers.single_row(item) == {"input_ids": [5, 6, 7, 2], "completion_mask": [0, 0, 1, 1], "length": 4}
    pair = peers.pair_row(item)
    assert pair == {"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [2], "length": 4}
    assert peers.whole_pair(pair) == {"chosen_ids": [5, 6, 7, 2], "rejected_ids": [5, 6, 2], "length": 4}
    assert speed([(30.0, 1.0), (10.0, 3.0)]) == 10.0  # 40 tokens in 4 seconds


def test_the_bare_loop_minimises_what_ours_does(setup: Setup) -> None:
    batch = sft_trainer(setup, singles(setup)).windows.at(0)[0]
    policy = new_policy(setup)
    ours = -policy(batch)[batch.response_mask].sum()
    torch.testing.assert_close(steps.response_nll(policy.model, batch), ours)


def test_steps(setup: Setup) -> None:
    time, space = steps.against_sft(setup)
    assert math.isfinite(time.ratio) and time.goal.limit == 1.05
    assert space.ours > 0 and space.ratio < 1.1  # toy rows: the statistics weigh more than in earnest


def test_long_rows_are_as_long_as_asked(setup: Setup) -> None:
    long = with_settings(setup, {"data": LONG["data"]})
    for item in semi_offline.long_items(long):
        (row,), (static,) = item.rows, item.static_rows
        assert (len(row.prompt_ids), len(row.response_ids), len(static.response_ids)) == (24, 12, 12)
        assert row.prompt_ids == static.prompt_ids and row.response_ids[:6] == static.response_ids[:6]
        assert item.example.references == (long.encoder.decode(row.response_ids),)


def test_semi_offline(setup: Setup) -> None:
    lines = semi_offline.measure(setup, LONG)
    assert [line.name.split(", ", 1)[1] for line in lines[::2]] == [
        f"semi-offline step, n = {n} / M-FT step" for n in (4, 16, 64, 64)
    ]
    assert all(line.ratio > 0 and line.goal.limit == 1.15 for line in lines[::2])
    assert all(line.ours == 1 and line.met for line in lines[1::2])  # one forward per micro-batch


TINY = sampling.Sizes({"hidden_size": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 400}, "eager", 4, (3, 6), 2)


def test_both_ways_of_sampling_have_the_gradient_of_what_they_sampled(setup: Setup) -> None:
    """The graph that is kept gives what one pass over the same ids gives."""
    small, length = sampling.sampled(setup, TINY), 6
    policy = small.module
    two = sampling.two_stages(small, length)
    one = sampling.one_stage(small, length)
    # a new model finds all of its V tokens alike: 2 rows of 6 tokens at about ln V each
    whole = 2 * length * math.log(policy.vocab_size)
    assert two.item() == pytest.approx(whole, rel=0.05) and one.item() == pytest.approx(whole, rel=0.05)
    for total in (two, one):
        total.backward()
        assert sum(float(weight.grad.abs().sum()) for weight in policy.parameters()) > 0
        policy.zero_grad()


def test_responses_end_by_chance(setup: Setup) -> None:
    small = sampling.sampled(setup, replace(TINY, lengths=(200,), copies=32))
    sampling.ends_by_chance(small.module.model, small.setup.encoder.eos_id)
    lengths = [len(response.response_ids) for response in small.responses(0, max_new_tokens=200, batch_size=2)]
    # 64 responses that end after 32 tokens each on average: the mean is 32 +- 4
    assert len(set(lengths)) > 16 and 16 < sum(lengths) / len(lengths) < 48


def test_sampling(setup: Setup) -> None:
    ragged = replace(TINY, attention="sdpa", lengths=(8,), prompts=4, copies=2)
    *lines, rows = sampling.measure(setup, replace(TINY, lengths=(4, 64)), ragged)
    assert [line.name.split(":")[0] for line in lines] == ["T = 4"] * 2 + ["T = 64"] * 2
    assert all(line.ours > 0 and math.isfinite(line.ratio) for line in lines)
    assert lines[2].ours < lines[2].other and lines[2].ratio > lines[0].ratio  # the graph of all steps costs the more
    assert rows.ratio > 0 and rows.note == "4 prompts x 2 responses of 1 to 8 tokens"


def test_drawing(setup: Setup) -> None:
    lines = drawing.measure(setup, many=600, few=200)
    assert [line.goal is None for line in lines] == [False, True, True] * 4
    assert all(line.ours > 0 for line in lines)
    items = drawing.items_of(setup, 300)
    window = drawing.windows(setup, items, "positive", by_length=True)
    size = setup.settings.train.batch_size
    drawn = [i for step in range(300 // size) for batch in window.at(step) for i in batch.items]
    assert sorted(drawn) == list(range(300))
    batch = window.at(0)[0]
    assert batch.numbers["advantage"].tolist() == pytest.approx([items.numbers["advantage"][i] for i in batch.items])


def test_loop(setup: Setup) -> None:
    line, used = steps.against_bare(setup)
    assert line.ratio > 0 and math.isfinite(line.ratio)
    assert used.ours > 0 and (used.mfu is None) == ("not known" in used.note)


def test_the_work_of_a_step_by_hand() -> None:
    """One layer, rows of 4 and 6 tokens, 2 and 3 of them learned.

    Matrices: 4 of 32 x 32 and 3 of 32 x 64 a layer = 10,240, times 2 layers; 6 x 20,480 x 10 tokens = 1,228,800.
    Head: 6 x 352 x 32 x 5 = 337,920. Attention: 6 x 2 layers x 32 x (16 + 36) = 19,968.
    """
    rows = [Item(None, (tiny.row([5] * 2, [6] * 2),)), Item(None, (tiny.row([5] * 3, [6] * 3),))]
    batch = collate(rows, range(2), Packing(2, None, False, tiny.PAD_ID))
    policy = Policy(tiny.language_model("llama"), 64)
    assert utilisation.flops(policy, [batch]) == 1_228_800 + 337_920 + 19_968
    assert utilisation.flops(policy, [batch, batch]) == 2 * utilisation.flops(policy, [batch])


@pytest.mark.parametrize(
    ("device", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A10G", 70e12, 35e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("Tesla T4", None, 8.1e12),
        ("x86_64", None, None),
    ],
)
def test_peaks_are_those_of_the_device_and_its_precision(device: str, half: float | None, single: float | None) -> None:
    assert (utilisation.peak(device, "bf16"), utilisation.peak(device, "fp32")) == (half, single)


def test_memory_is_several_times_less(setup: Setup) -> None:
    # 8 slices; whole: logits, log-probabilities and gradient are 3 x 2.1 MB; ours: 2 x 2.1 / 8
    space, time = memory.measure(setup, 256, 8, 2048, 1 << 16)
    assert space.note.endswith("8 slices") and space.ratio > 5 and math.isfinite(time.ratio)


def test_rouge_by_itself_and_beside_the_package(setup: Setup) -> None:
    alone, beside = rouge.measure(setup)
    assert alone.ours == beside.ours > 0 and alone.ratio is None and alone.goal.limit == 2.0
    assert beside.ratio < 1


def test_a_start_that_ends_without_a_step_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exit code 2, wanted one step"):
        startup.to_first_step(tmp_path, ["stage=sft", "task=no_such_task"])


def test_peers_are_left_out_without_an_interpreter(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.measure(setup) == []
    assert "peer_python names no interpreter" in capsys.readouterr().out


def test_a_peer_that_ends_is_named(setup: Setup, tmp_path: Path) -> None:
    with peers.worker("/bin/true", tmp_path / "trl.log") as ask, pytest.raises(UserError, match="exit code 0"):
        ask("go")
    with pytest.raises(UserError, match="cannot be started"), peers.worker("/no/python", tmp_path / "trl.log"):
        pass


def test_a_peers_job_is_json_and_starts_from_our_weights(setup: Setup) -> None:
    match = next(peers.matches(setup, "ragged"))
    job = json.loads(json.dumps(peers.peer_job(setup, match, {})))
    options = job["options"]
    assert (options["per_device_train_batch_size"], options["max_steps"], options["bf16"]) == (
        4,
        4,
        False,
    )  # 2 to warm up, 2 rounds of 1
    assert Path(job["rows"]).read_text().count("\n") == len(match.rows)
    assert (Path(job["model"]) / "model.safetensors").is_file()


def test_on_a_gpu_the_shape_is_the_large_one() -> None:
    settings = for_gpu(resolve(["stage=bench"]).settings)
    assert settings.train.precision == "bf16" and settings.model.scratch.hidden_size == 2048
    sizes = settings.model.scratch
    per_layer = 4 * sizes.hidden_size**2 + 3 * sizes.hidden_size * 5472  # 5472: 2048 * 8 / 3, rounded up to 32
    assert 0.9e9 < sizes.num_layers * per_layer < 1.1e9
    assert optimizer.PRECISIONS[settings.train.precision] is torch.bfloat16
