"""What names rewards: a name, a path, an address or a mapping with weights; how tags call them; the key for servers."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from urllib.parse import SplitResult, urlsplit

from pipeline.errors import UserError, did_you_mean

TOKEN = "TIFFIN_REWARD_TOKEN"  # the environment variable with the key
ROWS = "rows:"  # before the name of a reward that the rows bring, where a model or a file may be meant
JUDGE = "judge:"


def is_address(name: str) -> bool:
    """Whether the name of a reward is meant as a web address."""
    return "://" in name


def is_judge(name: str) -> bool:
    """Whether an address is that of a language model to ask, judge:http://HOST:PORT/v1."""
    return name.startswith(JUDGE)


def judge_address(name: str) -> str:
    """The web address of a judge."""
    return name.removeprefix(JUDGE).rstrip("/")


def web_address(text: str, key: str = TOKEN) -> SplitResult:
    """The parts of an address that is nothing but http or https, host, port and path.

    `key`: where a key belongs. Raises ValueError for another; the message shows no address that may hold a password.
    """
    if any(sign in text for sign in "@?#"):
        found = "an address with a user, a password or what follows a '?' or '#'"
        raise ValueError(f"{found}, wanted none of it, for settings are kept and shown: give the key in {key}")
    wanted = f"{text!r}, wanted http://HOST:PORT/PATH or https://"
    if not text.isascii() or any(sign.isspace() or not sign.isprintable() for sign in text):
        raise ValueError(f"{wanted} without spaces, other characters as %XX")
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # what should be a port or an IPv6 address is none
        usable = False
    if not usable:
        raise ValueError(wanted)
    return parts


def sound_addresses(value: object) -> object:
    """`value`, a setting that names rewards, as it is. Raises ValueError as `web_address` does for one of them."""
    named = [value] if isinstance(value, str) else list(value) if isinstance(value, Mapping | Sequence) else []
    if isinstance(value, Mapping):
        named += value.values()
    for name in named:
        if isinstance(name, str) and is_address(name):
            web_address(name.removeprefix(JUDGE))
    return value


def token() -> str:
    """The key, empty where there is none. Raises UserError, without the key, where it cannot be sent as a header."""
    return key_in(TOKEN, os.environ)


def key_in(variable: str, environ: Mapping[str, str]) -> str:
    """The key that an environment variable holds, as `token`."""
    found = environ.get(variable, "").strip()
    if not found.isascii() or any(sign.isspace() or not sign.isprintable() for sign in found):
        raise UserError(f"{variable}: it holds spaces or characters that are not ASCII, wanted the key alone")
    return found


def parse(spec: object) -> list[tuple[str, float]]:
    """`reward=` of the configuration, None, a name or a mapping of names to weights, as (name, weight)."""
    if spec is None:
        return []
    if isinstance(spec, str) and spec.strip():
        return [(spec.strip(), 1.0)]
    if not isinstance(spec, Mapping) or not spec:
        raise UserError(
            f"reward: {spec!r}, wanted a name, a path, or names with weights: {{helpfulness: 1.0, length: -0.1}}"
        )
    for name, weight in spec.items():
        number = isinstance(weight, Real) and not isinstance(weight, bool)
        if not isinstance(name, str) or not number or not math.isfinite(weight) or weight == 0:
            raise UserError(f"reward.{name}: the weight is {weight!r}, wanted a finite number other than 0")
    return [(name, float(weight)) for name, weight in spec.items()]


def no_judge_of_new_texts(algo: str, run: str) -> UserError:
    """Of an algorithm that samples, without a reward, in a run that has trained none."""
    return UserError(
        f"algo={algo}: nothing to judge new texts with, wanted a reward: give reward=NAME, "
        f"or train one with bash run.sh stage=reward run={run}"
    )


def no_targets_of_policy(section: str = "value") -> UserError:
    """Of values, or what `section` sets, that are to come of new responses, without a reward that judges them."""
    return UserError(
        f"{section}.targets: policy, but nothing can score new responses: give a reward= that judges any text, "
        f"or {section}.targets=data"
    )


def words_for(names: Iterable[str]) -> str:
    """What to add to a command to add these rewards up."""
    return f"reward='{{{', '.join(f'{name}: 1.0' for name in names)}}}'"


def labels(names: Iterable[str]) -> dict[str, str]:
    """name -> what tags, tables and rows call the reward, whatever order the names come in.

    That is the last part of a path or an address that means something, and more parts where two would be called alike:
    runs/x/reward/helpful/model is helpful, my/brief.py:other is brief:other. Other names stay as they are.
    """
    parts = {name: _parts(name) for name in names}
    chosen = {}
    for name, own in parts.items():
        others = [parts[other] for other in parts if other != name]
        lengths = (n for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others))
        chosen[name] = ".".join(own[-n:]) if (n := next(lengths, 0)) else name
    return chosen


def possible_labels(name: str) -> list[str]:
    """What `labels` may call a reward, whatever others there are, the longest first."""
    parts = _parts(name)
    return [name, *(".".join(parts[-n:]) for n in range(len(parts), 0, -1))]


def _parts(name: str) -> list[str]:
    """The parts of a path or an address, without what says nothing: /model, /v1, .py, http://."""
    if is_address(name):
        host, *below = filter(None, name.partition("://")[2].split("/"))
        return [host, *(part for part in below if part != "v1")]
    if name.startswith(ROWS):
        return [ROWS.rstrip(":"), name.removeprefix(ROWS)]
    if "/" not in name and ".py" not in name:
        return [name]
    source, _, function = name.partition(":")
    *above, last = [part for part in source.split("/") if part not in ("", ".", "..")] or [source]
    if last == "model" and above:
        *above, last = above
    return [*above, last.removesuffix(".py") + (f":{function}" if function else "")]


def check_normalise(normalise: object, names: Iterable[str]) -> None:
    """Raises UserError where `rewards.normalise` is a mapping with a key that is none of the rewards that are named."""
    known = dict.fromkeys(one for pair in labels(names).items() for one in pair)
    for key in normalise if isinstance(normalise, Mapping) else ():
        if key not in known:
            there = f"{', '.join(known) or 'none'}){did_you_mean(key, known)}"
            raise UserError(f"rewards.normalise: {key!r}, wanted a reward that is named ({there}")


def refuse_standardise(normalise: object) -> None:
    """Raises UserError where a stage without logged training rows would have to find out what to standardise by."""
    if normalise == "standardise" or (isinstance(normalise, Mapping) and "standardise" in normalise.values()):
        raise UserError(
            "rewards.normalise: standardise, but this stage scores no logged rows to take mean and spread from, wanted "
            "both as numbers, as a stage that does logs them: rewards.normalise='{NAME: {mean: M, std: S}}'"
        )


def labelled(monitors: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """`monitors=` of the configuration as label -> reward; those in a list are their own labels."""
    return dict(monitors) if isinstance(monitors, Mapping) else {name: name for name in monitors}
