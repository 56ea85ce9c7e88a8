"""What `stage=help` prints: usage, and what the folders hold. The folders are the lists."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pipeline import plugins
from pipeline.config.aliases import ALGORITHM_IDS, ALIASES, SWITCHES
from pipeline.config.schema import STAGES
from pipeline.config.yaml_layers import ROOT, first_comment

USAGE = """\
bash run.sh [stage=STAGE] [recipe=RECIPE] [config=FILE.yaml] [key=value ...]

Without stage=, all steps of the recipe run in order (recipe=demo if none is named); what is done is not done again.
Dotted keys reach into the YAML: optimizer.learning_rate=1e-5. Paths are relative to where you are; results go to
runs/<run>/<stage>/. dry_run=true prints settings, memory, all that a start would refuse, and the commands.

Examples
  bash run.sh
  bash run.sh stage=sft model=meta-llama/Llama-3.1-8B data.train=hh.jsonl gpus=8 zero=zero3 bf16=true
  bash run.sh stage=reward name=helpfulness data.train=pairs.jsonl
  bash run.sh stage=rl algo=alol learning_rate=1e-5 reward='{helpfulness: 1.0, my_rewards/brief.py: 0.2}'
  bash run.sh recipe=hh data.path=hh/ run=hh
  bash run.sh stage=rl algo=alol dry_run=true
  bash run.sh stage=test tests/test_config.py -k override      # all words but stage=test go to pytest"""


def help_text() -> str:
    """The whole page."""
    folder = ROOT / "stages"
    stages = {name: first_comment(folder / f"{name}.yaml") for name in STAGES}
    stages |= {
        "test": "The tests, in this environment; with the word gpu what a GPU alone can show.",
        "help": "This page.",
    }
    algorithms = _described(folder / "algo")
    algorithms |= {name: f"Published name of {target}." for name, target in ALGORITHM_IDS.items()}
    names: dict[str, list[str]] = {}
    for name, target in ALIASES.items():
        names.setdefault(target, []).append(name)
    short = [f"{', '.join(others)} = {target}" for target, others in names.items()]
    short += [f"{name}=true is {setting}={value}" for name, (setting, value) in SWITCHES.items()]
    rewards = [*plugins.available("reward_models", "reward"), "your/file.py", "http://HOST:PORT/PATH", "rows:NAME"]
    parts = [
        USAGE,
        _table("Stages (stage=)", stages),
        _table("Algorithms (algo=)", algorithms),
        _table("Recipes (recipe=)", _described(folder / "recipes")),
        _row("Rewards (reward=)", rewards),
        _row("Tasks (task=)", [*plugins.available("pipeline.tasks", "examples"), "your/task.py"]),
        "Settings with their defaults: stages/common.yaml and stages/<stage>.yaml. Short names:",
        _wrapped(short),
    ]
    return "\n\n".join(parts)


def _described(folder: Path) -> dict[str, str]:
    return {path.stem: first_comment(path) for path in sorted(folder.glob("*.yaml"))}


def _table(title: str, rows: dict[str, str]) -> str:
    width = max((len(name) for name in rows), default=0)
    return "\n".join([title, *(f"  {name:{width}}  {text}" for name, text in rows.items())])


def _row(title: str, names: Iterable[str]) -> str:
    return f"{title}\n  {', '.join(names)}"


def _wrapped(words: Iterable[str], width: int = 116) -> str:
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) + 2 > width:
            lines.append("")
        lines[-1] += f"  {word}"
    return "\n".join(lines)
