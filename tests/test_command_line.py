"""`python -m stages` as a user meets it: help, dry runs, and one line with exit code 2 for each mistake."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.resolve import resolve
from pipeline.config.schema import STAGES
from pipeline.config.yaml_layers import ROOT
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.launch import environment, machine, run_dir
from stages import inputs
from stages.__main__ import main, side_by_side
from tests.mistakes import lines, scored


def stages(*words: str, cwd: Path, module: str = "stages") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", module, *words]
    return subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)


MISTAKES = [
    (["sft"], "did you mean 'stage=sft'?"),
    (["stage=sfd"], "did you mean 'sft'?"),
    (["recipe=nothing"], "recipe=nothing: wanted one of"),
    (["stage=rl", "algo=a_loll"], "did you mean"),
    (["stage=sft", "learning_rte=1e-5"], "did you mean 'learning_rate'?"),
    (["stage=sft", "learning_rate=fast"], "'fast' is text, wanted a number"),
    (["stage=sft", "train.batch_size=0"], "train.batch_size: 0, wanted at least 1"),
    (["stage=sft", "precision=fp8"], "wanted fp32, bf16 or fp16"),
    (["stage=sft", "lr=1", "learning_rate=2"], "given twice"),
    (["stage=sft", "config=missing.yaml"], "missing.yaml: cannot be read"),
    (["stage=sft", "hostfile=missing"], "missing is not a file"),
    (["stage=sft", "dry_run=yes"], "dry_run='yes', wanted true or false"),
    (["stage=sft", "max_steps=10", "num_train_epochs=1.0"], "wanted one of num_train_epochs and max_steps"),
    (["--stage", "sft"], "without dashes"),
    (["stage=sft", "max_steps"], "give it a value: max_steps=..."),
    (["stage=sft", "data.train=missing.jsonl", "zero=zero9"], "train.zero: 'zero9' is no file"),  # before data are read
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_mistakes(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """What a process makes of it, code 2 and a line, test_faults.py sees."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        main(words)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_help_is_quick_and_lists_what_the_folders_hold(tmp_path: Path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = stages("stage=help", cwd=tmp_path)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    assert spent < 3  # seconds of processor time; below 1 on an idle machine: torch is not loaded
    assert done.returncode == 0 and done.stderr == ""
    for name in [*STAGES, "alol", "a_lol", "oracle", "assistant", "dry_run=true"]:
        assert name in done.stdout


def test_help_says_which_words_it_does_not_use(tmp_path: Path):
    done = stages("stage=help", "algo=alol", cwd=tmp_path)
    assert done.returncode == 0 and "Algorithms (algo=)" in done.stdout
    assert done.stderr == "tiffin: stage=help explains all at once, algo=alol makes no difference\n"


