"""What the policy gives before its first step, computed once and cached on disk: log-probabilities, values, advantages.

The reference is the policy before its first step, so the training engine itself computes them: same weights, kernel,
precision and sharding as in training, and never a second model in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

from pipeline.config.schema import RlStage
from pipeline.data import cache, encoded
from pipeline.data.batching import AT_ONCE, Packing, collate, once, window
from pipeline.data.cache import digest
from pipeline.data.encoded import Items
from pipeline.errors import UserError
from pipeline.files import fingerprint
from pipeline.launch import going_on, run_dir
from pipeline.models.value_head import ValueHead
from pipeline.records import Example, Item, Needs
from pipeline.rl import values
from pipeline.rl.context import Context
from pipeline.rl.values import ValueData
from pipeline.trainer.engine import Engine
from pipeline.trainer.group import Ranks
from pipeline.trainer.model import Model

NOTED = 0.02  # nats per token: of a response of 100 tokens the ratio may then begin a fifth off, or more
FORMAT = 5  # raise it when what is computed changes

logger = logging.getLogger("tiffin")


@dataclass(frozen=True)
class ReferencePolicy:
    """The frozen start of the policy, as the engine holds it before the first step, and the key of what it says."""

    model: Model
    settings: RlStage
    weights: str  # fingerprint

    def cache(self, name: str, ending: str = ".pt", **parts: object) -> Path:
        """Where a result is kept: the name holds everything it depends on."""
        settings = self.settings
        content = {
            "format": FORMAT,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "weights": self.weights,
            "read": [settings.model.revision, settings.model.load_in_4bit],  # of the weights, what they became
            "template": self.model.encoder.template.model_dump(),
            "precision": settings.train.precision,
            "attention": settings.model.attn_implementation,
            "dropout": settings.model.dropout,
            "device": self.model.ranks.device.type,
            **parts,
        }
        key = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:24]
        return run_dir.cache(settings) / f"{name}-{key}{ending}"


def reference_of(context: Context, policy: Model) -> ReferencePolicy:
    """What `policy` is before its first step."""
    return ReferencePolicy(policy, context.settings, fingerprint(context.start.path))


def annotate(
    policy: ReferencePolicy, parts: Sequence[Sequence[Item]], needs: Needs, value_data: ValueData | None = None
) -> tuple[list[Sequence[Item]], dict[str, float]]:
    """The items of each part with what the algorithm needs of the reference, and how well the value head fits.

    Log-probabilities go to `ref_logp`, values to the numbers `value` and `advantage` = reward - value.
    """
    report: dict[str, float] = {}
    if needs.values:  # which reads the rows, and keeps what both want
        parts, report = with_values(policy, parts, value_data, needs.ref_logp)
    if needs.ref_logp:
        parts = [with_ref_logps(policy, items) for items in parts]
    return [*parts], report


def with_ref_logps(policy: ReferencePolicy, items: Sequence[Item]) -> Sequence[Item]:
    """The items with the reference's log-probabilities, mapped from a file that rank 0 writes part by part."""

    def compute(part: Path | None) -> None:
        read_rows(policy.model, items, part)

    return attached(items, np.load(cached(logps_path(policy, items), policy.model.engine, compute), mmap_mode="r"))


def logps_path(policy: ReferencePolicy, items: Sequence[Item]) -> Path:
    return policy.cache("ref_logps", ".npy", rows=encoded.tokens_digest(items))


def read_rows(model: Model, items: Sequence[Item], part: Path | None, head: ValueHead | None = None) -> Tensor | None:
    """Write the log-probabilities of all response tokens to `part`, where a rank has one, as an array of numpy.

    With `head` returns (items,) float32, the values of the items' prompts, read in the same pass.
    """
    total = sum(int(lengths.sum()) for lengths in _lengths(items))
    found = []
    # written and not mapped, so that a full disk is an error and no signal
    with nullcontext() if part is None else open(part, "wb") as file:
        if file is not None:
            header = {"descr": "<f4", "fortran_order": False, "shape": (total,)}
            np.lib.format.write_array_header_1_0(file, header)
        for logps, some in read_in_parts(model.engine, items, model.packing, head):
            found.append(some)
            if file is not None:
                file.write(logps.astype("<f4").tobytes())
        if file is not None:
            file.flush()
            os.fsync(file.fileno())
    return None if head is None else torch.cat(found)


def attached(items: Sequence[Item], logps: np.ndarray) -> Sequence[Item]:
    """The items with the log-probabilities of all their response tokens, one after the other."""
    if isinstance(items, Items):
        return replace(items, ref_logp=logps)
    lengths = [len(row.response_ids) for item in items for row in item.rows]
    rows = iter(torch.from_numpy(np.array(logps)).split(lengths))
    return [replace(item, ref_logp=tuple(next(rows) for _ in item.rows)) for item in items]


