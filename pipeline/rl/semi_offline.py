"""Learning from hidden tokens of static responses: rows -> reference and static rows -> one forward per micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from pipeline.algorithms import functional, supervised
from pipeline.algorithms.functional import Drawn
from pipeline.data import dataset
from pipeline.data.batching import Packing, Windows, collate
from pipeline.data.dataset import reference_text
from pipeline.data.tokenization import Encoder, coloured
from pipeline.errors import UserError
from pipeline.models import build
from pipeline.records import Batch, Example, Item, Row
from pipeline.rl.composition_samples import samples_of
from pipeline.rl.compositions import Composer
from pipeline.rl.context import Lesson, Scene, refuse, required_judge, spoken
from pipeline.trainer import evaluation, loop
from pipeline.trainer.engine import Engine
from pipeline.trainer.loop import Evaluation, Watch
from pipeline.trainer.objective import Objective

CLOSE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}  # relative to the states' size, by precision


def lesson(scene: Scene) -> Lesson:
    """Semi-offline RL: nothing is known beforehand but static responses; rewards are those of what is composed."""
    settings, ranks = scene.settings, scene.ranks
    refuse(settings, rows="all", sampling="all")
    judge = required_judge(scene)
    encoder = build.encoder_of(settings, scene.model, list, mask=True)
    held = rows_of(scene, encoder)

    longest = scene.data.max_response_length
    policy = build.build_policy(scene.model, encoder, settings.train, longest, settings.seed, mask=True)
    packing = build.packing(settings.train, ranks.world, policy, encoder)
    hiding = build.hidden(
        packing, encoder, policy, settings, samples=scene.algorithm.samples, share_prompt=settings.share_prompt
    )
    trainer = Engine(policy, ranks, settings.train, settings.optimizer)
    shuffled = settings.seed if settings.shuffle_rewards else None
    composer = Composer(ranks, encoder, judge, held.items, scene.module, shuffled)
    overlap = judge.elsewhere and trainer.stage < 3  # ZeRO-3 foresees each forward's backward to fetch weights in time
    draw = loop.epochs(len(held.items), settings.train.batch_size, settings.seed)
    course = loop.Course(
        windows=Windows(held.items, draw, hiding, ranks.rank, ranks.world),
        objective=replace(
            scene.objective,
            loss=lambda output, batch: composer.loss(output, batch, scene.algorithm),
            begin=partial(composer.begin, settings=scene.algorithm) if overlap else None,
        ),
        max_steps=loop.steps_for(settings, len(held.items)),
        eval_steps=settings.train.eval_steps,
        evaluate=Look(scene, trainer, encoder, held, composer, packing, hiding),
        watch=Watch("eval/reward/mean", True),
        export=loop.exporter(trainer, encoder),
    )
    return Lesson(trainer, course, lambda: check_shared(trainer, held.items, hiding, CLOSE[settings.train.precision]))


@dataclass(frozen=True)
class Held:
    """Rows trained on, with their static responses; held-out rows; and the prompts of these, each once."""

    items: list[Item]
    tested: list[Item]
    prompts: list[Example]


def rows_of(scene: Scene, encoder: Encoder) -> Held:
    """What is learned from and looked at, after a word about both."""
    settings, data = scene.settings, scene.data
    train, held_out = dataset.splits(data, settings.seed)
    encoded = dataset.encode(train, encoder, reference_rows)
    tested = dataset.encode(held_out[: settings.eval.max_rows], encoder, reference_rows)
    items = with_statics(encoded.items, encoder, settings.static)
    short = wordless([row for item in items for row in item.statics], encoder)
    scene.say(f"{encoded.summary('train')}\n{tested.summary('validation')}")
    scene.say(f"static responses: {settings.static}, {short:,} of them without a word")
    scene.say(coloured(encoder, encoded.items[0].rows[0]))
    scene.ranks.on_main(lambda: dataset.note(scene.directory, encoded, tested))
    return Held(items, tested.items, dataset.unique_prompts(held_out)[: settings.eval.max_rows])


def reference_rows(example: Example, encoder: Encoder) -> tuple[Row, ...]:
    """The reference text as the response. Raises UserError where there is none."""
    return (encoder.encode(example.prompt, dataset.reference_text(example)),)


def with_statics(items: Sequence[Item], encoder: Encoder, which: str) -> list[Item]:
    """The items with the static responses that `which` chooses. Raises UserError where a row has none."""
    return [replace(item, statics=static_rows(item.example, encoder, which)) for item in items]


@dataclass(frozen=True)
class Look:
    """Evaluation: held-out references, read whole and masked; responses really decoded; compositions to look at."""

    scene: Scene
    engine: Engine
    encoder: Encoder
    held: Held
    composer: Composer
    plain: Packing
    hiding: Packing

    def __call__(self, step: int) -> Evaluation:
        settings = self.scene.settings
        scalars = evaluation.held_out_loss(self.engine, LIKELIHOOD, self.held.tested, self.plain)
        masked = replace(self.hiding, hiding=replace(self.hiding.hiding, samples=0))
        read_masked = evaluation.held_out_loss(self.engine, LIKELIHOOD, self.held.tested, masked)
        scalars["eval/masked_loss"] = read_masked["eval/loss"]
        found, samples = spoken(self.engine, self.encoder, self.held.prompts, self.scene.judge, settings)
        histograms, table = self.composed()
        return Evaluation(scalars | found, histograms, [*samples, *table])

    @torch.no_grad()
    def composed(self) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Distributions of the compositions of the first rows; and what was hidden, drawn, told and blamed there."""
        rewards, weights, rows = [], [], []
        for i in range(min(self.scene.settings.eval.num_samples, len(self.held.items))):
            batch = collate(self.held.items, [i], self.hiding)
            drawn = Drawn(*self.engine(batch, output="drawn")[2:])
            found = self.composer.compose(drawn, batch)
            rewards.append(found.rewards[0, :-1])
            weights.append(functional.group_advantages(rewards[-1][None], self.scene.algorithm.baseline))
            rows += samples_of(self.encoder, batch, drawn, found, weights[-1])
        if not rows:
            return {}, []
        return {"reward/compositions": torch.cat(rewards), "advantage": torch.cat(weights).flatten()}, rows