def test_the_command_line_does_not_load_torch(tmp_path: Path):
    code = (
        "import sys, stages.__main__ as main\n"
        "import stages.compare, stages.plan, stages.report\n"
        "assert main.main(['stage=help']) == 0\n"
        "main.resolve_steps(['stage=rl'])\n"
        "assert not {'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


FILES = {
    "MODEL/config.json": "{}",
    "rows.jsonl": lines(scored()),
    "judge.py": "def reward(prompts, completions, **columns): ...",
}
FINISHED = ["stage=rl", "model=MODEL", "data.train=rows.jsonl", "reward=judge.py"]


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a finished stage, with what it started from: a model, rows and a reward of one's own."""
    monkeypatch.chdir(tmp_path)
    Path("MODEL").mkdir()
    for file, text in FILES.items():
        Path(file).write_text(text)
    settings = resolve(FINISHED).settings
    directory = run_dir.stage_dir(settings, "rl")
    pid = os.fork()
    if pid == 0:  # whose end lets the directory go
        os._exit(not run_dir.open_stage(directory, settings, FINISHED, inputs.of_rl(settings)))
    assert os.waitpid(pid, 0)[1] == 0
    write_json(directory / "results.json", {})
    return FINISHED


def without_processes(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command line where no stage can be started, nor torch be loaded."""
    code = (
        "import sys, stages.__main__ as main\n"
        "from pipeline.launch.entry import leave\n"
        "sys.executable, sys.modules['torch'] = '/nowhere', None\n"
        f"leave(lambda: main.main({list(words)!r}))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_what_is_done_is_told_without_starting_it(finished: list[str], tmp_path: Path):
    done = without_processes(*finished, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "runs/default/rl is done; remove it to do it again\n"), done.stderr
    (tmp_path / "runs/default/rl/results.json").unlink()
    assert "/nowhere" in without_processes(*finished, cwd=tmp_path).stderr  # it would be started


@pytest.mark.parametrize("file", [*FILES])
def test_what_is_done_with_other_inputs_is_refused_without_starting_it(finished: list[str], tmp_path: Path, file: str):
    (tmp_path / file).write_text("another")
    done = without_processes(*finished, cwd=tmp_path)
    name = {"MODEL/config.json": "model", "rows.jsonl": "data.train", "judge.py": "reward judge.py"}[file]
    assert done.returncode == 2 and f"runs/default/rl: its {name} has changed since it was started" in done.stderr


def test_what_was_begun_with_other_settings_is_refused_without_starting_it(finished: list[str], tmp_path: Path):
    (tmp_path / "runs/default/rl/results.json").unlink()
    checkpoints = tmp_path / "runs/default/rl/checkpoints"
    write_json(checkpoints / "step-000020/state.json", {"step": 20, "world": 1})
    (checkpoints / "latest").write_text("step-000020\n")
    done = without_processes(*finished, "seed=2", cwd=tmp_path)
    assert done.returncode == 2 and "runs/default/rl: was started with seed=1, now it is 2" in done.stderr


def test_ranks_find_out_together_whether_a_stage_is_done(finished: list[str], tmp_path: Path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "/nowhere" in without_processes(*finished, cwd=tmp_path).stderr


def test_dry_run_of_one_stage_begins_nothing(tmp_path: Path):
    done = stages("stage=report", "run=x", "dry_run=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "-m stages.report stage=report run=x\n" in done.stdout and "\nrun: x\n" in done.stdout
    assert not list(tmp_path.iterdir())


def test_test_words_go_to_pytest(tmp_path: Path):
    done = stages("stage=test", "tests/test_command_line.py", "-k", "test_mistakes", "--collect-only", cwd=tmp_path)
    assert done.returncode == 0 and f"{len(MISTAKES)}/" in done.stdout


def test_all_tests_share_the_cores_and_chosen_ones_do_not():
    assert side_by_side(["-q", "-x", "--durations=9"], 2) == [
        *["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    ]
    assert side_by_side([], 64)[:2] == ["-n", "4"]
    for words in (["tests/test_data.py"], ["-k", "data"], ["-s"], ["--pdb"], ["-n", "3"], ["-n0"], ["-p", "no:xdist"]):
        assert side_by_side(words, 2) == [], words
    assert side_by_side([], 1) == []


@pytest.mark.skipif(machine.has_gpu(), reason="there is a GPU here")
def test_without_a_gpu_its_checks_are_one_line(tmp_path: Path):
    done = stages("stage=test", "gpu", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "stage=test gpu: no GPU here, so that none of its checks is made\n"


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_its_files(stage: str):
    assert (ROOT / "stages" / f"{stage}.yaml").is_file() and (ROOT / "stages" / f"{stage}.py").is_file()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH is of Python 3.11")
def test_the_installed_command_is_the_command_line(tmp_path: Path):
    """Also where a folder called like ours lies: neither the command nor the stages that it starts are of there."""
    module, function = re.search(r'"tiffin = ([\w.]+):(\w+)"', (ROOT / "setup.py").read_text()).groups()
    for file in ("bin/tiffin", "here/stages/__init__.py", "here/stages/report.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "bin/tiffin").write_text(f"from {module} import {function}\n{function}()\n")
    argv = [sys.executable, str(tmp_path / "bin/tiffin"), "stage=report", "run=none"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=tmp_path / "here", env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("tiffin: runs/none"), done


# The environment of run.sh.


def test_release_numbers():
    assert environment.release("2.13.0+cpu") == (2, 13)
    assert environment.release("2.6.0a0+git") == (2, 6)
    assert environment.release("2026.9.0") == (2026, 9)


def test_missing_names_what_this_python_lacks():
    assert environment.missing(["pytest>=1", "pytest>=1,<9999", "torch>=2.6"]) == []
    assert environment.missing(["pytest>=9999", "pytest<1", "no-such-package>=1"]) == [
        "pytest>=9999",
        "pytest<1",
        "no-such-package>=1",
    ]


def test_this_python_is_within_the_ranges_and_every_range_has_a_pin():
    ranges = environment.requirements(dev=True)
    assert environment.missing(ranges) == []
    pins = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split("\n")
    }
    assert {one.split(">=")[0].lower() for one in ranges} <= pins