def with_values(
    policy: ReferencePolicy, parts: Sequence[Sequence[Item]], data: ValueData, ref_logps: bool = False
) -> tuple[list[Sequence[Item]], dict[str, float]]:
    """The items of each part with `value` and `advantage`, and how well the head predicts on prompts it did not see.

    Where `ref_logps` will be wanted too and are not known yet, both come from one pass over the rows. Raises UserError
    as `values.source_of`.
    """
    settings, model = policy.settings, policy.model
    source = values.source_of(settings.value.targets, data.rewards)
    # all that the values depend on
    key = {
        "rows": [encoded.tokens_digest(items) for items in parts],
        "logged": digest(encoded.column(data.logged, "reward")) if source == "data" else None,
        "value": [source, settings.value.model_dump()],
        **sampling_key(policy, data, source == "policy"),
    }

    def compute(part: Path | None) -> None:
        targets = values.value_targets(model, settings, data, source)
        head, report = values.fit_value(model.engine, targets, model.packing, settings.value, settings.seed)
        found = []
        for items in parts:
            found.append(values_of(policy, items, head, ref_logps))
            refuse_infinite("values", items, (~found[-1].isfinite()).nonzero().flatten().tolist())
        if part is not None:
            with open(part, "wb") as file:  # by its path it would hold its name, which is another each time
                torch.save({"values": found, "report": report}, file)

    saved = torch.load(cached(policy.cache("values", **key), model.engine, compute), weights_only=True, mmap=True)
    valued = []
    for items, value in zip(parts, saved["values"], strict=True):
        expected = value.double().numpy()
        gains = encoded.column(items, "reward") - expected
        valued.append(encoded.with_numbers(items, value=expected, advantage=gains))
    return valued, saved["report"]


def sampling_key(policy: ReferencePolicy, data: ValueData, sampled: bool) -> dict[str, object]:
    """What the rewards of fresh responses to `data.prompts` depend on: another judge, seed or number of ranks gives
    others; other ranks that go on with a stage learn from what it began with."""
    settings, ranks = policy.settings, policy.model.ranks
    judges = data.rewards.rewards if data.rewards is not None else ()
    began = ranks.on_main(lambda: going_on.first_ranks(run_dir.stage_dir(settings, "rl")))
    read = settings.rewards.model_dump(include={"reads", "max_length", "judge"}, exclude={"judge": {"budget"}})
    return {
        "prompts": prompts_digest(data.prompts, sampled),
        "cut": [settings.data.max_prompt_length, settings.data.keep_of_prompt],
        "judge": [data.rewards_key, [[one.name, one.weight, one.normalise] for one in judges], read],
        "generation": settings.generation.model_dump(),
        "seed": settings.seed,
        "world": began or ranks.world,
    }


def values_of(policy: ReferencePolicy, items: Sequence[Item], head: ValueHead, ref_logps: bool) -> Tensor:
    """(items,) float32, the values of the items' prompts; with `ref_logps` the file of these is there then.

    It may be there before: values are read in the same way all the same, so that they are the same to the last bit.
    For whoever holds the lock of the cache.
    """
    model = policy.model
    if not ref_logps:
        return values.values_of(model.engine, head, prompts_of(items), model.packing)
    with written(logps_path(policy, items), model.ranks) as part:
        return read_rows(model, items, part, head)


def prompts_of(items: Sequence[Item]) -> Sequence[Item]:
    """The items with the prompts of their first rows alone."""
    if isinstance(items, Items):
        return replace(items, bare=True, ref_logp=None)
    return [Item(item.example, (replace(item.rows[0], response_ids=()),)) for item in items]


def prompts_digest(prompts: Sequence[Example], columns: bool) -> str:
    """sha256 of prompts with what their answers are compared with, and with their further columns where these count."""
    found = hashlib.sha256()
    for one in prompts:
        found.update(
            json.dumps([str(one.prompt), one.references, one.columns if columns else None], default=str).encode()
        )
    return found.hexdigest()


def cached(path: Path, engine: Engine, compute: Callable[[Path | None], None]) -> Path:
    """`path`; where it is missing, all ranks compute and rank 0, told where, writes it, whole or not at all."""
    ranks = engine.ranks
    path.parent.mkdir(parents=True, exist_ok=True)
    with run_dir.waiting(path.parent) if ranks.main else nullcontext():
        if ranks.main:
            cache.sweep((part for part in path.parent.glob(f"*{cache.PART}") if part.is_file()), alone=False)
        if not ranks.from_main(ranks.main and path.is_file()):  # NFS remembers that others saw none
            with written(path, ranks) as part:
                compute(part)
            ranks.barrier()
    if not path.is_file():
        raise UserError(f"{path}: this machine does not see it, wanted runs_dir on a file system all machines share")
    return path


