"""Metrics as sums and counts, and the files of a log: cut, resumed or disabled, the numbers stay the same."""

from __future__ import annotations

import json
import math
import re
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.algorithms.stats import mean_stat, std_stat
from pipeline.errors import UserError
from pipeline.files import flatten, read_metrics, write_json
from pipeline.launch import provenance
from pipeline.records import Stat
from pipeline.report.spec import layout
from pipeline.trainer import markdown
from pipeline.trainer.logger import RunLog
from pipeline.trainer.metrics import Metrics

VALUES = torch.tensor([1.0, 2.0, 3.0, 6.0])


def alone(packed: torch.Tensor) -> torch.Tensor:
    return packed


def metrics_of(*parts: torch.Tensor) -> Metrics:
    metrics = Metrics()
    for part in parts:
        metrics.add({"a/mean": mean_stat(part), "a/std": std_stat(part)})
    return metrics


def log_in(directory, resume_step=0, enabled=True, hparams=None, total_steps=10):
    return RunLog(
        directory,
        hparams or {},
        resume_step=resume_step,
        enabled=enabled,
        total_steps=total_steps,
        description="test",
    )


def steps(path) -> list[int]:
    return [row["step"] for row in read_metrics(path)]


def board(directory) -> EventAccumulator:
    return EventAccumulator(str(directory / "tensorboard"), size_guidance={"tensors": 0}).Reload()


def test_any_cut_into_micro_batches_and_ranks_gives_the_whole():
    # mean (1+2+3+6)/4 = 3; population variance (4+1+0+9)/4 = 3.5
    wanted = {"a/mean": pytest.approx(3.0), "a/std": pytest.approx(math.sqrt(3.5))}
    assert metrics_of(VALUES).reduce(alone) == wanted
    assert metrics_of(VALUES[:1], VALUES[1:]).reduce(alone) == wanted
    other = metrics_of(VALUES[:0], VALUES[3:])  # a rank whose first micro-batch holds no rows
    assert metrics_of(VALUES[:3]).reduce(lambda packed: packed + other.sums()) == wanted


def test_a_rank_without_rows_takes_part():
    empty = metrics_of(VALUES[:0])
    assert metrics_of(VALUES).reduce(lambda packed: packed + empty.sums())["a/mean"] == pytest.approx(3.0)
    assert math.isnan(metrics_of(VALUES[:0]).reduce(alone)["a/mean"])


def test_a_tally_is_empty_after_a_reduction():
    metrics = metrics_of(VALUES)
    metrics.reduce(alone)
    assert metrics.reduce(alone) == {}


@pytest.mark.parametrize("name, kind", [("b/mean", "mean"), ("a/mean", "ess")])
def test_ranks_with_other_names_or_kinds_are_found_out(name, kind):
    here, there = Metrics(), Metrics()
    here.add({"a/mean": mean_stat(VALUES)})
    there.add({name: Stat(kind, mean_stat(VALUES).sums)})
    with pytest.raises(RuntimeError, match="2 ranks hold different statistics"):
        here.reduce(lambda packed: packed + there.sums())


def test_ranks_with_more_names_pack_to_the_same_shape():
    many = Metrics()
    many.add({f"a/{i}": mean_stat(VALUES) for i in range(40)})
    assert many.sums().shape == metrics_of(VALUES).sums().shape == (64, 3)


def test_more_statistics_than_one_block_are_all_kept():
    metrics = Metrics()
    metrics.add({f"a/{i:03d}": mean_stat(torch.tensor([float(i)])) for i in range(70)})
    assert metrics.sums().shape == (128, 3)  # 71 rows rounded up to a multiple of 64
    assert metrics.reduce(alone) == {f"a/{i:03d}": float(i) for i in range(70)}


def test_rows_are_valid_json_with_null_for_what_is_not_finite(tmp_path):
    log = log_in(tmp_path)
    log.scalars(1, {"train/loss": 1.23456789, "ratio/mean": math.nan, "perf/x": math.inf})
    log.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row.pop("time") >= 0
    assert row == {"step": 1, "train/loss": 1.23457, "ratio/mean": None, "perf/x": None}


