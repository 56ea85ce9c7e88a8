"""Several reward models -> one reward per response: names, calls, checks, normalisation, weights.

A reward is a function `reward(prompts, completions, **columns) -> list[float]`, called with keywords, as TRL does.
What it returns is checked, normalised, and added up with its weight. Normalisation:

    none           the raw value
    sigmoid        1 / (1 + e^-x), in (0, 1)
    standardise    (x - mean) / std, both of the logged training rows and fixed before anything is added up

None knows of the responses that it is scored with, so that a response has one reward, whatever they are. A response
that a reward does not judge (None) is left out of that reward's part of the sum.

A reward may also be one that the logged rows bring by name (`own_rewards.py`): it says nothing of new texts.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from pipeline import plugins
from pipeline.config.reward_spec import ROWS, is_address, token
from pipeline.config.rewards import Scale
from pipeline.errors import UserError, did_you_mean
from pipeline.records import RewardFunction, Scores
from pipeline.rewards import own_rewards
from pipeline.rewards.workers import RewardWorkers
from reward_models import _named, _trl
from reward_models._trl import FOLDER, TrlFunction
from reward_models._values import checked, shortened

logger = logging.getLogger("tiffin")

MANY = 16  # different texts, to which a reward that tells texts apart gives different values
KEPT = 10_000  # texts that are kept to tell them apart: of more the first will do
EQUAL = 1e-4  # a standard deviation that is none, as a share of the values' size


@dataclass(frozen=True)
class WeightedReward:
    """One reward, its weight in the sum, and what is done to its values before."""

    name: str  # as tags and tables call it
    weight: float
    function: RewardFunction | None
    normalise: Literal["none", "sigmoid", "standardise"] | Scale = "none"  # a Scale once it is known
    reads_columns: bool = True  # whether it may use further columns of the data
    own: str | None = None  # the name of a reward that the rows bring; then there is no function
    given: str = ""  # what `reward=` says, where `name` is short for it

    @property
    def whole_name(self) -> str:
        """The one that says where it is, for messages of failures."""
        return self.given or self.name


@dataclass
class Seen:
    """What a reward gave to the texts so far, until there are enough to see whether it tells them apart."""

    texts: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)  # that it does not judge
    values: list[float] = field(default_factory=list)


class Rewards:
    """The rewards of a run; those that `workers` know are called in worker processes."""

    def __init__(
        self, rewards: Sequence[WeightedReward], workers: RewardWorkers | None = None, models: Collection[str] = ()
    ) -> None:
        """`models`: the names of the run's reward models, used or not, which messages offer."""
        assert rewards, "a run that scores has at least one reward"
        names = [reward.name for reward in rewards]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"reward: {twice} is named twice, wanted once: a reward needs no monitor of the same name")
        self.rewards, self._workers, self.models = tuple(rewards), workers, models
        self._seen = {name: Seen() for name in names}

    @property
    def elsewhere(self) -> bool:
        """Whether some reward is called in worker processes, so that `begin` saves time."""
        return self._workers is not None

    @property
    def reads_columns(self) -> bool:
        """Whether some reward may use further columns of the data."""
        return any(reward.reads_columns for reward in self.rewards)

    @property
    def own(self) -> list[WeightedReward]:
        """Those that the rows bring: no new text has them."""
        return [reward for reward in self.rewards if reward.own is not None]

    @property
    def functions(self) -> list[WeightedReward]:
        """Those that judge any text."""
        return [reward for reward in self.rewards if reward.own is None]

    @property
    def unsettled(self) -> list[str]:
        """The names of those whose mean and standard deviation are not known yet."""
        return [reward.name for reward in self.rewards if reward.normalise == "standardise"]

    def settle(self, scales: Mapping[str, Scale]) -> None:
        """Fix what the `unsettled` ones are standardised by, before anything is added up."""
        known = (replace(one, normalise=scales.get(one.name, one.normalise)) for one in self.rewards)
        self.rewards = tuple(known)

    def score(self, prompts: list[str], completions: list[str], columns: Mapping[str, list]) -> Scores:
        """Raw and normalised values by reward, and their weighted sum, one per completion. Raises UserError."""
        return self.begin(prompts, completions, columns)()

    def begin(self, prompts: list[str], completions: list[str], columns: Mapping[str, list]) -> Callable[[], Scores]:
        """Have worker processes begin; what is returned calls the other rewards and gives, or raises, as `score`."""
        values = self.begin_raw(prompts, completions, columns)
        return lambda: self.weighed(values(), completions, columns.get("id"))

    def begin_raw(
        self, prompts: list[str], completions: list[str], columns: Mapping[str, list]
    ) -> Callable[[], dict[str, list[float | None]]]:
        """As `begin`, for what each function says, before it is normalised and added up."""
        given, known = (prompts, completions, columns), () if self._workers is None else self._workers.names
        apart = [reward.name for reward in self.functions if reward.name in known]
        waiting = self._workers.ask(apart, *given) if apart else dict

        def values() -> dict[str, list[float | None]]:
            return {one.name: call(one, *given) for one in self.functions if one.name not in apart} | waiting()

        return values

    def weighed(
        self, raw: Mapping[str, list[float | None]], completions: Sequence[str], ids: Sequence[str] | None = None
    ) -> Scores:
        """The scores of `raw` values by reward; no sum where a part is missing, as what rows bring is of new texts.

        Raises UserError for a response that none judges.
        """
        assert not self.unsettled, f"standardised by what? {self.unsettled}"
        present = [reward for reward in self.rewards if reward.name in raw]
        normalised = {reward.name: _normalised(reward, raw[reward.name]) for reward in present}
        self._watch(normalised, completions)
        whole = all(reward.name in raw for reward in self.rewards if reward.weight)
        totals = self._totals(normalised, completions, ids) if whole else None
        return Scores({reward.name: raw[reward.name] for reward in present}, normalised, totals)

    def _totals(
        self, normalised: Mapping[str, list[float | None]], completions: Sequence[str], ids: Sequence[str] | None
    ) -> list[float]:
        """The weighted sum of those that judge each response. Raises UserError for one that none judges."""
        parts = [(reward.weight, normalised[reward.name]) for reward in self.rewards if reward.weight]
        totals = []
        for i in range(len(completions)):
            given = [weight * values[i] for weight, values in parts if values[i] is not None]
            if parts and not given:
                row = f"completion {i}" if ids is None else f"row {ids[i]}"
                names = ", ".join(reward.name for reward in self.rewards if reward.weight)
                text = shortened(completions[i])
                raise UserError(
                    f"reward: {row}: none of {names} judges '{text}' (all returned None), wanted a number "
                    "from one at least: leave the row out, or add a reward for it"
                )
            totals.append(sum(given))
        return totals

    def _watch(self, normalised: Mapping[str, list[float | None]], completions: Sequence[str]) -> None:
        """Say once of each reward that gives (nearly) the same, or nothing, to many different texts."""
        for name in [name for name in self._seen if name in normalised]:
            seen = self._seen[name]
            values = normalised[name]
            for text, value in zip(completions, values, strict=True):
                if len(seen.texts) == KEPT:
                    break
                if value is not None or len(seen.left) < KEPT:
                    (seen.left if value is None else seen.texts).add(text)
            seen.values.extend(value for value in values if value is not None)
            if len(seen.left) >= MANY and not seen.texts:
                del self._seen[name]
                nothing = f"None for each of {len(seen.left):,} different texts"
                logger.warning(f"reward {name}: {nothing}, wanted some of them judged")
                continue
            if len(seen.texts) < MANY:
                continue
            del self._seen[name]
            if (spread := statistics.pstdev(seen.values)) <= EQUAL * max(map(abs, seen.values)):
                same = f"{seen.values[0]:.4g} for each of {len(seen.texts):,} different texts"
                same += f" (standard deviation {spread:.1g})"
                logger.warning(f"reward {name}: {same}, wanted values that tell good from bad")


