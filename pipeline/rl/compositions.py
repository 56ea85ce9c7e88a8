"""Compositions: static responses with drawn tokens in their hidden places, as texts, and what the rewards say of them.

The rewards are asked once per different text of an example, between the forward and the backward of a micro-batch;
where worker processes judge, the next micro-batch's forward may run meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.algorithms.functional import Drawn, mean_stat, std_stat
from pipeline.data.sampling import generator
from pipeline.data.tokenization import Encoder
from pipeline.records import Batch, Example, Item, Scores, Stat, Static
from pipeline.rewards import scoring
from pipeline.rewards.rewards import Rewards
from pipeline.trainer.engine import Ranks


@dataclass(frozen=True)
class Composed:
    """What was composed for one micro-batch of b items, b * (n + 1) texts: n drawn ones and the greedy one of each."""

    examples: list[Example]
    ids: Tensor  # (b, n + 1, S) int64 on the CPU
    texts: list[list[str]]  # [b][n + 1]
    scores: Scores  # of all texts, row by row
    rewards: Tensor  # (b, n + 1) float32: the totals


class Composer:
    """Judges what was drawn for the items it is given, and calls the algorithm's loss."""

    def __init__(
        self,
        ranks: Ranks,
        encoder: Encoder,
        judge: Rewards,
        items: Sequence[Item],
        module: Any,
        shuffled: int | None = None,  # a seed: rewards change places among an example's texts
    ):
        self.ranks, self.encoder, self.judge, self.items = ranks, encoder, judge, items
        self.module, self.shuffled = module, shuffled

    def loss(self, output: tuple[Tensor, ...], batch: Batch, settings: Any) -> tuple[Tensor, dict[str, Stat]]:
        """The algorithm's sums, and its statistics beside those of the compositions.

        Raises:
            UserError: a reward fails; on every rank, wherever it failed.
        """
        return self.begin(output, batch, settings)()

    def begin(
        self, output: tuple[Tensor, ...], batch: Batch, settings: Any
    ) -> Callable[[], tuple[Tensor, dict[str, Stat]]]:
        """`loss` in two halves: texts are written and worker processes asked; what is returned waits for rewards."""
        asked = self.ask(*self.write(Drawn(*output[2:]), batch), batch)
        return lambda: self.blame(output, batch, settings, asked())

    def compose(self, drawn: Drawn, batch: Batch) -> Composed:
        """The texts of one micro-batch with their rewards."""
        return self.judge_texts(*self.write(drawn, batch), batch)

    def write(self, drawn: Drawn, batch: Batch) -> tuple[Tensor, list[list[str]]]:
        """(b, n + 1, S) ids of what was composed for each item, and the texts of these."""
        ids = composed_ids(batch.static, drawn)[: len(batch.items)]
        lengths = batch.static.mask.sum(1).tolist()
        rows = [row[:length] for group, length in zip(ids.tolist(), lengths, strict=False) for row in group]
        texts = self.encoder.decode_all(rows)
        width = ids.shape[1]
        return ids, [texts[i : i + width] for i in range(0, len(texts), width)]

    def judge_texts(self, ids: Tensor, texts: list[list[str]], batch: Batch) -> Composed:
        """What `write` gave, with rewards. Raises UserError as `loss`."""
        return self.ask(ids, texts, batch)()

    def ask(self, ids: Tensor, texts: list[list[str]], batch: Batch) -> Callable[[], Composed]:
        """`judge_texts` in two halves: worker processes have begun, and what is returned waits for them."""
        examples = [self.items[i].example for i in batch.items]
        scores = judging(self.judge, examples, texts)
        return lambda: self._composed(examples, ids, texts, self.ranks.agreed(scores))

    def _composed(self, examples: list[Example], ids: Tensor, texts: list[list[str]], scores: Scores) -> Composed:
        rewards = torch.tensor(scores.total, dtype=torch.float32).reshape(len(texts), ids.shape[1])
        if self.shuffled is not None:
            rewards = self._shuffle(rewards, examples, texts)
        return Composed(examples, ids, texts, scores, rewards)

    def blame(
        self, output: tuple[Tensor, ...], batch: Batch, settings: Any, found: Composed
    ) -> tuple[Tensor, dict[str, Stat]]:
        """As `loss`, with texts that are judged already."""
        rewards = torch.zeros(len(batch.response_ids), settings.samples)
        rewards[: len(batch.items)] = found.rewards[:, :-1]
        static = replace(batch.static, rewards=rewards.to(batch.response_ids.device))
        totals, stats = self.module.loss(output, replace(batch, static=static), settings)
        return totals, stats | self.statistics(found)

    def _shuffle(self, rewards: Tensor, examples: Sequence[Example], texts: list[list[str]]) -> Tensor:
        """A control: the same numbers, which say nothing of the texts any more."""
        last = rewards.shape[1] - 1
        orders = [
            torch.randperm(last, generator=generator("shuffle", self.shuffled, (example.id, *group)))
            for example, group in zip(examples, texts, strict=True)
        ]
        drawn = [row[:last][order] for row, order in zip(rewards, orders, strict=True)]
        return torch.cat([torch.stack(drawn), rewards[:, last:]], dim=1) if drawn else rewards

    def statistics(self, found: Composed) -> dict[str, Stat]:
        """What is logged of the texts: each reward by itself, the greedy composition, how many texts differ."""
        width = found.ids.shape[1]
        different = torch.tensor([len(set(group[:-1])) / (width - 1) for group in found.texts])
        stats = {
            "semi_offline/different_texts": mean_stat(different),
            "semi_offline/greedy_reward": mean_stat(found.rewards[:, -1]),
        }
        for name, values in found.scores.normalised.items():
            drawn = torch.tensor(values).reshape(len(found.texts), width)[:, :-1]
            stats[f"rewards/{name}/mean"] = mean_stat(drawn)
            stats[f"rewards/{name}/std"] = std_stat(drawn)
        return {name: Stat(stat.kind, stat.sums.to(self.ranks.device)) for name, stat in stats.items()}


