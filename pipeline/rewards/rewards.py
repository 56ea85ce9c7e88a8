"""Several reward models -> one reward per response: names, calls, checks, normalisation, weights.

A reward is a function `reward(prompts, completions, **columns) -> list[float]`, called with keywords, as TRL does.
What it returns is checked, normalised, and added up with its weight. Normalisation:

    none       the raw value
    sigmoid    1 / (1 + e^-x), in (0, 1)

Neither knows of other responses, so that a response has one reward, whatever it is scored with.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np

from pipeline import plugins
from pipeline.config.reward_spec import is_address
from pipeline.errors import UserError, did_you_mean
from pipeline.records import RewardFunction, Scores
from pipeline.rewards.workers import Judges

FOLDER = "reward_models"
LARGEST = 3.4e38  # of a float32, in which models are trained
SHOWN = 80  # characters of a text in a message

Normalise = Literal["none", "sigmoid"]


@dataclass(frozen=True)
class Reward:
    """One reward model, its weight in the sum, and what is done to its values before."""

    name: str
    weight: float
    function: RewardFunction
    normalise: Normalise = "none"


class Rewards:
    """The rewards of a run; those that `judges` know are called in worker processes."""

    def __init__(self, rewards: Sequence[Reward], judges: Judges | None = None) -> None:
        assert rewards, "a run that scores has at least one reward"
        names = [reward.name for reward in rewards]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"reward: {twice} is named twice, wanted once: a reward needs no monitor of the same name")
        self.rewards, self._judges = tuple(rewards), judges

    @property
    def elsewhere(self) -> bool:
        """Whether some reward is called in worker processes, so that `begin` saves time."""
        return self._judges is not None

    def score(self, prompts: list[str], completions: list[str], columns: Mapping[str, list]) -> Scores:
        """Raw and normalised values by reward, and their weighted sum, one per completion. Raises UserError."""
        return self.begin(prompts, completions, columns)()

    def begin(self, prompts: list[str], completions: list[str], columns: Mapping[str, list]) -> Callable[[], Scores]:
        """Have worker processes begin; what is returned calls the other rewards and gives, or raises, as `score`."""
        judges, given = self._judges, (prompts, completions, columns)
        apart = [reward.name for reward in self.rewards if judges is not None and reward.name in judges.names]
        waiting = judges.ask(apart, *given) if apart else dict

        def scores() -> Scores:
            here = {reward.name: call(reward, *given) for reward in self.rewards if reward.name not in apart}
            found = here | waiting()
            return self._scores({reward.name: found[reward.name] for reward in self.rewards})

        return scores

    def _scores(self, raw: dict[str, list[float]]) -> Scores:
        normalised = {reward.name: _normalised(reward, raw[reward.name]) for reward in self.rewards}
        weighted = [[reward.weight * x for x in normalised[reward.name]] for reward in self.rewards]
        return Scores(raw, normalised, [sum(parts) for parts in zip(*weighted, strict=True)])


def call(
    reward: Reward, prompts: list[str], completions: list[str], columns: Mapping[str, list], first: int = 0
) -> list[float]:
    """The reward's values, checked: one finite float per completion. It is not called for no completions.

    `first`: the number that messages give the first completion.
    """
    if not completions:
        return []
    lists = {name: list(values) for name, values in columns.items()}  # its own: it may change them
    run = partial(reward.function, prompts=list(prompts), completions=list(completions), **lists)
    place = f"reward {reward.name}, called with the columns {', '.join(columns) or '(none)'}"
    return checked(reward.name, plugins.guarded(place, run), completions, first)


def checked(name: str, values: object, completions: Sequence[str], first: int = 0) -> list[float]:
    """`values` as floats. Accepted: list, tuple, 1-d array or tensor of real numbers, numpy and 0-d tensor scalars too.

    Booleans count as 0 and 1. Raises UserError that names the reward, the index and the text.
    """
    if isinstance(values, np.ndarray) or _is_tensor(values):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        raise UserError(
            f"reward {name}: it returned a {type(values).__name__}, wanted a list of one float per completion"
        )
    if len(values) != len(completions):
        raise UserError(
            f"reward {name}: it returned {len(values)} values for {len(completions)} completions, wanted one for each"
        )
    pairs = zip(values, completions, strict=True)
    return [_number(name, i, value, text) for i, (value, text) in enumerate(pairs, first)]


def bounds(rewards: Sequence[Reward]) -> tuple[float, float] | None:
    """The least and the greatest total, if every reward goes through the sigmoid; None if the total has no bounds."""
    if any(reward.normalise != "sigmoid" for reward in rewards):
        return None
    weights = [reward.weight for reward in rewards]
    return sum(min(weight, 0.0) for weight in weights), sum(max(weight, 0.0) for weight in weights)


def resolve(
    name: str,
    learned: Callable[[str], RewardFunction],
    served: Callable[[str], RewardFunction],
    trained: Mapping[str, str],
) -> RewardFunction:
    """The function of a reward: a server, a model trained in this run, a classifier's directory, a file, or our folder.

    `trained` gives the directories of this run's reward models by name; `learned(directory)` makes a function of one,
    `served(address)` of a server.
    Raises UserError for a name that is none of these, or a function that does not take **columns.
    """
    if is_address(name):
        return served(name)
    if is_learned(name, trained):
        return learned(trained.get(name, name))
    return loaded(name, trained)


def is_learned(name: str, trained: Mapping[str, str]) -> bool:
    """Whether a reward is a model: one trained in this run, or a classifier's directory."""
    return name in trained or (Path(name) / "config.json").is_file()