@contextmanager
def written(path: Path, ranks: Ranks) -> Iterator[Path | None]:
    """Where rank 0 is to write `path`, which is then there, whole or not at all; None on other ranks."""
    part = cache.part_of(path)
    try:
        yield part if ranks.main else None
        if ranks.main:
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # where it went wrong: a full disk would stay full


def reference_logps(engine: Engine, items: Sequence[Item], packing: Packing) -> list[Tensor]:
    """(T,) float32 log-probabilities of the response tokens of each row, of few items. Raises as `read_in_parts`."""
    whole = torch.cat([torch.from_numpy(part) for part, _ in read_in_parts(engine, items, packing)])
    return list(whole.split([int(length) for lengths in _lengths(items) for length in lengths]))


@torch.no_grad()
def read_in_parts(
    engine: Engine, items: Sequence[Item], packing: Packing, head: ValueHead | None = None
) -> Iterator[tuple[np.ndarray, Tensor | None]]:
    """Log-probabilities of all response tokens, float32, those of some thousand items after the other, on every rank.

    With `head`, beside them, the values of the items' first prompts, (items,) float32: states live for one micro-batch.

    Raises UserError, which names the rows, where some are not finite: after the last, of all.
    """
    engine.train(False)
    ill: list[int] = []
    wanted = {} if head is None else {"output": "logp_states"}
    for start, lengths in zip(range(0, len(items), AT_ONCE), _lengths(items), strict=True):
        some = items[start : start + AT_ONCE]
        per = len(lengths) // len(some)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        found, values_found = torch.zeros(int(ends[-1])), torch.zeros(len(some))
        for batch in once(some, packing, engine.ranks.rank, engine.ranks.world):
            said, n = engine(batch, **wanted), len(batch.items)
            if head is not None:
                said, states = said  # (B, T), (B, P, H)
                values_found[list(batch.items)] = values.of_states(head, states, batch)
            logp = said.float().cpu()
            for place, index in enumerate(batch.items):
                for i in range(per):
                    at, row = index * per + i, place + i * n
                    found[ends[at] : ends[at + 1]] = logp[row][batch.response_mask[row]]
        found = engine.ranks.all_sum(found)  # one rank has each
        broken = np.flatnonzero(~found.isfinite().numpy())
        ill += [*dict.fromkeys(((np.searchsorted(ends, broken, side="right") - 1) // per + start).tolist())]
        yield found.numpy(), None if head is None else engine.ranks.all_sum(values_found)
    refuse_infinite("reference log-probabilities", items, ill)


def _lengths(items: Sequence[Item]) -> Iterator[np.ndarray]:
    """The tokens of each response, of some thousand items after the other."""
    for start in range(0, len(items), AT_ONCE):
        some = items[start : start + AT_ONCE]
        if isinstance(some, Items):
            yield some.responses
        else:
            yield np.array([len(row.response_ids) for item in some for row in item.rows])


def refuse_infinite(what: str, items: Sequence[Item], ill: Sequence[int]) -> None:
    """Raises UserError naming the items `ill`, of which something is NaN or infinite."""
    if ill:
        names = ", ".join(items[i].example.id for i in ill[:5]) + (f" and {len(ill) - 5} more" if len(ill) > 5 else "")
        raise UserError(f"{what}: not finite on rows {names}, wanted numbers: is the model whole? try precision=fp32")


@torch.no_grad()
def check_ratio(
    engine: Engine, items: Sequence[Item], indices: Sequence[int], packing: Packing, tolerance: float
) -> float:
    """The mean |logp - ref_logp| per token over `indices` before the first step, which must be about 0.

    Raises UserError where it is over `tolerance`.
    """
    engine.train()
    sums = torch.zeros(2, dtype=torch.float64)
    for mine in window(items, indices, packing, engine.ranks.rank, engine.ranks.world):
        batch = collate(items, mine, packing)
        logp = engine(batch).float().cpu()
        gap = torch.where(batch.response_mask, (logp - batch.ref_logp).abs(), 0.0)
        sums += torch.tensor([float(gap.double().sum()), float(batch.response_mask.sum())], dtype=torch.float64)
    total, count = engine.ranks.all_sum(sums).tolist()
    if not total / count <= tolerance:
        raise UserError(
            f"ratio_tolerance: policy and reference differ by {total / count:.2g} nats per token before the first "
            f"step, wanted <= {tolerance}: is dropout on (model.dropout=0.0), or the cache of another kernel "
            "(remove the run's cache/)?"
        )
    if total / count > NOTED:
        logger.info(
            f"policy and reference differ by {total / count:.2g} nats per token before the first step, by rounding: "
            "ratios of long responses do not begin at 1 (train.precision=fp32: they do)"
        )
    return total / count
