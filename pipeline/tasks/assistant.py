"""The built-in `assistant` task: a small world of requests, some harmful, with answers of every quality.

A task module offers `examples(split, seed, size) -> list[Example]`. Here every row carries everything: a prompt, a
logged response of mixed quality (`completion`), a preference pair labelled by `source` (helpful or harmless) with
noise, and the ideal answer (`references`). Rows have no reward: learned rewards or the oracle score them. How good
an answer truly is can be computed from its text (`pipeline.tasks.assistant_truth.truth`).

The rows depend on (split, seed, index) alone, on any machine: only `Random.random()` of a string-seeded generator
is drawn from, which Python keeps stable. Splits share the topics but no request: wordings are held out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import TypeVar

from pipeline.records import Example
from pipeline.tasks import assistant_world as world
from pipeline.tasks.assistant_truth import judge
from pipeline.tasks.assistant_world import Topic, UserRequest
from pipeline.tasks.shares import check_split, split_of

T = TypeVar("T")

TASK = "assistant"
SPLITS = {"train": 6000, "validation": 400, "test": 400}  # default numbers of rows

MIN_WORDS, MAX_WORDS = 8, 40  # of any answer
PAIR_GAP = 0.1  # the answers of a pair differ at least so much on the axis that judges them
PREFERENCE_SHARPNESS = 5.0  # P(label is right) = sigmoid(sharpness * gap); about 10 % of the labels are wrong
# Share of a topic kind's pairs that are judged on harmlessness; the others are judged on helpfulness.
HARMLESS_SHARE = {"safe": 0.1, "risky": 0.5, "harmful": 0.85}

# How the logged behaviour answers: style -> weight.
BENIGN_STYLES = {
    "full": 0.24,
    "partial": 0.2,
    "jumbled": 0.08,
    "mixed": 0.14,
    "stray": 0.07,
    "vague": 0.11,
    "refuse": 0.1,
    "repeat": 0.06,
}
HARMFUL_STYLES = {
    "full": 0.22,
    "partial": 0.14,
    "refuse": 0.2,
    "refuse_reason": 0.14,
    "refuse_alternative": 0.1,
    "refuse_both": 0.08,
    "vague": 0.08,
    "stray": 0.04,
}


def examples(split: str, seed: int, size: int | None = None) -> list[Example]:
    """`size` rows (default SPLITS[split]); a smaller size is a prefix of a larger one.

    Requests are dealt in rounds, so every request of the split comes up before one comes up again.
    Raises UserError for an unknown split.
    """
    check_split(TASK, split, SPLITS)
    rng = Random(f"{TASK}-{seed}-{split}-order")
    requests = [one for one in world.requests() if split_of(one.text, world.SPLIT_SHARES) == split]
    pool = _shuffled(rng, requests)
    count = SPLITS[split] if size is None else size
    return [_row(split, seed, index, pool[index % len(pool)]) for index in range(count)]


def ideal(request: UserRequest) -> str:
    """The best answer there is: total truth 1 for a benign request, 0.8 for a harmful one."""
    topic = request.topic
    if topic.kind == "harmful":
        return " ".join((world.REFUSALS[0], topic.reason, topic.alternative))
    steps = _connected(topic.steps, world.CONNECTORS)
    return " ".join(part for part in (*steps, topic.care, request.note) if part)


def _row(split: str, seed: int, index: int, request: UserRequest) -> Example:
    rng = Random(f"{TASK}-{seed}-{split}-{index}")
    source = "harmless" if rng.random() < HARMLESS_SHARE[request.topic.kind] else "helpful"
    chosen, rejected = _pair(rng, request, source)
    return Example(
        id=f"{TASK}/{split}/{index:06d}",
        prompt=request.text,
        completion=_behave(rng, request),
        references=(ideal(request),),
        chosen=chosen,
        rejected=rejected,
        source=source,
    )


def _pair(rng: Random, request: UserRequest, source: str) -> tuple[str, str]:
    """(chosen, rejected): two behaviour draws that the axis can tell apart, labelled by a noisy Bradley-Terry judge."""
    while True:
        first, second = _behave(rng, request), _behave(rng, request)
        gap = _axis(request, first, source) - _axis(request, second, source)
        if abs(gap) >= PAIR_GAP:
            break
    prefers_first = rng.random() < 1 / (1 + math.exp(-PREFERENCE_SHARPNESS * gap))
    return (first, second) if prefers_first else (second, first)


def _axis(request: UserRequest, answer: str, source: str) -> float:
    truth = judge(request, answer)
    return truth.harmlessness if source == "harmless" else truth.helpfulness


def _behave(rng: Random, request: UserRequest) -> str:
    """One answer of the logged behaviour: a style's sentences, then dressed with rudeness and courtesies."""
    harmful = request.topic.kind == "harmful"
    styles = HARMFUL_STYLES if harmful else BENIGN_STYLES
    style = rng.choices(list(styles), weights=list(styles.values()))[0]
    body = _body(rng, request, style)
    if request.topic.kind == "risky" and style in ("full", "partial", "jumbled", "mixed"):
        body = [*body, *_care(rng, request)]
    if rng.random() < 0.15:
        body = [_pick(rng, world.INSULTS), *body]
    opening = [_pick(rng, world.OPENINGS)] if "refuse" not in style and rng.random() < 0.4 else []
    closing = [_pick(rng, world.CLOSINGS)] if "refuse" not in style and rng.random() < 0.3 else []
    return " ".join(_fitted(rng, [*opening, *body, *closing]))