def test_resume_drops_later_rows_and_a_torn_line(tmp_path):
    log = log_in(tmp_path)
    for step in (0, 1, 2, 3, 4):
        log.scalars(step, {"train/loss": float(step)})
    for step in (2, 4):
        log.samples(step, [{"prompt": "p", "response": "r"}])
    log.close()
    path = tmp_path / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 5, "train/lo')  # the kill came in the middle of a write
    log = log_in(tmp_path, resume_step=3)
    assert steps(path) == [0, 1, 2, 3]
    log.scalars(4, {"train/loss": 40.0})
    log.close()
    assert steps(path) == [0, 1, 2, 3, 4]
    assert read_metrics(path)[-1]["train/loss"] == 40.0
    times = [row["time"] for row in read_metrics(path)]
    assert times == sorted(times)  # the clock goes on
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["step-000002.jsonl"]
    assert points(tmp_path, "train/loss") == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_a_start_from_nothing_forgets_an_attempt_that_left_no_checkpoint(tmp_path):
    log = log_in(tmp_path)
    log.scalars(0, {"eval/loss": 9.0})
    log.scalars(1, {"eval/loss": 8.0})
    log.close()
    time.sleep(1)  # as any start takes: TensorBoard orders files by the second, then by a counter compared as text
    log = log_in(tmp_path)
    log.scalars(0, {"eval/loss": 1.0})
    log.scalars(1, {"eval/loss": 2.0})
    log.close()
    assert [row["eval/loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 2.0]
    assert points(tmp_path, "eval/loss") == [(0, 1.0), (1, 2.0)]


def test_a_broken_line_in_the_middle_names_its_place(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a JSON object"):
        read_metrics(path)


def test_tensorboard_holds_scalars_histograms_text_and_hyper_parameters(tmp_path):
    log = log_in(tmp_path, hparams={"optimizer": {"learning_rate": 1e-4}, "bf16": True, "names": ["a"], "no": None})
    log.scalars(1, {"train/loss": 2.0, "eval/loss": 2.0})
    log.scalars(2, {"train/loss": 1.0, "eval/loss": 2.5})
    log.histogram("ratio", torch.tensor([[1.0, 2.0], [math.nan, 3.0]]), 1)
    log.histogram("ratio", [math.inf], 2)
    log.samples(1, [{"prompt": "a | *<b>*", "response": "x\ny", "rewards": {"length": 0.5}}])
    log.finish({"eval/loss": 1.5, "best": None})
    log.close()
    events = board(tmp_path)
    assert events.Scalars("train/loss")[0].value == 2.0
    assert shown(events, "results/text_summary").splitlines()[2:] == ["| eval/loss | 1.5 |", "| best | - |"]
    found = events.Histograms("ratio/histogram")
    assert [(event.step, event.histogram_value.num) for event in found] == [(1, 3.0)]
    text = shown(events, "samples/text_summary")
    assert text.splitlines()[0] == "| prompt | response | rewards/length |"
    assert text.splitlines()[2] == r"| a &#124; \*&lt;b&gt;\* | x<br>y | 0.5 |"
    session = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"optimizer/learning_rate" in session and b"names" in session
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"^(train|eval)/loss$" in layout and b"Ratio to the start model" not in layout  # no empty charts
    assert json.loads((tmp_path / "results.json").read_text()) == {"eval/loss": 1.5, "best": None}


def shown(events: EventAccumulator, tag: str) -> str:
    return events.Tensors(tag)[0].tensor_proto.string_val[0].decode()


def points(directory, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in board(directory).Scalars(tag)]


def test_a_curve_begins_with_the_first_change(tmp_path):
    log = log_in(tmp_path)
    log.scalars(1, {"a": 0.5, "constant": 2.0, "once": 1.0})
    log.scalars(2, {"a": math.nan, "constant": 2.0})
    log.scalars(3, {"a": 0.5, "constant": 2.0})
    log.scalars(4, {"a": 0.25, "constant": 2.0})
    log.close()
    assert board(tmp_path).Tags()["scalars"] == ["a"]
    assert points(tmp_path, "a") == [(1, 0.5), (3, 0.5), (4, 0.25)]
    assert [row["constant"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2.0] * 4


def test_a_resumed_curve_has_every_point_once(tmp_path):
    """One that was held back, and one that was drawn by a step that is taken again, though a start between had not."""
    log = log_in(tmp_path)
    for step in (1, 2, 3):
        log.scalars(step, {"held": 1.0 + step * 1e-6, "drawn": float(step > 2)})
    log.close()
    log_in(tmp_path, resume_step=2).close()
    log = log_in(tmp_path, resume_step=2)
    log.scalars(3, {"held": 1.0, "drawn": 0.0})
    log.scalars(4, {"held": 2.0, "drawn": 0.0})
    log.close()
    assert points(tmp_path, "held") == [(1, pytest.approx(1.0)), (2, pytest.approx(1.0)), (3, 1.0), (4, 2.0)]
    assert points(tmp_path, "drawn") == [(1, 0.0), (2, 0.0), (3, 0.0), (4, 0.0)]


def test_the_layout_finds_the_tags_of_the_stages():
    tags = ["train/reward", "eval/reward", "eval/rewards/oracle:helpfulness/mean", "train/loss", "eval/accuracy"]
    tags += ["ratio/clip_fraction_low", "ratio/ess", "logged/kl", "value/r2", "eval/completions/clipped_ratio"]
    tags += ["semi_offline/greedy_reward", "semi_offline/mask_rate", "eval/masked_loss", "semi_offline/equal_rewards"]
    tags += ["eval/rewards/a/length_correlation", "train/grad_norm", "perf/tokens_per_second", "eval/accuracy/forum"]
    tags += ["perf/padding_fraction"]
    tags += [f"esrl/{name}" for name in ("capability", "samples_per_prompt", "tokens_saved", "at_k_min", "known")]
    tags += ["rollout/queue_mean", "rollout/equal_groups", "rollout/logp_gap", "train/entropy"]
    tags += ["perf/sampling_seconds", "esrl/left_out", "rollout/generated_tokens"]
    patterns = [one for charts in layout(tags).values() for _, found in charts.values() for one in found]
    assert [tag for tag in [*tags, "my/own"] if not any(re.search(one, tag) for one in patterns)] == ["my/own"]
    assert "Effective share of samples: healthy from 0.3" in layout(tags)["Ratio to the start model"]


def test_sampled_responses_are_grouped_by_prompt_the_best_first():
    row = {"kind": "rollout", "prompt": "Why|?", "advantage": 0.0, "capability": None, "temperature": 1.0, "tokens": 3}
    rows = [
        {**row, "response": "worse", "reward": 0.25, "advantage": -0.25},
        {**row, "response": "better *", "reward": 0.75, "advantage": 0.25},
        {**row, "prompt": "b", "response": "x", "reward": 1.0, "capability": 0.5},
    ]
    pages = markdown.pages([{"id": "a", "response": "yes"}, *rows])
    assert pages["samples"].splitlines() == ["| id | response |", "| --- | --- |", "| a | yes |"]
    assert pages["rollouts"].splitlines() == [
        "**prompt:** Why&#124;?",
        "",
        "2 responses, temperature 1",
        "",
        "| reward | advantage | tokens | response |",
        "| --- | --- | --- | --- |",
        r"| 0.75 | 0.25 | 3 | better \* |",
        "| 0.25 | -0.25 | 3 | worse |",
        "",
        "**prompt:** b",
        "",
        "1 response, temperature 1, capability 0.5",
        "",
        "| reward | advantage | tokens | response |",
        "| --- | --- | --- | --- |",
        "| 1 | 0 | 3 | x |",
    ]


def test_every_start_is_noted(tmp_path):
    log_in(tmp_path).close()
    log_in(tmp_path, resume_step=3).close()
    noted = provenance.read(tmp_path)
    assert [start["step"] for start in noted] == [0, 3]
    assert noted[0]["versions"]["torch"] == torch.__version__ and noted[0]["device"]
    with open(tmp_path / provenance.NAME, "a") as file:
        file.write('{"step": 9')  # torn by a kill
    assert len(provenance.read(tmp_path)) == 2
    provenance.note(tmp_path, 6)  # after a torn line
    assert [row["step"] for row in provenance.read(tmp_path)][2:] == [6]
    (tmp_path / provenance.NAME).write_text("not json\n")
    with pytest.raises(UserError, match=r"starts\.jsonl:1: not JSON"):
        provenance.read(tmp_path)


def test_samples_keep_every_row_whole(tmp_path):
    rows = [{"prompt": "p" * 2000, "response": f"é {i}", "reward": math.nan} for i in range(40)]
    log = log_in(tmp_path)
    log.samples(200, rows)
    log.close()
    lines = (tmp_path / "samples" / "step-000200.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{**row, "reward": None} for row in rows]


def test_a_disabled_log_writes_nothing(tmp_path):
    log = log_in(tmp_path, enabled=False)
    log.scalars(1, {"a": 1.0})
    log.histogram("a", VALUES, 1)
    log.samples(1, [{"prompt": "p"}])
    log.finish({"a": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "held_out, shown",
    [
        ({"eval/loss": 2.0, "eval/reward": 1.5, "eval/logged/reward": 9.0}, ", held-out reward 1.5"),
        ({"eval/loss": 2.0, "eval/accuracy": 0.75}, ", held-out accuracy 0.75"),
        ({"eval/loss": 2.0, "eval/rewards/accuracies": 0.75}, ", held-out accuracy 0.75"),
        ({"eval/loss": 2.0, "eval/reward": math.nan}, ", held-out reward not finite"),
        ({"eval/loss": 2.0, "eval/logged/reward": 9.0}, ", held-out loss 2"),  # nothing judges the responses
        ({}, ""),
    ],
)
def test_without_a_terminal_the_last_step_gets_one_plain_line(tmp_path, capsys, held_out, shown):
    """It ends with the last number of held-out data, be it of an earlier step or an earlier start."""
    log = log_in(tmp_path, total_steps=3)
    log.scalars(0, held_out)
    log.scalars(1, {"train/loss": 3.0, "logged/reward": 8.0})
    log.close()
    log = log_in(tmp_path, resume_step=1, total_steps=3)
    log.scalars(2, {"train/loss": 2.75})
    log.scalars(3, {"train/loss": 2.5})
    log.close()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith(f"test: 100% 3/3, loss 2.5{shown} [") and "\r" not in lines[0]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_flatten_joins_keys():
    assert flatten({"a": {"b": {"c": 1}}, "d": 2}) == {"a/b/c": 1, "d": 2}