def call(
    reward: WeightedReward, prompts: list[str], completions: list[str], columns: Mapping[str, list], first: int = 0
) -> list[float | None]:
    """The reward's values, checked: a finite float or None per completion. It is not called for no completions.

    `first`: the number that messages give the first completion.
    """
    if not completions:
        return []
    lists = {name: list(values) for name, values in columns.items()}  # its own: it may change them
    run = partial(reward.function, prompts=list(prompts), completions=list(completions), **lists)
    place = f"reward {reward.whole_name}, called with the columns {', '.join(columns) or '(none)'}"
    return checked(reward.whole_name, plugins.guarded(place, run), completions, first, columns.get("id"))


def bounds(rewards: Sequence[WeightedReward]) -> tuple[float, float] | None:
    """The least and the greatest total, if every reward goes through the sigmoid; None if one has no bounds."""
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

    `trained` are the directories of this run's reward models by name; `learned(directory)` makes a function of one,
    `served(address)` of a server. Raises UserError for a name that is none of these, or what cannot be called.
    """
    if name.startswith(ROWS):
        raise own_rewards.no_judge_of_new_texts(name)
    if is_address(name):
        return served(name)
    if is_learned(name, trained):
        return learned(trained.get(name, name))
    return loaded(name, trained)


def is_own(name: str, trained: Collection[str]) -> bool:
    """Whether a reward is one that the rows bring: what is nothing of what `resolve` looks for before, and no path."""
    if name.startswith(ROWS):
        return True
    source, _ = plugins.split(name)
    other = is_address(name) or is_learned(name, trained) or source.endswith(".py") or "/" in name
    return not other and source not in plugins.available(FOLDER)


def is_learned(name: str, trained: Collection[str]) -> bool:
    """Whether a reward is a model: one trained in this run, a classifier's directory, or one on the hub."""
    return name in trained or _named.parts(name) is not None


