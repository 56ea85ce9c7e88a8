"""What names rewards: a name, a path, an address or a mapping with weights; and the access key for servers."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from urllib.parse import SplitResult, urlsplit

from pipeline.errors import UserError

TOKEN = "TIFFIN_REWARD_TOKEN"  # the environment variable with the key
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


def web_address(text: str) -> SplitResult:
    """The parts of an address that is nothing but http or https, host, port and path.

    Raises ValueError for another; the message shows no address that may hold a password or a key.
    """
    if any(sign in text for sign in "@?#"):
        found = "an address with a user, a password or what follows a '?' or '#'"
        raise ValueError(f"{found}, wanted none of it, for settings are kept and shown: give the key in {TOKEN}")
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


def labelled(monitors: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """`monitors=` of the configuration as label -> reward; those in a list are their own labels."""
    return dict(monitors) if isinstance(monitors, Mapping) else {name: name for name in monitors}
