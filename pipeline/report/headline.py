"""One sentence on what a stage came to, with its verdict: the last lines of a stage and the top of the page say it.

The verdicts are those of checks.py and measures/*.yaml: what lies within two standard errors is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from pipeline.files import flatten
from pipeline.report import gains
from pipeline.report.checks import Numbers, in_errors, noise, of_policies
from pipeline.report.numbers import number, signed
from pipeline.report.spec import FINE, LEVELS, LOOK, ORACLE, TROUBLE, metric_of, rules
from pipeline.report.stages import Stage, verdicts
from pipeline.report.tables import columns_of

REWARD, LOSS, WORDS = "reward", "eval/loss", "completions/mean_words"
KL = "objective/kl"
WANTED = (
    "nothing judged, and no logged responses with rewards to estimate by (data.test=FILE with rewards, or reward=NAME)"
)
LOGGED = ": of logged responses, as nothing judged its own (reward=NAME would)"
TELLS_NOTHING = "it says nothing under this method, and nothing judged the policy's own responses (reward=NAME would)"
UNKNOWN = "no held-out rows: nothing tells whether it helped"
CHANCE = ", which chance alone could reach"
NOT_FINITE = "its held-out numbers are not finite"


class Headline(NamedTuple):
    """What a stage came to."""

    text: str
    level: str  # one of spec.LEVELS: Fine only where it is sure that the stage did what it is for


class Watched(NamedTuple):
    """A number of a training by which it is judged."""

    tag: str
    words: str
    larger_is_better: bool
    remark: str = ""


def headline(stage: Stage) -> Headline:
    """The sentence of a stage that pipeline.report.stages has read; one that has no results yet is not judged."""
    if not stage.results:
        return Headline(f"not finished, {stage.steps:,} steps so far" if stage.steps else "not finished", LOOK)
    return OF_KIND[stage.kind](stage)


def of_run(stages: Sequence[Stage]) -> Headline | None:
    """The sentence on a whole run, that of the last stage of the recipe's order that has results, by its title where
    others are of its kind; None where none has."""
    ended = [stage for stage in stages if stage.results]
    if not ended:
        return None
    said, others = headline(ended[-1]), [stage for stage in ended[:-1] if stage.kind == ended[-1].kind]
    return said._replace(text=f"{ended[-1].title}: {said.text}") if others else said


def worst(*levels: str) -> str:
    """The most serious of some levels."""
    return min(levels, key=LEVELS.index)


def of_training(stage: Stage) -> Headline:
    """Of sft and rl: the number that chose the weights, from the start to the weights kept."""
    results = _plain(stage)
    watched = next((one for one in _watched(results) if results.get(one.tag) is not None), None)
    if results.get("model_step") == 0:
        return _untrained(results)
    where = _where(results)
    if f"eval/{REWARD}" not in results and (gain := gains.of_training(results)):
        return Headline(f"estimated gain over the start model{where} {_verdict(gain)}", _level(gain))
    if watched is None:
        known = any(tag.startswith("eval/") for tag in results)
        return Headline(f"{NOT_FINITE if known else UNKNOWN} ({where.strip()})", LOOK)
    first = _start(stage)
    if first.get(watched.tag) is None:
        return Headline(f"{watched.words} {number(results[watched.tag])}{where}{watched.remark}", LOOK)
    from_to = f"{watched.words} {number(first[watched.tag])} to {number(results[watched.tag])}{where}"
    if watched.tag == LOSS and not stage.loss_compares:
        return Headline(f"{from_to}: {TELLS_NOTHING}", LOOK)
    verdict, level = _change(watched.tag, first, results, watched.larger_is_better)
    if "best_step" in (judged := verdicts(stage)) and judged["best_step"].level == TROUBLE:
        chosen_by = watched.tag in (f"eval/{REWARD}", LOSS)
        none = "no evaluation was better than the start" if chosen_by else "but the held-out loss was never lower"
        verdict, level = f"{verdict}, {none}", TROUBLE
    return Headline(f"{from_to}: {verdict}{watched.remark}", worst(level, _least(watched)))


def of_reward(stage: Stage) -> Headline:
    """Of a reward model: the share of held-out pairs in the right order, against what counting words would reach."""
    results = _plain(stage)
    if results.get("model_step") == 0:
        return _untrained(results)
    accuracy, alone = results.get("eval/accuracy"), results.get("eval/length_accuracy")
    if accuracy is None:
        return _of_correlation(stage, results.get("eval/correlation"))
    right = f"{number(accuracy)} of {results['eval/pairs']:,.0f} held-out pairs in the right order{_where(results)}"
    judged = verdicts(stage)
    levels = [judged[name].level for name in ("pair_accuracy", "pair_lead") if name in judged]
    level = worst(*levels) if levels else LOOK
    if "pair_lead" not in judged:
        sure = accuracy - 0.5 > 1 / math.sqrt(results["eval/pairs"])  # two standard errors of tosses of a coin
        return Headline(right, level) if sure else Headline(f"{right}{CHANCE}", worst(level, LOOK))
    lead = {TROUBLE: "no more than length", LOOK: "hardly more than length", FINE: "more than length"}
    weak = ", but a weak judge" if judged["pair_lead"].level == FINE and level != FINE else ""
    return Headline(f"{right}, by length alone {number(alone)}: {lead[judged['pair_lead'].level]}{weak}", level)


def _of_correlation(stage: Stage, follows: float | None) -> Headline:
    """Of a reward model whose rows make no pairs: 1 / sqrt(rows) is the standard error of no correlation at all."""
    rows = stage.data.get("validation", {}).get("rows", 0)
    if follows is None:
        return Headline(UNKNOWN, LOOK)
    said = f"correlation of scores and held-out rewards {number(follows)}{_where(_plain(stage))}"
    if follows <= 0:
        return Headline(said, TROUBLE)
    return Headline(said, FINE) if follows > 2 / math.sqrt(max(rows, 1)) else Headline(f"{said}{CHANCE}", LOOK)


def of_rows(stage: Stage) -> Headline:
    """Of score and generate: how many rows, and what they earn where that is known."""
    rewards = {split: values.get(REWARD) for split, values in columns_of(stage.results).items()}
    parts = [
        f"{split} {values['rows']:,} rows" + ("" if rewards[split] is None else f" of reward {number(rewards[split])}")
        for split, values in columns_of(stage.results).items()
    ]
    return Headline(", ".join(parts), FINE)


def of_evaluation(stage: Stage) -> Headline:
    """Every policy against the first: its reward, whether the truth agrees where it is known, its length."""
    policies = columns_of(stage.results)
    first, *others = policies
    if not others:
        judged = f"reward of {first} {_shown(policies[first])}" if REWARD in policies[first] else f"{first} alone"
        return Headline(f"{judged}, and no policy beside it", LOOK)
    monitors = list(stage.settings.get("monitors") or [])
    told = [
        _compared(policies[first], policies[other], monitors)
        if REWARD in policies[first]
        else _estimated(first, policies[first], policies[other])
        for other in others
    ]
    names = [f"{other}: " if len(others) > 1 else "" for other in others]
    text = "; ".join(name + one.text for name, one in zip(names, told, strict=True))
    return Headline(text, worst(*(one.level for one in told)))


OF_KIND: Mapping[str, Callable[[Stage], Headline]] = {
    "sft": of_training,
    "reward": of_reward,
    "rl": of_training,
    "score": of_rows,
    "generate": of_rows,
    "evaluate": of_evaluation,
}


def _watched(results: Numbers) -> list[Watched]:
    """What a training may be judged by, the best first: only a reward of its own responses is the policy's reward."""
    own = Watched(f"eval/{REWARD}", "held-out reward", True)
    language = "eval/perplexity" in results  # sft's: the loss is of language, and not of weighted rows
    labelled = "eval/rewards/reference_point" in results
    which = "held-out rows on their label's side" if labelled else "held-out pairs in the right order"
    pairs = Watched("eval/rewards/accuracies", which, True, LOGGED)
    return [own, pairs, Watched(LOSS, "held-out loss", False, "" if language else LOGGED)]


