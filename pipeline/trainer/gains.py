"""What policies gain over a first one by the logged responses of held-out rows: nothing is sampled, nothing judged.

The estimates are those of pipeline/algorithms/estimates.py. They are of policies sampled at temperature 1, whatever
`generation` says. Tags: gain/known, gain/ess, gain/rows; where it is known gain/estimate, gain/low, gain/high; and
gain/<name>/... by each of the rows' named rewards.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.algorithms import estimates
from pipeline.data import convert, encoding
from pipeline.models import text_regression
from pipeline.records import Example, Response, text_of
from pipeline.trainer import evaluation
from pipeline.trainer.evaluated import Read
from pipeline.trainer.model import Model, spoken_packing
from pipeline.words import between_blanks

logger = logging.getLogger("tiffin")


class Rewarded(NamedTuple):
    """The rows that have one of the rewards, (n,) each."""

    places: list[int]  # among all logged rows
    reward: Tensor  # float64
    value: Tensor  # float64, the reward to expect of the prompt, by rows of other prompts
    prompt: Tensor  # int64
    words: Tensor  # int64, of the responses


def logged(rows: Sequence[Example]) -> list[Example]:
    """One row for each response that the rows hold, with its reward: see `convert.to_scored`."""
    held = [row for row in rows if row.completion is not None or convert.is_pair(row) or row.candidate_rewards]
    return convert.to_scored(held, "both")


def read(policy: Model, rows: Sequence[Example]) -> Read:
    """What a policy finds of logged responses; prompts and responses are written as its own template does."""
    encoded = [encoding.row_of(row, row.completion, policy.encoder) for row in rows]
    responses = [
        Response(example, "", text_of(example.completion), row.prompt_ids, row.response_ids, not row.cut_text)
        for example, row in zip(rows, encoded, strict=True)
    ]
    logps = evaluation.response_logps(policy.engine, responses, spoken_packing(policy))
    return Read(responses, logps, policy.encoder.tokenizer)


def nll(found: Read) -> float:
    """Nats per token of all logged responses."""
    return -float(torch.cat(found.logps).double().mean())


def log_ratios(other: Read, reference: Read) -> Tensor | None:
    """(rows,) float64 ln(policy / reference) of each whole response; None where the two do not write it in equal tokens
    or one of them holds a response for impossible."""
    pairs = zip(other.responses, reference.responses, strict=True)
    if any(ours.response_ids != theirs.response_ids for ours, theirs in pairs):
        return None
    if not evaluation.same_tokens(other.tokenizer, reference.tokenizer, other.responses):
        return None
    sums = [torch.stack([logp.double().sum() for logp in one.logps]) for one in (other, reference)]
    return sums[0] - sums[1] if all(bool(one.isfinite().all()) for one in sums) else None


def rewarded(rows: Sequence[Example]) -> dict[str, Rewarded]:
    """By the name of the reward, "" for `reward` itself, the rows that have it; none that only repeats `reward`."""
    names = dict.fromkeys(name for row in rows for name in row.rewards)
    own = {"": [row.reward for row in rows]} | {name: [row.rewards.get(name) for row in rows] for name in names}
    return {
        name: _rewarded(rows, values)
        for name, values in own.items()
        if any(value is not None for value in values) and (not name or values != own[""])
    }


def _rewarded(rows: Sequence[Example], values: Sequence[float | None]) -> Rewarded:
    places = [i for i, value in enumerate(values) if value is not None]
    rewards, prompts = [values[i] for i in places], [rows[i].prompt for i in places]
    known = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    expected = text_regression.out_of_fold([_text(prompt) for prompt in prompts], rewards, prompts)
    return Rewarded(
        places,
        torch.tensor(rewards, dtype=torch.float64),
        torch.from_numpy(expected),
        torch.tensor([known[prompt] for prompt in prompts]),
        torch.tensor([len(between_blanks(text_of(rows[i].completion))) for i in places]),
    )


def _text(prompt: object) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(turn.content for turn in prompt)


def gained(log_ratio: Tensor, rewards: Mapping[str, Rewarded]) -> dict[str, float]:
    """gain/... of a policy by every reward; what is not to be believed has no number, and gain/known is 0."""
    found: dict[str, float] = {}
    for name, rows in rewards.items():
        head = f"gain/{name}/" if name else "gain/"
        held_out = estimates.HeldOut(log_ratio[rows.places], rows.reward, rows.value, rows.prompt, rows.words)
        gain = estimates.gain(held_out)
        found |= {f"{head}known": float(gain.known), f"{head}ess": gain.ess, f"{head}rows": float(gain.rows)}
        found |= {f"{head}prompts": float(gain.prompts), f"{head}length_correlation": gain.length_correlation}
        found[f"{head}mass"] = gain.mass
        if gain.known:
            found |= {f"{head}estimate": gain.value, f"{head}low": gain.low, f"{head}high": gain.high}
    return found


def say_of_rows(rows: Sequence[Example], found: Mapping[str, Read], known: Mapping[str, Rewarded]) -> None:
    """What of the logged rows is not as a user may think: none, without rewards, cut."""
    needed = "an estimate of what was gained wants held-out rows with responses and their rewards: data.test=FILE"
    if not known:
        logger.info(f"rows: {len(rows):,} logged responses, none with a reward: {needed}")
    for name, one in known.items():
        if len(one.places) < len(rows):
            which = name or "reward"
            logger.info(
                f"{which}: {len(one.places):,} of {len(rows):,} logged responses have it, and are counted by it"
            )
    for name, one in found.items():
        cut = sum(not response.finished for response in one.responses)
        if cut:
            logger.warning(
                f"policy {name}: {cut:,} of {len(rows):,} logged responses lose text to data.max_response_length: "
                "their rewards are of the whole, the estimates of what is left: raise it"
            )