def loaded(name: str, trained: Mapping[str, str] = MappingProxyType({})) -> TrlFunction:
    """The function of a reward that is no model; `trained` are the models that a message offers. Raises UserError."""
    _refuse_unknown(name, trained)
    return _trl.load(name)


def check(name: str, trained: Collection[str]) -> None:
    """What can be told of a reward without running it; `trained` are names of models. Raises UserError as `resolve`."""
    if name.startswith(ROWS):
        raise own_rewards.no_judge_of_new_texts(name)
    if is_address(name):
        token()
    elif not is_learned(name, trained):
        _refuse_unknown(name, trained)
        plugins.check(name, FOLDER, "reward", "reward", any_name=True)
    elif name not in trained:
        _named.check(name)


def _refuse_unknown(name: str, trained: Collection[str]) -> None:
    source, _ = plugins.split(name)
    if not source.endswith(".py") and source not in plugins.available(FOLDER):
        raise UserError(f"reward {name!r}: {_unknown(source, trained)}")


def _unknown(name: str, trained: Collection[str]) -> str:
    if Path(name).is_dir():
        return "this directory has no config.json, wanted the model/ directory of a reward model"
    files = plugins.available(FOLDER, "reward")
    return (
        f"neither a reward model trained in this run ({', '.join(sorted(trained)) or 'none yet'}) "
        f"nor a file in {FOLDER}/ ({', '.join(files)}){did_you_mean(name, [*trained, *files])}; "
        f"`bash run.sh stage=reward name=NAME` trains one, a file of your own is given by its path ending in .py"
    )


def _normalised(reward: WeightedReward, values: list[float | None]) -> list[float | None]:
    if isinstance(scale := reward.normalise, Scale):
        return [None if x is None else (x - scale.mean) / scale.std for x in values]
    return [None if x is None else _sigmoid(x) for x in values] if reward.normalise == "sigmoid" else values


def _sigmoid(x: float) -> float:
    small = math.exp(-abs(x))  # in (0, 1]: cannot overflow
    return 1 / (1 + small) if x >= 0 else small / (1 + small)
