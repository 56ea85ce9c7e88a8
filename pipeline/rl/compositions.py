"""Compositions: static responses with drawn tokens in their masked places, as texts, and what the rewards say of them.

The rewards are asked once per different text of an example, between the forward and the backward of a micro-batch;
where worker processes judge, the next micro-batch's forward may run meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.algorithms.logits import Drawn
from pipeline.algorithms.stats import mean_stat, std_stat
from pipeline.data.sampling import generator
from pipeline.data.tokenization import Encoder
from pipeline.records import Batch, Example, Item, Scores, Stat, StaticBatch
from pipeline.rewards import scoring
from pipeline.rewards.rewards import Rewards
from pipeline.trainer.group import Ranks
from pipeline.trainer.objective import AlgorithmModule


@dataclass(frozen=True)
class Compositions:
    """Those of one micro-batch of b items, b * (n + 1) texts: n drawn ones and the greedy one of each."""

    examples: list[Example]
    ids: Tensor  # (b, n + 1, S) int64 on the CPU
    texts: list[list[str]]  # [b][n + 1]
    scores: Scores  # of all texts, row by row
    rewards: Tensor  # (b, n + 1) float32: the totals


@dataclass(frozen=True)
class Composer:
    """Judges what was drawn for the items it is given, and calls the algorithm's loss."""

    ranks: Ranks
    encoder: Encoder
    rewards: Rewards
    items: Sequence[Item]
    module: AlgorithmModule
    shuffled: int | None = None  # a seed: rewards change places among an example's texts

    def loss(self, output: tuple[Tensor, ...], batch: Batch, settings: Any) -> tuple[Tensor, dict[str, Stat]]:
        """The algorithm's sums, and its statistics beside those of the compositions.

        Raises UserError where a reward fails; on every rank, wherever it failed.
        """
        return self.begin(output, batch, settings)()

    def begin(
        self, output: tuple[Tensor, ...], batch: Batch, settings: Any
    ) -> Callable[[], tuple[Tensor, dict[str, Stat]]]:
        """`loss` in two halves: texts are written and worker processes asked; what is returned waits for rewards."""
        judged = self.ask(*self.write(Drawn(*output[2:]), batch), batch)

        def rest() -> tuple[Tensor, dict[str, Stat]]:
            compositions = judged()
            rewards = torch.zeros(len(batch.response_ids), settings.samples)  # 0 for fillers
            rewards[: len(batch.items)] = compositions.rewards[:, :-1]
            static = replace(batch.static, rewards=rewards.to(batch.response_ids.device))
            totals, stats = self.module.loss(output, replace(batch, static=static), settings)
            own = {
                name: Stat(kind, sums.to(self.ranks.device)) for name, (kind, sums) in statistics(compositions).items()
            }
            return totals, stats | own

        return rest

    def compose(self, drawn: Drawn, batch: Batch) -> Compositions:
        """The texts of one micro-batch with their rewards. Raises UserError as `loss`."""
        return self.ask(*self.write(drawn, batch), batch)()

    def write(self, drawn: Drawn, batch: Batch) -> tuple[Tensor, list[list[str]]]:
        """(b, n + 1, S) ids of what was composed for each item, and the texts of these."""
        ids = composed_ids(batch.static, drawn)[: len(batch.items)]
        lengths = batch.static.mask.sum(1).tolist()
        rows = [row[:length] for group, length in zip(ids.tolist(), lengths, strict=False) for row in group]
        width = ids.shape[1]
        texts = self.encoder.decode_all(rows, [self.items[i].example.prompt for i in batch.items for _ in range(width)])
        return ids, [texts[i : i + width] for i in range(0, len(texts), width)]

    def ask(self, ids: Tensor, texts: list[list[str]], batch: Batch) -> Callable[[], Compositions]:
        """Have what `write` gave judged: worker processes have begun, and what is returned waits for them."""
        examples = [self.items[i].example for i in batch.items]
        lengths = batch.static.mask.sum(1).tolist()
        rows = [[one[:length] for one in group] for group, length in zip(ids.tolist(), lengths, strict=False)]
        scores = judging(self.rewards, examples, texts, rows)

        def judged() -> Compositions:
            agreed = self.ranks.agreed(scores)
            rewards = torch.tensor(agreed.total, dtype=torch.float32).reshape(len(texts), ids.shape[1])
            if self.shuffled is not None:
                rewards = self._shuffled(rewards, examples, texts)
            return Compositions(examples, ids, texts, agreed, rewards)

        return judged

    def _shuffled(self, rewards: Tensor, examples: Sequence[Example], texts: list[list[str]]) -> Tensor:
        """A control: the same numbers, which say nothing of the texts any more; the greedy text keeps its own."""
        shuffled, last = rewards.clone(), rewards.shape[1] - 1
        for row, example, group in zip(shuffled, examples, texts, strict=True):
            numbers = generator("shuffle", self.shuffled, (example.id, *group))
            row[:last] = row[:last][torch.randperm(last, generator=numbers)]
        return shuffled