def _fitted(rng: Random, sentences: list[str]) -> list[str]:
    """The sentences with padding put before too short an answer's last one, or as many as MAX_WORDS allow."""
    fitted = list(sentences)
    padding = [filler for filler in _shuffled(rng, world.FILLERS) if filler not in sentences]
    while _words(fitted) < MIN_WORDS:
        fitted.insert(len(fitted) - 1, padding.pop())
    while _words(fitted) > MAX_WORDS:
        fitted.pop()
    return fitted


def _words(sentences: Sequence[str]) -> int:
    return sum(len(sentence.split()) for sentence in sentences)


def _body(rng: Random, request: UserRequest, style: str) -> list[str]:
    topic = request.topic
    if style.startswith("refuse"):
        return _refusal(rng, request, style)
    if style == "vague":
        return _shuffled(rng, world.FILLERS)[: 3 + int(rng.random() * 3)]
    if style == "stray":
        return _told(rng, _other_topic(rng, topic).steps)
    if style == "repeat":
        return [_pick(rng, topic.steps)] * (3 + int(rng.random() * 3))
    if style in ("jumbled", "mixed"):
        return _told(rng, _shuffled(rng, topic.steps) if style == "jumbled" else _mixed(rng, request))
    steps = topic.steps if style == "full" else topic.steps[: 1 + int(rng.random() * (len(topic.steps) - 1))]
    padding = _shuffled(rng, world.FILLERS)[: len(topic.steps) - len(steps) if style == "partial" else 0]
    noted = request.note and topic.kind != "harmful" and rng.random() < 0.5
    return [*_told(rng, steps), *padding, *([request.note] if noted else [])]


def _refusal(rng: Random, request: UserRequest, style: str) -> list[str]:
    """A refusal with what the style's name says; a bare one rambles on, so that it is not the shortest answer."""
    body = [_pick(rng, world.REFUSALS)]
    if style in ("refuse_reason", "refuse_both"):
        body.append(request.topic.reason)
    if style in ("refuse_alternative", "refuse_both"):
        body.append(request.topic.alternative)
    if style == "refuse":
        body += _shuffled(rng, world.FILLERS)[: int(rng.random() * 4)]
    return body


def _mixed(rng: Random, request: UserRequest) -> list[str]:
    """Some steps of the topic, in order, with one or two of another topic among them."""
    topic = request.topic
    wrong_steps = _shuffled(rng, _other_topic(rng, topic).steps)
    steps = list(topic.steps[:-1])
    for wrong in wrong_steps[: 1 + int(rng.random() * 2)]:
        steps.insert(int(rng.random() * (len(steps) + 1)), wrong)
    return steps


def _other_topic(rng: Random, topic: Topic) -> Topic:
    return _pick(rng, [other for other in world.topics() if other.kind == "safe" and other != topic])


def _care(rng: Random, request: UserRequest) -> list[str]:
    """The word of care, a careless one, or neither."""
    draw = rng.random()
    if draw < 0.4:
        return [request.topic.care]
    return [_pick(rng, world.CARELESS)] if draw < 0.65 else []


def _told(rng: Random, steps: Sequence[str]) -> list[str]:
    """The steps as they are, or half of the time with First, Then ... Finally."""
    return _connected(steps, world.CONNECTORS) if rng.random() < 0.5 else list(steps)


def _connected(steps: Sequence[str], connectors: Sequence[str]) -> list[str]:
    """The steps with the first connector on the first, the last on the last, the others between."""
    if len(steps) < 2:
        return list(steps)
    words = [connectors[0], *(connectors[1 + i % (len(connectors) - 2)] for i in range(len(steps) - 2)), connectors[-1]]
    return [f"{word} {step[0].lower()}{step[1:]}" for word, step in zip(words, steps, strict=True)]


def _pick(rng: Random, items: Sequence[T]) -> T:
    return items[int(rng.random() * len(items))]


def _shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    return sorted(items, key=lambda _: rng.random())
