"""One sentence on what a stage came to, with its verdict: the last lines of a stage and the top of the page say it.

The verdicts are those of checks.py and measures/*.yaml: what lies within two standard errors is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from pipeline.files import flatten
from pipeline.report.checks import Numbers, in_errors, noise, of_policies
from pipeline.report.numbers import number, signed
from pipeline.report.spec import FINE, LEVELS, LOOK, ORACLE, TROUBLE, metric_of, rules
from pipeline.report.stages import Stage, verdicts
from pipeline.report.tables import columns_of

REWARD, LOSS, WORDS = "reward", "eval/loss", "completions/mean_words"
LOGGED = ": of logged responses, as nothing judged its own (reward=NAME would)"
NO_VERDICT = (
    "nothing tells whether it helped: its held-out loss follows the policy, and no reward judged (reward=NAME would)"
)
UNKNOWN = "no held-out rows: nothing tells whether it helped"
NOT_FINITE = "its held-out numbers are not finite"


class Headline(NamedTuple):
    """What a stage came to."""

    text: str
    level: str  # one of spec.LEVELS: Fine only where it is sure that the stage did what it is for

    @property
    def success(self) -> bool:
        return self.level == FINE


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
    """The sentence on a whole run, that of its last stage that has results; None where none has."""
    ended = [stage for stage in stages if stage.results]
    return headline(ended[-1]) if ended else None


def worst(*levels: str) -> str:
    """The most serious of some levels."""
    return min(levels, key=LEVELS.index)


def of_training(stage: Stage) -> Headline:
    """Of sft and rl: the number that chose the weights, from the start to the weights kept."""
    results = _plain(stage)
    watched = next((one for one in _watched(results) if results.get(one.tag) is not None), None)
    if results.get("model_step") == 0:
        return _untrained(results)
    where = f" at step {results['model_step']:,} of {results['steps']:,}"
    if not stage.ranked:
        return Headline(f"{NO_VERDICT} ({where.strip()})", LOOK)
    if watched is None:
        known = any(tag.startswith("eval/") for tag in results)
        return Headline(f"{NOT_FINITE if known else UNKNOWN} ({where.strip()})", LOOK)
    first = _start(stage)
    if first.get(watched.tag) is None:
        return Headline(f"{watched.words} {number(results[watched.tag])}{where}{watched.remark}", LOOK)
    verdict, level = _change(watched.tag, first, results, watched.larger_is_better)
    if "best_step" in (judged := verdicts(stage)) and judged["best_step"].level == TROUBLE:
        verdict, level = f"{verdict}, no evaluation was better than the start", TROUBLE
    from_to = f"{watched.words} {number(first[watched.tag])} to {number(results[watched.tag])}"
    return Headline(f"{from_to}{where}: {verdict}{watched.remark}", worst(level, _least(watched)))


def of_reward(stage: Stage) -> Headline:
    """Of a reward model: the share of held-out pairs in the right order, against what counting words would reach."""
    results = _plain(stage)
    if results.get("model_step") == 0:
        return _untrained(results)
    accuracy, alone = results.get("eval/accuracy"), results.get("eval/length_accuracy")
    if accuracy is None:
        follows = results.get("eval/correlation")
        if follows is None:
            return Headline(UNKNOWN, LOOK)
        return Headline(
            f"correlation of scores and held-out rewards {number(follows)}", FINE if follows > 0 else TROUBLE
        )
    right = f"{number(accuracy)} of {results['eval/pairs']:,.0f} held-out pairs in the right order"
    judged = verdicts(stage)
    levels = [judged[name].level for name in ("pair_accuracy", "pair_lead") if name in judged]
    level = worst(*levels) if levels else LOOK
    if "pair_lead" not in judged:
        return Headline(right, level)
    lead = {TROUBLE: "no more than length", LOOK: "hardly more than length", FINE: "more than length"}
    weak = ", but a weak judge" if judged["pair_lead"].level == FINE and level != FINE else ""
    return Headline(f"{right}, by length alone {number(alone)}: {lead[judged['pair_lead'].level]}{weak}", level)


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
        return Headline(f"reward of {first} {_shown(policies[first])}, and no policy beside it", LOOK)
    monitors = list(stage.settings.get("monitors") or [])
    told = [_compared(policies[first], policies[other], monitors) for other in others]
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
    pairs = Watched("eval/rewards/accuracies", "held-out pairs in the right order", True, LOGGED)
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
    parts += [_agrees(tag, base, other) for tag in other if fnmatchcase(tag, ORACLE) and base.get(tag) is not None]
    if None not in (base.get(WORDS), other.get(WORDS)):
        parts.append(f"{other[WORDS]:.0f} words (was {base[WORDS]:.0f})")
    fell = [one for one in found.values() if one.name == rules()["unseen"].name and one.level != FINE]
    if fell:
        parts.append(f"but what it was never trained on fell ({'; '.join(one.text for one in fell)})")
    return Headline(", ".join(dict.fromkeys(parts)), worst(level, *(one.level for one in fell)))


def _agrees(tag: str, base: Numbers, other: Numbers) -> str:
    """Whether an oracle moved as the reward did: up, down or not at all."""
    moves = [_move(one, base, other) for one in (tag, REWARD)]
    if moves[0] == moves[1]:
        return "the oracle agrees"
    return f"{metric_of(tag)[1]} {number(base[tag])} to {number(other[tag])} ({moves[0]})"


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


def _shown(policy: Numbers) -> str:
    return "not finite" if policy.get(REWARD) is None else number(policy[REWARD])