def loaded(name: str, trained: Mapping[str, str] = MappingProxyType({})) -> RewardFunction:
    """The function of a reward that is no model; `trained` are the models that a message offers. Raises UserError."""
    source, _ = plugins.split(name)
    if not source.endswith(".py") and source not in plugins.available(FOLDER):
        raise UserError(f"reward {name!r}: {_unknown(source, trained)}")
    function = plugins.load(name, FOLDER, "reward", "reward")
    if not _takes_columns(function):
        wanted = "def reward(prompts, completions, **columns)"
        raise UserError(f"reward {name!r}: it must take the data's columns by keyword, wanted {wanted}")
    return function


def _takes_columns(function: Callable) -> bool:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # a builtin that does not tell
        return False
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def _unknown(name: str, trained: Mapping[str, str]) -> str:
    if Path(name).is_dir():
        return "this directory has no config.json, wanted the model/ directory of a reward model"
    files = plugins.available(FOLDER, "reward")
    return (
        f"neither a reward model trained in this run ({', '.join(sorted(trained)) or 'none yet'}) "
        f"nor a file in {FOLDER}/ ({', '.join(files)}){did_you_mean(name, [*trained, *files])}; "
        f"`bash run.sh stage=reward name=NAME` trains one, a file of your own is given by its path ending in .py"
    )


def _normalised(reward: Reward, values: list[float]) -> list[float]:
    return [_sigmoid(value) for value in values] if reward.normalise == "sigmoid" else values


def _sigmoid(x: float) -> float:
    small = math.exp(-abs(x))  # in (0, 1]: cannot overflow
    return 1 / (1 + small) if x >= 0 else small / (1 + small)


def _number(name: str, index: int, value: object, text: str) -> float:
    if (isinstance(value, np.generic | np.ndarray) or _is_tensor(value)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, Real) and abs(value) <= LARGEST:
        return float(value)
    found = f"{value!r:.40}" if value is None or isinstance(value, Real | str) else f"a {type(value).__name__}"
    cure = "a reward that cannot score a text must raise, and say why"
    raise UserError(f"reward {name}: {found} for completion {index} '{shortened(text)}', wanted a finite float; {cure}")


def _is_tensor(value: object) -> bool:
    """Whether it is torch's; a worker process whose rewards do without torch does not load it."""
    return "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor)


def shortened(text: str) -> str:
    """The text in one line of at most SHOWN characters, with escapes for line ends and what does not print."""
    shown = repr(text)[1:-1]
    return shown if len(shown) <= SHOWN else shown[: SHOWN - 3] + "..."