def _least(watched: Watched) -> str:
    """The level that a verdict cannot be better than: logged responses do not tell of the policy's own."""
    return LOOK if watched.remark else FINE


def _untrained(results: Numbers) -> Headline:
    kept = "model/ holds the weights it began with (train.keep=last keeps the last)"
    length = f"in {results['steps']:,} step" + ("s" if results["steps"] != 1 else "")
    return Headline(f"taught nothing: {length} no evaluation was better than the start, {kept}", TROUBLE)


def _change(tag: str, base: Numbers, other: Numbers, larger_is_better: bool) -> tuple[str, str]:
    """better, worse, or the same within noise; and how good that is."""
    if abs(other[tag] - base[tag]) <= noise(tag, base, other):
        return "the same within noise", LOOK
    return ("better", FINE) if (other[tag] > base[tag]) == larger_is_better else ("worse", TROUBLE)


def _compared(base: Numbers, other: Numbers, monitors: Sequence[str]) -> Headline:
    """One policy of an evaluation against the first."""
    found = of_policies(base, other, monitors)
    if REWARD not in found:
        return Headline(f"reward {_shown(base)} to {_shown(other)}", LOOK)
    level = found[REWARD].level
    sure = {FINE: "sure", LOOK: "the same within noise", TROUBLE: "worse"}[level]
    parts = [f"reward {_shown(base)} to {_shown(other)} ({signed(other[REWARD] - base[REWARD])}, {sure})"]
    parts += _oracles(base, other)
    if None not in (base.get(WORDS), other.get(WORDS)):
        parts.append(f"{other[WORDS]:.0f} words (was {base[WORDS]:.0f})")
    parts += [f"estimated gain by the rows' own rewards {_verdict(other)}"] if gains.KNOWN in other else []
    fell = [one for one in found.values() if one.name == rules()["unseen"].name and one.level != FINE]
    if fell:
        parts.append(f"but what it was never trained on fell ({'; '.join(one.text for one in fell)})")
    return Headline(", ".join(parts), worst(level, *(one.level for one in fell)))


