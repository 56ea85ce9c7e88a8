"""What a start would refuse: told at once, all of it by a dry run, and of later steps before the first one starts."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config.resolve import resolve_steps
from pipeline.config.yaml_layers import ROOT
from pipeline.launch import machine, run_dir
from stages import faults, inputs
from stages.__main__ import main
from tests.mistakes import answers, lines, pairs, scored

JUDGED_AS_SCORED = ["stage=compare", "recipe=smollm2", "run=own", "algos=alol", "seeds=1,2", "share_before=true"]
JUDGED_AS_SCORED += ["model=MODEL", "data.path=null", "data.train=prompts.jsonl", "reward=length"]
SECONDS = 2.0  # of processor time that a mistake may cost; 0.6 to 0.9 on two idle cores


def stages(*words: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    argv = [sys.executable, "-m", "stages", *words]
    return subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def of(*words: str) -> list[str]:
    return faults.of(resolve_steps(words), {})


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows of each kind, and a model's directory as far as it is looked at."""
    monkeypatch.chdir(tmp_path)
    rows = {"answers": answers(), "scored": scored(), "pairs": pairs(), "prompts": [{"prompt": "Why?"}] * 3}
    rows["rated"] = [{**row, "rewards": {"kind": i, "brief": -i}} for i, row in enumerate(answers())]
    for name, content in rows.items():
        Path(f"{name}.jsonl").write_text(lines(content))
    Path("MODEL").mkdir()
    Path("MODEL/config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage=sft", "data.train=missing.jsonl"], "missing.jsonl: no such file"),
        (["stage=rl", "data.train=scored.jsonl"], "holds no model to start from"),
        (["stage=rl", "model=MODEL", "data.train=scored.jsonl", "reward=lenght"], "did you mean 'length'?"),
        (["recipe=demo", "reward=lenght"], "did you mean 'length'?"),  # of the fourth step
        (["stage=report", "run=none"], "no stage has left"),
    ],
)
def test_a_mistake_costs_little_processor_time(here: Path, words: list[str], message: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = stages(*words, cwd=here)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert spent < SECONDS
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["recipe=demo"],
        ["stage=sft", "data.train=answers.jsonl"],
        ["stage=sft", "data.train=owner/name"],  # the hub is not asked
        ["stage=sft", "data.path=owner/name", "model=owner/name"],
        ["stage=reward", "name=x", "data.train=pairs.jsonl"],
        ["stage=reward", "name=x", "data.train=scored.jsonl"],
        ["stage=rl", "model=MODEL", "data.train=scored.jsonl"],
        ["stage=rl", "model=MODEL", "data.train=answers.jsonl", "reward=rouge:rougeL"],
        ["stage=rl", "model=MODEL", "data.train=answers.jsonl", "algo=nll"],
        ["stage=rl", "model=MODEL", "data.train=rated.jsonl", "reward={kind: 1.0, length: 0.1}", "value.targets=data"],
        [
            "stage=rl",
            "model=MODEL",
            "data.train=scored.jsonl",
            "algo=wbc",
            "reward=reward",
            "rewards.normalise=standardise",
        ],
        ["stage=rl", "model=MODEL", "data.train=owner/name", "algo=wbc", "reward=whatever"],
        ["stage=score", "data.train=rated.jsonl", "reward=rows:kind"],
        ["stage=rl", "model=MODEL", "data.train=pairs.jsonl", "algo=dpo"],
        ["stage=rl", "model=MODEL", "data.train=prompts.jsonl", "algo=esrl", "reward=length"],
        ["stage=score", "data.train=pairs.jsonl", "reward=http://localhost:1/score"],
        ["stage=generate", "policy=MODEL", "data.test=prompts.jsonl", "splits=[test]"],
        ["stage=evaluate", "policies={a: MODEL}", "data.test=prompts.jsonl", "reward=length"],
        ["stage=compare", "recipe=demo", "algos=alol,nll", "seeds=1,2"],
        [*JUDGED_AS_SCORED, "evaluate.data.test=runs/own-seed1/score/train.jsonl"],
        [*JUDGED_AS_SCORED, "evaluate.data.path=runs/own-seed1/score", "evaluate.data.train=null"],
    ],
    ids=" ".join,
)
def test_what_is_right_has_no_fault(words: list[str]) -> None:
    assert of(*words) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage=sft"], "data: none is named"),
        (["stage=sft", "data.path=./nowhere"], "no such file or folder"),
        (["stage=sft", "data.train=prompts.jsonl"], "neither a completion nor chosen and rejected"),
        (["stage=reward", "name=x", "data.train=answers.jsonl"], "no reward, wanted a scored row"),
        (["stage=rl", "model=MODEL", "data.train=answers.jsonl"], "no reward, and nothing to score it with"),
        (["stage=rl", "model=MODEL", "data.train=prompts.jsonl", "algo=esrl"], "nothing to judge new texts with"),
        (["stage=rl", "model=MODEL", "data.train=rated.jsonl"], "rewards by name (kind, brief) and no `reward`"),
        (["stage=rl", "model=MODEL", "data.train=rated.jsonl"], "reward='{kind: 1.0, brief: 1.0}'"),
        (["stage=score", "data.train=rated.jsonl"], "or reward='{kind: 1.0, brief: 1.0}', which the rows bring"),
        (["stage=rl", "model=MODEL", "data.train=rated.jsonl", "reward=kin"], "(kind, brief) nor a reward model"),
        (
            ["stage=rl", "model=MODEL", "data.train=rated.jsonl", "reward=kind", "value.targets=policy"],
            "nothing can score new responses",
        ),
        (["stage=rl", "model=MODEL", "data.train=prompts.jsonl", "algo=wbc", "reward=kind"], "neither a completion"),
        (["stage=rl", "model=MODEL", "data.train=rated.jsonl", "algo=esrl", "reward=kind"], "it judges no new text"),
        (["stage=rl", "model=MODEL", "data.train=rated.jsonl", "algo=reinforce", "reward=rows:x"], "judges no new"),
        (
            ["stage=evaluate", "policies={a: MODEL}", "data.test=rated.jsonl", "reward=length", "monitors=[kind]"],
            "reward 'kind': the rows bring it, so that it judges no new text",
        ),
        (
            [
                "stage=rl",
                "model=MODEL",
                "data.train=prompts.jsonl",
                "algo=esrl",
                "reward=length",
                "rewards.normalise=standardise",
            ],
            "this stage scores no logged rows",
        ),
        (["stage=score", "data.train=answers.jsonl", "reward=length", "rewards.normalise={lenght: none}"], "'length'?"),
        (
            ["stage=evaluate", "policies={a: MODEL}", "data.train=answers.jsonl", "data.validation_fraction=0"],
            "no test split",
        ),
        (["stage=sft", "data.train=answers.jsonl", "model=./nowhere"], "./nowhere does not exist"),
        (["stage=compare", "recipe=demo", "algos=alol", "seeds=1", "rl={reward: lenght}"], "did you mean 'length'?"),
        ([*JUDGED_AS_SCORED, "evaluate.data.test=runs/own-seed2/score/train.jsonl"], "own-seed2/score"),
        (["stage=sft", "data.train=answers.jsonl", "attn_implementation=flash_attention_2"], "set sdpa"),
        (
            ["stage=generate", "policy=MODEL", "data.test=prompts.jsonl", "max_tokens=99"],
            "train.max_tokens: stage=generate reads train.precision, train.zero, train.padding_free alone: "
            "leave it out; 64 prompts are",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_one_fault(words: list[str], message: str) -> None:
    (line,) = of(*words)
    assert message in line


def test_a_reward_is_looked_at_and_not_run(here: Path) -> None:
    words = ["stage=score", "data.train=answers.jsonl"]
    start = "import atexit\nopen('ran', 'w')\n"
    for text, message in (
        ("def reward(prompts, completions, **columns): return []\n", None),
        ("from elsewhere import *\n", "imports elsewhere, which is not installed here"),
        ("import sys\nsys.path.append('lib')\nfrom elsewhere import *\n", None),  # who knows what is there
        ("try:\n    import elsewhere\nexcept ImportError:\n    pass\nreward = print\n", None),
        ("def one(): ...\ndef two(): ...\n", "2 functions (one, two), wanted one of them named"),
        ("x = 1\n", "no function 'reward'"),
        ("if 1:\n", "IndentationError"),
    ):
        (here / "judge.py").write_text(start + text)
        found = of(*words, "reward=judge.py")
        assert (not found) if message is None else (len(found) == 1 and message in found[0]), (text, found)
    assert not (here / "ran").exists()


def test_a_dry_run_shows_every_fault_and_writes_nothing(here: Path) -> None:
    before = sorted(here.rglob("*"))
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ["stage=rl", "model=owner/name", "data.train=missing.jsonl", "reward=judge.py", "fp16=true", "clip=1.5"]
        words += ["gpus=3", f"master_port={port}", "batch_size=4"]
        done = stages(*words, "dry_run=true", cwd=here, HF_HUB_OFFLINE="1")
        refused = stages(*words, cwd=here)
    said = (
        "no multiple of processes 3",
        "cannot be had",
        "missing.jsonl: no such file",
        "judge.py: there is no such file",
        "clip: 1.5",
        "a Hugging Face name that this machine can reach",
        *(() if machine.has_gpu() else ("fp16 needs a GPU",)),
    )
    told = [line for line in done.stderr.splitlines() if line.startswith("tiffin: fault ")]
    assert done.returncode == 2 and len(told) == len(said), done.stderr
    assert all(sum(part in line for line in told) == 1 for part in said), told
    assert "train.batch_size=4" in done.stdout and "default: 64" in done.stdout and "\nfp16" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("bash run.sh stage=rl model=owner/name")  # on that port none starts
    assert sorted(here.rglob("*")) == before
    first, many = told[0].split(": ", 2)[2], len(told) - 2  # the last two are of torch and of the hub: a stage's own
    assert refused.stderr.splitlines()[-1] == f"tiffin: {first} (and {many - 1} more: dry_run=true shows them)"


def test_a_dry_run_of_what_may_start_ends_with_the_command(here: Path) -> None:
    done = stages("stage=sft", "data.train=answers.jsonl", "batch_size=8", "dry_run=true", cwd=here)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.splitlines()[-1].endswith("-m stages.sft stage=sft data.train=answers.jsonl batch_size=8")
    assert "GB per process" in done.stdout
    assert re.search(r"^#   train\.batch_size=8 +default: 64$", done.stdout, re.MULTILINE)


def test_a_dry_run_finds_no_fault_in_an_algorithm_that_a_stage_does_not_train_by(capsys) -> None:
    assert main(["stage=plan", "parameters=8e9", "dry_run=true"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[-1].endswith("-m stages.plan stage=plan parameters=8e9")


def test_a_directory_of_another_start_is_a_fault(here: Path) -> None:
    words = ["stage=sft", "data.train=answers.jsonl"]
    (step,) = resolve_steps(words)
    directory = run_dir.stage_dir(step.settings, "sft")
    assert run_dir.open_stage(directory, step.settings, words, inputs.of_sft(step.settings))
    (directory / "results.json").write_text(json.dumps({}))
    assert of(*words) == []  # it is done, and this process holds it
    (line,) = of(*words, "seed=2")
    assert "was started with seed=1, now it is 2" in line
    (directory / "results.json").unlink()
    code = "import sys; from stages.faults import of; from pipeline.config.resolve import resolve_steps as all; "
    argv = [sys.executable, "-c", f"{code}print(*of(all(sys.argv[1:]), {{}}))", *words]  # a dry run's, without torch
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    assert shown.stdout.startswith("runs/default/sft: another process is at work there"), shown.stderr
    assert shown.stdout.count("\n") == 1


def test_gpus_are_those_that_may_be_taken(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    assert machine.gpus({}, tmp_path) == 0
    for number in range(4):
        (tmp_path / f"dev/nvidia{number}").touch()
    assert machine.gpus({}, tmp_path) == 4
    for named, count in (("0,2", 2), ("", 0), ("-1", 0), ("1,-1,2", 1)):
        assert machine.gpus({"CUDA_VISIBLE_DEVICES": named}, tmp_path) == count


# The environment that run.sh makes.


def test_python_that_is_not_used_is_said_and_ctrl_c_is_one_line(here: Path) -> None:
    """In a checkout of one's own, by a Python without packages, which would go on to install them."""
    (here / "pipeline/launch").mkdir(parents=True)
    for name in ("setup.py", "constraints.txt", "pipeline/launch/environment.py"):
        (here / name).write_text((ROOT / name).read_text())
    argv = [sys.executable, "-S", "pipeline/launch/environment.py"]
    env = {**os.environ, "PYTHON": "my-python"}
    making = subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    said = making.stderr.readline()
    assert said.startswith("tiffin: PYTHON=my-python is not used, it lacks torch>=2.6 and ") and ".venv is\n" in said
    assert "making" in making.stderr.readline() or "compiler" in said
    os.killpg(making.pid, signal.SIGINT)
    rest = making.stderr.read()
    assert making.wait() == 130 and rest.splitlines()[-1].startswith("tiffin: stopped by Ctrl-C"), rest
    assert "Traceback" not in rest and not (here / ".venv/.tiffin-ready").exists()
