"""What is wrong with the rewards that a stage names or needs. Needs no torch; no reward is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

from pipeline.config.reward_spec import (
    ROWS,
    check_normalise,
    is_judge,
    labelled,
    no_judge_of_new_texts,
    no_targets_of_policy,
    parse,
    refuse_standardise,
)
from pipeline.config.schema import (
    EvaluateStage,
    GenerateStage,
    RewardStage,
    RlAdvantage,
    RlMasked,
    RlOffline,
    RlPolicy,
    RlSamples,
    RlScored,
    ScoreStage,
    SftStage,
    WithModel,
)
from pipeline.data import convert
from pipeline.rewards import llm_judge, own_rewards, rewards
from reward_models import _named
from stages import inputs
from stages.ahead import Ahead, told
from stages.row_faults import FirstRows, first_rows, may_bring_rewards


def of_rewards(settings: WithModel, ahead: Ahead) -> Iterator[str]:
    """Rewards that are not there, or lack what they import; and where there is none and one is needed."""
    if isinstance(settings, SftStage | RewardStage):
        return
    known, first = ahead.reward_models(settings), cache(partial(first_rows, settings, ahead))
    names = [name for name, _ in parse(settings.reward)]
    if not names and not known and isinstance(settings, ScoreStage):
        brought = dict.fromkeys(name for row in first()[0] for name in row.rewards)
        yield str(inputs.no_judge(settings, [*brought]))
    watched = labelled(settings.monitors) if isinstance(settings, EvaluateStage) else {}
    if used := names or ([] if isinstance(settings, GenerateStage) else known):
        yield from told(lambda: check_normalise(settings.rewards.normalise, [*used, *watched]))
        if not scores_logged(settings):
            yield from told(partial(refuse_standardise, settings.rewards.normalise))
    if not names and not known:
        yield from of_no_judge(settings)
    yield from told(partial(_named.check_reads, settings.rewards.reads, [*names, *watched.values()], known))
    for name in [*names, *watched.values()]:
        if is_judge(name):
            yield from told(partial(llm_judge.check, name, settings.rewards.judge, ahead.environ))
        if ahead.holds(name):
            continue
        if not rewards.is_own(name, known):
            yield from told(partial(rewards.check, name, known))
        elif found := of_own_reward(name, settings, ahead, first):
            yield from found
        elif isinstance(settings, RlAdvantage) and settings.value.targets == "policy":
            yield str(no_targets_of_policy())
        elif isinstance(settings, RlSamples) and settings.reference_samples.targets == "policy":
            yield str(no_targets_of_policy("reference_samples"))


def of_no_judge(settings: WithModel) -> Iterator[str]:
    """What a stage without any reward cannot do."""
    if isinstance(settings, RlMasked | RlPolicy):
        yield str(no_judge_of_new_texts(settings.algo, settings.run))
    if isinstance(settings, RlAdvantage) and settings.value.targets == "policy":
        yield str(no_targets_of_policy())
    if isinstance(settings, RlSamples) and settings.reference_samples.targets == "policy":
        yield str(no_targets_of_policy("reference_samples"))


def scores_logged(settings: WithModel) -> bool:
    """Whether a stage scores responses that rows hold, so that these may bring a part of the reward."""
    return isinstance(settings, ScoreStage | RlOffline | RlScored)


def of_own_reward(name: str, settings: WithModel, ahead: Ahead, first: Callable[[], FirstRows]) -> list[str]:
    """What is wrong with the name of a reward that can only be one that rows bring, as far as the first rows tell."""
    logged, known = scores_logged(settings), ahead.reward_models(settings)
    rows, unread = first()
    if rows and logged:
        single = [row for row in rows if not row.candidates]
        return told(lambda: own_rewards.values(name, convert.to_scored(single, settings.data.responses), known))
    if name.removeprefix(ROWS) in (own_rewards.names(rows) if rows else ahead.scored):
        return [] if logged else [str(own_rewards.no_judge_of_new_texts(name))]
    if logged and (unread or may_bring_rewards(settings, ahead)):
        return []
    return told(partial(rewards.check, name, known))
