"""Rewards that logged rows bring by name, as parts of the sum: `reward='{helpful: 1.0, brief: 0.2}'`. Needs no torch.

A row has them in `rewards`, a mapping of names to numbers; `reward` is the one without a name. They are what somebody
said of the logged response, so that they judge no other text.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Sequence

from pipeline import plugins
from pipeline.config.reward_spec import ROWS
from pipeline.errors import UserError, did_you_mean
from pipeline.records import Example

SINGLE = "reward"  # the name of the reward that has none


def brought(row: Example) -> dict[str, float]:
    """The rewards of a row by name."""
    return dict(row.rewards) | ({} if row.reward is None else {SINGLE: row.reward})


def names(rows: Sequence[Example]) -> list[str]:
    """Those that some row brings, in the order of the rows."""
    return [*dict.fromkeys(name for row in rows for name in brought(row))]


def values(name: str, rows: Sequence[Example], models: Collection[str] = ()) -> list[float]:
    """What each row brings under `name`. Raises UserError where none does, or one does not.

    `models` are the run's own, which a wrong name may mean.
    """
    name = name.removeprefix(ROWS)
    found = array("d", (brought(row).get(name, math.nan) for row in rows))  # NaN is no row's own
    missing = [place for place, value in enumerate(found) if math.isnan(value)]
    if rows and len(missing) == len(rows):
        there, files = names(rows), plugins.available("reward_models", "reward")
        raise UserError(
            f"reward {name!r}: neither a reward that the rows bring ({', '.join(there) or 'none'}) nor a reward model "
            f"trained in this run ({', '.join(sorted(models)) or 'none'}) nor a file in reward_models/ "
            f"({', '.join(files)}){did_you_mean(name, [*there, *models, *files])}"
        )
    if missing:
        first, more = rows[missing[0]], len(missing) - 1
        there = f"brings {', '.join(brought(first)) or 'none'}"
        raise UserError(
            f"reward {name!r}: row {first.id} {there}, and {more:,} more of {len(rows):,} rows lack it too, "
            "wanted a number in each: complete their `rewards`, or leave these rows out"
        )
    return found.tolist()


def no_judge_of_new_texts(name: str) -> UserError:
    """Of a stage that has new texts judged, and is given a reward that the rows bring."""
    return UserError(
        f"reward {name!r}: the rows bring it, so that it judges no new text, wanted what can: a reward model, "
        "a file, or an address"
    )
