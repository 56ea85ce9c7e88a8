"""What a judge is asked about a text, and what its answer says: templates, patterns and scales. Needs no torch.

Texts are put into the template once and never read as part of it, and only the judge's own answer is searched for a
verdict: a response that says "Score: 10" says nothing here, whatever it says to the judge.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from pipeline.config.rewards import JudgeSettings
from reward_models._filled import filled
from reward_models._values import shortened

SETTING = "rewards.judge.prompt"


class NoVerdictError(Exception):
    """Why a judge's answer has no verdict on the scale; another answer may have one."""


def messages(judge: JudgeSettings, texts: Mapping[str, Any]) -> list[dict[str, str]]:
    """The messages of a request; `texts` are the template's fields by name. Raises UserError where one is missing."""
    if isinstance(judge.prompt, str):
        return [{"role": "user", "content": filled(judge.prompt, texts, SETTING)}]
    return [{"role": turn.role, "content": filled(turn.content, texts, SETTING)} for turn in judge.prompt]


def value(judge: JudgeSettings, answer: str) -> float:
    """The verdict of a judge's answer, scaled to [0, 1] or as the scale's words say. Raises NoVerdictError."""
    found = _of_json(judge.parse.removeprefix("json:"), answer) if _is_json(judge) else _matched(judge.parse, answer)
    if isinstance(judge.scale, dict):
        words = {word.casefold(): number for word, number in judge.scale.items()}
        if (word := str(found).strip().casefold()) not in words:
            raise NoVerdictError(f"its verdict is '{shortened(word)}', wanted one of {', '.join(judge.scale)}")
        return words[word]
    worst, best = judge.scale
    try:
        number = math.nan if isinstance(found, bool) else float(found)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not min(worst, best) <= number <= max(worst, best):
        raise NoVerdictError(f"its verdict is '{shortened(str(found))}', wanted a number from {worst:g} to {best:g}")
    return (number - worst) / (best - worst)


def _is_json(judge: JudgeSettings) -> bool:
    return judge.parse.startswith("json:")


def _matched(pattern: str, answer: str) -> str:
    """What the group of the last match holds."""
    found = [match[1] for match in re.finditer(pattern, answer) if match[1] is not None]
    if not found:
        raise NoVerdictError(f"its answer ends '{_end(answer)}', which rewards.judge.parse does not match")
    return found[-1]


def _of_json(key: str, answer: str) -> Any:
    """`key` of the last JSON object in the answer that has it."""
    decoder, place, found = json.JSONDecoder(), 0, []
    while (place := answer.find("{", place)) >= 0:
        try:
            one, place = decoder.raw_decode(answer, place)
        except (ValueError, RecursionError):
            place += 1
            continue
        found += [one[key]] if key in one else []
    if not found:
        raise NoVerdictError(f"its answer ends '{_end(answer)}' and has no JSON object with '{key}'")
    return found[-1]


def _end(answer: str) -> str:
    return shortened(" ".join(answer.split())[-80:])
