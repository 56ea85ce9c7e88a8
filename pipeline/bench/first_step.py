"""What stages/sft.py does until its first step is taken, as a program that times each part.

Imports nothing of ours or of others before it measures that: `python -m pipeline.bench.first_step CLOCK key=value ...`
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any


def main(clock: str, words: Sequence[str]) -> dict[str, float]:
    """Seconds by part, in order; `clock` is wall or cpu."""
    times: dict[str, float] = {}
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]

    def take(name: str, work: Callable[[], Any]) -> Any:
        started = now()
        result = work()
        times[name] = now() - started
        return result

    take("imports", load)
    from pipeline.algorithms import supervised
    from pipeline.config.resolve import resolve
    from pipeline.data import dataset
    from pipeline.data.batching import Windows
    from pipeline.models import build as models_build
    from pipeline.trainer import engine, loop

    settings = take("settings", lambda: resolve(words).settings)
    ranks = take("process group", lambda: engine.start(settings.launch.ddp_timeout))
    rows = take("data", lambda: dataset.supervised(next(dataset.splits(settings.data, settings.seed, ["train"]))))

    def encode() -> Any:
        encoder = models_build.encoder_of(settings, settings.model, lambda: dataset.texts(rows, settings.template))
        return encoder, dataset.encode(rows, encoder, dataset.completion_rows).items

    encoder, items = take("tokens", encode)
    longest = settings.data.max_response_length
    build = lambda: models_build.build_policy(settings.model, encoder, settings.train, longest, settings.seed)  # noqa: E731
    policy = take("model", build)
    trainer = take("engine", lambda: engine.Engine(policy, ranks, settings.train, settings.optimizer))
    draw = loop.epochs(len(items), settings.train.batch_size, settings.seed)
    packing = models_build.packing(settings.train, ranks.world, policy, encoder)

    def step() -> None:
        window = Windows(items, draw, packing, ranks.rank, ranks.world).at(0)
        for place, batch in enumerate(window):
            total, _ = supervised.loss(trainer(batch), batch.to(ranks.device), supervised.Settings(0.0))
            trainer.backward(total, total.new_ones(()), last=place == len(window) - 1)
        trainer.step(settings.optimizer.learning_rate)

    take("first step", step)
    return times


def load() -> None:
    """Import what a training stage imports."""
    from pipeline.trainer import loop  # noqa: F401


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2:])))
