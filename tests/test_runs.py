"""A stage's directory: fresh, done, going on, and refused when something else came to be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline import files
from pipeline.config.yaml_layers import load_yaml
from pipeline.config.yaml_text import dump_yaml
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.launch import going_on, run_dir
from tests import tiny

WORDS = ["stage=sft", "data.train=my rows.jsonl"]
INPUTS = {"model": "new", "data.train": "f1"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where runs/ is made


def settings(*words: str):
    return tiny.settings("sft", *words)


def opened(tmp_path: Path, *words: str, inputs: dict | None = None) -> bool:
    return run_dir.open_stage(tmp_path / "sft", settings(*words), WORDS, inputs or INPUTS)


def test_a_fresh_stage_notes_what_it_is(tmp_path: Path) -> None:
    assert opened(tmp_path, "seed=7")
    stage = tmp_path / "sft"
    assert load_yaml(stage / "config.yaml")["seed"] == 7
    assert json.loads((stage / "inputs.json").read_text()) == INPUTS
    assert (stage / "command.txt").read_text() == "bash run.sh stage=sft 'data.train=my rows.jsonl'\n"


def begun(tmp_path: Path, step: int = 20, world: int = 1) -> None:
    """A stage that got as far as a checkpoint."""
    opened(tmp_path)
    checkpoints = tmp_path / "sft" / "checkpoints"
    write_json(checkpoints / f"step-{step:06d}" / "state.json", {"step": step, "world": world})
    (checkpoints / "latest").write_text(f"step-{step:06d}\n")


def test_an_unfinished_stage_goes_on(tmp_path: Path) -> None:
    begun(tmp_path)
    before = (tmp_path / "sft" / "config.yaml").stat().st_mtime_ns
    assert opened(tmp_path)
    assert (tmp_path / "sft" / "config.yaml").stat().st_mtime_ns == before


def test_a_finished_stage_is_not_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened(tmp_path)
    write_json(tmp_path / "sft" / "results.json", {"eval/loss": 1.0})
    assert not opened(tmp_path)
    assert "is done; remove it to do it again" in capsys.readouterr().out


def refused(tmp_path: Path, *words: str, inputs: dict | None = None) -> str:
    with pytest.raises(UserError) as error:
        opened(tmp_path, *words, inputs=inputs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("finished", [False, True])
def test_changed_settings_are_named(tmp_path: Path, finished: bool) -> None:
    begun(tmp_path)
    if finished:
        write_json(tmp_path / "sft" / "results.json", {})
    rate, size = settings().optimizer.learning_rate, settings().train.batch_size
    assert f"started with optimizer.learning_rate={rate}, now it is 0.5" in refused(tmp_path, "learning_rate=0.5")
    assert f"train.batch_size={size}, now it is 3" in refused(tmp_path, "batch_size=3")
    assert "choose another run= or name=, or remove the directory" in refused(tmp_path, "seed=2")


def test_a_finished_stage_may_have_noted_settings_that_its_algorithm_has_not(tmp_path: Path) -> None:
    begun(tmp_path)
    config = tmp_path / "sft" / "config.yaml"
    config.write_text(config.read_text() + "sampler: {k: 8}\n")
    assert "was started with sampler.k=8, now it is None" in refused(tmp_path)  # what goes on must be as it began
    write_json(tmp_path / "sft" / "results.json", {})
    assert not opened(tmp_path)
    assert "was started with seed=1, now it is 2" in refused(tmp_path, "seed=2")


@pytest.mark.parametrize(
    "word",
    ["launch.processes=2", "train.logging_steps=3", "train.save_steps=5", "train.save_total_limit=9", "runs_dir=other"],
)
def test_what_changes_no_number_may_change(tmp_path: Path, word: str) -> None:
    begun(tmp_path)
    assert opened(tmp_path, word)


def test_changed_inputs_are_named(tmp_path: Path) -> None:
    begun(tmp_path)
    assert "its data.train has changed" in refused(tmp_path, inputs={**INPUTS, "data.train": "f2"})
    assert "its reward x is new" in refused(tmp_path, inputs={**INPUTS, "reward x": "f"})
    assert "its data.train is gone" in refused(tmp_path, inputs={"model": "new"})


def test_a_start_that_saved_nothing_may_be_made_otherwise(tmp_path: Path) -> None:
    """There is nothing to go on from, so the mended command is as good as the first; its files are its own."""
    opened(tmp_path)
    stage = tmp_path / "sft"
    for left in ("metrics.jsonl", "train.jsonl", "best/x", "tensorboard/x", "checkpoints/part-step-000001/x"):
        files.write_text(stage / left, "x")
    stay = ("starts.jsonl", "notes.txt", "best.txt", "mine.jsonl", "samples/config.yaml")  # samples: a stage so called
    for left in stay:
        files.write_text(stage / left, "x")
    assert opened(tmp_path, "seed=2", inputs={"model": "other"})
    assert load_yaml(stage / "config.yaml")["seed"] == 2
    assert json.loads((stage / "inputs.json").read_text()) == {"model": "other"}
    there = {path.name for path in stage.iterdir()} - {"config.yaml", "inputs.json", "command.txt", ".lock"}
    assert there == {Path(left).parts[0] for left in stay}


def test_a_finished_model_outlives_the_checkpoints_it_was_to_train_longer_from(tmp_path: Path, capsys) -> None:
    opened(tmp_path, "max_steps=20")
    begun(tmp_path / "other")
    stage = tmp_path / "sft"
    (tmp_path / "other" / "sft" / "checkpoints").rename(stage / "checkpoints")
    files.write_text(stage / "model" / "config.json", "weights")
    write_json(stage / "results.json", {"steps": 20})
    assert opened(tmp_path, "max_steps=40")  # and stopped, and then tidied up by hand
    shutil.rmtree(stage / "checkpoints")
    assert opened(tmp_path, "max_steps=40")
    assert (stage / "model" / "config.json").read_text() == "weights"
    assert "model is of an earlier start, which left no checkpoint: it stays" in capsys.readouterr().err


@pytest.mark.parametrize("named", [None, "elsewhere"])
def test_what_starts_from_an_sft_model_waits_for_its_end(tmp_path: Path, named: str | None) -> None:
    """Not from the model that is named, as where there is no sft."""
    rl = tiny.settings("rl", "algo=nll", "runs_dir=.", *([f"model={named}"] if named else []))
    run_dir.run_dir(rl).mkdir()
    begun(run_dir.run_dir(rl))
    with pytest.raises(UserError, match="sft: has not ended, wanted its model to start from"):
        run_dir.start_model(rl)
    assert run_dir.start_model(rl.model_copy(update={"start_from": "model"})).path == named
    shutil.rmtree(run_dir.run_dir(rl) / "sft" / "checkpoints")  # it never got so far
    assert run_dir.start_model(rl).path == named


@pytest.mark.parametrize("finished", [False, True])
def test_a_raised_length_goes_on(tmp_path: Path, finished: bool) -> None:
    opened(tmp_path, "max_steps=20")
    begun(tmp_path / "other")
    (tmp_path / "other" / "sft" / "checkpoints").rename(tmp_path / "sft" / "checkpoints")
    if finished:
        write_json(tmp_path / "sft" / "results.json", {"steps": 20})
    lower = refused(tmp_path, "max_steps=19")
    assert "started with train.max_steps=20, now it is 19 (it may be raised, to train longer)" in lower
    assert "train.max_steps=20, now it is None" in refused(tmp_path, "num_train_epochs=9")
    assert "its model has changed" in refused(tmp_path, "max_steps=40", inputs={**INPUTS, "model": "other"})
    assert going_on.finished(tmp_path / "sft") == finished  # what is refused changes nothing
    said = going_on.standing(tmp_path / "sft", settings("max_steps=40"))
    assert said == "goes on from step 20: train.max_steps is 40 now, it was 20"
    assert opened(tmp_path, "max_steps=40")
    assert going_on.standing(tmp_path / "sft", settings("max_steps=40")) == "goes on from step 20"
    assert not going_on.finished(tmp_path / "sft")
    assert load_yaml(tmp_path / "sft" / "config.yaml")["train"]["max_steps"] == 40


def test_what_a_step_draws_stays_as_it_was_begun(tmp_path: Path) -> None:
    begun(tmp_path)
    wanted = "train.group_by_length=False, now it is True"
    assert wanted in refused(tmp_path, "group_by_length=true")
    # begun by a version that knew no such setting
    config = tmp_path / "sft" / "config.yaml"
    assert "  group_by_length: false\n" in config.read_text()
    config.write_text(config.read_text().replace("  group_by_length: false\n", ""))
    assert wanted in refused(tmp_path, "group_by_length=true")
    assert opened(tmp_path, "group_by_length=false")


def test_what_is_done_and_kept_no_checkpoint_is_not_trained_longer(tmp_path: Path) -> None:
    opened(tmp_path, "num_train_epochs=1", "train.keep_checkpoint=false")
    write_json(tmp_path / "sft" / "results.json", {"steps": 20})
    wanted = "num_train_epochs is 2.0 now, it was 1.0, but it is done and kept no checkpoint"
    assert wanted in refused(tmp_path, "num_train_epochs=2")
    with pytest.raises(UserError, match=wanted):  # dry_run=true says so beforehand
        going_on.standing(tmp_path / "sft", settings("num_train_epochs=2"))
    assert going_on.standing(tmp_path / "sft", settings("num_train_epochs=1")) == "is done"


def test_the_checkpoint_of_what_is_done_goes_where_it_is_not_to_be_kept(tmp_path: Path) -> None:
    begun(tmp_path, step=10)
    begun(tmp_path)
    write_json(tmp_path / "sft" / "results.json", {"steps": 20})
    assert not opened(tmp_path)
    assert [path.name for path in (tmp_path / "sft" / "checkpoints").glob("step-*")] == ["step-000020"]
    assert not opened(tmp_path, "train.keep_checkpoint=false")
    assert not (tmp_path / "sft" / "checkpoints").exists()


def noted(tmp_path: Path, optimizer: str, pieces: list | None) -> None:
    """What the checkpoint of `begun`, of two processes under ZeRO-0, says of its parts."""
    said = {"world": 2, "stage": 0, "optimizer": optimizer, "pieces": pieces}
    write_json(tmp_path / "sft" / "checkpoints" / "step-000020" / "pieces-0.json", said)


def test_other_ranks_and_another_stage_go_on_and_it_is_said(tmp_path: Path, capsys) -> None:
    begun(tmp_path, world=2)
    noted(tmp_path, "AdamW", [["weight", 0, 6, 0, 0]])
    assert opened(tmp_path, "zero=zero3", "max_tokens=512")
    assert (
        "sft: goes on with gpus=1 (it was 2), train.zero=zero3 (it was zero0), train.max_tokens=512 (it was 2048): "
        "the same steps, to rounding and no longer to the bit" in capsys.readouterr().out
    )


def test_what_a_checkpoint_says_of_itself_counts(tmp_path: Path, capsys) -> None:
    """Begun on one process under ZeRO-0, it went on with two under ZeRO-3, and was saved there."""
    assert going_on.first_ranks(tmp_path / "sft") is None
    begun(tmp_path, world=2)
    assert going_on.first_ranks(tmp_path / "sft") == 2
    file = tmp_path / "sft" / "checkpoints" / "step-000020" / "state.json"
    cut = {key: files.flatten(settings().model_dump(), ".")[key] for key in going_on.CUT} | {"train.zero": "zero3"}
    write_json(file, {"step": 20, "world": 2, "began": 1, "cut": cut})
    assert going_on.first_ranks(tmp_path / "sft") == 1
    assert going_on.spoken_cut(tmp_path / "sft", settings("zero=zero3"), 2) == ""
    assert "gpus=1 (it was 2), train.zero=zero0 (it was zero3): " in going_on.spoken_cut(
        tmp_path / "sft", settings(), 1
    )
    del cut["train.padding_free"]  # as versions wrote it that only read padded rows
    write_json(file, {"step": 20, "world": 2, "began": 1, "cut": cut})
    found = going_on.cut_anew(tmp_path / "sft", settings("zero=zero3"), 2)
    assert found == [("train.padding_free", False, True)]


def test_offline_rl_of_fewer_weights_goes_on(tmp_path: Path) -> None:
    """As versions noted it that had V(x) alone to compare with, a clip that only bounds, and no choice of rows."""
    noted = tiny.settings("rl", "algo=alol").model_dump()
    own = noted["algorithm"]["settings"]
    missing = ("baseline", "shift", "weight_temperature", "weight_limit", "clip_form")
    noted["algorithm"] = {**noted["algorithm"], "settings": {k: own[k] for k in own if k not in missing}}
    del noted["best"]
    (tmp_path / "config.yaml").write_text(dump_yaml(noted))
    assert going_on.differences(tmp_path, tiny.settings("rl", "algo=alol")) == []
    other = tiny.settings("rl", "algo=alol", "algorithm.settings.shift=0.1")
    assert going_on.differences(tmp_path, other) == [("algorithm.settings.shift", 0.0, 0.1)]


def test_what_a_file_of_ones_own_holds_counts(tmp_path: Path) -> None:
    """Its name may stay while it changes, and change while it stays."""
    mine, copy = (tmp_path / name for name in ("mine.json", "copy.json"))
    for file in (mine, copy):
        write_json(file, {"zero_optimization": {"stage": 2, "overlap_comm": False}})
    begun(tmp_path, world=1)
    write_json(
        tmp_path / "sft" / "checkpoints" / "step-000020" / "state.json",
        {"step": 20, "world": 1, "began": 1, "cut": going_on.cut_of(settings(f"zero={mine}"))},
    )
    assert going_on.spoken_cut(tmp_path / "sft", settings(f"zero={copy}"), 1) == ""
    write_json(mine, {"zero_optimization": {"stage": 3, "overlap_comm": False}})
    assert going_on.cut_anew(tmp_path / "sft", settings(f"zero={mine}"), 1) == [
        (f"train.zero: {mine}: zero_optimization.stage", 2, 3)
    ]
    assert f"train.zero=zero0 (it was {mine})" in going_on.spoken_cut(tmp_path / "sft", settings(), 1)
    noted(tmp_path, "Muon", None)
    assert f"resume with train.zero: {mine}: zero_optimization.stage=2" in refused(tmp_path, f"zero={mine}")


def test_what_cannot_be_cut_anew_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path, world=2)
    old = "was written by an older version, for as many processes and one ZeRO stage: resume with gpus=2"
    assert old in refused(tmp_path)
    noted(tmp_path, "Muon", None)
    line = refused(tmp_path, "zero=zero3")
    assert "by 2 processes under ZeRO stage 0, and what Muon keeps there cannot be cut anew" in line
    assert "resume with gpus=2 train.zero=zero0" in line
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert opened(tmp_path)
    assert "resume with train.zero=zero0" in refused(tmp_path, "zero=zero1")


def test_results_of_unknown_origin_are_not_overwritten(tmp_path: Path) -> None:
    write_json(tmp_path / "sft" / "results.json", {})
    assert "not what made them" in refused(tmp_path)


def test_fingerprints_of_adapters_follow_the_model_below(tmp_path: Path) -> None:
    adapters, below = tmp_path / "adapters", tmp_path / "below"
    for folder in (adapters, below):
        folder.mkdir()
    files.write_json(adapters / "adapter_config.json", {"base_model_name_or_path": str(below)})
    (below / "weights").write_bytes(b"1")
    first = files.fingerprint(adapters)
    (below / "weights").write_bytes(b"2")
    assert files.fingerprint(adapters) != first
    # adapters that name each other end, too, and a broken description is told by who opens the model
    files.write_json(below / "adapter_config.json", {"base_model_name_or_path": str(adapters)})
    assert files.fingerprint(adapters) != files.fingerprint(below)
    (adapters / "adapter_config.json").write_text("{")
    assert files.fingerprint(adapters) != first


def test_fingerprints_follow_names_and_bytes(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "a.bin").write_bytes(b"one")
    (model / "b.bin").write_bytes(b"two")
    first = files.fingerprint(model)
    assert files.fingerprint(str(model)) == first
    (model / "a.bin").write_bytes(b"0ne")
    changed = files.fingerprint(model)
    (model / "a.bin").write_bytes(b"one")
    assert files.fingerprint(model) == first
    (model / "a.bin").rename(model / "c.bin")
    assert len({first, changed, files.fingerprint(model), files.fingerprint(model / "b.bin")}) == 4
    assert files.fingerprint("org/name") != files.fingerprint("org/other")


def test_where_stages_lie(tmp_path: Path) -> None:
    here = settings(f"runs_dir={tmp_path}", "run=r")
    assert run_dir.stage_dir(here, "sft") == tmp_path / "r" / "sft"
    named = settings(f"runs_dir={tmp_path}", "run=r", "name=one")
    assert run_dir.stage_dir(named, "sft") == tmp_path / "r" / "sft" / "one"


def test_only_finished_models_count(tmp_path: Path) -> None:
    here = settings(f"runs_dir={tmp_path}", "run=r")
    model = tmp_path / "r" / "sft" / "model"
    model.mkdir(parents=True)
    assert run_dir.model_of(here, "sft") is None
    write_json(model.parent / "results.json", {})
    assert run_dir.model_of(here, "sft") == model
    for name, done in (("b", True), ("a", True), ("c", False)):
        folder = tmp_path / "r" / "reward" / name
        (folder / "model").mkdir(parents=True)
        if done:
            write_json(folder / "results.json", {})
    assert run_dir.reward_models(here) == {name: str(tmp_path / "r" / "reward" / name / "model") for name in ("a", "b")}
