"""Learning from hidden tokens of static responses: rows -> reference and static rows -> one forward per micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline import assembly, engine, evaluate, examples, statics, training
from pipeline.algorithms import functional, supervised
from pipeline.algorithms.functional import Drawn
from pipeline.compositions import Composer
from pipeline.data import Packing, Windows, collate
from pipeline.engine import Engine
from pipeline.lesson import Lesson, Scene, spoken
from pipeline.loop import Evaluation, Objective, Watch
from pipeline.masked_table import samples_of
from pipeline.records import Batch, Example, Item, Row, UserError
from pipeline.text import Encoder, coloured

CLOSE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}  # relative to the states' size, by precision


def lesson(scene: Scene) -> Lesson:
    """Semi-offline RL: nothing is known beforehand but static responses; rewards are those of what is composed."""
    settings, ranks, model, data = scene.settings, scene.ranks, scene.model, scene.data
    if scene.judge is None:
        raise UserError(
            f"algo={settings.algo}: nothing to judge compositions with, wanted a reward: give reward=NAME, "
            f"or train one with bash run.sh stage=reward run={settings.run}"
        )
    # rows -> references and static responses
    train = examples.load_train(data, settings.seed, scene.say)
    held_out = examples.load(data, "validation", settings.seed, scene.say)
    prompts = examples.unique_prompts(held_out)[: settings.eval.max_rows]
    encoder = assembly.encoder_of(settings, model, list, mask=True)
    encoded = examples.encode(train, encoder, reference_rows)
    tested = examples.encode(held_out[: settings.eval.max_rows], encoder, reference_rows)
    items = with_statics(encoded.items, encoder, settings.static)
    short = statics.wordless([row for item in items for row in item.statics], encoder)
    scene.say(f"{encoded.summary('train')}\n{tested.summary('validation')}")
    scene.say(f"static responses: {settings.static}, {short:,} without a word, of which nothing is learned by reward")
    scene.say(coloured(encoder, encoded.items[0].rows[0]))
    ranks.on_main(lambda: examples.note(scene.directory, encoded, tested))

    longest = data.max_response_length
    policy = assembly.build_policy(model, encoder, settings.train, longest, settings.seed, mask=True)
    packing = assembly.packing(settings.train, ranks, policy, encoder)
    hiding = assembly.hidden(
        packing, encoder, policy, settings, samples=scene.algorithm.samples, share_prompt=settings.share_prompt
    )
    trainer = engine.Engine(policy, ranks, settings.train, settings.optimizer)
    composer = Composer(ranks, encoder, scene.judge, items, scene.module)
    composer.shuffled = settings.seed if settings.shuffle_rewards else None
    look = Look(scene, trainer, encoder, Held(items, tested.items, prompts), composer, packing, hiding)
    course = training.Course(
        windows=Windows(
            items,
            training.epochs(len(items), settings.train.batch_size, settings.seed),
            hiding,
            ranks.rank,
            ranks.world,
        ),
        objective=replace(scene.objective, loss=lambda output, batch: composer.loss(output, batch, scene.algorithm)),
        max_steps=training.steps_for(settings, len(items)),
        eval_steps=settings.train.eval_steps,
        evaluate=look,
        watch=Watch("eval/reward/mean", True),
        export=assembly.exporter(trainer, encoder),
    )
    return Lesson(trainer, course, lambda: check_shared(trainer, items, hiding, CLOSE[settings.train.precision]))


def reference_rows(example: Example, encoder: Encoder) -> tuple[Row, ...]:
    """The reference text as the response. Raises UserError where there is none."""
    return (encoder.encode(example.prompt, statics.reference_text(example)),)


def with_statics(items: Sequence[Item], encoder: Encoder, which: str) -> list[Item]:
    """The items with the static responses that `which` chooses. Raises UserError where a row has none."""
    return [replace(item, statics=statics.static_rows(item.example, encoder, which)) for item in items]


@dataclass(frozen=True)
class Held:
    """What evaluation looks at: rows trained on, held-out rows, and the prompts of these, each once."""

    items: list[Item]
    tested: list[Item]
    prompts: list[Example]


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
        scalars = evaluate.held_out_loss(self.engine, LIKELIHOOD, self.held.tested, self.plain)
        masked = replace(self.hiding, hiding=replace(self.hiding.hiding, samples=0))
        read_masked = evaluate.held_out_loss(self.engine, LIKELIHOOD, self.held.tested, masked)
        scalars["eval/masked_loss"] = read_masked["eval/loss"]
        found, samples = spoken(self.engine, self.encoder, self.held.prompts, self.scene.judge, settings)
        histograms, table = self.composed()
        return Evaluation(scalars | found, histograms, [*samples, *table])

    @torch.no_grad()
    def composed(self) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
        """Distributions of the compositions of the first rows; and what was hidden, drawn, told and blamed there."""
        shown = range(min(self.scene.settings.eval.num_samples, len(self.held.items)))
        batch = collate(self.held.items, shown, self.hiding)
        drawn = Drawn(*self.engine(batch, output="drawn")[2:])
        found = self.composer.compose(drawn, batch)
        rewards = found.rewards[:, :-1]
        weights = functional.group_advantages(rewards, self.scene.algorithm.baseline)
        histograms = {"reward/compositions": rewards.flatten(), "advantage": weights.flatten()}
        return histograms, samples_of(self.encoder, batch, drawn, found, weights)


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
    bare = replace(batch, static=None, segments=None)
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