def composed_ids(static: Static, drawn: Drawn) -> Tensor:
    """(B, n + 1, S) int64 on the CPU: each static response with its n draws, and last with the greedy tokens."""
    hidden = static.hidden.cpu()
    tokens = torch.cat([drawn.ids, drawn.greedy[:, None]], dim=1).cpu()  # (M, n + 1)
    ids = static.ids.cpu()[:, None].repeat(1, tokens.shape[1], 1)
    ids.transpose(1, 2)[hidden] = tokens
    return ids


def judging(judge: Rewards, examples: Sequence[Example], texts: list[list[str]]) -> Callable[[], Scores]:
    """The scores of all texts, row by row, from a call that waits for them; worker processes have begun.

    Equal texts of one example are judged once. The call raises UserError where a reward fails.
    """
    places: list[dict[str, int]] = []
    asked: list[tuple[Example, str]] = []
    for example, group in zip(examples, texts, strict=True):
        first = {text: len(asked) + i for i, text in enumerate(dict.fromkeys(group))}
        asked += [(example, text) for text in first]
        places.append(first)
    owners = [example for example, _ in asked]
    prompts = [scoring.plain_prompt(example) for example in owners]
    scores = judge.begin(prompts, [text for _, text in asked], scoring.reward_columns(owners))
    order = [first[text] for first, group in zip(places, texts, strict=True) for text in group]

    return lambda: spread(scores(), order)


def spread(found: Scores, order: Sequence[int]) -> Scores:
    """The scores of texts number order[0], order[1] and so on."""

    def placed(values: Sequence[float]) -> list[float]:
        return [values[i] for i in order]

    raw = {name: placed(values) for name, values in found.raw.items()}
    normalised = {name: placed(values) for name, values in found.normalised.items()}
    return Scores(raw, normalised, placed(found.total))


def credits(drawn: Drawn, advantages: Tensor, hidden: Tensor) -> Tensor:
    """(M, n): what each drawn token is told, the advantage of its composition over the hidden tokens of its sequence.

    advantages (B, n), hidden (B, S).
    """
    sequences = hidden.nonzero()[:, 0]
    return advantages[sequences] / hidden.sum(1)[sequences][:, None]