def statistics(compositions: Compositions) -> dict[str, Stat]:
    """What is logged of the texts: each reward by itself, the greedy composition, how many texts differ."""
    width = compositions.ids.shape[1]
    different = torch.tensor([len(set(group[:-1])) / (width - 1) for group in compositions.texts])
    stats = {
        "semi_offline/different_texts": mean_stat(different),
        "semi_offline/greedy_reward": mean_stat(compositions.rewards[:, -1]),
    }
    for name, values in compositions.scores.normalised.items():
        judged = [value for i, value in enumerate(values) if value is not None and (i + 1) % width]  # no greedy text
        drawn = torch.tensor(judged, dtype=torch.float32)
        tag = f"semi_offline/rewards/{name}"
        stats |= {f"{tag}/mean": mean_stat(drawn), f"{tag}/std": std_stat(drawn)}
    return stats


def composed_ids(static: StaticBatch, drawn: Drawn) -> Tensor:
    """(B, n + 1, S) int64 on the CPU: each static response with its n draws, and last with the greedy tokens."""
    tokens = torch.cat([drawn.ids, drawn.greedy[:, None]], dim=1).cpu()  # (M, n + 1)
    ids = static.ids.cpu()[:, None].repeat(1, tokens.shape[1], 1)
    ids.transpose(1, 2)[static.masked.cpu()] = tokens
    return ids


def judging(
    rewards: Rewards, examples: Sequence[Example], texts: list[list[str]], ids: list[list[list[int]]]
) -> Callable[[], Scores]:
    """The scores of all texts, row by row, from a call that waits for them; worker processes have begun.

    Equal texts of one example are judged once, with the ids of the first. The call raises UserError where a reward
    fails.
    """
    places: dict[tuple[int, str], int] = {}  # of each different text of an example
    first = []  # its ids
    for i, group in enumerate(texts):
        for text, row in zip(group, ids[i], strict=True):
            if places.setdefault((i, text), len(places)) == len(first):
                first.append(row)
    owners = [examples[i] for i, _ in places]
    prompts = [scoring.plain_prompt(example) for example in owners]
    scores = rewards.begin(prompts, [text for _, text in places], scoring.reward_columns(owners, first))
    order = [places[i, text] for i, group in enumerate(texts) for text in group]
    return lambda: _ordered(scores(), order)


def _ordered(given: Scores, order: Sequence[int]) -> Scores:
    """The scores of texts number order[0], order[1] and so on."""

    def each(named: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
        return {name: [values[i] for i in order] for name, values in named.items()}

    return Scores(each(given.raw), each(given.normalised), [given.total[i] for i in order])


def token_credit(advantages: Tensor, masked: Tensor) -> Tensor:
    """(M, n): of each drawn token, the advantage of its composition over the masked tokens of its sequence.

    advantages (B, n), masked (B, S).
    """
    sequences = masked.nonzero()[:, 0]
    return advantages[sequences] / masked.sum(1)[sequences][:, None]