def _estimated(first: str, base: Numbers, other: Numbers) -> Headline:
    """One policy of an evaluation that nothing judged against the first."""
    moved = [f"KL {number(other[KL])}"] if other.get(KL) is not None else []
    moved += (
        [f"{other[WORDS]:.0f} words (was {base[WORDS]:.0f})"] if None not in (base.get(WORDS), other.get(WORDS)) else []
    )
    tags = gains.known_tags(other)
    if not tags:
        return Headline(", ".join([f"nothing tells whether it is better than {first}: {WANTED}", *moved]), LOOK)
    names = [f" in {name}" if name else "" for name in (gains.name_of(tag) for tag in tags)]
    told = [f"estimated gain over {first}{name} {_verdict(other, tag)}" for tag, name in zip(tags, names, strict=True)]
    return Headline(", ".join([*told, *moved]), _level(other, tags[0]))


def _verdict(gain: Numbers, tag: str = gains.KNOWN) -> str:
    """An estimate in words, with what is sure of it; never better or worse where its interval holds 0."""
    sign = gains.sign(gain, tag)
    return gains.said(gain, tag) + ("" if sign is None else f": {gains.JUDGED[sign]}")


def _level(gain: Numbers, tag: str = gains.KNOWN) -> str:
    return {1: FINE, -1: TROUBLE}.get(gains.sign(gain, tag), LOOK)


def _oracles(base: Numbers, other: Numbers) -> list[str]:
    """Whether the oracles moved as the reward did, up, down or not at all; those that did not, one by one."""
    known = [tag for tag in other if fnmatchcase(tag, ORACLE) and None not in (base.get(tag), other[tag])]
    moves = {tag: _move(tag, base, other) for tag in known}
    if known and {*moves.values()} == {_move(REWARD, base, other)}:
        return ["the oracle agrees"]
    return [f"{metric_of(tag)[1]} {number(base[tag])} to {number(other[tag])} ({move})" for tag, move in moves.items()]


def _move(tag: str, base: Numbers, other: Numbers) -> str:
    if abs(in_errors(tag, base, other)) <= 2:
        return "the same within noise"
    return "rose" if other[tag] > base[tag] else "fell"


def _start(stage: Stage) -> dict[str, float]:
    """What the evaluation before the first step saw."""
    return {tag: points[0][1] for tag, points in stage.series.items() if points[0][0] == 0}


def _plain(stage: Stage) -> dict[str, float | None]:
    """The final numbers of a training."""
    return {tag: value for tag, value in flatten(stage.results).items() if not isinstance(value, str)}


def _where(results: Numbers) -> str:
    """Of which step the weights are that were kept."""
    return f" at step {results['model_step']:,} of {results['steps']:,}"


def _shown(policy: Numbers) -> str:
    return "not finite" if policy.get(REWARD) is None else number(policy[REWARD])