LIKELIHOOD = Objective(
    lambda output, batch: supervised.loss(output, batch, supervised.Settings(0.0)), supervised.MEAN_OVER
)


@torch.no_grad()
def check_shared(trainer: Engine, items: Sequence[Item], hiding: Packing, tolerance: float) -> None:
    """Compare the first row's states, both responses read in one pass, with those of two passes.

    Raises:
        UserError: the model reads the rows otherwise when they share a prompt.
    """
    trainer.train(False)
    batch = collate(items, [0], hiding)
    together = trainer(batch, output="heads")
    masks = (batch.response_mask, batch.static.mask)
    apart = [trainer(one, output="heads") for one in read_apart(batch, hiding)]
    for name, ours, alone, mask in zip(("response", "static response"), together, apart, masks, strict=True):
        there = mask.to(ours.device)
        gap = float((ours - alone)[there].abs().max() / alone[there].abs().max()) if bool(mask.any()) else 0.0
        if not gap <= tolerance:
            raise UserError(
                f"share_prompt: the model reads the {name} beside another one otherwise than "
                f"alone (its states differ by {gap:.2g} of their size, wanted at most {tolerance}): say "
                "share_prompt=false, or choose attn_implementation=sdpa"
            )


def read_apart(batch: Batch, packing: Packing) -> tuple[Batch, Batch]:
    """Two batches of one response each, with the same tokens hidden."""
    given = batch.static
    bare = replace(batch, static=None)
    second = replace(bare, response_ids=given.ids, response_mask=given.mask, shown_ids=given.shown_ids)
    if packing.apart:
        return bare, second
    prompts = [ids[:n] for ids, n in zip(batch.input_ids, batch.prompt_lengths.tolist(), strict=False)]
    pairs = []
    for one in (bare, second):
        said = [ids[mask] for ids, mask in zip(one.shown_ids, one.response_mask, strict=True)]
        rows = [torch.cat(pair) for pair in zip(prompts, said, strict=True)]
        read = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=packing.pad_id)
        pairs.append(replace(one, input_ids=read, input_mask=torch.ones_like(read, dtype=torch.bool)))
    return pairs[0], pairs[1]


def static_rows(example: Example, encoder: Encoder, which: str) -> tuple[Row, ...]:
    """What static RL may start from: the `worst` or the `best` candidate, all of them (`random`), or the `reference`.

    A row without a single word stays. One cut at the limit has no EOS.
    Raises UserError where the example has no candidates, or no reference text.
    """
    return tuple(encoder.encode(example.prompt, text) for text in static_texts(example, which))


def static_texts(example: Example, which: str) -> tuple[str, ...]:
    """The texts of `static_rows`; candidates are taken to stand best first."""
    if which == "reference":
        return (reference_text(example),)
    if not example.candidates:
        raise UserError(
            f"{example.id}: no candidates, wanted some for static={which} to start from: make them with bash run.sh "
            "stage=generate num_return_sequences=8, rank them with stage=score of=generate, or say static=reference"
        )
    chosen = {"worst": example.candidates[-1:], "best": example.candidates[:1], "random": example.candidates}
    return chosen[which]


def wordless(rows: Sequence[Row], encoder: Encoder) -> int:
    """How many of `rows` hold no letter and no digit in what is left of the response."""
    return sum(not any(char.isalnum() for char in encoder.decode(row.response_ids)) for row in rows)
